// The best pages of a row whose scores lie spread over the shared memory of a cluster: top_k.cu's rule, inside fused_decode.cu.
//
// Every block turns its share of the scores into keys and writes them into all blocks, so that each finds the threshold by itself: 4 bytes
// a page and block, instead of a barrier a round of the search.
#pragma once

#include "cluster.cuh"
#include "radix.cuh"

constexpr int kMaxCluster = 16;

template <int kThreads, int kMaxHeads>
struct SelectScratch {
  float top[kMaxHeads][kThreads / kWarp], sum[kMaxHeads][kThreads / kWarp];
  float2 part[kMaxHeads];  // maximum and sum of this block, read by the others
  float lse[kMaxHeads];
  int result[3], scan[kThreads / kWarp + 1], scan_same[kThreads / kWarp];
  u32 low[kThreads / kWarp], high[kThreads / kWarp];
};

// 1. Scores [group, pitch] of this block's `count` pages, the first of which is page `first`, to keys [all pages] in every block: the log of the sum over heads
// of their softmaxes (reduce 0), the sum of scores (1) or the largest (2).
template <int kThreads, int kMaxHeads>
__device__ __forceinline__ void combine_heads(const AnyCluster& cluster, SelectScratch<kThreads, kMaxHeads>& s, const float* scores, int pitch, int count, int first,
                                              int group, float scale_log2, int reduce, u32* keys) {
  constexpr int kWarps = kThreads / kWarp;
  const int lane = lane_id(), warp = warp_id();
  if (reduce == 0) {
    // Warps are dealt out to the heads: warp w takes head w % group, and its share of that head's pages. Warps beyond a multiple of `group` rest.
    const int g = warp % group, share = warp / group, shares = kWarps / group;
    if (share < shares) {
      const float* const head = scores + g * pitch;
      float largest = -inf(), sum = 0.f;
      for (int i = share * kWarp + lane; i < count; i += shares * kWarp) largest = fmaxf(largest, head[i]);
      largest = warp_max(largest) * scale_log2;
      for (int i = share * kWarp + lane; i < count; i += shares * kWarp) sum += exp2f(fmaf(head[i], scale_log2, -finite(largest)));
      sum = warp_sum(sum);
      if (lane == 0) s.top[g][share] = largest, s.sum[g][share] = sum;
    }
    __syncthreads();
    if (threadIdx.x < group) {
      float top = -inf(), sum = 0.f;
      for (int i = 0; i < shares; ++i) top = fmaxf(top, s.top[threadIdx.x][i]);
      for (int i = 0; i < shares; ++i) sum += s.sum[threadIdx.x][i] * exp2f(finite(s.top[threadIdx.x][i]) - finite(top));
      s.part[threadIdx.x] = make_float2(top, sum);
    }
    cluster.sync();
    for (int h = warp; h < group; h += kWarps) {
      const float2 part = lane < cluster.size ? AnyCluster::read2(AnyCluster::address(s.part + h, lane)) : make_float2(-inf(), 0.f);
      const float base = finite(warp_max(part.x));
      const float sum = warp_sum(lane < cluster.size ? part.y * exp2f(finite(part.x) - base) : 0.f);
      if (lane == 0) s.lse[h] = base + log2f(sum);
    }
    __syncthreads();
  } else {
    cluster.sync();  // nobody writes into a block that has not begun
  }
  for (int i = threadIdx.x; i < count; i += kThreads) {
    float x[kMaxHeads], largest = -inf(), total = 0.f;
    bool nan = false;
#pragma unroll
    for (int g = 0; g < kMaxHeads; ++g) {
      x[g] = -inf();
      if (g < group) {
        x[g] = scores[g * pitch + i];
        if (reduce == 0 && x[g] != -inf()) x[g] = fmaf(x[g], scale_log2, -s.lse[g]);
        nan |= x[g] != x[g], largest = fmaxf(largest, x[g]), total += x[g];
      }
    }
    if (reduce == 2) total = largest;
    if (reduce == 0) {
      // In logs: a softmax is 0 a hundred below the maximum, and among zeros there is no order to select by.
      total = largest;
      if (group > 1 && largest != -inf()) {
        float sum = 0.f;
#pragma unroll
        for (int g = 0; g < kMaxHeads; ++g) sum += g < group ? exp2f(x[g] - largest) : 0.f;
        total = largest + log2f(sum);
      }
    }
    const u32 key = nan || total != total ? kNaN : ordered_key(total + 0.f);  // + 0.f: a zero has one key, whatever its sign
    for (u32 r = 0; r < cluster.size; ++r) AnyCluster::store(AnyCluster::address(keys + first + i, r), key);
  }
  cluster.sync();
}

