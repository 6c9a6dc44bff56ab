// One new token of a row, by one warp, inside fused_decode.cu: what append.cu writes for it, to the last bit.
//
// d / 32 channels a lane, of every token of the page, so that bounds and means need no exchange between lanes, and means are added slot after slot as everywhere. The page's older keys
// are read for them: 4 KB at P=16, d=128, which the other warps' streams hide.
#pragma once

#include "codes.cuh"

struct NewTokens {
  const void* k;  // [b, Hkv, d], strides below, channels contiguous, 16-byte aligned; null where nothing is appended
  const void* v;  // likewise
  const int* counts;  // [b], 0 or 1
  long long k_strides[2];  // elements between sequences and heads
  long long v_strides[2];
};

// A lane's piece of a row, which lies in `kWords` words.
template <int kWords>
struct Piece {
  u32 w[kWords];

  __device__ __forceinline__ void load(const void* p) {
    if constexpr (kWords == 1) w[0] = load_fresh4(p);
    if constexpr (kWords == 2) {
      const uint2 x = load_fresh8(p);
      w[0] = x.x, w[1] = x.y;
    }
    if constexpr (kWords == 4) {
      const uint4 x = load_fresh16(p);
      w[0] = x.x, w[1] = x.y, w[2] = x.z, w[3] = x.w;
    }
  }
  __device__ __forceinline__ void store(void* p) const {
    if constexpr (kWords == 1) *static_cast<u32*>(p) = w[0];
    if constexpr (kWords == 2) *static_cast<uint2*>(p) = make_uint2(w[0], w[1]);
    if constexpr (kWords == 4) *static_cast<uint4*>(p) = make_uint4(w[0], w[1], w[2], w[3]);
  }
};

// As many bytes as a lane has channels, from codes in as many words.
template <int kEach>
__device__ __forceinline__ void store_bytes(u8* p, const u32 (&code)[kEach]) {
  u32 w[ceil_div(kEach, 4)] = {};
#pragma unroll
  for (int c = 0; c < kEach; ++c) w[c / 4] |= code[c] << (8 * (c % 4));
  if constexpr (kEach == 2) *reinterpret_cast<u16*>(p) = static_cast<u16>(w[0]);
  if constexpr (kEach == 4) *reinterpret_cast<u32*>(p) = w[0];
  if constexpr (kEach == 8) *reinterpret_cast<uint2*>(p) = make_uint2(w[0], w[1]);
}

// Write token `slot` of a page, and what is kept of the page: bounds (Vectors = 2) or means (1) of its tokens up to this one, in 8 bits. All pointers but the first two are
// this page's and kv head's; what `params`, `codes` and the rest get is there for the warp after a __syncwarp, for others after a barrier.
template <typename T, int D, int Vectors>
__device__ __forceinline__ void append_token(const T* k, const T* v, T* k_page, T* v_page, u8* shadow, u8* codes, u32* params, int slot, int page_size) {
  constexpr int kEach = D / kWarp, kWords = kEach / 2, kAhead = D == 256 ? 8 : 16;
  const int lane = lane_id(), channel = lane * kEach;
  Piece<kWords> key, value;
  key.load(k + channel), value.load(v + channel);
  float x[kEach];
  const auto spread = [&](const Piece<kWords>& from) {
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      const float2 pair = unpack2<T>(from.w[j]);
      x[2 * j] = pair.x, x[2 * j + 1] = pair.y;
    }
  };
  if constexpr (Vectors != 0) {
    float high[kEach], low[kEach];  // or the sum, in `high`
#pragma unroll
    for (int c = 0; c < kEach; ++c) high[c] = Vectors == 2 ? -inf() : 0.f, low[c] = inf();
    const auto include = [&](const Piece<kWords>& from) {
      spread(from);
#pragma unroll
      for (int c = 0; c < kEach; ++c) {
        if constexpr (Vectors == 1) {
          high[c] += x[c];
        } else {
          asm("max.NaN.f32 %0, %0, %1;" : "+f"(high[c]) : "f"(x[c]));
          asm("min.NaN.f32 %0, %0, %1;" : "+f"(low[c]) : "f"(x[c]));
        }
      }
    };
#pragma unroll 1
    for (int first = 0; first < slot; first += kAhead) {
      Piece<kWords> old[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) old[i].load(k_page + min(first + i, slot - 1) * D + channel);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (Vectors == 2 || first + i < slot) include(old[i]);  // a key twice changes no bound
      }
    }
    include(key);
    float top = -inf(), bottom = inf();
    bool nan = false;
#pragma unroll
    for (int c = 0; c < kEach; ++c) {
      if constexpr (Vectors == 1) low[c] = high[c] = __fdiv_rn(high[c], static_cast<float>(slot + 1));
      top = fmaxf(top, high[c]), bottom = fminf(bottom, low[c]), nan |= high[c] != high[c];
    }
    top = warp_max(top), bottom = warp_min(bottom), nan = __any_sync(kFullMask, nan);
    u32 code[kEach];
    if constexpr (Vectors == 1) {
      const Codes<255> rounded(top, bottom, nan);
#pragma unroll
      for (int c = 0; c < kEach; ++c) code[c] = rounded(high[c]);
      store_bytes<kEach>(codes + channel, code);
      if (lane == 0) *params = pair_bits(rounded.scale, rounded.zero);
    } else {
      const BoundCodes rounded(top, bottom, nan);
#pragma unroll
      for (int c = 0; c < kEach; ++c) code[c] = rounded.up(high[c]);
      store_bytes<kEach>(codes + channel, code);
#pragma unroll
      for (int c = 0; c < kEach; ++c) code[c] = rounded.down(low[c]);
      store_bytes<kEach>(codes + D + channel, code);
      if (lane == 0) *params = pair_bits(rounded.scale, rounded.zero);
    }
  }

  key.store(k_page + slot * D + channel), value.store(v_page + slot * D + channel);
  spread(key);
  float top = -inf(), bottom = inf();
  bool nan = false;
#pragma unroll
  for (int c = 0; c < kEach; ++c) top = fmaxf(top, x[c]), bottom = fminf(bottom, x[c]), nan |= x[c] != x[c];
  const Codes<15> quantized(warp_max(top), warp_min(bottom), __any_sync(kFullMask, nan));
  u32 code[kEach];
#pragma unroll
  for (int c = 0; c < kEach; ++c) code[c] = quantized(x[c]);
  // Byte j holds channel j and, shifted, channel j + d/2, which lane + 16 has.
#pragma unroll
  for (int c = 0; c < kEach; ++c) code[c] |= __shfl_xor_sync(kFullMask, code[c], kWarp / 2) << 4;
  if (lane < kWarp / 2) store_bytes<kEach>(shadow + slot * (D / 2) + channel, code);
  if (lane == 0) *reinterpret_cast<u32*>(shadow + page_size * (D / 2) + slot * 4) = pair_bits(quantized.scale, quantized.zero);
}
