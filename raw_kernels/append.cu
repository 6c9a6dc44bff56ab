// Append: write new tokens' keys, values and 4-bit keys into their pages, and a selector's summary of the keys beside them, in one pass.
//
// A warp owns one touched page of one kv head, so that nobody else writes what it writes, and a page's summary needs no second kernel.
// d / 8 lanes hold a token, 8 channels (16 bytes) each; a warp thus handles 256 / d tokens at a time. Bounds and means are a function of
// the page's keys alone, so appending one by one, all at once and after a copy agree: the page's older keys are read again (4 KB at P=16,
// d=128, which at one token a step is what the whole kernel costs). Labels are a token's own.
//
// A sum of floats depends on its order. For means a lane therefore holds d / 32 channels of every token, and adds the page's tokens slot after
// slot: old ones from the page, new ones from the input, which it reads a second time (from L2). The mean of the values, which a
// pruner's tail is made of, is kept the same way beside any summary of the keys (kValueMean).
// Floor: a new token and kv head reads 4d bytes and writes 4d + d/2 + 4; with bounds or means, one token a step reads 2dP more, and with
// the mean of the values 2dP again.
#include "codes.cuh"

struct AppendParams {
  const void* k;          // [b, n, Hkv, d], strides below, channels contiguous
  const void* v;          // likewise
  void* k_pages;          // [pages, Hkv, P, d]
  void* v_pages;          // [pages, Hkv, P, d]
  u8* shadow;             // [pages, Hkv, P*d/2 + 4*P], or null: no 4-bit keys are kept
  const int* page_table;  // [b, max_pages]
  const int* seq_lens;    // [b], the new tokens counted
  const int* new_tokens;  // [b]
  u8* first;              // [pages, Hkv, ...]: maxima or means [d], labels [P, r]; codes of bounds [2d], means [d], labels [P, r*bits/8]
  u8* second;             // [pages, Hkv, ...]: minima [d]; scale and zero of codes, two halves, [2] or [P, 2]
  const int* channels;    // [Hkv, r], of labels
  u8* value_first;        // [pages, Hkv, d]: means of the values, or their codes
  u8* value_second;       // [pages, Hkv, 2]: scale and zero of codes; null for means as they are
  long long k_strides[3];  // elements between sequences, tokens and heads
  long long v_strides[3];
  int batch;
  int kv_heads;
  int max_pages;
  int page_size;
  int pages_per_row;   // pages that one sequence's new tokens can touch
  int label_channels;  // r
};
CHECK_PARAMS(AppendParams);

enum Rule { None, Bounds, Bounds8, Mean, Mean8, Label, Label2, Label4 };  // in the order of ops/append.py
constexpr int kWarps = 4;

// Whether any of a token's lanes said so.
template <int Width>
__device__ __forceinline__ bool any_of(bool x, int which) {
  const u32 votes = __ballot_sync(kFullMask, x) >> (which * Width);
  return (Width == kWarp ? votes : votes & ((1u << (Width & 31)) - 1)) != 0;
}

// Label of one token, whose key lies in shared memory: byte j holds channels j, j + r/n, j + 2r/n, ... of the order, n to a byte. The token's lanes
// take the bytes part, part + kWidth, ... Bits: 2, 4, or 16 for the channels as they are.
template <typename T, int D, int Bits>
struct Labels {
  static constexpr int kWidth = D / 8, kEach = Bits == 16 ? 1 : 8 / Bits, kRounds = 8 / kEach;
  int order[kRounds][kEach];

