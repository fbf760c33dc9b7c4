// Scores of keys as products of bytes (bytes.h): four channels of a token share a lane.
//
// A query, times each channel's scale where channels have one, is rounded to 15 bits of its largest number, in two bytes:
// 128 times one and another. Keys are levels and 128, which the sums begin without. Scales, gains and minima of tokens
// come to the sums in float32.
#pragma once
#include "bytes.h"
#include "job.h"
#include "transpose.h"

// Of two rows of sixteen small numbers: the four bytes of each quad, of one row and of the other, and 8 bytes for two more.
struct TwoRows {
    uint8_t index[64];
    constexpr TwoRows() : index() {
        for (int i = 0; i < 64; i++) index[i] = i % 8 / 4 * 64 + i / 16 * 16 + i % 4 * 4;
    }
};
inline constexpr TwoRows TWO_ROWS{};

class ByteKeys {
    const Side &s;
    const std::vector<ByteLevels> levels;  // by run
    struct Span {                          // channels that have levels and a scale in common
        int begin, end, run, group;
    };
    std::vector<Span> spans;
    const int count, quads;      // rows of a KV head; quads of channels
    std::vector<int32_t> asked;  // [b][h][count / FEW][2][quads][FEW]: four channels of four rows, of each of two bytes
    std::vector<int32_t> start;  // [b][h][count][spans][2]
    std::vector<float> units, sums;  // [b][h][count]: what 1 stands for; [b][h][count][spans]: of the channels
    static constexpr int MOST = 8, LARGEST = 127 * 128 + 63;  // of a query

  public:
    bool fits;

    ByteKeys(const Job &job)
        : s(job.keys), levels(ByteLevels::of(job.keys)), count(job.heads * job.x / std::max(1, s.groups)), quads(padded(job.keys.width, 64) / 4),
          fits(!levels.empty() && !job.rebuild && count <= MOST) {
        for (int run = 0, c = 0; fits && run < s.runs; run++)
            for (const int end = c + s.channels[run]; c < end; c = spans.back().end) {
                const int group = s.form == CHANNEL ? 0 : c / s.group;
                spans.push_back({c, s.form == CHANNEL ? end : std::min(end, (group + 1) * s.group), run, group});
                fits = fits && int64_t(spans.back().end - c) * 255 * LARGEST < INT32_MAX;
            }
        if (fits && s.form != CHANNEL) prepare(job);
    }

    // to [count][PAGE] += scores of a KV head's rows, the first of which is number `row` of all, of this page's keys. query:
    // theirs; z: room for 32 bytes of each channel. False, and nothing done, where scales of channels are no plain numbers.
    bool score(const Spot &at, Scratch &room, int64_t row, const float *query, uint8_t *z, float *to) const {
        sides(s, at, room, true);
        float unit[MOST];
        if (s.form == CHANNEL) {
            room.asked.resize(head());
            if (!fold(room, query, room.asked.data(), unit, to)) return false;
        }
        const Queries from = s.form == CHANNEL
                                 ? Queries{room.asked.data(), nullptr, unit, nullptr}
                                 : Queries{asked.data() + row / count * head(), start.data() + row * 2 * spans.size(),
                                           units.data() + row, sums.data() + row * spans.size()};
        by_runs(s, at, room, [&](const uint8_t *in, auto bits, int stride, int run, int first) {
            tiles<bits>(in, stride, levels[run], s.channels[run], z + 32 * first, room.ahead);
        });
        by_few(count, [&](int r, auto few) { products<few>(from, r, z, room, to); });
        return true;
    }

  private:
    struct Queries {
        const int32_t *asked, *start;
        const float *units, *sums;
    };

    // Bytes of queries of all rows of a KV head, FEW rows together: see `asked`.
    int lot() const { return 2 * FEW * quads; }
    int head() const { return (count + FEW - 1) / FEW * lot(); }

