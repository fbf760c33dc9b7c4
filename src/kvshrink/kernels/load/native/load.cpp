// The numbers of stored pages as floats: what ../../latents/reference.py calls `load`, to the bit.
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "../../decode/native/pages.h"
#include "../../decode/native/vector.h"

namespace {

struct Room {
    std::vector<uint8_t> codes, spare;
    std::vector<float> scale, low;  // of each channel, or of each token's groups of channels
};

// What n codes of one run stand for; few: none is above 31.
inline void look_up(const float *levels, bool few, const uint8_t *codes, int n, float *out) {
    int c = 0;
#if defined(__AVX512F__)
    const __m512 first = _mm512_loadu_ps(levels), second = _mm512_loadu_ps(levels + 16);
    for (; few && c + 16 <= n; c += 16) {
        const __m512i at = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codes + c)));
        _mm512_storeu_ps(out + c, _mm512_permutex2var_ps(first, at, second));
    }
#endif
    for (; c < n; c++) out[c] = levels[codes[c]];
}

// Products and sums are rounded one by one, as the reference rounds them.
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("fp-contract=off")))
#endif
void change(float *x, const float *scale, const float *low, int n) {
    for (int c = 0; c < n; c++) x[c] *= scale[c];
    if (low)
        for (int c = 0; c < n; c++) x[c] += low[c];
}

void spread(const char *halves, int at, int groups, int group, int width, float *out) {
    for (int g = 0, c = 0; g < groups; g++) {
        const float x = half_of(halves, at + g);
        for (const int end = std::min(width, c + group); c < end; c++) out[c] = x;
    }
}

void page_of(const Side &s, const Spot &at, Room &room, float *out) {
    const int width = s.width, stride = int(room.codes.size()) / PAGE;
    unpack_page(s, at, room.codes.data(), stride, room.spare.data());
    const int group = s.form == CHANNEL ? 1 : s.group, groups = (width + group - 1) / group;
    const bool shifted = s.form == CHANNEL || (s.form == TOKEN && !s.zeros);
    for (int t = 0; t < PAGE; t++) {
        float *to = out + int64_t(t) * width;
        for (int run = 0, c = 0; run < s.runs; c += s.channels[run++]) {
            const int bits = s.bits[run];
            look_up(s.levels + 256 * bits, bits <= 4, room.codes.data() + t * stride + c, s.channels[run], to + c);
        }
        if (s.form == TOKEN || t == 0) {
            const int first = s.form == TOKEN ? t * groups : 0;
            spread(at.scale, first, groups, group, width, room.scale.data());
            if (shifted) spread(at.low, first, groups, group, width, room.low.data());
        }
        change(to, room.scale.data(), shifted ? room.low.data() : nullptr, width);
    }
}

}  // namespace

extern "C" {

// out: [rows][groups][pages * PAGE][width]; zeros where a lane has no such page. 0, or 1 where memory is short.
int32_t kvshrink_load(const Side *side, int32_t rows, int32_t pages, int32_t threads, float *out) try {
    const int stride = (side->width + 63) / 64 * 64;
    const int64_t size = int64_t(PAGE) * side->width, count = int64_t(rows) * side->groups * pages;
    std::vector<Room> rooms(std::max(1, threads));
    for (Room &room : rooms) {
        room.codes.resize(size_t(PAGE) * stride), room.spare.resize(size_t(HALF) * stride);
        room.scale.resize(side->width), room.low.resize(side->width);
    }
#pragma omp parallel for num_threads(int(rooms.size())) schedule(static, 1) if (rooms.size() > 1)
    for (int part = 0; part < int(rooms.size()); part++)
        for (int64_t n = count * part / int64_t(rooms.size()); n < count * (part + 1) / int64_t(rooms.size()); n++) {
            const int64_t row = n / pages / side->groups, group = n / pages % side->groups;
            const Spot at(*side, row, pages, n % pages, group);
            float *to = out + n * size;
            if (at.there) page_of(*side, at, rooms[part], to);
            else std::fill(to, to + size, 0.0f);
        }
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}
}
