// Finding the key of a given rank by histograms of 32-bit keys in the order of the scores. See top_k.cu for the method.
#pragma once

#include "common.cuh"

constexpr int kRadixBins = 2048;
constexpr int kRadixBits = 11;
constexpr u32 kNothing = 0x007fffffu;  // ordered_key(-inf)
constexpr u32 kNaN = 0xffffffffu;
constexpr u32 kForced = 0xff800001u;  // above +inf, below NaN

// A base to subtract from scores up to x: as x, but finite, so that inf - inf does not turn up. A score of +inf then makes its head's sum +inf.
__device__ __forceinline__ float finite(float x) { return fminf(fmaxf(x, -3.4e38f), 3.4e38f); }

// Find the bin that holds rank `want` (1 is the largest): s_result gets the bin, the entries in bins above it, and its own. Leaves the histogram
// empty. The caller's barrier comes before, and another after.
template <int Threads>
__device__ __forceinline__ void find_bin(int* histogram, int want, int* s_scratch, int* s_result) {
  constexpr int kPerThread = kRadixBins / Threads;
  const int top = kRadixBins - 1 - static_cast<int>(threadIdx.x) * kPerThread;
  int count[kPerThread], mine = 0, total;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    count[i] = histogram[top - i];
    histogram[top - i] = 0;
    mine += count[i];
  }
  int above = block_exclusive_scan<Threads>(mine, s_scratch, total);
  if (above < want && above + mine >= want) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (above < want && above + count[i] >= want) s_result[0] = top - i, s_result[1] = above, s_result[2] = count[i];
      above += count[i];
    }
  }
}