    void prepare(const Job &job) {
        const int64_t all = int64_t(job.batch) * job.heads * job.x;
        asked.resize(all / count * head()), start.resize(all * 2 * spans.size());
        units.resize(all), sums.resize(all * spans.size());
        std::vector<float> few_rows(size_t(FEW) * 4 * quads);
        __mmask16 strange = 0;
        for (int64_t row = 0; row < all; row += count)
            for (int r = 0; r < count; r += FEW) {
                const int few = std::min(FEW, count - r);
                float top[FEW] = {};
                for (int i = 0; i < few; i++) {
                    float *own = few_rows.data() + i * 4 * quads;
                    std::copy_n(job.query + (row + r + i) * job.wide, s.width, own);
                    __m512 most = _mm512_setzero_ps();
                    by_sixteens([&](int c, size_t span) {
                        const __m512 x = _mm512_loadu_ps(own + c);
                        strange |= _mm512_fpclass_ps_mask(x, ENDLESS);
                        most = _mm512_max_ps(most, _mm512_abs_ps(x));
                        sums[(row + r + i) * spans.size() + span] += _mm512_reduce_add_ps(x);
                    });
                    top[i] = _mm512_reduce_max_ps(most);
                }
                int32_t *to = asked.data() + row / count * head() + r / FEW * lot();
                as_bytes(few_rows.data(), 4 * quads, top, to, units.data() + row + r, few, start.data() + 2 * (row + r) * spans.size());
            }
        fits = !strange;
    }

    // use(channel, its span), sixteen channels at a time: spans end with them.
    template <class F> void by_sixteens(F use) const {
        size_t span = 0;
        for (int c = 0; c < s.width; c += 16) {
            while (c >= spans[span].end) span++;
            use(c, span);
        }
    }

