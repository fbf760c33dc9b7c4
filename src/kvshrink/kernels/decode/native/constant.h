// What a part that all keys have before RoPE adds to their scores: it turns with the position, and with nothing else.
//
// Of a pair of channels the query q and the part m give, at the angle a: (q . m) cos a + (q x m) sin a. Within a page whose
// tokens follow each other the angle is that of the page's middle and one of a table, so that all pairs of a page are one
// product: of cosines, which are the same on both sides of the middle, and one of sines, which change their sign. Pairs
// that turn little within a page are a cubic of the place, all of them together. Sums are float32: the part may be far
// larger than what varies, and rounded it would shift scores.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <vector>

#include "job.h"
#include "multiply.h"

// What does not change from step to step: of these frequencies, how their waves go on within a page.
struct Waves {
    static constexpr double CENTRE = (PAGE - 1) / 2.0;
    const std::vector<float> given;  // frequencies of the pairs
    const double slow;               // radians within half a page, up to which a wave is a cubic
    int count = 0, quick = 0, depth = 0;  // waves; those that are not slow, which come first; of each product
    std::vector<int> pair;           // of each wave
    std::vector<float> freq;         // of each wave
    std::vector<float> even, odd;    // [depth][HALF], from the middle on: cosines, and powers 0 and 2; sines, and 1 and 3
    std::vector<double> step_cos, step_sin;  // a turn by a page

    Waves(std::vector<float> frequencies, double slow) : given(std::move(frequencies)), slow(slow) {
        count = given.size();
        for (bool slowly : {false, true}) {
            for (int p = 0; p < count; p++)
                if ((std::fabs(given[p]) * CENTRE <= slow) == slowly) pair.push_back(p);
            if (!slowly) quick = pair.size();
        }
        depth = quick + (quick < count ? 2 : 0);
        even.resize(size_t(depth) * HALF), odd.resize(size_t(depth) * HALF);
        for (int p : pair) {
            freq.push_back(given[p]);
            step_cos.push_back(std::cos(double(given[p]) * PAGE)), step_sin.push_back(std::sin(double(given[p]) * PAGE));
        }
        for (int i = 0; i < HALF; i++) {
            const double place = i + 0.5;
            for (int w = 0; w < quick; w++)
                even[w * HALF + i] = std::cos(freq[w] * place), odd[w * HALF + i] = std::sin(freq[w] * place);
            for (int k = quick; k < depth; k++)
                even[k * HALF + i] = k > quick ? place * place : 1, odd[k * HALF + i] = k > quick ? place * place * place : place;
        }
    }

    // Of a job: those of the last one nearly always, since the layers of a model turn alike.
    static std::shared_ptr<const Waves> of(const Job &job, bool rounded) {
        const double slow = rounded ? 0.15 : 0.02;  // of which a cubic leaves 2e-5 and 7e-9
        static std::mutex guard;
        static std::shared_ptr<const Waves> last;
        std::vector<float> asked;
        if (job.inv_freq) asked.assign(job.inv_freq, job.inv_freq + job.pairs);
        const std::lock_guard<std::mutex> own(guard);
        if (!last || last->slow != slow || last->given != asked) last = std::make_shared<const Waves>(std::move(asked), slow);
        return last;
    }
};

struct Constant {
    std::shared_ptr<const Waves> waves;  // none where keys are whole
    int wide = 0;                        // rows, up to a multiple of 16
    std::vector<float> rows, level;      // [b][waves][2][wide]: of cosines and sines; [b][rows]: of what does not turn

    // rounded: whether other products are of bfloat16.
    Constant(const Job &job, bool rounded) {
        if (!job.constant) return;
        waves = Waves::of(job, rounded);
        const int count = job.heads * job.x, d = job.constant_wide, pairs = waves->count;
        wide = padded(count, 16);
        rows.resize(size_t(job.batch) * pairs * 2 * wide), level.resize(size_t(job.batch) * count);
        for (int64_t i = 0; i < int64_t(job.batch) * count; i++) {
            const float *q = job.constant_query + i * d, *m = job.constant + i % count / job.x * int64_t(d);
            float *to = rows.data() + i / count * pairs * 2 * wide + i % count;
            for (int w = 0; w < pairs; w++, to += 2 * wide) {
                const int p = waves->pair[w], one = job.interleaved ? 2 * p : p, two = job.interleaved ? one + 1 : p + pairs;
                to[0] = job.scaling * (q[one] * m[one] + q[two] * m[two]);
                to[wide] = job.scaling * (q[two] * m[one] - q[one] * m[two]);
            }
            for (int c = 2 * pairs; c < d; c++) level[i] += q[c] * m[c];
        }
    }
};

// One task's use of it, page after page.
struct ConstantPages {
    const Constant &own;
    const Job &job;
    int row = 0;
    const int count;
    std::vector<float> even, odd, table, cos, sin;  // even, odd: [depth][wide], of this page
    std::vector<double> far_cos, far_sin;
    int64_t far = -1;

