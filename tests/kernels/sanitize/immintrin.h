// The AVX-512 instructions of kernels/decode/native/pairs.h in plain C++, in place of the compiler's own header: so that a
// machine without them runs that code, and so that sanitizers see each byte that a vector load reads. They watch neither
// the compiler's masked loads nor anything that has no address in the source.
#pragma once
#undef __AVX2__  // whose own instructions are not here
#undef __F16C__
#include <cmath>
#include <cstdint>
#include <cstring>

typedef float __m512 __attribute__((vector_size(64)));
typedef long long __m512i __attribute__((vector_size(64)));
typedef long long __m256i __attribute__((vector_size(32)));
typedef long long __m128i __attribute__((vector_size(16)));
typedef uint16_t __m512bh __attribute__((vector_size(64)));
typedef uint16_t __m256bh __attribute__((vector_size(32)));
typedef uint16_t __mmask16;
typedef uint32_t __mmask32;
typedef float __m128 __attribute__((vector_size(16)));
typedef double __m512d __attribute__((vector_size(64)));
typedef uint64_t __mmask64;
typedef uint8_t __mmask8;

namespace plain {

// A vector as an array of lanes.
template <class Lane, int N> struct Lanes {
    Lane at[N] = {};
    Lanes() {}
    template <class V> Lanes(const V &v) {
        static_assert(sizeof(V) == sizeof(at), "as many bytes as the vector");
        std::memcpy(at, &v, sizeof(at));
    }
    template <class V> V as() const {
        V v;
        static_assert(sizeof(V) == sizeof(at), "as many bytes as the vector");
        std::memcpy(&v, at, sizeof(at));
        return v;
    }
};
typedef Lanes<float, 16> Floats;
typedef Lanes<int32_t, 16> Ints;
typedef Lanes<uint32_t, 16> Words;

template <class V> V load(const void *p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}
template <class V> void store(void *p, const V &v) { std::memcpy(p, &v, sizeof(V)); }

// Lanes whose bit is set, one by one; the others are 0 and are not read.
template <class Lane, int N, class V> V load_masked(uint64_t mask, const void *p) {
    Lanes<Lane, N> out;
    for (int i = 0; i < N; i++)
        if (mask >> i & 1) std::memcpy(&out.at[i], static_cast<const char *>(p) + i * sizeof(Lane), sizeof(Lane));
    return out.template as<V>();
}

template <class F> __m512 floats(F of) {
    Floats out;
    for (int i = 0; i < 16; i++) out.at[i] = of(i);
    return out.as<__m512>();
}
template <class F> __m512i words(F of) {
    Words out;
    for (int i = 0; i < 16; i++) out.at[i] = of(i);
    return out.as<__m512i>();
}

inline uint16_t bfloat16_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline float float_of(uint16_t bfloat16) {
    const uint32_t bits = uint32_t(bfloat16) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

}  // namespace plain

inline __m512 _mm512_loadu_ps(const void *p) { return plain::load<__m512>(p); }
inline __m512i _mm512_loadu_si512(const void *p) { return plain::load<__m512i>(p); }
inline __m256i _mm256_loadu_si256(const __m256i *p) { return plain::load<__m256i>(p); }
inline void _mm512_storeu_ps(void *p, __m512 v) { plain::store(p, v); }
inline void _mm512_storeu_si512(void *p, __m512i v) { plain::store(p, v); }
inline __m512 _mm512_maskz_loadu_ps(__mmask16 m, const void *p) { return plain::load_masked<float, 16, __m512>(m, p); }
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 m, const void *p) { return plain::load_masked<uint16_t, 32, __m512i>(m, p); }
inline __m128i _mm_loadu_si128(const __m128i *p) { return plain::load<__m128i>(p); }
inline __m128 _mm_loadu_ps(const void *p) { return plain::load<__m128>(p); }
inline void _mm_storeu_ps(void *p, __m128 v) { plain::store(p, v); }
inline __m128 _mm_add_ps(__m128 a, __m128 b) { return a + b; }
inline __m512i _mm512_maskz_loadu_epi8(__mmask64 m, const void *p) { return plain::load_masked<uint8_t, 64, __m512i>(m, p); }
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 m, const void *p) { return plain::load_masked<uint16_t, 16, __m256i>(m, p); }
inline __m128i _mm_maskz_loadu_epi8(__mmask16 m, const void *p) { return plain::load_masked<uint8_t, 16, __m128i>(m, p); }
inline void _mm256_mask_storeu_epi32(void *p, uint8_t m, __m256i v) {
    const plain::Lanes<uint32_t, 8> from(v);
    for (int i = 0; i < 8; i++)
        if (m >> i & 1) std::memcpy(static_cast<char *>(p) + 4 * i, &from.at[i], 4);
}
inline __m512 _mm512_i32gather_ps(__m512i index, const void *from, int scale) {
    const plain::Ints at(index);
    return plain::floats([&](int i) { return plain::load<float>(static_cast<const char *>(from) + int64_t(at.at[i]) * scale); });
}

inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512 _mm512_set1_ps(float x) { return plain::floats([&](int) { return x; }); }
inline __m512i _mm512_set1_epi64(long long x) {
    plain::Lanes<uint64_t, 8> out;
    for (auto &own : out.at) own = x;
    return out.as<__m512i>();
}
inline __m512i _mm512_set1_epi32(int x) { return plain::words([&](int) { return x; }); }
inline __m256i _mm256_set_epi16(short e15, short e14, short e13, short e12, short e11, short e10, short e9, short e8, short e7,
                                short e6, short e5, short e4, short e3, short e2, short e1, short e0) {
    const short all[16] = {e0, e1, e2, e3, e4, e5, e6, e7, e8, e9, e10, e11, e12, e13, e14, e15};
    return plain::load<__m256i>(all);
}

inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return plain::floats([&](int i) { return std::fma(a[i], b[i], c[i]); });
}
inline float _mm512_reduce_add_ps(__m512 x) {
    float sum = 0;
    for (int i = 0; i < 16; i++) sum += x[i];
    return sum;
}
inline float _mm512_reduce_max_ps(__m512 x) {
    float most = x[0];
    for (int i = 1; i < 16; i++) most = x[i] > most ? x[i] : most;
    return most;
}
inline __m512 _mm512_reduce_ps(__m512 x, int) {  // less the whole number below
    return plain::floats([&](int i) { return std::isinf(x[i]) ? 0.0f : x[i] - std::floor(x[i]); });
}
inline __m512 _mm512_scalef_ps(__m512 a, __m512 b) {
    return plain::floats([&](int i) { return a[i] * std::exp2(std::floor(b[i])); });
}
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    return plain::floats([&](int i) {
        const float second = plain::float_of(a[2 * i + 1]) * plain::float_of(b[2 * i + 1]);
        return std::fma(plain::float_of(a[2 * i]), plain::float_of(b[2 * i]), sum[i] + second);
    });
}
inline __m256bh _mm512_cvtneps_pbh(__m512 x) {
    __m256bh out = {};
    for (int i = 0; i < 16; i++) out[i] = plain::bfloat16_of(x[i]);
    return out;
}

inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i _mm512_andnot_si512(__m512i a, __m512i b) { return ~a & b; }
inline __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int truth) {
    __m512i out = {};
    for (int k = 0; k < 8; k++)
        if (truth >> k & 1) out |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    return out;
}
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
    const plain::Words x(a), y(b);
    return plain::words([&](int i) { return x.at[i] + y.at[i]; });
}
inline __m512i _mm512_slli_epi32(__m512i a, unsigned by) {
    const plain::Words x(a);
    return plain::words([&](int i) { return x.at[i] << by; });
}
inline __m512i _mm512_srli_epi32(__m512i a, unsigned by) {
    const plain::Words x(a);
    return plain::words([&](int i) { return x.at[i] >> by; });
}

