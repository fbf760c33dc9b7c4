// Decode attention over stored pages: ../reference.py says what it computes.
//
// Each thread goes through runs of pages, of one batch row each. Page by page: unpack the keys of a group, rebuild and turn
// them where there is a basis, score, softmax over what was seen so far, unpack the values, add them up. A thread has one
// page's tile at a time; runs leave their sums, which are merged by their log-sum-exp. Keys turn by their place in the page
// alone; the query is turned back by the page's first position, once for 32 tokens.
#include <atomic>
#include <memory>

#include "task.h"

namespace {

void merge(const Job &job, int rows, int sum_wide, const std::vector<std::unique_ptr<Result>> &results) {
    const int width = job.values.width, splits = results.size() / job.batch;
    for (int row = 0; row < job.batch; row++)
        for (int q = 0; q < rows; q++) {
            const auto *own = results.data() + size_t(row) * splits;
            float top = NEVER, mass = 0;
            for (int i = 0; i < splits; i++) top = std::max(top, own[i]->top[q]);
            float *out = job.out + (int64_t(row) * rows + q) * width;
            std::fill(out, out + width, 0.0f);
            for (int i = 0; i < splits; i++) {
                if (own[i]->top[q] == NEVER) continue;
                const float share = std::exp(own[i]->top[q] - top), *sum = own[i]->sums.data + q * sum_wide;
                mass += share * sum16(load16(own[i]->mass.data() + 16 * q));
                for (int c = 0; c < width; c++) out[c] += share * sum[c];
            }
            if (mass > 0)
                for (int c = 0; c < width; c++) out[c] /= mass;
            job.lse[int64_t(row) * rows + q] = mass > 0 ? top + std::log(mass) : NEVER;
        }
}

template <class T> void decode(const Job &job) {
    static const Rebuild<T> none;
    const Shared<T> all(job, job.rebuild ? *static_cast<const Rebuild<T> *>(job.rebuild) : none);
    // a few runs for each thread, so that one that is held up does not hold up all
    const int splits = job.threads == 1 ? 1 : std::min(job.pages, std::max(1, (4 * job.threads + job.batch - 1) / job.batch));
    std::vector<std::unique_ptr<Result>> results(size_t(job.batch) * splits);
    std::atomic<int> next{0};
    std::atomic<bool> short_of_memory{false};
#pragma omp parallel num_threads(job.threads)
    try {
        std::unique_ptr<Task<T>> task;
        for (int i; (i = next++) < int(results.size());) {
            const int64_t part = i % splits;
            if (!task) task.reset(new Task<T>(all));
            results[i].reset(new Result(i / splits, all.rows, all.sum_wide));
            task->run(*results[i], part * job.pages / splits, (part + 1) * job.pages / splits);
        }
    } catch (const std::bad_alloc &) {  // none may leave its thread
        short_of_memory = true;
    }
    if (short_of_memory) throw std::bad_alloc();
    merge(job, all.rows, all.sum_wide, results);
}

}  // namespace

extern "C" {

// How keys of this basis are rebuilt, for any step's `rebuild`, with the same `pairs`; to be given to kvshrink_forget.
// Null where memory is short.
void *kvshrink_prepare(const Job *job, int32_t pairs) try {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
    if (pairs) return new Rebuild<PairTiles>(*job);
#endif
    return new Rebuild<FloatTiles>(*job);
} catch (const std::bad_alloc &) {
    return nullptr;
}

void kvshrink_forget(void *rebuild, int32_t pairs) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
    if (pairs) {
        delete static_cast<Rebuild<PairTiles> *>(rebuild);
        return;
    }
#endif
    delete static_cast<Rebuild<FloatTiles> *>(rebuild);
}

// 0, or 1 where memory is short.
int32_t kvshrink_decode(const Job *job, int32_t pairs) try {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
    if (pairs) return decode<PairTiles>(*job), 0;
#endif
    return decode<FloatTiles>(*job), 0;
} catch (const std::bad_alloc &) {
    return 1;
}
}
