// Stored pages, as kernels/latents/reference.py defines them, and one page's numbers as a tile of floats.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX512VBMI__)
#include <immintrin.h>
#endif

#if defined(__BMI2__) && defined(__x86_64__) && !defined(__znver1__) && !defined(__znver2__)  // where it is slow
#define SPREADS_BITS
#include <immintrin.h>
#endif

constexpr int PAGE = 32;
constexpr int HALF = PAGE / 2;

enum Form { RAW_F32, RAW_BF16, RAW_F16, CHANNEL, TOKEN, NORMAL };

// Keys or values: a table of records [row][lane][page], 0 where a lane has no such page, and where a record's parts begin,
// in bytes, and how far apart those of its groups are. scale holds the gain of NORMAL; scale, low and gain are float16.
struct Side {
    int32_t form, groups, width, group, runs, lanes;
    int32_t trellis;  // whether codes of up to 4 bits are of kernels/trellis
    const int32_t *bits, *channels;  // of each run
    const int64_t *table;
    const char *zeros;  // in place of low, where a form has none
    int64_t data_at, data_group, scale_at, scale_group, low_at, low_group;
    const float *levels;  // [9][256]: by bits, the number that a code stands for; the code itself for CHANNEL and TOKEN
};

inline float half_of(const char *p, int64_t i) {
    _Float16 x;
    std::memcpy(&x, p + 2 * i, 2);
    return static_cast<float>(x);
}

inline float raw_of(int form, const char *p, int64_t i) {
    if (form == RAW_F16) return half_of(p, i);
    float x;
    if (form == RAW_F32) {
        std::memcpy(&x, p + 4 * i, 4);
        return x;
    }
    uint16_t bits;
    std::memcpy(&bits, p + 2 * i, 2);
    uint32_t wide = uint32_t(bits) << 16;
    std::memcpy(&x, &wide, 4);
    return x;
}

// One page of one group: where its parts lie.
struct Spot {
    bool there;
    const char *data = nullptr, *scale = nullptr, *low = nullptr;
    Spot(const Side &s, int64_t row, int64_t pages, int64_t page, int64_t group) {
        const int64_t members = s.groups / s.lanes, own = group % members;
        const char *record = reinterpret_cast<const char *>(s.table[(row * s.lanes + group / members) * pages + page]);
        if (!(there = record != nullptr)) return;
        data = record + s.data_at + own * s.data_group;
        scale = record + s.scale_at + own * s.scale_group;
        low = s.zeros ? s.zeros : record + s.low_at + own * s.low_group;
    }
};

// The page of a group that is read some steps later, brought nearer a few lines at a time: a record is too short for the
// processor to guess that it goes on elsewhere, and all lines at once would hold up what is read now. Inlined, since to the
// compiler a function that does nothing else does nothing.
class Ahead {
    const char *at = nullptr, *end = nullptr;

  public:
    __attribute__((always_inline)) void begin(const Side &s, const Spot &next) {
        if (!next.there) return;
        for (int64_t i = 0; i < s.scale_group; i += LINE) __builtin_prefetch(next.scale + i, 0, NEAR);
        for (int64_t i = 0; i < s.low_group; i += LINE) __builtin_prefetch(next.low + i, 0, NEAR);
        at = next.data, end = at + s.data_group;
    }
    // As many bytes as have just been read, or are about to be.
    __attribute__((always_inline)) void step(int64_t bytes) {
        for (const char *to = std::min(end, at + bytes); at < to; at += LINE) __builtin_prefetch(at, 0, NEAR);
    }
    __attribute__((always_inline)) void finish() { step(end - at), at = end = nullptr; }

    static constexpr int LINE = 64, NEAR = 3;
};

inline int64_t run_bytes(int bits, int channels) { return int64_t(PAGE) * channels * bits / 8; }

// N bytes side by side.
template <int N> struct Bytes {
    typedef uint8_t V __attribute__((vector_size(N)));
    static V load(const uint8_t *p) {
        V x;
        std::memcpy(&x, p, N);
        return x;
    }
};

// use(at, count), count a constant, for all of n bytes: as many at a time as there are, since loops over a few of them
// would do the last ones one by one.
template <int N = 64, class F> inline void by_bytes(int n, F use) {
    int at = 0;
    for (; at + N <= n; at += N) use(at, std::integral_constant<int, N>());
    if constexpr (N > 1)
        if (at < n) by_bytes<N == 16 ? 4 : N == 4 ? 1 : N / 2>(n - at, [&](int more, auto count) { use(at + more, count); });
}

// Eight codes of 3 bits, from the lowest on, as bytes.
inline uint64_t eight_of(uint32_t word) {
#if defined(SPREADS_BITS)
    return _pdep_u64(word, 0x0707070707070707);
#else
    uint64_t found = 0;
    for (int i = 0; i < 8; i++) found |= uint64_t(word >> (3 * i) & 7) << (8 * i);
    return found;
#endif
}

