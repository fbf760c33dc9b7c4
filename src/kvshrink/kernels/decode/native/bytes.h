// Products of bytes: four numbers of a lane at once, in whole numbers, so that their sums are exact. For codes that stand
// for whole numbers of one unit: codes of an affine grid do, levels of kernels/normal and kernels/trellis_levels do.
#pragma once
#include <cmath>
#include <vector>

#include "numbers.h"

// Not a number, or an infinity; or below 0.
constexpr int ENDLESS = 0x01 | 0x08 | 0x10 | 0x80, NEGATIVE = 0x40;

// Up to 32 levels as bytes, in units, for an index whose upper bits may be anything.
struct ByteLevels {
    alignas(64) int8_t table[64];
    float unit = 1;
    bool whole = true;  // whether all are so many units, up to rounding

    ByteLevels(const Side &s, int run) {
        const float *levels = s.levels + 256 * s.bits[run];
        const int count = 1 << (s.bits[run] + (s.trellis ? 1 : 0));
        float top = 0;
        for (int i = 0; i < count; i++) {
            top = std::max(top, std::fabs(levels[i]));
            whole &= levels[i] == std::nearbyint(levels[i]);
        }
        if (!whole || top > 127) unit = top / 127, whole = true;
        for (int i = 0; i < 64; i++) {
            const float own = levels[i % count] / unit;
            table[i] = int8_t(std::nearbyint(own));
            whole &= std::fabs(own - table[i]) < 1e-3f;
        }
    }

    // Of each run; none where a run has more bits, or ends within 16 channels, or they are not whole.
    static std::vector<ByteLevels> of(const Side &s) {
        std::vector<ByteLevels> found;
        if (s.form < CHANNEL || (s.form != CHANNEL && s.group < s.width && s.group % 16)) return {};
        for (int run = 0; run < s.runs; run++) {
            if (s.bits[run] > 4 || (run + 1 < s.runs && s.channels[run] % 16)) return {};
            found.emplace_back(s, run);
            if (!found.back().whole) return {};
        }
        return found;
    }
};

// Sums of two vectors' products with two bytes' vectors. Named, not an array: g++ would keep that in memory.
struct Sums {
    __m512i high_one, high_two, low_one, low_two;
};

// A page's scores.
struct Scores {
    v16 one, two;
};

// Of as many as FEW rows.
template <class Each, int R> struct Few {
    Each a, b, c, d;
    // use(row, its own), the row being a constant
    template <class F> __attribute__((always_inline)) void each(F use) {
        use(std::integral_constant<int, 0>(), a);
        if constexpr (R > 1) use(std::integral_constant<int, 1>(), b);
        if constexpr (R > 2) use(std::integral_constant<int, 2>(), c);
        if constexpr (R > 3) use(std::integral_constant<int, 3>(), d);
    }
    template <int row> const Each &of() const {
        if constexpr (row == 0) return a;
        if constexpr (row == 1) return b;
        if constexpr (row == 2) return c;
        if constexpr (row == 3) return d;
    }
};

// sum += four products of each lane, of bytes from 0 on and signed ones.
__attribute__((always_inline)) inline void add_four(__m512i &sum, __m512i a, __m512i b) {
    sum = _mm512_dpbusd_epi32(sum, a, b);
}

inline __m512i all_of(const void *four) {
    int32_t x;
    std::memcpy(&x, four, 4);
    return _mm512_set1_epi32(x);
}

// use(codes, bits, stride, run, first channel): codes as they lie; unpacked, as if of 8 bits, of runs of 3 bits and of a
// trellis' runs of 3 and 4; of its other runs the numbers of levels, packed.
template <class F> inline void by_runs(const Side &s, const Spot &at, Scratch &room, F use) {
    constexpr std::integral_constant<int, 1> one;
    constexpr std::integral_constant<int, 2> two;
    constexpr std::integral_constant<int, 4> four;
    const uint8_t *in = reinterpret_cast<const uint8_t *>(at.data);
    for (int run = 0, c = 0; run < s.runs; c += s.channels[run++]) {
        const int n = s.channels[run], bits = s.bits[run];
        if (bits == 3 || (s.trellis && bits == 4)) {
            unpack_run(in, bits, n, room.codes, room.stride);
            if (s.trellis) follow_trellis(room.codes, n, room.stride);
            use(room.codes, std::integral_constant<int, 8>(), room.stride, run, c);
        } else if (s.trellis) {
            (bits == 1 ? expand_one : expand_two)(in, n, room.codes);
            bits == 1 ? use(room.codes, two, n, run, c) : use(room.codes, four, n, run, c);
        } else {
            bits == 1 ? use(in, one, n, run, c) : bits == 2 ? use(in, two, n, run, c) : use(in, four, n, run, c);
        }
        in += run_bytes(bits, n);
    }
}
