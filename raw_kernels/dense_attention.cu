// Attention over all tokens of each sequence, one query each: the kernel of attention.cuh with the list 0, 1, 2, ...
#include "attention.cuh"

CHECK_PARAMS(AttentionParams);

template <typename T, int D, int kWarps, int kStages>
__global__ void __launch_bounds__(kWarps * kWarp) dense_attention(const __grid_constant__ AttentionParams p) {
  attend<T, D, kWarps, kStages, false, false>(p);
}
