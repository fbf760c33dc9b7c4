// Products with rows of floats as they lie in memory, a token after the other: no tile is made of them.
//
// A score is a dot product along a token's channels, summed over a register at its end; a weighted sum takes channels side
// by side. Both read each row once for up to FEW rows of queries or weights.
#pragma once
#include <algorithm>

#include "pages.h"
#include "vector.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

constexpr int FEW = 4;

#if defined(__AVX512F__)
typedef v16 Wide;
#else
typedef v8 Wide;  // g++ converts sixteen numbers one by one where a register holds eight
#endif
constexpr int WIDE = sizeof(Wide) / 4;

inline Wide load_wide(const float *p) {
    Wide x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline float sum_wide(v16 x) { return sum16(x); }
inline float sum_wide(v8 x) { return sum8(x); }

// WIDE of a row's numbers from c on.
template <int FORM> inline Wide row_wide(const char *row, int c) {
    Wide x;
    if constexpr (FORM == RAW_F32) {
        std::memcpy(&x, row + 4 * c, sizeof x);
    } else if constexpr (FORM == RAW_BF16) {
        typedef uint16_t Halves __attribute__((vector_size(sizeof(Wide) / 2)));
        typedef int32_t Ints __attribute__((vector_size(sizeof(Wide))));
        Halves bits;
        std::memcpy(&bits, row + 2 * c, sizeof bits);
        const Ints all = __builtin_convertvector(bits, Ints) << 16;
        std::memcpy(&x, &all, sizeof x);
#if defined(__F16C__) && !defined(__AVX512F__)
    } else {
        x = (v8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(row + 2 * c)));
    }
#else
    } else {
        typedef _Float16 Halves __attribute__((vector_size(sizeof(Wide) / 2)));
        Halves all;
        std::memcpy(&all, row + 2 * c, sizeof all);
        x = __builtin_convertvector(all, Wide);
    }
#endif
    return x;
}

// 16 of a row's numbers from c on; zeros beyond its width.
template <int FORM> inline v16 row16_of(const char *row, int width, int c) {
    v16 x{};
    if (c + 16 > width) {
        for (int i = 0; i < width - c; i++) x[i] = raw_of(FORM, row, c + i);
        return x;
    }
    Wide part[16 / WIDE];
    for (int i = 0; i < 16 / WIDE; i++) part[i] = row_wide<FORM>(row, c + i * WIDE);
    std::memcpy(&x, part, sizeof x);
    return x;
}
inline v16 row16(int form, const char *row, int width, int c) {
    if (form == RAW_F32) return row16_of<RAW_F32>(row, width, c);
    return form == RAW_BF16 ? row16_of<RAW_BF16>(row, width, c) : row16_of<RAW_F16>(row, width, c);
}

// to[r][t] += query[r] . row t, for all tokens of a page, two at a time: so each number of a query is read half as often.
template <int FORM, int R>
inline void dot_floats(const char *data, int width, const float *query, int query_row, float *to, Ahead &ahead) {
    const int64_t size = int64_t(width) * (FORM == RAW_F32 ? 4 : 2);
    for (int t = 0; t < PAGE; t += 2, data += 2 * size) {
        ahead.step(2 * size);
        Wide sum[R][2] = {};
        int c = 0;
        for (; c + WIDE <= width; c += WIDE) {
            const Wide x = row_wide<FORM>(data, c), y = row_wide<FORM>(data + size, c);
            for (int r = 0; r < R; r++) {
                const Wide q = load_wide(query + r * query_row + c);
                sum[r][0] += x * q, sum[r][1] += y * q;
            }
        }
        for (int r = 0; r < R; r++)
            for (int i = 0; i < 2; i++) to[r * PAGE + t + i] += sum_wide(sum[r][i]);
        for (; c < width; c++)
            for (int r = 0; r < R; r++)
                for (int i = 0; i < 2; i++)
                    to[r * PAGE + t + i] += raw_of(FORM, data + i * size, c) * query[r * query_row + c];
    }
}

