// What was pruned, page by page, inside fused_decode.cu: its mass, and attention to the pages' mean values with it. See ops/tail.py.
#pragma once

#include "fused_top_p.cuh"
#include "mma.cuh"

// Raise the maximum of head gid to that of `x` over its four lanes, and bring what was summed below the old one along.
template <int kTiles>
__device__ __forceinline__ void rescale(float (&o)[kTiles][4], float& top, float& sum, float x) {
  const float best = fmaxf(top, warp_max<4>(x)), shift = fast_exp2(top - finite_max(best));
  if (__any_sync(kFullMask, best > top)) {
    const int from = fresh(lane_id()) % 4 * 8;
    const float shift0 = __shfl_sync(kFullMask, shift, from), shift1 = __shfl_sync(kFullMask, shift, from + 4);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) o[m][0] *= shift0, o[m][1] *= shift1, o[m][2] *= shift0, o[m][3] *= shift1;
  }
  sum *= shift, top = best;
}

// The mean values of this kv head's pages, and what each of this block's pages has lost.
struct PrunedPages {
  const u8* codes;      // [pages, Hkv, d], this head's first
  const u32* params;    // [pages, Hkv] pairs of halves (scale, zero), likewise
  const int* physical;  // of this block's pages
  const float* logits;  // [group, count], in powers of two
  int count;            // 0: there is no tail
  int kv_heads;
};

// Logits of the pseudo-tokens to `lost` [group, count] in powers of two, and to `out`, unless null, as natural ones, `capacity` a head.
template <int kThreads, int kMaxHeads>
__device__ __forceinline__ void weigh_pruned(const TopPScratch<kMaxHeads>& s, const half* logits, int pitch, int count, int page_shift, int group, const unsigned char* keep,
                                             float* lost, float* out, int capacity) {
  const int chunks = 1 << (page_shift - 3);
#pragma unroll 1
  for (int i = threadIdx.x; i < count * group; i += kThreads) {
    const int g = i / count, page = i - g * count;
    const float peak = s.peak[g];
    float sum = 0.f;
#pragma unroll 1
    for (int chunk = page * chunks; chunk < (page + 1) * chunks; ++chunk) {
      Chunk<half> v;
      v.load(logits + g * pitch + chunk * 8);
      const u32 kept = keep[chunk];
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += kept >> j & 1 ? 0.f : fast_exp2((v[j] - peak) * kLog2e);
    }
    const float logit = sum > 0.f ? fmaf(peak, kLog2e, __log2f(sum)) : -inf();
    lost[i] = logit;
    if (out) out[static_cast<size_t>(g) * capacity + page] = logit * kLn2;
  }
}

// Codes 2 * pair and 2 * pair + 1 of eight, as what they stand for, in halves: scale and zero are halves too, so that all there is fits them.
__device__ __forceinline__ u32 two_values(uint2 codes, int pair, half2 scale, half2 zero) {
  // A byte in the last places of 1024 is that half plus the byte: no conversion.
  const u32 word = __byte_perm(pair < 2 ? codes.x : codes.y, 0x64646464u, pair % 2 ? 0x4342 : 0x4140);
  const half2 value = __hfma2(__hsub2(*reinterpret_cast<const half2*>(&word), __float2half2_rn(1024.f)), scale, zero);
  return *reinterpret_cast<const u32*>(&value);
}

// One warp's part: tiles of 16 pages, beside the tokens that attend_warp has been through, whose state (o, top, sum) it goes on with. Weights in halves, whatever the type of the
// cache: they are at most 1, and what they cannot tell from 0 is below 6e-8 of the largest.
template <int D, int kWarps>
__device__ __forceinline__ void attend_pruned(const PrunedPages& tail, int group, float (&o)[D / 16][4], float& top, float& sum) {
  constexpr int kPieces = D / 64;
  const int lane = fresh(lane_id()), gid = lane / 4, tig = lane % 4;
#pragma unroll 1
  for (int first = uniform_warp_id() * 16; first < tail.count; first += kWarps * 16) {
    uint2 codes[4][kPieces];
    half2 params[4];
    float x[4], w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // As for tokens, a page behind the end is the last one again, with a weight of 0.
      const int page = first + 2 * tig + (i & 1) + (i & 2) * 4, there = min(page, tail.count - 1);
      const size_t place = static_cast<size_t>(static_cast<u32>(tail.physical[there])) * tail.kv_heads;
#pragma unroll
      for (int j = 0; j < kPieces; ++j) codes[i][j] = load_fresh8(tail.codes + place * D + gid * 8 + j * 64);
      const u32 both = load_fresh4(tail.params + place);
      params[i] = *reinterpret_cast<const half2*>(&both);
      x[i] = page < tail.count && gid < group ? tail.logits[gid * tail.count + there] : -inf();
    }
    rescale(o, top, sum, fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])));
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = fast_exp2(x[i] - finite_max(top)), sum += w[i];
    const u32 b0 = pack2<half>(w[0], w[1]), b1 = pack2<half>(w[2], w[3]);
#pragma unroll
    for (int j = 0; j < kPieces; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        u32 t[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) t[k] = two_values(codes[k][j], i, __low2half2(params[k]), __high2half2(params[k]));
        mma_16bit<half>(o[4 * j + i], __byte_perm(t[0], t[1], 0x5410), __byte_perm(t[0], t[1], 0x7632), __byte_perm(t[2], t[3], 0x5410), __byte_perm(t[2], t[3], 0x7632), b0, b1);
      }
  }
}