    ConstantPages(const Constant &constant, const Job &job) : own(constant), job(job), count(job.heads * job.x) {
        if (!own.waves) return;
        const Waves &all = *own.waves;
        even.resize(size_t(all.depth) * own.wide), odd.resize(size_t(all.depth) * own.wide);
        cos.resize(all.count), sin.resize(all.count), far_cos.resize(all.count), far_sin.resize(all.count);
    }

    void restart(int next_row) { row = next_row, far = -1; }

    // Scores of a page, [rows][PAGE], as they begin.
    void begin(int page, float *scores) {
        const Waves &all = *own.waves;
        if (all.count) {
            const int32_t *position = job.positions + row * job.positions_row + int64_t(page) * PAGE;
            bool follow = true;
            for (int t = 1; t < PAGE; t++) follow &= position[t] == int64_t(position[0]) + t;
            if (!follow) return place(position, scores);
            turn(position[0]);
            for (int r = 0; r < own.wide; r += 16) rows_at(r);
        }
        int r = 0;
        for (; r + LOT <= count; r += LOT) product<LOT>(all, r, scores);
        for (; r < count; r++) product<1>(all, r, scores);
    }

  private:
#if defined(__AVX512F__)
    static constexpr int LOT = 8;
#else
    static constexpr int LOT = 2;  // as many sums as registers hold
#endif
    const float *asked() const { return own.rows.data() + int64_t(row) * own.waves->count * 2 * own.wide; }

    // To a page's middle. One page further than the last one is a product, not a call of cos.
    void turn(int64_t position) {
        const Waves &all = *own.waves;
        if (far >= 0 && position == far + PAGE) {
            for (int w = 0; w < all.count; w++) {
                const double c = far_cos[w], s = far_sin[w];
                far_cos[w] = c * all.step_cos[w] - s * all.step_sin[w], far_sin[w] = s * all.step_cos[w] + c * all.step_sin[w];
            }
        } else {
            for (int w = 0; w < all.count; w++) {
                const double angle = (double(position) + Waves::CENTRE) * all.freq[w];
                far_cos[w] = std::cos(angle), far_sin[w] = std::sin(angle);
            }
        }
        for (int w = 0; w < all.count; w++) cos[w] = far_cos[w], sin[w] = far_sin[w];
        far = position;
    }

    // Sixteen rows' factors of even and odd waves.
    void rows_at(int r) {
        const Waves &all = *own.waves;
        const float *from = asked() + r;
        v16 power[4] = {};
        for (int w = 0; w < all.count; w++, from += 2 * own.wide) {
            const v16 a = load16(from), b = load16(from + own.wide);
            const v16 same = a * cos[w] + b * sin[w], turned = b * cos[w] - a * sin[w];
            if (w < all.quick) {
                store16(even.data() + w * own.wide + r, same), store16(odd.data() + w * own.wide + r, turned);
                continue;
            }
            const float angle = all.freq[w], square = angle * angle;
            power[0] += same, power[1] += turned * angle;
            power[2] += same * (square / -2), power[3] += turned * (square * angle / -6);
        }
        for (int k = 0; all.quick + k < all.depth; k++) {
            store16(even.data() + (all.quick + k) * own.wide + r, power[2 * k]);
            store16(odd.data() + (all.quick + k) * own.wide + r, power[2 * k + 1]);
        }
    }

    template <int R> void product(const Waves &all, int first, float *scores) const {
        v16 same[R], turned[R];
        for (int r = 0; r < R; r++) same[r] = all16(own.level[int64_t(row) * count + first + r]), turned[r] = v16{};
        for (int k = 0; k < all.depth; k++) {
            const v16 x = load16(all.even.data() + k * HALF), y = load16(all.odd.data() + k * HALF);
            const float *a = even.data() + k * own.wide + first, *b = odd.data() + k * own.wide + first;
            for (int r = 0; r < R; r++) same[r] += x * a[r], turned[r] += y * b[r];
        }
        const v16i back = {15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0};
        for (int r = 0; r < R; r++) {
            store16(scores + (first + r) * PAGE, __builtin_shuffle(same[r] - turned[r], back));
            store16(scores + (first + r) * PAGE + HALF, same[r] + turned[r]);
        }
    }

    // By a table of its own, for a page whose tokens do not follow each other.
    void place(const int32_t *position, float *scores) {
        const Waves &all = *own.waves;
        table.resize(size_t(2) * all.count * PAGE);
        for (int w = 0; w < all.count; w++)
            for (int t = 0; t < PAGE; t++) {
                const double angle = double(position[t]) * all.freq[w];
                table[2 * w * PAGE + t] = std::cos(angle), table[(2 * w + 1) * PAGE + t] = std::sin(angle);
            }
        for (int r = 0; r < count; r++)
            for (int v = 0; v < PAGE; v += 16) {
                v16 sum = all16(own.level[int64_t(row) * count + r]);
                for (int k = 0; k < 2 * all.count; k++) sum += load16(table.data() + k * PAGE + v) * asked()[k * own.wide + r];
                store16(scores + r * PAGE + v, sum);
            }
    }
};
