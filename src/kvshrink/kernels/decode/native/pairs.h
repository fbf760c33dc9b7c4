// PairTiles: see tiles.h. A key's channels 4i and 4i + 2 share a lane, 4i + 1 and 4i + 3 the next one; a value's tokens i
// and i + 16. So codes of up to 4 bits become pairs of numbers by one permutation of a table of 16-bit levels: its index
// is the low 5 bits of each 16-bit half, of which the fifth may be anything if the table of 16 stands there twice. A trellis
// of 4 bits has 32 levels, and clean bytes.
#pragma once
#include <immintrin.h>

#include <algorithm>

#include "numbers.h"
#include "transpose.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#include "byte_keys.h"
#include "byte_values.h"
#else
typedef NoByteKeys ByteKeys;
typedef NoByteValues ByteValues;
#endif

struct PairTiles {
    typedef uint32_t Lane;
    typedef ByteKeys KeyBytes;
    typedef ByteValues ValueBytes;
    static constexpr float still = 0.0625f;  // its square over 2 is what bfloat16 rounds by
    static int key_depth(int width) { return (width + 3) / 4 * 2; }
    static constexpr int value_depth = HALF;

    static v16 product(v16 sum, uint32_t a, const uint32_t *z) {
        return (v16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(z), (__m512bh)_mm512_set1_epi32(a));
    }
    static void pack(const float *from, int64_t step, int n, uint32_t *to) {
        for (int i = 0; i < key_depth(n); i++) {
            const int c = i / 2 * 4 + i % 2;
            to[i] = pair(c < n ? from[c * step] : 0.0f, c + 2 < n ? from[(c + 2) * step] : 0.0f);
        }
    }
    static void pack(const float *from, int n, uint32_t *to) {
        for (int c = 0; c < n; c += 16) pack16(_mm512_maskz_loadu_ps(mask16(n - c), from + c), n - c, to + c / 2);
    }
    static void pack_weights(const float *p, uint32_t *to) {
        _mm512_storeu_si512(to, pair(_mm512_loadu_ps(p), _mm512_loadu_ps(p + HALF)));
    }