  __device__ __forceinline__ Labels(const AppendParams& p, int head, int part) {
    const int bytes = p.label_channels / kEach;
#pragma unroll
    for (int i = 0; i < kRounds; ++i)
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        const int j = part + i * kWidth;
        order[i][k] = j < bytes ? p.channels[head * p.label_channels + j + k * bytes] : -1;
      }
  }
  __device__ __forceinline__ void write(const AppendParams& p, const T* key, long long token, int which, int part, bool real) const {
    const int bytes = p.label_channels / kEach;
    if constexpr (Bits == 16) {
      T* const label = reinterpret_cast<T*>(p.first) + token * bytes;
#pragma unroll
      for (int i = 0; i < kRounds; ++i)
        if (real && order[i][0] >= 0) label[part + i * kWidth] = key[order[i][0]];
    } else {
      float x[kRounds][kEach], top = -inf(), bottom = inf();
      bool nan = false;
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        if (i * kWidth >= bytes) break;
#pragma unroll
        for (int k = 0; k < kEach; ++k) {
          x[i][k] = 0.f;
          if (order[i][k] < 0) continue;
          x[i][k] = to_float(key[order[i][k]]), nan |= x[i][k] != x[i][k];
          top = fmaxf(top, x[i][k]), bottom = fminf(bottom, x[i][k]);
        }
      }
      top = warp_max<kWidth>(top), bottom = warp_min<kWidth>(bottom);
      const Codes<(1 << Bits) - 1> codes(top, bottom, any_of<kWidth>(nan, which));
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        if (i * kWidth >= bytes) break;
        u32 byte = 0;
#pragma unroll
        for (int k = 0; k < kEach; ++k) byte |= codes(x[i][k]) << (Bits * k);
        if (real && order[i][0] >= 0) p.first[token * bytes + part + i * kWidth] = static_cast<u8>(byte);
      }
      if (real && part == 0) reinterpret_cast<u32*>(p.second)[token] = pair_bits(codes.scale, codes.zero);
    }
  }
};

template <typename T, int D>
struct Labels<T, D, 0> {  // none
  __device__ __forceinline__ Labels(const AppendParams&, int, int) {}
};

