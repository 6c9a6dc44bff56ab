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
// grid is what fits the GPU at once. Labels are loaded kAhead steps before they are scored, page numbers a batch of 32 pages before that.
//
// kLse: the log-sum-exp of each row comes with its scores, so that who ranks them need not read them twice. The exponentials fit between the loads: 35 instructions on 104 for 64
// tokens and 4 heads. A lane adds up what it has written itself, relative to a base that moves only if it must; the block that is last to finish a row puts the shares together.
#include "labels.cuh"
#include "radix.cuh"

struct LabelScoresParams {
  const void* q;             // [b, Hq, d] half or bf16
  const int* channels;       // [Hkv, r]
  const u8* label;           // [pages, Hkv, P, r * bits / 8] codes, or [pages, Hkv, P, r] of the type of q
  const u32* label_params;   // [pages, Hkv, P] pairs of halves: scale, zero; not read for native labels
  const int* page_table;     // [b, max_pages]
  const int* seq_lens;       // [b]
  void* out;                 // [b, Hq, n], -inf behind a sequence's end
  float* lse;                // [b, Hq], the log-sum-exp of each row
  float2* partials;          // [grid.y, grid.x, 2, kMaxWarps, kMaxHeads], of rows that several blocks share
  u32* counters;             // [grid.y, b, Hkv] at zero
  float sm_scale;
  int q_is_bf16;
  int batch;
  int kv_heads;
  int group;
  int head_dim;
  int num_channels;  // r
  int bits;          // of a label's channel; label_scores_any only
  int max_pages;
  int page_size;
  int n;               // max_pages * P
};
CHECK_PARAMS(LabelScoresParams);

constexpr int kMaxHeads = 8;  // query heads that share one reading of the labels
constexpr int kMaxWarps = 8;

// One head's channels after another, in the order in which lanes read them, as 8-bit codes and their residuals or as they are. Heads from `heads` on are zero.
template <typename Label, int R, int Heads>
__device__ __forceinline__ void gather_query(const LabelScoresParams& p, long long first_head, int heads, int kv_head, u32* query, float* scale, float* sums) {
  using L = Layout<Label, R, Heads>;
  constexpr int kWidth = R < kWarp ? R : kWarp, kAtOnce = kWarp / kWidth, kEach = R / kWidth;  // lanes a head, heads at once, channels a lane
#pragma unroll
  for (int g0 = 0; g0 < Heads; g0 += kAtOnce) {
    const int g = g0 + lane_id() / kWidth;
    float x[kEach], largest = 0.f, sum = 0.f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int index = lane_id() % kWidth + i * kWidth;
      const int channel = L::kNative ? index : channel_of<Label, R, Heads>(index / (4 * L::kWords), index / 4 % L::kWords, index % 4);
      u16 value = 0;
      if (g < heads) value = static_cast<const u16*>(p.q)[(first_head + g) * p.head_dim + p.channels[kv_head * R + channel]];
      if constexpr (L::kNative) {
        if (g < Heads) reinterpret_cast<u16*>(query)[g * R + index] = value;
      } else {
        const float2 as_half = unpack2<half>(value), as_bf16 = unpack2<bf16>(value);
        x[i] = p.q_is_bf16 ? as_bf16.x : as_half.x;
        largest = fmaxf(largest, fabsf(x[i])), sum += x[i];
      }
    }
    if constexpr (!L::kNative) {
      largest = warp_max<kWidth>(largest);
      sum = warp_sum<kWidth>(sum);  // carries a NaN of the query into every score of this head
      const float step = largest / 127.f, inverse = step > 0.f ? 1.f / step : 0.f;
      if (g < Heads) {
        u8* const codes = reinterpret_cast<u8*>(query) + 2 * g * R;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const int index = lane_id() % kWidth + i * kWidth;
          const int code = min(max(__float2int_rn(x[i] * inverse), -127), 127);
          const float rest = fmaf(-step, static_cast<float>(code), x[i]) * inverse * 254.f;
          codes[index] = static_cast<u8>(code), codes[R + index] = static_cast<u8>(min(max(__float2int_rn(rest), -127), 127));
        }
        if (lane_id() % kWidth == 0) scale[g] = step * p.sm_scale * (1.f / 254.f), sums[g] = sum * p.sm_scale;
      }
    }
  }
}

