// Top-k: the best `count` of n entries of each kv head, after its query heads' scores are combined, as an ascending list.
//
// For pages: up to 8192 entries a row. token_top_k.cu is for more.
// A block selects for one (sequence, kv head). It reads the group's scores twice, from L2 where the kernel before has left them: once for the log-sum-exp
// of each head, once to combine them (the log of the sum of their softmaxes) into 32-bit keys in the order of the scores, which stay in shared memory. The key of rank `count` is then found by histograms of 2048 bins in shared memory, the first over the range between the smallest and
// the largest key, the next over the bin that holds the rank: one or two rounds, at most three. One more walk writes the indices in order.
// Integer atomics only: the result does not depend on their order.
// Floor: 4 * group bytes an entry and kv head, read from L2. What costs is latency: two trips to L2 and about 12 block barriers.
#include "radix.cuh"

struct TopKParams {
  const float* scores;   // [b, Hq, n]
  const int* counts;     // [b, Hkv]
  const int* seq_lens;   // [b]
  int* indices;          // [b, Hkv, capacity]
  int* lengths;          // [b, Hkv]
  float scale_log2e;     // what turns scores into logits in base 2
  int reduce;            // 0 softmax, 1 sum, 2 max
  int force_newest;
  int kv_heads;
  int group;
  int n;
  int capacity;
  int granularity;  // tokens an entry stands for
};
CHECK_PARAMS(TopKParams);

constexpr int kMaxGroup = 16;

