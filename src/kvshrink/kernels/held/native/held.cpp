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

// A row's d numbers, and zeros up to a multiple of 16.
void read(const Rows &rows, int64_t at, int d, int dtype, float *to) {
    const char *row = rows.data + at;
    if (rows.form != EIGHT) {
        for (int c = 0; c < d; c += 16) store16(to + c, row16(rows.form, row, d, c));
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

// One KV head of one row of the batch. room: [x][d], [x][e], [x][tokens] and a row, each line padded to 16.
void attend(const Held &job, int64_t row, int64_t head, std::vector<float> &room) {
    const int d = (job.d + 15) / 16 * 16, e = (job.e + 15) / 16 * 16, tokens = job.sink_keys.count + job.keys.count;
    const int line = (tokens + 15) / 16 * 16;
    std::fill(room.begin(), room.end(), 0.0f);
    float *query = room.data(), *sums = query + job.x * d, *scores = sums + job.x * e, *one = scores + int64_t(job.x) * line;
    const int64_t first = (row * job.heads + head) * job.x;
    for (int r = 0; r < job.x; r++) std::copy_n(job.query + (first + r) * job.d, job.d, query + r * d);
    int t = 0;
    for (const Rows *part : {&job.sink_keys, &job.keys})
        for (int i = 0; i < part->count; i++, t++) {
            read(*part, row * part->row + head * part->head + i * part->token, job.d, job.dtype, one);
            for (int r = 0; r < job.x; r++) {
                v16 sum{};
                for (int c = 0; c < d; c += 16) sum += load16(query + r * d + c) * load16(one + c);
                scores[r * line + t] = sum16(sum);
            }
        }
    for (int r = 0; r < job.x; r++) {
        float *own = scores + r * line, top = NEVER, mass = 0;
        for (t = 0; t < tokens; t++) {
            if (job.softcap > 0) own[t] = std::tanh(own[t] / job.softcap) * job.softcap;
            top = std::max(top, own[t]);
        }
        for (t = 0; t < line; t += 16) store16(own + t, exp16(load16(own + t) - top));
        for (t = 0; t < tokens; t++) mass += own[t];
        job.lse[first + r] = tokens ? top + std::log(mass) : NEVER;
        for (t = 0; t < tokens; t++) own[t] /= mass;
    }
    t = 0;
    for (const Rows *part : {&job.sink_values, &job.values})
        for (int i = 0; i < part->count; i++, t++) {
            read(*part, row * part->row + head * part->head + i * part->token, job.e, job.dtype, one);
            for (int r = 0; r < job.x; r++)
                for (int c = 0; c < e; c += 16)
                    store16(sums + r * e + c, load16(sums + r * e + c) + load16(one + c) * scores[r * line + t]);
        }
    for (int r = 0; r < job.x; r++) std::copy_n(sums + r * e, job.e, job.out + (first + r) * job.e);
}

}  // namespace

extern "C" {

// 0, or 1 where memory is short.
int32_t kvshrink_held(const Held *job) try {
    const int64_t wide = (job->d + 15) / 16 * 16 + (job->e + 15) / 16 * 16, tokens = job->sink_keys.count + job->keys.count;
    const int64_t each = job->x * (wide + (tokens + 15) / 16 * 16) + wide, all = int64_t(job->batch) * job->heads;
    std::vector<std::vector<float>> rooms(std::max(1, job->threads));
    for (auto &room : rooms) room.resize(each);
#pragma omp parallel for num_threads(job->threads) schedule(static, 1) if (all * tokens * wide > PARALLEL)
    for (int thread = 0; thread < int(rooms.size()); thread++)  // as many parts as threads, each with a room of its own
        for (int64_t n = thread; n < all; n += rooms.size()) attend(*job, n / job->heads, n % job->heads, rooms[thread]);
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