// Mean of a page's keys or values: its first `old` slots from `stored`, the others from `fresh`, where slot s lies at s * stride.
template <typename T, int D, bool Packed, bool kValues>
__device__ __forceinline__ void write_mean(const AppendParams& p, const T* stored, const T* fresh, long long stride, int old, int filled,
                                           long long place) {
  constexpr int kEach = D / kWarp, kWords = kEach / 2;  // channels and 32-bit words of a lane
  constexpr int kAhead = D == 256 ? 8 : 16;
  const int channel = lane_id() * kEach;
  float mean[kEach] = {};
  for (int slot = 0; slot < filled; slot += kAhead) {
    u32 w[kAhead][kWords];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int s = slot + i;
      if (s < filled) {
        const T* const key = (s < old ? stored + s * D : fresh + s * stride) + channel;
        if constexpr (kWords == 1) {
          w[i][0] = *reinterpret_cast<const u32*>(key);
        } else if constexpr (kWords == 2) {
          const uint2 v = *reinterpret_cast<const uint2*>(key);
          w[i][0] = v.x, w[i][1] = v.y;
        } else {
          const uint4 v = load16(key);
          w[i][0] = v.x, w[i][1] = v.y, w[i][2] = v.z, w[i][3] = v.w;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (slot + i < filled)
#pragma unroll
        for (int j = 0; j < kWords; ++j) {
          const float2 x = unpack2<T>(w[i][j]);
          mean[2 * j] += x.x, mean[2 * j + 1] += x.y;
        }
  }
#pragma unroll
  for (int c = 0; c < kEach; ++c) mean[c] = __fdiv_rn(mean[c], static_cast<float>(filled));
  if constexpr (!Packed) {
    u32* const out = reinterpret_cast<u32*>(reinterpret_cast<T*>(kValues ? p.value_first : p.first) + place * D + channel);
#pragma unroll
    for (int j = 0; j < kWords; ++j) out[j] = pack2<T>(mean[2 * j], mean[2 * j + 1]);
  } else {
    float top = mean[0], bottom = mean[0];
    bool nan = false;
#pragma unroll
    for (int c = 0; c < kEach; ++c) top = fmaxf(top, mean[c]), bottom = fminf(bottom, mean[c]), nan |= mean[c] != mean[c];
    const Codes<255> codes(warp_max(top), warp_min(bottom), __any_sync(kFullMask, nan));
#pragma unroll
    for (int c = 0; c < kEach; c += 2) {
      const u32 both = codes(mean[c]) | codes(mean[c + 1]) << 8;
      *reinterpret_cast<u16*>((kValues ? p.value_first : p.first) + place * D + channel + c) = static_cast<u16>(both);
    }
    if (lane_id() == 0) reinterpret_cast<u32*>(kValues ? p.value_second : p.second)[place] = pair_bits(codes.scale, codes.zero);
  }
}

template <typename T, int D, int R, bool kValueMean = false>
__global__ void __launch_bounds__(kWarps * kWarp, 4) append(const __grid_constant__ AppendParams p) {
  constexpr int kLanes = D / 8;             // lanes of a token
  constexpr int kTokens = kWarp / kLanes;   // tokens of a step
  constexpr int kUnroll = 2;
  constexpr bool kBounds = R == Bounds || R == Bounds8, kMean = R == Mean || R == Mean8, kLabel = R >= Label;
  const int task = blockIdx.x * kWarps + uniform_warp_id();
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
  const Labels<T, D, !kLabel ? 0 : R == Label2 ? 2 : R == Label4 ? 4 : 16> labels(p, head, part);
  load_new(first_new);  // needs no page number: under way while that and the old keys are read

  if constexpr (kMean) {
    const T* const slot0 = new_k + (page_start - start) * p.k_strides[1];  // where the page's first slot would be
    write_mean<T, D, R == Mean8, false>(p, k_page, slot0, p.k_strides[1], first_new, filled, place);
  }
  if constexpr (kValueMean) {
    const T* const slot0 = new_v + (page_start - start) * p.v_strides[1];
    if (p.value_second) write_mean<T, D, true, true>(p, v_page, slot0, p.v_strides[1], first_new, filled, place);
    else write_mean<T, D, false, true>(p, v_page, slot0, p.v_strides[1], first_new, filled, place);
  }
  if constexpr (kBounds) {
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
        if constexpr (kBounds) widen(x);
      }
      if constexpr (kLabel) {
        __shared__ __align__(16) T s_keys[kWarps][kTokens * D];
        T* const keys = s_keys[warp_id()];
        store16(keys + lane * 8, kw[i]);
        __syncwarp();
        labels.write(p, keys + which * D, place * size + s, which, part, real);
        __syncwarp();
      }
      if (p.shadow == nullptr) continue;
      float top = x[0], bottom = x[0];
      bool nan = false;
#pragma unroll
      for (int c = 0; c < 8; ++c) top = fmaxf(top, x[c]), bottom = fminf(bottom, x[c]), nan |= x[c] != x[c];
      top = warp_max<kLanes>(top), bottom = warp_min<kLanes>(bottom);
      const Codes<15> quantized(top, bottom, any_of<kLanes>(nan, which));
      u32 codes[2] = {0, 0};
#pragma unroll
      for (int c = 0; c < 8; ++c) codes[c / 4] |= quantized(x[c]) << (8 * (c % 4));
      // Byte j holds channel j and, shifted, channel j + d/2, which another lane has.
      const u32 other0 = __shfl_xor_sync(kFullMask, codes[0], kLanes / 2), other1 = __shfl_xor_sync(kFullMask, codes[1], kLanes / 2);
      if (real && part < kLanes / 2) {
        *reinterpret_cast<uint2*>(shadow + s * (D / 2) + channel) = make_uint2(codes[0] | other0 << 4, codes[1] | other1 << 4);
        if (part == 0) *reinterpret_cast<u32*>(shadow + size * (D / 2) + s * 4) = pair_bits(quantized.scale, quantized.zero);
      }
    }
  }

  if constexpr (kBounds) {
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
  if constexpr (R == Bounds) {
    if (which == 0) {
      u32 words[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = pack2<T>(high[2 * i], high[2 * i + 1]), words[4 + i] = pack2<T>(low[2 * i], low[2 * i + 1]);
      store16(reinterpret_cast<T*>(p.first) + place * D + channel, make_uint4(words[0], words[1], words[2], words[3]));
      store16(reinterpret_cast<T*>(p.second) + place * D + channel, make_uint4(words[4], words[5], words[6], words[7]));
    }
  }
  if constexpr (R == Bounds8) {
    float top = high[0], bottom = low[0];
    bool nan = false;
#pragma unroll
    for (int c = 0; c < 8; ++c) top = fmaxf(top, high[c]), bottom = fminf(bottom, low[c]), nan |= high[c] != high[c];
    top = warp_max(top), bottom = warp_min(bottom);
    nan = __any_sync(kFullMask, nan);
    const BoundCodes rounded(top, bottom, nan);
    u32 codes[4] = {0, 0, 0, 0};  // maxima, minima
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      codes[c / 4] |= rounded.up(high[c]) << (8 * (c % 4));
      codes[2 + c / 4] |= rounded.down(low[c]) << (8 * (c % 4));
    }
    if (which == 0) {
      u8* const stored = p.first + place * (2 * D) + channel;
      *reinterpret_cast<uint2*>(stored) = make_uint2(codes[0], codes[1]);
      *reinterpret_cast<uint2*>(stored + D) = make_uint2(codes[2], codes[3]);
      if (part == 0) reinterpret_cast<u32*>(p.second)[place] = pair_bits(rounded.scale, rounded.zero);
    }
  }
}
