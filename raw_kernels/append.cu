// Append: write new tokens' keys, values and 4-bit keys into their pages, and the bounds of each page that they touch, in one pass.
//
// A warp owns one touched page of one kv head, so that nobody else writes what it writes, and a page's bounds need no second kernel.
// d / 8 lanes hold a token, 8 channels (16 bytes) each; a warp thus handles 512 / d tokens at a time. Bounds are a function of
// the page's keys alone, so appending one by one, all at once and after a copy agree: the page's older keys are read again (4 KB at P=16,
// d=128, which at one token a step is what the whole kernel costs).
// Floor: a new token and kv head reads 4d bytes and writes 4d + d/2 + 4; with bounds, one token a step reads 2dP more.
#include "common.cuh"

struct AppendParams {
  const void* k;          // [b, n, Hkv, d], strides below, channels contiguous
  const void* v;          // likewise
  void* k_pages;          // [pages, Hkv, P, d]
  void* v_pages;          // [pages, Hkv, P, d]
  u8* shadow;             // [pages, Hkv, P*d/2 + 4*P], or null: no 4-bit keys are kept
  const int* page_table;  // [b, max_pages]
  const int* seq_lens;    // [b], the new tokens counted
  const int* new_tokens;  // [b]
  u8* high;               // Native: [pages, Hkv, d] maxima; Packed: [pages, Hkv, 2d] codes, maxima first
  u8* low;                // Native: [pages, Hkv, d] minima; Packed: [pages, Hkv, 2] halves, scale and zero
  long long k_strides[3];  // elements between sequences, tokens and heads
  long long v_strides[3];
  int batch;
  int kv_heads;
  int max_pages;
  int page_size;
  int pages_per_row;  // pages that one sequence's new tokens can touch
};
CHECK_PARAMS(AppendParams);

enum Bounds { None = 0, Native = 1, Packed = 2 };
constexpr int kWarps = 4;

// Round to half in one direction; see ops/page_scores.py for the format.
__device__ __forceinline__ u32 half_bits(half x) { return __half_as_ushort(x); }

