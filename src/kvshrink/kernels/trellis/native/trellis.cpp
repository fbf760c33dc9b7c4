// The Viterbi search of kernels/trellis/reference.py: the best closed path of each channel of a page, of all first states.
//
// A vector has the costs of one state from 8 first states, so that the search is exact for one channel by itself. Vectors
// of 8: of 16 g++ makes choices one by one where a register holds 8.
#include "../../decode/native/vector.h"

namespace {

constexpr int STATES = 16, SUBSETS = 4, LONGEST = 32, FIRSTS = 8;

// The subset of a level after the last five coded bits, the newest lowest.
constexpr int subset_of(int window) {
    return 2 * ((window ^ (window >> 1) ^ (window >> 4)) & 1) + ((window >> 2) & 1);
}

struct Near {
    float cost[SUBSETS];
    uint8_t level[SUBSETS];
};

// The nearest level of each subset: level i is in subset i % 4.
Near nearest(float x, const float *levels, int count) {
    Near found;
    for (int i = 0; i < SUBSETS; i++) {
        found.cost[i] = std::numeric_limits<float>::max(), found.level[i] = 0;
        for (int n = i; n < count; n += SUBSETS) {
            const float off = x - levels[n], cost = off * off;
            if (cost < found.cost[i]) found.cost[i] = cost, found.level[i] = n / SUBSETS;
        }
    }
    return found;
}

// Costs and coded bits, the newest lowest, of the best way to each state from FIRSTS first states.
struct Ways {
    v8 cost[STATES];
    v8i bits[STATES];
};

template <int S> inline void step(const Ways &from, const float *cost, Ways &to) {
    constexpr int LOW = S / 2, HIGH = LOW + STATES / 2;
    const v8 a = from.cost[LOW] + cost[subset_of(S)], b = from.cost[HIGH] + cost[subset_of(S + STATES)];
    const v8i upper = b < a;
    to.cost[S] = upper ? b : a;
    to.bits[S] = ((upper ? from.bits[HIGH] : from.bits[LOW]) << 1) | (S & 1);
    if constexpr (S + 1 < STATES) step<S + 1>(from, cost, to);
}

// The coded bits of the best path that ends where it began, that of the last token lowest.
uint32_t search(const Near *near, int page) {
    float least = 1e30f;
    uint32_t found = 0;
    for (int first = 0; first < STATES; first += FIRSTS) {
        Ways ways[2];
        for (int s = 0; s < STATES; s++) {
            ways[0].cost[s] = v8{} + 1e30f, ways[0].bits[s] = v8i{};
            if (s / FIRSTS == first / FIRSTS) ways[0].cost[s][s % FIRSTS] = 0.0f;
        }
        for (int t = 0; t < page; t++) step<0>(ways[t % 2], near[t].cost, ways[(t + 1) % 2]);
        const Ways &last = ways[page % 2];
        for (int s = first; s < first + FIRSTS; s++)
            if (last.cost[s][s - first] < least) least = last.cost[s][s - first], found = last.bits[s][s - first];
    }
    return found;
}

}  // namespace

// x and codes [blocks][page][channels], page at most LONGEST.
extern "C" void kvshrink_trellis(const float *x, int64_t blocks, int page, int channels, const float *levels, int count,
                                 int threads, uint8_t *codes) {
#pragma omp parallel for num_threads(threads) schedule(static) if (blocks * channels > 64)
    for (int64_t n = 0; n < blocks * channels; n++) {
        const int64_t at = n / channels * page * channels + n % channels;
        Near near[LONGEST];
        for (int t = 0; t < page; t++) near[t] = nearest(x[at + int64_t(t) * channels], levels, count);
        const uint32_t bits = search(near, page);
        for (int t = 0; t < page; t++) {
            uint32_t window = 0;  // the newest lowest, also across the page's end
            for (int back = 0; back < 5; back++) window |= (bits >> (page - 1 - (t + page - back) % page) & 1) << back;
            codes[at + int64_t(t) * channels] = near[t].level[subset_of(window)] << 1 | (window & 1);
        }
    }
}