// sums[r][c] += sum of weights[r][t] * row t, of BLOCKS * WIDE channels at a time.
template <int FORM, int R, int BLOCKS>
inline void add_block(const char *data, int64_t size, int c, const float *weights, float *sums, int sums_row) {
    Wide sum[R][BLOCKS];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < BLOCKS; i++) sum[r][i] = load_wide(sums + r * sums_row + c + i * WIDE);
    for (int t = 0; t < PAGE; t++, data += size)
        for (int i = 0; i < BLOCKS; i++) {
            const Wide x = row_wide<FORM>(data, c + i * WIDE);
            for (int r = 0; r < R; r++) sum[r][i] += x * weights[r * PAGE + t];
        }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < BLOCKS; i++) std::memcpy(sums + r * sums_row + c + i * WIDE, &sum[r][i], sizeof(Wide));
}

template <int FORM, int R>
inline void add_floats(const char *data, int width, const float *weights, float *sums, int sums_row, Ahead &ahead) {
    const int64_t size = int64_t(width) * (FORM == RAW_F32 ? 4 : 2);
    int c = 0;
    for (; c + 2 * WIDE <= width; c += 2 * WIDE) {
        ahead.step(2 * WIDE * PAGE * size / width);
        add_block<FORM, R, 2>(data, size, c, weights, sums, sums_row);
    }
    for (; c + WIDE <= width; c += WIDE) add_block<FORM, R, 1>(data, size, c, weights, sums, sums_row);
    for (; c < width; c++)
        for (int r = 0; r < R; r++)
            for (int t = 0; t < PAGE; t++) sums[r * sums_row + c] += raw_of(FORM, data + t * size, c) * weights[r * PAGE + t];
}

// use, of the form as a constant.
template <class F> inline void by_form(int form, F use) {
    if (form == RAW_F32) return use(std::integral_constant<int, RAW_F32>());
    if (form == RAW_BF16) return use(std::integral_constant<int, RAW_BF16>());
    use(std::integral_constant<int, RAW_F16>());
}

#if defined(__AVX512BF16__) && defined(__AVX512F__)
inline __m512 product32(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// The sums of four vectors, in each 128 bits those of its own part.
inline __m512 sums4(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 x = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 y = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d u = _mm512_castps_pd(x), v = _mm512_castps_pd(y);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(u, v)), _mm512_castpd_ps(_mm512_unpackhi_pd(u, v)));
}

// 32 channels of 4 tokens, or those that are left.
template <int R, class Load>
inline void dot_block(const char *data, int64_t stride, const uint32_t *query, int query_row, Load load, __m512 (*sum)[4]) {
    __m512i q[R];
    for (int r = 0; r < R; r++) q[r] = load(query + r * query_row);
    for (int i = 0; i < 4; i++) {
        const __m512i x = load(data + i * stride);
        for (int r = 0; r < R; r++) sum[r][i] = product32(sum[r][i], x, q[r]);
    }
}

// As dot_floats, of bfloat16; query: pairs of neighbouring channels.
template <int R> inline void dot_pairs(const char *data, int width, const uint32_t *query, int query_row, float *to, Ahead &ahead) {
    const int64_t stride = 2 * width;
    for (int t = 0; t < PAGE; t += 4, data += 4 * stride) {
        ahead.step(4 * stride);
        __m512 sum[FEW][4];
        for (auto &own : sum)
            for (auto &x : own) x = _mm512_setzero_ps();
        int c = 0;
        for (; c + 32 <= width; c += 32)
            dot_block<R>(data + 2 * c, stride, query + c / 2, query_row, [](const void *p) { return _mm512_loadu_si512(p); }, sum);
        if (c < width) {
            const __mmask32 there = (__mmask32(1) << (width - c)) - 1;
            dot_block<R>(data + 2 * c, stride, query + c / 2, query_row,
                         [&](const void *p) { return _mm512_maskz_loadu_epi16(there, p); }, sum);
        }
        __m512 part[FEW];
        for (int r = 0; r < FEW; r++)
            part[r] = r < R ? sums4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]) : _mm512_setzero_ps();
        const __m512 x = _mm512_add_ps(_mm512_shuffle_f32x4(part[0], part[1], 0x44), _mm512_shuffle_f32x4(part[0], part[1], 0xee));
        const __m512 y = _mm512_add_ps(_mm512_shuffle_f32x4(part[2], part[3], 0x44), _mm512_shuffle_f32x4(part[2], part[3], 0xee));
        const __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
        float found[16];
        _mm512_storeu_ps(found, all);
        for (int r = 0; r < R; r++) {
            float *row = to + r * PAGE + t;
            _mm_storeu_ps(row, _mm_add_ps(_mm_loadu_ps(row), _mm_loadu_ps(found + 4 * r)));
        }
    }
}

