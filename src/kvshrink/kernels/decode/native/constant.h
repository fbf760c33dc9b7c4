// What a part that all keys have before RoPE adds to their scores: it turns with the position, and with nothing else.
//
// Of a pair of channels the query q and the part m give, at the angle a: (q . m) cos a + (q x m) sin a. Within a page whose
// tokens follow each other the angle is that of the page's middle and one of a table, so that all pairs of a page are one
// product. Pairs that turn little within a page are a cubic of the place, all of them together. Sums are float32: the part
// may be far larger than what varies, and rounded it would shift scores.
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
    static constexpr int POWERS = 4;
    static constexpr double CENTRE = (PAGE - 1) / 2.0;
    const std::vector<float> given;           // frequencies of the pairs
    const double slow;                        // radians within half a page, up to which a wave is a cubic
    int count = 0, quick = 0, depth = 0;      // waves; those that are not slow, which come first; of the product
    std::vector<int> pair;                    // of each wave; -1 for those that fill the slow ones up to whole vectors
    std::vector<float> freq;                  // of each wave
    std::vector<float> near;                  // [depth][PAGE]: cosines, sines, powers of the place from the middle
    std::vector<float> powers;                // [POWERS][count]: what a slow wave gives to each, its cosine or its sine
    std::vector<double> step_cos, step_sin;   // a turn by a page

    Waves(std::vector<float> frequencies, double slow) : given(std::move(frequencies)), slow(slow) {
        const int pairs = given.size();
        for (bool slowly : {false, true}) {
            for (int p = 0; p < pairs; p++)
                if ((std::fabs(given[p]) * CENTRE <= slow) == slowly) pair.push_back(p);
            if (!slowly) quick = pair.size();
        }
        pair.resize(quick + padded(pairs - quick, 16), -1);
        count = pair.size();
        for (int p : pair) freq.push_back(p < 0 ? 0.0f : given[p]);
        depth = 2 * quick + (quick < count ? POWERS : 0);
        fill();
    }

    void fill() {
        near.resize(size_t(depth) * PAGE), powers.resize(size_t(POWERS) * count);
        for (int w = 0; w < count; w++) {
            const double angle = freq[w];
            step_cos.push_back(std::cos(angle * PAGE)), step_sin.push_back(std::sin(angle * PAGE));
            powers[w] = 1, powers[count + w] = angle;
            powers[2 * count + w] = -angle * angle / 2, powers[3 * count + w] = -angle * angle * angle / 6;
        }
        for (int t = 0; t < PAGE; t++) {
            const double place = t - CENTRE;
            for (int w = 0; w < quick; w++) {
                near[w * PAGE + t] = std::cos(freq[w] * place);
                near[(quick + w) * PAGE + t] = std::sin(freq[w] * place);
            }
            for (int k = 0; 2 * quick + k < depth; k++) near[(2 * quick + k) * PAGE + t] = std::pow(place, k);
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
    std::vector<float> rows, level;      // [b][rows][2][waves]: of cosines and sines; [b][rows]: of what does not turn

    // rounded: whether other products are of bfloat16.
    Constant(const Job &job, bool rounded) {
        if (!job.constant) return;
        waves = Waves::of(job, rounded);
        const int count = job.heads * job.x, d = job.constant_wide, pairs = waves->given.size(), all = waves->count;
        rows.resize(size_t(job.batch) * count * 2 * all), level.resize(size_t(job.batch) * count);
        for (int64_t i = 0; i < int64_t(job.batch) * count; i++) {
            const float *q = job.constant_query + i * d, *m = job.constant + i % count / job.x * int64_t(d);
            float *cosines = rows.data() + i * 2 * all, *sines = cosines + all;
            for (int w = 0; w < all; w++) {
                const int p = waves->pair[w], one = job.interleaved ? 2 * p : p, two = job.interleaved ? one + 1 : p + pairs;
                if (p < 0) continue;
                cosines[w] = job.scaling * (q[one] * m[one] + q[two] * m[two]);
                sines[w] = job.scaling * (q[two] * m[one] - q[one] * m[two]);
            }
            for (int c = 2 * pairs; c < d; c++) level[i] += q[c] * m[c];
        }
    }
};

// One task's use of it, page after page.
struct ConstantPages {
    const Constant &own;
    const Job &job;
    const int row, count;
    std::vector<float> turned, table, cos, sin;
    std::vector<double> far_cos, far_sin;
    int64_t far = -1;

    ConstantPages(const Constant &constant, const Job &job, int row)
        : own(constant), job(job), row(row), count(job.heads * job.x) {
        if (!own.waves) return;
        const Waves &all = *own.waves;
        turned.resize(size_t(count) * all.depth);
        cos.resize(all.count), sin.resize(all.count), far_cos.resize(all.count), far_sin.resize(all.count);
    }

    // Scores of a page, [rows][PAGE], as they begin.
    void begin(int page, float *scores) {
        const Waves &all = *own.waves;
        const float *level = own.level.data() + int64_t(row) * count;
        for (int r = 0; r < count; r++)
            for (int v = 0; v < PAGE; v += 16) store16(scores + r * PAGE + v, all16(level[r]));
        if (!all.count) return;
        const int32_t *position = job.positions + row * job.positions_row + int64_t(page) * PAGE;
        const float *asked = own.rows.data() + int64_t(row) * count * 2 * all.count;
        bool follow = true;
        for (int t = 1; t < PAGE; t++) follow &= position[t] == int64_t(position[0]) + t;
        if (follow) {
            turn(position[0], asked);
            multiply_rows<FloatTiles>(count, turned.data(), all.depth, all.near.data(), PAGE, all.depth, PAGE, scores, PAGE);
        } else {
            place(position);
            multiply_rows<FloatTiles>(count, asked, 2 * all.count, table.data(), PAGE, 2 * all.count, PAGE, scores, PAGE);
        }
    }

  private:
    // Rows for a page that begins at this position. One page further than the last one is a product, not a call of cos.
    void turn(int64_t position, const float *asked) {
        const Waves &all = *own.waves;
        for (int w = 0; w < all.count; w++) {
            double c, s;
            if (far >= 0 && position == far + PAGE) {
                c = far_cos[w] * all.step_cos[w] - far_sin[w] * all.step_sin[w];
                s = far_sin[w] * all.step_cos[w] + far_cos[w] * all.step_sin[w];
            } else {
                const double angle = (double(position) + Waves::CENTRE) * all.freq[w];
                c = std::cos(angle), s = std::sin(angle);
            }
            far_cos[w] = c, far_sin[w] = s, cos[w] = c, sin[w] = s;
        }
        far = position;
        const int quick = all.quick, slow = all.count - quick;
        const float *c = cos.data(), *s = sin.data();
        for (int r = 0; r < count; r++, asked += 2 * all.count) {
            const float *a = asked, *b = asked + all.count;
            float *to = turned.data() + size_t(r) * all.depth;
            for (int w = 0; w < quick; w++) to[w] = a[w] * c[w] + b[w] * s[w];
            for (int w = 0; w < quick; w++) to[quick + w] = b[w] * c[w] - a[w] * s[w];
            if (slow) cubic(a + quick, b + quick, slow, to + 2 * quick);
        }
    }

    // All slow waves of a row together, as powers of the place.
    void cubic(const float *a, const float *b, int slow, float *to) const {
        const Waves &all = *own.waves;
        const float *c = cos.data() + all.quick, *s = sin.data() + all.quick;
        const float *power[Waves::POWERS];
        for (int k = 0; k < Waves::POWERS; k++) power[k] = all.powers.data() + size_t(k) * all.count + all.quick;
        v16 sum[Waves::POWERS] = {};
        for (int w = 0; w < slow; w += 16) {
            const v16 even = load16(a + w) * load16(c + w) + load16(b + w) * load16(s + w);
            const v16 odd = load16(b + w) * load16(c + w) - load16(a + w) * load16(s + w);
            for (int k = 0; k < Waves::POWERS; k++) sum[k] += (k % 2 ? odd : even) * load16(power[k] + w);
        }
        for (int k = 0; k < Waves::POWERS; k++) to[k] = sum16(sum[k]);
    }

    // A table of a page's own, whose tokens do not follow each other.
    void place(const int32_t *position) {
        const Waves &all = *own.waves;
        table.resize(size_t(2) * all.count * PAGE);
        for (int w = 0; w < all.count; w++)
            for (int t = 0; t < PAGE; t++) {
                const double angle = double(position[t]) * all.freq[w];
                table[w * PAGE + t] = std::cos(angle), table[(all.count + w) * PAGE + t] = std::sin(angle);
            }
    }
};