// Where the next four sixteens of a run's channels go, row after row of tokens.
struct Sixteens {
    const int units, stride;  // sixteens of a row
    uint8_t *const out;
    int row = 0, unit = 0;
    uint8_t *to[4];

    Sixteens(int channels, int stride, uint8_t *out) : units(channels / 16), stride(stride), out(out) {}
    void next() {
        for (auto &p : to) {
            p = out + row * stride + unit * 16;
            if (++unit == units) unit = 0, row++;
        }
    }
    // 64 bytes, so many further on; at once where they are of one row.
    void store(const void *from, int64_t further) const {
        if (units % 4 == 0) {
            std::memcpy(to[0] + further, from, 64);
        } else {
            for (int i = 0; i < 4; i++) std::memcpy(to[i] + further, static_cast<const char *>(from) + 16 * i, 16);
        }
    }
};

// Codes of 1, 2 or 4 bits of some sixteens of channels: 64 bytes at a time, which may be of several rows. Shifts are of 16
// bits, which processors have; what comes over from the next byte is masked.
inline void unpack_sixteens(const uint8_t *in, int bits, int channels, uint8_t *out, int stride) {
    typedef uint16_t V __attribute__((vector_size(64)));
    const int planes = 8 / bits, rows = PAGE / planes;
    const uint16_t ones = ((1 << bits) - 1) * 0x0101, width = bits;
    const V mask = V{} + ones, step = V{} + width;
    Sixteens place(channels, stride, out);
    for (int at = 0; at < rows * place.units; at += 4, in += 64) {
        V x;
        std::memcpy(&x, in, 64);
        place.next();
        for (int plane = 0; plane < planes; plane++, x >>= step) {
            const V y = x & mask;
            place.store(&y, int64_t(plane) * rows * stride);
        }
    }
}

#if defined(__AVX512VBMI__)
// The same of 3 bits: 64 codes are 24 bytes, of which each eight codes' three go to a lane of 64 bits and are spread there.
inline void unpack_threes(const uint8_t *in, int channels, uint8_t *out, int stride) {
    static constexpr uint8_t LANES[64] = {
        0,  1,  2,  0, 0, 0, 0, 0, 3,  4,  5,  0, 0, 0, 0, 0, 6,  7,  8,  0, 0, 0, 0, 0, 9,  10, 11, 0, 0, 0, 0, 0,
        12, 13, 14, 0, 0, 0, 0, 0, 15, 16, 17, 0, 0, 0, 0, 0, 18, 19, 20, 0, 0, 0, 0, 0, 21, 22, 23, 0, 0, 0, 0, 0};
    const __m512i lanes = _mm512_loadu_si512(LANES), shifts = _mm512_set1_epi64(0x15120f0c09060300);
    Sixteens place(channels, stride, out);
    for (int at = 0; at < PAGE * place.units; at += 4, in += 24) {
        const __m512i all = _mm512_maskz_loadu_epi8(0xffffff, in);
        const __m512i spread = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(lanes, all));
        const __m512i codes = _mm512_and_si512(spread, _mm512_set1_epi32(0x07070707));
        place.next();
        place.store(&codes, 0);
    }
}
#endif

// Codes of one run, one byte each, to out[token * stride + channel].
inline void unpack_run(const uint8_t *in, int bits, int channels, uint8_t *out, int stride) {
#if defined(__AVX512VBMI__)
    if (bits == 3 && channels % 16 == 0) return unpack_threes(in, channels, out, stride);
#endif
    if (bits == 3) {  // three bytes are a little-endian word of eight codes
        int token = 0, channel = 0;
        for (int word = 0; word < PAGE * channels / 8; word++, in += 3) {
            uint64_t w = eight_of(in[0] | in[1] << 8 | in[2] << 16);
            if (channel + 8 <= channels) {
                std::memcpy(out + token * stride + channel, &w, 8);
                if ((channel += 8) == channels) channel = 0, token++;
                continue;
            }
            for (int i = 0; i < 8; i++, w >>= 8) {
                out[token * stride + channel] = w & 255;
                if (++channel == channels) channel = 0, token++;
            }
        }
        return;
    }
    if (channels % 16 == 0 && bits < 8) return unpack_sixteens(in, bits, channels, out, stride);
    const int planes = 8 / bits, rows = PAGE / planes;
    const uint8_t mask = (1 << bits) - 1;
    for (int plane = 0; plane < planes; plane++)
        for (int row = 0; row < rows; row++) {
            const uint8_t *from = in + row * channels;
            uint8_t *to = out + (plane * rows + row) * stride;
            by_bytes(channels, [&](int c, auto count) {
                const auto x = (Bytes<count>::load(from + c) >> (plane * bits)) & mask;
                std::memcpy(to + c, &x, count);
            });
        }
}

