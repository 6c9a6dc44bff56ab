// The second stream of fused_decode.cu: logits of tokens from the 4-bit keys, of pages or of a list of tokens. See fused_scores.cuh for the product.
#pragma once

#include "fused_scores.cuh"

constexpr u32 kMissing = 1u << 31;  // of a token's row of keys: it is not there

// The query against 16 rows of 4-bit keys. Low nibbles are masked into one accumulator, high ones stay where they are (16 times too large) and get another, which spares the shifts.
template <int D, int Tiles>
struct NibbleQuery {
  static constexpr int kWords = D / 32;  // words of a row that a lane takes
  static constexpr int kPieces = D == 256 ? 2 : 1;
  u32 low[Tiles][kWords], high[Tiles][kWords];

  __device__ __forceinline__ NibbleQuery(const QueryCodes& query, int gid, int tig) {
    constexpr int kHeads = 4 * Tiles;
#pragma unroll
    for (int t = 0; t < Tiles; ++t)
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        const int column = 8 * t + gid, c = D == 64 ? tig * 8 + j * 4 : j / 4 * 64 + tig * 16 + j % 4 * 4;
        const bool there = column % kHeads < query.group;
        low[t][j] = there ? *reinterpret_cast<const u32*>(query.column<D, kHeads>(column, 0, c)) : 0;
        high[t][j] = there ? *reinterpret_cast<const u32*>(query.column<D, kHeads>(column, 0, c + D / 2)) : 0;
      }
  }
  // This lane's pieces of a row.
  static __device__ __forceinline__ void load(uint4 (&x)[kPieces], const u8* row) {
    if constexpr (D == 64) {
      const uint2 v = load_fresh8(row);
      x[0].x = v.x, x[0].y = v.y;
    } else {
#pragma unroll
      for (int j = 0; j < kPieces; ++j) x[j] = load_fresh16(row + j * 64);
    }
  }
  // Rows gid and gid + 8 lie in x.
  __device__ __forceinline__ void dot(int (&sum)[Tiles][4], const uint4 (&x)[2][kPieces]) const {
    constexpr u32 kLow = 0x0f0f0f0fu, kHigh = 0xf0f0f0f0u;
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
      int lo[4] = {}, hi[4] = {};
#pragma unroll
      for (int j = 0; j < kWords; j += 2) {
        const uint4 lower = x[0][j / 4], upper = x[1][j / 4];
        const u32 a0 = j % 4 ? lower.z : lower.x, a1 = j % 4 ? upper.z : upper.x, a2 = j % 4 ? lower.w : lower.y, a3 = j % 4 ? upper.w : upper.y;
        mma_u8s8(lo, a0 & kLow, a1 & kLow, a2 & kLow, a3 & kLow, low[t][j], low[t][j + 1]);
        mma_u8s8(hi, a0 & kHigh, a1 & kHigh, a2 & kHigh, a3 & kHigh, high[t][j], high[t][j + 1]);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[t][k] = lo[k] * 16 + hi[k];
    }
  }
};

// Logits of the tokens of `count` pages. `use(slot, head, nth, logit)`: slots count the tokens of the list, and go on behind its end; -inf
// for what is not there. What it returns is taken into `state`.
template <int D, int Tiles, int kWarps, int kBatch, typename Use>
__device__ __forceinline__ void score_tokens(const QueryCodes& query, float sm_scale, const u8* shadow, const int* pages, const int* logical, int count, int page_shift,
                                             int seq_len, int kv_heads, int kv_head, float2 (&state)[HeadScale<Tiles>::kOwned], const Use& use) {
  constexpr int kParams = Tiles == 1 ? 1 : 2;
  const int lane = fresh(lane_id());  // or what is made of it is kept from the start on
  const int gid = lane / 4, tig = lane % 4, warp = uniform_warp_id();
  const int page_size = 1 << page_shift, half_shift = page_shift - 4;
  const int block_bytes = (D / 2 + 4) << page_shift;
  const NibbleQuery<D, Tiles> codes(query, gid, tig);
  const HeadScale<Tiles> head(query, tig, sm_scale * (1.f / (254.f * 16.f)), sm_scale);

  const int tiles = count << half_shift;
  // Numbers of the pages that come next are looked up while the last ones are under way: loads whose addresses are not there yet are put behind the products of
  // the tiles before them, and then fewer wait for memory at a time.
  const int half_of = (warp & half_shift) << 4;  // of a page of 32, which is the same for all of a warp's tiles
  const u8* const rows = shadow + (half_of + gid) * (D / 2) + tig * (D == 64 ? 8 : 16);
  const int to_pairs = page_size * (D / 2) + half_of * 4 - ((half_of + gid) * (D / 2) + tig * (D == 64 ? 8 : 16));
  u32 place[kBatch];
  const auto look = [&](int first) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) place[i] = pages[min(first + i * kWarps, tiles - 1) >> half_shift] * kv_heads + kv_head;
  };
  if (warp < tiles) look(warp);
