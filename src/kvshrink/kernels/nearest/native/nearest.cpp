// The nearest of a few sorted levels: how many borders between them a number is above. ../reference.py says so.
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef uint8_t b16 __attribute__((vector_size(16)));

constexpr int64_t PARALLEL = 1 << 18;  // numbers, from which a second thread gains more than it costs

void some(const float *x, int64_t n, const float *borders, int count, uint8_t *out) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        v16 own;
        std::memcpy(&own, x + i, sizeof own);
        v16i above{};
        for (int b = 0; b < count; b++) above -= ~(own <= borders[b]);  // what is no number is above all
        const b16 codes = __builtin_convertvector(above, b16);
        std::memcpy(out + i, &codes, sizeof codes);
    }
    for (; i < n; i++) {
        int above = 0;
        for (int b = 0; b < count; b++) above += !(x[i] <= borders[b]);
        out[i] = uint8_t(above);
    }
}

}  // namespace

extern "C" void kvshrink_nearest(const float *x, int64_t n, const float *borders, int32_t count, int32_t threads, uint8_t *out) {
    const int parts = n > PARALLEL ? std::max(1, threads) : 1;
#pragma omp parallel for num_threads(parts) schedule(static, 1) if (parts > 1)
    for (int part = 0; part < parts; part++) {
        const int64_t from = n * part / parts, to = n * (part + 1) / parts;
        some(x + from, to - from, borders, count, out + from);
    }
}
