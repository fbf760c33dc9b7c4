// Scales, gains and minima of a page as floats.
#pragma once
#include "rows.h"

inline __m128i bytes16(__mmask16 there, const void *p) {  // masks cost time, and nearly all bytes are there
    return there == 0xffff ? _mm_loadu_si128(static_cast<const __m128i *>(p)) : _mm_maskz_loadu_epi8(there, p);
}
inline __mmask16 mask16(int left) { return left >= 16 ? 0xffff : (1 << left) - 1; }

inline void halves(const char *from, int n, float *to) {
    int i = 0;
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + 2 * i))));
    for (; i < n; i++) to[i] = half_of(from, i);
}

// Where sixteen tokens' numbers of group g, then of g + 1, are among those of all groups.
struct Interleaved {
    __m512i lanes;
    Interleaved(int groups, int g) {
        uint16_t at[32];
        for (int i = 0; i < 32; i++) at[i] = i % 16 * groups + g + i / 16;
        lanes = _mm512_loadu_si512(at);
    }
};

// float16 numbers [PAGE][groups] -> [groups][PAGE].
inline void by_group(const char *from, int groups, float *to) {
    if (groups == 1) return halves(from, PAGE, to);
    if (groups != 2 && groups != 4) {
        for (int t = 0; t < PAGE; t++)
            for (int g = 0; g < groups; g++) to[g * PAGE + t] = half_of(from, t * groups + g);
        return;
    }
    for (int g = 0; g < groups; g += 2) {  // sixteen tokens of two groups at a time
        const Interleaved index(groups, g);
        for (int t = 0; t < PAGE; t += 16) {
            const char *own = from + 2 * int64_t(t) * groups;
            const __m512i a = _mm512_loadu_si512(own), b = groups == 2 ? a : _mm512_loadu_si512(own + 64);
            const __m512i both = _mm512_permutex2var_epi16(a, index.lanes, b);
            _mm512_storeu_ps(to + g * PAGE + t, _mm512_cvtph_ps(_mm512_castsi512_si256(both)));
            _mm512_storeu_ps(to + (g + 1) * PAGE + t, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1)));
        }
    }
}

// A page's gains, channel by channel.
inline void spread(const Side &s, const Spot &at, float *scale) {
    for (int c = 0, g = 0; c < s.width; c += s.group, g++) {
        const float gain = half_of(at.scale, g);
        if (s.group % 16 == 0)
            for (int i = c; i < std::min(c + s.group, padded(s.width, 16)); i += 16) store16(scale + i, all16(gain));
        else
            for (int i = c; i < std::min(c + s.group, s.width); i++) scale[i] = gain;
    }
}

// scale and low as floats: per channel, or for TOKEN as stored, or [group][PAGE] where channels are the rows.
inline void sides(const Side &s, const Spot &at, Scratch &room, bool channels_are_rows) {
    float *scale = room.numbers, *low = scale + PAGE * room.stride;
    const int groups = (s.width + s.group - 1) / std::max(s.group, 1);
    if (s.form == CHANNEL) {
        halves(at.scale, s.width, scale), halves(at.low, s.width, low);
    } else if (s.form == NORMAL) {
        spread(s, at, scale);
        std::fill(low, low + padded(s.width, 16), 0.0f);
    } else if (!channels_are_rows) {
        halves(at.scale, PAGE * groups, scale), halves(at.low, PAGE * groups, low);
    } else {
        by_group(at.scale, groups, scale), by_group(at.low, groups, low);
    }
}
