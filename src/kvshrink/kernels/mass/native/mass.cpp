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

// 2^x to 8e-5, enough for scores that were rounded to 16 bits; 0 far below, huge or infinite far above.
#if defined(__AVX512DQ__) && defined(__AVX512F__)
inline v16 near_exp2(v16 x) {
    const v16 r = (v16)_mm512_reduce_ps((__m512)x, 9);  // less the whole number below
    const v16 p = ((r * 0.07802452f + 0.22606717f) * r + 0.69583353f) * r + 0.99992522f;
    return (v16)_mm512_scalef_ps((__m512)p, (__m512)x);
}
#else
inline v8 near_exp2_of(v8 x) {
    const v8 least = v8{} - 126.0f, most = v8{} + 127.0f;
    x = x > least ? x : least, x = x < most ? x : most;
    const v8 shifted = (x - 0.5f) + 12582912.0f, r = x - (shifted - 12582912.0f);  // 1.5 * 2^23: the sum is rounded
    v8 p = ((r * 0.07802452f + 0.22606717f) * r + 0.69583353f) * r + 0.99992522f;
    v8i bits, n;
    std::memcpy(&bits, &p, sizeof p), std::memcpy(&n, &shifted, sizeof n);
    bits += n << 23;
    std::memcpy(&p, &bits, sizeof p);
    return p;
}
inline v16 near_exp2(v16 x) { return by_halves<near_exp2_of>(x); }
#endif

constexpr int ROWS = 4;  // whose weights are added to the sums at a time

// Sixteen scores; those that a query does not see, or that are of no token, are NEVER. `real`: all bits set, or none.
template <int FORM> inline v16 seen(const char *from, int c, int end, const int32_t *real) {
    v16 x = row16(FORM, from, c + 16 <= end ? c + 16 : end, c);
    if (real) {
        const v16 never = all16(NEVER);
        v16i is, bits, none;
        std::memcpy(&is, real + c, sizeof is), std::memcpy(&bits, &x, sizeof x), std::memcpy(&none, &never, sizeof x);
        bits = (bits & is) | (none & ~is);
        std::memcpy(&x, &bits, sizeof x);
    }
    for (int i = end - c; i < 16; i++) x[i] = NEVER;
    return x;
}

template <int FORM> float largest(const char *from, int end, const int32_t *real) {
    v16 top = all16(NEVER);
    for (int c = 0; c < end; c += 16) {
        const v16 x = seen<FORM>(from, c, end, real);
        top = x > top ? x : top;
    }
    return max16(top);
}

// One query's exponentials over that of `base` to `own`; returns their sum.
template <int FORM> float powers(const char *from, int end, const int32_t *real, float base, float *own) {
    const float turn = 1.44269504f, less = base * turn;
    v16 sum{};
    for (int c = 0; c < end; c += 16) {
        const v16 x = seen<FORM>(from, c, end, real);
        const v16 power = FORM == RAW_F32 ? exp16(x - base) : near_exp2(x * turn - less);
        store16(own + c, power);
        sum += power;
    }
    return sum16(sum);
}

// One query's scores become exponentials in `own`; returns their sum, 0 where it sees nothing.
template <int FORM> float spread(const Mass &job, int64_t row, const int32_t *real, float *own) {
    const int end = job.ends[row % job.x], last = std::max(0, end - 16) / 16 * 16;
    const char *from = job.scores + row * job.t * (FORM == RAW_F32 ? 4 : 2);
    if (FORM != RAW_F32 && end > 0) {  // the first and last keys' largest is near enough for most, and spares a pass
        const float base = max16(seen<FORM>(from, 0, end, real)), other = max16(seen<FORM>(from, last, end, real));
        const float near = std::max(base, other);
        const float sum = near > NEVER ? powers<FORM>(from, end, real, near, own) : 0;
        if (sum > 0 && sum < 1e30f) return sum;
    }
    const float most = largest<FORM>(from, end, real);
    return most > NEVER ? powers<FORM>(from, end, real, most, own) : 0;
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
template <int FORM>
void gather(const Mass &job, const int32_t *real, int64_t head, int64_t first, int64_t step, int64_t wide, float *room) {
    const int64_t rows = int64_t(job.group) * job.x, b = head / job.heads;
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
    std::vector<int32_t> marks(job->real ? wide : 0);  // all bits of each real key of a row
    const int32_t *real = job->real ? marks.data() : nullptr;
    for (int64_t n = 0; n < int64_t(job->batch) * job->heads; n++) {
        std::fill(room.begin(), room.end(), 0.0f);
        if (real && n % job->heads == 0)
            for (int c = 0; c < job->t; c++) marks[c] = -int32_t(job->real[n / job->heads * job->t + c]);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
        for (int thread = 0; thread < threads; thread++) {
            float *own = room.data() + thread * (1 + ROWS) * wide;
            if (job->form == RAW_F32) gather<RAW_F32>(*job, real, n, thread, threads, wide, own);
            else if (job->form == RAW_BF16) gather<RAW_BF16>(*job, real, n, thread, threads, wide, own);
            else gather<RAW_F16>(*job, real, n, thread, threads, wide, own);
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
