// Attention to the tokens that are held as they are or at 8 bits, and these 8 bits: see ../reference.py.
#include <cmath>
#include <cstdlib>
#include <vector>

#include "../../decode/native/rows.h"

// Mirrored by _Rows and _Job in ../cpu.py. Strides are in bytes.
struct Rows {
    const char *data;
    int32_t form, count;  // form EIGHT: codes, and a scale in bfloat16 behind them
    int64_t row, head, token;
    const int64_t *table;  // [b][count]: where each token is, from `data` on, in place of row and token; -1: nowhere
};

struct Held {
    int32_t batch, heads, x, d, e, dtype, threads;
    float softcap;  // 0: none
    Rows sink_keys, sink_values, keys, values;
    const float *query;  // [b][h][x][d], scaled
    float *out, *lse;    // [b][h][x][e], [b][h][x]
};

namespace {

constexpr int EIGHT = 3;
constexpr int64_t PARALLEL = 1 << 19;  // numbers that are read, from which a second thread gains more than it costs
constexpr float LARGEST = 127, TINY = 1e-30f, HALF_MOST = 65504;

uint16_t bfloat16_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float scale_of(const char *codes, int d) { return raw_of(RAW_BF16, codes + d, 0); }

_Float16 half_near(float x) { return _Float16(std::min(std::max(x, -HALF_MOST), HALF_MOST)); }

// A token's row; null where a row of the batch has no such token.
const char *row_of(const Rows &rows, int64_t row, int64_t head, int i) {
    const int64_t at = rows.table ? rows.table[row * rows.count + i] : row * rows.row + i * rows.token;
    return at < 0 ? nullptr : rows.data + at + head * rows.head;
}

// A row's d numbers, and zeros up to a multiple of 16.
void read(int form, const char *row, int d, int dtype, float *to) {
    if (!row) return std::fill(to, to + (d + 15) / 16 * 16, 0.0f);
    if (form != EIGHT) {
        for (int c = 0; c < d; c += 16) store16(to + c, row16(form, row, d, c));
        return;
    }
    const float scale = scale_of(row, d);
    const int8_t *codes = reinterpret_cast<const int8_t *>(row);
    for (int c = 0; c < d; c++) to[c] = codes[c] * scale;
    if (dtype == RAW_BF16)  // rounded to even; none is beyond its range, or NaN but by a scale that is
        for (int c = 0; c < d; c++) {
            uint32_t bits;
            std::memcpy(&bits, to + c, 4);
            bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
            std::memcpy(to + c, &bits, 4);
        }
    else if (dtype == RAW_F16)
        for (int c = 0; c < d; c++) to[c] = float(half_near(to[c]));
    for (int c = d; c % 16; c++) to[c] = 0;
}

constexpr int SOME = 64;  // tokens whose rows are read together

// One KV head of one row of the batch; widths are multiples of 16.
struct Head {
    const Held &job;
    const int64_t row, head;
    const int d, e, tokens, line;
    float *const query, *const sums, *const scores, *const block;  // [x][d], [x][e], [x][line], [SOME][d or e]

    Head(const Held &job, int64_t n, float *room)
        : job(job), row(n / job.heads), head(n % job.heads), d((job.d + 15) / 16 * 16), e((job.e + 15) / 16 * 16),
          tokens(job.sink_keys.count + job.keys.count), line((tokens + 15) / 16 * 16), query(room), sums(query + job.x * d),
          scores(sums + job.x * e), block(scores + int64_t(job.x) * line) {}

    static int64_t room(const Held &job) {
        const int64_t d = (job.d + 15) / 16 * 16, e = (job.e + 15) / 16 * 16, tokens = job.sink_keys.count + job.keys.count;
        return job.x * (d + e + (tokens + 15) / 16 * 16) + SOME * std::max(d, e);
    }

    // use(first token, count), whose rows are in `block`; `wide` apart.
    template <class F> void by_some(const Rows &sinks, const Rows &rows, int own, int wide, F use) const {
        int first = 0;
        for (const Rows *part : {&sinks, &rows})
            for (int i = 0; i < part->count; i += SOME) {
                const int count = std::min(SOME, part->count - i);
                for (int t = 0; t < count; t++)
                    read(part->form, row_of(*part, row, head, i + t), own, job.dtype, block + t * wide);
                use(first, count), first += count;
            }
    }