// Scores of two tokens; kPartial: of which `left` are there, the others -inf. A half is else finite, or NaN.
template <bool kPartial>
__device__ __forceinline__ u32 pair_of(half, float first, float second, int left) {
  u32 pair = pack2_saturated(first, second);
  if (kPartial && left < 2) pair = left < 1 ? 0xfc00fc00u : (pair & 0xffffu) | 0xfc000000u;
  return pair;
}
template <bool kPartial>
__device__ __forceinline__ float2 pair_of(float, float first, float second, int left) {
  return make_float2(kPartial && left < 1 ? -inf() : first, kPartial && left < 2 ? -inf() : second);
}

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

// A sum of powers of two, sum * 2^base.
struct Mass {
  float base = finite(-inf()), sum = 0.f;

  __device__ void add(float other_base, float other_sum) {
    const float top = fmaxf(base, other_base);
    sum = sum * exp2f(base - top) + other_sum * exp2f(other_base - top);
    base = top;
  }
  __device__ float log() const { return (base + log2f(sum)) * kLn2; }
};

// Two scores each to N masses.
template <int N>
__device__ __forceinline__ void add_scores(Mass* mass, const float (&score)[N][2]) {
  float x[N][2], most = -inf();
#pragma unroll
  for (int c = 0; c < N; ++c)
#pragma unroll
    for (int k = 0; k < 2; ++k) x[c][k] = fmaf(score[c][k], kLog2e, -mass[c].base), most = fmaxf(most, x[c][k]);
  if (most > 64.f) {  // rare but for the first
#pragma unroll
    for (int c = 0; c < N; ++c) {
      mass[c].add(finite(fmaxf(score[c][0], score[c][1]) * kLog2e), 0.f);
#pragma unroll
      for (int k = 0; k < 2; ++k) x[c][k] = fmaf(score[c][k], kLog2e, -mass[c].base);
    }
  }
#pragma unroll
  for (int c = 0; c < N; ++c) mass[c].sum += exp2f(x[c][0]) + exp2f(x[c][1]);
}

struct No {
  static constexpr bool value = false;
};
struct Yes {
  static constexpr bool value = true;
};

// Where a block's share of all steps begins: sequence, its steps, and the first step of its first row, counted over all rows.
struct Place {
  int sequence, steps, row_begin;
};

