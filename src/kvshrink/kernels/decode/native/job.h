// What Python asks for: mirrored by _Job in ../cpu.py.
#pragma once
#include "pages.h"

struct Job {
    int32_t batch, heads, x, wide;  // wide: channels of a query
    int32_t pages, threads, pairs, interleaved;
    Side keys, values;
    const float *query;             // [b][h][x][wide], scaled
    const void *rebuild;            // what kvshrink_prepare gave; null where scores are products with the latents
    const float *up, *mean;         // [G][r][a], [G][a], read by kvshrink_prepare alone
    const float *inv_freq;          // [pairs]; null: keys are not turned
    float scaling, softcap;         // softcap 0: none
    int32_t constant_wide;          // channels of a query before it was taken to the latents
    int32_t only_scores;            // whether values are left out
    const float *constant_query;    // [b][h][x][constant_wide]
    const float *constant;          // [h][constant_wide]: a part of all keys before RoPE that is not stored; null: none
    const int32_t *positions;       // [b][t]
    int64_t positions_row;
    const uint8_t *counts;          // [b][lanes of keys][pages]: slots of each page that are filled; null: all
    const int32_t *skips;           // [b]: leading slots of a row that are not read; null: none
    const uint8_t *visible;         // null: everything
    int64_t visible_row, visible_head, visible_x, visible_token;
    float *out, *lse;               // [b][h][x][r], [b][h][x]
    float *scores;                  // [b][h][x][t], before softmax; null: not wanted
};