// Entries: how many entries a thread keeps in registers between the two readings, for n up to Threads * Entries; 0 reads the scores twice.
template <int Threads, int Group, int Entries>
__global__ void __launch_bounds__(Threads, Threads == 512 && Entries > 0 && Group < 8 ? 2 : 1) top_k(const __grid_constant__ TopKParams p) {
  constexpr int kWarps = Threads / kWarp;
  constexpr int kGroup = Group ? Group : kMaxGroup;  // Group 0: any number of heads up to 16
  __shared__ int s_histogram[kRadixBins];
  __shared__ int s_result[3], s_scratch[kWarps + 1], s_scratch2[kWarps + 1];
  __shared__ u32 s_low[kWarps], s_high[kWarps];
  __shared__ float s_max[kGroup][kWarps], s_sum[kGroup][kWarps], s_lse[kGroup];
  extern __shared__ __align__(16) u32 s_keys[];

  const int row = blockIdx.x, batch = row / p.kv_heads;
  const int group = Group ? Group : p.group;
  const int real = min(ceil_div(p.seq_lens[batch], p.granularity), p.n);
  const int want_at_most = min(p.counts[row], p.capacity);
  const float* scores = p.scores + static_cast<long long>(row) * group * p.n;
  const int lane = lane_id(), warp = uniform_warp_id();

  for (int i = threadIdx.x; i < kRadixBins; i += Threads) s_histogram[i] = 0;

  // 1. The log-sum-exp of each head, in base 2.
  // With Entries, all of the scores are in flight at once: one trip to L2.
  constexpr int kKept = Entries > 0 ? Entries : 1;
  float kept[kGroup][kKept];
  if constexpr (Entries > 0) {
#pragma unroll
    for (int g = 0; g < kGroup; ++g)
#pragma unroll
      for (int e = 0; e < Entries; ++e) {
        const int i = e * Threads + threadIdx.x;
        kept[g][e] = i < real ? scores[static_cast<long long>(g) * p.n + i] : -inf();
      }
  }
  if (p.reduce == 0) {
    // Otherwise warps are dealt out to the heads: warp w of W takes head w % group, and its share of that head's entries. Warps beyond a
    // multiple of `group` rest.
    const int g = warp % group, share = warp / group, shares = Entries > 0 ? kWarps : kWarps / group;
    if constexpr (Entries > 0) {
#pragma unroll
      for (int h = 0; h < kGroup; ++h) {
        float largest = -inf(), sum = 0.f;
#pragma unroll
        for (int e = 0; e < Entries; ++e) largest = fmaxf(largest, kept[h][e]);
        const float m = warp_max(largest) * p.scale_log2e;
#pragma unroll
        for (int e = 0; e < Entries; ++e) sum += exp2f(fmaf(kept[h][e], p.scale_log2e, -finite(m)));
        sum = warp_sum(sum);
        if (lane == 0) s_max[h][warp] = m, s_sum[h][warp] = sum;
      }
    } else
    if (share < shares) {
      float largest = -inf(), sum = 0.f;
      const float* head = scores + static_cast<long long>(g) * p.n;
      constexpr int kBatch = 8;
      const int stride = shares * kWarp;
      for (int i = share * kWarp + lane; i < real; i += stride * kBatch) {
        float x[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) x[k] = i + k * stride < real ? head[i + k * stride] * p.scale_log2e : -inf();
        float m = largest;
#pragma unroll
        for (int k = 0; k < kBatch; ++k) m = fmaxf(m, x[k]);
        const float base = finite(m);
        sum *= exp2f(finite(largest) - base);
#pragma unroll
        for (int k = 0; k < kBatch; ++k) sum += exp2f(x[k] - base);
        largest = m;
      }
      const float m = warp_max(largest);
      sum = warp_sum(sum * exp2f(finite(largest) - finite(m)));
      if (lane == 0) s_max[g][share] = m, s_sum[g][share] = sum;
    }
    __syncthreads();
    for (int h = warp; h < group; h += kWarps) {
      const float m = lane < shares ? s_max[h][lane] : -inf(), base = finite(warp_max(m));
      const float sum = warp_sum(lane < shares ? s_sum[h][lane] * exp2f(finite(m) - base) : 0.f);
      if (lane == 0) s_lse[h] = base + log2f(sum);
    }
  }
  __syncthreads();

  // 2. Combine. The newest entry, if it is forced, is left out of the ranking.
  int there = 0;  // entries to rank
  u32 low = kNaN, high = 0;
  const bool force = p.force_newest && real > 0;
  const auto rank_entry = [&](int i, float (&x)[kGroup]) {
    float largest = -inf(), total = 0.f;
    bool nan = false;
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      if (g >= group) break;
      if (p.reduce == 0 && x[g] != -inf()) x[g] = fmaf(x[g], p.scale_log2e, -s_lse[g]);
      nan |= x[g] != x[g], largest = fmaxf(largest, x[g]), total += x[g];
    }
    if (p.reduce == 2) {
      total = largest;
    } else if (p.reduce == 0) {
      // In logs: a softmax is 0 a hundred below the maximum, and among zeros there is no order to select by.
      total = largest;
      if (Group != 1 && largest != -inf()) {
        float sum = 0.f;
#pragma unroll
        for (int g = 0; g < kGroup; ++g) sum += g < group ? exp2f(x[g] - largest) : 0.f;
        total = largest + log2f(sum);
      }
    }
    // + 0.f: a zero has one key, whatever its sign.
    u32 key = nan || total != total ? kNaN : ordered_key(total + 0.f);
    if (force && i == real - 1) {
      key = kForced;
    } else if (key > kNothing) {
      ++there, low = min(low, key), high = max(high, key);
    }
    s_keys[i] = key;
  };
  if constexpr (Entries > 0) {
#pragma unroll
    for (int e = 0; e < Entries; ++e) {
      float x[kGroup];
#pragma unroll
      for (int g = 0; g < kGroup; ++g) x[g] = kept[g][e];
      if (const int i = e * Threads + threadIdx.x; i < real) rank_entry(i, x);
    }
  } else {
#pragma unroll 2
    for (int i = threadIdx.x; i < real; i += Threads) {
      float x[kGroup];
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        x[g] = -inf();
        if (g < group) x[g] = scores[static_cast<long long>(g) * p.n + i];
      }
      rank_entry(i, x);
    }
  }
  there = __reduce_add_sync(kFullMask, there), low = __reduce_min_sync(kFullMask, low), high = __reduce_max_sync(kFullMask, high);
  if (lane == 0) s_scratch[warp] = there, s_low[warp] = low, s_high[warp] = high;
  __syncthreads();  // publishes the keys as well
  there = __reduce_add_sync(kFullMask, lane < kWarps ? s_scratch[lane] : 0);
  low = __reduce_min_sync(kFullMask, lane < kWarps ? s_low[lane] : kNaN);
  high = __reduce_max_sync(kFullMask, lane < kWarps ? s_high[lane] : 0);
  // As in the reference, a NaN beats the forced entry.
  const bool ranked = force && high == kNaN;
  if (ranked) ++there, low = min(low, kForced);
  const int forced = force && !ranked;
  const int want = min(want_at_most, there + forced);

  // 3. Keys above `threshold` are taken, and of those equal to it the first `equal`.
  u32 threshold = kForced - 1;
  int equal = 0;
  if (int rank = want - forced; rank > 0) {
    int shift = max(32 - __clz(static_cast<int>(high - low)) - kRadixBits, 0);
    for (bool more = true; more;) {
      // Every key in [low, high] counts, by its distance from `low`.
      for (int i = threadIdx.x; i < real; i += Threads) {
        const u32 key = s_keys[i];
        if (key >= low && key <= high && (ranked || key != kForced)) atomicAdd(&s_histogram[(key - low) >> shift], 1);
      }
      __syncthreads();
      find_bin<Threads>(s_histogram, rank, s_scratch, s_result);
      __syncthreads();
      rank -= s_result[1];
      low += static_cast<u32>(s_result[0]) << shift;
      high = low + min(high - low, (1u << shift) - 1);
      if (s_result[2] == rank) {  // all of the bin
        threshold = low - 1, more = false;
      } else if (shift == 0) {
        threshold = low, equal = rank, more = false;
      } else {
        shift = max(shift - kRadixBits, 0);
      }
    }
  }

  // 4. In order. A warp owns a stretch of entries: it counts, the block adds up, the warp walks again and writes.
  const int per_warp = ceil_div(ceil_div(real, kWarps), kWarp) * kWarp, begin = warp * per_warp, end = min(begin + per_warp, real);
  int above = 0, same = 0;
  for (int i = begin + lane; i < end; i += kWarp) {
    const u32 key = s_keys[i];
    above += key > threshold, same += equal > 0 && key == threshold;
  }
  above = warp_sum(above), same = warp_sum(same);
  __syncthreads();
  if (lane == 0) s_scratch[warp] = above, s_scratch2[warp] = same;
  __syncthreads();
  const int a = lane < kWarps ? s_scratch[lane] : 0, e = lane < kWarps ? s_scratch2[lane] : 0;
  int before_above = warp_sum(lane < warp ? a : 0), before_same = warp_sum(lane < warp ? e : 0);
  int* out = p.indices + static_cast<long long>(row) * p.capacity;
  if (want > 0) {
    const u32 lower = (1u << lane) - 1;
    for (int i0 = begin; i0 < end; i0 += kWarp) {
      const int i = i0 + lane;
      const u32 key = i < end ? s_keys[i] : 0;
      const u32 is_above = __ballot_sync(kFullMask, i < end && key > threshold);
      const u32 is_same = __ballot_sync(kFullMask, i < end && key == threshold);
      const int same_rank = before_same + __popc(is_same & lower);
      const int at = before_above + __popc(is_above & lower) + min(same_rank, equal);
      if (is_above >> lane & 1 || (is_same >> lane & 1 && same_rank < equal)) out[at] = i;
      before_above += __popc(is_above), before_same += __popc(is_same);
    }
  }
  for (int i = want + threadIdx.x; i < p.capacity; i += Threads) out[i] = 0;
  if (threadIdx.x == 0) p.lengths[row] = want;
}
