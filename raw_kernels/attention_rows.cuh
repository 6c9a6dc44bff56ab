// What attention.cuh works on: rows, their tiles in one line, and the cut of that line into a range for each block.
#pragma once

#include "common.cuh"
#include "mma.cuh"

constexpr int kTile = 16;
constexpr int kHeads = 8;
// What the end of a row costs a block, in tiles: ranges are cut as if each row had this many more. Measured: 2, 4, 6, 8, 12 and 16 take 48.2, 46.3, 45.2, 45.2, 45.2
// and 45.6 us at b=64, 32k, lists of 512 tokens on average.
constexpr int kRowCost = 8;

struct AttentionParams {
  const void* q;            // [b, Hq, d]
  const void* k_pages;      // [pages, Hkv, P, d]
  const void* v_pages;      // [pages, Hkv, P, d]
  const int* page_table;    // [b, max_pages]
  const int* seq_lens;      // [b]
  const int* indices;       // [b, Hkv, capacity], sparse only
  const int* lengths;       // [b, Hkv], sparse only
  const float* log_weight;  // [b, Hq, capacity] or null, sparse only
  // outputs
  void* out;                // [b, Hq, d]
  float* lse;               // [b, Hq]
  // workspace
  float* partial;           // [2 * blocks, 8, d]
  float2* partial_state;    // [2 * blocks, 8]: maximum in base 2, and sum
  u32* counters;            // [rows], zero between launches
  float scale_log2;         // sm_scale * log2(e)
  float per_kv_head;        // 1 / num_kv_heads
  int batch;
  int num_kv_heads;
  int group;                // G
  int page_shift;           // log2 P
  int max_pages;
  int capacity;
  int granularity_shift;
  int min_tiles;            // a block is given at least so many
  int tail_capacity;
  // kTail only
  const int* tail_indices;   // [b, Hkv, tail_capacity], logical pages
  const int* tail_lengths;   // [b, Hkv]
  const float* tail_logits;  // [b, Hq, tail_capacity]
  const void* tail_values;   // [pages, Hkv, d] of T or u8
  const u32* tail_params;    // [pages, Hkv] pairs of halves (scale, zero), Packed only
};

enum Tail { NoTail = 0, NativeTail = 1, PackedTail = 2 };
constexpr u32 kTailTile = 0x80000000u;  // beside the 16 bits of a tile's mask

// floor(n / d) by 1 / d, for n up to 1.4 million: (n + 0.5) / d is at least 0.5 / d from any integer, and rounding, 2 ulp of the reciprocal among it, moves it by less. An
// integer division is 20 instructions.
__device__ __forceinline__ int divide(int n, float inverse) { return static_cast<int>((static_cast<float>(n) + 0.5f) * inverse); }

template <bool kSparse, int kTail>
struct Rows {
  const AttentionParams& p;
  int splits;  // rows that a kv head makes: ceil(G / 8)
  float per_split;

  __device__ explicit Rows(const AttentionParams& params) : p(params), splits(ceil_div(params.group, kHeads)), per_split(__fdividef(1.f, static_cast<float>(splits))) {}
  __device__ int count() const { return p.batch * p.num_kv_heads * splits; }
  __device__ int kv(int row) const { return divide(row, per_split); }
  __device__ int sequence(int kv) const { return divide(kv, p.per_kv_head); }
  __device__ int tokens(int row) const {
    if constexpr (!kSparse) return p.seq_lens[sequence(kv(row))];
    return min(max(p.lengths[kv(row)], 0), p.capacity) << p.granularity_shift;
  }
  __device__ int list_tiles(int row) const { return ceil_div(tokens(row), kTile); }
  __device__ int tail_pages(int row) const { return min(max(p.tail_lengths[kv(row)], 0), p.tail_capacity); }
  __device__ int tiles(int row) const {
    if constexpr (kTail == NoTail) return list_tiles(row);
    return list_tiles(row) + ceil_div(tail_pages(row), kTile);
  }
  __device__ static int width(int tiles) { return tiles > 0 ? tiles + kRowCost : 0; }  // in the line
  __device__ int first_head(int row) const { return kv(row) * p.group + (row - kv(row) * splits) * kHeads; }  // over [b, Hq]
  __device__ int heads(int row) const { return min(kHeads, p.group - (row - kv(row) * splits) * kHeads); }
};

// A line of `total` tiles in ranges for `blocks` blocks: where block i begins is i * total / blocks, rounded down, so that rows of one length are cut alike and the ends of
// ranges meet those of rows where their numbers allow it.
struct Line {
  u32 length, extra;
  float per_block, per_tile;

  __device__ Line(int total, u32 blocks)
      : length(static_cast<u32>(total) / blocks), extra(static_cast<u32>(total) - length * blocks), per_block(__fdividef(1.f, static_cast<float>(blocks))),
        per_tile(__fdividef(static_cast<float>(blocks), static_cast<float>(total))) {}
  __device__ int begin(u32 block) const { return static_cast<int>(block * length) + divide(static_cast<int>(block * extra), per_block); }  // 1180 blocks at most
  __device__ u32 owner(int tile) const {  // the float is right, or one off
    u32 block = static_cast<u32>(static_cast<float>(tile) * per_tile);
    while (begin(block) > tile) --block;
    while (begin(block + 1) <= tile) ++block;
    return block;
  }
};
