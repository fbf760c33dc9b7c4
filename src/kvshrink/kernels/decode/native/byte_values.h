// Weighted sums of values as products of bytes (bytes.h): four tokens of a channel share a lane.
//
// A weight, times its token's scale where tokens have one, is rounded to 16 bits of the largest of its page; each of its
// two bytes has products of its own. Scales, gains and minima come to the sums in float32.
#pragma once
#include "bytes.h"

// Sixteen channels of four tokens, one token after the other, to four tokens of each channel.
struct FourTokens {
    uint8_t index[64];
    constexpr FourTokens() : index() {
        for (int i = 0; i < 64; i++) index[i] = i % 4 * 16 + i / 4;
    }
};
inline constexpr FourTokens FOUR_TOKENS{};

// Of two times sixteen numbers below 2^16: their upper bytes, then their lower ones.
struct TwoBytes {
    uint8_t index[64];
    constexpr TwoBytes() : index() {
        for (int i = 0; i < 64; i++) index[i] = i % 32 * 4 + (i < 32);
    }
};
inline constexpr TwoBytes TWO_BYTES{};

class ByteValues {
    const Side &s;
    const std::vector<ByteLevels> levels;  // by run
    static constexpr int QUADS = PAGE / 4, BYTES = 2 * PAGE, MOST = 8;

  public:
    const bool fits;
    const int extra;  // floats behind a row's sums: by group of channels, in 16 parts, what minima add to each

    ByteValues(const Side &side, int rows)
        : s(side), levels(ByteLevels::of(side)), fits(!levels.empty() && rows <= MOST),
          extra(fits && s.form == TOKEN && !s.zeros ? 16 * groups() : 0) {}

    // sums [rows][wide] += weights [rows][PAGE] of this page's values. bytes: room for 64 of each row and group of channels
    // that has scales. False, and nothing done, where weights or scales are no plain numbers of 0 or more.
    bool add(const Spot &at, Scratch &room, const float *weights, int rows, uint8_t *bytes, float *sums, int wide) const {
        sides(s, at, room, true);
        float *units = room.floats, *masses = units + groups() * rows;  // [groups][rows], [rows]
        if (!round(room, weights, rows, bytes, units, masses)) return false;
        if (extra) add_minima(room, weights, rows, sums + wide - extra, wide);
        const Asked asked{room.numbers, room.numbers + PAGE * room.stride, units, masses, bytes, rows, sums, wide};
        by_runs(s, at, room, [&](const uint8_t *in, auto bits, int stride, int run, int first) {
            add_run<bits>(in, stride, levels[run], first, s.channels[run], asked, room.ahead);
        });
        return true;
    }

    // What minima have added, to the sums; these then lie `to` apart.
    void done(float *sums, int rows, int wide) const {
        for (int r = 0; extra && r < rows; r++, sums += wide)
            for (int g = 0; g < groups(); g++) {
                const float more = sum16(load16(sums + wide - extra + 16 * g));
                for (int c = g * s.group; c < std::min((g + 1) * s.group, s.width); c++) sums[c] += more;
            }
    }

  private:
    struct Asked {
        const float *scale, *low, *units, *masses;
        const uint8_t *bytes;
        int rows;
        float *sums;
        int wide;
    };

    int groups() const { return s.form == TOKEN ? (s.width + s.group - 1) / s.group : 1; }

