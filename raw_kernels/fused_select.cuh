// The best pages of a row whose scores lie spread over the shared memory of a cluster: top_k.cu's rule, inside fused_decode.cu.
//
// Tiles of 16 pages are dealt out to the blocks in turn. Every block turns its scores into keys and writes them into all blocks, so that each finds the
// threshold by itself: 4 bytes a page and block, instead of a barrier of the cluster a round of the search.
#pragma once

#include "cluster.cuh"
#include "fused_scores.cuh"
#include "radix.cuh"

constexpr int kMaxCluster = 16;

// What a block is sent, by exchange; see `AnyCluster::send`.
struct Mail {
  u64 scores;   // maxima and sums of the pages' scores
  u64 keys;     // keys of pages, and their ranges
  u64 logits;   // maxima and sums of the logits
  u64 bins;     // histograms of the heads that this block owns
  u64 finer;    // those of the bins that hold their cuts
  u64 cuts;     // what is kept of each head
  u64 tally;    // how many tokens p keeps
  u64 mass;     // to block 0: the mass that a head keeps whose cut has moved
  u64 results;  // what was attended to; to block 0 also how many tokens are kept
};
constexpr int kMails = sizeof(Mail) / sizeof(u64);

template <int kThreads>
struct SelectScratch {
  uint4 ranges[kMaxCluster];  // lowest and highest key, and how many there are, of every block; or of every warp where there is one block. Then keys of one bin
  int result[3], scan[kThreads / kWarp];
  int wanted;  // how many are to be taken: kept here while the pages are scored, as no register is free then
  int found;   // keys that the last bin holds
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
  const int warp = uniform_warp_id();
  if (lane_id() == kWarp - 1) totals[warp] = up;
  __syncthreads();
  int before = up - x;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const int t = totals[w];
    before += w < warp ? t : 0, total += t;
  }
  return before;
}

// The bin that holds rank `want` (1 is the largest): result gets the bin, the entries in bins above it, and its own. Empties the histogram. Barriers before and after are the caller's.
template <int kThreads>
__device__ __forceinline__ void find_rank(int* histogram, int want, int* totals, int* result) {
  constexpr int kEach = kRadixBins / kThreads;
  static_assert(kEach % 4 == 0, "four bins at a time");
  int4* const mine = reinterpret_cast<int4*>(histogram) + kEach / 4 * (kThreads - 1 - threadIdx.x);  // the first thread has the highest bins
  int count[kEach], sum = 0, total;
#pragma unroll
  for (int i = 0; i < kEach; i += 4) {
    const int4 four = mine[kEach / 4 - 1 - i / 4];
    mine[kEach / 4 - 1 - i / 4] = int4{0, 0, 0, 0};
    count[i] = four.w, count[i + 1] = four.z, count[i + 2] = four.y, count[i + 3] = four.x;
    sum += four.x + four.y + four.z + four.w;
  }
  int above = scan_block<kThreads>(sum, totals, total);
  if (above < want && above + sum >= want) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (above < want && above + count[i] >= want) result[0] = kRadixBins - 1 - static_cast<int>(threadIdx.x) * kEach - i, result[1] = above, result[2] = count[i];
      above += count[i];
    }
  }
}

// Where this block's page i lies in the sequence.
__device__ __forceinline__ int global_page(const AnyCluster& cluster, int i) { return cluster.nth(i / kTile) * kTile + i % kTile; }

