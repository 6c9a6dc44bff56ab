// The tokens whose labels score highest (Double Sparsity) in one launch: what label_scores.cu and token_top_k.cu do one after the other.
//
// Apart, the scores of all query heads are written and read again, 4 bytes each, where a label of 16 channels in 4 bits has 12 bytes for all heads of a group; and at small batches
// half of the time is what the blocks of label_scores.cu take to put the log-sum-exp of a row together. Here a cluster has a (sequence, kv head), and each of its blocks
// scores a slice of the tokens, into shared memory; keys take the place of the scores, see token_ranks.cuh. If the rank that is asked for lies where
// sums of softmaxes are 0, the slice is scored again.
// A block takes a multiprocessor to itself, and some 30 us for 16 thousand tokens, of which reading labels is 6: nothing hides its barriers and searches. So this is for rows that run
// all at once; of more, label_scores.cu and token_top_k.cu have several blocks a multiprocessor, and take 204 us at b=64, 32k, where this takes 218.
// Floor: r * bits / 8 + 4 bytes a token and kv head, and 4 bytes a token selected: 12 + 1 at r=16 in 4 bits and a quarter of the tokens.
#include "label_stream.cuh"
#include "token_ranks.cuh"

struct LabelTopKParams {
  LabelSource source;
  const int* counts;  // [b, Hkv]
  int* indices;       // [b, Hkv, capacity]
  int* lengths;       // [b, Hkv]
  int reduce;         // 0 softmax, 1 sum, 2 max
  int force_newest;
  int capacity;
  int pitch;          // of a head's scores in shared memory
};
CHECK_PARAMS(LabelTopKParams);

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

// Where the scores of the first two heads were: of 8 keys, 4 in each row.
struct SplitKeys {
  u32* words;
  int pitch;
  __device__ __forceinline__ void store(int chunk, const Keys8& x) const { store16(words + chunk * 4, x.a), store16(words + pitch + chunk * 4, x.b); }
  __device__ __forceinline__ Keys8 load(int chunk) const { return {load16(words + chunk * 4), load16(words + pitch + chunk * 4)}; }
};

// Dynamic shared memory: scores [max(group, 2), pitch] in halves.
template <typename Label, int R, int Heads>
__global__ void __launch_bounds__(kThreads, 1) label_top_k(const __grid_constant__ LabelTopKParams params) {
  using L = Layout<Label, R, Heads>;
  using Stream = LabelStream<Label, R, Heads, 3>;
  using Query = LabelQuery<Label, R, Heads>;
  constexpr int kHeads = Stream::kHeads, kAhead = Stream::kAhead;
  extern __shared__ __align__(16) half s_scores[];
  __shared__ Exchange s;
  __shared__ RankScratch<kThreads> s_ranks;
  __shared__ u32 s_query[kHeads * R / 2];
  __shared__ float s_scale[kHeads], s_sum[kHeads], s_lse[kHeads];
  __shared__ float2 s_mass[kWarps][kHeads];

  const LabelSource& p = params.source;
  const Team<false> team{};
  const int lane = lane_id(), warp = uniform_warp_id(), row = blockIdx.y, sequence = row / p.kv_heads, kv_head = row - sequence * p.kv_heads, group = p.group;
  const int length = min(p.seq_lens[sequence], p.n), steps = ceil_div(length, team.size * L::kTokens);
  const int first = min(team.rank * steps * L::kTokens, length), size = min(steps * L::kTokens, length - first);
  const int first_step = team.rank * steps, last_step = first_step + ceil_div(size, L::kTokens);
  clear_ranks(s, s_ranks, min(params.counts[row], params.capacity));

  // 1. Scores of the slice. In two copies, of which the second hardly ever runs: as one, in a loop with the ranking, it would not fit the registers.
  const auto score_slice = [&](auto second) {
    constexpr bool kAgain = decltype(second)::value;
    Mass mass[Query::kOwn];
    if (size > 0) {
      Stream stream(p, sequence, kv_head, length);
      const auto load = [&](int slot, int step) {  // behind the last step that one again, which spares the test
        stream.load(slot, min(step, last_step - 1));
        stream.look_up(slot, min(step + kAhead * kWarps, last_step - 1));
      };
#pragma unroll
      for (int k = 0; k < kAhead; ++k) stream.look_up(k, min(first_step + warp + k * kWarps, last_step - 1));
#pragma unroll
      for (int k = 0; k < kAhead; ++k) load(k, first_step + warp + k * kWarps);
      if (!kAgain && warp == 0) gather_query<Label, R, kHeads>(p, static_cast<long long>(row) * group, group, kv_head, s_query, s_scale, s_sum);
      __syncthreads();
      const Query query(s_query, s_scale, s_sum);
#pragma unroll 1
      for (int step = first_step + warp; step < last_step; step += kAhead * kWarps) {
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          const int here = step + k * kWarps;
          if (here >= last_step) break;
#pragma unroll
          for (int i = 0; i < L::kTiles; ++i) {
            const int token = stream.token_of(here, i), left = length - token;
            query.score(stream.raw[k][i], stream.scale_zero[k][i], p.sm_scale, [&](int c0, float (&value)[Query::kAtOnce][2]) {
#pragma unroll
              for (int c = 0; c < Query::kAtOnce; ++c) {
                const int g = query.own_head(c0 + c);
                const u32 pair = pair_of<true>(half(), value[c][0], value[c][1], left);
                if (g < group) *reinterpret_cast<u32*>(s_scores + g * params.pitch + token - first) = pair;
                if (left < 1) value[c][0] = -inf();
                if (left < 2) value[c][1] = -inf();
              }
              if constexpr (!kAgain) add_scores(mass + c0, value);
            });
          }
          load(k, here + kAhead * kWarps);
        }
      }
    }
    if constexpr (!kAgain) {
#pragma unroll
      for (int c = 0; c < Query::kOwn; ++c) {
#pragma unroll
        for (int distance = kWarp / 2; distance >= L::kLanes; distance /= 2)
          mass[c].add(__shfl_xor_sync(kFullMask, mass[c].base, distance), __shfl_xor_sync(kFullMask, mass[c].sum, distance));
        if (lane < L::kLanes) s_mass[warp][Query::own_head(c)] = make_float2(mass[c].base, mass[c].sum);
      }
    }
    __syncthreads();
  };
  score_slice(No{});

  // 2. The log-sum-exp of each head.
  if (params.reduce == 0) {
    for (int h = warp; h < group; h += kWarps) {
      const float2 part = lane < kWarps ? s_mass[lane][h] : make_float2(finite(-inf()), 0.f);
      const float top = warp_max(part.x), sum = warp_sum(part.y * exp2f(part.x - top));
      if (lane == 0) s.head_max[h] = top, s.head_sum[h] = sum;
    }
    team.sync();
    join_heads<kThreads>(team, s, group, s_lse);
    __syncthreads();
  }

  // 3. Keys, the threshold, and the list.
  const Ranked ranked{params.reduce, kLog2e, group, first, size, params.force_newest ? length - 1 - first : -1, row, params.capacity, params.indices, params.lengths};
  const auto load = [&](int g, int chunk) {
    Chunk<half> x;
    x.load(s_scores + g * params.pitch + chunk * 8);
    return x;
  };
  const SplitKeys keys{reinterpret_cast<u32*>(s_scores), params.pitch / 2};
  if (!rank_tokens(ranked, team, s, s_ranks, s_lse, load, keys, false)) {
    score_slice(Yes{});
    rank_tokens(ranked, team, s, s_ranks, s_lse, load, keys, true);
  }
  team.leave();
}