inline __m512 _mm512_cvtepi32_ps(__m512i a) {
    const plain::Ints x(a);
    return plain::floats([&](int i) { return float(x.at[i]); });
}
inline __m512 _mm512_cvtph_ps(__m256i a) {
    const plain::Lanes<_Float16, 16> x(a);
    return plain::floats([&](int i) { return float(x.at[i]); });
}
inline __m512i _mm512_cvtepu8_epi32(__m128i a) {
    const plain::Lanes<uint8_t, 16> x(a);
    return plain::words([&](int i) { return x.at[i]; });
}
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
    const plain::Lanes<uint16_t, 16> x(a);
    return plain::words([&](int i) { return x.at[i]; });
}
inline __m512i _mm512_castps_si512(__m512 x) { return (__m512i)x; }
inline __m256i _mm512_castsi512_si256(__m512i a) { return plain::load<__m256i>(&a); }
inline __m512i _mm512_castsi256_si512(__m256i a) {
    __m512i out = {};
    std::memcpy(&out, &a, 32);
    return out;
}
inline __m512i _mm512_inserti64x4(__m512i a, __m256i b, int half) {
    std::memcpy(reinterpret_cast<char *>(&a) + 32 * half, &b, 32);
    return a;
}

inline __m512 _mm512_permutexvar_ps(__m512i index, __m512 a) {
    const plain::Ints at(index);
    return plain::floats([&](int i) { return a[at.at[i] & 15]; });
}
inline __m512 _mm512_permutex2var_ps(__m512 a, __m512i index, __m512 b) {
    const plain::Ints at(index);
    return plain::floats([&](int i) { return at.at[i] & 16 ? b[at.at[i] & 15] : a[at.at[i] & 15]; });
}
inline __m512i _mm512_permutexvar_epi16(__m512i index, __m512i a) {
    const plain::Lanes<uint16_t, 32> at(index), from(a);
    plain::Lanes<uint16_t, 32> out;
    for (int i = 0; i < 32; i++) out.at[i] = from.at[at.at[i] & 31];
    return out.as<__m512i>();
}
inline __m512i _mm512_permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
    const plain::Lanes<uint16_t, 32> at(index), one(a), two(b);
    plain::Lanes<uint16_t, 32> out;
    for (int i = 0; i < 32; i++) out.at[i] = (at.at[i] & 32 ? two : one).at[at.at[i] & 31];
    return out.as<__m512i>();
}
inline __m256i _mm512_extracti64x4_epi64(__m512i a, int half) {
    return plain::load<__m256i>(reinterpret_cast<const char *>(&a) + 32 * half);
}
inline __m512i _mm512_permutexvar_epi8(__m512i index, __m512i a) {
    const plain::Lanes<uint8_t, 64> at(index), from(a);
    plain::Lanes<uint8_t, 64> out;
    for (int i = 0; i < 64; i++) out.at[i] = from.at[at.at[i] & 63];
    return out.as<__m512i>();
}
// In each 64 bits: eight bytes of them, each from a bit of its own on.
inline __m512i _mm512_multishift_epi64_epi8(__m512i shifts, __m512i a) {
    const plain::Lanes<uint8_t, 64> by(shifts);
    const plain::Lanes<uint64_t, 8> from(a);
    plain::Lanes<uint8_t, 64> out;
    for (int i = 0; i < 64; i++) {
        const int n = by.at[i] & 63;
        out.at[i] = from.at[i / 8] >> n | (n ? from.at[i / 8] << (64 - n) : 0);
    }
    return out.as<__m512i>();
}
inline __m256i _mm256_permutexvar_epi16(__m256i index, __m256i a) {
    const plain::Lanes<uint16_t, 16> at(index), from(a);
    plain::Lanes<uint16_t, 16> out;
    for (int i = 0; i < 16; i++) out.at[i] = from.at[at.at[i] & 15];
    return out.as<__m256i>();
}
// In each 128 bits: two 32-bit lanes of a and of b in turn, from the lower or the upper half.
inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) {
    const plain::Words x(a), y(b);
    return plain::words([&](int i) { return (i % 2 ? y : x).at[i / 4 * 4 + i % 4 / 2]; });
}
inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) {
    const plain::Words x(a), y(b);
    return plain::words([&](int i) { return (i % 2 ? y : x).at[i / 4 * 4 + 2 + i % 4 / 2]; });
}
inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) {
    return __m512i{a[0], b[0], a[2], b[2], a[4], b[4], a[6], b[6]};
}
inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) {
    return __m512i{a[1], b[1], a[3], b[3], a[5], b[5], a[7], b[7]};
}
// Two quarters of a, then two of b.
inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int which) {
    const plain::Words x(a), y(b);
    return plain::words([&](int i) { return (i < 8 ? x : y).at[4 * (which >> (2 * (i / 4)) & 3) + i % 4]; });
}