#pragma unroll 1
  for (int first = warp; first < tiles; first += kWarps * kBatch) {
    uint4 x[kBatch][2][NibbleQuery<D, Tiles>::kPieces];
    u32 sz[kBatch][kParams];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const u8* const row = mad_wide(rows, place[i], block_bytes);
#pragma unroll
      for (int h = 0; h < 2; ++h) codes.load(x[i][h], row + h * 4 * D);
#pragma unroll
      for (int h = 0; h < kParams; ++h) sz[i][h] = load_fresh4(row + to_pairs + row_of<Tiles>(h, gid, tig) * 4);
    }
    look(min(first + kWarps * kBatch, tiles - 1));
    typename HeadScale<Tiles>::Taken taken[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int tile = first + i * kWarps;
      // Tokens of the tile that are there.
      const int real = tile < tiles ? seq_len - (logical[min(tile, tiles - 1) >> half_shift] << page_shift) - ((tile << 4) & (page_size - 1)) : 0;
      int dot[Tiles][4];
      codes.dot(dot, x[i]);
      settle<Tiles>(dot, head, gid, tig, sz[i], taken[i], [&](int r, int g, int nth, float logit) { return use(tile * kTile + r, g, nth, r < real ? logit : -inf()); });
    }
    include<Tiles, kBatch>(state, taken);
  }
}

// Where the tokens of this block's `tiles` tiles of 16 of a list lie, rows of K: `of(i)` is the position of its i-th, below
// `end`, or anything else where there is none.
template <int kThreads, typename Position>
__device__ __forceinline__ void locate_tokens(u32* located, int tiles, u32 end, const int* table, int page_shift, int kv_heads, int kv_head, const Position& of) {
  constexpr int kBatch = 4;  // two loads after one another each
  const u32 instead = static_cast<u32>((table[0] * kv_heads + kv_head) << page_shift) | kMissing;
#pragma unroll 1
  for (int first = threadIdx.x; first < tiles * kTile; first += kThreads * kBatch) {
    u32 position[kBatch], page[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) position[i] = static_cast<u32>(of(min(first + i * kThreads, tiles * kTile - 1)));
#pragma unroll
    for (int i = 0; i < kBatch; ++i) page[i] = table[min(position[i], end - 1) >> page_shift];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const u32 row = ((page[i] * kv_heads + kv_head) << page_shift) + (position[i] & ((1u << page_shift) - 1));
      if (first + i * kThreads < tiles * kTile) located[first + i * kThreads] = position[i] < end ? row : instead;
    }
  }
}

// Logits of the tokens of `tiles` tiles of a list, see `score_tokens`.
template <int D, int Tiles, int kWarps, int kBatch, typename Use>
__device__ __forceinline__ void score_listed(const QueryCodes& query, float sm_scale, const u8* shadow, const u32* located, int tiles, int page_shift,
                                             float2 (&state)[HeadScale<Tiles>::kOwned], const Use& use) {
  constexpr int kParams = Tiles == 1 ? 1 : 2;
  const int lane = fresh(lane_id()), gid = lane / 4, tig = lane % 4, warp = uniform_warp_id();
  const int page_mask = (1 << page_shift) - 1, block_bytes = (D / 2 + 4) << page_shift, codes_bytes = D / 2 << page_shift;
  const NibbleQuery<D, Tiles> codes(query, gid, tig);
  const HeadScale<Tiles> head(query, tig, sm_scale * (1.f / (254.f * 16.f)), sm_scale);

  u32 place[kBatch][2];
  const auto look = [&](int first) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) place[i][h] = located[min(first + i * kWarps, tiles - 1) * kTile + gid + 8 * h];
  };
  if (warp < tiles) look(warp);
#pragma unroll 1
  for (int first = warp; first < tiles; first += kWarps * kBatch) {
    uint4 x[kBatch][2][NibbleQuery<D, Tiles>::kPieces];
    u32 sz[kBatch][kParams], missing = 0;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const u32 at = place[i][h] & ~kMissing;
        missing |= (place[i][h] & kMissing) >> (2 * i + h);
        codes.load(x[i][h], mad_wide(mad_wide(shadow + tig * (D == 64 ? 8 : 16), at >> page_shift, block_bytes), at & page_mask, D / 2));
      }
#pragma unroll
      for (int h = 0; h < kParams; ++h) {
        const u32 at = place[i][Tiles == 1 ? 0 : h], other = place[i][1], own = (Tiles == 1 && tig >= 2 ? other : at) & ~kMissing;
        sz[i][h] = load_fresh4(mad_wide(shadow + codes_bytes, own >> page_shift, block_bytes) + (own & page_mask) * 4);
      }
    }
    look(min(first + kWarps * kBatch, tiles - 1));
    typename HeadScale<Tiles>::Taken taken[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int tile = first + i * kWarps;
      int dot[Tiles][4];
      codes.dot(dot, x[i]);
      settle<Tiles>(dot, head, gid, tig, sz[i], taken[i], [&](int r, int g, int nth, float logit) {
        const bool there = tile < tiles && !(missing << (2 * i + r / 8) & kMissing);
        return use(tile * kTile + r, g, nth, there ? logit : -inf());
      });
    }
    include<Tiles, kBatch>(state, taken);
  }
}
