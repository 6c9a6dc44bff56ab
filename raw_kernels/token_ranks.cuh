// Ranking the tokens of a row by their scores: keys, the threshold, and the list. What token_top_k.cu and label_top_k.cu share.
//
// A team of blocks works on one (sequence, kv head), each on a slice: a cluster of up to 16, or, without clusters, blocks that meet at counters in global
// memory, launched together. A block keeps a 32-bit key an entry.
//
// The log of a sum of softmaxes costs an exponential a head and a logarithm, and special functions are what ranking would be bound by. The sum itself ranks alike,
// and a positive float is its own key; only that it is 0 some 85 nats below the head's mass. If the rank that is asked for lies there, keys are
// made again from logarithms.
//
// The key of rank `count` is found by histograms of 2048 bins, as in top_k.cu, but every block keeps its own. It adds up 64 sums of 32 bins before the barrier; after it
// a warp of every block reads the sums of all blocks, and of the 32 bins in question theirs: 96 words a block, not 2048. Two histograms take turns, so
// that a round costs one barrier of the team. Sums of linear keys need no minimum and maximum: 16 bins a power of two cover all of them.
// Integer atomics only, and every block comes to the same result: the order of none of them matters.
#pragma once

#include "threshold.cuh"
#include "token_team.cuh"

constexpr u32 kTiny = 0x02000000u;  // 2^-123, the least sum that is ranked as it is
constexpr int kLinearShift = 19;    // from there to 2^5 in 2048 bins of 1/16 of a power of two; there are sums up to 16, and above where a log-sum-exp is of other roundings
constexpr int kOrderedShift = 32 - kRadixBits;
constexpr u32 kTooSmall = 1;        // the key of an entry whose sum is less; of no entry at all: 0

// Keys of 8 neighbours.
struct Keys8 {
  uint4 a, b;
  __device__ __forceinline__ u32 operator[](int i) const {
    const uint4& v = i < 4 ? a : b;
    return i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
  }
};

// What a block needs besides.
template <int kThreads>
struct RankScratch {
  int result[4], above[kThreads / kWarp], same[kThreads / kWarp], there[2];
};

// A row, and this block's slice of it.
struct Ranked {
  int reduce;         // 0 softmax, 1 sum, 2 max
  float scale_log2e;  // what turns scores into logits in base 2
  int group;          // up to 16
  int first, size;    // of the slice
  int forced;         // the entry of the slice that is taken whatever its score, or -1
  int row;
  int capacity;
  int* indices;       // [rows, capacity]
  int* lengths;       // [rows]
};

// Before anything else, `count` being how many to take; the caller's barrier comes after.
template <int kThreads>
__device__ __forceinline__ void clear_ranks(Exchange& s, RankScratch<kThreads>& scratch, int count) {
  for (int i = threadIdx.x; i < 2 * kRadixBins; i += kThreads) (&s.histogram[0][0])[i] = 0;
  if (threadIdx.x == 0) scratch.there[0] = scratch.there[1] = 0, scratch.result[3] = max(count, 0);
}

// The log-sum-exp of each head, in base 2, of what every block has put into head_max and head_sum. A head without scores gets 0 and adds nothing: 2^(-inf - 0).
template <int kThreads, typename TeamOf>
__device__ __forceinline__ void join_heads(const TeamOf& team, const Exchange& s, int group, float* lse) {
  const int lane = lane_id();
  for (int h = warp_id(); h < group; h += kThreads / kWarp) {
    const float of_block = lane < team.size ? team.read(s.head_max + h, lane) : -inf(), top = warp_max(of_block);
    const float total = warp_sum(lane < team.size ? team.read(s.head_sum + h, lane) * exp2f(finite(of_block) - finite(top)) : 0.f);
    const float log = finite(top) + log2f(total);
    if (lane == 0) lse[h] = log == -inf() ? 0.f : log;
  }
}

