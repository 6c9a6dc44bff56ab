// Top-k over long rows: what top_k.cu does for pages, for the scores of tokens, 8 thousand to a million of them, in halves or floats.
//
// Blocks of a row divide it, see token_ranks.cuh. Many rows get small teams and several blocks a multiprocessor, so that one's reading hides another's barriers; few rows
// get large teams. A block reads its slice of the group's scores once (twice if it must find the log-sum-exp of each head itself), and keeps its keys
// in shared memory (or, if there are too many, in a workspace).
// Floor: sizeof(Score) * group bytes an entry and kv head, and 4 bytes an entry selected: 8 + 1 at G=4 and a quarter of the tokens.
#include "token_ranks.cuh"

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

// Keys one after another.
struct PlainKeys {
  u32* keys;
  __device__ __forceinline__ void store(int chunk, const Keys8& x) const { store16(keys + chunk * 8, x.a), store16(keys + chunk * 8 + 4, x.b); }
  __device__ __forceinline__ Keys8 load(int chunk) const { return {load16(keys + chunk * 8), load16(keys + chunk * 8 + 4)}; }
};

// Score: half or float. kGlobal: the kind of team. kShared: keys in shared memory, 4 bytes an entry of the block's slice, rounded up to 8 entries.
template <typename Score, bool kGlobal, bool kShared>
__global__ void __launch_bounds__(kThreads, kGlobal ? 1 : 2) token_top_k(const __grid_constant__ TokenTopKParams p) {
  __shared__ Exchange s;
  __shared__ float s_lse[kMaxGroup];
  __shared__ RankScratch<kThreads> s_ranks;
  extern __shared__ __align__(16) u32 s_keys[];
  // Of warps, maxima and sums: where keys will lie. Two blocks of 16384 entries then take less than 164 KB, which leaves L1, where loads wait, 92 KB instead of 60.
  __shared__ float s_own[kShared ? 1 : 2 * kMaxGroup * kWarps];
  float* const s_max = kShared ? reinterpret_cast<float*>(s_keys) : s_own;
  float* const s_sum = s_max + kMaxGroup * kWarps;

  const int row = blockIdx.y, group = p.group;
  const auto team = [&] {
    if constexpr (kGlobal) return Team<true>(&s, p.exchange, p.counters, row);
    else return Team<false>();
  }();
  const int lane = lane_id(), warp = warp_id();
  const int real = min(ceil_div(p.seq_lens[row / p.kv_heads], p.granularity), p.n);
  const int slice = ceil_div(real, team.size * 8) * 8, first = min(team.rank * slice, real), size = min(slice, real - first);
  const int chunks = ceil_div(size, 8);
  const Score* const scores = static_cast<const Score*>(p.scores) + static_cast<long long>(row) * group * p.n + first;
  u32* const keys = kShared ? s_keys : p.keys + static_cast<long long>(row) * (ceil_div(p.n, 8) * 8) + first;
  const int whole_chunks = p.n % 8 == 0 ? size / 8 : 0;  // 16-byte loads
  const auto load = [&](int g, int chunk) {
    const Score* const from = scores + static_cast<u32>(g * p.n + chunk * 8);  // the scores of a group are fewer than 2^32
    Chunk<Score> x;
    if (chunk < whole_chunks) x.load(from);
    else x.load_some(from, size - chunk * 8);
    return x;
  };

  clear_ranks(s, s_ranks, min(p.counts[row], p.capacity));

  // 1. The log-sum-exp of each head, in base 2. Warps are dealt out to the heads: warp w takes head w % group, and its share of that head's chunks.
  if (p.reduce == 0) {
    if (p.lse != nullptr) {
      if (threadIdx.x < group) {
        const float known = p.lse[row * group + threadIdx.x] * kLog2e;
        s_lse[threadIdx.x] = known == -inf() ? 0.f : known;
      }
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
          for (int i = 0; i < 8; ++i) sum += fast_exp2(fmaf(x[k][i], p.scale_log2e, -base));
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
      join_heads<kThreads>(team, s, group, s_lse);
    }
  }
  __syncthreads();

  // 2. Keys, the threshold, and the list.
  const Ranked ranked{p.reduce, p.scale_log2e, group, first, size, p.force_newest ? real - 1 - first : -1, row, p.capacity, p.indices, p.lengths};
  for (bool again = false; !rank_tokens(ranked, team, s, s_ranks, s_lse, load, PlainKeys{keys}, again);) again = true;
  team.leave();
}