// 2. From the keys of all `real` pages, the newest of which is taken whatever its key, the entries of the ascending list of the best `want` that
// fall to this block: equal shares, rank after rank. Returns how many those are; `taken` gets the length of the whole list, `before` where the share begins. `histogram`
// has kRadixBins ints. The caller's barrier comes before and after.
template <int kThreads, int kMaxHeads>
__device__ __forceinline__ int best_pages(const AnyCluster& cluster, SelectScratch<kThreads, kMaxHeads>& s, u32* keys, int real, int want_at_most, int* histogram, int* list,
                                          int& taken, int& before) {
  constexpr int kWarps = kThreads / kWarp;
  const int lane = lane_id(), warp = warp_id();
  if (threadIdx.x == 0) {
    // As in the reference, a NaN beats the forced page.
    if (keys[real - 1] != kNaN) keys[real - 1] = kForced;
  }
  for (int i = threadIdx.x; i < kRadixBins; i += kThreads) histogram[i] = 0;
  __syncthreads();
  int there = 0;
  u32 low = kNaN, high = 0;  // the forced page lies far above the others: it would stretch the range of the histogram, so it stays out
  for (int i = threadIdx.x; i < real; i += kThreads) {
    const u32 key = keys[i];
    if (key <= kNothing) continue;
    ++there, low = min(low, key), high = max(high, key == kForced ? 0 : key);
  }
  there = __reduce_add_sync(kFullMask, there), low = __reduce_min_sync(kFullMask, low), high = __reduce_max_sync(kFullMask, high);
  if (lane == 0) s.scan[warp] = there, s.low[warp] = low, s.high[warp] = high;
  __syncthreads();
  there = __reduce_add_sync(kFullMask, lane < kWarps ? s.scan[lane] : 0);
  low = __reduce_min_sync(kFullMask, lane < kWarps ? s.low[lane] : kNaN);
  high = __reduce_max_sync(kFullMask, lane < kWarps ? s.high[lane] : 0);
  const int want = taken = min(want_at_most, there);

  // Keys above `threshold` are taken, and of those equal to it the first `equal`.
  u32 threshold = kForced - 1;
  int equal = 0;
  const bool forced = high != kNaN && keys[real - 1] == kForced;
  if (int rank = want - forced; rank > 0) {
    int shift = max(32 - __clz(static_cast<int>(high - low)) - kRadixBits, 0);
    for (bool more = true; more;) {
      for (int i = threadIdx.x; i < real; i += kThreads) {
        const u32 key = keys[i];
        if (key >= low && key <= high) atomicAdd(&histogram[(key - low) >> shift], 1);
      }
      __syncthreads();
      find_bin<kThreads>(histogram, rank, s.scan, s.result);
      __syncthreads();
      rank -= s.result[1];
      low += static_cast<u32>(s.result[0]) << shift;
      high = low + min(high - low, (1u << shift) - 1);
      if (s.result[2] == rank) {  // all of the bin
        threshold = low - 1, more = false;
      } else if (shift == 0) {
        threshold = low, equal = rank, more = false;
      } else {
        shift = max(shift - kRadixBits, 0);
      }
      __syncthreads();
    }
  }

  // In order. A warp owns a stretch of pages: it counts, the block adds up, the warp walks again and writes what is this block's.
  const int per_block = ceil_div(want, static_cast<int>(cluster.size));
  const int first = min(static_cast<int>(cluster.rank) * per_block, want), last = min(first + per_block, want);
  before = first;
  const int per_warp = ceil_div(ceil_div(real, kWarps), kWarp) * kWarp, begin = warp * per_warp, end = min(begin + per_warp, real);
  int above = 0, same = 0;
  for (int i = begin + lane; i < end; i += kWarp) {
    const u32 key = keys[i];
    above += key > threshold, same += equal > 0 && key == threshold;
  }
  above = __reduce_add_sync(kFullMask, above), same = __reduce_add_sync(kFullMask, same);
  if (lane == 0) s.scan[warp] = above, s.scan_same[warp] = same;
  __syncthreads();
  int before_above = __reduce_add_sync(kFullMask, lane < warp ? s.scan[lane] : 0);
  int before_same = __reduce_add_sync(kFullMask, lane < warp ? s.scan_same[lane] : 0);
  const u32 lower = (1u << lane) - 1;
  for (int i0 = begin; i0 < end && want > 0; i0 += kWarp) {
    const int i = i0 + lane;
    const u32 key = i < end ? keys[i] : 0;
    const u32 is_above = __ballot_sync(kFullMask, i < end && key > threshold);
    const u32 is_same = __ballot_sync(kFullMask, equal > 0 && i < end && key == threshold);
    const int same_rank = before_same + __popc(is_same & lower);
    const int at = before_above + __popc(is_above & lower) + min(same_rank, equal);
    if ((is_above >> lane & 1 || (is_same >> lane & 1 && same_rank < equal)) && at >= first && at < last) list[at - first] = i;
    before_above += __popc(is_above), before_same += __popc(is_same);
  }
  return last - first;
}
