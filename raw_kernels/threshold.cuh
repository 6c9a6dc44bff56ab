// Finding the logit that top-p cuts at from a histogram of mass: bins, their integer weights, and the cut. See top_p.cu for the method.
#pragma once

#include "common.cuh"

constexpr int kMassBins = 512;
constexpr int kMassSubBins = 256;

__device__ __forceinline__ float max_nan(float a, float b) {  // unlike fmaxf, a NaN wins
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// 8 candidates as they are stored.
template <typename Logit>
struct Chunk;
template <>
struct Chunk<half> {
  uint4 raw;
  __device__ float operator[](int i) const {
    const u32 word = i < 4 ? (i < 2 ? raw.x : raw.y) : (i < 6 ? raw.z : raw.w);
    const float2 pair = unpack2<half>(word);
    return i % 2 ? pair.y : pair.x;
  }
  __device__ half2 largest_two() const {
    half2 m[4];
    *reinterpret_cast<uint4*>(m) = raw;
    return __hmax2_nan(__hmax2_nan(m[0], m[1]), __hmax2_nan(m[2], m[3]));
  }
  __device__ float max() const {
    const half2 best = largest_two();
    return max_nan(__low2float(best), __high2float(best));
  }
  __device__ half largest() const {
    const half2 best = largest_two();
    return __hmax_nan(__low2half(best), __high2half(best));
  }
  __device__ void load(const half* p) { raw = load16(p); }
  __device__ void load_some(const half* p, int count) {
    half v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = i < count ? p[i] : __ushort_as_half(0xfc00);
    raw = *reinterpret_cast<uint4*>(v);
  }
  __device__ void store(half* p) const { store16(p, raw); }
};
template <>
struct Chunk<float> {
  float v[8];
  __device__ float operator[](int i) const { return v[i]; }
  __device__ float max() const {
    float m = v[0];
#pragma unroll
    for (int i = 1; i < 8; ++i) m = max_nan(m, v[i]);
    return m;
  }
  __device__ void load(const float* p) {
    *reinterpret_cast<uint4*>(v) = load16(p);
    *reinterpret_cast<uint4*>(v + 4) = load16(p + 4);
  }
  __device__ void load_some(const float* p, int count) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = i < count ? p[i] : -inf();
  }
  __device__ void store(float* p) const {
    store16(p, *reinterpret_cast<const uint4*>(v));
    store16(p + 4, *reinterpret_cast<const uint4*>(v + 4));
  }
};

// floor(y) for 0 <= y < 2^22 in one add: conversions run at a quarter of its rate.
constexpr float kMagic = 8388608.f;  // 2^23: the last bit of the sum is 1
__device__ __forceinline__ int low_bits(float with_magic) { return static_cast<int>(__float_as_uint(with_magic) - __float_as_uint(kMagic)); }

// round(scale * exp(-f * width)) for f in [0, 1) and a width of at most 1/16: three terms of the series, 6e-7 off at most.
__device__ __forceinline__ u32 bin_weight(float f, float width, float scale) {
  const float u = f * width;
  const float e = fmaf(u, fmaf(u, fmaf(u, -1.f / 6.f, 0.5f), -1.f), 1.f);
  return static_cast<u32>(low_bits(fmaf(e, scale, kMagic)));
}

struct Cut {
  int bin;      // the first whose prefix reaches the target, or -1
  float before; // mass of the bins before it
  float mass;   // ... and with it
  bool coarse;  // it holds more than 5 % of what would be kept, and more than 4 candidates
};

// One warp over 32 * kPerLane bins, of which bin k counts 2^(k * step) times its integer.
template <int kPerLane>
__device__ __forceinline__ Cut find_cut(const u32* weights, float step, float target, float one) {
  const int lane = lane_id();
  const float lane_scale = exp2f(step * (lane * kPerLane));
  // Read twice rather than kept: 16 registers are what lets a third block onto the multiprocessor.
  const auto read4 = [&](int i, float (&w)[4]) {
    uint4 four;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(four.x), "=r"(four.y), "=r"(four.z), "=r"(four.w)
                 : "r"(smem_address(weights + lane * kPerLane + i)) : "memory");
    w[0] = four.x, w[1] = four.y, w[2] = four.z, w[3] = four.w;
  };
  // By a running product, or the compiler keeps all powers for both loops; 1e-6 off at its end, for which the margin has room.
  const float ratio = exp2f(step);
  float mass = 0.f, count = 0.f, scale = lane_scale;
#pragma unroll
  for (int i = 0; i < kPerLane; i += 4) {
    float w[4];
    read4(i, w);
#pragma unroll
    for (int j = 0; j < 4; ++j) mass = fmaf(w[j], scale, mass), count += w[j], scale *= ratio;
  }
  const float up_to = warp_inclusive_scan(mass), count_up_to = warp_inclusive_scan(count);
  Cut cut{-1, 0.f, 0.f, false};
  float prefix = up_to - mass, counted = count_up_to - count;
  scale = lane_scale;
#pragma unroll 1
  for (int i = 0; i < kPerLane; i += 4) {
    float w[4];
    read4(i, w);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float with = fmaf(w[j], scale, prefix);
      scale *= ratio, counted += w[j];
      if (cut.bin < 0 && w[j] > 0.f && with >= target) {
        cut.bin = lane * kPerLane + i + j;
        cut.before = prefix, cut.mass = with, cut.coarse = w[j] > fmaxf(0.05f * counted, 4.5f * one);
      }
      prefix = with;
    }
  }
  const u32 found = __ballot_sync(kFullMask, cut.bin >= 0);
  const int source = found ? __ffs(found) - 1 : 0;
  cut.bin = __shfl_sync(kFullMask, cut.bin, source);
  cut.before = __shfl_sync(kFullMask, cut.before, source);
  cut.mass = __shfl_sync(kFullMask, cut.mass, source);
  cut.coarse = __shfl_sync(kFullMask, cut.coarse, source);
  return cut;
}

// The rank-th of the tokens that 512 bins count, of which `before` precede them: (its bin or -1, tokens up to that bin, and with it).
// One warp.
__device__ __forceinline__ int3 find_nth(const u32* counts, int before, int rank) {
  constexpr int kPerLane = kMassBins / kWarp;
  const u32* const mine = counts + lane_id() * kPerLane;
  int sum = 0;
#pragma unroll 4
  for (int i = 0; i < kPerLane; ++i) sum += mine[i];
  const int up_to = before + warp_inclusive_scan(sum);
  int3 found{-1, up_to, up_to};
  int prefix = up_to - sum;
#pragma unroll 4
  for (int i = 0; i < kPerLane; ++i) {
    const int with = prefix + mine[i];
    if (prefix < rank && with >= rank) found = int3{static_cast<int>(lane_id()) * kPerLane + i, prefix, with};
    prefix = with;
  }
  const u32 who = __ballot_sync(kFullMask, found.x >= 0);
  const int source = who ? __ffs(who) - 1 : kWarp - 1;
  found.x = __shfl_sync(kFullMask, found.x, source);
  found.y = __shfl_sync(kFullMask, found.y, source);
  found.z = __shfl_sync(kFullMask, found.z, source);
  return found;
}
