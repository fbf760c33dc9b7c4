// Buffers, and the one product that everything here is: C[row][n] += A[row] . Z, A broadcast.
#pragma once
#include <cstdlib>
#include <new>
#include <type_traits>

#include "tiles.h"

template <class T> struct Buffer {
    T *data;
    explicit Buffer(size_t n) : data(static_cast<T *>(std::aligned_alloc(64, (n * sizeof(T) + 64 + 63) / 64 * 64))) {
        if (!data) throw std::bad_alloc();
        std::memset(data, 0, n * sizeof(T) + 64);
    }
    Buffer(const Buffer &) = delete;
    ~Buffer() { std::free(data); }
};

constexpr int BLOCK = 8;  // rows of A at a time: their sums stay in registers

// C[row][n] = (first or C) + A[row] . Z, n in steps of 32.
template <class T, int R>
inline void multiply(const typename T::Lane *a, int a_row, const typename T::Lane *z, int z_row, int depth, int n, float *c,
                     int c_row, const float *first) {
#if !defined(__AVX512F__)  // 16 registers of 8: one of each row's sums at a time, or they would go to memory at every step
    if constexpr (std::is_same_v<typename T::Lane, float>) {
        for (int at = 0; at < n; at += 8) {
            v8 sum[R];
            for (int r = 0; r < R; r++) {
                if (first)
                    sum[r] = v8{} + first[r];
                else
                    std::memcpy(&sum[r], c + r * c_row + at, 32);
            }
            const float *zp = z + at;
            for (int k = 0; k < depth; k++, zp += z_row) {
                v8 x;
                std::memcpy(&x, zp, 32);
                for (int r = 0; r < R; r++) sum[r] += x * a[r * a_row + k];
            }
            for (int r = 0; r < R; r++) std::memcpy(c + r * c_row + at, &sum[r], 32);
        }
        return;
    }
#endif
    for (int at = 0; at < n; at += 32) {
        v16 sum[R][2];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < 2; v++) sum[r][v] = first ? all16(first[r]) : load16(c + r * c_row + at + 16 * v);
        const typename T::Lane *zp = z + at;
        for (int k = 0; k < depth; k++, zp += z_row)
            for (int r = 0; r < R; r++) {
                sum[r][0] = T::product(sum[r][0], a[r * a_row + k], zp);
                sum[r][1] = T::product(sum[r][1], a[r * a_row + k], zp + 16);
            }
        for (int r = 0; r < R; r++)
            for (int v = 0; v < 2; v++) store16(c + r * c_row + at + 16 * v, sum[r][v]);
    }
}

template <class T>
void multiply_rows(int rows, const typename T::Lane *a, int a_row, const typename T::Lane *z, int z_row, int depth, int n,
                   float *c, int c_row) {
    int r = 0;
    for (; r + 8 <= rows; r += 8) multiply<T, 8>(a + r * a_row, a_row, z, z_row, depth, n, c + r * c_row, c_row, nullptr);
    for (; r + 4 <= rows; r += 4) multiply<T, 4>(a + r * a_row, a_row, z, z_row, depth, n, c + r * c_row, c_row, nullptr);
    for (; r < rows; r++) multiply<T, 1>(a + r * a_row, a_row, z, z_row, depth, n, c + r * c_row, c_row, nullptr);
}