// Block: a warp for each of 1, 2, 4 or 8 neighbouring kv heads; grid.y: sets of 8 query heads of a group.
template <typename Out, typename Label, int R, int Heads, bool kLse>
__global__ void __launch_bounds__(kMaxWarps * kWarp, 2) label_scores(const __grid_constant__ LabelScoresParams p) {
  using L = Layout<Label, R, Heads>;
  constexpr int kLanes = L::kLanes, kColumns = L::kColumns, kHeads = kColumns * L::kHeads;
  // Steps under way: 2 to 4 KB a warp. Queries for 8 heads leave registers for two.
  constexpr int kAhead = kHeads == 8 && !L::kNative || L::kRegisters > 8 ? 2 : L::kRegisters > 6 ? 3 : 4;
  __shared__ u32 s_query[kMaxWarps][kHeads * R / 2];  // halves, or two bytes a channel
  __shared__ float s_scale[kMaxWarps][kHeads], s_sum[kMaxWarps][kHeads];

  const int lane = lane_id(), warp = uniform_warp_id(), gid = lane / 4, tig = lane % 4, part = lane % kLanes;
  const int warps = blockDim.x / kWarp, sets = p.kv_heads / warps;  // rows are (sequence, set of kv heads)
  const int page_shift = 31 - __clz(p.page_size), page_mask = p.page_size - 1;
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
  if (p.batch == 1) {
    here.steps = steps_of(0), total = here.steps * sets;
  } else {
    const int per_lane = ceil_div(p.batch, kWarp), first = min(lane * per_lane, p.batch), last = min(first + per_lane, p.batch);
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
    const int kv_head = set * warps + warp, length = length_of(here.sequence), num_pages = ceil_div(length, p.page_size);
    const int first_step = at - here.row_begin, last_step = min(end - here.row_begin, here.steps);
    at = here.row_begin + last_step;

    // Loads, kAhead steps before they are needed; page numbers kAhead steps before that. Behind the last step that one is loaded again, which spares the test.
    const int* const table = p.page_table + static_cast<long long>(here.sequence) * p.max_pages;
    // Of this lane, in page 0. Opaque, or they would be put together anew for every load: a third of the loop.
    const u8* labels = p.label + static_cast<long long>(kv_head) * p.page_size * L::kBytes + part * L::kPart;
    const u8* params = reinterpret_cast<const u8*>(p.label_params + kv_head * p.page_size);
    u32 page_bytes = p.kv_heads * p.page_size * L::kBytes, page_params = p.kv_heads * p.page_size * 4;
    opaque(labels), opaque(params), opaque(page_bytes), opaque(page_params);
    u32 page[kAhead][L::kTiles], raw[kAhead][L::kTiles][L::kRaw];
    uint2 scale_zero[kAhead][L::kTiles];
    const auto token_of = [&](int step, int tile) { return step * L::kTokens + tile * L::kTileTokens + lane / kLanes * 2; };
    const auto look_up = [&](int slot, int step) {
#pragma unroll
      for (int i = 0; i < L::kTiles; ++i) page[slot][i] = table[min(token_of(step, i) >> page_shift, num_pages - 1)];
    };
    const auto load = [&](int slot, int step) {
#pragma unroll
      for (int i = 0; i < L::kTiles; ++i) {
        const u32 place = token_of(min(step, last_step - 1), i) & page_mask;
        const u8* const from = mad_wide(mad_wide(labels, page[slot][i], page_bytes), place, L::kBytes);
        if constexpr (kLanes == 1) {
          load_words<L::kPart * 2, true>(raw[slot][i], from);
        } else if constexpr (L::kPart == 2) {
          const u16* const halves = reinterpret_cast<const u16*>(from);
          raw[slot][i][0] = __ldg(halves) | static_cast<u32>(__ldg(halves + kLanes)) << 16;
        } else {
          load_words<L::kPart, L::kBytes >= 32>(raw[slot][i], from);
          load_words<L::kPart, L::kBytes >= 32>(raw[slot][i] + L::kRaw / 2, from + L::kBytes);
        }
        if constexpr (!L::kNative) scale_zero[slot][i] = load_stream8(mad_wide(mad_wide(params, page[slot][i], page_params), place, 4));
      }
      look_up(slot, step + kAhead);
    };
#pragma unroll
    for (int k = 0; k < kAhead; ++k) look_up(k, first_step + k);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) load(k, first_step + k);

    // The query, while they come.
    const long long first_head = (static_cast<long long>(here.sequence) * p.kv_heads + kv_head) * p.group + head0;
    u32 b[kColumns][L::kSteps * 2];
    float q_scale[kColumns], q_sum[kColumns];  // of the head that this lane writes
    __syncwarp();                            // the row before has been read
    gather_query<Label, R, kHeads>(p, first_head, heads, kv_head, s_query[warp], s_scale[warp], s_sum[warp]);
    __syncwarp();
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      // Column gid: a head, or a head or its residual, of the token whose label begins in lane gid / (2 * kLanes) * kLanes of the quad.
      constexpr int kWide = L::kNative ? 8 : 2 * kLanes;  // columns of a token
      const u32* const column = s_query[warp] + (c * kWide + gid % kWide) * (R * (L::kNative ? 2 : 1) / 4) + part * L::kWords;
#pragma unroll
      for (int j = 0; j < L::kSteps * 2; ++j) b[c][j] = tig / kLanes == gid / kWide && j < L::kWords ? column[j] : 0;
      if constexpr (!L::kNative) q_scale[c] = s_scale[warp][c * L::kHeads + part], q_sum[c] = s_sum[warp][c * L::kHeads + part];
    }

    Out* const out = static_cast<Out*>(p.out) + first_head * p.n;
    // What this lane writes: heads own_head(0) to own_head(kOwn - 1).
    constexpr int kOwn = L::kNative ? 2 : kColumns, kMost = Heads > 4 ? 2 : 4, kAtOnce = kOwn < kMost ? kOwn : kMost;  // more sums would not fit the registers
    const auto own_head = [&](int c) { return L::kNative ? 2 * part + c : c * kLanes + part; };
    Mass mass[kOwn];
    const auto score = [&](int slot, int step, auto partial) {
      constexpr bool kPartial = decltype(partial)::value;
#pragma unroll
      for (int i = 0; i < L::kTiles; ++i) {
        const int token = token_of(step, i);
        u32 one[L::kSteps * 2], two[L::kSteps * 2];
        spread<Label, R, Heads>(one, raw[slot][i], 0), spread<Label, R, Heads>(two, raw[slot][i], 1);
#pragma unroll
        for (int c0 = 0; c0 < kOwn; c0 += kAtOnce) {
          float value[kAtOnce][2];
          if constexpr (L::kNative) {
            float sum[4] = {};
#pragma unroll
            for (int m = 0; m < L::kSteps * 2; m += 2) mma_16bit<Label>(sum, one[m], two[m], one[m + 1], two[m + 1], b[0][m], b[0][m + 1]);
#pragma unroll
            for (int k = 0; k < 4; ++k) value[k % 2][k / 2] = sum[k] * p.sm_scale;
          } else {
            const float2 first = unpack2<half>(scale_zero[slot][i].x), second = unpack2<half>(scale_zero[slot][i].y);
            int sum[kAtOnce][4] = {};
#pragma unroll
            for (int m = 0; m < L::kSteps * 2; m += 2)
#pragma unroll
              for (int c = 0; c < kAtOnce; ++c) mma_u8s8(sum[c], one[m], two[m], one[m + 1], two[m + 1], b[c0 + c][m], b[c0 + c][m + 1]);
#pragma unroll
            for (int c = 0; c < kAtOnce; ++c) {
              value[c][0] = fmaf(first.x * q_scale[c0 + c], static_cast<float>(sum[c][0] * 254 + sum[c][1]), first.y * q_sum[c0 + c]);
              value[c][1] = fmaf(second.x * q_scale[c0 + c], static_cast<float>(sum[c][2] * 254 + sum[c][3]), second.y * q_sum[c0 + c]);
            }
          }
#pragma unroll
          for (int c = 0; c < kAtOnce; ++c) {
            auto pair = pair_of<kPartial>(Out{}, value[c][0], value[c][1], length - token);
            const int g = own_head(c0 + c);
            if (g < heads && (!kPartial || token < p.n)) *reinterpret_cast<decltype(pair)*>(out + static_cast<long long>(g) * p.n + token) = pair;
            if (kPartial && token >= length) value[c][0] = -inf();
            if (kPartial && token + 1 >= length) value[c][1] = -inf();
          }
          if constexpr (kLse) add_scores(mass + c0, value);
        }
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
      look_up(0, last_full), load(0, last_full);
      score(0, last_full, Yes{});
    }

    if constexpr (kLse) {
#pragma unroll
      for (int distance = kWarp / 2; distance >= kLanes; distance /= 2)
#pragma unroll
        for (int c = 0; c < kOwn; ++c)
          mass[c].add(__shfl_xor_sync(kFullMask, mass[c].base, distance), __shfl_xor_sync(kFullMask, mass[c].sum, distance));
      const int first_block = block_of(here.row_begin), last_block = block_of(here.row_begin + here.steps - 1);
      // A block begins with a row's end, which is slot 0, or ends with a row's beginning.
      const auto partial_of = [&](int block) {
        const int slot = share(block) < here.row_begin;
        return p.partials + (((static_cast<long long>(blockIdx.y) * gridDim.x + block) * 2 + slot) * kMaxWarps + warp) * kMaxHeads;
      };
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        const int g = own_head(c);
        if (lane >= kLanes || g >= heads) continue;
        if (first_block == last_block) p.lse[first_head + g] = mass[c].log();
        else partial_of(blockIdx.x)[g] = make_float2(mass[c].base, mass[c].sum);
      }
      if (first_block < last_block) {
        const u32 others = last_block - first_block;
        __threadfence();
        __syncwarp();
        bool last = false;
        if (lane == 0) last = atomicInc(p.counters + (blockIdx.y * p.batch + here.sequence) * p.kv_heads + kv_head, others) == others;
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
            if (lane == 0) p.lse[first_head + g] = all[g].log();
          }
        }
      }
    }
  }

  // 3. What lies behind the sequences' ends.
  for (int item = blockIdx.x * warps + warp; item < p.batch * p.kv_heads * heads; item += gridDim.x * warps) {
    const int row = item / heads;
    const int first = steps_of(row / p.kv_heads) * L::kTokens;
    if (kLse && first == 0 && lane == 0) p.lse[static_cast<long long>(row) * p.group + head0 + item % heads] = -inf();
    if (first < p.n) fill_padding(static_cast<Out*>(p.out) + (static_cast<long long>(row) * p.group + head0 + item % heads) * p.n, first, p.n);
  }
}

