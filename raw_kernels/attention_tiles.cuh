// How a warp of attention.cuh brings its tiles to shared memory: tiles warp, warp + kWarps, ... of a range of the line, in three steps that run ahead of each other.
//
//     index   a token's entry of the list (sparse only)
//     page    the page that holds it
//     copy    16 rows of K and V by cp.async, a 16-byte chunk a lane
//
// The first two are made for two tiles at a time, one in each half of the warp, every other copy: then the first two tiles of a block wait for two trips to
// memory instead of three, and a tile's page has two copies' time to arrive. Everything here is inlined twice, as few instructions as can be: at the start of a block they
// are fetched from L2, some 2 ns each.
#pragma once

#include "attention_rows.cuh"

template <typename T, int D, int kWarps, bool kSparse, int kTail>
struct TileLoads {
  static constexpr int kSlot = 2 * kTile * D;  // elements of a place in the ring: K tile, V tile
  static constexpr int kChunks = D / 8;        // 16-byte chunks of a row

  const AttentionParams& p;
  const Rows<kSparse, kTail>& rows;
  const int num_rows, end;
  T* const ring;     // of this warp
  u32* const masks;  // for each place the tokens that are there, one bit each; kTailTile beside them
  // The next tile that this warp will look up, and its row.
  int row, start, tiles, t;
  int kv, sequence, tokens, seq_len;
  [[maybe_unused]] int pages = 0;
  // Results of loads wait here, raw, until they are used, so that nobody waits for them before.
  int index_raw = 0, index_sub = -1, index_seq_len = 0, index_sequence = 0, index_head = 0;
  int page_raw = 0, page_slot = -1, page_head = 0;
  int at = -1;  // row of K and V of this lane's token, or page of its mean; -1 for none
  [[maybe_unused]] bool index_tail = false, page_tail = false, at_tail = false;
  int turn = 0;  // which half of the warp has the tile that is copied next

  __device__ __forceinline__ TileLoads(const AttentionParams& params, const Rows<kSparse, kTail>& all, T* of_warp, u32* masks_of_warp, int first_row, int its_start, int begin, int last)
      : p(params), rows(all), num_rows(all.count()), end(last), ring(of_warp), masks(masks_of_warp), row(first_row), start(its_start), tiles(all.tiles(first_row)) {
    t = max(begin, start);
    t += (uniform_warp_id() - t) & (kWarps - 1);
    enter_row();
    settle();
  }

  __device__ __forceinline__ void enter_row() {
    kv = rows.kv(row), sequence = rows.sequence(kv);
    tokens = rows.tokens(row), seq_len = p.seq_lens[sequence];
    if constexpr (kTail != NoTail) pages = rows.tail_pages(row);
  }
  // To the next row that has a tile for this warp.
  __device__ __forceinline__ void settle() {
    bool moved = false;
#pragma unroll 1
    while (t < end && t >= start + tiles) {
      start += Rows<kSparse, kTail>::width(tiles);
      if (++row >= num_rows || start >= end) {
        t = end;
        return;
      }
      tiles = rows.tiles(row);
      t = max(t, start + ((uniform_warp_id() - start) & (kWarps - 1)));
      moved = true;
    }
    if (moved && t < end) enter_row();
  }