// As add_floats, of bfloat16, in the order that unpacking leaves: `ordered` puts it right. BLOCKS: of 32 channels, as many
// as registers hold for R rows, so that memory is read in order: by columns it takes twice the time.
template <int R, int BLOCKS>
inline void add_pairs(const char *data, int width, const uint32_t *weights, float *sums, int sums_row, Ahead &ahead) {
    __m512 low[R][BLOCKS], high[R][BLOCKS];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < BLOCKS; c++) {
            low[r][c] = _mm512_loadu_ps(sums + r * sums_row + 32 * c);
            high[r][c] = _mm512_loadu_ps(sums + r * sums_row + 32 * c + 16);
        }
    for (int t = 0; t < PAGE; t += 2) {
        ahead.step(2 * 64 * BLOCKS);
        for (int c = 0; c < BLOCKS; c++) {
            const __m512i a = _mm512_loadu_si512(data + 2 * (int64_t(t) * width + 32 * c));
            const __m512i b = _mm512_loadu_si512(data + 2 * (int64_t(t + 1) * width + 32 * c));
            const __m512i x = _mm512_unpacklo_epi16(a, b), y = _mm512_unpackhi_epi16(a, b);
            for (int r = 0; r < R; r++) {
                const __m512i w = _mm512_set1_epi32(weights[r * HALF + t / 2]);
                low[r][c] = product32(low[r][c], x, w), high[r][c] = product32(high[r][c], y, w);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < BLOCKS; c++) {
            _mm512_storeu_ps(sums + r * sums_row + 32 * c, low[r][c]);
            _mm512_storeu_ps(sums + r * sums_row + 32 * c + 16, high[r][c]);
        }
}

// All channels; width a multiple of 32.
template <int R>
inline void add_pairs(const char *data, int width, const uint32_t *weights, float *sums, int sums_row, Ahead &ahead) {
    int c = 0;
    for (; c + 64 <= width; c += 64) add_pairs<R, 2>(data + 2 * c, width, weights, sums + c, sums_row, ahead);
    if (c < width) add_pairs<R, 1>(data + 2 * c, width, weights, sums + c, sums_row, ahead);
}

// Sums of `add_pairs` as their channels lie. Of each 128 bits of a row the first four channels are in `low`.
inline void ordered(float *sums, int width) {
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i second = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    for (int c = 0; c < width; c += 32) {
        const __m512 low = _mm512_loadu_ps(sums + c), high = _mm512_loadu_ps(sums + c + 16);
        _mm512_storeu_ps(sums + c, _mm512_permutex2var_ps(low, first, high));
        _mm512_storeu_ps(sums + c + 16, _mm512_permutex2var_ps(low, second, high));
    }
}
#endif

// All `rows` rows, FEW at a time, or SOME of them; use: of a first row and a count that is a constant.
template <int SOME = FEW, class F> inline void by_few(int rows, F use) {
    int r = 0;
    for (; r + SOME <= rows; r += SOME) use(r, std::integral_constant<int, SOME>());
    if constexpr (SOME > 1)
        by_few<SOME - 1>(rows - r, [&](int more, auto count) { use(r + more, count); });
}
