// Attention over lists of tokens or pages, one list a (sequence, kv head). The kernel is in attention.cuh.
#include "attention.cuh"

CHECK_PARAMS(AttentionParams);

template <typename T, int D, int kWarps, int kStages, bool kLogWeight>
__global__ void __launch_bounds__(kWarps * kWarp) sparse_attention(const __grid_constant__ AttentionParams p) {
  attend<T, D, kWarps, kStages, true, kLogWeight>(p);
}
