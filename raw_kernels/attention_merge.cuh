// How blocks of attention.cuh that share a row join what they have: each leaves its part in memory, and whoever comes last joins them.
#pragma once

#include "attention_rows.cuh"

// Four channels of a head's output, from d on, and its lse.
template <typename T, int D>
__device__ __forceinline__ void finish(const AttentionParams& p, int head, int d, const float (&x)[4], float top, float sum) {
  const float scale = sum == 0.f ? 0.f : 1.f / sum;
  const uint2 packed{pack2<T>(x[0] * scale, x[1] * scale), pack2<T>(x[2] * scale, x[3] * scale)};
  *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + static_cast<size_t>(head) * D + d) = packed;
  if (d == 0) p.lse[head] = sum == 0.f ? -inf() : (top + log2f(sum)) * kLn2;
}

// A block has at most two rows that others share: its first, and its last, which begins after the block does. Part 2 * block + 1 is of the latter.
struct SharedRows {
  int row[2], start[2], tiles[2];               // row -1: none
  u32 first[2], parts[2];                       // blocks that have a part
  float top[kHeads], sum[kHeads], old[kHeads];  // of a row: maximum and sum of the parts so far, and what those before weigh now
};

// Join the parts of those rows for which this block is the last one. `scratch` has `kBytes` that nobody uses any more. The caller has made a barrier since the parts were written.
//
// A row has tens of parts where few rows share the GPU. One part after another, each thread with the weights for itself, 33 of them took 7 us: a warp a scheduler hides
// nothing. So all parts are under way together, by cp.async, weights are found by a lane for each part, and what remains a part is one product.
template <typename T, int D, int kThreads, int kBytes, bool kSparse, int kTail>
__device__ __forceinline__ void merge_shared(const AttentionParams& p, const Rows<kSparse, kTail>& rows, const Line& line, SharedRows& shared, unsigned char* scratch) {
  if (threadIdx.x < 2 && shared.row[threadIdx.x] >= 0) {
    const int i = threadIdx.x;
    shared.first[i] = line.owner(shared.start[i]), shared.parts[i] = line.owner(shared.start[i] + shared.tiles[i] - 1) - shared.first[i] + 1;
    if (!count_in(p.counters + shared.row[i], shared.parts[i])) shared.row[i] = -1;
  }
  __syncthreads();

  constexpr int kFit = kBytes / (kThreads * 16 + kHeads * 4), kBatch = kFit < 2 * kWarp ? kFit : 2 * kWarp;
  constexpr int kEach = ceil_div(kBatch, kWarp);  // parts of a lane
  float4* const vectors = reinterpret_cast<float4*>(scratch);                        // [kBatch][kThreads]
  float* const weights = reinterpret_cast<float*>(scratch + kBatch * kThreads * 16);  // [kBatch][kHeads]
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    if (shared.row[i] < 0) continue;
    const int first_head = rows.first_head(shared.row[i]), num_heads = rows.heads(shared.row[i]), parts = static_cast<int>(shared.parts[i]);
    // In the order of their blocks, whoever came last: the same bits in every run.
    const u32 first = shared.first[i], first_part = 2 * first + (shared.start[i] > line.begin(first));
    const auto part_at = [&](u32 part) { return part ? 2 * (first + part) : first_part; };
#pragma unroll 1
    for (int begin_at = 0; begin_at < num_heads * (D / 4); begin_at += kThreads) {
      const int vector = begin_at + static_cast<int>(threadIdx.x), head = min(vector / (D / 4), num_heads - 1), d = vector % (D / 4) * 4;
      float x[4] = {};
#pragma unroll 1
      for (int begin = 0; begin < parts; begin += kBatch) {
        const int n = min(kBatch, parts - begin);
        const float* from = p.partial + static_cast<size_t>(2 * (first + begin) * kHeads + head) * D + d;
#pragma unroll 4
        for (int j = 0; j < n; ++j, from += 2 * kHeads * D) {
          const bool odd = begin + j == 0 && (first_part & 1);
          cp_async16(vectors + j * kThreads + threadIdx.x, odd ? from + kHeads * D : from);
        }
        cp_async_commit();
#pragma unroll 1
        for (int h = uniform_warp_id(); h < num_heads; h += kThreads / kWarp) {
          float2 state[kEach];
          const float top_before = begin ? shared.top[h] : -inf(), sum_before = begin ? shared.sum[h] : 0.f;
          float top = top_before, sum = 0.f;
#pragma unroll
          for (int k = 0; k < kEach; ++k) {
            const int j = k * kWarp + lane_id();
            state[k] = j < n ? __ldcg(p.partial_state + part_at(begin + j) * kHeads + h) : make_float2(-inf(), 0.f);
          }
#pragma unroll
          for (int k = 0; k < kEach; ++k) top = fmaxf(top, state[k].x);
          top = warp_max(top);
#pragma unroll
          for (int k = 0; k < kEach; ++k) {
            const int j = k * kWarp + lane_id();
            const float weight = fast_exp2(state[k].x - finite_max(top));
            if (j < n) weights[j * kHeads + h] = weight;
            sum = fmaf(weight, state[k].y, sum);
          }
          const float old = fast_exp2(top_before - finite_max(top)), total = fmaf(sum_before, old, warp_sum(sum));
          if (lane_id() == 0) shared.top[h] = top, shared.sum[h] = total, shared.old[h] = old;
        }
        cp_async_wait<0>();
        __syncthreads();
        const float old = shared.old[head];
#pragma unroll
        for (int c = 0; c < 4; ++c) x[c] *= old;
#pragma unroll 4
        for (int j = 0; j < n; ++j) {
          const float weight = weights[j * kHeads + head];
          const float4 y = vectors[j * kThreads + threadIdx.x];
          x[0] = fmaf(weight, y.x, x[0]), x[1] = fmaf(weight, y.y, x[1]), x[2] = fmaf(weight, y.z, x[2]), x[3] = fmaf(weight, y.w, x[3]);
        }
        const float top = shared.top[head], sum = shared.sum[head];
        if (begin + kBatch >= parts && vector < num_heads * (D / 4)) finish<T, D>(p, first_head + head, d, x, top, sum);
        __syncthreads();  // before all this is written again
      }
    }
  }
}
