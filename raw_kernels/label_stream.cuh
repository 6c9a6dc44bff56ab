// Labels of a sequence's tokens for query heads of one kv head: how they are read and scored. What label_scores.cu and label_top_k.cu share; see label_scores.cu for the tile.
#pragma once

#include "labels.cuh"
#include "radix.cuh"

struct LabelSource {
  const void* q;            // [b, Hq, d] half or bf16
  const int* channels;      // [Hkv, r]
  const u8* label;          // [pages, Hkv, P, r * bits / 8] codes, or [pages, Hkv, P, r] of the type of q
  const u32* label_params;  // [pages, Hkv, P] pairs of halves: scale, zero; not read for native labels
  const int* page_table;    // [b, max_pages]
  const int* seq_lens;      // [b]
  float sm_scale;
  int q_is_bf16;
  int kv_heads;
  int group;
  int head_dim;
  int max_pages;
  int page_size;
  int n;                    // max_pages * P
};

// One head's channels after another, in the order in which lanes read them, as 8-bit codes and their residuals or as they are. Heads from `heads` on are zero.
template <typename Label, int R, int Heads>
__device__ __forceinline__ void gather_query(const LabelSource& p, long long first_head, int heads, int kv_head, u32* query, float* scale, float* sums) {
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

// The query as the tile wants it, `query`, `scale` and `sums` being what gather_query has left.
template <typename Label, int R, int Heads>
struct LabelQuery {
  using L = Layout<Label, R, Heads>;
  static constexpr int kOwn = L::kNative ? 2 : L::kColumns;  // heads that a lane gets scores of: own_head(0) to own_head(kOwn - 1)
  static constexpr int kMost = Heads > 4 ? 2 : 4, kAtOnce = kOwn < kMost ? kOwn : kMost;  // more sums would not fit the registers
  u32 b[L::kColumns][L::kSteps * 2];
  float q_scale[L::kColumns], q_sum[L::kColumns];  // of the head that this lane writes

  __device__ __forceinline__ LabelQuery(const u32* query, const float* scale, const float* sums) {
    const int gid = lane_id() / 4, tig = lane_id() % 4, part = lane_id() % L::kLanes;
#pragma unroll
    for (int c = 0; c < L::kColumns; ++c) {
      // Column gid: a head, or a head or its residual, of the token whose label begins in lane gid / (2 * kLanes) * kLanes of the quad.
      constexpr int kWide = L::kNative ? 8 : 2 * L::kLanes;  // columns of a token
      const u32* const column = query + (c * kWide + gid % kWide) * (R * (L::kNative ? 2 : 1) / 4) + part * L::kWords;
#pragma unroll
      for (int j = 0; j < L::kSteps * 2; ++j) b[c][j] = tig / L::kLanes == gid / kWide && j < L::kWords ? column[j] : 0;
      if constexpr (!L::kNative) q_scale[c] = scale[c * L::kHeads + part], q_sum[c] = sums[c * L::kHeads + part];
    }
  }
  static __device__ __forceinline__ int own_head(int c) { return L::kNative ? 2 * (lane_id() % L::kLanes) + c : c * L::kLanes + lane_id() % L::kLanes; }

  // Scores of the two tokens of a tile that this lane holds, for kAtOnce of its heads from `c0` on at a time: use(c0, scores[kAtOnce][2]).
  template <typename Use>
  __device__ __forceinline__ void score(const u32 (&raw)[L::kRaw], uint2 scale_zero, float sm_scale, const Use& use) const {
    u32 one[L::kSteps * 2], two[L::kSteps * 2];
    spread<Label, R, Heads>(one, raw, 0), spread<Label, R, Heads>(two, raw, 1);
#pragma unroll
    for (int c0 = 0; c0 < kOwn; c0 += kAtOnce) {
      float value[kAtOnce][2];
      if constexpr (L::kNative) {
        float sum[4] = {};
#pragma unroll
        for (int m = 0; m < L::kSteps * 2; m += 2) mma_16bit<Label>(sum, one[m], two[m], one[m + 1], two[m + 1], b[0][m], b[0][m + 1]);
#pragma unroll
        for (int k = 0; k < 4; ++k) value[k % 2][k / 2] = sum[k] * sm_scale;
      } else {
        const float2 first = unpack2<half>(scale_zero.x), second = unpack2<half>(scale_zero.y);
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
      use(c0, value);
    }
  }
};

// Labels under way, kAhead steps of kTokens tokens before they are scored, page numbers kAhead steps before that.
template <typename Label, int R, int Heads, int kMost = 4>
struct LabelStream {
  using L = Layout<Label, R, Heads>;
  static constexpr int kHeads = L::kColumns * L::kHeads;
  // 2 to 4 KB a warp. Queries for 8 heads leave registers for two.
  static constexpr int kAhead = kHeads == 8 && !L::kNative || L::kRegisters > 8 ? 2 : L::kRegisters > 6 || kMost < 4 ? 3 : 4;
  const int* table;
  const u8 *labels, *params;  // of this lane, in page 0
  u32 page_bytes, page_params;
  int page_shift, page_mask, num_pages;
  u32 page[kAhead][L::kTiles], raw[kAhead][L::kTiles][L::kRaw];
  uint2 scale_zero[kAhead][L::kTiles];

  __device__ __forceinline__ LabelStream(const LabelSource& p, int sequence, int kv_head, int length)
      : table(p.page_table + static_cast<long long>(sequence) * p.max_pages), page_shift(31 - __clz(p.page_size)), page_mask(p.page_size - 1),
        num_pages(ceil_div(length, p.page_size)) {
    labels = p.label + static_cast<long long>(kv_head) * p.page_size * L::kBytes + lane_id() % L::kLanes * L::kPart;
    params = reinterpret_cast<const u8*>(p.label_params + kv_head * p.page_size);
    page_bytes = p.kv_heads * p.page_size * L::kBytes, page_params = p.kv_heads * p.page_size * 4;
    // Or they would be put together anew for every load: a third of the loop.
    opaque(labels), opaque(params), opaque(page_bytes), opaque(page_params);
  }
  static __device__ __forceinline__ int token_of(int step, int tile) { return step * L::kTokens + tile * L::kTileTokens + lane_id() / L::kLanes * 2; }
  __device__ __forceinline__ void look_up(int slot, int step) {
#pragma unroll
    for (int i = 0; i < L::kTiles; ++i) page[slot][i] = table[min(token_of(step, i) >> page_shift, num_pages - 1)];
  }
  __device__ __forceinline__ void load(int slot, int step) {
#pragma unroll
    for (int i = 0; i < L::kTiles; ++i) {
      const u32 place = token_of(step, i) & page_mask;
      const u8* const from = mad_wide(mad_wide(labels, page[slot][i], page_bytes), place, L::kBytes);
      if constexpr (L::kLanes == 1) {
        load_words<L::kPart * 2, true>(raw[slot][i], from);
      } else if constexpr (L::kPart == 2) {
        const u16* const halves = reinterpret_cast<const u16*>(from);
        raw[slot][i][0] = __ldg(halves) | static_cast<u32>(__ldg(halves + L::kLanes)) << 16;
      } else {
        load_words<L::kPart, L::kBytes >= 32>(raw[slot][i], from);
        load_words<L::kPart, L::kBytes >= 32>(raw[slot][i] + L::kRaw / 2, from + L::kBytes);
      }
      if constexpr (!L::kNative) scale_zero[slot][i] = load_stream8(mad_wide(mad_wide(params, page[slot][i], page_params), place, 4));
    }
  }
};

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
  for (int c = 0; c < N; ++c) mass[c].sum += fast_exp2(x[c][0]) + fast_exp2(x[c][1]);
}

struct No {
  static constexpr bool value = false;
};
struct Yes {
  static constexpr bool value = true;
};
