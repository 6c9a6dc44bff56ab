// A kernel with one error of each kind, to show that a tool looks at kernels that its filter names.
using u32 = unsigned int;

struct CanaryParams {
  u32* out;       // [32]
  const u32* in;  // [32], not initialised
};
static_assert(sizeof(CanaryParams) == SIZEOF_CanaryParams, "CanaryParams: the ctypes mirror has another size");

enum Fault { kOutOfBounds = 0, kRace = 1, kUninitialised = 2, kDivergentBarrier = 3 };

template <int kFault>
__global__ void canary(const __grid_constant__ CanaryParams p) {
  __shared__ u32 shared[64];
  const u32 i = threadIdx.x;
  if constexpr (kFault == kOutOfBounds) {
    p.out[i == 31 ? 32 : i] = i;
  } else if constexpr (kFault == kRace) {
    shared[i] = i;
    p.out[i % 32] = shared[63 - i];  // of the other warp, without a barrier
  } else if constexpr (kFault == kUninitialised) {
    p.out[i] = p.in[i];
  } else {
    if (i < 16) __syncthreads();
    p.out[i] = i;
  }
}
