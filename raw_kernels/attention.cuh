// Split-KV attention of one query a sequence over a list of its tokens: the body of sparse_attention.cu and dense_attention.cu.
//
// A row is one (sequence, kv head) with up to 8 of the group's query heads; larger groups make several rows. Its tokens
// are cut into tiles of 16. All tiles of all rows, in order, form one line that is cut into as many equal ranges as there
// are blocks, so a row with 100x the budget of its neighbour gets 100x the blocks. Every block finds its range itself
// from the lengths: 2048 of them are 8 KB of L2, which costs less than a kernel that plans.
//
// Inside a block the warps take tiles in turn, each with its own ring of `kStages` tiles filled by cp.async (attention_tiles.cuh): no
// block barrier between tiles, and loads of the next row are under way while this one is merged (attention_merge.cuh). Per tile, with the tokens as
// rows and the query heads as the 8 columns of m16n8k16:
//     S [16 tokens, 8] = K [16, d] Q^T [d, 8]        A = K by ldmatrix, B = Q in registers
//     O^T [d, 8]      += V^T [d, 16] P [16, 8]       A = V by ldmatrix.trans, B = P by movmatrix from S
// A query head is a column everywhere, so its maximum and sum stay in the lanes that hold its logits.
//
// A tail (kTail) is a second list of a row: pages, each one pseudo-token whose logit is given and whose value is the page's mean.
// Its tiles follow the row's own in the same line. They copy no keys and skip the first product; 8-bit means arrive where the
// keys would lie and are spelled out into the tile of values.
//
// Floor: 4*d bytes a token of the 16-bit K and V, read once for the whole group; 512 at d = 128. A page of the tail: 2*d, or d + 4.
#pragma once

#include "attention_merge.cuh"
#include "attention_tiles.cuh"

__device__ __forceinline__ u32 transpose_8x8(u32 x) {
  u32 y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// A warp turns a tile of 8-bit means, 16 rows of codes and then 16 pairs (scale, zero), into a tile of values.
template <typename T, int D>
__device__ __forceinline__ void spell_out(const u8* packed, T* values) {
  constexpr int kChunks = D / 8;
#pragma unroll
  for (int i = 0; i < kTile * kChunks / kWarp; ++i) {
    const int token = (i * kWarp + lane_id()) / kChunks, chunk = (i * kWarp + lane_id()) % kChunks;
    const uint2 codes = *reinterpret_cast<const uint2*>(packed + token * D + chunk * 8);
    const float2 params = unpack2<half>(*reinterpret_cast<const u32*>(packed + kTile * D + token * 4));
    float x[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {  // a byte in the last place of 2^23 is that float plus the byte: no conversion
      const u32 word = __byte_perm(c < 4 ? codes.x : codes.y, 0x4b000000u, 0x7440 + c % 4);
      x[c] = fmaf(__uint_as_float(word) - 8388608.f, params.x, params.y);
    }
    store16(values + token * D + (chunk ^ (token & 7)) * 8,
            make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7])));
  }
  __syncwarp();
}

// Rows without a token, which nobody will visit: zeros, and -inf. A block takes every gridDim.x-th.
template <typename T, int D, bool kSparse, int kTail>
__device__ __forceinline__ void clear_empty(const AttentionParams& p, const Rows<kSparse, kTail>& rows, int begin, int end) {
#pragma unroll 1
  for (int row = begin; row < end; ++row) {
    if (row % gridDim.x != blockIdx.x || rows.tiles(row) != 0) continue;
    const int head = rows.first_head(row), n = rows.heads(row);
#pragma unroll 1
    for (int j = 0; j < n * (D / 8); ++j) store16(static_cast<T*>(p.out) + static_cast<size_t>(head) * D + j * 8, uint4{0, 0, 0, 0});
#pragma unroll 1
    for (int j = 0; j < n; ++j) p.lse[head + j] = -inf();
  }
}