// `load(head, chunk)` gives the scores of 8 entries, `keys` keeps 8 keys and gives them back, `store(chunk, keys)` and `load(chunk)`. They may lie where the scores do, as a thread has
// read those of a chunk when it writes its keys. `lse` of each head, in base 2, is looked at for softmax. Begins and ends without a barrier. Returns whether the list is written: if not, the
// rank lies where sums of softmaxes are too small, and the caller comes `again`, with the same scores.
template <int kThreads, typename TeamOf, typename Load, typename Keys>
__device__ __forceinline__ bool rank_tokens(const Ranked& row, const TeamOf& team, Exchange& s, RankScratch<kThreads>& scratch, const float* lse, const Load& load, const Keys& keys,
                                            bool again) {
  constexpr int kWarps = kThreads / kWarp;
  const int size = row.size, chunks = ceil_div(size, 8), group = row.group, forced = row.forced;

  // 1. Keys, and the first histogram. Both return how many entries this thread has found that can be ranked.
  const auto make_linear_keys = [&](u32 histogram) {
    using Scores = decltype(load(0, 0));
    constexpr int kAtOnce = 64 / sizeof(Scores);  // heads whose scores are under way together
    int there = 0;
#pragma unroll 1
    for (int c = threadIdx.x; c < chunks; c += kThreads) {
      float w[8] = {};
#pragma unroll 1
      for (int g0 = 0; g0 < group; g0 += kAtOnce) {
        Scores x[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
          if (g0 + k < group) x[k] = load(g0 + k, c);
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          if (g0 + k >= group) break;
          const float base = lse[g0 + k];
#pragma unroll
          for (int i = 0; i < 8; ++i) w[i] += fast_exp2(fmaf(x[k][i], row.scale_log2e, -base));
        }
      }
      u32 key[8];
      bool plain = forced >> 3 != c;  // no sum is too small, or NaN
#pragma unroll
      for (int i = 0; i < 8; ++i) key[i] = __float_as_uint(w[i]), plain &= w[i] >= __uint_as_float(kTiny);
      if (plain) {
        there += 8;
#pragma unroll
        for (int i = 0; i < 8; ++i) count_shared(histogram + 4 * min((key[i] - kTiny) >> kLinearShift, kRadixBins - 1u));
      } else {
        u32 some = forced >> 3 == c ? 1u << (forced & 7) : 0;  // entries that are there: a head has scored them
#pragma unroll 1
        for (int g = 0; g < group; ++g) {
          const Scores x = load(g, c);
#pragma unroll
          for (int i = 0; i < 8; ++i) some |= (x[i] != -inf() ? 1u : 0u) << i;
        }
        there += __popc(some);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          // Where no head has a score there is nothing, whatever the log-sum-exp.
          if (!(w[i] >= __uint_as_float(kTiny))) key[i] = w[i] != w[i] && (some >> i & 1) ? kNaN : some >> i & kTooSmall;
          if (forced == c * 8 + i) key[i] = kForced;
          if (key[i] >= kTiny) count_shared(histogram + 4 * min((key[i] - kTiny) >> kLinearShift, kRadixBins - 1u));
        }
      }
      keys.store(c, Keys8{make_uint4(key[0], key[1], key[2], key[3]), make_uint4(key[4], key[5], key[6], key[7])});
    }
    return there;
  };
  const auto make_ordered_keys = [&](u32 histogram) {
    int there = 0;
#pragma unroll 1
    for (int c = threadIdx.x; c < chunks; c += kThreads) {
      const auto logit = [&](float x, int g) {
        if (row.reduce != 0 || x == -inf()) return x;
        const float y = fmaf(x, row.scale_log2e, -lse[g]);
        return y == -inf() && lse[g] < inf() ? finite(y) : y;  // a score as low as floats go is one
      };
      u32 key[8];
#pragma unroll
      for (int i0 = 0; i0 < 8; i0 += 4) {  // all at once would not fit 64 registers
        float largest[4], total[4];
        u32 nan = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) largest[i] = -inf(), total[i] = 0.f;
#pragma unroll 1
        for (int g = 0; g < group; ++g) {
          const auto scores = load(g, c);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float x = logit(scores[i0 + i], g);
            nan |= (x != x ? 1u : 0u) << i, largest[i] = fmaxf(largest[i], x), total[i] += x;
          }
        }
        if (row.reduce == 0) {
#pragma unroll
          for (int i = 0; i < 4; ++i) total[i] = 0.f;
#pragma unroll 1
          for (int g = 0; g < group; ++g) {
            const auto scores = load(g, c);
#pragma unroll
            for (int i = 0; i < 4; ++i) total[i] += largest[i] == -inf() ? 0.f : exp2f(logit(scores[i0 + i], g) - largest[i]);
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (row.reduce == 0 && largest[i] != -inf()) total[i] = largest[i] + log2f(total[i]);
          else if (row.reduce != 1) total[i] = largest[i];
          const int at = c * 8 + i0 + i;
          // + 0.f: a zero has one key, whatever its sign.
          key[i0 + i] = forced == at ? kForced : nan >> i & 1 || total[i] != total[i] ? kNaN : ordered_key(total[i] + 0.f);
          if (at < size && key[i0 + i] > kNothing) ++there, count_shared(histogram + 4 * ((key[i0 + i] - kNothing - 1) >> kOrderedShift));
        }
      }
      keys.store(c, Keys8{make_uint4(key[0], key[1], key[2], key[3]), make_uint4(key[4], key[5], key[6], key[7])});
    }
    return there;
  };

  // 2. Keys above `threshold` are taken, and of those equal to it the first `equal`. Every block finds the same.
  const bool linear = row.reduce == 0 && !again;
  {  // ahead of the loop, whose variables need no registers then
    const u32 bins = smem_address(s.histogram[again]);
    const int there = __reduce_add_sync(kFullMask, linear ? make_linear_keys(bins) : make_ordered_keys(bins));
    if (lane_id() == 0) atomicAdd(&scratch.there[again], there);
  }
  const int lane = fresh(lane_id()), warp = fresh_thread() / kWarp;
  u32 threshold = ~0u, low = linear ? kTiny : kNothing + 1, high = ~0u;
  int equal = 0, want = 0, rank = 0, shift = linear ? kLinearShift : kOrderedShift;
  for (int round = again;; ++round) {
    const int turn = round & 1;
    const bool first = round == again;
    int* const histogram = s.histogram[turn];
    if (!first) {
      if (round > 1) {  // the histogram of the round before the last: everybody has read it
        for (int i = threadIdx.x; i < kRadixBins; i += kThreads) histogram[i] = 0;
        __syncthreads();
      }
      const u32 bins = smem_address(histogram);
#pragma unroll 1
      for (int c = threadIdx.x; c < chunks; c += kThreads) {  // what lies behind the slice's end is in no range
        const Keys8 key = keys.load(c);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (key[i] - low <= high - low) count_shared(bins + 4 * ((key[i] - low) >> shift));
      }
    }
    __syncthreads();
    for (int i = warp; i < kCoarse; i += kWarps) {
      const int sum = __reduce_add_sync(kFullMask, histogram[i * kFine + lane]);
      if (lane == 0) s.coarse[turn][i] = sum;
    }
    if (threadIdx.x == 0 && first) s.there[again] = scratch.there[again];
    if constexpr (TeamOf::kApart) {
      __syncthreads();
      team.publish(histogram, kRadixBins), team.publish(s.coarse[turn], kCoarse), team.publish(s.there + again, 1);
    }
    team.sync();
    if (warp == 0) {
      // Descending: a lane has two of the 64 sums, then one of the 32 bins.
      const auto over_team = [&](const int* word) {
        int sum = 0;
#pragma unroll 4
        for (int r = 0; r < team.size; ++r) sum += team.read(word, r);
        return sum;
      };
      want = scratch.result[3];
      if (first) want = min(want, warp_sum(lane < team.size ? team.read(s.there + again, lane) : 0));
      const int left = first ? want : rank;
      const int upper = over_team(s.coarse[turn] + kCoarse - 1 - 2 * lane), lower = over_team(s.coarse[turn] + kCoarse - 2 - 2 * lane);
      const int up_to = warp_inclusive_scan(upper + lower), before = up_to - upper - lower;
      const u32 found = __ballot_sync(kFullMask, before < left && left <= up_to);
      int bin = -1, above = 0, own = 0;
      if (found) {
        const int source = __ffs(found) - 1;
        const bool second = left > before + upper;
        const int coarse = __shfl_sync(kFullMask, kCoarse - 1 - 2 * lane - second, source);
        above = __shfl_sync(kFullMask, second ? before + upper : before, source);
        const int mine = over_team(histogram + coarse * kFine + kFine - 1 - lane), sum = warp_inclusive_scan(mine) + above;
        const int at = __ffs(__ballot_sync(kFullMask, sum - mine < left && left <= sum)) - 1;
        bin = coarse * kFine + kFine - 1 - at, above = __shfl_sync(kFullMask, sum - mine, at), own = __shfl_sync(kFullMask, mine, at);
      }
      __syncwarp();  // every lane has read scratch.result[3]
      if (lane == 0) scratch.result[0] = bin, scratch.result[1] = above, scratch.result[2] = own, scratch.result[3] = want;
    }
    __syncthreads();
    const int bin = scratch.result[0], own = scratch.result[2];
    want = scratch.result[3];
    if (want == 0) break;
    if (bin < 0) return false;
    rank = (first ? want : rank) - scratch.result[1];
    low += static_cast<u32>(bin) << shift;
    if (!(linear && first && bin == kRadixBins - 1)) high = low + min(high - low, (1u << shift) - 1);
    if (own == rank) {  // all of the bin
      threshold = low - 1;
      break;
    }
    if (shift == 0) {
      threshold = low, equal = rank;
      break;
    }
    shift = max(32 - __clz(static_cast<int>(high - low)) - kRadixBits, 0);
  }

  // 3. In order. A warp owns a stretch of the slice, a lane 8 neighbours at a time: it counts, the team adds up, the warp walks again and writes. One key a lane and a ballot for 32 of them
  // were 53 of the 118 instructions that a warp took for 32 entries of 4 heads.
  const int per_warp = ceil_div(chunks, kWarps), begin = min(warp * per_warp, chunks), end = min(begin + per_warp, chunks);
  const auto mark = [&](int c, u32& over, u32& ties) {  // a bit for each of a chunk; entries behind the slice's end are neither
    over = ties = 0;
    if (c >= end) return;
    const Keys8 key = keys.load(c);
#pragma unroll
    for (int i = 0; i < 8; ++i) over |= (key[i] > threshold ? 1u : 0u) << i;
    if (equal == 0) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) ties |= (key[i] == threshold ? 1u : 0u) << i;
  };
  int above = 0, same = 0;
