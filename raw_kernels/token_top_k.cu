// Top-k over long rows: what top_k.cu does for pages, for the scores of tokens, 8 thousand to a million of them, in halves or floats.
//
// A team of blocks works on one (sequence, kv head), each on a slice: a cluster of up to 16, or, without clusters, blocks that meet at counters in global
// memory, launched together. Many rows get small teams and several blocks a multiprocessor, so that one's reading hides another's barriers; few rows
// get large teams. A block reads its slice of the group's scores once (twice if it must find the log-sum-exp of each head itself), and keeps a 32-bit
// key an entry in shared memory (or, if there are too many, in a workspace).
//
// The log of a sum of softmaxes costs an exponential a head and a logarithm, and special functions are what this kernel would be bound by. The sum itself ranks alike,
// and a positive float is its own key; only that it is 0 some 85 nats below the head's mass. If the rank that is asked for lies there, keys are
// made again from logarithms.
//
// The key of rank `count` is found by histograms of 2048 bins, as in top_k.cu, but every block keeps its own. It adds up 64 sums of 32 bins before the barrier; after it
// a warp of every block reads the sums of all blocks, and of the 32 bins in question theirs: 96 words a block, not 2048. Two histograms take turns, so
// that a round costs one barrier of the team. Sums of linear keys need no minimum and maximum: 16 bins a power of two cover all of them.
// Integer atomics only, and every block comes to the same result: the order of none of them matters.
// Floor: sizeof(Score) * group bytes an entry and kv head, and 4 bytes an entry selected: 8 + 1 at G=4 and a quarter of the tokens.
#include "cluster.cuh"
#include "radix.cuh"
#include "threshold.cuh"

struct TokenTopKParams {
  const void* scores;  // [b, Hq, n]
  const float* lse;    // [b, Hq], the log-sum-exp of each head's logits, or null
  const int* counts;   // [b, Hkv]
  const int* seq_lens;  // [b]
  int* indices;        // [b, Hkv, capacity]
  int* lengths;        // [b, Hkv]
  u32* keys;           // [b, Hkv, n rounded up to 8], if they are not kept in shared memory
  void* exchange;      // [b, Hkv, blocks] Exchange, and counters [b, Hkv, 3] at zero: of teams without clusters
  u32* counters;
  float scale_log2e;   // what turns scores into logits in base 2
  int reduce;          // 0 softmax, 1 sum, 2 max
  int force_newest;
  int kv_heads;
  int group;           // up to 16
  int n;
  int capacity;
  int granularity;     // tokens an entry stands for
};
CHECK_PARAMS(TokenTopKParams);

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxGroup = 16;
constexpr int kCoarse = 64, kFine = kRadixBins / kCoarse;
constexpr u32 kTiny = 0x02000000u;  // 2^-123, the least sum that is ranked as it is
constexpr int kLinearShift = 19;    // from there to 2^5 in 2048 bins of 1/16 of a power of two; there are sums up to 16
constexpr int kOrderedShift = 32 - kRadixBits;
constexpr u32 kTooSmall = 1;        // the key of an entry whose sum is less; of no entry at all: 0

// What a block lets the others of its team see.
struct Exchange {
  int histogram[2][kRadixBins];
  int coarse[2][kCoarse];
  float head_max[kMaxGroup], head_sum[kMaxGroup];
  int there;         // entries to rank
  int above, same;   // entries above the threshold, and equal to it
};

// The blocks of a row. kGlobal: without clusters; what is shared is copied out to global memory.
template <bool kGlobal>
struct Team : AnyCluster {
  __device__ Team(const TokenTopKParams&, Exchange* shared, int) : shared(shared) {}
  template <typename T>
  __device__ void publish(const T*, int) const {}
  template <typename T>
  __device__ T read(const T* local, int at) const {
    return alone() ? *local : AnyCluster::read(local, at);
  }
  __device__ void leave() const { sync(); }  // a block that leaves takes its shared memory along
  Exchange* shared;
};
template <>
struct Team<true> {
  int size, rank;
  Exchange *shared, *all;
  u32* counters;  // arrived, generation, left

