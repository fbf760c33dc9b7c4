// The Viterbi search of kernels/trellis/reference.py: the closed path of least cost of each channel of a page, costs rounded.
//
// A vector has one state's costs of as many channels as it has lanes, as integers of 16 bits. A first search lets paths
// begin anywhere, and another one end anywhere: no closed path through a state costs less than what they find. So states
// are tried as both ends of a path, the most promising first, until the next one cannot be better: two for most channels,
// seven where all of a register must be done, not sixteen.
#pragma once
#include <algorithm>

#include "../../decode/native/vector.h"

namespace trellis {

constexpr int STATES = 16, SUBSETS = 4, LONGEST = 32;
#if defined(__AVX512BW__)
constexpr int LANES = 32, FLOATS = 16;
#else
constexpr int LANES = 16, FLOATS = 8;
#endif
typedef int16_t Lanes __attribute__((vector_size(2 * LANES)));
typedef uint16_t Words __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef float Some __attribute__((vector_size(4 * FLOATS)));
typedef int32_t Index __attribute__((vector_size(4 * FLOATS)));
typedef int16_t Short __attribute__((vector_size(2 * FLOATS)));
typedef uint8_t Byte __attribute__((vector_size(FLOATS)));

// Of one token: what a level of each subset costs more than the cheapest one, in units of which no path has 2^15.
constexpr int MOST = 900;
constexpr float WIDEST = 200;  // MOST is a squared error of this over the square of how many levels there are
// A path that begins where it may not costs more than any way round it: after four tokens every state can be reached.
constexpr int BARRED = 4 * MOST + 1;

// The subset of a level after the last five coded bits, the newest lowest.
constexpr int subset_of(int window) {
    return 2 * ((window ^ (window >> 1) ^ (window >> 4)) & 1) + ((window >> 2) & 1);
}

struct Tile {
    Lanes cost[LONGEST][SUBSETS];
    Bytes level[LONGEST][SUBSETS];  // the nearest level of each subset: level i is in subset i % 4
};

inline Lanes all(int x) { return Lanes{} + int16_t(x); }

inline void measure(const float *x, const float *levels, int count, float scale, Lanes *cost, Bytes *level) {
    for (int at = 0; at < LANES; at += FLOATS) {
        Some value, best[SUBSETS], least;
        std::memcpy(&value, x + at, sizeof value);
        for (int i = 0; i < SUBSETS; i++) {
            Index chosen{};
            best[i] = (value - levels[i]) * (value - levels[i]);
            for (int n = i + SUBSETS; n < count; n += SUBSETS) {
                const Some off = value - levels[n], other = off * off;
                const Index nearer = other < best[i];
                best[i] = nearer ? other : best[i];
                chosen = nearer ? Index{} + n / SUBSETS : chosen;
            }
            least = i ? (best[i] < least ? best[i] : least) : best[i];
            const Byte own = __builtin_convertvector(chosen, Byte);
            std::memcpy(reinterpret_cast<char *>(level + i) + at, &own, sizeof own);
        }
        for (int i = 0; i < SUBSETS; i++) {
            const Some more = (best[i] - least) * scale + 0.5f, most = Some{} + float(MOST);
            const Short own = __builtin_convertvector(more < most ? more : most, Short);
            std::memcpy(reinterpret_cast<char *>(cost + i) + 2 * at, &own, sizeof own);
        }
    }
}

// Two states, 2 J and the next, have the same two before them, J and J + 8. came: by bits of each state, whether its way is
// from the upper one; null: nobody asks.
template <int J> inline void step(const Lanes *from, const Lanes *cost, Lanes *to, Lanes *came) {
    constexpr int EVEN = 2 * J, SUBSET = subset_of(EVEN);
    const Lanes low = from[J], high = from[J + STATES / 2], one = cost[SUBSET], other = cost[SUBSET ^ 2];
    const Lanes a = low + one, b = high + other, c = low + other, d = high + one;
    to[EVEN] = b < a ? b : a, to[EVEN + 1] = d < c ? d : c;
    if (came) *came |= (((b - a) >> 15) & int16_t(1 << EVEN)) | (((d - c) >> 15) & int16_t(1u << (EVEN + 1)));
    if constexpr (J + 1 < STATES / 2) step<J + 1>(from, cost, to, came);
}

// The same from the end: costs of the best way on from each state.
template <int J> inline void back(const Lanes *from, const Lanes *cost, Lanes *to) {
    constexpr int EVEN = 2 * J, SUBSET = subset_of(EVEN);
    const Lanes even = from[EVEN], odd = from[EVEN + 1], one = cost[SUBSET], other = cost[SUBSET ^ 2];
    const Lanes a = even + one, b = odd + other, c = even + other, d = odd + one;
    to[J] = b < a ? b : a, to[J + STATES / 2] = d < c ? d : c;
    if constexpr (J + 1 < STATES / 2) back<J + 1>(from, cost, to);
}

// Costs of the best way to each state, in place of those at the start.
inline void search(const Tile &tile, int page, Lanes *total, Lanes *came = nullptr) {
    Lanes other[STATES];
    for (int t = 0; t < page; t++)
        step<0>(t % 2 ? other : total, tile.cost[t], t % 2 ? total : other, came ? came + t : nullptr);
    if (page % 2) std::memcpy(total, other, sizeof other);
}

// No closed path through a state costs less: that of the best way to it, or on from it, wherever else that begins or ends.
inline void bounds_of(const Tile &tile, int page, Lanes *bound) {
    Lanes before[STATES] = {}, after[2][STATES] = {};
    search(tile, page, before);
    for (int t = page - 1; t >= 0; t--) back<0>(after[(t + 1) % 2], tile.cost[t], after[t % 2]);
    for (int s = 0; s < STATES; s++) bound[s] = before[s] < after[0][s] ? after[0][s] : before[s];
}

inline bool any(Lanes x) {
    int64_t parts[sizeof x / 8], found = 0;
    std::memcpy(parts, &x, sizeof x);
    for (int64_t part : parts) found |= part;
    return found;
}

// Costs at the start of paths that begin where they end.
inline void begin(Lanes end, Lanes *total) {
    for (int s = 0; s < STATES; s++) total[s] = Lanes(end != all(s)) & all(BARRED);
}

// The last five coded bits at each token, the newest lowest, of the best path of each channel that ends where it began.
inline void best_of(const Tile &tile, int page, Words *windows) {
    Lanes bound[STATES], total[STATES], best = all(INT16_MAX), chosen{};
    bounds_of(tile, page, bound);
    for (int tried = 0; tried < STATES; tried++) {
        Lanes least = bound[0], end{};
        for (int s = 1; s < STATES; s++) {
            const Lanes less = bound[s] < least;
            least = less ? bound[s] : least, end = less ? all(s) : end;
        }
        if (!any(least < best)) break;
        begin(end, total);
        search(tile, page, total);
        Lanes cost{};
        for (int s = 0; s < STATES; s++) {
            const Lanes here = end == all(s);
            cost |= here & total[s], bound[s] |= here & all(INT16_MAX);
        }
        const Lanes better = cost < best;
        best = better ? cost : best, chosen = better ? end : chosen;
    }
    Lanes came[LONGEST] = {};
    begin(chosen, total);
    search(tile, page, total, came);
    Words state = Words(chosen);
    for (int t = page - 1; t >= 0; t--) {
        windows[t] = state | (Words(came[t]) >> state & 1) << 4;
        state = windows[t] >> 1;
    }
}

// Codes of the LANES channels from the `first` on, counted over all of `blocks` pages; page is at most LONGEST. Tokens of
// x are x_row apart and its pages x_block, those of codes likewise.
inline void codes_of(const float *x, int64_t x_block, int x_row, int64_t blocks, int page, int channels,
                     const float *levels, int count, uint8_t *codes, int64_t code_block, int code_row, int64_t first) {
    const float scale = MOST * float(count * count) / WIDEST;
    const int here = int(std::min<int64_t>(LANES, blocks * channels - first));
    int64_t from[LANES], to[LANES];
    for (int n = 0; n < here; n++) {
        const int64_t block = (first + n) / channels, channel = (first + n) % channels;
        from[n] = block * x_block + channel, to[n] = block * code_block + channel;
    }
    const bool joined = from[here - 1] == from[0] + here - 1 && to[here - 1] == to[0] + here - 1;
    Tile tile;
    float row[LANES] = {};
    for (int t = 0; t < page; t++) {
        const float *down = x + int64_t(t) * x_row;
        if (joined)
            std::memcpy(row, down + from[0], 4 * here);
        else
            for (int n = 0; n < here; n++) row[n] = down[from[n]];
        measure(row, levels, count, scale, tile.cost[t], tile.level[t]);
    }
    Words windows[LONGEST] = {};
    best_of(tile, page, windows);
    for (int t = 0; t < page; t++) {
        const Words w = windows[t];
        const Bytes s = __builtin_convertvector(((w ^ w >> 1 ^ w >> 4) & 1) << 1 | (w >> 2 & 1), Bytes);
        Bytes found{};
        for (int i = 0; i < SUBSETS; i++) found |= Bytes(s == uint8_t(i)) & tile.level[t][i];
        found = found << 1 | (__builtin_convertvector(w, Bytes) & 1);
        uint8_t own[LANES], *down = codes + int64_t(t) * code_row;
        std::memcpy(own, &found, LANES);
        if (joined)
            std::memcpy(down + to[0], own, here);
        else
            for (int n = 0; n < here; n++) down[to[n]] = own[n];
    }
}

}  // namespace trellis
