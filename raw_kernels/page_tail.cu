// Page tail: the mass that each page loses where the candidates are tokens. See ops/tail.py. For candidates that are pages top_p.cu does it.
//
// A cluster of blocks lists the pages of a (sequence, kv head), a thread a page and round: it bisects for the page's first token among the
// candidates and among the kept, walks both runs, and keeps a maximum and a sum of each head in registers. A scan over the cluster puts
// the pages that lost anything in order. No atomics: the same bits in every run.
// Floor: 4 bytes a candidate and kept token, and a logit of each head for what was pruned. What costs is latency: two bisections side by
// side, some 12 dependent loads at 4096 candidates, then a trip to memory for every kBatch tokens of a page.
#include "cluster.cuh"

struct PageTailParams {
  const void* logits;       // [b, Hq, capacity] of Logit
  const int* indices;       // [b, Hkv, capacity], tokens, ascending
  const int* lengths;       // [b, Hkv]
  const int* kept;          // [b, Hkv, kept_capacity], some of them, ascending
  const int* kept_lengths;  // [b, Hkv]
  const int* seq_lens;      // [b]
  int* pages;               // [b, Hkv, max_pages], behind the count not written
  int* counts;              // [b, Hkv]
  float* log_weight;        // [b, Hq, max_pages], likewise
  int capacity;
  int kept_capacity;
  int max_pages;
  int page_size;
  int kv_heads;
  int group;
};
CHECK_PARAMS(PageTailParams);

constexpr int kBatch = 4;            // tokens of a page whose loads are under way together
constexpr int kNoToken = 0x7fffffff;

// What an exponent is taken relative to: NaN and the infinities stay what they are in the sum.
__device__ __forceinline__ float origin(float top) { return fabsf(top) < inf() ? top : 0.f; }

struct Run {
  const int* list;
  int count;
  int at;  // entries below what was looked for

  __device__ int token(int i) const { return i < count ? list[i] : kNoToken; }
  __device__ void skip(int step, int token) {
    if (at + step <= count && list[at + step - 1] < token) at += step;
  }
};

// Both at once, for their loads to overlap.
__device__ __forceinline__ void bisect(Run& a, Run& b, int token) {
  const int longest = max(a.count, b.count);
#pragma unroll 1
  for (int step = longest ? 1 << (31 - __clz(longest)) : 0; step; step >>= 1) a.skip(step, token), b.skip(step, token);
}

template <typename Logit, int kThreads, int kCluster, int kGroup>
__global__ void CLUSTER_DIMS(kCluster) __launch_bounds__(kThreads, kGroup > 4 ? 2 : 4) page_tail(const __grid_constant__ PageTailParams p) {
  using C = Cluster<kCluster>;
  __shared__ int s_scan[kThreads / kWarp + 1];
  __shared__ int s_listed[2];  // by the parity of the round: a block that is ahead must not overwrite what others still read
  const int row = blockIdx.y, rank = C::rank(), group = p.group;
  const int seq_len = min(max(p.seq_lens[row / p.kv_heads], 0), p.max_pages * p.page_size), pages = ceil_div(seq_len, p.page_size);
  const Logit* const logits = static_cast<const Logit*>(p.logits) + static_cast<size_t>(row) * group * p.capacity;
  const Run candidates{p.indices + static_cast<size_t>(row) * p.capacity, min(max(p.lengths[row], 0), p.capacity), 0};
  const Run kept{p.kept + static_cast<size_t>(row) * p.kept_capacity, min(max(p.kept_lengths[row], 0), p.kept_capacity), 0};

  int before = 0;
#pragma unroll 1
  for (int first = 0, parity = 0; first < pages; first += kCluster * kThreads, parity ^= 1) {
    const int page = first + rank * kThreads + threadIdx.x;
    float top[kGroup], sum[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) top[g] = -inf(), sum[g] = 0.f;
    if (page < pages) {
      const int end = min((page + 1) * p.page_size, seq_len);
      Run c = candidates, k = kept;
      bisect(c, k, page * p.page_size);
      int next_kept = k.token(k.at);
#pragma unroll 1
      for (bool more = true; more; c.at += kBatch) {
        int token[kBatch];
        bool pruned[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) token[i] = c.token(c.at + i);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          pruned[i] = token[i] < end && token[i] != next_kept;
          if (token[i] == next_kept) next_kept = k.token(++k.at);
        }
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          if (g >= group) break;
          float x[kBatch], best = top[g];
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            x[i] = pruned[i] ? to_float(logits[static_cast<size_t>(g) * p.capacity + c.at + i]) : -inf();
            best = fmaxf(best, x[i]);
          }
          const float from = origin(best);
          sum[g] *= exp2f((top[g] - from) * kLog2e);
#pragma unroll
          for (int i = 0; i < kBatch; ++i) sum[g] += exp2f((x[i] - from) * kLog2e);
          top[g] = best;
        }
        more = token[kBatch - 1] < end;
      }
    }
    bool some = false;
#pragma unroll
    for (int g = 0; g < kGroup; ++g) sum[g] = origin(top[g]) + logf(sum[g]), some |= sum[g] != -inf();

    int here;
    int place = before + block_exclusive_scan<kThreads>(some ? 1 : 0, s_scan, here);
    if constexpr (kCluster > 1) {
      if (threadIdx.x == 0) s_listed[parity] = here;
      C::sync();
      const int peer = lane_id() % kCluster, listed = C::read(s_listed + parity, peer);
      place += warp_sum<kCluster>(peer < rank ? listed : 0);
      here = warp_sum<kCluster>(listed);
    }
    before += here;
    if (some) {
      p.pages[static_cast<size_t>(row) * p.max_pages + place] = page;
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        if (g < group) p.log_weight[(static_cast<size_t>(row) * group + g) * p.max_pages + place] = sum[g];
      }
    }
  }
  if (rank == 0 && threadIdx.x == 0) p.counts[row] = before;
  if constexpr (kCluster > 1) C::sync();  // nobody leaves while others read its shared memory
}