// From codes of a trellis to the numbers of their levels, in place: see kernels/trellis_levels.py.
inline void follow_trellis(uint8_t *codes, int channels, int stride) {
    by_bytes(channels, [&](int c, auto count) {
        typedef typename Bytes<count>::V V;
        V last[4];  // coded bits of the tokens before, one token in four places further
        for (int i = 0; i < 4; i++) last[i] = Bytes<count>::load(codes + (PAGE - 4 + i) * stride + c) & 1;
#pragma GCC unroll 32
        for (int t = 0; t < PAGE; t++) {
            const V own = Bytes<count>::load(codes + t * stride + c), coded = own & 1;
            const V first = coded ^ last[(t + 3) % 4] ^ last[t % 4], next = own ^ coded;
            const V x = (next + next) | (first + first) | last[(t + 2) % 4];
            last[t % 4] = coded;
            std::memcpy(codes + t * stride + c, &x, count);
        }
    });
}

// A trellis' run of 1 bit, four rows of codes, as one of 2 bits, eight rows: the numbers of the levels. A bit of a byte is
// a token of its own, four tokens from the next one; the token before is a row higher, and the first one follows the last.
inline void expand_one(const uint8_t *in, int channels, uint8_t *out) {
    by_bytes(channels, [&](int c, auto count) {
        typedef typename Bytes<count>::V V;
        V x[4], later[4];  // later: by four tokens
        for (int i = 0; i < 4; i++) x[i] = Bytes<count>::load(in + i * channels + c), later[i] = x[i] << 1 | x[i] >> 7;
        for (int i = 0; i < 4; i++) {
            const V first = x[i] ^ (i ? x[i - 1] : later[3]) ^ later[i], second = i < 2 ? later[i + 2] : x[i - 2];
            const V even = (second & 0x55) | (first & 0x55) << 1, odd = (second >> 1 & 0x55) | (first & 0xaa);
            std::memcpy(out + i * channels + c, &even, count), std::memcpy(out + (i + 4) * channels + c, &odd, count);
        }
    });
}

// The same of 2 bits, eight rows, as one of 4 bits, sixteen rows.
inline void expand_two(const uint8_t *in, int channels, uint8_t *out) {
    by_bytes(channels, [&](int c, auto count) {
        typedef typename Bytes<count>::V V;
        V x[8], coded[8], later[8];  // later: by eight tokens
        for (int i = 0; i < 8; i++) {
            x[i] = Bytes<count>::load(in + i * channels + c), coded[i] = x[i] & 0x55;
            later[i] = coded[i] << 2 | coded[i] >> 6;
        }
        for (int i = 0; i < 8; i++) {
            const V first = coded[i] ^ (i ? coded[i - 1] : later[7]) ^ (i < 4 ? later[i + 4] : coded[i - 4]);
            const V second = i < 2 ? later[i + 6] : coded[i - 2], next = x[i] >> 1;
            const V even = (second & 0x11) | (first & 0x11) << 1 | (next & 0x11) << 2;
            const V odd = (second & 0x44) >> 2 | (first & 0x44) >> 1 | (next & 0x44);
            std::memcpy(out + i * channels + c, &even, count), std::memcpy(out + (i + 8) * channels + c, &odd, count);
        }
    });
}

// All codes of a page, [PAGE][stride]; of a trellis the numbers of its levels. stride is a multiple of 64; spare: room for
// half as many bytes.
inline void unpack_page(const Side &s, const Spot &at, uint8_t *out, int stride, uint8_t *spare) {
    const uint8_t *in = reinterpret_cast<const uint8_t *>(at.data);
    int channel = 0;
    for (int run = 0; run < s.runs; run++) {
        const int n = s.channels[run], bits = s.bits[run];
        if (s.trellis && bits <= 2) {
            (bits == 1 ? expand_one : expand_two)(in, n, spare);
            unpack_run(spare, 2 * bits, n, out + channel, stride);
        } else {
            unpack_run(in, bits, n, out + channel, stride);
            if (s.trellis && bits <= 4) follow_trellis(out + channel, n, stride);
        }
        in += run_bytes(bits, n);
        channel += n;
    }
}

// What a page is made of while it is read.
struct Scratch {
    uint8_t *codes;  // [PAGE][stride]
    uint8_t *spare;  // half as many
    int stride;
    float *numbers;  // scales, then minima: PAGE * stride each
    float *floats;   // [PAGE][stride], where a page goes through floats
    Ahead ahead;
    std::vector<int32_t> asked;  // queries of one page
};
