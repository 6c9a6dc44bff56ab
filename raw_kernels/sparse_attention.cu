// Attention over lists of tokens or pages, one list a (sequence, kv head), and tails if there are any. The kernel is in attention.cuh.
#include "attention.cuh"

CHECK_PARAMS(AttentionParams);

template <typename T, int D, int kWarps, int kStages, bool kLogWeight, int kTail = NoTail>
__global__ void __launch_bounds__(kWarps * kWarp, kTail == NoTail ? 0 : 1) sparse_attention(const __grid_constant__ AttentionParams p) {
  attend<T, D, kWarps, kStages, true, kLogWeight, kTail>(p);
}
