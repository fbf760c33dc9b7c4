// Sixteen floats at a time, in the compiler's own vectors: AVX-512, two AVX2 or four NEON registers.
//
// Where a register holds fewer, g++ makes a choice (x < y ? x : y) of sixteen one by one; so `exp16` and `tanh16` are of
// eights there.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef float v8 __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));

constexpr float NEVER = -std::numeric_limits<float>::infinity();

inline v16 load16(const float *p) {
    v16 x;
    std::memcpy(&x, p, 64);
    return x;
}
inline void store16(float *p, v16 x) { std::memcpy(p, &x, 64); }
inline float sum8(v8 x) {
    typedef float v4 __attribute__((vector_size(16)));
    v4 half[2];
    std::memcpy(half, &x, 32);
    const v4 sum = half[0] + half[1];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}
inline v16 all16(float x) { return x - v16{}; }

#if defined(__AVX512F__)
inline float sum16(v16 x) { return _mm512_reduce_add_ps((__m512)x); }
inline float max16(v16 x) { return _mm512_reduce_max_ps((__m512)x); }
#else
inline float sum16(v16 x) {
    v8 half[2];
    std::memcpy(half, &x, 64);
    return sum8(half[0] + half[1]);
}
inline float max16(v16 x) {
    v8 half[2];
    std::memcpy(half, &x, 64);
    const v8 most = half[0] > half[1] ? half[0] : half[1];
    float m = most[0];
    for (int i = 1; i < 8; i++) m = most[i] > m ? most[i] : m;
    return m;
}
#endif

// e^x for x <= 88 to 2 units in the last place; 0 below -87. V: floats, I: as many integers.
template <class V, class I> inline V exp_of(V x) {
    const V least = V{} - 87.0f, half = V{} + 0.5f;
    const I gone = x < least;
    x = gone ? least : x;
    const V scaled = x * 1.44269504f;
    const I n = __builtin_convertvector(scaled + (scaled < 0 ? -half : half), I);
    const V whole = __builtin_convertvector(n, V);
    V r = x - whole * 0.693359375f;
    r = r + whole * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    I bits;
    std::memcpy(&bits, &p, sizeof p);
    bits = gone ? I{} : bits + (n << 23);
    std::memcpy(&p, &bits, sizeof p);
    return p;
}

template <class V, class I> inline V tanh_of(V x) {
    V twice = 2.0f * x;
    const V most = V{} + 80.0f;
    twice = twice > most ? most : twice;
    return 1.0f - 2.0f / (exp_of<V, I>(twice) + 1.0f);
}

template <v8 (*F)(v8)> inline v16 by_halves(v16 x) {
    v8 half[2];
    std::memcpy(half, &x, 64);
    half[0] = F(half[0]), half[1] = F(half[1]);
    std::memcpy(&x, half, 64);
    return x;
}
#if defined(__AVX512F__)
inline v16 exp16(v16 x) { return exp_of<v16, v16i>(x); }
inline v16 tanh16(v16 x) { return tanh_of<v16, v16i>(x); }
#else
inline v16 exp16(v16 x) { return by_halves<exp_of<v8, v8i>>(x); }
inline v16 tanh16(v16 x) { return by_halves<tanh_of<v8, v8i>>(x); }
#endif
