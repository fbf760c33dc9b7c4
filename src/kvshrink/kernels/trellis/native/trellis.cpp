// See search.h, which does it.
#include "search.h"

// x and codes [blocks][page][channels], page at most trellis::LONGEST.
extern "C" void kvshrink_trellis(const float *x, int64_t blocks, int page, int channels, const float *levels, int count,
                                 int threads, uint8_t *codes) {
    const int64_t paths = blocks * channels, size = int64_t(page) * channels;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) if (paths > 4 * trellis::LANES)
    for (int64_t first = 0; first < paths; first += trellis::LANES)
        trellis::codes_of(x, size, channels, blocks, page, channels, levels, count, codes, size, channels, first);
}