  // A step further with all that is under way.
  __device__ __forceinline__ void look_up() {
    at = page_slot < 0 ? -1 : page_raw * p.num_kv_heads + page_head;
    if (page_slot >= 0 && !(kTail != NoTail && page_tail)) at = (at << p.page_shift) + page_slot;
    if constexpr (kTail != NoTail) at_tail = page_tail, page_tail = index_tail;

    int position = kSparse ? (index_raw << p.granularity_shift) + index_sub : index_raw;
    if constexpr (kTail != NoTail) {
      if (page_tail) position = index_raw << p.page_shift;  // the first token of the page
    }
    const bool there = index_sub >= 0 && static_cast<u32>(position) < static_cast<u32>(index_seq_len);
    page_slot = there ? position & ((1 << p.page_shift) - 1) : -1;
    page_head = index_head;
    if (there) page_raw = p.page_table[static_cast<size_t>(index_sequence) * p.max_pages + min(position >> p.page_shift, p.max_pages - 1)];

    int i = 0, of_kv = 0;
    bool real = false;
    if constexpr (kTail != NoTail) index_tail = false;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      if (lane_id() / kTile == half) {
        i = (t - start) * kTile + lane_id() % kTile, of_kv = kv;
        real = t < end && i < tokens;
        if constexpr (kTail != NoTail) {
          const int entry = i - ceil_div(tokens, kTile) * kTile;
          index_tail = t < end && entry >= 0;
          if (index_tail) real = entry < pages, i = entry;
        }
        index_seq_len = seq_len, index_sequence = sequence, index_head = kv - sequence * p.num_kv_heads;
      }
      if (t < end) t += kWarps, settle();
    }
    if (kTail != NoTail && index_tail) {
      index_sub = real ? 0 : -1;
      if (real) index_raw = p.tail_indices[static_cast<size_t>(of_kv) * p.tail_capacity + i];
    } else if constexpr (kSparse) {
      index_sub = real ? i & ((1 << p.granularity_shift) - 1) : -1;
      if (real) index_raw = p.indices[static_cast<size_t>(of_kv) * p.capacity + (i >> p.granularity_shift)];
    } else {
      index_sub = real ? 0 : -1, index_raw = i;
    }
  }

  // The next tile to a place of the ring. A hidden token becomes zeros: 0 * NaN would be NaN.
  __device__ __forceinline__ void copy(int slot) {
    const int lane = lane_id(), from = turn * kTile;
    u32 mask = __ballot_sync(kFullMask, at >= 0) >> from & 0xffff;
    T* const tile = ring + slot * kSlot;
    if (kTail != NoTail && __ballot_sync(kFullMask, at_tail) >> from & 1) {
      copy_means(tile, mask, from);
      mask |= kTailTile;
    } else if (mask) {
      constexpr int kEach = kWarp / kChunks;  // rows that one cp.async of the warp covers
#pragma unroll
      for (int i = 0; i < kTile / kEach; ++i) {
        const int token = i * kEach + lane / kChunks, chunk = lane % kChunks, to = token * D + (chunk ^ (token & 7)) * 8;
        const int place = __shfl_sync(kFullMask, at, from + token);
        const size_t source = static_cast<size_t>(static_cast<u32>(max(place, 0))) * D + chunk * 8;
        cp_async16(tile + to, static_cast<const T*>(p.k_pages) + source, place >= 0);
        cp_async16(tile + kTile * D + to, static_cast<const T*>(p.v_pages) + source, place >= 0);
      }
    }
    if (lane == 0) masks[slot] = mask;
    cp_async_commit();
    turn ^= 1;
  }
  // Means of 16 pages: to the tile of values, or in 8 bits to where the keys would lie, 16 rows of codes and then 16 pairs (scale, zero).
  __device__ __forceinline__ void copy_means(T* tile, u32 mask, int from) {
    const int lane = lane_id();
    if constexpr (kTail == NativeTail) {
      constexpr int kEach = kWarp / kChunks;
#pragma unroll
      for (int i = 0; i < kTile / kEach; ++i) {
        const int token = i * kEach + lane / kChunks, chunk = lane % kChunks, place = __shfl_sync(kFullMask, at, from + token);
        const size_t source = static_cast<size_t>(max(place, 0)) * D + chunk * 8;
        cp_async16(tile + kTile * D + token * D + (chunk ^ (token & 7)) * 8, static_cast<const T*>(p.tail_values) + source, place >= 0);
      }
    } else if constexpr (kTail == PackedTail) {
      constexpr int kParts = D / 16;  // 16 bytes of codes each
      u8* const codes = reinterpret_cast<u8*>(tile);
#pragma unroll
      for (int i = 0; i < kTile * kParts / kWarp; ++i) {
        const int token = (i * kWarp + lane) / kParts, part = (i * kWarp + lane) % kParts, place = __shfl_sync(kFullMask, at, from + token);
        const size_t source = static_cast<size_t>(max(place, 0)) * D + part * 16;
        cp_async16(codes + token * D + part * 16, static_cast<const u8*>(p.tail_values) + source, place >= 0);
      }
      const int place = __shfl_sync(kFullMask, at, from + lane % kTile);
      if (lane < kTile) cp_async4(codes + kTile * D + lane * 4, p.tail_params + max(place, 0), place >= 0);
    }
  }

  // The first kStages - 1 tiles.
  template <int kStages>
  __device__ __forceinline__ void begin() {
#pragma unroll 1
    for (int i = -2; i < kStages - 1; ++i) {
      if (turn == 0) look_up();
      if (i >= 0) copy(i);
    }
  }
  __device__ __forceinline__ void next(int slot) {
    if (turn == 0) look_up();
    copy(slot);
  }
};
