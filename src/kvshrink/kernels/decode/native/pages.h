// Stored pages, as kernels/latents/reference.py defines them, and one page's numbers as a tile of floats.
#pragma once
#include <cstdint>
#include <cstring>

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

// Codes of one run, one byte each, to out[token * stride + channel].
inline void unpack_run(const uint8_t *in, int bits, int channels, uint8_t *out, int stride) {
    if (bits == 3) {  // three bytes are a little-endian word of eight codes
        int token = 0, channel = 0;
        for (int word = 0; word < PAGE * channels / 8; word++, in += 3) {
            uint32_t w = in[0] | in[1] << 8 | in[2] << 16;
            for (int i = 0; i < 8; i++, w >>= 3) {
                out[token * stride + channel] = w & 7;
                if (++channel == channels) channel = 0, token++;
            }
        }
        return;
    }
    const int planes = 8 / bits, rows = PAGE / planes, mask = (1 << bits) - 1;
    for (int plane = 0; plane < planes; plane++)
        for (int row = 0; row < rows; row++) {
            const uint8_t *from = in + row * channels;
            uint8_t *to = out + (plane * rows + row) * stride;
            for (int c = 0; c < channels; c++) to[c] = (from[c] >> (plane * bits)) & mask;
        }
}

// From codes of a trellis to the numbers of their levels, in place: see kernels/trellis_levels.py.
inline void follow_trellis(uint8_t *codes, int channels, int stride) {
    constexpr int AT_ONCE = 64;
    for (int c0 = 0; c0 < channels; c0 += AT_ONCE) {
        const int n = channels - c0 < AT_ONCE ? channels - c0 : AT_ONCE;
        uint8_t last[PAGE][AT_ONCE];  // coded bits, which the numbers overwrite
        for (int t = 0; t < PAGE; t++)
            for (int c = 0; c < n; c++) last[t][c] = codes[t * stride + c0 + c] & 1;
        for (int t = 0; t < PAGE; t++) {
            uint8_t *row = codes + t * stride + c0;
            const uint8_t *one = last[(t + PAGE - 1) % PAGE], *two = last[(t + PAGE - 2) % PAGE];
            const uint8_t *four = last[(t + PAGE - 4) % PAGE];
            for (int c = 0; c < n; c++) row[c] = (row[c] >> 1) << 2 | ((last[t][c] ^ one[c] ^ four[c]) << 1) | two[c];
        }
    }
}

// All codes of a page, [PAGE][stride]; of a trellis the numbers of its levels.
inline void unpack_page(const Side &s, const Spot &at, uint8_t *out, int stride) {
    const uint8_t *in = reinterpret_cast<const uint8_t *>(at.data);
    for (int run = 0; run < s.runs; run++) {
        unpack_run(in, s.bits[run], s.channels[run], out, stride);
        if (s.trellis && s.bits[run] <= 4) follow_trellis(out, s.channels[run], stride);
        in += run_bytes(s.bits[run], s.channels[run]);
        out += s.channels[run];
    }
}
