// Label scores: the dot product of a few channels of the query with the same channels of every key (Double Sparsity), for all query heads of a group.
//
// A label is r channels of a key in 2 or 4 bits with a scale and a zero, or in the type of the cache. Floor: r * bits / 8 + 4 bytes a token and kv head (12 at
// r=16 in 4 bits), plus the scores, sizeof(Out) * group bytes (8 at G=4). That little leaves 70 issue slots for 16 tokens of one head at 4.2 TB/s, so
// nothing passes through shared memory and nothing is shuffled: a lane scores the tokens that it has loaded itself, on tensor cores.
//
// A tile of m16n8k32 has 16 rows of 32 bytes, and the four lanes of a quad each hold 8 bytes of a row and two of its 8 results. Here a row is not one token's
// label but those of 4 / kLanes tokens side by side, each in kLanes lanes, and a column is zero but for the lanes of one of them. What lane (gid, tig)
// receives, columns 2 * tig and 2 * tig + 1, is then its own token's. Its two columns are the query and the query's 8-bit residual (spgemv.cu): q = s * (a + r / 254).
// Native labels meet the query in their own type, by m16n8k16; there a row is one token, because a NaN times the zero of another column would not stay with its token.
// Rows gid and gid + 8 are neighbouring tokens, which makes scores of halves 4-byte stores.
//
// A warp is a kv head, and the warps of a block go through the same tokens: what the heads of a page have lies side by side, so that DRAM sees a kilobyte
// rather than 128 bytes. Every block takes an equal, contiguous share of all sequences' steps, which each warp finds from the lengths by itself; the
// grid is what fits the GPU at once. Labels are loaded kAhead steps before they are scored, page numbers kAhead steps before that.
//
// kLse: the log-sum-exp of each row comes with its scores, so that who ranks them need not read them twice. The exponentials fit between the loads: 35 instructions on 104 for 64
// tokens and 4 heads. A lane adds up what it has written itself, relative to a base that moves only if it must; the block that is last to finish a row puts the shares together.
#include "label_stream.cuh"

struct LabelScoresParams {
  LabelSource source;
  void* out;           // [b, Hq, n], -inf behind a sequence's end
  float* lse;          // [b, Hq], the log-sum-exp of each row
  float2* partials;    // [grid.y, grid.x, 2, kMaxWarps, kMaxHeads], of rows that several blocks share
  u32* counters;       // [grid.y, b, Hkv] at zero
  int batch;
  int num_channels;    // r
  int bits;            // of a label's channel; label_scores_any only
};
CHECK_PARAMS(LabelScoresParams);

constexpr int kMaxHeads = 8;  // query heads that share one reading of the labels
constexpr int kMaxWarps = 8;

// What lies behind the end of a row: entries `first` to n, by one warp.
template <typename Out>
__device__ __forceinline__ void fill_padding(Out* row, int first, int n) {
  constexpr int kEach = 16 / sizeof(Out);
  if (n % kEach == 0) {
    constexpr u32 kWord = sizeof(Out) == 2 ? 0xfc00fc00u : 0xff800000u;
    for (int i = first + lane_id() * kEach; i < n; i += kWarp * kEach) store16(row + i, make_uint4(kWord, kWord, kWord, kWord));
  } else {
    for (int i = first + lane_id(); i < n; i += kWarp) row[i] = from_float<Out>(-inf());
  }
}

// Where a block's share of all steps begins: sequence, its steps, and the first step of its first row, counted over all rows.
struct Place {
  int sequence, steps, row_begin;
};