// Any r, page size and group: a thread a token, the query in shared memory, every code by itself. Right, not fast.
template <typename Out>
__global__ void __launch_bounds__(128) label_scores_any(const __grid_constant__ LabelScoresParams p) {
  extern __shared__ float s_channels[];  // [group, r]
  const int r = p.num_channels, tiles = ceil_div(p.n, static_cast<int>(blockDim.x)), row = blockIdx.x / tiles;
  const int sequence = row / p.kv_heads, kv_head = row % p.kv_heads;
  const long long first_head = static_cast<long long>(row) * p.group;
  for (int i = threadIdx.x; i < p.group * r; i += blockDim.x) {
    const u16 value = static_cast<const u16*>(p.q)[(first_head + i / r) * p.head_dim + p.channels[kv_head * r + i % r]];
    s_channels[i] = p.q_is_bf16 ? unpack2<bf16>(value).x : unpack2<half>(value).x;
  }
  __syncthreads();
  const int token = blockIdx.x % tiles * blockDim.x + threadIdx.x;
  if (token >= p.n) return;
  Out* const out = static_cast<Out*>(p.out) + first_head * p.n + token;
  const bool real = token < p.seq_lens[sequence];
  const int page = real ? p.page_table[static_cast<long long>(sequence) * p.max_pages + token / p.page_size] : 0;
  const long long place = (static_cast<long long>(page) * p.kv_heads + kv_head) * p.page_size + token % p.page_size;
  const int bytes = r * p.bits / 8;
  const u8* const label = p.label + place * bytes;
  const float2 scale_zero = p.bits == 16 || !real ? make_float2(1.f, 0.f) : unpack2<half>(p.label_params[place]);
  for (int g = 0; g < p.group; ++g) {
    float dot = 0.f, sum = 0.f;
    for (int c = 0; real && c < r; ++c) {
      const float x = s_channels[g * r + c];
      float y;
      if (p.bits == 16) {
        const u32 value = reinterpret_cast<const u16*>(label)[c];
        y = p.q_is_bf16 ? unpack2<bf16>(value).x : unpack2<half>(value).x;
      } else {
        y = static_cast<float>(label[c % bytes] >> (c / bytes * p.bits) & ((1 << p.bits) - 1));
      }
      dot = fmaf(x, y, dot), sum += x;
    }
    const float score = (scale_zero.x * dot + (p.bits == 16 ? 0.f : scale_zero.y * sum)) * p.sm_scale;
    if constexpr (sizeof(Out) == 2) {
      out[static_cast<long long>(g) * p.n] = __ushort_as_half(static_cast<u16>(pair_of<true>(Out{}, score, 0.f, 2 * real)));
    } else {
      out[static_cast<long long>(g) * p.n] = real ? score : -inf();
    }
  }
}
