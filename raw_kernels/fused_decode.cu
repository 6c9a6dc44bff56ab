// One decode step of one layer in one launch: pages by their 8-bit vectors, top-k, logits from the 4-bit keys, top-p, and attention.
//
// A cluster of blocks works on one (sequence, kv head), a row: 1 block where there are rows enough to fill the GPU, up to 16 where there are 8 rows. Everything between the stages
// stays in shared memory; the blocks of a row exchange keys, histograms and lists through it and meet at barriers. Against a launch a stage this saves the scores' and
// logits' way to memory and back, 8 bytes a candidate and query head, and five launches, each of which waits for its slowest block and
// begins with loads that nothing hides: 35 of the 48 us that a step took at b=1, N=32k.
//
//     score    vectors [pages, Hkv, V*d] of this block's share of pages       -> scores in shared memory
//     select   scores -> keys -> everybody; each block finds the threshold     -> its equal share of the best pages
//     estimate 4-bit keys of those                                             -> logits in shared memory, fp16
//     prune    histogram of mass, cut by one block a head                      -> the union's tokens, in order
//     attend   the union in equal shares (kAttend), merged over the cluster    -> out, lse
//
// Without kAttend the list goes to memory: for large batches sparse_attention.cu, which balances over rows, is faster.
// Two blocks a multiprocessor: while one searches, the other streams.
// Floor: V*d + 4 bytes a page, d/2 + 4 bytes a candidate, 4*d bytes a kept token: 260, 68 and 512 at d=128, V=2.
#include "fused_attend.cuh"
#include "fused_scores.cuh"
#include "fused_select.cuh"
#include "fused_top_p.cuh"

struct FusedDecodeParams {
  const void* q;             // [b, Hq, d] half or bf16
  const void* k_pages;       // [pages, Hkv, P, d], kAttend only
  const void* v_pages;       // likewise
  const u8* shadow;          // [pages, Hkv, P*d/2 + 4*P]
  const u8* codes;           // [pages, Hkv, V*d]: V = 0 takes every page, 1 means, 2 maxima and minima
  const u32* code_params;    // [pages, Hkv, 2] half: scale, zero
  const int* page_table;     // [b, max_pages]
  const int* seq_lens;       // [b]
  const int* page_budget;    // [b, Hkv]
  // outputs
  int* candidates;           // [b, Hkv, capacity] or null
  int* candidate_lengths;    // [b, Hkv]
  int* kept;                 // [b, Hkv, capacity * P] or null, positions, ascending; not written past the length
  int* kept_lengths;         // [b, Hkv]
  int* per_query_head;       // [b, Hq]
  float* mass;               // [b, Hq]
  void* out;                 // [b, Hq, d], kAttend only
  float* lse;                // [b, Hq], kAttend only
  float sm_scale;
  float p;
  float bins_per_nat;        // 32 or 16
  int bits;                  // of a weight: candidates * 2^bits stay below 2^32
  int reduce;                // how query heads are combined: 0 softmax, 1 sum, 2 max
  int q_is_bf16;
  int kv_heads;
  int group;
  int max_pages;
  int capacity;              // pages
  int page_shift;            // log2 P, 4 or 5
  int page_share;            // pages of a block at most, a multiple of 16
  int entry_share;           // candidate pages of a block at most
};
CHECK_PARAMS(FusedDecodeParams);

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxHeads = 8;

// Where things lie in dynamic shared memory; `fused_decode.py` adds up the same.
struct Layout {
  // Scores of pages (float), then logits (half), then rows of K and V (int) and the warps' O (float).
  int scores;
  // Keys of all pages (u32), then who is kept (bytes).
  int keys;
  // This block's page numbers, then its candidates: logical and physical.
  int list;
  // Histograms.
  int bins;

  __device__ Layout(const FusedDecodeParams& p, int dim, int vectors, bool attend, int blocks) {
    const int tokens = p.entry_share << p.page_shift;
    int size = 2 * p.group * tokens;
    if (vectors) size = max(size, 4 * p.group * p.page_share);
    if (attend) size = max(max(size, 4 * tokens), 4 * (kWarps + 1) * p.group * dim);
    scores = 0, keys = scores + size;
    size = p.group * tokens / 8;
    if (vectors) size = max(size, 4 * p.page_share * blocks);
    list = keys + ceil_div(size, 16) * 16;
    size = 8 * p.entry_share;
    if (vectors) size = max(size, 4 * p.page_share);
    bins = list + ceil_div(size, 16) * 16;
  }
};