template <typename T, int D, int kWarps, int kStages, bool kSparse, bool kLogWeight, int kTail = NoTail>
__device__ __forceinline__ void attend(const AttentionParams& p) {
  constexpr int kThreads = kWarps * kWarp;
  using Loads = TileLoads<T, D, kWarps, kSparse, kTail>;
  constexpr int kSlot = Loads::kSlot, kBlocksD = D / 16;
  constexpr int kPitch = D + 4;                  // floats; spreads 4 columns x 8 rows of O^T over all banks
  static_assert(kHeads * kPitch * 4 <= kSlot * sizeof(T), "O of a warp must fit its free slot");
  extern __shared__ __align__(128) unsigned char smem_raw[];
  __shared__ int plan[2];                        // first row, its start
  __shared__ SharedRows shared;
  __shared__ int slots[kWarps];
  __shared__ int scan_scratch[kWarps + 1];
  __shared__ u32 masks[kWarps][kStages];
  __shared__ float state_m[kWarps][kHeads], state_l[kWarps][kHeads];

  const Rows<kSparse, kTail> rows(p);
  const int num_rows = rows.count();
  const int warp = uniform_warp_id(), lane = lane_id(), gid = lane / 4, tig = lane % 4;
  T* const ring = reinterpret_cast<T*>(smem_raw) + warp * kStages * kSlot;

  // ---- which tiles are ours ----
  // Rows of one sequence are alike, and nobody has to add them up: 0.5 us of 15 at 8k.
  const int alike = !kSparse && p.batch == 1 ? rows.width(rows.tiles(0)) : 0;
  const int per_thread = ceil_div(num_rows, kThreads);
  const int my_begin = min(static_cast<int>(threadIdx.x) * per_thread, num_rows), my_end = min(my_begin + per_thread, num_rows);
  int cost = 0, before = 0, total = alike * num_rows;
  if (!alike) {
    bool empty = false;
#pragma unroll 1
    for (int chunk = my_begin; chunk < my_end; chunk += 4) {
      int tiles[4];  // four loads at once: each takes 0.6 us, and nothing else can start
#pragma unroll
      for (int i = 0; i < 4; ++i) tiles[i] = chunk + i < my_end ? rows.tiles(chunk + i) : -1;
#pragma unroll
      for (int i = 0; i < 4; ++i) cost += rows.width(tiles[i]), empty |= tiles[i] == 0;
    }
    if (empty) clear_empty<T, D>(p, rows, my_begin, my_end);
    before = block_exclusive_scan<kThreads>(cost, scan_scratch, total);
    if (total == 0) return;
  }
  const u32 blocks = min(gridDim.x, static_cast<u32>(ceil_div(total, p.min_tiles)));
  if (blockIdx.x >= blocks) return;
  const Line line(total, blocks);
  const int begin = line.begin(blockIdx.x), end = line.begin(blockIdx.x + 1);
  if (threadIdx.x < 2) shared.row[threadIdx.x] = -1;
  int row, start;
  if (alike) {
    row = begin / alike, start = row * alike;
  } else {
    if (before <= begin && begin < before + cost) {
      row = my_begin, start = before;
#pragma unroll 1
      for (;; ++row) {
        const int width = rows.width(rows.tiles(row));
        if (begin < start + width) break;
        start += width;
      }
      plan[0] = row, plan[1] = start;
    }
    __syncthreads();
    row = plan[0], start = plan[1];
  }

  Loads loads(p, rows, ring, masks[warp], row, start, begin, end);
  loads.template begin<kStages>();
  int slot = 0, free_slot = kStages - 1;  // the tile to compute, and the one that nobody uses

  // ---- rows ----
#pragma unroll 1
  for (; row < num_rows && start < end; ++row) {
    const int tiles = rows.tiles(row);
    if (tiles == 0) continue;
    const int low = max(start, begin), high = min(start + tiles, end);
    const int row_start = start;
    start += rows.width(tiles);
    if (low >= high) continue;
    const int first_head = rows.first_head(row), num_heads = rows.heads(row);
    [[maybe_unused]] const int list_tiles = kTail == NoTail ? tiles : rows.list_tiles(row);

    u32 query[kBlocksD][2];  // B fragments: column gid is a head
    {
      const T* const q = static_cast<const T*>(p.q) + static_cast<size_t>(first_head + min(gid, num_heads - 1)) * D + tig * 2;
#pragma unroll
      for (int k = 0; k < kBlocksD; ++k) {
        query[k][0] = *reinterpret_cast<const u32*>(q + k * 16);
        query[k][1] = *reinterpret_cast<const u32*>(q + k * 16 + 8);
        if (gid >= num_heads) query[k][0] = query[k][1] = 0;
      }
      // The next row's queries, 32 lines of 128 bytes at most: from L2 they would stall every warp for 0.6 us.
      const int next = rows.first_head(min(row + 1, num_rows - 1)) * D * static_cast<int>(sizeof(T)) / 128 + lane;
      if (start < end && warp == 0 && lane < kHeads * D * static_cast<int>(sizeof(T)) / 128 &&
          next < p.batch * p.num_kv_heads * p.group * D * static_cast<int>(sizeof(T)) / 128) {
        asm volatile("prefetch.global.L1 [%0];" ::"l"(static_cast<const char*>(p.q) + static_cast<size_t>(next) * 128));
      }
    }
    float o[kBlocksD][4] = {};
    float m[2] = {-inf(), -inf()}, l[2] = {0.f, 0.f};  // columns 2*tig and 2*tig + 1; l of this lane's tokens only

#pragma unroll 1
    for (int t = low + ((warp - low) & (kWarps - 1)); t < high; t += kWarps) {
      [[maybe_unused]] float given[4] = {-inf(), -inf(), -inf(), -inf()};
      if constexpr (kTail != NoTail) {
        if (t - row_start >= list_tiles) {  // before the wait, so that they arrive during it
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int entry = (t - row_start - list_tiles) * kTile + gid + i / 2 * 8, head = tig * 2 + i % 2;
            if (head < num_heads && entry < p.tail_capacity) {
              given[i] = p.tail_logits[static_cast<size_t>(first_head + head) * p.tail_capacity + entry];
            }
          }
        }
      }
      loads.next(free_slot);
      cp_async_wait<kStages - 1>();
      __syncwarp();
      const u32 mask = masks[warp][slot];
      const T* const keys = ring + slot * kSlot;
      const T* const values = keys + kTile * D;
      if (kTail == NoTail ? mask != 0 : (mask & ~kTailTile) != 0) {
        float s[4] = {}, s_odd[4] = {};  // two chains: an mma waits for the one before it
        if (kTail != NoTail && mask & kTailTile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) s[i] = mask >> (gid + i / 2 * 8) & 1 ? kLog2e * given[i] : -inf();
          if constexpr (kTail == PackedTail) spell_out<T, D>(reinterpret_cast<const u8*>(keys), const_cast<T*>(values));
        } else {
          const int token = lane & 15;
#pragma unroll
          for (int k = 0; k < kBlocksD; ++k) {
            u32 a[4];
            ldmatrix_x4(a, keys + token * D + ((k * 2 + lane / 16) ^ (token & 7)) * 8);
            mma_16bit<T>(k % 2 ? s_odd : s, a[0], a[1], a[2], a[3], query[k][0], query[k][1]);
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int token = gid + i / 2 * 8;
            float x = (s[i] + s_odd[i]) * p.scale_log2;
            if constexpr (kLogWeight) {
              const int entry = ((t - row_start) * kTile + token) >> p.granularity_shift;
              const int head = tig * 2 + i % 2;
              if (head < num_heads && (mask >> token & 1)) {
                x += kLog2e * p.log_weight[static_cast<size_t>(first_head + head) * p.capacity + entry];
              }
            }
            s[i] = mask >> token & 1 ? x : -inf();
          }
        }
        float shift[2];
        bool grew = false;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float top = fmaxf(s[c], s[c + 2]);
          top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 4));
          top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 8));
          top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 16));
          grew |= top > m[c];
          top = fmaxf(top, m[c]);
          shift[c] = fast_exp2(m[c] - finite_max(top));
          m[c] = top;
        }
        if (__any_sync(kFullMask, grew)) {  // rare after the first tiles
#pragma unroll
          for (int c = 0; c < 2; ++c) l[c] *= shift[c];
#pragma unroll
          for (int k = 0; k < kBlocksD; ++k) {
            o[k][0] *= shift[0], o[k][1] *= shift[1], o[k][2] *= shift[0], o[k][3] *= shift[1];
          }
        }
        const float m0 = finite_max(m[0]), m1 = finite_max(m[1]);
        const float w[4] = {fast_exp2(s[0] - m0), fast_exp2(s[1] - m1), fast_exp2(s[2] - m0), fast_exp2(s[3] - m1)};
        l[0] += w[0] + w[2], l[1] += w[1] + w[3];
        const u32 b0 = transpose_8x8(pack2<T>(w[0], w[1])), b1 = transpose_8x8(pack2<T>(w[2], w[3]));
        {
          const int token = (lane & 7) + lane / 16 * 8;
#pragma unroll
          for (int k = 0; k < kBlocksD; ++k) {
            u32 a[4];
            ldmatrix_x4_trans(a, values + token * D + ((k * 2 + (lane / 8 & 1)) ^ (token & 7)) * 8);
            mma_16bit<T>(o[k], a[0], a[1], a[2], a[3], b0, b1);
          }
        }
      }
      __syncwarp();
      free_slot = slot;
      slot = slot + 1 == kStages ? 0 : slot + 1;
    }

    // ---- join the warps, each through the ring slot that it has just emptied ----
    float* const mine = reinterpret_cast<float*>(ring + free_slot * kSlot);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      l[c] += __shfl_xor_sync(kFullMask, l[c], 4);
      l[c] += __shfl_xor_sync(kFullMask, l[c], 8);
      l[c] += __shfl_xor_sync(kFullMask, l[c], 16);
      const int head = tig * 2 + c;
      if (gid == 0) state_m[warp][head] = m[c], state_l[warp][head] = l[c];
      if (head < num_heads) {
#pragma unroll
        for (int k = 0; k < kBlocksD; ++k) {
          mine[head * kPitch + k * 16 + gid] = o[k][c];
          mine[head * kPitch + k * 16 + gid + 8] = o[k][c + 2];
        }
      }
    }
    if (lane == 0) slots[warp] = free_slot;
    __syncthreads();

    // A block has at most two rows that others share: its first, and its last, which begins after the block does.
    const bool whole = row_start >= begin && row_start + tiles <= end;
    const u32 part = 2 * blockIdx.x + (row_start > begin);
