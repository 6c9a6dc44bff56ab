// Primitives that every kernel shares, each written once. Raw pointers only; NVRTC needs nothing but these two headers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using bf16 = __nv_bfloat16;

// The host mirrors each parameter struct with ctypes and passes its size as -DSIZEOF_<name>: a mismatch fails to compile.
#define CHECK_PARAMS(name) static_assert(sizeof(name) == SIZEOF_##name, #name ": the ctypes mirror has another size")

constexpr int kWarp = 32;
constexpr u32 kFullMask = 0xffffffffu;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float inf() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float finite_max(float m) { return m == -inf() ? 0.f : m; }  // of a softmax in base 2 so far; keeps -inf - -inf out of its exponents
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <typename A, typename B>
__host__ __device__ constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// x, of which the compiler forgets where it came from: what is made of it here is not kept in a register from an earlier place on.
__device__ __forceinline__ int fresh(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ int fresh_thread() { return fresh(threadIdx.x); }

__device__ __forceinline__ int lane_id() { return threadIdx.x & (kWarp - 1); }
__device__ __forceinline__ int warp_id() { return threadIdx.x / kWarp; }
// The same, and the compiler knows that all lanes agree: loops over it need no provision for lanes that part.
__device__ __forceinline__ int uniform_warp_id() { return __shfl_sync(kFullMask, fresh_thread() / kWarp, 0); }

// ---- 16-bit types ----

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ half from_float<half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

// Two neighbours that share a 32-bit word, low half first.
template <typename T>
__device__ __forceinline__ float2 unpack2(u32 w);
template <>
__device__ __forceinline__ float2 unpack2<half>(u32 w) {
  half2 h;
  *reinterpret_cast<u32*>(&h) = w;
  return __half22float2(h);
}
template <>
__device__ __forceinline__ float2 unpack2<bf16>(u32 w) {
  // A bf16 is the upper half of a float: two integer instructions instead of two conversions.
  return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
}

template <typename T>
__device__ __forceinline__ u32 pack2(float lo, float hi);
template <>
__device__ __forceinline__ u32 pack2<half>(float lo, float hi) {
  half2 h = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<u32*>(&h);
}
template <>
__device__ __forceinline__ u32 pack2<bf16>(float lo, float hi) {
  __nv_bfloat162 h = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<u32*>(&h);
}

// Of the type that `bf` says.
__device__ __forceinline__ float2 unpack2(bool bf, u32 w) { return bf ? unpack2<bf16>(w) : unpack2<half>(w); }
__device__ __forceinline__ u32 pack2(bool bf, float lo, float hi) { return bf ? pack2<bf16>(lo, hi) : pack2<half>(lo, hi); }

// fp16 that never becomes infinite by rounding; -inf, +inf and NaN stay what they are.
__device__ __forceinline__ half to_half_clamped(float x) {
  const float c = fminf(fmaxf(x, -65504.f), 65504.f);
  return __float2half_rn(fabsf(x) < inf() ? c : x);
}

// Two halves in a word, finite or NaN: what does not fit becomes +-65504, an infinity too. Volatile, so that it is not sunk into a branch that stores it.
__device__ __forceinline__ u32 pack2_saturated(float lo, float hi) {
  u32 pair;
  asm volatile("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  return pair;
}

// ---- addresses ----

// base + index * stride in one instruction.
__device__ __forceinline__ const u8* mad_wide(const u8* base, u32 index, u32 stride) {
  const u8* sum;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(sum) : "r"(index), "r"(stride), "l"(base));
  return sum;
}
// Keeps a value in a register: what it was made of is forgotten, so that it is not made again at every use.
__device__ __forceinline__ void opaque(u32& x) { asm("" : "+r"(x)); }
__device__ __forceinline__ void opaque(const u8*& x) { asm("" : "+l"(x)); }

// ---- loads ----

// Read once, by one thread: through the read-only path without a line in L1.
__device__ __forceinline__ uint4 load_stream16(const void* p) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ uint2 load_stream8(const void* p) {
  uint2 v;
  asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
__device__ __forceinline__ u32 load_stream4(const void* p) {
  u32 v;
  asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
// Likewise, of what this kernel itself writes, before a barrier.
__device__ __forceinline__ uint4 load_fresh16(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ uint2 load_fresh8(const void* p) {
  uint2 v;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
__device__ __forceinline__ u32 load_fresh4(const void* p) {
  u32 v;
  asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
// The same with a line in L1, where lanes of one instruction take little of the 32 bytes that are fetched: 1 to 2 % of a step.
__device__ __forceinline__ u32 load_near4(const void* p) {
  u32 v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
// What another block has written while this one runs: from L2, every time.
__device__ __forceinline__ u32 load_l2(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
// Plain vector access, for data that is shared, reused, or written by the same kernel.
__device__ __forceinline__ uint4 load16(const void* p) { return *reinterpret_cast<const uint4*>(p); }
__device__ __forceinline__ void store16(void* p, uint4 v) { *reinterpret_cast<uint4*>(p) = v; }

// ---- cp.async ----

__device__ __forceinline__ u32 smem_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// 16 bytes, past L1. With `real` false nothing is read and zeros are written.
__device__ __forceinline__ void cp_async16(void* smem, const void* global, bool real = true) {
  const int bytes = real ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(smem)), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async4(void* smem, const void* global, bool real = true) {
  const int bytes = real ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem_address(smem)), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most N of the committed groups are still under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// ---- counters in shared memory ----

// Add one to the word at an address of `smem_address`. Through a pointer the address would be made anew each time.
__device__ __forceinline__ void count_shared(u32 address) { asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(address) : "memory"); }

// ---- reductions and scans ----

// Over aligned sub-warps of `Width` lanes; every lane gets the result. Same order in every run.
template <int Width = kWarp, typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int step = Width / 2; step; step /= 2) x += __shfl_xor_sync(kFullMask, x, step);
  return x;
}
// fmaxf drops a NaN: use `warp_max` only where NaN is looked for elsewhere.
template <int Width = kWarp>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = Width / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, step));
  return x;
}
template <int Width = kWarp>
__device__ __forceinline__ float warp_min(float x) {
#pragma unroll
  for (int step = Width / 2; step; step /= 2) x = fminf(x, __shfl_xor_sync(kFullMask, x, step));
  return x;
}
template <typename T>
__device__ __forceinline__ T warp_inclusive_scan(T x) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const T up = __shfl_up_sync(kFullMask, x, step);
    if (lane_id() >= step) x += up;
  }
  return x;
}

