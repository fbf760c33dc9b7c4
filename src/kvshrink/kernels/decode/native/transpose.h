// Rows of bytes as vectors whose lanes are rows: codes of tokens, which lie one behind the other, come to stand side by side.
#pragma once
#include <immintrin.h>

#include <cstdint>

inline void transpose(const __m512i *a, __m512i *v) {
    __m512i b[16], c[16];
    for (int i = 0; i < 8; i++) {
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {  // c[4i + j]: rows 4i..4i+3 of column j in each 128-bit lane
        c[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
        c[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
        c[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
        c[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        const __m512i p = _mm512_shuffle_i32x4(c[j], c[4 + j], 0x88), q = _mm512_shuffle_i32x4(c[j], c[4 + j], 0xdd);
        const __m512i r = _mm512_shuffle_i32x4(c[8 + j], c[12 + j], 0x88);
        const __m512i s = _mm512_shuffle_i32x4(c[8 + j], c[12 + j], 0xdd);
        v[j] = _mm512_shuffle_i32x4(p, r, 0x88), v[8 + j] = _mm512_shuffle_i32x4(p, r, 0xdd);
        v[4 + j] = _mm512_shuffle_i32x4(q, s, 0x88), v[12 + j] = _mm512_shuffle_i32x4(q, s, 0xdd);
    }
}

// 16 rows of up to 64 bytes, as 16 vectors: lane = row, vector = 4 bytes.
inline void rows_of(const char *from, int64_t stride, int bytes, __m512i *v) {
    __m512i a[16];
    if (bytes >= 64) {
        for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * stride);
    } else {
        const __mmask64 there = (__mmask64(1) << bytes) - 1;
        for (int i = 0; i < 16; i++) a[i] = _mm512_maskz_loadu_epi8(there, from + i * stride);
    }
    transpose(a, v);
}