    // rows [FEW][wide] of numbers up to `top` each -> to [2][quads][FEW], and what 1 stands for. first: [rows][spans][2], takes
    // what sums begin with, -128 times those of these bytes; or null.
    void as_bytes(const float *rows, int wide, const float *top, int32_t *to, float *unit, int few, int32_t *first) const {
        __m512 by[FEW];
        for (int i = 0; i < FEW; i++) {
            by[i] = _mm512_set1_ps(i < few && top[i] > 1e-30f ? LARGEST / top[i] : 0.0f);
            if (i < few) unit[i] = top[i] / LARGEST;
        }
        const __m512i index = _mm512_loadu_si512(TWO_ROWS.index);
        by_sixteens([&](int c, size_t span) {
            __m512i high[FEW], low[FEW];
            for (int i = 0; i < FEW; i++) {
                const __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(rows + i * wide + c), by[i]));
                high[i] = _mm512_srai_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(64)), 7);
                low[i] = _mm512_sub_epi32(n, _mm512_slli_epi32(high[i], 7));
            }
            four_rows(high, index, to + c), four_rows(low, index, to + FEW * quads + c);
            for (int i = 0; first && i < few; i++) {
                int32_t *own = first + 2 * (i * spans.size() + span);
                own[0] -= 128 * _mm512_reduce_add_epi32(high[i]), own[1] -= 128 * _mm512_reduce_add_epi32(low[i]);
            }
        });
    }
    static void four_rows(const __m512i *n, __m512i index, int32_t *to) {
        const __m512i one = _mm512_permutex2var_epi8(n[0], index, n[1]), two = _mm512_permutex2var_epi8(n[2], index, n[3]);
        _mm512_storeu_si512(to, _mm512_mask_blend_epi64(0xaa, one, two));
    }

    // The same of a page whose channels have scales; what minima add goes to the scores.
    bool fold(Scratch &room, const float *query, int32_t *to, float *unit, float *scores) const {
        const float *scale = room.numbers, *low = scale + PAGE * room.stride;
        float added[MOST], top[MOST];
        __mmask16 strange = 0;
        for (int r = 0; r < count; r++, query += s.width) {
            __m512 most = _mm512_setzero_ps(), sum = most;
            float *rows = room.floats + r * 4 * quads;
            for (int c = 0; c < s.width; c += 16) {
                const __mmask16 there = mask16(s.width - c);
                const __m512 q = _mm512_maskz_loadu_ps(there, query + c);
                const __m512 x = _mm512_maskz_mul_ps(there, q, _mm512_loadu_ps(scale + c));
                strange |= _mm512_fpclass_ps_mask(x, ENDLESS);
                most = _mm512_max_ps(most, _mm512_abs_ps(x));
                sum = _mm512_mask3_fmadd_ps(q, _mm512_loadu_ps(low + c), sum, there);
                _mm512_storeu_ps(rows + c, x);
            }
            top[r] = _mm512_reduce_max_ps(most), added[r] = _mm512_reduce_add_ps(sum);
        }
        if (strange) return false;
        for (int r = 0; r < count; r += FEW)
            as_bytes(room.floats + r * 4 * quads, 4 * quads, top + r, to + r / FEW * lot(), unit + r, std::min(FEW, count - r), nullptr);
        for (int r = 0; r < count; r++)
            for (int v = 0; v < PAGE; v += 16) store16(scores + r * PAGE + v, load16(scores + r * PAGE + v) + added[r]);
        return true;
    }

    // z [channels / 4][PAGE]: four channels' levels. BITS: a byte of `in` holds 8 / BITS tokens of a channel, as far apart
    // as it has rows.
    template <int BITS>
    void tiles(const uint8_t *in, int stride, const ByteLevels &own, int channels, uint8_t *z, Ahead &ahead) const {
        const __m512i table = _mm512_add_epi8(_mm512_loadu_si512(own.table), _mm512_set1_epi8(s.form == CHANNEL ? 0 : -128));
        __m512i a[16], v[16], shift[2];
        constexpr int ROWS = BITS == 8 ? 16 : 4 * BITS;
        for (int half = 0; half < 2; half++) {
            int32_t by[16];
            for (int i = 0; i < 16; i++) by[i] = BITS == 8 ? 0 : BITS * (half * HALF / ROWS + i / ROWS);
            shift[half] = _mm512_loadu_si512(by);
        }
        for (int c = 0; c < channels; c += 64) {
            const int here = std::min(64, channels - c);
            for (int half = 0; half < 2; half++) {
                if (half == 0 || BITS == 8) {
                    ahead.step(64 * ROWS);
                    for (int i = 0; i < 16; i++)
                        a[i] = i < ROWS ? row_of(in + (i + (BITS == 8 ? half * HALF : 0)) * stride + c, here) : a[i % ROWS];
                    transpose(a, v);
                }
                for (int k = 0; 4 * k < here; k++) {
                    const __m512i codes = BITS == 8 ? v[k] : _mm512_srlv_epi32(v[k], shift[half]);
                    _mm512_storeu_si512(z + (c / 4 + k) * 4 * PAGE + half * 64, _mm512_permutexvar_epi8(codes, table));
                }
            }
        }
    }
    static __m512i row_of(const uint8_t *p, int bytes) {
        return bytes == 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8((__mmask64(1) << bytes) - 1, p);
    }

    // All spans' scores of R rows, summed in registers.
    template <int R> void products(const Queries &from, int first, const uint8_t *z, const Scratch &room, float *to) const {
        const int32_t *q = from.asked + first / FEW * lot(), *p = q + FEW * quads;
        Few<Scores, R> scores;
        scores.each([&](auto r, Scores &own) {
            own.one = load16(to + (first + r) * PAGE), own.two = load16(to + (first + r) * PAGE + HALF);
        });
        for (size_t i = 0; i < spans.size(); i++) {
            const Span &span = spans[i];
            Few<Sums, R> sums;
            sums.each([&](auto r, Sums &own) {
                const int32_t *start = from.start ? from.start + 2 * ((first + r) * spans.size() + i) : nullptr;
                own.high_one = own.high_two = _mm512_set1_epi32(start ? start[0] : 0);
                own.low_one = own.low_two = _mm512_set1_epi32(start ? start[1] : 0);
            });
            for (int k = span.begin / 4; 4 * k < span.end; k++) {
                const __m512i x = _mm512_loadu_si512(z + k * 4 * PAGE), y = _mm512_loadu_si512(z + k * 4 * PAGE + 64);
                sums.each([&](auto r, Sums &own) {
                    const __m512i high = _mm512_set1_epi32(q[FEW * k + r]), low = _mm512_set1_epi32(p[FEW * k + r]);
                    add_four(own.high_one, x, high), add_four(own.high_two, y, high);
                    add_four(own.low_one, x, low), add_four(own.low_two, y, low);
                });
            }
            const float unit = levels[span.run].unit * (s.form == NORMAL ? room.numbers[span.begin] : 1.0f);
            const float *scale = room.numbers + span.group * PAGE, *low = scale + PAGE * room.stride;
            scores.each([&](auto r, Scores &own) {
                const Sums &whole = sums.template of<r>();
                v16 x = number(whole.high_one, whole.low_one) * (unit * from.units[first + r]);
                v16 y = number(whole.high_two, whole.low_two) * (unit * from.units[first + r]);
                if (s.form == TOKEN) {
                    x *= load16(scale), y *= load16(scale + HALF);
                    const float sum = s.zeros ? 0.0f : from.sums[(first + r) * spans.size() + i];
                    if (!s.zeros) x += load16(low) * sum, y += load16(low + HALF) * sum;
                }
                own.one += x, own.two += y;
            });
        }
        scores.each([&](auto r, const Scores &own) {
            store16(to + (first + r) * PAGE, own.one), store16(to + (first + r) * PAGE + HALF, own.two);
        });
    }
    static v16 number(__m512i high, __m512i low) {
        return (v16)_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 7), low));
    }
};