// --- within each 128 bits ---

inline __m512d _mm512_castps_pd(__m512 x) { return (__m512d)x; }
inline __m512 _mm512_castpd_ps(__m512d x) { return (__m512)x; }
inline __m512i _mm512_set_epi32(int e15, int e14, int e13, int e12, int e11, int e10, int e9, int e8, int e7, int e6, int e5, int e4,
                                int e3, int e2, int e1, int e0) {
    const int all[16] = {e0, e1, e2, e3, e4, e5, e6, e7, e8, e9, e10, e11, e12, e13, e14, e15};
    return plain::load<__m512i>(all);
}

namespace plain {
// Lanes of one half of each 128 bits, of a and b in turn. N: of a vector.
template <class Lane, int N, class V> V unpack(const V &a, const V &b, bool high) {
    const Lanes<Lane, N> x(a), y(b);
    Lanes<Lane, N> out;
    constexpr int part = N / 4;
    for (int i = 0; i < N; i++) {
        const int from = i / part * part + (high ? part / 2 : 0) + i % part / 2;
        out.at[i] = i % 2 ? y.at[from] : x.at[from];
    }
    return out.template as<V>();
}
}  // namespace plain

inline __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) { return plain::unpack<float, 16>(a, b, false); }
inline __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) { return plain::unpack<float, 16>(a, b, true); }
inline __m512d _mm512_unpacklo_pd(__m512d a, __m512d b) { return plain::unpack<double, 8>(a, b, false); }
inline __m512d _mm512_unpackhi_pd(__m512d a, __m512d b) { return plain::unpack<double, 8>(a, b, true); }
inline __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) { return plain::unpack<uint16_t, 32>(a, b, false); }
inline __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) { return plain::unpack<uint16_t, 32>(a, b, true); }
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int order) {
    return plain::floats([&](int i) {
        const int from = 4 * (order >> (i / 4 * 2) & 3) + i % 4;
        return i < 8 ? a[from] : b[from];
    });
}

inline uint64_t _pdep_u64(uint64_t bits, uint64_t mask) {
    uint64_t found = 0;
    for (int i = 0; i < 64; i++)
        if (mask >> i & 1) found |= (bits & 1) << i, bits >>= 1;
    return found;
}

// --- bytes, and products of them ---

inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
    const plain::Lanes<uint8_t, 64> x(a);
    const plain::Lanes<int8_t, 64> y(b);
    plain::Ints out(sum);
    for (int i = 0; i < 64; i++) out.at[i / 4] += x.at[i] * y.at[i];
    return out.as<__m512i>();
}
inline __m512i _mm512_permutex2var_epi8(__m512i a, __m512i index, __m512i b) {
    const plain::Lanes<uint8_t, 64> at(index), one(a), two(b);
    plain::Lanes<uint8_t, 64> out;
    for (int i = 0; i < 64; i++) out.at[i] = (at.at[i] & 64 ? two : one).at[at.at[i] & 63];
    return out.as<__m512i>();
}
inline __m512i _mm512_set1_epi8(char x) {
    plain::Lanes<char, 64> out;
    for (char &own : out.at) own = x;
    return out.as<__m512i>();
}
inline __m512i _mm512_add_epi8(__m512i a, __m512i b) {
    const plain::Lanes<uint8_t, 64> x(a), y(b);
    plain::Lanes<uint8_t, 64> out;
    for (int i = 0; i < 64; i++) out.at[i] = x.at[i] + y.at[i];
    return out.as<__m512i>();
}
inline __m512i _mm512_srli_epi16(__m512i a, unsigned by) {
    plain::Lanes<uint16_t, 32> x(a);
    for (uint16_t &own : x.at) own >>= by;
    return x.as<__m512i>();
}
inline __m512i _mm512_srlv_epi32(__m512i a, __m512i by) {
    const plain::Words x(a), n(by);
    return plain::words([&](int i) { return n.at[i] < 32 ? x.at[i] >> n.at[i] : 0; });
}
inline __m512i _mm512_srai_epi32(__m512i a, unsigned by) {
    const plain::Ints x(a);
    return plain::words([&](int i) { return uint32_t(x.at[i] >> by); });
}
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) {
    const plain::Words x(a), y(b);
    return plain::words([&](int i) { return x.at[i] - y.at[i]; });
}
inline int _mm512_reduce_add_epi32(__m512i a) {
    const plain::Words x(a);
    uint32_t sum = 0;
    for (uint32_t own : x.at) sum += own;
    return sum;
}
inline __m512i _mm512_cvtps_epi32(__m512 x) {
    return plain::words([&](int i) { return uint32_t(int32_t(std::nearbyint(x[i]))); });
}
inline __m128i _mm512_cvtepi32_epi8(__m512i a) {
    const plain::Words x(a);
    plain::Lanes<uint8_t, 16> out;
    for (int i = 0; i < 16; i++) out.at[i] = x.at[i];
    return out.as<__m128i>();
}
inline __m512i _mm512_castsi128_si512(__m128i a) {
    __m512i out = {};
    std::memcpy(&out, &a, 16);
    return out;
}
inline __m512i _mm512_inserti32x4(__m512i a, __m128i b, int quarter) {
    std::memcpy(reinterpret_cast<char *>(&a) + 16 * quarter, &b, 16);
    return a;
}
inline __m512i _mm512_mask_blend_epi64(__mmask8 m, __m512i a, __m512i b) {
    for (int i = 0; i < 8; i++)
        if (m >> i & 1) a[i] = b[i];
    return a;
}
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
    return plain::floats([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}
inline __m512 _mm512_abs_ps(__m512 a) {
    return plain::floats([&](int i) { return std::fabs(a[i]); });
}
inline __m512 _mm512_maskz_mul_ps(__mmask16 m, __m512 a, __m512 b) {
    return plain::floats([&](int i) { return m >> i & 1 ? a[i] * b[i] : 0.0f; });
}
inline __m512 _mm512_mask3_fmadd_ps(__m512 a, __m512 b, __m512 c, __mmask16 m) {
    return plain::floats([&](int i) { return m >> i & 1 ? std::fma(a[i], b[i], c[i]) : c[i]; });
}
// Which lanes are of these kinds: 0x01 and 0x80 not a number, 0x08 and 0x10 infinities, 0x40 below 0 and finite.
inline __mmask16 _mm512_fpclass_ps_mask(__m512 x, int kinds) {
    __mmask16 found = 0;
    for (int i = 0; i < 16; i++) {
        const bool none = std::isnan(x[i]), endless = std::isinf(x[i]);
        const bool is = (none && kinds & 0x81) || (endless && kinds & (x[i] > 0 ? 0x08 : 0x10)) ||
                        (!none && !endless && x[i] < 0 && kinds & 0x40);
        if (is) found |= 1 << i;
    }
    return found;
}
inline void _mm512_mask_storeu_ps(void *p, __mmask16 m, __m512 v) {
    for (int i = 0; i < 16; i++)
        if (m >> i & 1) std::memcpy(static_cast<char *>(p) + 4 * i, &v[i], 4);
}
