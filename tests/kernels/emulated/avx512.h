// The AVX-512 that our kernels use, as plain loops: so that what they do with it is tested on processors without it.
// Given to the compiler with -include, in front of the sources.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
#define __AVX512BF16__ 1

namespace emulated {

template <class T, class V> struct Lanes {
    T at[sizeof(V) / sizeof(T)];
    static constexpr int count = sizeof(V) / sizeof(T);
    Lanes() : at{} {}
    explicit Lanes(V v) { std::memcpy(at, &v, sizeof v); }
    operator V() const {
        V v;
        std::memcpy(&v, at, sizeof v);
        return v;
    }
};
typedef Lanes<float, __m512> Floats;
typedef Lanes<uint32_t, __m512i> Words;
typedef Lanes<uint16_t, __m512i> Halves;
typedef Lanes<uint64_t, __m512i> Longs;
typedef Lanes<uint8_t, __m512i> Bytes;

template <class L, class F> inline L each(F f) {
    L out;
    for (int i = 0; i < L::count; i++) out.at[i] = f(i);
    return out;
}
inline float wide(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint16_t narrow(float x) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline __m512 loadu_ps(const void *p) {
    __m512 v;
    std::memcpy(&v, p, 64);
    return v;
}
inline __m512i loadu_si512(const void *p) {
    __m512i v;
    std::memcpy(&v, p, 64);
    return v;
}
template <class V> inline void store(void *p, V v) { std::memcpy(p, &v, 64); }
// Masked: bytes behind a mask are never touched.
template <class L, class V> inline V maskz(uint64_t mask, const void *p) {
    L out;
    for (int i = 0; i < L::count; i++)
        if (mask >> i & 1) std::memcpy(&out.at[i], static_cast<const char *>(p) + i * sizeof out.at[0], sizeof out.at[0]);
    return out;
}
inline void mask_store8(void *p, uint32_t mask, __m256i v) {
    const Lanes<uint32_t, __m256i> x(v);
    for (int i = 0; i < 8; i++)
        if (mask >> i & 1) std::memcpy(static_cast<char *>(p) + 4 * i, &x.at[i], 4);
}
inline __m512 set1_ps(float x) { return each<Floats>([=](int) { return x; }); }
inline __m512i set1_epi32(int x) { return each<Words>([=](int) { return uint32_t(x); }); }

inline __m512 add_ps(__m512 a, __m512 b) { return (__m512)((__m512)a + b); }
inline __m512 mul_ps(__m512 a, __m512 b) { return (__m512)((__m512)a * b); }
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) { return (__m512)(a * b + c); }
inline float reduce_add_ps(__m512 v) {
    const Floats x(v);
    float sum = 0;
    for (float one : x.at) sum += one;
    return sum;
}
inline float reduce_max_ps(__m512 v) {
    const Floats x(v);
    float most = x.at[0];
    for (float one : x.at) most = one > most ? one : most;
    return most;
}
inline __m512i add_epi32(__m512i v, __m512i w) {
    const Words a(v), b(w);
    return each<Words>([&](int i) { return a.at[i] + b.at[i]; });
}
inline __m512i and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i andnot_si512(__m512i a, __m512i b) { return ~a & b; }
inline __m512i slli_epi32(__m512i v, unsigned n) {
    const Words a(v);
    return each<Words>([&](int i) { return a.at[i] << n; });
}
inline __m512i srli_epi32(__m512i v, unsigned n) {
    const Words a(v);
    return each<Words>([&](int i) { return a.at[i] >> n; });
}
inline __m512i ternarylogic_epi32(__m512i x, __m512i y, __m512i z, int table) {
    const Words a(x), b(y), c(z);
    return each<Words>([&](int i) {
        uint32_t out = 0;
        for (int bit = 0; bit < 32; bit++) {
            const int at = (a.at[i] >> bit & 1) << 2 | (b.at[i] >> bit & 1) << 1 | (c.at[i] >> bit & 1);
            out |= uint32_t(table >> at & 1) << bit;
        }
        return out;
    });
}

inline __m256bh cvtneps_pbh(__m512 v) {
    const Floats x(v);
    Lanes<uint16_t, __m256bh> out;
    for (int i = 0; i < 16; i++) out.at[i] = narrow(x.at[i]);
    return out;
}
inline __m512 cvtph_ps(__m256i v) {
    const Lanes<_Float16, __m256i> x(v);
    return each<Floats>([&](int i) { return float(x.at[i]); });
}
inline __m512 cvtepi32_ps(__m512i v) {
    const Words x(v);
    return each<Floats>([&](int i) { return float(int32_t(x.at[i])); });
}
inline __m512i cvtepu8_epi32(__m128i v) {
    const Lanes<uint8_t, __m128i> x(v);
    return each<Words>([&](int i) { return uint32_t(x.at[i]); });
}
inline __m512i cvtepu16_epi32(__m256i v) {
    const Lanes<uint16_t, __m256i> x(v);
    return each<Words>([&](int i) { return uint32_t(x.at[i]); });
}
inline __m512 dpbf16_ps(__m512 sum, __m512bh v, __m512bh w) {
    const Floats s(sum);
    const Lanes<uint16_t, __m512bh> a(v), b(w);
    return each<Floats>([&](int i) {
        return s.at[i] + wide(a.at[2 * i + 1]) * wide(b.at[2 * i + 1]) + wide(a.at[2 * i]) * wide(b.at[2 * i]);
    });
}

inline __m512 i32gather_ps(__m512i index, const void *base, int scale) {
    const Words at(index);
    return each<Floats>([&](int i) {
        float x;
        std::memcpy(&x, static_cast<const char *>(base) + int64_t(int32_t(at.at[i])) * scale, 4);
        return x;
    });
}
inline __m512 permutexvar_ps(__m512i index, __m512 v) {
    const Words at(index);
    const Floats x(v);
    return each<Floats>([&](int i) { return x.at[at.at[i] & 15]; });
}
inline __m512 permutex2var_ps(__m512 v, __m512i index, __m512 w) {
    const Words at(index);
    const Floats a(v), b(w);
    return each<Floats>([&](int i) { return (at.at[i] & 16 ? b : a).at[at.at[i] & 15]; });
}
inline __m512i permutexvar_epi16(__m512i index, __m512i v) {
    const Halves at(index), x(v);
    return each<Halves>([&](int i) { return x.at[at.at[i] & 31]; });
}
inline __m256i permutexvar_epi16_256(__m256i index, __m256i v) {
    const Lanes<uint16_t, __m256i> at(index), x(v);
    return each<Lanes<uint16_t, __m256i>>([&](int i) { return x.at[at.at[i] & 15]; });
}
inline __m512i shuffle_i32x4(__m512i v, __m512i w, int how) {  // quarters: two of v, then two of w
    const Words a(v), b(w);
    return each<Words>([&](int i) { return (i < 8 ? a : b).at[(how >> (i / 4 * 2) & 3) * 4 + i % 4]; });
}
// Neighbours from the low or high half of each quarter, in turn. L: of what size.
template <class L> inline __m512i unpack(__m512i v, __m512i w, bool high) {
    const L a(v), b(w);
    constexpr int quarter = L::count / 4;
    return each<L>([&](int i) {
        const int from = i / quarter * quarter + high * quarter / 2 + i % quarter / 2;
        return (i % 2 ? b : a).at[from];
    });
}
inline __m512i castsi256_si512(__m256i v) {
    __m512i out = {};
    std::memcpy(&out, &v, 32);
    return out;
}
inline __m256i castsi512_si256(__m512i v) {
    __m256i out;
    std::memcpy(&out, &v, 32);
    return out;
}
inline __m512i inserti64x4(__m512i v, __m256i part, int half) {
    std::memcpy(reinterpret_cast<char *>(&v) + 32 * half, &part, 32);
    return v;
}

}  // namespace emulated