#pragma unroll 1
  for (int c = begin + lane; c < end; c += kWarp) {
    u32 over, ties;
    mark(c, over, ties);
    above += __popc(over), same += __popc(ties);
  }
  above = __reduce_add_sync(kFullMask, above), same = __reduce_add_sync(kFullMask, same);
  if (lane == 0) scratch.above[warp] = above, scratch.same[warp] = same;
  __syncthreads();
  const int of_above = lane < kWarps ? scratch.above[lane] : 0, of_same = lane < kWarps ? scratch.same[lane] : 0;
  above = __reduce_add_sync(kFullMask, lane < warp ? of_above : 0), same = __reduce_add_sync(kFullMask, lane < warp ? of_same : 0);
  if (warp == 0) {
    const int all_above = __reduce_add_sync(kFullMask, of_above), all_same = __reduce_add_sync(kFullMask, of_same);
    if (lane == 0) s.above = all_above, s.same = all_same;
  }
  if constexpr (TeamOf::kApart) __syncthreads();
  team.publish(&s.above, 2);
  team.sync();
  const bool earlier = lane < team.rank;  // blocks before this one
  above += __reduce_add_sync(kFullMask, earlier ? team.read(&s.above, lane) : 0);
  same += __reduce_add_sync(kFullMask, earlier ? team.read(&s.same, lane) : 0);
  if (want > 0) {
    static_assert(2 * kRadixBins >= kWarps * kWarp * 8, "room for what a warp takes at a time");
    int* const taken = s.histogram[0] + warp * kWarp * 8;  // of no more use: everybody has come to the barrier
    int* out = row.indices + static_cast<size_t>(row.row) * row.capacity + above + min(same, equal);
#pragma unroll 1
    for (int c0 = begin; c0 < end; c0 += kWarp) {
      u32 marks, ties;
      mark(c0 + lane, marks, ties);
      if (equal > 0) {  // the first ones, of the whole row
        const int mine = __popc(ties), up_to = warp_inclusive_scan(mine), left = equal - (same + up_to - mine);
        while (ties && __popc(ties) > left) ties ^= 0x80000000u >> __clz(static_cast<int>(ties));
        same += __shfl_sync(kFullMask, up_to, kWarp - 1), marks |= ties;
      }
      const int mine = __popc(marks), up_to = warp_inclusive_scan(mine), all = __shfl_sync(kFullMask, up_to, kWarp - 1);
      int* at = taken + up_to - mine;
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (marks >> i & 1) *at++ = row.first + (c0 + lane) * 8 + i;
      __syncwarp();
      for (int k = lane; k < all; k += kWarp) out[k] = taken[k];
      __syncwarp();
      out += all;
    }
  }
  for (int i = want + team.rank * kThreads + threadIdx.x; i < row.capacity; i += team.size * kThreads) row.indices[static_cast<size_t>(row.row) * row.capacity + i] = 0;
  if (threadIdx.x == 0 && team.rank == 0) row.lengths[row.row] = want;
  return true;
}
