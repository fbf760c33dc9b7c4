// Sixteen floats at a time, in the compiler's own vectors: AVX-512, two AVX2 or four NEON registers.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));

constexpr float NEVER = -std::numeric_limits<float>::infinity();

inline v16 load16(const float *p) {
    v16 x;
    std::memcpy(&x, p, 64);
    return x;
}
inline void store16(float *p, v16 x) { std::memcpy(p, &x, 64); }
inline v16 all16(float x) { return x - v16{}; }

#if defined(__AVX512F__)
inline float sum16(v16 x) { return _mm512_reduce_add_ps((__m512)x); }
inline float max16(v16 x) { return _mm512_reduce_max_ps((__m512)x); }
#else
inline float sum16(v16 x) {
    float s = 0;
    for (int i = 0; i < 16; i++) s += x[i];
    return s;
}
inline float max16(v16 x) {
    float m = x[0];
    for (int i = 1; i < 16; i++) m = x[i] > m ? x[i] : m;
    return m;
}
#endif

// e^x for x <= 88 to 2 units in the last place; 0 below -87.
inline v16 exp16(v16 x) {
    const v16 least = all16(-87.0f);
    v16i gone = x < least;
    x = gone ? least : x;
    v16 scaled = x * 1.44269504f;
    v16i n = __builtin_convertvector(scaled + (scaled < 0 ? all16(-0.5f) : all16(0.5f)), v16i);
    v16 whole = __builtin_convertvector(n, v16);
    v16 r = x - whole * 0.693359375f;
    r = r + whole * 2.12194440e-4f;
    v16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    v16i bits;
    std::memcpy(&bits, &p, 64);
    bits = gone ? v16i{} : bits + (n << 23);
    std::memcpy(&p, &bits, 64);
    return p;
}

inline v16 tanh16(v16 x) {
    v16 twice = 2.0f * x, most = all16(80.0f);
    twice = twice > most ? most : twice;
    return 1.0f - 2.0f / (exp16(twice) + 1.0f);
}