    // Weights as two times 32 bytes, high ones first, and what 1 stands for.
    bool round(const Scratch &room, const float *weights, int rows, uint8_t *to, float *units, float *masses) const {
        float largest[MOST];
        int strange = 0;
        for (int r = 0; r < rows; r++) {
            const __m512 x = _mm512_loadu_ps(weights + r * PAGE), y = _mm512_loadu_ps(weights + r * PAGE + HALF);
            strange |= _mm512_fpclass_ps_mask(x, ENDLESS) | _mm512_fpclass_ps_mask(y, ENDLESS);
            largest[r] = _mm512_reduce_max_ps(_mm512_max_ps(x, y));
            if (s.form == CHANNEL) masses[r] = _mm512_reduce_add_ps(_mm512_add_ps(x, y));
        }
        const __m512i index = _mm512_loadu_si512(TWO_BYTES.index);
        for (int g = 0; g < groups(); g++) {
            __m512 a = _mm512_set1_ps(1), b = a;
            float most = 1;
            if (s.form == TOKEN) {
                a = _mm512_loadu_ps(room.numbers + g * PAGE), b = _mm512_loadu_ps(room.numbers + g * PAGE + HALF);
                strange |= _mm512_fpclass_ps_mask(a, ENDLESS | NEGATIVE) | _mm512_fpclass_ps_mask(b, ENDLESS | NEGATIVE);
                most = _mm512_reduce_max_ps(_mm512_max_ps(a, b));
            }
            for (int r = 0; r < rows; r++, to += BYTES) {
                const float top = most * largest[r];
                const __m512 by = _mm512_set1_ps(top > 1e-30f ? 65535 / top : 0.0f);
                const __m512 x = _mm512_loadu_ps(weights + r * PAGE), y = _mm512_loadu_ps(weights + r * PAGE + HALF);
                const __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_mul_ps(a, by), x));
                const __m512i m = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_mul_ps(b, by), y));
                _mm512_storeu_si512(to, _mm512_permutex2var_epi8(n, index, m));
                units[g * rows + r] = top / 65535;
            }
        }
        return !strange;
    }

    void add_minima(const Scratch &room, const float *weights, int rows, float *to, int wide) const {
        for (int g = 0; g < groups(); g++) {
            const float *low = room.numbers + PAGE * room.stride + g * PAGE;
            const v16 a = load16(low), b = load16(low + HALF);
            for (int r = 0; r < rows; r++) {
                float *own = to + int64_t(r) * wide + 16 * g;
                store16(own, load16(own) + load16(weights + r * PAGE) * a + load16(weights + r * PAGE + HALF) * b);
            }
        }
    }

    // A run's channels. BITS: a byte of `in` holds 8 / BITS tokens of a channel, as far apart as it has rows.
    template <int BITS>
    void add_run(const uint8_t *in, int stride, const ByteLevels &own, int first, int channels, const Asked &asked,
                 Ahead &ahead) const {
        const __m512i table = _mm512_loadu_si512(own.table);
        const bool alike = s.form != TOKEN || s.group >= s.width || s.group % 32 == 0;  // two sixteens have the same weights
        __m512i tile[2 * QUADS];
        int c = 0;
        for (; alike && c + 32 <= channels; c += 32) {
            ahead.step(PAGE * 32 * BITS / 8);
            tiles<BITS>(in + c, stride, table, 0xffff, tile), tiles<BITS>(in + c + 16, stride, table, 0xffff, tile + QUADS);
            by_few(asked.rows, [&](int r, auto count) { products<count, true>(tile, own.unit, first + c, 0xffff, r, asked); });
        }
        for (; c < channels; c += 16) {
            ahead.step(PAGE * 16 * BITS / 8);
            const __mmask16 there = mask16(channels - c);
            tiles<BITS>(in + c, stride, table, there, tile);
            by_few(asked.rows, [&](int r, auto count) { products<count, false>(tile, own.unit, first + c, there, r, asked); });
        }
    }

    // Levels of sixteen channels, by four tokens.
    template <int BITS> static void tiles(const uint8_t *in, int stride, __m512i table, __mmask16 there, __m512i *tile) {
        constexpr int PER = 8 / BITS, ROWS = QUADS / PER;
        const __m512i order = _mm512_loadu_si512(FOUR_TOKENS.index);
        for (int i = 0; i < ROWS; i++) {
            __m512i x = _mm512_permutexvar_epi8(order, four_rows(in + 4 * i * stride, stride, there));
            for (int p = 0; p < PER; p++, x = _mm512_srli_epi16(x, BITS % 8))
                tile[p * ROWS + i] = _mm512_permutexvar_epi8(x, table);
        }
    }

    // Four tokens' 16 codes, one after the other.
    static __m512i four_rows(const uint8_t *p, int stride, __mmask16 there) {
        __m512i x = _mm512_castsi128_si512(bytes16(there, p));
        x = _mm512_inserti32x4(x, bytes16(there, p + stride), 1);
        x = _mm512_inserti32x4(x, bytes16(there, p + 2 * stride), 2);
        return _mm512_inserti32x4(x, bytes16(there, p + 3 * stride), 3);
    }

    // R rows' sums of sixteen channels, or of two sixteens.
    template <int R, bool two>
    void products(const __m512i *tile, float level, int c, __mmask16 there, int first, const Asked &asked) const {
        const int at = (s.form == TOKEN ? c / s.group : 0) * asked.rows + first;
        const uint8_t *bytes = asked.bytes + at * BYTES;
        Few<Sums, R> sums;
        sums.each([&](auto, Sums &own) { own.high_one = own.high_two = own.low_one = own.low_two = _mm512_setzero_si512(); });
        for (int q = 0; q < QUADS; q++) {
            const __m512i x = tile[q], y = tile[q + QUADS];
            sums.each([&](auto r, Sums &own) {
                const __m512i high = all_of(bytes + r * BYTES + 4 * q), low = all_of(bytes + r * BYTES + PAGE + 4 * q);
                add_four(own.high_one, high, x), add_four(own.low_one, low, x);
                if (two) add_four(own.high_two, high, y), add_four(own.low_two, low, y);
            });
        }
        sums.each([&](auto r, const Sums &own) {
            const float unit = level * asked.units[at + r];
            flush(_mm512_add_epi32(_mm512_slli_epi32(own.high_one, 8), own.low_one), unit, c, there, first + r, asked);
            if (two) flush(_mm512_add_epi32(_mm512_slli_epi32(own.high_two, 8), own.low_two), unit, c + 16, there, first + r, asked);
        });
    }
    __attribute__((always_inline)) void flush(__m512i sum, float unit, int c, __mmask16 there, int r, const Asked &asked) const {
        const __m512 whole = _mm512_cvtepi32_ps(sum);
        float *to = asked.sums + int64_t(r) * asked.wide + c;
        __m512 x = _mm512_maskz_loadu_ps(there, to);
        if (s.form == CHANNEL) {
            x = _mm512_fmadd_ps(whole, _mm512_mul_ps(_mm512_loadu_ps(asked.scale + c), _mm512_set1_ps(unit)), x);
            x = _mm512_fmadd_ps(_mm512_loadu_ps(asked.low + c), _mm512_set1_ps(asked.masses[r]), x);
        } else {
            if (s.form == NORMAL) unit *= asked.scale[c];
            x = _mm512_fmadd_ps(whole, _mm512_set1_ps(unit), x);
        }
        _mm512_mask_storeu_ps(to, there, x);
    }
};