template <typename T, int D, int B>
__global__ void __launch_bounds__(kWarps * kWarp, 4) append(const __grid_constant__ AppendParams p) {
  constexpr int kLanes = D / 8;             // lanes of a token
  constexpr int kTokens = kWarp / kLanes;   // tokens of a step
  constexpr int kUnroll = 2;
  const int task = blockIdx.x * kWarps + warp_id();
  if (task >= p.batch * p.pages_per_row * p.kv_heads) return;
  const int head = task % p.kv_heads, nth = task / p.kv_heads % p.pages_per_row, row = task / (p.kv_heads * p.pages_per_row);
  const int size = p.page_size, end = p.seq_lens[row], start = end - p.new_tokens[row];
  const int logical = start / size + nth, page_start = logical * size;
  if (start >= end || page_start >= end || logical >= p.max_pages) return;

  const long long page = p.page_table[static_cast<long long>(row) * p.max_pages + logical];
  const long long place = page * p.kv_heads + head;
  T* const k_page = static_cast<T*>(p.k_pages) + place * size * D;
  T* const v_page = static_cast<T*>(p.v_pages) + place * size * D;
  u8* const shadow = p.shadow + place * (static_cast<long long>(size) * D / 2 + 4 * size);
  const T* const new_k = static_cast<const T*>(p.k) + row * p.k_strides[0] + head * p.k_strides[2];
  const T* const new_v = static_cast<const T*>(p.v) + row * p.v_strides[0] + head * p.v_strides[2];

  const int lane = lane_id(), part = lane % kLanes, which = lane / kLanes, channel = part * 8;
  const int first_new = max(start - page_start, 0), filled = min(end - page_start, size);
  float high[8], low[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) high[c] = -inf(), low[c] = inf();

  // Bounds keep a NaN: torch's amax and amin do, and it must show in the page's score.
  const auto widen = [&](const float (&x)[8]) {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      high[c] = x[c] > high[c] || x[c] != x[c] ? x[c] : high[c];
      low[c] = x[c] < low[c] || x[c] != x[c] ? x[c] : low[c];
    }
  };
  const auto spread = [](uint4 w, float (&x)[8]) {
    const u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 v = unpack2<T>(words[i]);
      x[2 * i] = v.x, x[2 * i + 1] = v.y;
    }
  };

  uint4 kw[kUnroll], vw[kUnroll];
  const auto load_new = [&](int slot) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int s = slot + i * kTokens + which;
      kw[i] = vw[i] = make_uint4(0, 0, 0, 0);
      if (s < filled) {
        const long long token = page_start + s - start;
        kw[i] = load_stream16(new_k + token * p.k_strides[1] + channel);
        vw[i] = load_stream16(new_v + token * p.v_strides[1] + channel);
      }
    }
  };
  load_new(first_new);  // needs no page number: under way while that and the old keys are read

  if constexpr (B != None) {
    constexpr int kAhead = D == 64 ? 4 : 8;  // the 15 old keys of a page of 16 in one round at d=128
    for (int slot = 0; slot < first_new; slot += kTokens * kAhead) {
      uint4 w[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int s = slot + i * kTokens + which;
        if (s < first_new) w[i] = load16(k_page + s * D + channel);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (slot + i * kTokens + which < first_new) {
          float x[8];
          spread(w[i], x);
          widen(x);
        }
      }
    }
  }

  for (int slot = first_new; slot < filled; slot += kTokens * kUnroll) {
    if (slot != first_new) load_new(slot);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int s = slot + i * kTokens + which;
      const bool real = s < filled;
      float x[8];
      spread(kw[i], x);
      if (real) {
        store16(k_page + s * D + channel, kw[i]);
        store16(v_page + s * D + channel, vw[i]);
        if constexpr (B != None) widen(x);
      }
      if (p.shadow == nullptr) continue;
      float top = x[0], bottom = x[0];
      bool nan = false;
#pragma unroll
      for (int c = 0; c < 8; ++c) top = fmaxf(top, x[c]), bottom = fminf(bottom, x[c]), nan |= x[c] != x[c];
      top = warp_max<kLanes>(top), bottom = warp_min<kLanes>(bottom);
      // NaN in any channel: scale and zero are NaN and every code is 0, as in ops/quantize.py.
      const u32 nans = __ballot_sync(kFullMask, nan) >> (which * kLanes);
      nan = (kLanes == kWarp ? nans : nans & ((1u << (kLanes & 31)) - 1)) != 0;
      const half zero = __float2half_rn(nan ? __int_as_float(0x7fc00000) : bottom);
      const float z = __half2float(zero);
      const half scale = __float2half_rn(nan ? __int_as_float(0x7fc00000) : fmaxf(__fdiv_rn(top - z, 15.f), 6.103515625e-5f));
      const float scale_f = __half2float(scale);
      u32 codes[2] = {0, 0};
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        // fminf and fmaxf turn a NaN into a bound; the cast is then defined, and the code of a NaN is 0.
        const float code = fminf(fmaxf(rintf(__fdiv_rn(x[c] - z, scale_f)), 0.f), 15.f);
        codes[c / 4] |= static_cast<u32>(code) << (8 * (c % 4));
      }
      // Byte j holds channel j and, shifted, channel j + d/2, which another lane has.
      const u32 other0 = __shfl_xor_sync(kFullMask, codes[0], kLanes / 2), other1 = __shfl_xor_sync(kFullMask, codes[1], kLanes / 2);
      if (real && part < kLanes / 2) {
        *reinterpret_cast<uint2*>(shadow + s * (D / 2) + channel) = make_uint2(codes[0] | other0 << 4, codes[1] | other1 << 4);
        if (part == 0) *reinterpret_cast<u32*>(shadow + size * (D / 2) + s * 4) = half_bits(scale) | half_bits(zero) << 16;
      }
    }
  }

  if constexpr (B != None) {
    // The steps' tokens lie in different lanes.
#pragma unroll
    for (int step = kLanes; step < kWarp; step *= 2) {
      float other_high[8], other_low[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        other_high[c] = __shfl_xor_sync(kFullMask, high[c], step);
        other_low[c] = __shfl_xor_sync(kFullMask, low[c], step);
      }
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        high[c] = other_high[c] > high[c] || other_high[c] != other_high[c] ? other_high[c] : high[c];
        low[c] = other_low[c] < low[c] || other_low[c] != other_low[c] ? other_low[c] : low[c];
      }
    }
  }
  if constexpr (B == Native) {
    if (which == 0) {
      u32 words[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = pack2<T>(high[2 * i], high[2 * i + 1]), words[4 + i] = pack2<T>(low[2 * i], low[2 * i + 1]);
      store16(reinterpret_cast<T*>(p.high) + place * D + channel, make_uint4(words[0], words[1], words[2], words[3]));
      store16(reinterpret_cast<T*>(p.low) + place * D + channel, make_uint4(words[4], words[5], words[6], words[7]));
    }
  }
  if constexpr (B == Packed) {
    float top = high[0], bottom = low[0];
    bool nan = false;
#pragma unroll
    for (int c = 0; c < 8; ++c) top = fmaxf(top, high[c]), bottom = fminf(bottom, low[c]), nan |= high[c] != high[c];
    top = warp_max(top), bottom = warp_min(bottom);
    nan = __any_sync(kFullMask, nan);
    const float quiet = __int_as_float(0x7fc00000);
    half zero = __float2half_rd(nan ? quiet : bottom);
    const float z = __half2float(zero);
    half scale = __float2half_ru(nan ? quiet : fmaxf(__fdiv_rn(top - z, 255.f), 6.103515625e-5f));
    // The quotient itself may have been rounded down onto a half.
    if (fmaf(255.f, __half2float(scale), z) < top) scale = __ushort_as_half(__half_as_ushort(scale) + 1);
    const float s = __half2float(scale);
    u32 codes[4] = {0, 0, 0, 0};  // maxima, minima
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      float up = fminf(fmaxf(ceilf(__fdiv_rn(high[c] - z, s)), 0.f), 255.f);
      up = fminf(up + (fmaf(s, up, z) < high[c] ? 1.f : 0.f), 255.f);
      float down = fminf(fmaxf(floorf(__fdiv_rn(low[c] - z, s)), 0.f), 255.f);
      down = fmaxf(down - (fmaf(s, down, z) > low[c] ? 1.f : 0.f), 0.f);
      codes[c / 4] |= static_cast<u32>(up) << (8 * (c % 4));
      codes[2 + c / 4] |= static_cast<u32>(down) << (8 * (c % 4));
    }
    if (which == 0) {
      u8* const stored = p.high + place * (2 * D) + channel;
      *reinterpret_cast<uint2*>(stored) = make_uint2(codes[0], codes[1]);
      *reinterpret_cast<uint2*>(stored + D) = make_uint2(codes[2], codes[3]);
      if (part == 0) reinterpret_cast<u32*>(p.low)[place] = half_bits(scale) | half_bits(zero) << 16;
    }
  }
}