  __device__ Team(const TokenTopKParams& p, Exchange* shared, int row)
      : size(gridDim.x), rank(blockIdx.x), shared(shared), all(static_cast<Exchange*>(p.exchange) + static_cast<size_t>(row) * gridDim.x),
        counters(p.counters + 3 * row) {}
  // The 32-bit words of `local`, after a barrier of the block. Visible to the team after the next `sync`.
  template <typename T>
  __device__ void publish(const T* local, int words) const {
    const int first = reinterpret_cast<const int*>(local) - reinterpret_cast<const int*>(shared);
    for (int i = threadIdx.x; i < words; i += blockDim.x) reinterpret_cast<int*>(all + rank)[first + i] = reinterpret_cast<const int*>(local)[i];
  }
  template <typename T>
  __device__ T read(const T* local, int at) const {
    const int first = reinterpret_cast<const int*>(local) - reinterpret_cast<const int*>(shared);
    const u32 word = load_l2(reinterpret_cast<const u32*>(all + at) + first);
    return *reinterpret_cast<const T*>(&word);
  }
  __device__ void sync() const {
    __syncthreads();
    if (threadIdx.x == 0) {
      const u32 before = load_l2(counters + 1);
      __threadfence();
      if (atomicInc(counters, size - 1) == size - 1) {
        atomicAdd(counters + 1, 1u);
      } else {
        while (load_l2(counters + 1) == before) {}
      }
      __threadfence();
    }
    __syncthreads();
  }
  __device__ void leave() const {  // the last one puts the generation back to zero; nobody waits for it any more
    if (threadIdx.x == 0 && atomicInc(counters + 2, size - 1) == size - 1) counters[1] = 0;
  }
};