#define _mm512_loadu_ps emulated::loadu_ps
#define _mm512_loadu_si512 emulated::loadu_si512
#define _mm512_storeu_ps emulated::store
#define _mm512_storeu_si512 emulated::store
#define _mm512_maskz_loadu_ps(k, p) emulated::maskz<emulated::Floats, __m512>(k, p)
#define _mm512_maskz_loadu_epi8(k, p) emulated::maskz<emulated::Bytes, __m512i>(k, p)
#define _mm_maskz_loadu_epi8(k, p) emulated::maskz<emulated::Lanes<uint8_t, __m128i>, __m128i>(k, p)
#define _mm256_maskz_loadu_epi16(k, p) emulated::maskz<emulated::Lanes<uint16_t, __m256i>, __m256i>(k, p)
#define _mm256_mask_storeu_epi32 emulated::mask_store8
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_setzero_ps() emulated::set1_ps(0.0f)
#define _mm512_add_ps emulated::add_ps
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_and_si512 emulated::and_si512
#define _mm512_or_si512 emulated::or_si512
#define _mm512_andnot_si512 emulated::andnot_si512
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_srli_epi32 emulated::srli_epi32
#define _mm512_ternarylogic_epi32 emulated::ternarylogic_epi32
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#define _mm512_i32gather_ps emulated::i32gather_ps
#define _mm512_permutexvar_ps emulated::permutexvar_ps
#define _mm512_permutex2var_ps emulated::permutex2var_ps
#define _mm512_permutexvar_epi16 emulated::permutexvar_epi16
#define _mm256_permutexvar_epi16 emulated::permutexvar_epi16_256
#define _mm512_shuffle_i32x4 emulated::shuffle_i32x4
#define _mm512_unpacklo_epi32(a, b) emulated::unpack<emulated::Words>(a, b, false)
#define _mm512_unpackhi_epi32(a, b) emulated::unpack<emulated::Words>(a, b, true)
#define _mm512_unpacklo_epi64(a, b) emulated::unpack<emulated::Longs>(a, b, false)
#define _mm512_unpackhi_epi64(a, b) emulated::unpack<emulated::Longs>(a, b, true)
#define _mm512_castps_si512(v) ((__m512i)(v))
#define _mm512_castsi256_si512 emulated::castsi256_si512
#define _mm512_castsi512_si256 emulated::castsi512_si256
#define _mm512_inserti64x4 emulated::inserti64x4
