// Codes of keys, of means and of bounds, as append.cu and fused_decode.cu write them: each formula once.
#pragma once

#include "common.cuh"

__device__ __forceinline__ u32 half_bits(half x) { return __half_as_ushort(x); }
__device__ __forceinline__ u32 pair_bits(half scale, half zero) { return half_bits(scale) | half_bits(zero) << 16; }

// Scale and zero of some values, and their codes, 0 to Steps; see ops/quantize.py. NaN anywhere: scale and zero are NaN and every code is 0.
template <int Steps>
struct Codes {
  half scale, zero;
  float s, z;

  __device__ __forceinline__ Codes(float top, float bottom, bool nan) {
    zero = __float2half_rn(nan ? __int_as_float(0x7fc00000) : bottom);
    z = __half2float(zero);
    scale = __float2half_rn(nan ? __int_as_float(0x7fc00000) : fmaxf(__fdiv_rn(top - z, static_cast<float>(Steps)), 6.103515625e-5f));
    s = __half2float(scale);
  }
  __device__ __forceinline__ u32 operator()(float x) const {
    // fminf and fmaxf turn a NaN into a bound; the cast is then defined.
    return static_cast<u32>(fminf(fmaxf(rintf(__fdiv_rn(x - z, s)), 0.f), static_cast<float>(Steps)));
  }
};

// Scale and zero of a page's bounds, and codes rounded outwards, so that they still bound; see ops/page_scores.py.
struct BoundCodes {
  half scale, zero;
  float s, z;

  __device__ __forceinline__ BoundCodes(float top, float bottom, bool nan) {
    const float quiet = __int_as_float(0x7fc00000);
    zero = __float2half_rd(nan ? quiet : bottom);
    z = __half2float(zero);
    scale = __float2half_ru(nan ? quiet : fmaxf(__fdiv_rn(top - z, 255.f), 6.103515625e-5f));
    // The quotient itself may have been rounded down onto a half.
    if (fmaf(255.f, __half2float(scale), z) < top) scale = __ushort_as_half(__half_as_ushort(scale) + 1);
    s = __half2float(scale);
  }
  __device__ __forceinline__ u32 up(float x) const {
    const float code = fminf(fmaxf(ceilf(__fdiv_rn(x - z, s)), 0.f), 255.f);
    return static_cast<u32>(fminf(code + (fmaf(s, code, z) < x ? 1.f : 0.f), 255.f));
  }
  __device__ __forceinline__ u32 down(float x) const {
    const float code = fminf(fmaxf(floorf(__fdiv_rn(x - z, s)), 0.f), 255.f);
    return static_cast<u32>(fmaxf(code - (fmaf(s, code, z) > x ? 1.f : 0.f), 0.f));
  }
};
