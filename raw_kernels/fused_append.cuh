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

// f of each of x, one after another by the same code: what one warp does once costs less to do than to fetch.
template <int kEach, typename F>
__device__ __forceinline__ void in_turn(float (&x)[kEach], F f) {
#pragma unroll 1
  for (int c = 0; c < kEach; ++c) {
    const float y = f(x[0]);
#pragma unroll
    for (int i = 0; i + 1 < kEach; ++i) x[i] = x[i + 1];
    x[kEach - 1] = y;
  }
}

// A byte for each of x, by `code`.
template <int kEach, typename F>
__device__ __forceinline__ Piece<ceil_div(kEach, 4)> codes_of(const float (&x)[kEach], F code) {
  Piece<ceil_div(kEach, 4)> bytes{};
  float rest[kEach];
#pragma unroll
  for (int c = 0; c < kEach; ++c) rest[c] = x[c];
  in_turn(rest, [&](float next) {
    const u32 byte = code(next);
    if constexpr (kEach == 8) bytes.w[0] = __funnelshift_r(bytes.w[0], bytes.w[1], 8);
    u32& last = bytes.w[kEach / 8];
    last = last >> 8 | byte << (kEach == 2 ? 8 : 24);
    return next;
  });
  return bytes;
}
// `p` is where this lane's bytes begin.
template <int kEach>
__device__ __forceinline__ void store_codes(u8* p, const Piece<ceil_div(kEach, 4)>& bytes) {
  if constexpr (kEach == 2) *reinterpret_cast<u16*>(p) = static_cast<u16>(bytes.w[0]);
  else bytes.store(p);
}

// Larger and smaller of two pairs at once. A NaN stays.
template <typename Pair>
__device__ __forceinline__ void fold(u32& most, u32& least, u32 x) {
  const Pair pair = *reinterpret_cast<const Pair*>(&x), more = __hmax2_nan(*reinterpret_cast<const Pair*>(&most), pair), less = __hmin2_nan(*reinterpret_cast<const Pair*>(&least), pair);
  most = *reinterpret_cast<const u32*>(&more), least = *reinterpret_cast<const u32*>(&less);
}

// Maxima and minima of this lane's channels over a page's first `slot` rows and `fresh`.
template <int D, int kWords>
__device__ __forceinline__ void page_range(bool bf, const u16* page, const Piece<kWords>& fresh, int slot, float (&high)[2 * kWords], float (&low)[2 * kWords]) {
  constexpr int kAhead = D == 256 ? 8 : 16;
  Piece<kWords> most = fresh, least = fresh;
#pragma unroll 1
  for (int first = 0; first < slot; first += kAhead) {
    Piece<kWords> old[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) old[i].load(page + min(first + i, slot - 1) * D);  // a row twice changes nothing
    const auto fold_all = [&](auto pair) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
#pragma unroll
        for (int j = 0; j < kWords; ++j) fold<decltype(pair)>(most.w[j], least.w[j], old[i].w[j]);
    };
    if (bf) fold_all(__nv_bfloat162());
    else fold_all(half2());
  }
#pragma unroll
  for (int j = 0; j < kWords; ++j) {
    const float2 up = unpack2(bf, most.w[j]), down = unpack2(bf, least.w[j]);
    high[2 * j] = up.x, high[2 * j + 1] = up.y, low[2 * j] = down.x, low[2 * j + 1] = down.y;
  }
}

// Their mean, added up row after row.
template <int D, int kWords>
__device__ __forceinline__ void page_mean(bool bf, const u16* page, const Piece<kWords>& fresh, int slot, float (&mean)[2 * kWords]) {
  constexpr int kAhead = 8;
#pragma unroll
  for (int c = 0; c < 2 * kWords; ++c) mean[c] = 0.f;
  const auto add = [&](const Piece<kWords>& row, bool real) {
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      const float2 x = unpack2(bf, row.w[j]);
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
  float x[kEach], top, bottom;
  const auto range = [&](const float (&up)[kEach], const float (&down)[kEach]) {  // and whether there is a NaN
    top = -inf(), bottom = inf();
    bool nan = false;
#pragma unroll
    for (int c = 0; c < kEach; ++c) top = fmaxf(top, up[c]), bottom = fminf(bottom, down[c]), nan |= up[c] != up[c];
    top = warp_max(top), bottom = warp_min(bottom);
    return __any_sync(kFullMask, nan) != 0;
  };
  const auto write_mean = [&](const u16* rows, const Piece<kWords>& fresh, u8* codes, u32* params) {
    page_mean<D>(bf, rows, fresh, slot, x);
    const float count = static_cast<float>(slot + 1);
    in_turn(x, [&](float sum) { return __fdiv_rn(sum, count); });
    const bool nan = range(x, x);
    const Codes<255> rounded(top, bottom, nan);
    store_codes<kEach>(codes, codes_of(x, rounded));
    if (lane == 0) *params = pair_bits(rounded.scale, rounded.zero);
  };
  if constexpr (Vectors == 1) write_mean(page.k, key, page.codes, page.params);
  if constexpr (Vectors == 2) {
    float low[kEach];
    page_range<D>(bf, page.k, key, slot, x, low);
    const bool nan = range(x, low);
    const BoundCodes rounded(top, bottom, nan);
    store_codes<kEach>(page.codes, codes_of(x, [&](float bound) { return rounded.up(bound); }));
    store_codes<kEach>(page.codes + D, codes_of(low, [&](float bound) { return rounded.down(bound); }));
    if (lane == 0) *page.params = pair_bits(rounded.scale, rounded.zero);
  }
  if (page.value_codes) write_mean(page.v, value, page.value_codes, page.value_params);

  key.store(page.k + slot * D), value.store(page.v + slot * D);
#pragma unroll
  for (int j = 0; j < kWords; ++j) {
    const float2 pair = unpack2(bf, key.w[j]);
    x[2 * j] = pair.x, x[2 * j + 1] = pair.y;
  }
  const bool nan = range(x, x);
  const Codes<15> quantized(top, bottom, nan);
  auto codes = codes_of(x, quantized);
  // Byte j holds channel j and, shifted, channel j + d/2, which lane + 16 has.
#pragma unroll
  for (u32& word : codes.w) word |= __shfl_xor_sync(kFullMask, word, kWarp / 2) << 4;
  u8* const shadow = page.shadow + slot * (D / 2);
  if (lane < kWarp / 2) store_codes<kEach>(shadow + lane * kEach, codes);
  if (lane == 0) *reinterpret_cast<u32*>(page.shadow + page_size * (D / 2) + slot * 4) = pair_bits(quantized.scale, quantized.zero);
}
