// A page's latents as the right-hand side of a product, in one of two precisions.
//
// Products are C[row][n] += sum over depth of A[row][depth] * Z[depth][n], A broadcast and Z in vectors of 16:
//   keys     Z [channels][PAGE]: rows of A are queries, or columns of a basis
//   values   Z [tokens][channels]: rows of A are softmax weights
// FloatTiles works everywhere. PairTiles puts two bfloat16 in each 32-bit lane, for the dot product of pairs that
// AVX512-BF16 has: half the depth, half the time.
// Where scales allow it they are folded into A and Z stays codes: `fold_keys` into the queries, page by page, `fold_values`
// into the weights. FloatTiles leaves that out.
#pragma once
#include <algorithm>

#include "float_rows.h"
#include "job.h"

inline int padded(int width, int to) { return (width + to - 1) / to * to; }

// Keys and values whose products are of bytes: none.
struct NoByteKeys {
    static constexpr bool fits = false;
    NoByteKeys(const Job &) {}
    bool score(const Spot &, Scratch &, int64_t, const float *, void *, float *) const { return false; }
};
struct NoByteValues {
    static constexpr bool fits = false;
    static constexpr int extra = 0;
    NoByteValues(const Side &, int) {}
    bool add(const Spot &, Scratch &, const float *, int, void *, float *, int) const { return false; }
    void done(float *, int, int) const {}
};

// still: the largest change of a turn within half a page, in radians, that may be taken as linear.
struct FloatTiles {
    typedef float Lane;
    typedef NoByteKeys KeyBytes;
    typedef NoByteValues ValueBytes;
    static constexpr float still = 0.0f;
    static int key_depth(int width) { return width; }
    static constexpr int value_depth = PAGE;
    static v16 product(v16 sum, float a, const float *z) { return sum + a * load16(z); }
    static void pack(const float *from, int64_t step, int n, float *to) {
        for (int i = 0; i < n; i++) to[i] = from[i * step];
    }
    static void pack(const float *from, int n, float *to) { std::copy(from, from + n, to); }
    static void pack_weights(const float *p, float *to) { std::memcpy(to, p, PAGE * 4); }
    // Rows of floats are read as they lie, those of codes where they are unpacked and meet few others; queries and weights as `pack_asked` and `pack_weights` give them.
    static bool direct_keys(const Side &s, int rows) { return s.form <= RAW_F16 || rows <= 2 * FEW; }
    static bool direct_values(const Side &s, int rows) { return s.form <= RAW_F16 || rows <= 2 * FEW; }
    static void pack_asked(const Side &, const float *from, int n, float *to) { pack(from, n, to); }
    static void dot_rows(const Side &s, const Spot &at, const float *query, int query_row, int rows, float *to, Scratch &room) {
        by_rows(s, at, room, [&](auto form, const char *data) {
            by_few(rows, [&](int r, auto count) {
                dot_floats<form, count>(data, s.width, query + r * query_row, query_row, to + r * PAGE, room.ahead);
            });
        });
    }
    static void add_rows(const Side &s, const Spot &at, const float *weights, int rows, float *, float *sums, int width, Scratch &room) {
        by_rows(s, at, room, [&](auto form, const char *data) {
            by_few(rows, [&](int r, auto count) {
                add_floats<form, count>(data, s.width, weights + r * PAGE, sums + r * width, width, room.ahead);
            });
        });
    }
    static void done(const Side &, float *, int) {}
    static bool scales_tokens(const Side &) { return false; }
    static void load_levels(const Side &, const Spot &, Scratch &, float *) {}
    static bool mixes_keys(const Side &) { return false; }
    static void unpack_keys(const Side &, const Spot &, Scratch &) {}
    static void some_keys(const Side &, Scratch &, int, int, float *) {}
    static bool folds_keys(const Side &) { return false; }
    static bool folds_values(const Side &, int) { return false; }
    static void fold_keys(const Side &, const Spot &, Scratch &, const float *, int, float *, float *, float *) {}
    static void fold_values(const Side &, const Spot &, Scratch &, const float *, int, float *, float *, int) {}
    static void load_codes(const Side &, const Spot &, Scratch &, float *, int) {}
    static void load_keys(const Side &s, const Spot &at, Scratch &room, float *z) {
        if (s.form <= RAW_F16) return raw_rows(s, at, z, 1, PAGE);
        code_rows(s, at, room, room.floats, s.width);
        columns_of(room.floats, s.width, z);
    }
    static void load_values(const Side &s, const Spot &at, Scratch &room, float *z, int width) {
        if (s.form <= RAW_F16) return raw_rows(s, at, z, width, 1);
        code_rows(s, at, room, z, width);
    }

  private:
    // use(form, data): a page's rows of floats.
    template <class F> static void by_rows(const Side &s, const Spot &at, Scratch &room, F use) {
        if (s.form <= RAW_F16) return by_form(s.form, [&](auto form) { use(form, at.data); });
        code_rows(s, at, room, room.floats, s.width);
        use(std::integral_constant<int, RAW_F32>(), reinterpret_cast<const char *>(room.floats));
    }
    static void raw_rows(const Side &s, const Spot &at, float *z, int by_token, int by_channel) {
        for (int t = 0; t < PAGE; t++)
            for (int c = 0; c < s.width; c++)
                z[t * by_token + c * by_channel] = raw_of(s.form, at.data, int64_t(t) * s.width + c);
    }
};

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#include "pairs.h"
#endif
