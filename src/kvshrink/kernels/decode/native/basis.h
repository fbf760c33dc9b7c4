// How keys are rebuilt and turned: the basis column by column, as products read it. It does not change from step to step,
// so that Python keeps it (../cpu.py). And what all tasks of a step share.
//
// A head's columns stand in blocks of 8: four first halves of RoPE's pairs and their second halves, or columns that do not
// turn; short blocks are filled with columns of zeros. Quick blocks come first. Slow blocks turn so little within a page
// that a key's turn by its place is 1 + place * frequency * (quarter turn), places counted from the page's middle. Their
// keys are not rebuilt: two queries for each row, one for either term, are taken through the basis once a page. That is
// a quarter of the work, for half of the pairs.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "constant.h"
#include "multiply.h"

constexpr float MIDDLE = (PAGE - 1) / 2.0f;

template <class T> struct Rebuild {
    typedef typename T::Lane Lane;
    int group_heads = 0, depth = 0;
    int turning = 0, blocks = 0, quick = 0;   // blocks: those of pairs, all, those that are rebuilt on every page
    int wide = 0, slow_depth = 0, rank_wide = 0;
    std::vector<int> pairs, column;           // the pair of each block's four places, the column of each place; -1: none
    std::vector<Lane> basis, slow_basis;
    std::vector<float> mean;                  // [h][wide]
    std::vector<float> near_cos, near_sin;    // [place of a pair][PAGE]: a turn by the place in a page
    std::vector<float> theta;                 // frequency of each place's pair, and minus it: what turns by a quarter
    std::vector<double> step_cos, step_sin, mid_cos, mid_sin;  // by pair: a turn by a page, by half a page

    Rebuild() {}
    explicit Rebuild(const Job &job) : group_heads(job.heads / job.keys.groups), depth(T::key_depth(job.keys.width)) {
        order(job), fill_turn(job), fill_basis(job), fill_slow(job);
    }

    static int pair_count(const Job &job) { return job.inv_freq ? job.pairs : 0; }

    void order(const Job &job) {
        const int f = pair_count(job), rest = job.wide - 2 * f;
        turning = (f + 3) / 4, blocks = turning + (rest + 7) / 8, wide = padded(blocks * 8, 16);
        std::vector<int> slow;
        for (int b = 0; b < turning; b++) {
            float most = 0;
            for (int i = 4 * b; i < std::min(4 * b + 4, f); i++) most = std::max(most, std::fabs(job.inv_freq[i]));
            if (most * MIDDLE <= T::still)
                slow.push_back(b);
            else
                place(job, b, f);
        }
        quick = T::still > 0 ? pairs.size() / 4 : blocks;
        for (int b : slow) place(job, b, f);
        column.resize(wide, -1);
        for (int i = 0; i < rest; i++) column[turning * 8 + i] = 2 * f + i;
    }

    void place(const Job &job, int block, int f) {
        for (int half = 0; half < 2; half++)
            for (int i = 4 * block; i < 4 * block + 4; i++) {
                if (!half) pairs.push_back(i < f ? i : -1);
                column.push_back(i >= f ? -1 : job.interleaved ? 2 * i + half : i + half * f);
            }
    }

    void fill_turn(const Job &job) {
        near_cos.resize(size_t(4) * turning * PAGE), near_sin.resize(near_cos.size()), theta.resize(wide);
        for (int f = 0; f < pair_count(job); f++) {
            const double angle = job.inv_freq[f];
            mid_cos.push_back(std::cos(angle * MIDDLE)), mid_sin.push_back(std::sin(angle * MIDDLE));
            step_cos.push_back(std::cos(angle * PAGE)), step_sin.push_back(std::sin(angle * PAGE));
        }
        for (int p = 0; p < 4 * turning; p++) {
            const double angle = pairs[p] < 0 ? 0.0 : job.inv_freq[pairs[p]], c = std::cos(angle), s = std::sin(angle);
            theta[p / 4 * 8 + p % 4] = angle, theta[p / 4 * 8 + 4 + p % 4] = -angle;
            double x = 1, y = 0;
            for (int t = 0; t < PAGE; t++) {
                near_cos[p * PAGE + t] = x, near_sin[p * PAGE + t] = y;
                const double next = x * c - y * s;
                y = y * c + x * s, x = next;
            }
        }
    }

    // Row i of a head's basis, or its mean after the last row.
    const float *basis_row(const Job &job, int head, int i) const {
        const int64_t a = int64_t(group_heads) * job.wide, group = head / group_heads;
        const float *row = i < job.keys.width ? job.up + (group * job.keys.width + i) * a : job.mean + group * a;
        return row + head % group_heads * job.wide;
    }

    void fill_basis(const Job &job) {
        const int r = job.keys.width;
        const int64_t a = int64_t(group_heads) * job.wide;
        basis.resize(size_t(job.heads) * wide * depth), mean.resize(size_t(job.heads) * wide);
        for (int h = 0; h < job.heads; h++)
            for (int i = 0; i < wide; i++)
                if (column[i] >= 0) {
                    T::pack(basis_row(job, h, 0) + column[i], a, r, basis.data() + (size_t(h) * wide + i) * depth);
                    mean[h * wide + i] = basis_row(job, h, r)[column[i]];
                }
    }

    // [h][slow_depth][rank_wide].
    void fill_slow(const Job &job) {
        const int count = (blocks - quick) * 8;
        slow_depth = T::key_depth(count), rank_wide = padded(job.keys.width, 32);
        slow_basis.resize(size_t(job.heads) * slow_depth * rank_wide);
        std::vector<float> row(count);
        std::vector<Lane> packed(slow_depth);
        for (int h = 0; h < job.heads; h++)
            for (int i = 0; i < job.keys.width; i++) {
                for (int c = 0; c < count; c++) {
                    const int at = column[quick * 8 + c];
                    row[c] = at < 0 ? 0.0f : basis_row(job, h, i)[at];
                }
                T::pack(row.data(), count, packed.data());
                for (int k = 0; k < slow_depth; k++) slow_basis[(size_t(h) * slow_depth + k) * rank_wide + i] = packed[k];
            }
    }
};