    static bool direct_keys(const Side &s, int = 1) { return s.form == RAW_BF16; }
    static bool direct_values(const Side &s, int = 1) { return s.form == RAW_BF16 && s.width % 32 == 0; }
    static void pack_asked(const Side &s, const float *from, int n, uint32_t *to) {
        if (!direct_keys(s)) return pack(from, n, to);
        for (int i = 0; i < key_depth(n); i++) to[i] = pair(2 * i < n ? from[2 * i] : 0.0f, 2 * i + 1 < n ? from[2 * i + 1] : 0.0f);
    }
    static void dot_rows(const Side &s, const Spot &at, const uint32_t *query, int query_row, int rows, float *to, Scratch &room) {
        by_few(rows, [&](int r, auto count) {
            dot_pairs<count>(at.data, s.width, query + r * query_row, query_row, to + r * PAGE, room.ahead);
        });
    }
    static void add_rows(const Side &s, const Spot &at, const float *weights, int rows, uint32_t *packed, float *sums,
                         int width, Scratch &room) {
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < PAGE; t += 2) packed[r * HALF + t / 2] = pair(weights[r * PAGE + t], weights[r * PAGE + t + 1]);
        by_few(rows, [&](int r, auto count) {
            add_pairs<count>(at.data, s.width, packed + r * HALF, sums + r * width, width, room.ahead);
        });
    }
    static void done(const Side &s, float *sums, int rows) {
        const int width = padded(s.width, 32);
        for (int r = 0; direct_values(s) && r < rows; r++) ordered(sums + r * width, width);
    }

    static void load_keys(const Side &s, const Spot &at, Scratch &room, uint32_t *z) {
        if (s.form == RAW_BF16) return raw_keys(s.width, at.data, z);
        if (s.form <= RAW_F16) return through_floats_keys(s, at, room, z);
        if (mixes_keys(s)) {
            unpack_keys(s, at, room);
            return some_keys(s, room, 0, s.width, z);
        }
        sides(s, at, room, true);
        by_quads(s, at, room, [&](int c, int half, __m512i codes) {
            uint32_t *to = z + c / 2 * PAGE + half * HALF;
            const __m512 none = _mm512_setzero_ps();
            __m512 x[4];
            for (int i = 0; i < 4; i++)
                x[i] = c + i < s.width ? number(s, room, bits_at(s, c + i), _mm512_srli_epi32(codes, 8 * i), c + i, half) : none;
            _mm512_storeu_si512(to, pair(x[0], x[2]));
            _mm512_storeu_si512(to + PAGE, pair(x[1], x[3]));
        });
    }

    // Runs of several widths, of which sixteen channels have one gain: it goes into their levels.
    static bool mixes_keys(const Side &s) { return s.form == NORMAL && s.group == 16; }
    static void unpack_keys(const Side &s, const Spot &at, Scratch &room) {
        sides(s, at, room, true);
        unpack_page(s, at, room.codes, room.stride, room.spare);
    }
    // Channels from `from`, a multiple of 64, to `to` of the page that was unpacked.
    static void some_keys(const Side &s, Scratch &room, int from, int to_channel, uint32_t *z) {
        const char *codes = reinterpret_cast<const char *>(room.codes);
        int run = 0, end = s.channels[0];
        for (int c0 = from; c0 < to_channel; c0 += 64) {
            room.ahead.step(PAGE * 64 / 8 * s.bits[run]);
            __m512i v[2][16];
            for (int half = 0; half < 2; half++)
                rows_of(codes + half * HALF * room.stride + c0, room.stride, s.width - c0, v[half]);
            for (int c = c0; c < std::min(c0 + 64, to_channel); c += 16) {
                while (c >= end) end += s.channels[++run];
                const int bits = s.bits[run], quads = std::min(4, (s.width - c + 3) / 4);
                const __m512i table = scaled(s, bits, room.numbers[c]);
                for (int i = 0; i < quads; i++)
                    for (int half = 0; half < 2; half++) {
                        const __m512i own = v[half][(c - c0) / 4 + i];
                        uint32_t *to = z + ((c - from) / 2 + 2 * i) * PAGE + half * HALF;
                        if (bits <= 4) {
                            _mm512_storeu_si512(to, _mm512_permutexvar_epi16(own, table));
                            _mm512_storeu_si512(to + PAGE, _mm512_permutexvar_epi16(_mm512_srli_epi32(own, 8), table));
                            continue;
                        }
                        __m512 x[4];
                        for (int k = 0; k < 4; k++)
                            x[k] = number(s, room, bits, _mm512_srli_epi32(own, 8 * k), c + 4 * i + k, half);
                        _mm512_storeu_si512(to, pair(x[0], x[2]));
                        _mm512_storeu_si512(to + PAGE, pair(x[1], x[3]));
                    }
            }
        }
    }

    // Queries times each channel's scale, and what the minima add to each row's scores. z becomes codes as they are.
    static bool folds_keys(const Side &s) {
        bool small = s.form == CHANNEL;
        for (int i = 0; small && i < s.runs; i++) small = s.bits[i] <= 4;
        return small;
    }
    static void fold_keys(const Side &s, const Spot &at, Scratch &room, const float *query, int rows, uint32_t *asked,
                          float *added, uint32_t *z) {
        sides(s, at, room, true);
        const float *scale = room.numbers, *low = scale + PAGE * room.stride;
        for (int r = 0; r < rows; r++) {
            __m512 sum = _mm512_setzero_ps();
            for (int c = 0; c < s.width; c += 16) {
                const __m512 q = _mm512_maskz_loadu_ps(mask16(s.width - c), query + int64_t(r) * s.width + c);
                sum = _mm512_fmadd_ps(q, _mm512_loadu_ps(low + c), sum);
                pack16(_mm512_mul_ps(q, _mm512_loadu_ps(scale + c)), s.width - c,
                       asked + int64_t(r) * key_depth(s.width) + c / 2);
            }
            added[r] = _mm512_reduce_add_ps(sum);
        }
        as_levels(s, at, room, z);
    }

    // Keys whose scales are of tokens: products are with the levels of their codes, and scales come to those.
    static bool scales_tokens(const Side &s) { return s.form == TOKEN && s.runs == 1 && s.bits[0] <= 4 && s.group % 4 == 0; }
    static void load_levels(const Side &s, const Spot &at, Scratch &room, uint32_t *z) {
        sides(s, at, room, true);
        as_levels(s, at, room, z);
    }

    // z [key_depth][PAGE]: what codes of one width of at most 4 bits, or of several, stand for.
    static void as_levels(const Side &s, const Spot &at, Scratch &room, uint32_t *z) {
        int bits = bits_at(s, 0);
        __m512i table = scaled(s, bits, 1.0f);
        by_quads(s, at, room, [&](int c, int half, __m512i codes) {
            if (s.runs > 1 && bits_at(s, c) != bits) bits = bits_at(s, c), table = scaled(s, bits, 1.0f);
            uint32_t *to = z + c / 2 * PAGE + half * HALF;
            _mm512_storeu_si512(to, _mm512_permutexvar_epi16(codes, table));
            _mm512_storeu_si512(to + PAGE, _mm512_permutexvar_epi16(_mm512_srli_epi32(codes, 8), table));
        });
    }

    static void load_values(const Side &s, const Spot &at, Scratch &room, uint32_t *z, int width) {
        const bool grouped = s.form == TOKEN || s.form == NORMAL;
        if ((s.form <= RAW_F16 && s.form != RAW_BF16) || (grouped && s.group % 16 && s.group < s.width))
            return through_floats_values(s, at, room, z, width);
        if (s.form == RAW_BF16) return raw_values(s.width, at.data, z, width);
        sides(s, at, room, false);
        const bool nibbles = s.runs == 1 && s.bits[0] == 4 && !s.trellis;
        const uint8_t *codes = nibbles ? reinterpret_cast<const uint8_t *>(at.data) : room.codes;
        const int stride = nibbles ? s.width : room.stride;
        if (!nibbles) unpack_page(s, at, room.codes, room.stride, room.spare);
        for (int c = 0; c < s.width; c += 16) {
            const __mmask16 there = mask16(s.width - c);
            const int bits = bits_at(s, c), g = s.form == TOKEN ? c / s.group : 0;
            const int groups = s.form == TOKEN ? (s.width + s.group - 1) / s.group : 0;
            const float *scale = room.numbers, *low = scale + PAGE * room.stride;
            if (s.form == NORMAL && bits <= 4) {  // 16 channels have one gain, which goes into the levels
                const __m512i table = scaled(s, bits, scale[c]);
                for (int t = 0; t < HALF; t++) {
                    const __m512i one = _mm512_cvtepu8_epi32(bytes16(there, codes + t * stride + c));
                    const __m512i two = nibbles ? _mm512_srli_epi32(one, 4)
                                                : _mm512_cvtepu8_epi32(bytes16(there, codes + (t + HALF) * stride + c));
                    const __m512i index = _mm512_or_si512(one, _mm512_slli_epi32(two, 16));
                    _mm512_storeu_si512(z + t * width + c, _mm512_permutexvar_epi16(index, table));
                }
                continue;
            }
            const __m512 table = _mm512_loadu_ps(s.levels + 256 * bits);
            __m512 by = _mm512_loadu_ps(scale + (groups ? 0 : c)), to = _mm512_loadu_ps(low + (groups ? 0 : c));
            for (int t = 0; t < HALF; t++) {
                const __m512i one = _mm512_cvtepu8_epi32(bytes16(there, codes + t * stride + c));
                const __m512i two = nibbles ? _mm512_srli_epi32(one, 4)
                                            : _mm512_cvtepu8_epi32(bytes16(there, codes + (t + HALF) * stride + c));
                __m512 x = level(s, bits, table, one), y = level(s, bits, table, two);
                if (groups) {
                    const int i = t * groups + g, j = (t + HALF) * groups + g;
                    x = _mm512_fmadd_ps(x, _mm512_set1_ps(scale[i]), _mm512_set1_ps(low[i]));
                    y = _mm512_fmadd_ps(y, _mm512_set1_ps(scale[j]), _mm512_set1_ps(low[j]));
                } else {
                    x = _mm512_fmadd_ps(x, by, to), y = _mm512_fmadd_ps(y, by, to);
                }
                _mm512_storeu_si512(z + t * width + c, pair(x, y));
            }
        }
    }

    // Weights times each token's scale, for one group of channels at a time, and z as codes. Pays for few rows.
    static bool folds_values(const Side &s, int rows) {
        return s.form == TOKEN && s.runs == 1 && s.bits[0] <= 4 && s.group % 32 == 0 && rows <= 8;
    }
    // weights [rows][PAGE] -> pairs [group][rows][HALF]; what the minima add goes to sums [rows][width] at once.
    static void fold_values(const Side &s, const Spot &at, Scratch &room, const float *weights, int rows, uint32_t *scaled,
                            float *sums, int width) {
        sides(s, at, room, true);
        const float *scale = room.numbers, *low = scale + PAGE * room.stride;
        for (int g = 0; g * s.group < s.width; g++)
            for (int r = 0; r < rows; r++) {
                const __m512 x = _mm512_loadu_ps(weights + r * PAGE), y = _mm512_loadu_ps(weights + r * PAGE + HALF);
                const float *by = scale + g * PAGE, *to = low + g * PAGE;
                _mm512_storeu_si512(scaled + (g * rows + r) * HALF, pair(_mm512_mul_ps(x, _mm512_loadu_ps(by)),
                                                                         _mm512_mul_ps(y, _mm512_loadu_ps(by + HALF))));
                const __m512 sum = _mm512_fmadd_ps(x, _mm512_loadu_ps(to), _mm512_mul_ps(y, _mm512_loadu_ps(to + HALF)));
                const __m512 more = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
                float *row = sums + int64_t(r) * width;
                for (int c = g * s.group; c < std::min((g + 1) * s.group, width); c += 16)
                    _mm512_storeu_ps(row + c, _mm512_add_ps(_mm512_loadu_ps(row + c), more));
            }
    }
    static void load_codes(const Side &s, const Spot &at, Scratch &room, uint32_t *z, int width) {
        const __m512i table = scaled(s, s.bits[0], 1.0f);
        const bool nibbles = s.bits[0] == 4;  // a byte has a token of each half
        if (!nibbles) unpack_page(s, at, room.codes, room.stride, room.spare);
        for (int t = 0; t < HALF; t++)
            for (int c = 0; c < s.width; c += 16) {
                const __mmask16 there = mask16(s.width - c);
                const uint8_t *codes = room.codes + t * room.stride + c;
                const __m128i bytes = nibbles ? bytes16(there, at.data + int64_t(t) * s.width + c)
                                              : bytes16(there, codes);
                const __m512i one = _mm512_cvtepu8_epi32(bytes);
                const __m512i two = nibbles ? _mm512_slli_epi32(one, 12)
                                            : _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes16(there, codes + HALF * room.stride)), 16);
                _mm512_storeu_si512(z + t * width + c, _mm512_permutexvar_epi16(_mm512_or_si512(one, two), table));
            }
    }

  private:
    // 16 channels in the order of a key's lanes; those beyond `left` must be 0.
    static void pack16(__m512 x, int left, uint32_t *to) {
        const __m256i order = _mm256_set_epi16(15, 13, 14, 12, 11, 9, 10, 8, 7, 5, 6, 4, 3, 1, 2, 0);
        const __m256i lanes = _mm256_permutexvar_epi16(order, (__m256i)_mm512_cvtneps_pbh(x));
        _mm256_mask_storeu_epi32(to, (1 << std::min(8, key_depth(left))) - 1, lanes);
    }


    // The levels of codes of up to 4 bits, times a gain, as bfloat16: 16 twice, or 32 of a trellis.
    static __m512i scaled(const Side &s, int bits, float gain) {
        const __m512 by = _mm512_set1_ps(gain);
        const float *levels = s.levels + 256 * bits;
        const __m256i low = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(levels), by));
        const __m256i high = s.trellis ? (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(levels + 16), by)) : low;
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }

    // use(c, half, codes): lane = token of this half, byte i = code of channel c + i, in its low 4 bits, or all 8 if it was unpacked.
    template <class F> static void by_quads(const Side &s, const Spot &at, Scratch &room, F use) {
        const bool nibbles = s.runs == 1 && s.bits[0] == 4 && !s.trellis;  // a byte has a token of each half: no need to unpack
        if (!nibbles) unpack_page(s, at, room.codes, room.stride, room.spare);
        const char *codes = reinterpret_cast<const char *>(room.codes);
        for (int c0 = 0; c0 < s.width; c0 += 64)
            for (int half = 0; half < (nibbles ? 1 : 2); half++) {
                room.ahead.step(nibbles ? 1024 : 64 * s.bits[0]);
                __m512i v[16];
                if (nibbles)
                    rows_of(at.data + c0, s.width, s.width - c0, v);
                else
                    rows_of(codes + half * HALF * room.stride + c0, room.stride, s.width - c0, v);
                for (int c = c0; c < std::min(c0 + 64, s.width); c += 4) {
                    use(c, half, v[(c - c0) / 4]);
                    if (nibbles) use(c, 1, _mm512_srli_epi32(v[(c - c0) / 4], 4));
                }
            }
    }

    static __m512i pair(__m512 x, __m512 y) {  // rounded to nearest
        const __m512i half = _mm512_set1_epi32(0x8000), high = _mm512_set1_epi32(0xffff0000);
        const __m512i a = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(x), half), 16);
        const __m512i b = _mm512_add_epi32(_mm512_castps_si512(y), half);
        return _mm512_ternarylogic_epi32(a, b, high, 0xf8);  // a | (b & high)
    }
    static uint32_t pair(float x, float y) {
        uint32_t a, b;
        std::memcpy(&a, &x, 4), std::memcpy(&b, &y, 4);
        return ((a + 0x8000) >> 16) | ((b + 0x8000) & 0xffff0000);
    }

    static int bits_at(const Side &s, int channel) {
        int run = 0;
        for (int end = s.channels[0]; channel >= end; end += s.channels[++run]) {
        }
        return s.bits[run];
    }

    static __m512 level(const Side &s, int bits, __m512 table, __m512i codes) {
        if (bits <= 4 && s.trellis) return _mm512_permutex2var_ps(table, codes, _mm512_loadu_ps(s.levels + 256 * bits + 16));
        if (bits <= 4) return _mm512_permutexvar_ps(codes, table);
        codes = _mm512_and_si512(codes, _mm512_set1_epi32(0xff));
        return s.form == NORMAL ? _mm512_i32gather_ps(codes, s.levels + 256 * bits, 4) : _mm512_cvtepi32_ps(codes);
    }

    // 16 tokens of one channel.
    static __m512 number(const Side &s, const Scratch &room, int bits, __m512i codes, int c, int half) {
        const float *scale = room.numbers, *low = scale + PAGE * room.stride;
        const __m512 x = level(s, bits, _mm512_loadu_ps(s.levels + 256 * bits), codes);
        if (s.form != TOKEN) return _mm512_fmadd_ps(x, _mm512_set1_ps(scale[c]), _mm512_set1_ps(low[c]));
        const int at = c / s.group * PAGE + half * HALF;
        return _mm512_fmadd_ps(x, _mm512_loadu_ps(scale + at), _mm512_loadu_ps(low + at));
    }

    static void raw_keys(int width, const char *data, uint32_t *z) {
        for (int c0 = 0; c0 < width; c0 += 32)
            for (int half = 0; half < 2; half++) {
                __m512i v[16];
                rows_of(data + 2 * (int64_t(half) * HALF * width + c0), 2 * width, 2 * (width - c0), v);
                const __m512i high = _mm512_set1_epi32(0xffff0000);
                for (int i = 0; i < 16 && c0 + 2 * i < width; i += 2) {  // (c, c + 1), (c + 2, c + 3) to our order
                    uint32_t *to = z + (c0 / 2 + i) * PAGE + half * HALF;
                    _mm512_storeu_si512(to, _mm512_or_si512(_mm512_andnot_si512(high, v[i]), _mm512_slli_epi32(v[i + 1], 16)));
                    _mm512_storeu_si512(to + PAGE, _mm512_or_si512(_mm512_srli_epi32(v[i], 16), _mm512_and_si512(high, v[i + 1])));
                }
            }
    }

    static void raw_values(int width, const char *data, uint32_t *z, int z_row) {
        for (int t = 0; t < HALF; t++)
            for (int c = 0; c < width; c += 16) {
                const __mmask16 there = mask16(width - c);
                const __m256i x = _mm256_maskz_loadu_epi16(there, data + 2 * (int64_t(t) * width + c));
                const __m256i y = _mm256_maskz_loadu_epi16(there, data + 2 * (int64_t(t + HALF) * width + c));
                const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(y), 16);
                _mm512_storeu_si512(z + t * z_row + c, _mm512_or_si512(_mm512_cvtepu16_epi32(x), wide));
            }
    }

    // Forms that no bfloat16 model stores, and groups of odd sizes.
    static void through_floats_keys(const Side &s, const Spot &at, Scratch &room, uint32_t *z) {
        FloatTiles::load_keys(s, at, room, room.floats);
        for (int i = 0; i < key_depth(s.width); i++)
            for (int t = 0; t < PAGE; t++) {
                const int c = i / 2 * 4 + i % 2;
                const float *x = room.floats + c * PAGE + t;
                z[i * PAGE + t] = pair(c < s.width ? *x : 0.0f, c + 2 < s.width ? x[2 * PAGE] : 0.0f);
            }
    }
    static void through_floats_values(const Side &s, const Spot &at, Scratch &room, uint32_t *z, int width) {
        FloatTiles::load_values(s, at, room, room.floats, room.stride);
        for (int t = 0; t < HALF; t++)
            for (int c = 0; c < s.width; c++)
                z[t * width + c] = pair(room.floats[t * room.stride + c], room.floats[(t + HALF) * room.stride + c]);
    }
};