// Score: half or float. kGlobal: the kind of team. kShared: keys in shared memory, 4 bytes an entry of the block's slice, rounded up to 8 entries.
template <typename Score, bool kGlobal, bool kShared>
__global__ void __launch_bounds__(kThreads, kGlobal ? 1 : 2) token_top_k(const __grid_constant__ TokenTopKParams p) {
  __shared__ Exchange s;
  __shared__ float s_lse[kMaxGroup];
  __shared__ int s_result[4], s_above[kWarps], s_same[kWarps], s_there;
  extern __shared__ __align__(16) u32 s_keys[];
  // Of warps, maxima and sums: where keys will lie. Two blocks of 16384 entries then take less than 164 KB, which leaves L1, where loads wait, 92 KB instead of 60.
  __shared__ float s_own[kShared ? 1 : 2 * kMaxGroup * kWarps];
  float* const s_max = kShared ? reinterpret_cast<float*>(s_keys) : s_own;
  float* const s_sum = s_max + kMaxGroup * kWarps;

  const int row = blockIdx.y, group = p.group;
  const Team<kGlobal> team(p, &s, row);
  const int lane = lane_id(), warp = warp_id();
  const int real = min(ceil_div(p.seq_lens[row / p.kv_heads], p.granularity), p.n);
  const int slice = ceil_div(real, team.size * 8) * 8, first = min(team.rank * slice, real), size = min(slice, real - first);
  const int chunks = ceil_div(size, 8);
  const Score* const scores = static_cast<const Score*>(p.scores) + static_cast<long long>(row) * group * p.n + first;
  u32* const keys = kShared ? s_keys : p.keys + static_cast<long long>(row) * (ceil_div(p.n, 8) * 8) + first;
  const int whole_chunks = p.n % 8 == 0 ? size / 8 : 0;  // 16-byte loads
  const auto load = [&](int g, int chunk) {
    const Score* const from = scores + static_cast<long long>(g) * p.n + chunk * 8;
    Chunk<Score> x;
    if (chunk < whole_chunks) x.load(from);
    else x.load_some(from, size - chunk * 8);
    return x;
  };

  for (int i = threadIdx.x; i < 2 * kRadixBins; i += kThreads) (&s.histogram[0][0])[i] = 0;
  if (threadIdx.x == 0) s_there = 0, s_result[3] = min(p.counts[row], p.capacity);

  // 1. The log-sum-exp of each head, in base 2. Warps are dealt out to the heads: warp w takes head w % group, and its share of that head's chunks.
  if (p.reduce == 0) {
    if (p.lse != nullptr) {
      if (threadIdx.x < group) s_lse[threadIdx.x] = p.lse[row * group + threadIdx.x] * kLog2e;
    } else {
      const int shares = kWarps / group, g = warp % group, share = warp / group;
      float largest = -inf(), sum = 0.f;
      constexpr int kBatch = 8 / sizeof(Score);
#pragma unroll 1
      for (int c0 = share * kWarp + lane; share < shares && c0 < chunks; c0 += shares * kWarp * kBatch) {
        Chunk<Score> x[kBatch];
        float m = largest;
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (const int c = c0 + k * shares * kWarp; c < chunks) x[k] = load(g, c);
          else x[k].load_some(scores, 0);
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) m = fmaxf(m, x[k].max() * p.scale_log2e);
        const float base = finite(m);
        sum *= exp2f(finite(largest) - base);
#pragma unroll
        for (int k = 0; k < kBatch; ++k)
#pragma unroll
          for (int i = 0; i < 8; ++i) sum += exp2f(fmaf(x[k][i], p.scale_log2e, -base));
        largest = m;
      }
      const float m = warp_max(largest);
      sum = warp_sum(sum * exp2f(finite(largest) - finite(m)));
      if (lane == 0 && share < shares) s_max[g * kWarps + share] = m, s_sum[g * kWarps + share] = sum;
      __syncthreads();
      for (int h = warp; h < group; h += kWarps) {
        const float of_share = lane < shares ? s_max[h * kWarps + lane] : -inf(), top = warp_max(of_share);
        const float total = warp_sum(lane < shares ? s_sum[h * kWarps + lane] * exp2f(finite(of_share) - finite(top)) : 0.f);
        if (lane == 0) s.head_max[h] = top, s.head_sum[h] = total;
      }
      __syncthreads();
      team.publish(s.head_max, 2 * kMaxGroup);
      team.sync();
      for (int h = warp; h < group; h += kWarps) {
        const float of_block = lane < team.size ? team.read(s.head_max + h, lane) : -inf(), top = warp_max(of_block);
        const float total = warp_sum(lane < team.size ? team.read(s.head_sum + h, lane) * exp2f(finite(of_block) - finite(top)) : 0.f);
        if (lane == 0) s_lse[h] = finite(top) + log2f(total);
      }
    }
  }
  __syncthreads();
  // A head without scores adds nothing: 2^(-inf - 0).
  if (p.reduce == 0 && threadIdx.x < group && s_lse[threadIdx.x] == -inf()) s_lse[threadIdx.x] = 0.f;
  __syncthreads();

  // 2. Keys, and the first histogram. Both return how many entries this thread has found that can be ranked.
  const int forced = p.force_newest ? real - 1 - first : -1;  // the entry that is taken whatever its score
  const auto make_linear_keys = [&](u32 histogram) {
    constexpr int kAtOnce = 8 / sizeof(Score);  // heads whose scores are under way together
    int there = 0;
#pragma unroll 1
    for (int c = threadIdx.x; c < chunks; c += kThreads) {
      float w[8] = {};
#pragma unroll 1
      for (int g0 = 0; g0 < group; g0 += kAtOnce) {
        Chunk<Score> x[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
          if (g0 + k < group) x[k] = load(g0 + k, c);
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          if (g0 + k >= group) break;
          const float lse = s_lse[g0 + k];
#pragma unroll
          for (int i = 0; i < 8; ++i) w[i] += exp2f(fmaf(x[k][i], p.scale_log2e, -lse));
        }
      }
      u32 key[8];
      bool plain = forced >> 3 != c;  // no sum is too small, or NaN
#pragma unroll
      for (int i = 0; i < 8; ++i) key[i] = __float_as_uint(w[i]), plain &= w[i] >= __uint_as_float(kTiny);
      if (plain) {
        there += 8;
#pragma unroll
        for (int i = 0; i < 8; ++i) count_shared(histogram + 4 * ((key[i] >> kLinearShift) - (kTiny >> kLinearShift)));
      } else {
        u32 some = forced >> 3 == c ? 1u << (forced & 7) : 0;  // entries that are there: a head has scored them
#pragma unroll 1
        for (int g = 0; g < group; ++g) {
          const Chunk<Score> x = load(g, c);
#pragma unroll
          for (int i = 0; i < 8; ++i) some |= (x[i] != -inf() ? 1u : 0u) << i;
        }
        there += __popc(some);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (!(w[i] >= __uint_as_float(kTiny))) key[i] = w[i] != w[i] ? kNaN : some >> i & kTooSmall;
          if (forced == c * 8 + i) key[i] = kForced;
          if (key[i] >= kTiny) count_shared(histogram + 4 * min((key[i] - kTiny) >> kLinearShift, kRadixBins - 1u));
        }
      }
      store16(keys + c * 8, make_uint4(key[0], key[1], key[2], key[3])), store16(keys + c * 8 + 4, make_uint4(key[4], key[5], key[6], key[7]));
    }
    return there;
  };
  const auto make_ordered_keys = [&](u32 histogram) {
    int there = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < size; i += kThreads) {
      const auto score = [&](int g) {
        const float x = to_float(scores[static_cast<long long>(g) * p.n + i]);
        return p.reduce == 0 && x != -inf() ? fmaf(x, p.scale_log2e, -s_lse[g]) : x;
      };
      float largest = -inf(), total = 0.f;
      bool nan = false;
#pragma unroll 2
      for (int g = 0; g < group; ++g) {
        const float x = score(g);
        nan |= x != x, largest = fmaxf(largest, x), total += x;
      }
      if (p.reduce == 0 && largest != -inf()) {
        float sum = 0.f;
#pragma unroll 2
        for (int g = 0; g < group; ++g) sum += exp2f(score(g) - largest);
        total = largest + log2f(sum);
      } else if (p.reduce != 1) {
        total = largest;
      }
      // + 0.f: a zero has one key, whatever its sign.
      const u32 key = i == forced ? kForced : nan || total != total ? kNaN : ordered_key(total + 0.f);
      keys[i] = key;
      if (key > kNothing) ++there, count_shared(histogram + 4 * ((key - kNothing - 1) >> kOrderedShift));
    }
    return there;
  };

  // 3. Keys above `threshold` are taken, and of those equal to it the first `equal`. Every block finds the same.
  u32 threshold = ~0u, low = 0, high = ~0u;
  int equal = 0, want = 0, rank = 0, shift = 0;
  bool linear = p.reduce == 0;
  for (int round = 0, made = 0; round >= 0; ++round) {
    const int turn = round & 1;
    int* const histogram = s.histogram[turn];
    const u32 bins = smem_address(histogram);
    if (!made) {
      shift = linear ? kLinearShift : kOrderedShift, low = linear ? kTiny : kNothing + 1, high = ~0u;
      const int there = __reduce_add_sync(kFullMask, linear ? make_linear_keys(bins) : make_ordered_keys(bins));
      if (lane == 0 && round == 0) atomicAdd(&s_there, there);
    } else {
      if (round > 1) {  // the histogram of the round before the last: everybody has read it
        for (int i = threadIdx.x; i < kRadixBins; i += kThreads) histogram[i] = 0;
        __syncthreads();
      }
      for (int i = threadIdx.x; i < size; i += kThreads) {
        const u32 key = keys[i];
        if (key >= low && key <= high) count_shared(bins + 4 * ((key - low) >> shift));
      }
    }
    __syncthreads();
    for (int i = warp; i < kCoarse; i += kWarps) {
      const int sum = __reduce_add_sync(kFullMask, histogram[i * kFine + lane]);
      if (lane == 0) s.coarse[turn][i] = sum;
    }
    if (threadIdx.x == 0 && round == 0) s.there = s_there;
    if constexpr (kGlobal) {
      __syncthreads();
      team.publish(histogram, kRadixBins), team.publish(s.coarse[turn], kCoarse), team.publish(&s.there, 1);
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
      if (round == 0) want = min(s_result[3], warp_sum(lane < team.size ? team.read(&s.there, lane) : 0));
      const int left = !made ? want : rank;
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
      __syncwarp();  // every lane has read s_result[3]
      if (lane == 0) s_result[0] = bin, s_result[1] = above, s_result[2] = own, s_result[3] = want;
    }
    __syncthreads();
    const int bin = s_result[0], own = s_result[2];
    want = s_result[3];
    if (want == 0) break;
    if (bin < 0) {  // it lies where sums are too small
      linear = false;
      continue;
    }
    rank = (made ? rank : want) - s_result[1];
    low += static_cast<u32>(bin) << shift;
    if (!(linear && !made && bin == kRadixBins - 1)) high = low + min(high - low, (1u << shift) - 1);
    made = 1;
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

  // 4. In order. A warp owns a stretch of the slice: it counts, the team adds up, the warp walks again and writes.
  const int per_warp = ceil_div(ceil_div(size, kWarps), kWarp) * kWarp, begin = min(warp * per_warp, size), end = min(begin + per_warp, size);
  int above = 0, same = 0;
#pragma unroll 4
  for (int i = begin + lane; i < end; i += kWarp) {
    const u32 key = keys[i];
    above += key > threshold, same += equal > 0 && key == threshold;
  }
  above = __reduce_add_sync(kFullMask, above), same = __reduce_add_sync(kFullMask, same);
  if (lane == 0) s_above[warp] = above, s_same[warp] = same;
  __syncthreads();
  const int of_above = lane < kWarps ? s_above[lane] : 0, of_same = lane < kWarps ? s_same[lane] : 0;
  above = __reduce_add_sync(kFullMask, lane < warp ? of_above : 0), same = __reduce_add_sync(kFullMask, lane < warp ? of_same : 0);
  if (warp == 0) {
    const int all_above = __reduce_add_sync(kFullMask, of_above), all_same = __reduce_add_sync(kFullMask, of_same);
    if (lane == 0) s.above = all_above, s.same = all_same;
  }
  if constexpr (kGlobal) __syncthreads();
  team.publish(&s.above, 2);
  team.sync();
  const bool earlier = lane < team.rank;  // blocks before this one
  above += __reduce_add_sync(kFullMask, earlier ? team.read(&s.above, lane) : 0);
  same += __reduce_add_sync(kFullMask, earlier ? team.read(&s.same, lane) : 0);
  int* const out = p.indices + static_cast<long long>(row) * p.capacity;
  if (want > 0) {
    const u32 before_me = (1u << lane) - 1;
#pragma unroll 2
    for (int i0 = begin; i0 < end; i0 += kWarp) {
      const int i = i0 + lane;
      const u32 key = i < end ? keys[i] : 0;
      const u32 is_above = __ballot_sync(kFullMask, i < end && key > threshold);
      const u32 is_same = equal ? __ballot_sync(kFullMask, i < end && key == threshold) : 0;
      const int same_rank = same + __popc(is_same & before_me);
      const int at = above + __popc(is_above & before_me) + min(same_rank, equal);
      if (is_above >> lane & 1 || (is_same >> lane & 1 && same_rank < equal)) out[at] = first + i;
      above += __popc(is_above), same += __popc(is_same);
    }
  }
  for (int i = want + team.rank * kThreads + threadIdx.x; i < p.capacity; i += team.size * kThreads) out[i] = 0;
  if (threadIdx.x == 0 && team.rank == 0) p.lengths[row] = want;
  team.leave();
}
