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

// The mean of a page's keys or values, its first `slot` from `page` and the last one in `fresh`, in 8 bits to `codes` and `params`.
template <typename T, int D, int kWords>
__device__ __forceinline__ void write_page_mean(const T* page, const Piece<kWords>& fresh, int slot, u8* codes, u32* params) {
  constexpr int kEach = 2 * kWords, kAhead = D == 256 ? 8 : 16;
  const int channel = lane_id() * kEach;
  float mean[kEach] = {};
  const auto add = [&](const Piece<kWords>& from) {
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      const float2 x = unpack2<T>(from.w[j]);
      mean[2 * j] += x.x, mean[2 * j + 1] += x.y;
    }
  };
#pragma unroll 1
  for (int first = 0; first < slot; first += kAhead) {
    Piece<kWords> old[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) old[i].load(page + min(first + i, slot - 1) * D + channel);
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (first + i < slot) add(old[i]);
  }
  add(fresh);
  float top = -inf(), bottom = inf();
  bool nan = false;
#pragma unroll
  for (int c = 0; c < kEach; ++c) {
    mean[c] = __fdiv_rn(mean[c], static_cast<float>(slot + 1));
    top = fmaxf(top, mean[c]), bottom = fminf(bottom, mean[c]), nan |= mean[c] != mean[c];
  }
  const Codes<255> rounded(warp_max(top), warp_min(bottom), __any_sync(kFullMask, nan));
  u32 code[kEach];
#pragma unroll
  for (int c = 0; c < kEach; ++c) code[c] = rounded(mean[c]);
  store_bytes<kEach>(codes + channel, code);
  if (lane_id() == 0) *params = pair_bits(rounded.scale, rounded.zero);
}

// Likewise of bounds, rounded outwards.
template <typename T, int D, int kWords>
__device__ __forceinline__ void write_page_bounds(const T* page, const Piece<kWords>& fresh, int slot, u8* codes, u32* params) {
  constexpr int kEach = 2 * kWords, kAhead = D == 256 ? 8 : 16;
  const int channel = lane_id() * kEach;
  float high[kEach], low[kEach];
#pragma unroll
  for (int c = 0; c < kEach; ++c) high[c] = -inf(), low[c] = inf();
  const auto widen = [&](const Piece<kWords>& from) {
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      const float2 pair = unpack2<T>(from.w[j]);
      const float x[2] = {pair.x, pair.y};
#pragma unroll
      for (int k = 0; k < 2; ++k) {  // a NaN stays
        asm("max.NaN.f32 %0, %0, %1;" : "+f"(high[2 * j + k]) : "f"(x[k]));
        asm("min.NaN.f32 %0, %0, %1;" : "+f"(low[2 * j + k]) : "f"(x[k]));
      }
    }
  };
#pragma unroll 1
  for (int first = 0; first < slot; first += kAhead) {
    Piece<kWords> old[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) old[i].load(page + min(first + i, slot - 1) * D + channel);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) widen(old[i]);  // a key twice changes no bound
  }
  widen(fresh);
  float top = -inf(), bottom = inf();
  bool nan = false;
#pragma unroll
  for (int c = 0; c < kEach; ++c) top = fmaxf(top, high[c]), bottom = fminf(bottom, low[c]), nan |= high[c] != high[c];
  const BoundCodes rounded(warp_max(top), warp_min(bottom), __any_sync(kFullMask, nan));
  u32 code[kEach];
#pragma unroll
  for (int c = 0; c < kEach; ++c) code[c] = rounded.up(high[c]);
  store_bytes<kEach>(codes + channel, code);
#pragma unroll
  for (int c = 0; c < kEach; ++c) code[c] = rounded.down(low[c]);
  store_bytes<kEach>(codes + D + channel, code);
  if (lane_id() == 0) *params = pair_bits(rounded.scale, rounded.zero);
}

// Where one page of one kv head lies.
template <typename T>
struct PagePlace {
  T *k, *v;
  u8 *shadow, *codes, *value_codes;  // the last is null where no mean of the values is kept
  u32 *params, *value_params;
};

// Write token `slot` of a page, and what is kept of the page: bounds (Vectors = 2) or means (1) of its keys up to this one, and the mean of its values. It is there for the
// warp after a __syncwarp, for others after a barrier.
template <typename T, int D, int Vectors>
__device__ __forceinline__ void append_token(const T* k, const T* v, const PagePlace<T>& page, int slot, int page_size) {
  constexpr int kEach = D / kWarp, kWords = kEach / 2;
  const int lane = lane_id(), channel = lane * kEach;
  Piece<kWords> key, value;
  key.load(k + channel), value.load(v + channel);
  if constexpr (Vectors == 1) write_page_mean<T, D>(page.k, key, slot, page.codes, page.params);
  if constexpr (Vectors == 2) write_page_bounds<T, D>(page.k, key, slot, page.codes, page.params);
  if (page.value_codes) write_page_mean<T, D>(page.v, value, slot, page.value_codes, page.value_params);
  key.store(page.k + slot * D + channel), value.store(page.v + slot * D + channel);
  float x[kEach], top = -inf(), bottom = inf();
  bool nan = false;
#pragma unroll
  for (int j = 0; j < kWords; ++j) {
    const float2 pair = unpack2<T>(key.w[j]);
    x[2 * j] = pair.x, x[2 * j + 1] = pair.y;
  }
#pragma unroll
  for (int c = 0; c < kEach; ++c) top = fmaxf(top, x[c]), bottom = fminf(bottom, x[c]), nan |= x[c] != x[c];
  const Codes<15> quantized(warp_max(top), warp_min(bottom), __any_sync(kFullMask, nan));
  u32 code[kEach];
#pragma unroll
  for (int c = 0; c < kEach; ++c) code[c] = quantized(x[c]);
  // Byte j holds channel j and, shifted, channel j + d/2, which lane + 16 has.
#pragma unroll
  for (int c = 0; c < kEach; ++c) code[c] |= __shfl_xor_sync(kFullMask, code[c], kWarp / 2) << 4;
  if (lane < kWarp / 2) store_bytes<kEach>(page.shadow + slot * (D / 2) + channel, code);
  if (lane == 0) *reinterpret_cast<u32*>(page.shadow + page_size * (D / 2) + slot * 4) = pair_bits(quantized.scale, quantized.zero);
}