#pragma unroll 1
    for (int i = threadIdx.x; i < num_heads * (D / 4); i += kThreads) {
      const int head = i / (D / 4), d = i % (D / 4) * 4;
      float top = -inf(), sum = 0.f, x[4] = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) top = fmaxf(top, state_m[w][head]);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const bool none = state_l[w][head] == 0.f;  // no token; its O may be 0 * inf
        const float factor = fast_exp2(state_m[w][head] - finite_max(top));
        const float4 y = *reinterpret_cast<const float4*>(
            reinterpret_cast<float*>(reinterpret_cast<T*>(smem_raw) + (w * kStages + slots[w]) * kSlot) + head * kPitch + d);
        sum += factor * state_l[w][head];
        x[0] = fmaf(factor, none ? 0.f : y.x, x[0]), x[1] = fmaf(factor, none ? 0.f : y.y, x[1]);
        x[2] = fmaf(factor, none ? 0.f : y.z, x[2]), x[3] = fmaf(factor, none ? 0.f : y.w, x[3]);
      }
      if (whole) {
        finish<T, D>(p, first_head + head, d, x, top, sum);
      } else {
        reinterpret_cast<float4*>(p.partial)[(part * kHeads + head) * (D / 4) + d / 4] = make_float4(x[0], x[1], x[2], x[3]);
        if (d == 0) p.partial_state[part * kHeads + head] = make_float2(top, sum);
      }
    }
    if (!whole) {
      // Nobody waits here for the news to spread: both shared rows are settled at the end, when all blocks end.
      const int i = row_start > begin;
      if (threadIdx.x == 0) shared.row[i] = row, shared.start[i] = row_start, shared.tiles[i] = tiles;
    }
    __syncthreads();  // the slots belong to the rings again
  }
  cp_async_wait<0>();

  merge_shared<T, D, kThreads, kWarps * kStages * kSlot * static_cast<int>(sizeof(T))>(p, rows, line, shared, smem_raw);
}