// Scores [group, pitch] of this block's `count` pages to keys [pages of the row] in every block, with the log of the sum of exponentials of head h in lane h of every warp: the
// sum over heads of their softmaxes (reduce 0), the sum of scores (1) or the largest (2). `of_warps` has room for a uint4 of each.
template <int kThreads, int kHeads>
__device__ __forceinline__ void share_keys(const AnyCluster& cluster, SelectScratch<kThreads>& s, uint4* of_warps, const float* scores, int pitch, int count, int real, int group,
                                           float2 state, int reduce, u32* keys, Mail& mail) {
  float base[kHeads];
#pragma unroll
  for (int g = 0; g < kHeads; ++g) base[g] = __shfl_sync(kFullMask, state.x * kLog2e + __log2f(state.y), g);
  u32 low = kNaN, high = 0;
  int there = 0;
  const int padded = ceil_div(count, kTile) * kTile;
#pragma unroll 1
  for (int i = fresh_thread(); i < padded; i += kThreads) {
    float largest = -inf(), total = 0.f;
    bool nan = false;
    if (reduce == 0) {
#pragma unroll
      for (int g = 0; g < kHeads; ++g) {
        if (g >= group) break;
        const float share = fmaf(scores[g * pitch + i], kLog2e, 100.f - base[g]);
        largest = fmaxf(largest, share), total += fast_exp2(share);
      }
      // Masses down to 2^-226 are told apart; what is below ranks by its largest head, as a negative number. A NaN makes the total one.
      if (total == 0.f) total = largest;
    } else {
#pragma unroll
      for (int g = 0; g < kHeads; ++g) {
        if (g >= group) break;
        const float x = scores[g * pitch + i];
        nan |= x != x, largest = fmaxf(largest, x), total += x;
      }
      if (reduce == 2) total = nan ? __uint_as_float(kNaN) : largest;  // not by the sum: infinities of both signs make that a NaN
    }
    const int page = global_page(cluster, i);
    u32 key = total != total ? kNaN : ordered_key(total + 0.f);  // + 0.f: a zero has one key, whatever its sign
    // The newest page is taken, whatever its score; but as in the reference, a NaN beats it. Forced, it would stretch the range of the histogram.
    if (page == real - 1 && key != kNaN) ++there, key = kForced;
    else if (page >= real) key = kNothing;
    else if (key > kNothing) ++there, low = min(low, key), high = max(high, key);
    keys[page] = key;
  }
  low = __reduce_min_sync(kFullMask, low), high = __reduce_max_sync(kFullMask, high), there = __reduce_add_sync(kFullMask, there);
  uint4* const ranges = cluster.alone() ? s.ranges : of_warps;
  if (lane_id() == 0) ranges[warp_id()] = uint4{low, high, static_cast<u32>(there), 0};
  __syncthreads();
  if (cluster.alone()) return;
  if (threadIdx.x < cluster.size) {
    uint4 all{kNaN, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < kThreads / kWarp; ++w) all.x = min(all.x, of_warps[w].x), all.y = max(all.y, of_warps[w].y), all.z += of_warps[w].z;
    cluster.send(s.ranges + cluster.rank, threadIdx.x, all, &mail.keys);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < padded / 4 << cluster.shift; i += kThreads) {  // 4 keys of one tile at a time
    const int to = cluster.owner(i), page = global_page(cluster, cluster.place(i) * 4);
    if (to != cluster.rank) cluster.send(reinterpret_cast<uint4*>(keys + page), to, *reinterpret_cast<const uint4*>(keys + page), &mail.keys);
  }
  cluster.await(&mail.keys);
}

