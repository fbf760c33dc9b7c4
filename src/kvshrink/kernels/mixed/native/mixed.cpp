// Pages as runs of channels of several widths: ../reference.py says what is stored.
#include <cmath>
#include <cstdlib>

#include "../../trellis/native/search.h"

namespace {

constexpr int PAGES = 4;  // at a time: their channels fill the lanes of a search
constexpr int FACTORS = 10;  // this and what follows: as kernels/groups.py has them
constexpr float FACTOR[FACTORS] = {1.0f, 1.1f, 1.25f, 1.4f, 1.6f, 1.8f, 2.1f, 2.5f, 3.0f, 4.0f};
constexpr float FINE = 0.02f, CUT = 3.0f, FAR = 1.1f;

}  // namespace

// Mirrored by _Store in ../cpu.py.
struct Store {
    int64_t pages;
    int32_t page, width, groups, group, trellis, threads;
    const int32_t *bits;     // [groups]: of each group of `group` channels, of which the last may have fewer
    const float *levels;     // [9][256]: by bits
    const float *errors;     // [9]: expected squared errors of a unit normal number
    const float *x, *count;  // [pages][page][width], [pages]: tokens that are real
    uint8_t *codes;
    _Float16 *gains;         // [pages][groups]
};

namespace {

int levels_of(const Store &s, int bits) { return 1 << (bits + (s.trellis && bits <= 4)); }

// The gain of least cost among the factors.
float widened(const Store &s, const float *x, int here, float gain, float most, float error) {
    float best = 1.0f, least = std::numeric_limits<float>::max();
    for (float factor : FACTOR) {
        const float end = factor * most * gain;
        float cut = 0;
        for (int t = 0; t < s.page; t++) {
            float row = 0;
            for (int c = 0; c < here; c++) {
                const float off = std::max(std::fabs(x[int64_t(t) * s.width + c]) - end, 0.0f);
                row += off * off;
            }
            cut += row;
        }
        const float cost = (error < FINE ? CUT : 1.0f) * cut + float(s.page * s.group) * error * factor * gain * factor * gain;
        if (cost < least) least = cost, best = factor;
    }
    return best * gain;
}

// Gains of a page, and its numbers over them.
void scale(const Store &s, int64_t page, float *unit) {
    const float *x = s.x + page * s.page * s.width;
    for (int g = 0, at = 0; g < s.groups; g++, at += s.group) {
        const int here = std::min(s.group, s.width - at), bits = s.bits[g];
        float energy = 0, largest = 0;
        for (int t = 0; t < s.page; t++) {
            float row = 0;
            for (int c = 0; c < here; c++) {
                const float value = x[int64_t(t) * s.width + at + c];
                row += value * value, largest = std::max(largest, std::fabs(value));
            }
            energy += row;
        }
        const float most = s.levels[256 * bits + levels_of(s, bits) - 1];
        float gain = std::sqrt(energy / (s.count[page] * here));
        if (largest > FAR * most * gain) gain = widened(s, x + at, here, gain, most, s.errors[bits]);
        s.gains[page * s.groups + g] = _Float16(gain);
        const float stored = float(_Float16(gain)), by = stored > 0 ? stored : 1.0f;
        for (int t = 0; t < s.page; t++)
            for (int c = at; c < at + here; c++) unit[int64_t(t) * s.width + c] = x[int64_t(t) * s.width + c] / by;
    }
}

// The nearest level of each number, as its index from the lowest.
void nearest(const float *x, int x_row, int page, int channels, const float *levels, int count, uint8_t *codes) {
    float border[255];
    for (int i = 0; i + 1 < count; i++) border[i] = (levels[i] + levels[i + 1]) / 2;
    for (int t = 0; t < page; t++)
        for (int c = 0; c < channels; c++) {
            const float value = x[int64_t(t) * x_row + c];
            int found = 0;
            for (int step = count / 2; step; step /= 2) found += value > border[found + step - 1] ? step : 0;
            codes[t * channels + c] = uint8_t(found);
        }
}

// As kernels/pack: n codes of some bits.
void pack(const uint8_t *codes, int n, int bits, uint8_t *out) {
    if (bits == 3) {
        for (int i = 0; i < n / 8; i++) {
            uint32_t word = 0;
            for (int j = 0; j < 8; j++) word |= uint32_t(codes[8 * i + j]) << (3 * j);
            for (int j = 0; j < 3; j++) out[3 * i + j] = uint8_t(word >> (8 * j));
        }
        return;
    }
    const int planes = 8 / bits, size = n / planes;
    std::copy(codes, codes + size, out);
    for (int plane = 1; plane < planes; plane++)
        for (int i = 0; i < size; i++) out[i] |= codes[plane * size + i] << (bits * plane);
}

}  // namespace

// 0, or 1 where memory is short.
extern "C" int32_t kvshrink_mixed(const Store *store) {
    const Store &s = *store;
    const int size = s.page * s.width;
    int64_t bytes = 0;
    for (int g = 0; g < s.groups; g++) bytes += int64_t(s.page) * std::min(s.group, s.width - g * s.group) * s.bits[g] / 8;
    bool short_of_memory = false;
#pragma omp parallel for num_threads(s.threads) schedule(dynamic, 1) reduction(|| : short_of_memory) if (s.pages > PAGES)
    for (int64_t first = 0; first < s.pages; first += PAGES) {
        const int here = int(std::min<int64_t>(PAGES, s.pages - first));
        float *unit = static_cast<float *>(std::malloc(sizeof(float) * PAGES * size));
        uint8_t *codes = static_cast<uint8_t *>(std::malloc(PAGES * size));
        if (!unit || !codes) short_of_memory = true;
        for (int n = 0; !short_of_memory && n < here; n++) scale(s, first + n, unit + n * size);
        int64_t out = 0;
        for (int g = 0, at = 0; !short_of_memory && g < s.groups;) {  // a run: neighbours of one width
            const int bits = s.bits[g], begin = at, count = levels_of(s, bits);
            for (; g < s.groups && s.bits[g] == bits; g++) at = std::min(at + s.group, s.width);
            const int channels = at - begin, own = s.page * channels;
            const float *levels = s.levels + 256 * bits;
            if (s.trellis && bits <= 4)
                for (int64_t n = 0; n < int64_t(here) * channels; n += trellis::LANES)
                    trellis::codes_of(unit + begin, size, s.width, here, s.page, channels, levels, count, codes, own,
                                      channels, n);
            else
                for (int n = 0; n < here; n++)
                    nearest(unit + n * size + begin, s.width, s.page, channels, levels, count, codes + n * own);
            for (int n = 0; n < here; n++) pack(codes + n * own, own, bits, s.codes + (first + n) * bytes + out);
            out += int64_t(own) * bits / 8;
        }
        std::free(unit), std::free(codes);
    }
    return short_of_memory;
}