template <typename T, int D, int Tiles, int Vectors, bool kAttend>
__global__ void __launch_bounds__(kThreads, D == 256 && kAttend ? 1 : 2) fused_decode(const __grid_constant__ FusedDecodeParams p) {
  extern __shared__ __align__(16) unsigned char smem[];
  __shared__ SelectScratch<kThreads, kMaxHeads> s_select;
  __shared__ TopPScratch<kMaxHeads, kMaxCluster> s_top_p;
  __shared__ int s_scan[kWarps + 1];
  __shared__ float s_warp_top[kWarps][kMaxHeads], s_warp_sum[kWarps][kMaxHeads];
  __shared__ float2 s_state[kMaxHeads];
  const AnyCluster cluster;
  const int blocks = cluster.size, rank = cluster.rank, row = blockIdx.y, batch = row / p.kv_heads, kv_head = row - batch * p.kv_heads;
  const int lane = lane_id(), warp = warp_id();
  const int seq_len = p.seq_lens[batch], page_size = 1 << p.page_shift;
  const int real = min(ceil_div(seq_len, page_size), p.max_pages);
  const int first_head = row * p.group;
  if (real <= 0) {  // the whole cluster leaves
    if (rank == 0 && threadIdx.x == 0) p.kept_lengths[row] = p.candidate_lengths[row] = 0;
    if (rank == 0 && threadIdx.x < p.group) p.per_query_head[first_head + threadIdx.x] = 0, p.mass[first_head + threadIdx.x] = 0.f;
    if constexpr (kAttend) {
      if (rank == 0 && threadIdx.x < p.group) p.lse[first_head + threadIdx.x] = -inf();
      for (int i = threadIdx.x; rank == 0 && i < p.group * D / 8; i += kThreads) store16(static_cast<T*>(p.out) + static_cast<long long>(first_head) * D + i * 8, uint4{0, 0, 0, 0});
    }
    return;
  }
  const Layout layout(p, D, Vectors, kAttend, blocks);
  float* const scores = reinterpret_cast<float*>(smem + layout.scores);
  half* const logits = reinterpret_cast<half*>(smem + layout.scores);
  u32* const keys = reinterpret_cast<u32*>(smem + layout.keys);
  unsigned char* const keep = smem + layout.keys;
  int* const logical = reinterpret_cast<int*>(smem + layout.list);
  int* const physical = logical + p.entry_share;
  u32* const bins = reinterpret_cast<u32*>(smem + layout.bins);
  u32* const sums = blocks > 1 ? bins + p.group * kMassBins : bins;
  const u16* const q = static_cast<const u16*>(p.q) + static_cast<long long>(first_head) * D;
  const int* const table = p.page_table + static_cast<long long>(batch) * p.max_pages;

  // ---- which pages ----
  const int budget = Vectors ? min(p.page_budget[row], p.capacity) : p.capacity;
  int taken = min(real, budget), before, entries;
  bool chosen = false;
  if constexpr (Vectors != 0) {
    if (budget < real) {
      chosen = true;
      // Pages in equal shares of whole tiles.
      const int share = ceil_div(ceil_div(real, kTile), blocks) * kTile, first = min(rank * share, real), count = min(share, real - first);
      for (int i = threadIdx.x; i < count; i += kThreads) logical[i] = table[first + i];
      __syncthreads();
      if (count > 0) {
        score_pages<D, Vectors, Tiles, kWarps>(q, p.q_is_bf16, p.group, p.codes, p.code_params, logical, count, p.kv_heads, kv_head,
                                               [&](int page, int g, float score) { scores[g * p.page_share + page] = score; });
      }
      __syncthreads();
      combine_heads<kThreads, kMaxHeads>(cluster, s_select, scores, p.page_share, count, first, p.group, p.sm_scale * kLog2e, p.reduce, keys);
      entries = best_pages<kThreads, kMaxHeads>(cluster, s_select, keys, real, budget, reinterpret_cast<int*>(bins), logical, taken, before);
      __syncthreads();
    }
  }
  if (!chosen) {  // all of them, or the first ones for a budget that no selector filled
    const int per_block = ceil_div(taken, blocks);
    before = min(rank * per_block, taken), entries = min(per_block, taken - before);
    for (int i = threadIdx.x; i < entries; i += kThreads) logical[i] = before + i;
    __syncthreads();
  }
  for (int i = threadIdx.x; i < entries; i += kThreads) {
    physical[i] = table[logical[i]];
    if (p.candidates) p.candidates[static_cast<long long>(row) * p.capacity + before + i] = logical[i];
  }
  if (rank == 0 && threadIdx.x == 0) p.candidate_lengths[row] = taken;
  __syncthreads();

  // ---- logits ----
  const int pitch = p.entry_share << p.page_shift, size = entries << p.page_shift;
  {
    constexpr int kNth = Tiles == 1 ? 2 : Tiles;  // heads of a lane
    float top[kNth];
#pragma unroll
    for (int i = 0; i < kNth; ++i) top[i] = -inf();
    score_tokens<D, Tiles, kWarps, (D == 256 ? 2 : 4)>(q, p.q_is_bf16, p.group, p.sm_scale, p.shadow, physical, logical, entries, p.page_shift, seq_len, p.kv_heads, kv_head,
                                      [&](int slot, int g, int nth, float logit) {
                                        const half rounded = to_half_clamped(logit);
                                        logits[g * pitch + slot] = rounded;
                                        top[nth] = max_nan(top[nth], to_float(rounded));
                                      });
    // Lanes of one tig have the same heads, and with one column tile those of tig ^ 2 too.
#pragma unroll
    for (int i = 0; i < kNth; ++i) {
      float x = top[i];
#pragma unroll
      for (int distance = kWarp / 2; distance >= (Tiles == 1 ? 2 : 4); distance /= 2) x = max_nan(x, __shfl_xor_sync(kFullMask, x, distance));
      const int g = Tiles == 1 ? 2 * lane + i : 8 * (i / 2) + 2 * lane + i % 2;
      if (lane < (Tiles == 1 ? 2 : 4) && g < kMaxHeads) s_warp_top[warp][g] = x;
    }
    __syncthreads();
    if (threadIdx.x < p.group) {
      float x = -inf();
      for (int w = 0; w < kWarps; ++w) x = max_nan(x, s_warp_top[w][threadIdx.x]);
      s_top_p.top[threadIdx.x] = x;
    }
  }

  // ---- top-p ----
  find_edges<kThreads, kMaxHeads, kMaxCluster>(cluster, s_top_p, logits, pitch, size, taken << p.page_shift, p.group, p.p, p.bins_per_nat, p.bits, bins, sums);
  int run_begin, run_end;
  int at = mark_kept<kThreads, kMaxHeads, kMaxCluster>(cluster, s_top_p, logits, pitch, size, p.group, p.bins_per_nat, keep, s_scan, run_begin, run_end);
  cluster.sync();
  int kept_row = 0;
  for (int r = 0; r < blocks; ++r) {
    at += r < rank ? s_top_p.totals[r] : 0;
    kept_row += s_top_p.totals[r];
  }
  if (rank == 0) {
    if (threadIdx.x < p.group) {
      int count = 0;
      for (int r = 0; r < blocks; ++r) count += s_top_p.counts[r][threadIdx.x];
      p.per_query_head[first_head + threadIdx.x] = count;
      p.mass[first_head + threadIdx.x] = s_top_p.kept_mass[threadIdx.x];
    }
    if (threadIdx.x == 0) p.kept_lengths[row] = kept_row;
  }

  // ---- the list: to memory, and in equal shares of whole tiles to whoever will attend to it ----
  int* const places = reinterpret_cast<int*>(smem + layout.scores);
  const int share = ceil_div(ceil_div(kept_row, blocks), kTile) * kTile;
  {
    int* const kept = p.kept ? p.kept + (static_cast<long long>(row) * p.capacity << p.page_shift) : nullptr;
    int to = kAttend ? at / max(share, 1) : 0, slot = at - to * share;
    for (int chunk = run_begin; chunk < run_end; ++chunk) {
      u32 mine = keep[chunk];
      while (mine) {
        const int i = __ffs(mine) - 1, candidate = chunk * 8 + i, entry = candidate >> p.page_shift, offset = candidate & (page_size - 1);
        mine &= mine - 1;
        if (kept) kept[at] = (logical[entry] << p.page_shift) + offset;
        if constexpr (kAttend) {
          const int place = ((physical[entry] * p.kv_heads + kv_head) << p.page_shift) + offset;
          AnyCluster::store(AnyCluster::address(places + slot, to), static_cast<u32>(place));
          if (++slot == share) slot = 0, ++to;
        }
        ++at;
      }
    }
  }
  if constexpr (kAttend) {
    __shared__ __align__(16) T s_query[kMaxHeads * D];
    for (int i = threadIdx.x; i < p.group * D / 8; i += kThreads) store16(s_query + i * 8, load16(q + i * 8));
    cluster.sync();
    const int mine = min(share, max(kept_row - rank * share, 0));
    float top, sum;
    float* const parts = scores;
    attend_warp<T, D, kWarps>(s_query, static_cast<const T*>(p.k_pages), static_cast<const T*>(p.v_pages), places, mine,
                              p.group, p.sm_scale * kLog2e, parts + warp * p.group * D, top, sum);
    if (lane % 4 == 0) s_warp_top[warp][lane / 4] = top, s_warp_sum[warp][lane / 4] = sum;
    __syncthreads();
    float* const joined = parts + kWarps * p.group * D;
    const auto finish = [&](int head, int d, float4 x, float m, float l) {
      const float scale = l == 0.f ? 0.f : 1.f / l;
      *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + static_cast<long long>(first_head + head) * D + d) =
          make_uint2(pack2<T>(x.x * scale, x.y * scale), pack2<T>(x.z * scale, x.w * scale));
      if (d == 0) p.lse[first_head + head] = l == 0.f ? -inf() : (m + log2f(l)) * kLn2;
    };
    for (int i = threadIdx.x; i < p.group * (D / 4); i += kThreads) {
      const int head = i / (D / 4), d = i % (D / 4) * 4;
      float m = -inf(), l = 0.f;
      float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) m = fmaxf(m, s_warp_top[w][head]);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (s_warp_sum[w][head] == 0.f) continue;
        const float factor = exp2_fast(s_warp_top[w][head] - finite_top(m));
        const float4 y = *reinterpret_cast<const float4*>(parts + (w * p.group + head) * D + d);
        l += factor * s_warp_sum[w][head];
        x.x += factor * y.x, x.y += factor * y.y, x.z += factor * y.z, x.w += factor * y.w;
      }
      if (blocks == 1) {
        finish(head, d, x, m, l);
      } else {
        *reinterpret_cast<float4*>(joined + head * D + d) = x;
        if (d == 0) s_state[head] = make_float2(m, l);
      }
    }
    if (blocks == 1) return;
    cluster.sync();
    for (int i = threadIdx.x * blocks + rank; i < p.group * (D / 4); i += kThreads * blocks) {
      const int head = i / (D / 4), d = i % (D / 4) * 4;
      float m = -inf(), l = 0.f;
      float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
      float2 state[kMaxCluster];
#pragma unroll
      for (int r = 0; r < kMaxCluster; ++r) {
        state[r] = r < blocks ? AnyCluster::read2(AnyCluster::address(s_state + head, r)) : make_float2(-inf(), 0.f);
        m = fmaxf(m, state[r].x);
      }
#pragma unroll
      for (int r = 0; r < kMaxCluster; ++r) {
        if (state[r].y == 0.f) continue;
        const float factor = exp2_fast(state[r].x - finite_top(m));
        const float4 y = AnyCluster::read4(AnyCluster::address(joined + head * D + d, r));
        l += factor * state[r].y;
        x.x += factor * y.x, x.y += factor * y.y, x.z += factor * y.z, x.w += factor * y.w;
      }
      finish(head, d, x, m, l);
    }
    cluster.sync();  // a block that leaves takes its shared memory along
  }
}
