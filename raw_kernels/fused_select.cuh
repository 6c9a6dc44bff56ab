// The best pages of a row whose scores lie spread over the shared memory of a cluster: top_k.cu's rule, inside fused_decode.cu.
//
// Tiles of 16 pages are dealt out to the blocks in turn. Every block turns its scores into keys and writes them into all blocks, so that each finds the
// threshold by itself: 4 bytes a page and block, instead of a barrier of the cluster a round of the search.
#pragma once

#include "cluster.cuh"
#include "fused_scores.cuh"
#include "radix.cuh"

constexpr int kMaxCluster = 16;

template <int kThreads>
struct SelectScratch {
  uint4 ranges[kMaxCluster];  // lowest and highest key, and how many there are, of every block; or of every warp where there is one block
  uint4 mine[kThreads / kWarp];
  int result[3], scan[kThreads / kWarp];
};

// The sum of x over the threads before this one. `totals` has an int a warp; the caller's barrier comes before.
template <int kThreads>
__device__ __forceinline__ int scan_block(int x, int* totals, int& total) {
  constexpr int kWarps = kThreads / kWarp;
  int up = x;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kFullMask, up, step);
    if (lane_id() >= step) up += other;
  }
  if (lane_id() == kWarp - 1) totals[warp_id()] = up;
  __syncthreads();
  int before = up - x;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const int t = totals[w];
    before += w < warp_id() ? t : 0, total += t;
  }
  return before;
}

// The bin that holds rank `want` (1 is the largest): result gets the bin, the entries in bins above it, and its own. Empties the histogram. Barriers before and after are the caller's.
template <int kThreads>
__device__ __forceinline__ void find_rank(int* histogram, int want, int* totals, int* result) {
  static_assert(kThreads * 8 == kRadixBins, "8 bins a thread");
  int4* const mine = reinterpret_cast<int4*>(histogram) + 2 * (kThreads - 1 - threadIdx.x);  // the first thread has the highest bins
  const int4 low = mine[0], high = mine[1];
  mine[0] = mine[1] = int4{0, 0, 0, 0};
  const int count[8] = {high.w, high.z, high.y, high.x, low.w, low.z, low.y, low.x};
  int sum = 0, total;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += count[i];
  int above = scan_block<kThreads>(sum, totals, total);
  if (above < want && above + sum >= want) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (above < want && above + count[i] >= want) result[0] = kRadixBins - 1 - static_cast<int>(threadIdx.x) * 8 - i, result[1] = above, result[2] = count[i];
      above += count[i];
    }
  }
}

// Where this block's page i lies in the sequence.
__device__ __forceinline__ int global_page(const AnyCluster& cluster, int i) { return cluster.nth(i / kTile) * kTile + i % kTile; }

// Scores [group, pitch] of this block's `count` pages to keys [pages of the row] in every block, with the log of the sum of exponentials of head h in lane h of every warp: the
// sum over heads of their softmaxes (reduce 0), the sum of scores (1) or the largest (2).
template <int kThreads, int kHeads>
__device__ __forceinline__ void share_keys(const AnyCluster& cluster, SelectScratch<kThreads>& s, const float* scores, int pitch, int count, int real, int group, float2 state,
                                           int reduce, u32* keys) {
  float base[kHeads];
#pragma unroll
  for (int g = 0; g < kHeads; ++g) base[g] = __shfl_sync(kFullMask, state.x * kLog2e + __log2f(state.y), g);
  u32 low = kNaN, high = 0;
  int there = 0;
  const int padded = ceil_div(count, kTile) * kTile;
#pragma unroll 1
  for (int i = threadIdx.x; i < padded; i += kThreads) {
    u32 key = kNothing;
    const int page = global_page(cluster, i);
    if (page < real) {
      float largest = -inf(), total = 0.f, mass = 0.f;
      bool nan = false;
#pragma unroll
      for (int g = 0; g < kHeads; ++g) {
        if (g >= group) break;
        const float x = scores[g * pitch + i];
        const float share = fmaf(x, kLog2e, -base[g]);
        nan |= x != x || base[g] != base[g], largest = fmaxf(largest, reduce == 0 ? share : x), total += x;
        mass += fast_exp2(share + 100.f);
      }
      // Masses down to 2^-226 are told apart; what is below ranks by its largest head, as a negative number.
      float rank = reduce == 0 ? (mass > 0.f ? mass : largest) : reduce == 1 ? total : largest;
      key = nan || rank != rank ? kNaN : ordered_key(rank + 0.f);  // + 0.f: a zero has one key, whatever its sign
      // The newest page is taken, whatever its score; but as in the reference, a NaN beats it.
      if (page == real - 1 && key != kNaN) key = kForced;
      if (key > kNothing) ++there, low = min(low, key), high = max(high, key == kForced ? 0 : key);  // forced, it would stretch the range of the histogram
    }
    keys[page] = key;
  }
  low = __reduce_min_sync(kFullMask, low), high = __reduce_max_sync(kFullMask, high), there = __reduce_add_sync(kFullMask, there);
  uint4* const ranges = cluster.alone() ? s.ranges : s.mine;
  if (lane_id() == 0) ranges[warp_id()] = uint4{low, high, static_cast<u32>(there), 0};
  __syncthreads();
  if (cluster.alone()) return;
  if (threadIdx.x < cluster.size) {
    uint4 all{kNaN, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < kThreads / kWarp; ++w) all.x = min(all.x, s.mine[w].x), all.y = max(all.y, s.mine[w].y), all.z += s.mine[w].z;
    AnyCluster::store(AnyCluster::address(s.ranges + cluster.rank, threadIdx.x), all);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < padded / 4 << cluster.shift; i += kThreads) {  // 4 keys of one tile at a time
    const int to = cluster.owner(i), page = global_page(cluster, cluster.place(i) * 4);
    if (to != cluster.rank) AnyCluster::store(AnyCluster::address(keys + page, to), *reinterpret_cast<const uint4*>(keys + page));
  }
  cluster.sync();
}

