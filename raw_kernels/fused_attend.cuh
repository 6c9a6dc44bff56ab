// Exact attention of one group over a list of rows of K and V, from registers: the last phase of fused_decode.cu.
//
// With up to 8 query heads and few tokens a block, what counts is the chain of dependent loads, so K and V of a tile of 16 tokens are fetched together, 16
// bytes a lane, into the fragments they are needed in, without shared memory:
//     S^T [8 heads, 16 tokens] = Q K^T      A = Q (rows 8 to 15 are zero), B = K: lane (gid, tig) has token gid and token gid + 8
//     O^T [d, 8 heads]        += V^T P      A = V^T, two tokens' values of a channel packed by PRMT, B = P as S^T left it
// S^T comes out as P goes in: no transpose.
#pragma once

#include "fused_tail.cuh"

__device__ __forceinline__ u32 word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// One warp's part, `q` [group, D] in shared memory: tiles warp, warp + kWarps, ... of `count` tokens at the rows `places` of K and V, and of the pages of `tail`, unless kNoTail. Leaves the state of head gid in (top, sum),
// over all of these, and O, not normalised, in `o_out` [kWarps, group, D]. All warps of the block come.
template <typename T, int D, int kWarps, bool kNoTail>
__device__ __forceinline__ void attend_warp(const T* q, const T* k, const T* v, const int* places, int count, int group, float scale_log2, const PrunedPages& tail,
                                            float* o_out, float& top, float& sum) {
  constexpr int kKeyPieces = D / 32, kValuePieces = D / 64;
  const int lane = lane_id(), gid = lane / 4, tig = lane % 4, warp = uniform_warp_id();
  const u32 query_at = smem_address(q + min(gid, group - 1) * D + tig * 8);  // heads from `group` on repeat the last, and nobody looks
  float o[4 * kValuePieces][4] = {};
  top = -inf(), sum = 0.f;
  const int* here = places + warp * 16;
#pragma unroll 1
  for (int left = count - warp * 16; left > 0; left -= kWarps * 16, here += kWarps * 16) {
    uint4 keys[2][kKeyPieces], values[4][kValuePieces];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const T* const row = k + static_cast<size_t>(static_cast<u32>(here[min(gid + 8 * h, left - 1)])) * D + tig * 8;
#pragma unroll
      for (int j = 0; j < kKeyPieces; ++j) keys[h][j] = load_fresh16(row + j * 32);
    }
    const auto load_values = [&](int j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // A token behind the end is the last one again, with a weight of 0: values that are not finite make a NaN where they are.
        const int token = 2 * tig + (i & 1) + (i & 2) * 4;
        values[i][j] = load_fresh16(v + static_cast<size_t>(static_cast<u32>(here[min(token, left - 1)])) * D + gid * 8 + j * 64);
      }
    };
    load_values(0);
    float s[2][4] = {};
#pragma unroll
    for (int j = 0; j < kKeyPieces; ++j) {
      uint4 query;  // read anew for every tile: 16 registers that would otherwise be spilled
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(query.x), "=r"(query.y), "=r"(query.z), "=r"(query.w) : "r"(query_at + j * 64));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        mma_16bit<T>(s[h], query.x, 0, query.y, 0, keys[h][j].x, keys[h][j].y);
        mma_16bit<T>(s[h], query.z, 0, query.w, 0, keys[h][j].z, keys[h][j].w);
      }
    }
#pragma unroll
    for (int j = 1; j < kValuePieces; ++j) load_values(j);  // where the keys were: all at once would not fit 128 registers
    float x[2][2], best = -inf();
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const bool real = 8 * h + 2 * tig + c < left;
        x[h][c] = real ? s[h][c] * scale_log2 : -inf();
        best = fmaxf(best, x[h][c]);
      }
    rescale(o, top, sum, best);
    const float base = finite_max(top);
    float w[2][2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int c = 0; c < 2; ++c) w[h][c] = fast_exp2(x[h][c] - base), sum += w[h][c];
    const u32 b0 = pack2<T>(w[0][0], w[0][1]), b1 = pack2<T>(w[1][0], w[1][1]);
#pragma unroll
    for (int j = 0; j < kValuePieces; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const u32 t0 = word_of(values[0][j], i), t1 = word_of(values[1][j], i), t8 = word_of(values[2][j], i), t9 = word_of(values[3][j], i);
        mma_16bit<T>(o[4 * j + i], __byte_perm(t0, t1, 0x5410), __byte_perm(t0, t1, 0x7632), __byte_perm(t8, t9, 0x5410), __byte_perm(t8, t9, 0x7632), b0, b1);
      }
  }
  if constexpr (!kNoTail) attend_pruned<D, kWarps>(tail, group, o, top, sum);
  sum = warp_sum<4>(sum);
  __syncthreads();  // `o_out` may lie where `places` does
  // Not asked for before the loop, which has no register to keep it in.
  const int late_lane = fresh_thread() % kWarp, row = late_lane / 4, column = late_lane % 4;
  o_out += uniform_warp_id() * group * D;
#pragma unroll
  for (int j = 0; j < kValuePieces; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int head = 2 * column + c, channel = (row + 8 * j) * 8 + 2 * i;
        if (head < group) *reinterpret_cast<float2*>(o_out + head * D + channel) = make_float2(o[4 * j + i][c], o[4 * j + i][c + 2]);
      }
}