// From the keys of all `real` pages, those of the ascending list of the best `s.wanted` that fall to this block: in turn (stride = cluster size), or a run of
// them (stride 1). `list` gets them, and `physical` their numbers by `table`, or by `numbers` where a block that is alone has them. Returns how many, complete after the caller's barrier; `taken` gets the length of the whole list. `histogram` has kRadixBins ints, all 0.
template <int kThreads>
__device__ __forceinline__ int best_pages(const AnyCluster& cluster, SelectScratch<kThreads>& s, const u32* keys, int real, bool runs, int* histogram,
                                          const int* numbers, const int* table, int* list, int* physical, int& taken) {
  constexpr int kWarps = kThreads / kWarp;
  const int lane = lane_id(), warp = uniform_warp_id();
  u32 low, high;
  {
    uint4 range{kNaN, 0, 0, 0};
    if (lane < (cluster.alone() ? kWarps : cluster.size)) range = s.ranges[lane];
    low = __reduce_min_sync(kFullMask, range.x), high = __reduce_max_sync(kFullMask, range.y);
    taken = min(s.wanted, static_cast<int>(__reduce_add_sync(kFullMask, range.z)));
  }
  // Keys above `threshold` are taken, and of those equal to it the first `equal`.
  u32 threshold = kForced - 1;
  int equal = 0;
  u32* const few = reinterpret_cast<u32*>(s.ranges);  // which everybody has read by the next barrier
  const bool forced = high != kNaN && keys[real - 1] == kForced;
  // Beside a NaN the newest page is one of those to be ranked: below it, above all others.
  if (high == kNaN && keys[real - 1] == kForced) low = min(low, kForced);
  if (int rank = taken - forced; rank > 0) {
    int shift = max(32 - __clz(static_cast<int>(high - low)) - kRadixBits, 0);
    for (bool more = true; more;) {
#pragma unroll 1
      for (int i = threadIdx.x * 4; i < real; i += kThreads * 4) {  // keys go on to a multiple of 16, with what is in no range
        const uint4 four = load16(keys + i);
        const u32 key[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (key[j] >= low && key[j] <= high) atomicAdd(&histogram[(key[j] - low) >> shift], 1);
        }
      }
      __syncthreads();
      if (threadIdx.x == 0) s.found = 0;
      find_rank<kThreads>(histogram, rank, s.scan, s.result);
      __syncthreads();
      rank -= s.result[1];
      low += static_cast<u32>(s.result[0]) << shift;
      high = low + min(high - low, (1u << shift) - 1);
      if (s.result[2] == rank) {  // all of the bin
        threshold = low - 1, more = false;
      } else if (shift == 0) {
        threshold = low, equal = rank, more = false;
      } else if (s.result[2] <= kWarp) {  // a lane for each; another round takes four times as long
#pragma unroll 1
        for (int i = threadIdx.x * 4; i < real; i += kThreads * 4) {
          const uint4 four = load16(keys + i);
          const u32 key[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (key[j] >= low && key[j] <= high) few[atomicAdd(&s.found, 1)] = key[j];
          }
        }
        __syncthreads();
        const int count = s.result[2];
        const u32 mine = few[lane];
        int above = 0, same = 0;
#pragma unroll 1
        for (int j = 0; j < count; ++j) {
          const u32 other = __shfl_sync(kFullMask, mine, j);
          above += other > mine, same += other == mine;
        }
        const int at = __ffs(__ballot_sync(kFullMask, lane < count && above < rank && above + same >= rank)) - 1;
        threshold = __shfl_sync(kFullMask, mine, at), equal = rank - __shfl_sync(kFullMask, above, at), more = false;
      } else {
        shift = max(shift - kRadixBits, 0);
      }
    }
  }

  static_assert(kWarps <= kMaxCluster, "`ranges` has one of either");
  // In order: a run of 8 pages a thread.
  const int per_block = (taken + cluster.size - 1) >> cluster.shift, first = runs ? cluster.rank * per_block : cluster.rank;
  const int mine = runs ? max(min(per_block, taken - first), 0) : cluster.share(taken), stride_shift = runs ? 0 : cluster.shift;
  int at = 0, same_rank = 0;
#pragma unroll 1
  for (int begin = 0; begin < real; begin += kThreads * 8) {
    const int i = begin + threadIdx.x * 8;
    u32 key[8] = {};
    if (i < real) {  // keys go on to a multiple of 16
      const uint4 a = load16(keys + i), b = load16(keys + i + 4);
      key[0] = a.x, key[1] = a.y, key[2] = a.z, key[3] = a.w, key[4] = b.x, key[5] = b.y, key[6] = b.z, key[7] = b.w;
    }
    int counts = 0;  // above, and in the upper half equal: 4096 of either at most; keys of what is not there are above no threshold
#pragma unroll
    for (int j = 0; j < 8; ++j) counts += (key[j] > threshold) + ((equal > 0 && key[j] == threshold) << 16);
    int total;
    const int before = scan_block<kThreads>(counts, s.scan, total);
    int above = at + (before & 0xffff) - first, same = same_rank + (before >> 16);
    at += total & 0xffff, same_rank += total >> 16;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const bool is_above = key[j] > threshold, is_same = equal > 0 && key[j] == threshold;
      const int rank = above + min(same, equal), slot = rank >> stride_shift;  // negative ones are no slot
      if ((is_above || (is_same && same < equal)) && static_cast<u32>(slot) < static_cast<u32>(mine) && slot << stride_shift == rank) list[slot] = i + j;
      above += is_above, same += is_same;
    }
    __syncthreads();
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < mine; i += kThreads) {
    if (numbers) physical[i] = numbers[list[i]];
    else cp_async4(physical + i, table + list[i]);
  }
  cp_async_commit(), cp_async_wait<0>();
  return mine;
}