    void attend() const {
        const int64_t at = (row * job.heads + head) * job.x;
        std::fill(query, block, 0.0f);
        for (int r = 0; r < job.x; r++) std::copy_n(job.query + (at + r) * job.d, job.d, query + r * d);
        by_some(job.sink_keys, job.keys, job.d, d, [&](int first, int count) {
            by_few(job.x, [&](int r, auto few) { dots<few>(r, first, count); });
        });
        for (int r = 0; r < job.x; r++) soften(scores + r * line, job.lse[at + r]);
        by_some(job.sink_values, job.values, job.e, e, [&](int first, int count) {
            by_few(job.x, [&](int r, auto few) { add<few>(r, first, count); });
        });
        for (int r = 0; r < job.x; r++) std::copy_n(sums + r * e, job.e, job.out + (at + r) * job.e);
    }

    template <int R> void dots(int r, int first, int count) const {
        for (int t = 0; t < count; t++) {
            v16 sum[R] = {};
            for (int c = 0; c < d; c += 16) {
                const v16 x = load16(block + t * d + c);
                for (int i = 0; i < R; i++) sum[i] += x * load16(query + (r + i) * d + c);
            }
            for (int i = 0; i < R; i++) scores[(r + i) * line + first + t] = sum16(sum[i]);
        }
    }

    // Scores to weights, and their log-sum-exp.
    void soften(float *own, float &lse) const {
        float top = NEVER, mass = 0;
        int t = 0;
        for (const Rows *part : {&job.sink_keys, &job.keys})
            for (int i = 0; i < part->count; i++, t++) {
                if (part->table && part->table[row * part->count + i] < 0) own[t] = NEVER;
                else if (job.softcap > 0) own[t] = std::tanh(own[t] / job.softcap) * job.softcap;
                top = std::max(top, own[t]);
            }
        lse = NEVER;
        if (top == NEVER) return std::fill(own, own + line, 0.0f);
        for (t = 0; t < line; t += 16) store16(own + t, exp16(load16(own + t) - top));
        for (t = 0; t < tokens; t++) mass += own[t];
        lse = top + std::log(mass);
        for (t = 0; t < tokens; t++) own[t] /= mass;
    }

    template <int R> void add(int r, int first, int count) const {
        for (int c = 0; c < e; c += 16) {
            v16 sum[R];
            for (int i = 0; i < R; i++) sum[i] = load16(sums + (r + i) * e + c);
            for (int t = 0; t < count; t++) {
                const v16 x = load16(block + t * e + c);
                for (int i = 0; i < R; i++) sum[i] += x * scores[(r + i) * line + first + t];
            }
            for (int i = 0; i < R; i++) store16(sums + (r + i) * e + c, sum[i]);
        }
    }
};

}  // namespace

extern "C" {

// 0, or 1 where memory is short.
int32_t kvshrink_held(const Held *job) try {
    const int64_t all = int64_t(job->batch) * job->heads, size = Head::room(*job);
    const int64_t tokens = job->sink_keys.count + job->keys.count, numbers = all * tokens * (job->d + job->e);
    const int parts = numbers > PARALLEL ? std::max(1, job->threads) : 1;
    std::vector<float> room(size * parts);
#pragma omp parallel for num_threads(parts) schedule(static, 1) if (parts > 1)
    for (int part = 0; part < parts; part++)
        for (int64_t n = part; n < all; n += parts) Head(*job, n, room.data() + part * size).attend();
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

// rows [count][d] -> [count][d + 2].
void kvshrink_round(const float *rows, int64_t count, int32_t d, uint8_t *out) {
    for (int64_t n = 0; n < count; n++, rows += d, out += d + 2) {
        float most = 0;
        bool whole = true;
        for (int c = 0; c < d; c++) most = std::max(most, std::fabs(rows[c])), whole &= rows[c] == rows[c];
        const uint16_t bits = bfloat16_of(whole ? std::max(most / LARGEST, TINY) : std::nanf(""));
        std::memcpy(out + d, &bits, 2);
        const float scale = raw_of(RAW_BF16, reinterpret_cast<const char *>(out + d), 0);
        for (int c = 0; c < d; c++) {
            const float x = std::nearbyint(rows[c] / scale);
            out[c] = uint8_t(int8_t(std::min(std::max(x == x ? x : 0.0f, -LARGEST), LARGEST)));
        }
    }
}

// The inverse, in a dtype.
void kvshrink_unround(const uint8_t *rows, int64_t count, int32_t d, int32_t dtype, void *out) {
    for (int64_t n = 0; n < count; n++, rows += d + 2) {
        const float scale = scale_of(reinterpret_cast<const char *>(rows), d);
        for (int c = 0; c < d; c++) {
            const float x = int8_t(rows[c]) * scale;
            const int64_t at = n * d + c;
            if (dtype == RAW_F32)
                static_cast<float *>(out)[at] = x;
            else if (dtype == RAW_BF16)
                static_cast<uint16_t *>(out)[at] = bfloat16_of(x);
            else
                static_cast<_Float16 *>(out)[at] = half_near(x);
        }
    }
}
}
