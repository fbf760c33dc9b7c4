// What a part that all keys have before RoPE adds to their scores: it turns with the position, and with nothing else.
//
// Of a pair of channels the query q and the part m give, at the angle a: (q . m) cos a + (q x m) sin a. Within a page whose
// tokens follow each other the angle is that of the page's middle and one of a table, so that all pairs of a page are one
// product. Pairs that turn little within a page are a cubic of the place, all of them together. Sums are float32: the part
// may be far larger than what varies, and rounded it would shift scores.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "job.h"
#include "multiply.h"

struct Constant {
    static constexpr int POWERS = 4;
    static constexpr double SLOW = 0.15;  // radians within half a page, of which a cubic leaves 2e-5
    static constexpr double CENTRE = (PAGE - 1) / 2.0;
    int waves = 0, quick = 0, depth = 0;      // pairs that turn; those that are not slow, which come first; of the product
    std::vector<int> pair;                    // of each wave; -1 for those that fill the slow ones up to whole vectors
    std::vector<float> freq;                  // of each wave
    std::vector<float> rows, level;           // [b][rows][2][waves]: of cosines and sines; [b][rows]: of what does not turn
    std::vector<float> near;                  // [depth][PAGE]: cosines, sines, powers of the place from the middle
    std::vector<float> powers;                // [POWERS][waves]: what a slow wave gives to each, its cosine or its sine
    std::vector<double> step_cos, step_sin;   // a turn by a page

    Constant() {}
    explicit Constant(const Job &job) {
        if (!job.constant) return;
        const int pairs = job.inv_freq ? job.pairs : 0;
        for (bool slow : {false, true}) {
            for (int p = 0; p < pairs; p++)
                if ((std::fabs(job.inv_freq[p]) * CENTRE <= SLOW) == slow) pair.push_back(p);
            if (!slow) quick = pair.size();
        }
        pair.resize(quick + padded(pairs - quick, 16), -1);
        waves = pair.size();
        for (int p : pair) freq.push_back(p < 0 ? 0.0f : job.inv_freq[p]);
        depth = 2 * quick + (quick < waves ? POWERS : 0);
        ask(job), tables(job);
    }

    void ask(const Job &job) {
        const int count = job.heads * job.x, d = job.constant_wide, pairs = job.inv_freq ? job.pairs : 0;
        rows.resize(size_t(job.batch) * count * 2 * waves), level.resize(size_t(job.batch) * count);
        for (int64_t i = 0; i < int64_t(job.batch) * count; i++) {
            const float *q = job.constant_query + i * d, *m = job.constant + i % count / job.x * int64_t(d);
            float *cosines = rows.data() + i * 2 * waves, *sines = cosines + waves;
            for (int w = 0; w < waves; w++) {
                const int p = pair[w], one = job.interleaved ? 2 * p : p, two = job.interleaved ? one + 1 : p + pairs;
                if (p < 0) continue;
                cosines[w] = job.scaling * (q[one] * m[one] + q[two] * m[two]);
                sines[w] = job.scaling * (q[two] * m[one] - q[one] * m[two]);
            }
            for (int c = 2 * pairs; c < d; c++) level[i] += q[c] * m[c];
        }
    }

