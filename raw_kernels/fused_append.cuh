// One new token of a row, by one warp, inside fused_decode.cu: what append.cu writes for it, to the last bit but for the sign of a bound that is zero.
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

template <typename T>
struct PairOf;
template <>
struct PairOf<half> { using type = half2; };
template <>
struct PairOf<bf16> { using type = __nv_bfloat162; };
template <typename T>
using Pair = typename PairOf<T>::type;

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

// Maxima and minima of this lane's channels over a page's first `slot` rows and `fresh`. A NaN stays.
template <typename T, int D, int kWords>
__device__ __forceinline__ void page_range(const u16* page, const Piece<kWords>& fresh, int slot, float (&high)[2 * kWords], float (&low)[2 * kWords]) {
  constexpr int kAhead = D == 256 ? 8 : 16;
  Pair<T> most[kWords], least[kWords];
#pragma unroll
  for (int j = 0; j < kWords; ++j) most[j] = least[j] = *reinterpret_cast<const Pair<T>*>(&fresh.w[j]);
#pragma unroll 1
  for (int first = 0; first < slot; first += kAhead) {
    Piece<kWords> old[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) old[i].load(page + min(first + i, slot - 1) * D);  // a row twice changes nothing
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        const Pair<T> x = *reinterpret_cast<const Pair<T>*>(&old[i].w[j]);
        most[j] = __hmax2_nan(most[j], x), least[j] = __hmin2_nan(least[j], x);
      }
  }
#pragma unroll
  for (int j = 0; j < kWords; ++j) {
    const float2 up = unpack2<T>(*reinterpret_cast<const u32*>(&most[j])), down = unpack2<T>(*reinterpret_cast<const u32*>(&least[j]));
    high[2 * j] = up.x, high[2 * j + 1] = up.y, low[2 * j] = down.x, low[2 * j + 1] = down.y;
  }
}

// Their mean, added up row after row.
template <typename T, int D, int kWords>
__device__ __forceinline__ void page_mean(const u16* page, const Piece<kWords>& fresh, int slot, float (&mean)[2 * kWords]) {
  constexpr int kAhead = 8;
#pragma unroll
  for (int c = 0; c < 2 * kWords; ++c) mean[c] = 0.f;
  const auto add = [&](const Piece<kWords>& row, bool real) {
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      const float2 x = unpack2<T>(row.w[j]);
      if (real) mean[2 * j] += x.x, mean[2 * j + 1] += x.y;
    }
  };
#pragma unroll 1
  for (int first = 0; first < slot; first += kAhead) {
    Piece<kWords> old[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) old[i].load(page + min(first + i, slot - 1) * D);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) add(old[i], first + i < slot);
  }
  add(fresh, true);
}

// Where one page of one kv head lies, this lane's first channel of it, and its parameters.
struct PagePlace {
  u16 *k, *v;
  u8 *shadow, *codes, *value_codes;  // the last is null where no mean of the values is kept
  u32 *params, *value_params;
};

// Write token `slot` of a page, and what is kept of the page: bounds (Vectors = 2) or means (1) of its keys up to this one, and the mean of its values. It is there for the
// warp after a __syncwarp, for others after a barrier. `k` and `v` are this lane's channels.
template <int D, int Vectors>
__device__ __forceinline__ void append_token(const u16* k, const u16* v, bool bf, const PagePlace& page, int slot, int page_size) {
  constexpr int kEach = D / kWarp, kWords = kEach / 2;
  const int lane = lane_id();
  Piece<kWords> key, value;
  key.load(k), value.load(v);
  float x[kEach], high[kEach], low[kEach], mean[kEach];
  const auto read = [&](auto type) {  // one copy a type of what depends on it, and one in all of the rest
    using T = decltype(type);
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      const float2 pair = unpack2<T>(key.w[j]);
      x[2 * j] = pair.x, x[2 * j + 1] = pair.y;
    }
    if constexpr (Vectors == 1) page_mean<T, D>(page.k, key, slot, high);
    if constexpr (Vectors == 2) page_range<T, D>(page.k, key, slot, high, low);
    if (page.value_codes) page_mean<T, D>(page.v, value, slot, mean);
  };
  if (bf) read(bf16());
  else read(half());

  u32 code[kEach];
  const auto range = [&](const float (&up)[kEach], const float (&down)[kEach], float& top, float& bottom) {  // and whether there is a NaN
    top = -inf(), bottom = inf();
    bool nan = false;
#pragma unroll
    for (int c = 0; c < kEach; ++c) top = fmaxf(top, up[c]), bottom = fminf(bottom, down[c]), nan |= up[c] != up[c];
    top = warp_max(top), bottom = warp_min(bottom);
    return __any_sync(kFullMask, nan) != 0;
  };
  float top, bottom;
  const auto write_mean = [&](float (&m)[kEach], u8* codes, u32* params) {
#pragma unroll
    for (int c = 0; c < kEach; ++c) m[c] = __fdiv_rn(m[c], static_cast<float>(slot + 1));
    const bool nan = range(m, m, top, bottom);
    const Codes<255> rounded(top, bottom, nan);
#pragma unroll
    for (int c = 0; c < kEach; ++c) code[c] = rounded(m[c]);
    store_bytes<kEach>(codes, code);
    if (lane == 0) *params = pair_bits(rounded.scale, rounded.zero);
  };
  if constexpr (Vectors == 1) write_mean(high, page.codes, page.params);
  if constexpr (Vectors == 2) {
    const bool nan = range(high, low, top, bottom);
    const BoundCodes rounded(top, bottom, nan);
#pragma unroll
    for (int c = 0; c < kEach; ++c) code[c] = rounded.up(high[c]);
    store_bytes<kEach>(page.codes, code);
#pragma unroll
    for (int c = 0; c < kEach; ++c) code[c] = rounded.down(low[c]);
    store_bytes<kEach>(page.codes + D, code);
    if (lane == 0) *page.params = pair_bits(rounded.scale, rounded.zero);
  }
  if (page.value_codes) write_mean(mean, page.value_codes, page.value_params);

  key.store(page.k + slot * D), value.store(page.v + slot * D);
  const bool nan = range(x, x, top, bottom);
  const Codes<15> quantized(top, bottom, nan);
#pragma unroll
  for (int c = 0; c < kEach; ++c) code[c] = quantized(x[c]);
  // Byte j holds channel j and, shifted, channel j + d/2, which lane + 16 has.
#pragma unroll
  for (int c = 0; c < kEach; ++c) code[c] |= __shfl_xor_sync(kFullMask, code[c], kWarp / 2) << 4;
  u8* const shadow = page.shadow + slot * (D / 2);
  if (lane < kWarp / 2) store_bytes<kEach>(shadow + lane * kEach, code);
  if (lane == 0) *reinterpret_cast<u32*>(page.shadow + page_size * (D / 2) + slot * 4) = pair_bits(quantized.scale, quantized.zero);
}