// Block: a warp for each of 1, 2, 4 or 8 neighbouring kv heads; grid.y: sets of 8 query heads of a group.
template <typename Out, typename Label, int R, int Heads, bool kLse>
__global__ void __launch_bounds__(kMaxWarps * kWarp, 2) label_scores(const __grid_constant__ LabelScoresParams params) {
  using L = Layout<Label, R, Heads>;
  using Stream = LabelStream<Label, R, Heads>;
  using Query = LabelQuery<Label, R, Heads>;
  constexpr int kLanes = L::kLanes, kHeads = Stream::kHeads, kAhead = Stream::kAhead;
  const LabelSource& p = params.source;
  __shared__ u32 s_query[kMaxWarps][kHeads * R / 2];  // halves, or two bytes a channel
  __shared__ float s_scale[kMaxWarps][kHeads], s_sum[kMaxWarps][kHeads];

  const int lane = lane_id(), warp = uniform_warp_id();
  const int warps = blockDim.x / kWarp, sets = p.kv_heads / warps;  // rows are (sequence, set of kv heads)
  const int head0 = blockIdx.y * kMaxHeads, heads = min(p.group - head0, kMaxHeads);
  const auto length_of = [&](int sequence) { return min(p.seq_lens[sequence], p.n); };
  const auto steps_of = [&](int sequence) { return ceil_div(length_of(sequence), L::kTokens); };

  // 1. This block's share of all steps. Every warp finds it by itself.
  Place here{0, 0, 0};
  int total;
  const auto share = [&](int block) {
    const int blocks = gridDim.x;
    return total / blocks * block + min(block, total % blocks);
  };
  if (params.batch == 1) {
    here.steps = steps_of(0), total = here.steps * sets;
  } else {
    const int per_lane = ceil_div(params.batch, kWarp), first = min(lane * per_lane, params.batch), last = min(first + per_lane, params.batch);
    int mine = 0;
    for (int s = first; s < last; ++s) mine += steps_of(s) * sets;
    const int up_to = warp_inclusive_scan(mine);
    total = __shfl_sync(kFullMask, up_to, kWarp - 1);
    const int start = share(blockIdx.x);
    const bool mine_it_is = start >= up_to - mine && start < up_to;
    if (mine_it_is) {
      here = {first, steps_of(first), up_to - mine};
      while (here.row_begin + here.steps * sets <= start) here.row_begin += here.steps * sets, here.steps = steps_of(++here.sequence);
    }
    const u32 found = __ballot_sync(kFullMask, mine_it_is);
    const int source = found ? __ffs(found) - 1 : 0;
    here.sequence = __shfl_sync(kFullMask, here.sequence, source), here.steps = __shfl_sync(kFullMask, here.steps, source);
    here.row_begin = __shfl_sync(kFullMask, here.row_begin, source);
  }
  const auto block_of = [&](int step) {
    const int each = total / static_cast<int>(gridDim.x), more = total % static_cast<int>(gridDim.x);  // `more` blocks have one step more
    return step < more * (each + 1) ? step / (each + 1) : more + (step - more * (each + 1)) / each;
  };
  const int begin = share(blockIdx.x), end = share(blockIdx.x + 1);
  int set = begin < end ? (begin - here.row_begin) / here.steps : 0;
  here.row_begin += set * here.steps;

  // 2. One row after another.
  for (int at = begin; at < end;) {
    while (at >= here.row_begin + here.steps) {
      here.row_begin += here.steps;
      if (++set == sets) set = 0, here.steps = steps_of(++here.sequence);
    }
    const int kv_head = set * warps + warp, length = length_of(here.sequence);
    const int first_step = at - here.row_begin, last_step = min(end - here.row_begin, here.steps);
    at = here.row_begin + last_step;

    Stream stream(p, here.sequence, kv_head, length);
    const auto load = [&](int slot, int step) {  // behind the last step that one again, which spares the test
      stream.load(slot, min(step, last_step - 1));
      stream.look_up(slot, step + kAhead);
    };
#pragma unroll
    for (int k = 0; k < kAhead; ++k) stream.look_up(k, first_step + k);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) load(k, first_step + k);

    // The query, while they come.
    const long long first_head = (static_cast<long long>(here.sequence) * p.kv_heads + kv_head) * p.group + head0;
    __syncwarp();  // the row before has been read
    gather_query<Label, R, kHeads>(p, first_head, heads, kv_head, s_query[warp], s_scale[warp], s_sum[warp]);
    __syncwarp();
    const Query query(s_query[warp], s_scale[warp], s_sum[warp]);

    Out* const out = static_cast<Out*>(params.out) + first_head * p.n;
    Mass mass[Query::kOwn];
    const auto score = [&](int slot, int step, auto partial) {
      constexpr bool kPartial = decltype(partial)::value;
#pragma unroll
      for (int i = 0; i < L::kTiles; ++i) {
        const int token = stream.token_of(step, i);
        query.score(stream.raw[slot][i], stream.scale_zero[slot][i], p.sm_scale, [&](int c0, float (&value)[Query::kAtOnce][2]) {
#pragma unroll
          for (int c = 0; c < Query::kAtOnce; ++c) {
            auto pair = pair_of<kPartial>(Out{}, value[c][0], value[c][1], length - token);
            const int g = query.own_head(c0 + c);
            if (g < heads && (!kPartial || token < p.n)) *reinterpret_cast<decltype(pair)*>(out + static_cast<long long>(g) * p.n + token) = pair;
            if (kPartial && token >= length) value[c][0] = -inf();
            if (kPartial && token + 1 >= length) value[c][1] = -inf();
          }
          if constexpr (kLse) add_scores(mass + c0, value);
        });
      }
    };
    const int last_full = min(last_step, length / L::kTokens);
    for (int step = first_step; step < last_full; step += kAhead) {
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (step + k >= last_full) break;
        score(k, step + k, No{});
        load(k, step + k + kAhead);
      }
    }
    if (last_full < last_step) {
      stream.look_up(0, last_full), stream.load(0, last_full);
      score(0, last_full, Yes{});
    }

    if constexpr (kLse) {
#pragma unroll
      for (int distance = kWarp / 2; distance >= kLanes; distance /= 2)
#pragma unroll
        for (int c = 0; c < Query::kOwn; ++c)
          mass[c].add(__shfl_xor_sync(kFullMask, mass[c].base, distance), __shfl_xor_sync(kFullMask, mass[c].sum, distance));
      const int first_block = block_of(here.row_begin), last_block = block_of(here.row_begin + here.steps - 1);
      // A block begins with a row's end, which is slot 0, or ends with a row's beginning.
      const auto partial_of = [&](int block) {
        const int slot = share(block) < here.row_begin;
        return params.partials + (((static_cast<long long>(blockIdx.y) * gridDim.x + block) * 2 + slot) * kMaxWarps + warp) * kMaxHeads;
      };
#pragma unroll
      for (int c = 0; c < Query::kOwn; ++c) {
        const int g = query.own_head(c);
        if (lane >= kLanes || g >= heads) continue;
        if (first_block == last_block) params.lse[first_head + g] = mass[c].log();
        else partial_of(blockIdx.x)[g] = make_float2(mass[c].base, mass[c].sum);
      }
      if (first_block < last_block) {
        const u32 others = last_block - first_block;
        __threadfence();
        __syncwarp();
        bool last = false;
        if (lane == 0) last = atomicInc(params.counters + (blockIdx.y * params.batch + here.sequence) * p.kv_heads + kv_head, others) == others;
        if (__any_sync(kFullMask, last)) {
          __threadfence();
          Mass all[kMaxHeads];
#pragma unroll 2
          for (int block = first_block + lane; block <= last_block; block += kWarp) {
            const float2* const from = partial_of(block);
#pragma unroll
            for (int g = 0; g < kMaxHeads; ++g) {
              if (g >= heads) break;
              const float2 share = __ldcg(from + g);
              all[g].add(share.x, share.y);
            }
          }
#pragma unroll
          for (int g = 0; g < kMaxHeads; ++g) {
            if (g >= heads) break;
#pragma unroll
            for (int distance = kWarp / 2; distance; distance /= 2)
              all[g].add(__shfl_xor_sync(kFullMask, all[g].base, distance), __shfl_xor_sync(kFullMask, all[g].sum, distance));
            if (lane == 0) params.lse[first_head + g] = all[g].log();
          }
        }
      }
    }
  }

  // 3. What lies behind the sequences' ends.
  for (int item = blockIdx.x * warps + warp; item < params.batch * p.kv_heads * heads; item += gridDim.x * warps) {
    const int row = item / heads;
    const int first = steps_of(row / p.kv_heads) * L::kTokens;
    if (kLse && first == 0 && lane == 0) params.lse[static_cast<long long>(row) * p.group + head0 + item % heads] = -inf();
    if (first < p.n) fill_padding(static_cast<Out*>(params.out) + (static_cast<long long>(row) * p.group + head0 + item % heads) * p.n, first, p.n);
  }
}

