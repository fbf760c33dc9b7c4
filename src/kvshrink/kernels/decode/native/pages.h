// Stored pages, as kernels/latents/reference.py defines them, and one page's numbers as a tile of floats.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

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

// All codes of a page, [PAGE][stride]; of a trellis the numbers of its levels. stride is a multiple of 64.
inline void unpack_page(const Side &s, const Spot &at, uint8_t *out, int stride) {
    const uint8_t *in = reinterpret_cast<const uint8_t *>(at.data);
    int channel = 0, first = s.width;  // of a trellis' runs, which come behind those of 8 bits
    for (int run = 0; run < s.runs; run++) {
        unpack_run(in, s.bits[run], s.channels[run], out + channel, stride);
        if (s.bits[run] <= 4) first = std::min(first, channel);
        in += run_bytes(s.bits[run], s.channels[run]);
        channel += s.channels[run];
    }
    if (s.trellis && first < channel) follow_trellis(out + first, first % 64 ? channel - first : (channel - first + 63) / 64 * 64, stride);
}