template <class T> struct Shared {
    typedef typename T::Lane Lane;
    const Job &job;
    const Constant constant;
    const Rebuild<T> &how;  // empty where scores are products with the latents
    const int depth, rows, value_wide;
    const typename T::KeyBytes key_bytes;
    const typename T::ValueBytes value_bytes;
    const int sum_wide;             // of a row's sums
    int key_shares = 1;             // groups of channels that have a scale, of keys
    std::vector<float> query_sums;  // of each group's channels, [b][rows][key_shares]
    std::vector<Lane> query;   // as products read it, [b][rows][depth]; or
    std::vector<float> asked;  // in the order of the blocks, [b][rows][wide]

    Shared(const Job &j, const Rebuild<T> &how)
        : job(j), constant(j, T::still > 0), how(how), depth(T::key_depth(j.keys.width)), rows(j.heads * j.x), value_wide(padded(j.values.width, 32)),
          key_bytes(j),
          value_bytes(j.values, rows / std::max(j.values.groups, 1)), sum_wide(value_wide + value_bytes.extra) {
        const int64_t count = int64_t(j.batch) * rows;
        if (!j.rebuild) {
            query.resize(count * depth);
            for (int64_t i = 0; i < count; i++) T::pack_asked(j.keys, j.query + i * j.wide, j.keys.width, query.data() + i * depth);
            if (T::scales_tokens(j.keys)) sum_up(count);
            return;
        }
        asked.resize(count * how.wide);
        for (int64_t row = 0; row < count; row++)
            for (int i = 0; i < how.wide; i++)
                asked[row * how.wide + i] = how.column[i] < 0 ? 0.0f : j.query[row * j.wide + how.column[i]];
    }

    void sum_up(int64_t count) {
        const int width = job.keys.width, group = job.keys.group;
        key_shares = (width + group - 1) / group;
        query_sums.resize(count * key_shares);
        for (int64_t i = 0; i < count; i++)
            for (int c = 0; c < width; c++) query_sums[i * key_shares + c / group] += job.query[i * job.wide + c];
    }
};
