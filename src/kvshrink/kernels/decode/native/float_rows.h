// Codes of a page as floats, token after token: eight channels at a time, where products are of floats.
#pragma once
#include "rows.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

inline v8 load8(const float *p) {
    v8 x;
    std::memcpy(&x, p, 32);
    return x;
}
inline void store8(float *p, v8 x) { std::memcpy(p, &x, 32); }

inline v8i codes8(const uint8_t *p) {
    typedef uint8_t b8 __attribute__((vector_size(8)));
    b8 x;
    std::memcpy(&x, p, 8);
    return __builtin_convertvector(x, v8i);
}

// The numbers that codes stand for: themselves, or those of a table of so many.
struct Themselves {
    explicit Themselves(const float *) {}
    v8 eight(const uint8_t *p) const { return __builtin_convertvector(codes8(p), v8); }
    float one(const uint8_t *p) const { return *p; }
};
template <int COUNT> struct Table {
    const float *levels;
    explicit Table(const float *levels) : levels(levels) {}
    float one(const uint8_t *p) const { return levels[*p]; }
    v8 eight(const uint8_t *p) const {
#if defined(__AVX2__)
        const __m256i at = (__m256i)codes8(p);
        if constexpr (COUNT <= 32) return (v8)of<COUNT>(levels, at);
        return (v8)_mm256_i32gather_ps(levels, at, 4);
#else
        v8 x;
        for (int i = 0; i < 8; i++) x[i] = levels[p[i]];
        return x;
#endif
    }
#if defined(__AVX2__)
    // By the low three bits among eight, and by one bit more between two halves.
    template <int N> static __m256 of(const float *levels, __m256i at) {
        if constexpr (N <= 8) return _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels), at);
        constexpr int bit = N <= 16 ? 3 : 4;
        const __m256 low = of<N / 2>(levels, at), high = of<N / 2>(levels + N / 2, at);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at, 31 - bit)));
    }
#endif
};

// z[token * row + channel] of channels [c, end) of a run, for all tokens. scale, low: of each channel, or, where channels
// of a `group` share them, of each token and group.
template <class Levels>
inline void run_rows(const Scratch &room, const Levels &levels, int c, int end, const float *scale, const float *low,
                     int group, int groups, float *z, int row) {
    for (int t = 0; t < PAGE; t++, z += row) {
        const uint8_t *codes = room.codes + t * room.stride;
        if (!group) {
            int i = c;
            for (; i + 8 <= end; i += 8) store8(z + i, levels.eight(codes + i) * load8(scale + i) + load8(low + i));
            for (; i < end; i++) z[i] = levels.one(codes + i) * scale[i] + low[i];
            continue;
        }
        for (int i = c; i < end;) {
            const int g = i / group, to = std::min(end, (g + 1) * group);
            const float s = scale[t * groups + g], l = low[t * groups + g];
            for (; i + 8 <= to; i += 8) store8(z + i, levels.eight(codes + i) * s + l);
            for (; i < to; i++) z[i] = levels.one(codes + i) * s + l;
        }
    }
}

inline void floats_of(const char *from, int n, float *to) {
    int i = 0;
    for (; i + WIDE <= n; i += WIDE) {
        const Wide x = row_wide<RAW_F16>(from, i);
        std::memcpy(to + i, &x, sizeof x);
    }
    for (; i < n; i++) to[i] = half_of(from, i);
}

// A page of codes as z [PAGE][row].
inline void code_rows(const Side &s, const Spot &at, Scratch &room, float *z, int row) {
    unpack_page(s, at, room.codes, room.stride, room.spare);
    const int w = s.width, group = s.form == TOKEN ? s.group : 0, groups = group ? (w + group - 1) / group : 0;
    float *scale = room.numbers, *low = scale + PAGE * room.stride;
    const int count = group ? PAGE * groups : w;
    if (s.form == NORMAL) {
        for (int i = 0, g = 0; i < w; i += s.group, g++) std::fill(scale + i, scale + std::min(i + s.group, w), half_of(at.scale, g));
        std::fill(low, low + w, 0.0f);
    } else {
        floats_of(at.scale, count, scale), floats_of(at.low, count, low);
    }
    int c = 0;
    for (int run = 0; run < s.runs; run++) {
        const int bits = s.bits[run], end = c + s.channels[run];
        const int known = bits + (s.trellis && bits <= 4);  // bits of a level's number
        const float *levels = s.levels + 256 * bits;
        auto use = [&](auto numbers) { run_rows(room, numbers, c, end, scale, low, group, groups, z, row); };
        if (s.form == CHANNEL || (s.form == TOKEN && !s.zeros))
            use(Themselves(levels));
        else if (known <= 3)
            use(Table<8>(levels));
        else if (known == 4)
            use(Table<16>(levels));
        else if (known == 5)
            use(Table<32>(levels));
        else
            use(Table<256>(levels));
        c = end;
    }
}

// z[channel * PAGE + token] of rows [PAGE][width].
inline void columns_of(const float *rows, int width, float *z) {
    int c = 0;
#if defined(__AVX2__)
    for (; c + 8 <= width; c += 8)
        for (int t = 0; t < PAGE; t += 8) {
            __m256 x[8], y[8];
            for (int i = 0; i < 8; i++) x[i] = _mm256_loadu_ps(rows + (t + i) * width + c);
            for (int i = 0; i < 8; i += 2) y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]), y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
            for (int i = 0; i < 8; i += 4)
                for (int j = 0; j < 2; j++) {
                    x[i + 2 * j] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0x44);
                    x[i + 2 * j + 1] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0xee);
                }
            for (int i = 0; i < 4; i++) {
                _mm256_storeu_ps(z + (c + i) * PAGE + t, _mm256_permute2f128_ps(x[i], x[i + 4], 0x20));
                _mm256_storeu_ps(z + (c + 4 + i) * PAGE + t, _mm256_permute2f128_ps(x[i], x[i + 4], 0x31));
            }
        }
#endif
    for (; c < width; c++)
        for (int t = 0; t < PAGE; t++) z[c * PAGE + t] = rows[t * width + c];
}