// From the keys of all `real` pages, those of the ascending list of the best `want` that fall to this block: in turn (stride = cluster size), or a run of
// them (stride 1). `list` gets them, and `physical` their numbers by `table`. Returns how many; `taken` gets the length of the whole list. `histogram` has kRadixBins ints, all 0.
template <int kThreads>
__device__ __forceinline__ int best_pages(const AnyCluster& cluster, SelectScratch<kThreads>& s, const u32* keys, int real, int want_at_most, bool runs, int* histogram,
                                          const int* table, int* list, int* physical, int& taken) {
  constexpr int kWarps = kThreads / kWarp;
  const int lane = lane_id(), warp = warp_id();
  u32 low, high;
  {
    uint4 range{kNaN, 0, 0, 0};
    if (lane < (cluster.alone() ? kWarps : cluster.size)) range = s.ranges[lane];
    low = __reduce_min_sync(kFullMask, range.x), high = __reduce_max_sync(kFullMask, range.y);
    taken = min(want_at_most, static_cast<int>(__reduce_add_sync(kFullMask, range.z)));
  }
  // Keys above `threshold` are taken, and of those equal to it the first `equal`.
  u32 threshold = kForced - 1;
  int equal = 0;
  const bool forced = high != kNaN && keys[real - 1] == kForced;
  if (int rank = taken - forced; rank > 0) {
    int shift = max(32 - __clz(static_cast<int>(high - low)) - kRadixBits, 0);
    for (bool more = true; more;) {
#pragma unroll 2
      for (int i = threadIdx.x; i < real; i += kThreads) {
        const u32 key = keys[i];
        if (key >= low && key <= high) atomicAdd(&histogram[(key - low) >> shift], 1);
      }
      __syncthreads();
      find_rank<kThreads>(histogram, rank, s.scan, s.result);
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
    }
  }

  // In order. A warp owns a stretch of pages: it counts, the block adds up, the warp walks again and writes what is this block's.
  const int per_block = (taken + cluster.size - 1) >> cluster.shift, first = runs ? cluster.rank * per_block : cluster.rank;
  const int mine = runs ? max(min(per_block, taken - first), 0) : cluster.share(taken), stride_shift = runs ? 0 : cluster.shift;
  const int per_warp = ceil_div(ceil_div(real, kWarps), kWarp) * kWarp, begin = warp * per_warp, end = min(begin + per_warp, real);
  int counts = 0;  // above, and in the upper half equal
#pragma unroll 2
  for (int i = begin + lane; i < end; i += kWarp) {
    const u32 key = keys[i];
    counts += (key > threshold) + ((equal > 0 && key == threshold) << 16);
  }
  // 32768 entries of either kind a warp at most: a row of a million pages has 4 GB of keys.
  const int above = __reduce_add_sync(kFullMask, counts & 0xffff), same = __reduce_add_sync(kFullMask, counts >> 16);
  if (lane == 0) s.mine[warp] = uint4{static_cast<u32>(above), static_cast<u32>(same), 0, 0};
  __syncthreads();
  int before_above = 0, before_same = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const uint4 c = s.mine[w];
    if (w < warp) before_above += c.x, before_same += c.y;
  }
  const u32 lower = (1u << lane) - 1;
#pragma unroll 2
  for (int i0 = begin; i0 < end; i0 += kWarp) {
    const int i = i0 + lane;
    const u32 key = i < end ? keys[i] : 0;
    const u32 is_above = __ballot_sync(kFullMask, key > threshold);
    const u32 is_same = equal > 0 ? __ballot_sync(kFullMask, i < end && key == threshold) : 0;
    const int same_rank = before_same + __popc(is_same & lower);
    const int at = before_above + __popc(is_above & lower) + min(same_rank, equal) - first, slot = at >> stride_shift;
    const bool in = (is_above >> lane & 1 || (is_same >> lane & 1 && same_rank < equal)) && at >= 0 && slot < mine && slot << stride_shift == at;
    if (in) list[slot] = i, physical[slot] = table[i];
    before_above += __popc(is_above), before_same += __popc(is_same);
  }
  return mine;
}