// Over a block of `Threads` threads, a multiple of 32. `scratch` has Threads / 32 + 1 entries. Every thread must come.
template <int Threads, typename T>
__device__ __forceinline__ T block_sum(T x, T* scratch) {
  constexpr int kWarps = Threads / kWarp;
  x = warp_sum(x);
  if constexpr (kWarps == 1) return x;
  __syncthreads();  // scratch may still be read from the call before
  if (lane_id() == 0) scratch[warp_id()] = x;
  __syncthreads();
  T total = lane_id() < kWarps ? scratch[lane_id()] : T(0);
  return warp_sum(total);
}
template <int Threads>
__device__ __forceinline__ float block_max(float x, float* scratch) {
  constexpr int kWarps = Threads / kWarp;
  x = warp_max(x);
  if constexpr (kWarps == 1) return x;
  __syncthreads();
  if (lane_id() == 0) scratch[warp_id()] = x;
  __syncthreads();
  return warp_max(lane_id() < kWarps ? scratch[lane_id()] : -inf());
}
// Sum of x over the threads before this one; `total` gets the sum over all.
template <int Threads, typename T>
__device__ __forceinline__ T block_exclusive_scan(T x, T* scratch, T& total) {
  constexpr int kWarps = Threads / kWarp;
  const T inclusive = warp_inclusive_scan(x);
  __syncthreads();
  if (lane_id() == kWarp - 1) scratch[warp_id()] = inclusive;
  __syncthreads();
  T sums = warp_inclusive_scan(lane_id() < kWarps ? scratch[lane_id()] : T(0));
  total = __shfl_sync(kFullMask, sums, kWarps - 1);
  T before = __shfl_sync(kFullMask, sums, warp_id() ? warp_id() - 1 : 0);
  return (warp_id() ? before : T(0)) + inclusive - x;
}

// ---- floats in the order of unsigned integers ----

// -NaN < -inf < ... < -0 < +0 < ... < +inf < +NaN.
__device__ __forceinline__ u32 ordered_key(float x) {
  const u32 bits = __float_as_uint(x);
  return bits ^ (static_cast<u32>(static_cast<int>(bits) >> 31) | 0x80000000u);
}
__device__ __forceinline__ float from_ordered_key(u32 key) {
  return __uint_as_float(key ^ ((key >> 31) ? 0x80000000u : 0xffffffffu));
}

// ---- the last block to arrive ----

// Count this block in at `counter`, by one thread after a barrier, and tell it whether the block is the last of `total`. What any block wrote before its barrier is then
// visible to all threads of the last one after its next, and the counter is at zero for the next launch: atom.inc wraps at total - 1.
__device__ __forceinline__ bool count_in(u32* counter, u32 total) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(total - 1) : "memory");
  return before == total - 1;
}
