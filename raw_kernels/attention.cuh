// Split-KV attention of one query a sequence over a list of its tokens: the body of sparse_attention.cu and dense_attention.cu.
//
// A row is one (sequence, kv head) with up to 8 of the group's query heads; larger groups make several rows. Its tokens
// are cut into tiles of 16. All tiles of all rows, in order, form one line that is cut into as many equal ranges as there
// are blocks, so a row with 100x the budget of its neighbour gets 100x the blocks. Every block finds its range itself
// from the lengths: 2048 of them are 8 KB of L2, which costs less than a kernel that plans.
//
// Inside a block the warps take tiles in turn, each with its own ring of `kStages` tiles filled by cp.async: no block
// barrier between tiles, and loads of the next row are under way while this one is merged. Per tile, with the tokens as
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

#include "common.cuh"
#include "mma.cuh"

constexpr int kTile = 16;
constexpr int kHeads = 8;
// What the end of a row costs a block, in tiles: ranges are cut as if each row had this many more.
constexpr int kRowCost = 2;

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

__device__ __forceinline__ u32 transpose_8x8(u32 x) {
  u32 y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
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

// m and l of the softmax in base 2. An empty state is (-inf, 0); `finite_max` keeps -inf - -inf out of exponents.
__device__ __forceinline__ float finite_max(float m) { return m == -inf() ? 0.f : m; }

template <bool kSparse, int kTail>
struct Rows {
  const AttentionParams& p;
  int splits;  // rows that a kv head makes: ceil(G / 8)

  __device__ explicit Rows(const AttentionParams& params) : p(params), splits(ceil_div(params.group, kHeads)) {}
  __device__ int count() const { return p.batch * p.num_kv_heads * splits; }
  __device__ int kv(int row) const { return splits == 1 ? row : row / splits; }  // a division is 20 instructions
  __device__ int tokens(int row) const {
    const int kv = this->kv(row);
    if constexpr (!kSparse) return p.seq_lens[kv / p.num_kv_heads];
    return min(max(p.lengths[kv], 0), p.capacity) << p.granularity_shift;
  }
  __device__ int list_tiles(int row) const { return ceil_div(tokens(row), kTile); }
  __device__ int tail_pages(int row) const { return min(max(p.tail_lengths[kv(row)], 0), p.tail_capacity); }
  __device__ int tiles(int row) const {
    if constexpr (kTail == NoTail) return list_tiles(row);
    return list_tiles(row) + ceil_div(tail_pages(row), kTile);
  }
  __device__ int first_head(int row) const { return kv(row) * p.group + (row - kv(row) * splits) * kHeads; }  // over [b, Hq]
  __device__ int heads(int row) const { return min(kHeads, p.group - (row - kv(row) * splits) * kHeads); }
};

template <typename T, int D, int kWarps, int kStages, bool kSparse, bool kLogWeight, int kTail = NoTail>
__device__ __forceinline__ void attend(const AttentionParams& p) {
  constexpr int kThreads = kWarps * kWarp;
  constexpr int kSlot = 2 * kTile * D;           // elements of a ring slot: K tile, V tile
  constexpr int kChunks = D / 8;                 // 16-byte chunks of a row
  constexpr int kRowsPerCopy = kWarp / kChunks;  // rows that one cp.async of the warp covers
  constexpr int kBlocksD = D / 16;
  constexpr int kPitch = D + 4;                  // floats; spreads 4 columns x 8 rows of O^T over all banks
  static_assert(kHeads * kPitch * 4 <= kSlot * sizeof(T), "O of a warp must fit its free slot");
  extern __shared__ __align__(128) unsigned char smem_raw[];
  __shared__ int plan[2];                        // first row, its start
  __shared__ int shared_row[2], shared_start[2], shared_tiles[2];
  __shared__ int slots[kWarps];
  __shared__ int scan_scratch[kWarps + 1];
  __shared__ u32 masks[kWarps][kStages];
  __shared__ float state_m[kWarps][kHeads], state_l[kWarps][kHeads];

  const Rows<kSparse, kTail> rows(p);
  const int num_rows = rows.count();
  const int warp = warp_id(), lane = lane_id(), gid = lane / 4, tig = lane % 4;
  T* const ring = reinterpret_cast<T*>(smem_raw) + warp * kStages * kSlot;

  // ---- which tiles are ours ----
  const int per_thread = ceil_div(num_rows, kThreads);
  const int my_begin = min(static_cast<int>(threadIdx.x) * per_thread, num_rows), my_end = min(my_begin + per_thread, num_rows);
  int cost = 0;
  for (int chunk = my_begin; chunk < my_end; chunk += 4) {
    int tiles[4];  // four loads at once: each takes 0.6 us, and nothing else can start
#pragma unroll
    for (int i = 0; i < 4; ++i) tiles[i] = chunk + i < my_end ? rows.tiles(chunk + i) : -1;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      cost += tiles[i] > 0 ? tiles[i] + kRowCost : 0;
      if (tiles[i] == 0 && (chunk + i) % gridDim.x == blockIdx.x) {  // nobody will visit this row
        const int head = rows.first_head(chunk + i), n = rows.heads(chunk + i);
        for (int j = 0; j < n * kChunks; ++j) store16(static_cast<T*>(p.out) + static_cast<size_t>(head) * D + j * 8, uint4{0, 0, 0, 0});
        for (int j = 0; j < n; ++j) p.lse[head + j] = -inf();
      }
    }
  }
  int total;
  const int before = block_exclusive_scan<kThreads>(cost, scan_scratch, total);
  if (total == 0) return;
  const u32 blocks = min(gridDim.x, static_cast<u32>(ceil_div(total, p.min_tiles)));
  if (blockIdx.x >= blocks) return;
  // The first `extra` ranges are one longer than the others. 32-bit divisions: a 64-bit one takes 0.3 us.
  const u32 length = static_cast<u32>(total) / blocks, extra = static_cast<u32>(total) - length * blocks;
  const auto cut = [&](u32 block) { return static_cast<int>(block * length + min(block, extra)); };
  const auto owner = [&](int t) {
    const u32 at = t, longer = extra * (length + 1);
    return at < longer ? at / (length + 1) : extra + (at - longer) / length;
  };
  const int begin = cut(blockIdx.x), end = cut(blockIdx.x + 1);
  if (threadIdx.x < 2) shared_row[threadIdx.x] = -1;
  if (before <= begin && begin < before + cost) {
    int row = my_begin, start = before;
    for (;; ++row) {
      const int tiles = rows.tiles(row), width = tiles ? tiles + kRowCost : 0;
      if (begin < start + width) break;
      start += width;
    }
    plan[0] = row, plan[1] = start;
  }
  __syncthreads();
  int row = plan[0], start = plan[1];

  // ---- the line of tiles that this warp loads, three steps ahead of each other: index, page, copy ----
  int load_row = row, load_start = start, load_tiles = rows.tiles(row);
  int load_t = max(begin, start);
  load_t += (warp - load_t) & (kWarps - 1);
  int load_tokens = 0, load_seq = 0, load_kv = 0, load_b = 0;
  [[maybe_unused]] int load_pages = 0;
  const auto enter_row = [&] {
    load_kv = rows.kv(load_row), load_b = load_kv / p.num_kv_heads;
    load_tokens = rows.tokens(load_row), load_seq = p.seq_lens[load_b];
    if constexpr (kTail != NoTail) load_pages = rows.tail_pages(load_row);
  };
  enter_row();
  const auto settle = [&] {  // move to the next row that has a tile for this warp
    bool moved = false;
    while (load_t < end && load_t >= load_start + load_tiles) {
      load_start += load_tiles ? load_tiles + kRowCost : 0;
      if (++load_row >= num_rows) load_t = end;
      if (load_t >= end || load_start >= end) { load_t = end; break; }
      load_tiles = rows.tiles(load_row);
      load_t = max(load_t, load_start + ((warp - load_start) & (kWarps - 1)));
      moved = true;
    }
    if (moved && load_t < end) enter_row();
  };
  settle();
  // Raw results of loads wait here for a step, so that nobody waits for them.
  int index_raw = 0, index_sub = -1, index_seq = 0, index_b = 0, index_head = 0;
  int page_raw = 0, page_slot = -1, page_head = 0;
  [[maybe_unused]] bool index_tail = false, page_tail = false;
  const auto step_index = [&] {
    const int i = (load_t - load_start) * kTile + lane;
    bool real = load_t < end && lane < kTile && i < load_tokens;
    index_seq = load_seq, index_b = load_b, index_head = load_kv - load_b * p.num_kv_heads;
    bool listed = true;
    if constexpr (kTail != NoTail) {
      const int entry = (load_t - load_start - ceil_div(load_tokens, kTile)) * kTile + lane;
      index_tail = load_t < end && entry >= lane;
      if (index_tail) {
        listed = false, real = lane < kTile && entry < load_pages;
        index_sub = real ? 0 : -1;
        if (real) index_raw = p.tail_indices[static_cast<size_t>(load_kv) * p.tail_capacity + entry];
      }
    }
    if (!listed) {
    } else if constexpr (kSparse) {
      index_sub = real ? i & ((1 << p.granularity_shift) - 1) : -1;
      if (real) index_raw = p.indices[static_cast<size_t>(load_kv) * p.capacity + (i >> p.granularity_shift)];
    } else {
      index_sub = real ? 0 : -1;
      index_raw = i;
    }
    if (load_t < end) load_t += kWarps, settle();
  };
  const auto step_page = [&] {
    int position = kSparse ? (index_raw << p.granularity_shift) + index_sub : index_raw;
    if constexpr (kTail != NoTail) {
      page_tail = index_tail;
      if (page_tail) position = index_raw << p.page_shift;  // the first token of the page
    }
    const bool real = index_sub >= 0 && static_cast<u32>(position) < static_cast<u32>(index_seq);
    page_slot = real ? position & ((1 << p.page_shift) - 1) : -1;
    page_head = index_head;
    if (real) page_raw = p.page_table[static_cast<size_t>(index_b) * p.max_pages + min(position >> p.page_shift, p.max_pages - 1)];
  };
  const auto step_copy = [&](int slot) {
    u32 mask = __ballot_sync(kFullMask, page_slot >= 0);
    bool listed = true;
    if constexpr (kTail != NoTail) {
      if (page_tail) {
        listed = false;
        const int at = page_slot >= 0 ? page_raw * p.num_kv_heads + page_head : 0;
        T* const tile = ring + slot * kSlot;
        if constexpr (kTail == NativeTail) {
#pragma unroll
          for (int i = 0; i < kTile / kRowsPerCopy; ++i) {
            const int token = i * kRowsPerCopy + lane / kChunks, chunk = lane % kChunks;
            const size_t from = static_cast<size_t>(__shfl_sync(kFullMask, at, token)) * D + chunk * 8;
            cp_async16(tile + kTile * D + token * D + (chunk ^ (token & 7)) * 8, static_cast<const T*>(p.tail_values) + from,
                       mask >> token & 1);
          }
        } else {
          constexpr int kParts = D / 16;  // 16 bytes of codes each
          u8* const codes = reinterpret_cast<u8*>(tile);
#pragma unroll
          for (int i = 0; i < kTile * kParts / kWarp; ++i) {
            const int token = (i * kWarp + lane) / kParts, part = (i * kWarp + lane) % kParts;
            const size_t from = static_cast<size_t>(__shfl_sync(kFullMask, at, token)) * D + part * 16;
            cp_async16(codes + token * D + part * 16, static_cast<const u8*>(p.tail_values) + from, mask >> token & 1);
          }
          if (lane < kTile) cp_async4(codes + kTile * D + lane * 4, p.tail_params + at, mask >> lane & 1);
        }
        mask |= kTailTile;
      }
    }
    if (listed && mask) {
      const int at = page_slot >= 0 ? ((page_raw * p.num_kv_heads + page_head) << p.page_shift) + page_slot : 0;
      T* const tile = ring + slot * kSlot;
#pragma unroll
      for (int i = 0; i < kTile / kRowsPerCopy; ++i) {
        const int token = i * kRowsPerCopy + lane / kChunks, chunk = lane % kChunks;
        const bool real = mask >> token & 1;  // a hidden token becomes zeros: 0 * NaN would be NaN
        const size_t from = static_cast<size_t>(__shfl_sync(kFullMask, at, token)) * D + chunk * 8;
        const int to = token * D + (chunk ^ (token & 7)) * 8;
        cp_async16(tile + to, static_cast<const T*>(p.k_pages) + from, real);
        cp_async16(tile + kTile * D + to, static_cast<const T*>(p.v_pages) + from, real);
      }
    }
    if (lane == 0) masks[warp][slot] = mask;
    cp_async_commit();
  };
  const auto step = [&](int slot) { step_copy(slot), step_page(), step_index(); };
  step_index(), step_page(), step_index();
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) step(i);
  int slot = 0, free_slot = kStages - 1;  // the tile to compute, and the one that nobody uses

  const auto finish = [&](int head, int d, const float (&x)[4], float top, float sum) {
    const float scale = sum == 0.f ? 0.f : 1.f / sum;
    uint2 packed{pack2<T>(x[0] * scale, x[1] * scale), pack2<T>(x[2] * scale, x[3] * scale)};
    *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + static_cast<size_t>(head) * D + d) = packed;
    if (d == 0) p.lse[head] = sum == 0.f ? -inf() : (top + log2f(sum)) * kLn2;
  };

  // ---- rows ----
  for (; row < num_rows && start < end; ++row) {
    const int tiles = rows.tiles(row);
    if (tiles == 0) continue;
    const int low = max(start, begin), high = min(start + tiles, end);
    const int row_start = start;
    start += tiles + kRowCost;
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
      step(free_slot);
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
    for (int i = threadIdx.x; i < num_heads * (D / 4); i += kThreads) {
      const int head = i / (D / 4), d = i % (D / 4) * 4;
      float top = -inf(), sum = 0.f, x[4] = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) top = fmaxf(top, state_m[w][head]);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (state_m[w][head] == -inf() && state_l[w][head] == 0.f) continue;  // no token; its O may be 0 * inf below
        const float factor = fast_exp2(state_m[w][head] - finite_max(top));
        const float4 y = *reinterpret_cast<const float4*>(
            reinterpret_cast<float*>(reinterpret_cast<T*>(smem_raw) + (w * kStages + slots[w]) * kSlot) + head * kPitch + d);
        sum += factor * state_l[w][head];
        x[0] += factor * y.x, x[1] += factor * y.y, x[2] += factor * y.z, x[3] += factor * y.w;
      }
      if (whole) {
        finish(first_head + head, d, x, top, sum);
      } else {
        reinterpret_cast<float4*>(p.partial)[(part * kHeads + head) * (D / 4) + d / 4] = make_float4(x[0], x[1], x[2], x[3]);
        if (d == 0) p.partial_state[part * kHeads + head] = make_float2(top, sum);
      }
    }
    if (!whole) {
      // Nobody waits here for the news to spread: both shared rows are settled at the end, when all blocks end.
      const int i = row_start > begin;
      if (threadIdx.x == 0) shared_row[i] = row, shared_start[i] = row_start, shared_tiles[i] = tiles;
    }
    __syncthreads();  // the slots belong to the rings again
  }
  cp_async_wait<0>();

  // ---- whoever comes last to a shared row joins its parts ----
  __syncthreads();
  const auto blocks_of = [&](int i, u32& first, u32& last) {
    first = owner(shared_start[i]), last = owner(shared_start[i] + shared_tiles[i] - 1);
  };
  if (threadIdx.x < 2 && shared_row[threadIdx.x] >= 0) {
    u32 first, last;
    blocks_of(threadIdx.x, first, last);
    __threadfence();  // after the barrier it speaks for the whole block
    // atomicInc wraps to 0 with the last arrival, ready for the next launch.
    if (atomicInc(p.counters + shared_row[threadIdx.x], last - first) != last - first) shared_row[threadIdx.x] = -1;
  }
  __syncthreads();
  for (int i = 0; i < 2; ++i) {
    if (shared_row[i] < 0) continue;
    __threadfence();
    u32 first, last;
    blocks_of(i, first, last);
    const int first_head = rows.first_head(shared_row[i]), num_heads = rows.heads(shared_row[i]);
    // Parts in the order of their blocks, whoever came last: the same bits in every run.
    const u32 first_part = 2 * first + (shared_start[i] > cut(first)), parts = last - first + 1;
    const auto part_at = [&](u32 part) { return part ? 2 * (first + part) : first_part; };
    for (int at = threadIdx.x; at < num_heads * (D / 4); at += kThreads) {
      const int head = at / (D / 4), d = at % (D / 4) * 4;
      float top = -inf(), sum = 0.f, x[4] = {};
      constexpr int kBatch = 8;  // parts under way: a row has tens where few rows share the GPU, and each takes 0.7 us
      for (u32 begin = 0; begin < parts; begin += kBatch) {
        float2 state[kBatch];
        float4 y[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const u32 from = part_at(min(begin + j, parts - 1)) * kHeads + head;
          state[j] = __ldcg(p.partial_state + from);
          y[j] = __ldcg(reinterpret_cast<const float4*>(p.partial) + from * (D / 4) + d / 4);
          if (begin + j >= parts) state[j] = make_float2(-inf(), 0.f);
        }
        float higher = top;
#pragma unroll
        for (int j = 0; j < kBatch; ++j) higher = fmaxf(higher, state[j].x);
        const float old = fast_exp2(top - finite_max(higher));
        if (sum != 0.f) sum *= old, x[0] *= old, x[1] *= old, x[2] *= old, x[3] *= old;
        top = higher;
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          if (state[j].y == 0.f) continue;
          const float factor = fast_exp2(state[j].x - finite_max(top));
          sum += factor * state[j].y;
          x[0] += factor * y[j].x, x[1] += factor * y[j].y, x[2] += factor * y[j].z, x[3] += factor * y[j].w;
        }
      }
      finish(first_head + head, d, x, top, sum);
    }
  }
}