// Any r, page size and group: a thread a token, the query in shared memory, every code by itself. Right, not fast.
template <typename Out>
__global__ void __launch_bounds__(128) label_scores_any(const __grid_constant__ LabelScoresParams params) {
  const LabelSource& p = params.source;
  extern __shared__ float s_channels[];  // [group, r]
  const int r = params.num_channels, tiles = ceil_div(p.n, static_cast<int>(blockDim.x)), row = blockIdx.x / tiles;
  const int sequence = row / p.kv_heads, kv_head = row % p.kv_heads;
  const long long first_head = static_cast<long long>(row) * p.group;
  for (int i = threadIdx.x; i < p.group * r; i += blockDim.x) {
    const u16 value = static_cast<const u16*>(p.q)[(first_head + i / r) * p.head_dim + p.channels[kv_head * r + i % r]];
    s_channels[i] = unpack2(p.q_is_bf16, value).x;
  }
  __syncthreads();
  const int token = blockIdx.x % tiles * blockDim.x + threadIdx.x;
  if (token >= p.n) return;
  Out* const out = static_cast<Out*>(params.out) + first_head * p.n + token;
  const bool real = token < p.seq_lens[sequence];
  const int page = real ? p.page_table[static_cast<long long>(sequence) * p.max_pages + token / p.page_size] : 0;
  const long long place = (static_cast<long long>(page) * p.kv_heads + kv_head) * p.page_size + token % p.page_size;
  const int bytes = r * params.bits / 8;
  const u8* const label = p.label + place * bytes;
  const float2 scale_zero = params.bits == 16 || !real ? make_float2(1.f, 0.f) : unpack2<half>(p.label_params[place]);
  for (int g = 0; g < p.group; ++g) {
    float dot = 0.f, sum = 0.f;
    for (int c = 0; real && c < r; ++c) {
      const float x = s_channels[g * r + c];
      float y;
      if (params.bits == 16) {
        const u32 value = reinterpret_cast<const u16*>(label)[c];
        y = unpack2(p.q_is_bf16, value).x;
      } else {
        y = static_cast<float>(label[c % bytes] >> (c / bytes * params.bits) & ((1 << params.bits) - 1));
      }
      dot = fmaf(x, y, dot), sum += x;
    }
    const float score = (scale_zero.x * dot + (params.bits == 16 ? 0.f : scale_zero.y * sum)) * p.sm_scale;
    if constexpr (sizeof(Out) == 2) {
      out[static_cast<long long>(g) * p.n] = __ushort_as_half(static_cast<u16>(pair_of<true>(Out{}, score, 0.f, 2 * real)));
    } else {
      out[static_cast<long long>(g) * p.n] = real ? score : -inf();
    }
  }
}
