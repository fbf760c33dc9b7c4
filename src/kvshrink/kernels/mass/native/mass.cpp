// What keys get of the attention of many queries, without a matrix of probabilities: see ../reference.py.
#include <cmath>
#include <new>
#include <vector>

#include "../../decode/native/rows.h"

// Mirrored by _Job in ../cpu.py.
struct Mass {
    int32_t batch, heads, group, x, t, form, most, threads;
    const char *scores;     // [b][h][m][x][t], in `form`
    const int32_t *ends;    // [x]: how many of the keys a query sees
    const float *weights;   // [x], or none
    const uint8_t *real;    // [b][t], or none: which keys are tokens
    const uint8_t *asks;    // [b][x], or none: which queries are
    float *out;             // [b][h][t], added to; of `most` the larger of both
};

namespace {

constexpr int64_t PARALLEL = 1 << 18;  // scores, from which a second thread gains more than it costs

// e^x for x <= 0 to 3e-6, enough for scores that were rounded to 16 bits: 2^n (1 + ...) with n = round(x log2 e). 0 below
// 2^-100, which no sum of floats beside a 1 shows.
inline v16 near_exp16(v16 x) {
    const v16 scaled = x * 1.44269504f, least = all16(-100.0f), most = scaled > least ? scaled : least;
    const v16 shifted = most + 12582912.0f, r = most - (shifted - 12582912.0f);  // 1.5 * 2^23: the sum is rounded
    v16 p = r * 9.58256e-3f + 5.590563e-2f;
    p = p * r + 2.4024099e-1f;
    p = p * r + 6.9312429e-1f;
    p = p * r + 1.0f;
    v16i bits, n;
    std::memcpy(&bits, &p, sizeof p), std::memcpy(&n, &shifted, sizeof n);
    bits = scaled > least ? bits + (n << 23) : v16i{};
    std::memcpy(&p, &bits, sizeof p);
    return p;
}

constexpr int ROWS = 4;  // whose weights are added to the sums at a time

// Sixteen scores; those that a query does not see, or that are of no token, are NEVER.
template <int FORM> inline v16 seen(const char *from, int c, int end, const uint8_t *real) {
    v16 x = row16(FORM, from, c + 16 <= end ? c + 16 : end, c);
    if (c + 16 > end || real)
        for (int i = 0; i < 16; i++)
            if (c + i >= end || (real && !real[c + i])) x[i] = NEVER;
    return x;
}

// One query's scores become exponentials in `own`; returns their sum, 0 where it sees nothing.
template <int FORM> float spread(const Mass &job, int64_t row, const uint8_t *real, float *own) {
    const int end = job.ends[row % job.x];
    const char *from = job.scores + row * job.t * (FORM == RAW_F32 ? 4 : 2);
    v16 top = all16(NEVER);
    for (int c = 0; c < end; c += 16) {
        const v16 x = seen<FORM>(from, c, end, real);
        top = x > top ? x : top;
    }
    const float most = max16(top);
    if (!(most > NEVER)) return 0;
    v16 sum{};
    for (int c = 0; c < end; c += 16) {
        const v16 below = seen<FORM>(from, c, end, real) - most;
        const v16 x = FORM == RAW_F32 ? exp16(below) : near_exp16(below);
        store16(own + c, x);
        sum += x;
    }
    return sum16(sum);
}

// Some queries' exponentials, each by its weight, to the sums of the first `end` keys.
template <int N> void add(bool most, const float *const *own, const float *by, int end, float *sums) {
    for (int c = 0; c < end; c += 16) {
        v16 to = load16(sums + c);
        for (int n = 0; n < N; n++) {
            const v16 x = load16(own[n] + c) * by[n];
            to = most ? (x > to ? x : to) : to + x;
        }
        store16(sums + c, to);
    }
}

// Every `step`-th of a head's queries from `first` on. room: sums, and ROWS lines of `wide`.
template <int FORM> void gather(const Mass &job, int64_t head, int64_t first, int64_t step, int64_t wide, float *room) {
    const int64_t rows = int64_t(job.group) * job.x, b = head / job.heads;
    const uint8_t *real = job.real ? job.real + b * job.t : nullptr;
    const float *own[ROWS];
    float by[ROWS];
    int held = 0, longest = 0;
    for (int64_t row = first; row < rows; row += step) {
        const int64_t query = row % job.x;
        if (job.asks && !job.asks[b * job.x + query]) continue;
        float *line = room + (1 + held) * wide;
        const int end = job.ends[query];
        const float sum = spread<FORM>(job, head * rows + row, real, line);
        if (!(sum > 0)) continue;
        own[held] = line, by[held] = (job.weights ? job.weights[query] : 1.0f) / sum;
        if (held && end != longest) {  // lines must be as long as each other
            const int shorter = std::min(end, longest), longer = std::max(end, longest);
            for (int n = 0; n <= held; n++) {
                float *x = room + (1 + n) * wide;
                if ((n == held) == (end < longest)) std::fill(x + (shorter + 15) / 16 * 16, x + (longer + 15) / 16 * 16, 0.0f);
            }
        }
        longest = std::max(longest, end);
        if (++held == ROWS) add<ROWS>(job.most, own, by, longest, room), held = longest = 0;
    }
    for (int n = 0; n < held; n++) add<1>(job.most, own + n, by + n, longest, room);
}

}  // namespace

extern "C" {

// 0, or 1 where memory is short.
int32_t kvshrink_mass(const Mass *job) try {
    const int64_t rows = int64_t(job->group) * job->x, wide = (job->t + 15) / 16 * 16;
    const int threads = rows * job->t > PARALLEL ? std::max(1, job->threads) : 1;
    std::vector<float> room(size_t(threads) * (1 + ROWS) * wide);
    for (int64_t n = 0; n < int64_t(job->batch) * job->heads; n++) {
        std::fill(room.begin(), room.end(), 0.0f);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
        for (int thread = 0; thread < threads; thread++) {
            float *own = room.data() + thread * (1 + ROWS) * wide;
            if (job->form == RAW_F32) gather<RAW_F32>(*job, n, thread, threads, wide, own);
            else if (job->form == RAW_BF16) gather<RAW_BF16>(*job, n, thread, threads, wide, own);
            else gather<RAW_F16>(*job, n, thread, threads, wide, own);
        }
        float *out = job->out + n * job->t;
        for (int thread = 0; thread < threads; thread++)
            for (int c = 0; c < job->t; c++) {
                const float x = room[thread * (1 + ROWS) * wide + c];
                out[c] = job->most ? std::max(out[c], x) : out[c] + x;
            }
    }
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}
}