    void tables(const Job &job) {
        near.resize(size_t(depth) * PAGE), powers.resize(size_t(POWERS) * waves);
        for (int w = 0; w < waves; w++) {
            const double angle = freq[w];
            step_cos.push_back(std::cos(angle * PAGE)), step_sin.push_back(std::sin(angle * PAGE));
            powers[w] = 1, powers[waves + w] = angle;
            powers[2 * waves + w] = -angle * angle / 2, powers[3 * waves + w] = -angle * angle * angle / 6;
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
};

// One task's use of it, page after page.
struct ConstantPages {
    const Constant &all;
    const Job &job;
    const int row, count;
    std::vector<float> turned, table, cos, sin;
    std::vector<double> far_cos, far_sin;
    int64_t far = -1;

    ConstantPages(const Constant &all, const Job &job, int row)
        : all(all), job(job), row(row), count(job.heads * job.x), turned(size_t(count) * std::max(all.depth, 2 * all.waves)),
          cos(all.waves), sin(all.waves), far_cos(all.waves), far_sin(all.waves) {}

    // Scores of a page, [rows][PAGE], as they begin.
    void begin(int page, float *scores) {
        const float *level = all.level.data() + int64_t(row) * count;
        for (int r = 0; r < count; r++)
            for (int v = 0; v < PAGE; v += 16) store16(scores + r * PAGE + v, all16(level[r]));
        if (!all.waves) return;
        const int32_t *position = job.positions + row * job.positions_row + int64_t(page) * PAGE;
        const float *asked = all.rows.data() + int64_t(row) * count * 2 * all.waves;
        bool follow = true;
        for (int t = 1; t < PAGE; t++) follow &= position[t] == int64_t(position[0]) + t;
        if (follow) {
            turn(position[0], asked);
            multiply_rows<FloatTiles>(count, turned.data(), all.depth, all.near.data(), PAGE, all.depth, PAGE, scores, PAGE);
        } else {
            place(position);
            multiply_rows<FloatTiles>(count, asked, 2 * all.waves, table.data(), PAGE, 2 * all.waves, PAGE, scores, PAGE);
        }
    }

  private:
    // Rows for a page that begins at this position. One page further than the last one is a product, not a call of cos.
    void turn(int64_t position, const float *asked) {
        for (int w = 0; w < all.waves; w++) {
            double c, s;
            if (far >= 0 && position == far + PAGE) {
                c = far_cos[w] * all.step_cos[w] - far_sin[w] * all.step_sin[w];
                s = far_sin[w] * all.step_cos[w] + far_cos[w] * all.step_sin[w];
            } else {
                const double angle = (double(position) + Constant::CENTRE) * all.freq[w];
                c = std::cos(angle), s = std::sin(angle);
            }
            far_cos[w] = c, far_sin[w] = s, cos[w] = c, sin[w] = s;
        }
        far = position;
        const int quick = all.quick, slow = all.waves - quick;
        const float *c = cos.data(), *s = sin.data();
        for (int r = 0; r < count; r++, asked += 2 * all.waves) {
            const float *a = asked, *b = asked + all.waves;
            float *to = turned.data() + size_t(r) * all.depth;
            for (int w = 0; w < quick; w++) to[w] = a[w] * c[w] + b[w] * s[w];
            for (int w = 0; w < quick; w++) to[quick + w] = b[w] * c[w] - a[w] * s[w];
            if (slow) cubic(a + quick, b + quick, slow, to + 2 * quick);
        }
    }

    // All slow waves of a row together, as powers of the place.
    void cubic(const float *a, const float *b, int slow, float *to) const {
        const float *c = cos.data() + all.quick, *s = sin.data() + all.quick;
        const float *power[Constant::POWERS];
        for (int k = 0; k < Constant::POWERS; k++) power[k] = all.powers.data() + size_t(k) * all.waves + all.quick;
        v16 sum[Constant::POWERS] = {};
        for (int w = 0; w < slow; w += 16) {
            const v16 even = load16(a + w) * load16(c + w) + load16(b + w) * load16(s + w);
            const v16 odd = load16(b + w) * load16(c + w) - load16(a + w) * load16(s + w);
            for (int k = 0; k < Constant::POWERS; k++) sum[k] += (k % 2 ? odd : even) * load16(power[k] + w);
        }
        for (int k = 0; k < Constant::POWERS; k++) to[k] = sum16(sum[k]);
    }

    // A table of a page's own, whose tokens do not follow each other.
    void place(const int32_t *position) {
        table.resize(size_t(2) * all.waves * PAGE);
        for (int w = 0; w < all.waves; w++)
            for (int t = 0; t < PAGE; t++) {
                const double angle = double(position[t]) * all.freq[w];
                table[w * PAGE + t] = std::cos(angle), table[(all.waves + w) * PAGE + t] = std::sin(angle);
            }
    }
};
