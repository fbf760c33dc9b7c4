// A run of pages of one batch row: softmax attention to them, page by page.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "basis.h"

// What a run of pages leaves: of each row the highest score, and the mass (in 16 parts) and sum of values relative to it.
struct Result {
    const int row;
    std::vector<float> top, mass;
    Buffer<float> sums;  // [rows][sum_wide]
    Result(int row, int rows, int sum_wide) : row(row), top(rows, NEVER), mass(rows * 16, 0.0f), sums(size_t(rows) * sum_wide) {}
};

// A thread's, for one run after the other.
template <class T> struct Task {
    typedef typename T::Lane Lane;
    const Shared<T> &all;
    const Job &job;
    int row = 0, first = 0, last = 0;
    const int group_heads;
    float *top = nullptr, *mass = nullptr, *sums = nullptr;  // of the result
    std::vector<float> added;
    // tiles of the page at hand
    Buffer<Lane> keys, values, weights, folded;
    Buffer<float> scores, products, turned, cos, sin, block;
    Buffer<uint8_t> codes;
    Buffer<float> numbers, floats;
    Scratch room;
    std::vector<double> far_cos, far_sin;
    int64_t far = -1;
    ConstantPages constant;
    bool follow = false;  // whether this page's tokens follow each other
    Buffer<float> back_cos, back_sin;                      // [wide]
    Buffer<float> slopes, slow_latent, slow_scores;        // [rows][wide], [2x][rank_wide], [2x][PAGE]
    Buffer<Lane> slow_packed, slow_asked;                  // [2x][slow_depth], [2x][depth]

    explicit Task(const Shared<T> &s)
        : all(s), job(s.job), group_heads(s.job.heads / s.job.keys.groups), added(s.rows),
          keys(size_t(s.depth) * PAGE), values(size_t(T::value_depth) * s.value_wide),
          weights(size_t(s.rows) * T::value_depth), folded(folded_of(s)), scores(size_t(s.rows) * PAGE), products(size_t(s.rows) * PAGE), turned(size_t(s.rows) * s.how.wide),
          cos(size_t(s.how.turning) * 4 * PAGE), sin(size_t(s.how.turning) * 4 * PAGE), block(BLOCK * PAGE),
          codes(size_t(PAGE) * stride_of(s.job) * 3 / 2), numbers(size_t(2) * PAGE * stride_of(s.job)),
          floats(size_t(PAGE) * stride_of(s.job)),
          room{codes.data, codes.data + size_t(PAGE) * stride_of(s.job), stride_of(s.job), numbers.data, floats.data}, far_cos(s.how.step_cos.size()), far_sin(s.how.step_cos.size()),
          constant(s.constant, s.job),
          back_cos(s.how.wide), back_sin(s.how.wide), slopes(size_t(s.rows) * s.how.wide),
          slow_latent(size_t(2) * s.job.x * s.how.rank_wide), slow_scores(size_t(2) * s.job.x * PAGE),
          slow_packed(size_t(2) * s.job.x * s.how.slow_depth), slow_asked(size_t(2) * s.job.x * s.depth) {
        for (int i = 0; i < s.how.wide; i++) back_cos.data[i] = 1;  // of columns that do not turn
    }

    // Queries of all rows, or weights of all rows for each group of channels.
    static size_t folded_of(const Shared<T> &s) {
        const Side &v = s.job.values;
        const size_t groups = (v.width + v.group - 1) / std::max(v.group, 1);
        return s.rows * std::max<size_t>(s.depth, (v.form == TOKEN ? groups : 1) * T::value_depth);
    }
    static int stride_of(const Job &j) { return padded(std::max(j.keys.width, j.values.width), 64); }

    void run(Result &result, int begin, int end) {
        row = result.row, first = begin, last = end, far = -1;
        top = result.top.data(), mass = result.mass.data(), sums = result.sums.data;
        constant.restart(row);
        room.ahead = Ahead();
        for (int page = first; page < last; page++) {
            if (!any(page)) continue;
            const float *near_cos = all.how.near_cos.data(), *near_sin = all.how.near_sin.data();
            if (job.rebuild) place(page, near_cos, near_sin);
            if (job.constant)
                constant.begin(page, scores.data);
            else
                std::memset(scores.data, 0, size_t(all.rows) * PAGE * 4);
            for (int g = 0; g < job.keys.groups; g++) {
                const Spot at(job.keys, row, job.pages, page, g);
                ahead(job.keys, page, g);
                if (!at.there) continue;
                if (job.rebuild) {
                    T::load_keys(job.keys, at, room, keys.data);
                    for (int i = 0; i < group_heads; i++) rebuild(g * group_heads + i, near_cos, near_sin);
                } else {
                    score(at, g);
                }
            }
            soften(page);
            for (int g = 0; g < job.values.groups && !job.only_scores; g++) {
                const Spot at(job.values, row, job.pages, page, g);
                ahead(job.values, page, g);
                if (at.there) add(at, g);
            }
        }
        if (job.only_scores) return;
        T::done(job.values, sums, all.rows);
        all.value_bytes.done(sums, all.rows, all.sum_wide);
    }

    // The group of the next page begins to come nearer.
    __attribute__((always_inline)) void ahead(const Side &side, int page, int g) {
        room.ahead.finish();
        if (page + 1 < last) room.ahead.begin(side, Spot(side, row, job.pages, page + 1, g));
    }

    // Slots of a page that a lane's rows may read, as [begin, end): what is filled, but for the row's first ones.
    int begin(int page) const {
        return job.skips ? std::clamp(job.skips[row] - page * PAGE, 0, PAGE) : 0;
    }
    int end(int page, int lane) const {
        const int64_t at = (int64_t(row) * job.keys.lanes + lane) * job.pages + page;
        return !job.keys.table[at] ? 0 : job.counts ? job.counts[at] : PAGE;
    }
    bool any(int page) const {
        for (int lane = 0; lane < job.keys.lanes; lane++)
            if (end(page, lane) > begin(page)) return true;
        return false;
    }

    // Scores of a group whose queries fit its latents.
    void score(const Spot &at, int g) {
        const int count = group_heads * job.x, first_row = g * count;
        float *to = scores.data + first_row * PAGE;
        const Lane *rows = all.query.data() + (int64_t(row) * all.rows + first_row) * all.depth;
        if (T::direct_keys(job.keys, count)) return T::dot_rows(job.keys, at, rows, all.depth, count, to, room);
        const float *query = job.query + (int64_t(row) * all.rows + first_row) * job.wide;
        if (all.key_bytes.fits && all.key_bytes.score(at, room, int64_t(row) * all.rows + first_row, query,
                                                      reinterpret_cast<uint8_t *>(keys.data), to))
            return;
        if (T::mixes_keys(job.keys)) return by_parts(at, rows, count, to);
        if (T::folds_keys(job.keys)) {
            T::fold_keys(job.keys, at, room, query, count, folded.data, added.data(), keys.data);
            for (int r = 0; r < count; r++)
                for (int v = 0; v < PAGE; v += 16) store16(to + r * PAGE + v, load16(to + r * PAGE + v) + added[r]);
            rows = folded.data;
        } else if (T::scales_tokens(job.keys)) {
            return by_token(at, rows, count, first_row, to);
        } else {
            T::load_keys(job.keys, at, room, keys.data);
        }
        multiply_rows<T>(count, rows, all.depth, keys.data, PAGE, all.depth, PAGE, to, PAGE);
    }

    // The same of keys of many channels, of which the nearest memory holds a part.
    void by_parts(const Spot &at, const Lane *rows, int count, float *to) {
        T::unpack_keys(job.keys, at, room);
        for (int c = 0; c < job.keys.width; c += PART) {
            const int end = std::min(job.keys.width, c + PART);
            T::some_keys(job.keys, room, c, end, keys.data);
            multiply_rows<T>(count, rows + T::key_depth(c), all.depth, keys.data, PAGE, T::key_depth(end - c), PAGE, to, PAGE);
        }
    }
    static constexpr int PART = 256;

    // The same of keys whose tokens have a scale and a minimum for each group of channels, which come to the products.
    void by_token(const Spot &at, const Lane *rows, int count, int first_row, float *to) {
        T::load_levels(job.keys, at, room, keys.data);
        const float *scale = room.numbers, *low = scale + PAGE * room.stride;
        const float *sum = all.query_sums.data() + (int64_t(row) * all.rows + first_row) * all.key_shares;
        for (int c = 0, g = 0; c < job.keys.width; c += job.keys.group, g++) {
            const int lane = T::key_depth(c), depth = T::key_depth(std::min(job.keys.group, job.keys.width - c));
            std::memset(products.data, 0, size_t(count) * PAGE * 4);
            multiply_rows<T>(count, rows + lane, all.depth, keys.data + lane * PAGE, PAGE, depth, PAGE, products.data, PAGE);
            for (int r = 0; r < count; r++)
                for (int v = 0; v < PAGE; v += 16) {
                    const v16 own = load16(products.data + r * PAGE + v) * load16(scale + g * PAGE + v);
                    store16(to + r * PAGE + v,
                            load16(to + r * PAGE + v) + own + load16(low + g * PAGE + v) * sum[r * all.key_shares + g]);
                }
        }
    }

    // The weighted sum of a group's values.
    void add(const Spot &at, int g) {
        const int count = all.rows / job.values.groups, wide = all.value_wide, apart = all.sum_wide, group = job.values.group;
        float *to = sums + int64_t(g) * count * apart;
        if (T::direct_values(job.values, count))
            return T::add_rows(job.values, at, scores.data + g * count * PAGE, count, weights.data, to, apart, room);
        if (all.value_bytes.fits) {
            auto *bytes = reinterpret_cast<uint8_t *>(folded.data);
            if (all.value_bytes.add(at, room, scores.data + g * count * PAGE, count, bytes, to, apart)) return;
        }
        if (T::folds_values(job.values, count)) {
            T::fold_values(job.values, at, room, scores.data + g * count * PAGE, count, folded.data, to, apart);
            T::load_codes(job.values, at, room, values.data, wide);
            for (int c = 0; c < job.values.width; c += group)
                multiply_rows<T>(count, folded.data + c / group * count * T::value_depth, T::value_depth, values.data + c,
                                 wide, T::value_depth, std::min(group, wide - c), to + c, apart);
            return;
        }
        T::load_values(job.values, at, room, values.data, wide);
        for (int r = 0; r < count; r++)
            T::pack_weights(scores.data + (g * count + r) * PAGE, weights.data + r * T::value_depth);
        multiply_rows<T>(count, weights.data, T::value_depth, values.data, wide, T::value_depth, wide, to, apart);
    }

    // Queries for this page. Tokens of a page nearly always follow each other; where they do not (pads, cut pages), the
    // page gets a table of its own, the queries are not turned back, and no block is slow.
    void place(int page, const float *&near_cos, const float *&near_sin) {
        const int wide = all.how.wide;
        const float *asked = all.asked.data() + int64_t(row) * all.rows * wide;
        const int32_t *position = job.positions + row * job.positions_row + int64_t(page) * PAGE;
        follow = true;
        for (int t = 1; all.how.turning && t < PAGE; t++) follow &= position[t] == int64_t(position[0]) + t;
        if (!follow) {
            std::memcpy(turned.data, asked, size_t(all.rows) * wide * 4);
            near_cos = cos.data, near_sin = sin.data;
            for (int p = 0; p < 4 * all.how.turning; p++)
                for (int t = 0; all.how.pairs[p] >= 0 && t < PAGE; t++) {
                    const double angle = double(position[t]) * job.inv_freq[all.how.pairs[p]];
                    cos.data[p * PAGE + t] = job.scaling * std::cos(angle);
                    sin.data[p * PAGE + t] = job.scaling * std::sin(angle);
                }
            return;
        }
        if (all.how.turning) go(position[0]);
        const v16i swap = {4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11};
        for (int q = 0; q < all.rows; q++)
            for (int i = 0; i < wide; i += 16) {
                const v16 x = load16(asked + q * wide + i);
                const v16 y = x * load16(back_cos.data + i) + __builtin_shuffle(x, swap) * load16(back_sin.data + i);
                store16(turned.data + q * wide + i, y);
                store16(slopes.data + q * wide + i, __builtin_shuffle(y, swap) * load16(all.how.theta.data() + i));
            }
    }

    // What turns queries back by the page's first position, or by its middle where blocks are slow. One page further
    // than the last one is a product, not a call of cos and sin.
    void go(int64_t position) {
        const int n = all.how.step_cos.size();
        for (int f = 0; f < n; f++) {
            double c, s;
            if (far >= 0 && position == far + PAGE) {
                c = far_cos[f] * all.how.step_cos[f] - far_sin[f] * all.how.step_sin[f];
                s = far_sin[f] * all.how.step_cos[f] + far_cos[f] * all.how.step_sin[f];
            } else {
                const double angle = double(position) * job.inv_freq[f];
                c = std::cos(angle), s = std::sin(angle);
            }
            far_cos[f] = c, far_sin[f] = s;
        }
        far = position;
        for (int p = 0; p < 4 * all.how.turning; p++) {
            const int f = all.how.pairs[p], i = p / 4 * 8 + p % 4;
            if (f < 0) continue;
            double c = far_cos[f], s = far_sin[f];
            if (p >= 4 * all.how.quick) {
                const double first = c;
                c = c * all.how.mid_cos[f] - s * all.how.mid_sin[f], s = s * all.how.mid_cos[f] + first * all.how.mid_sin[f];
            }
            back_cos.data[i] = back_cos.data[i + 4] = job.scaling * c;
            back_sin.data[i] = job.scaling * s, back_sin.data[i + 4] = -job.scaling * s;
        }
    }

    // Scores of one KV head: 8 channels of all its keys at a time, turned while they are in registers.
    void rebuild(int h, const float *near_cos, const float *near_sin) {
        const int count = follow ? all.how.quick : all.how.blocks;
        float *to = scores.data + h * job.x * PAGE;
        for (int b = 0; b < count; b++) {
            const int64_t at = int64_t(h) * all.how.wide + b * 8;
            multiply<T, 8>(all.how.basis.data() + at * all.depth, all.depth, keys.data, PAGE, all.depth, PAGE, block.data, PAGE,
                           all.how.mean.data() + at);
            dots(block.data, b < all.how.turning ? near_cos + b * 4 * PAGE : nullptr, near_sin + b * 4 * PAGE,
                 turned.data + int64_t(h) * job.x * all.how.wide + b * 8, all.how.wide, to);
        }
        if (count < all.how.blocks) absorb(h, to);
    }

    // What the slow blocks add to a head's scores.
    void absorb(int h, float *to) {
        const int x = job.x, wide = all.how.rank_wide, rank = job.keys.width, count = (all.how.blocks - all.how.quick) * 8;
        for (int r = 0; r < 2 * x; r++) {
            const float *from = (r < x ? turned.data : slopes.data) + (int64_t(h) * x + r % x) * all.how.wide + all.how.quick * 8;
            T::pack(from, count, slow_packed.data + r * all.how.slow_depth);
            // the mean in float32: rounded, it would shift the scores of all tokens alike
            const float *mean = all.how.mean.data() + int64_t(h) * all.how.wide + all.how.quick * 8;
            v16 sums = all16(0.0f);
            int c = 0;
            for (; c + 16 <= count; c += 16) sums += load16(from + c) * load16(mean + c);
            float sum = sum16(sums);
            for (; c < count; c++) sum += from[c] * mean[c];  // count is a multiple of 8
            for (int v = 0; v < PAGE; v += 16) store16(slow_scores.data + r * PAGE + v, all16(sum));
        }
        std::memset(slow_latent.data, 0, size_t(2) * x * wide * 4);
        multiply_rows<T>(2 * x, slow_packed.data, all.how.slow_depth, all.how.slow_basis.data() + int64_t(h) * all.how.slow_depth * wide,
                         wide, all.how.slow_depth, wide, slow_latent.data, wide);
        for (int r = 0; r < 2 * x; r++) {
            const float *latent = slow_latent.data + r * wide;
            T::pack(latent, rank, slow_asked.data + r * all.depth);
        }
        multiply_rows<T>(2 * x, slow_asked.data, all.depth, keys.data, PAGE, all.depth, PAGE, slow_scores.data, PAGE);
        const v16 first = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for (int r = 0; r < x; r++)
            for (int v = 0; v < PAGE; v += 16) {
                const float *level = slow_scores.data + r * PAGE + v, *slope = level + x * PAGE;
                store16(to + r * PAGE + v,
                        load16(to + r * PAGE + v) + load16(level) + (first + (v - MIDDLE)) * load16(slope));
            }
    }

    // What 8 channels of the keys add to all rows' scores; cos null: they do not turn.
    void dots(const float *k, const float *cos, const float *sin, const float *q, int q_row, float *to) {
        for (int v = 0; v < PAGE; v += 16) {
            v16 x[8];
            for (int i = 0; i < 8; i++) x[i] = load16(k + i * PAGE + v);
            for (int i = 0; cos && i < 4; i++) {
                const v16 c = load16(cos + i * PAGE + v), s = load16(sin + i * PAGE + v), first = x[i];
                x[i] = first * c - x[4 + i] * s;
                x[4 + i] = x[4 + i] * c + first * s;
            }
            for (int r = 0; r < job.x; r++) {
                v16 sum = load16(to + r * PAGE + v), other = x[4] * q[r * q_row + 4];
                for (int i = 0; i < 4; i++) sum += x[i] * q[r * q_row + i];
                for (int i = 5; i < 8; i++) other += x[i] * q[r * q_row + i];
                store16(to + r * PAGE + v, sum + other);
            }
        }
    }

    // Scores to weights of this page; sums so far shrink where a higher score has come.
    void soften(int page) {
        const int head_rows = all.rows / job.keys.lanes, from = begin(page);
        for (int q = 0; q < all.rows; q++) {
            float *s = scores.data + q * PAGE;
            const int to = end(page, q / head_rows);
            if (to <= from && !job.scores) {  // a lane that has no such page
                store16(s, all16(0.0f)), store16(s + 16, all16(0.0f));
                continue;
            }
            v16 lo = load16(s), hi = load16(s + 16);
            if (job.softcap > 0) {
                lo = tanh16(lo / job.softcap) * job.softcap;
                hi = tanh16(hi / job.softcap) * job.softcap;
            }
            if (job.visible) {
                const uint8_t *seen = job.visible + row * job.visible_row + q / job.x * job.visible_head +
                                      q % job.x * job.visible_x + int64_t(page) * PAGE * job.visible_token;
                for (int t = 0; t < 16; t++) {
                    if (!seen[t * job.visible_token]) lo[t] = NEVER;
                    if (!seen[(t + 16) * job.visible_token]) hi[t] = NEVER;
                }
            }
            if (from > 0 || to < PAGE)
                for (int t = 0; t < 16; t++) {
                    if (t < from || t >= to) lo[t] = NEVER;
                    if (t + 16 < from || t + 16 >= to) hi[t] = NEVER;
                }
            if (job.scores) {
                float *out = job.scores + ((int64_t(row) * all.rows + q) * job.pages + page) * PAGE;
                store16(out, lo), store16(out + 16, hi);
            }
            const float highest = std::max(max16(lo), max16(hi));
            if (highest > top[q]) {
                const float shrink = std::exp(top[q] - highest);  // 0 at first
                store16(mass + 16 * q, load16(mass + 16 * q) * shrink);
                float *sum = sums + q * all.sum_wide;
                for (int i = 0; i < all.sum_wide; i += 16) store16(sum + i, load16(sum + i) * shrink);
                top[q] = highest;
            }
            const float base = top[q] == NEVER ? 0.0f : top[q];
            lo = exp16(lo - base), hi = exp16(hi - base);
            store16(mass + 16 * q, load16(mass + 16 * q) + lo + hi);
            store16(s, lo), store16(s + 16, hi);
        }
    }
};
