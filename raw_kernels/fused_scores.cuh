// The first stream of fused_decode.cu, scores of pages from their 8-bit vectors, and what the second one, fused_tokens.cuh, shares with it.
//
// Both are u8 x s8 products on m16n8k32 tiles: 16 pages or tokens are the rows, query heads the columns, and where they leave columns
// free, the 8-bit residuals of the same heads (see spgemv.cu: 16 bits of the query survive). k may be permuted as long as both sides agree, so
// that lane (gid, tig) loads whole 16-byte pieces of rows gid and gid + 8 straight into its fragments: no shared memory, no shuffles, and
// every warp has up to 8 KB of page vectors or 4 KB of 4-bit keys under way.
#pragma once

#include "mma.cuh"

constexpr int kTile = 16;
constexpr float kLowest = -3.4e38f;  // stands for -inf where differences are formed

// A maximum and the sum of exponentials below it, (m, s). NaN and +inf show in s.
__device__ __forceinline__ float2 join(float2 a, float2 b) {
  const float m = fmaxf(a.x, b.x);
  return make_float2(m, a.y * fast_exp2((a.x - m) * kLog2e) + b.y * fast_exp2((b.x - m) * kLog2e));
}

// The queries of a group as s8 codes in shared memory: q = step * (main + residual / 254), each also with only what is positive or negative of the query.
struct QueryCodes {
  u8* codes;         // [3: all, positive, negative][2: main, residual][group][D]
  float *step, *sum;  // [group]
  int group;

  // A warp a head. `raw` holds D / 32 channels of head `warp`, lane after lane.
  template <int D>
  __device__ __forceinline__ void quantize(const u32 (&raw)[D / 64], bool bf) const {
    constexpr int kEach = D / 32;
    const int head = uniform_warp_id(), lane = lane_id();
    if (head >= group) return;
    float x[kEach], largest = 0.f, total = 0.f;
#pragma unroll
    for (int i = 0; i < kEach / 2; ++i) {
      const float2 pair = unpack2(bf, raw[i]);
      x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
      largest = fmaxf(largest, fmaxf(fabsf(pair.x), fabsf(pair.y))), total += pair.x + pair.y;
    }
    largest = warp_max(largest), total = warp_sum(total);  // the sum carries a NaN of the query into every score of this head
    const float s = largest / 127.f, inverse = s > 0.f ? 1.f / s : 0.f;
    if (lane == 0) step[head] = s, sum[head] = total;
    u8* const at = codes + head * D + lane * kEach;
#pragma unroll
    for (int i = 0; i < kEach; i += 2) {
      u32 main = 0, rest = 0, positive = 0, negative = 0;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float y = x[i + k];
        const int a = min(max(__float2int_rn(y * inverse), -127), 127);
        const int r = min(max(__float2int_rn(fmaf(-s, static_cast<float>(a), y) * inverse * 254.f), -127), 127);
        main |= (a & 255) << 8 * k, rest |= (r & 255) << 8 * k;
        positive |= y > 0.f ? 255 << 8 * k : 0, negative |= y < 0.f ? 255 << 8 * k : 0;
      }
#pragma unroll
      for (int v = 0; v < 3; ++v) {
        const u32 mask = v == 0 ? 0xffff : v == 1 ? positive : negative;
        *reinterpret_cast<u16*>(at + 2 * v * group * D + i) = static_cast<u16>(main & mask);
        *reinterpret_cast<u16*>(at + (2 * v + 1) * group * D + i) = static_cast<u16>(rest & mask);
      }
    }
  }
  // The codes of one column from channel c on; columns from kHeads on are residuals.
  template <int D, int kHeads>
  __device__ __forceinline__ const u8* column(int column, int variant, int c) const {
    return codes + ((2 * variant + (column >= kHeads)) * group + column % kHeads) * D + c;
  }
};

// What turns the integers of a tile into the scores of the heads that this lane owns after `settle`.
template <int Tiles>
struct HeadScale {
  static constexpr int kHeadTiles = Tiles == 1 ? 1 : Tiles / 2;
  static constexpr int kOwned = Tiles == 1 ? 2 : Tiles;
  float scale[kHeadTiles][2], sum[kHeadTiles][2];

  static __device__ __forceinline__ int head(int nth, int tig) { return Tiles == 1 ? 2 * (tig & 1) + nth : nth / 2 * 8 + 2 * tig + nth % 2; }
  // What a lane has of a tile: heads, and rows of each.
  using Taken = float[kOwned][Tiles];

  __device__ __forceinline__ HeadScale(const QueryCodes& query, int tig, float factor, float sum_factor) {
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int g = min(head(2 * t + k, tig), query.group - 1);
        scale[t][k] = query.step[g] * factor, sum[t][k] = query.sum[g] * sum_factor;
      }
  }
};

// Hand every score of a tile to `use(row, head, nth, score)`, and keep what that returns. `params` are (scale, zero), halves, of row gid or gid + 8, see `row_of`, or of both. With one column tile a lane has 2 heads of one row:
// heads lie in tig 0 and 1, residuals in tig 2 and 3, and two shuffles give tig 0 and 1 row gid, 2 and 3 row gid + 8.
template <int Tiles, typename Use>
__device__ __forceinline__ void settle(const int (&dot)[Tiles][4], const HeadScale<Tiles>& head, int gid, int tig, const u32 (&params)[Tiles == 1 ? 1 : 2], typename HeadScale<Tiles>::Taken& taken,
                                       const Use& use) {
  if constexpr (Tiles == 1) {
    const bool upper = tig >= 2;
    const int got0 = __shfl_xor_sync(kFullMask, upper ? dot[0][0] : dot[0][2], 2);
    const int got1 = __shfl_xor_sync(kFullMask, upper ? dot[0][1] : dot[0][3], 2);
    const int first = upper ? got0 * 254 + dot[0][2] : dot[0][0] * 254 + got0;
    const int second = upper ? got1 * 254 + dot[0][3] : dot[0][1] * 254 + got1;
    const int r = gid + (upper ? 8 : 0), g = 2 * (tig & 1);
    const float2 sz = unpack2<half>(params[0]);
    taken[0][0] = use(r, g, 0, fmaf(sz.x * head.scale[0][0], static_cast<float>(first), sz.y * head.sum[0][0]));
    taken[1][0] = use(r, g + 1, 1, fmaf(sz.x * head.scale[0][1], static_cast<float>(second), sz.y * head.sum[0][1]));
  } else {
    constexpr int kHeadTiles = Tiles / 2;
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 sz = unpack2<half>(params[k / 2]);
        const int sum = dot[t][k] * 254 + dot[t + kHeadTiles][k];
        taken[2 * t + k % 2][k / 2] = use(gid + (k < 2 ? 0 : 8), 8 * t + 2 * tig + k % 2, 2 * t + k % 2, fmaf(sz.x * head.scale[t][k % 2], static_cast<float>(sum), sz.y * head.sum[t][k % 2]));
      }
  }
}
// Take what `settle` has kept of several tiles into each head's maximum and sum. All at once: their exponentials do not wait for one another.
template <int Tiles, int kBatch>
__device__ __forceinline__ void include(float2 (&state)[HeadScale<Tiles>::kOwned], const typename HeadScale<Tiles>::Taken (&taken)[kBatch]) {
#pragma unroll
  for (int nth = 0; nth < HeadScale<Tiles>::kOwned; ++nth) {
    float2& a = state[nth];
    float m = a.x;
#pragma unroll
    for (int i = 0; i < kBatch * Tiles; ++i) m = fmaxf(m, taken[i / Tiles][nth][i % Tiles]);
    m = fminf(m, -kLowest);
    a.y *= fast_exp2((a.x - m) * kLog2e), a.x = m;
#pragma unroll
    for (int i = 0; i < kBatch * Tiles; ++i) a.y += fast_exp2((taken[i / Tiles][nth][i % Tiles] - m) * kLog2e);
  }
}
// The row of a tile whose parameters a lane loads as number h.
template <int Tiles>
__device__ __forceinline__ int row_of(int h, int gid, int tig) {
  return gid + 8 * (Tiles == 1 ? tig >= 2 : h);
}

// Maximum and sum of each head over the warp, to parts [head].
template <int Tiles>
__device__ __forceinline__ void join_lanes(float2 (&mine)[HeadScale<Tiles>::kOwned], float2* parts) {
  static_assert(HeadScale<Tiles>::kOwned == 2, "a half warp each");
  const int own_lane = fresh(lane_id()), lane = own_lane % (kWarp / 2);
  const bool upper = own_lane >= kWarp / 2;
  float2 own = upper ? mine[1] : mine[0];
  const float2 other = upper ? mine[0] : mine[1];
  own = join(own, make_float2(__shfl_xor_sync(kFullMask, other.x, kWarp / 2), __shfl_xor_sync(kFullMask, other.y, kWarp / 2)));
#pragma unroll 1  // here and below: what runs once costs more to fetch than to execute
  for (int distance = kWarp / 4; distance >= (Tiles == 1 ? 2 : 4); distance /= 2) {  // lanes of one tig have the same heads; with one column tile tig ^ 2 too
    own = join(own, make_float2(__shfl_xor_sync(kFullMask, own.x, distance), __shfl_xor_sync(kFullMask, own.y, distance)));
  }
  if (lane < (Tiles == 1 ? 2 : 4)) parts[HeadScale<Tiles>::head(upper, lane)] = own;
}
// Over up to 16 parts [count][kHeads], by every warp for itself; lane h gets head h % kHeads.
template <int kHeads>
__device__ __forceinline__ float2 join_parts(const float2* parts, int count) {
  constexpr int kEach = 16 * kHeads / kWarp;
  const int lane = fresh(lane_id());
  float2 part[kEach], all = make_float2(kLowest, 0.f);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = i * kWarp + lane;
    part[i] = at < count * kHeads ? parts[at] : all;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) all.x = fmaxf(all.x, part[i].x);
#pragma unroll
  for (int i = 0; i < kEach; ++i) all.y = fmaf(part[i].y, fast_exp2((part[i].x - all.x) * kLog2e), all.y);
#pragma unroll 1
  for (int distance = kWarp / 2; distance >= kHeads; distance /= 2) {
    all = join(all, make_float2(__shfl_xor_sync(kFullMask, all.x, distance), __shfl_xor_sync(kFullMask, all.y, distance)));
  }
  return all;
}

// Scores of `count` pages whose numbers lie in shared memory, Vectors codes of D channels each: 1 the mean key, 2 maxima and minima, of which the first
// meet what is positive of the query and the second what is negative. `use(page, head, nth, score)`, scores times `sm_scale`;
// -inf for what is not there, heads from `group` and pages from `count` on among it. What it returns is taken into `state`.
template <int D, int Vectors, int Tiles, int kWarps, typename Use>
__device__ __forceinline__ void score_pages(const QueryCodes& query, float sm_scale, const u8* codes, const u32* params, const int* pages, int count, int kv_heads,
                                            int kv_head, float2 (&state)[HeadScale<Tiles>::kOwned], const Use& use) {
  constexpr int kPieces = Vectors * D / 64;                                    // 16 bytes each, of a row, a lane
  // Tiles under way: what the registers hold, and of 16 warps no more than 64 KB, or L1 has no place for them: Quest's 128 KB are 2 % slower at b=32, 128k.
  constexpr int kFit = Tiles * kPieces >= 8 ? 1 : Tiles * kPieces == 4 ? 2 : 3, kPlaces = kPieces >= 4 ? 1 : 4 / kPieces;
  constexpr int kBatch = kWarps == 16 && kFit > kPlaces ? kPlaces : kFit;
  constexpr int kHeads = 4 * Tiles;
  const int lane = fresh(lane_id()), gid = lane / 4, tig = lane % 4, warp = uniform_warp_id();

  uint4 b[Tiles][kPieces];
#pragma unroll
  for (int t = 0; t < Tiles; ++t)
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      b[t][j] = uint4{0, 0, 0, 0};
      const int column = 8 * t + gid, variant = Vectors == 1 ? 0 : 1 + j * 64 / D;
      if (column % kHeads < query.group) b[t][j] = load16(query.column<D, kHeads>(column, variant, j * 64 % D + tig * 16));
    }
  const HeadScale<Tiles> head(query, tig, sm_scale / 254.f, sm_scale);

  constexpr int kParams = Tiles == 1 ? 1 : 2;
  const int tiles = ceil_div(count, kTile);
  const auto place = [&](int tile, int r) {  // behind the end the last page is read again
    return static_cast<long long>(pages[min(tile * kTile + r, count - 1)]) * kv_heads + kv_head;
  };
#pragma unroll 1
  for (int first = warp; first < tiles; first += kWarps * kBatch) {
    uint4 x[kBatch][2][kPieces];
    u32 sz[kBatch][kParams];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int tile = first + i * kWarps;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const u8* const row = codes + place(tile, gid + 8 * h) * (Vectors * D) + tig * 16;
#pragma unroll
        for (int j = 0; j < kPieces; ++j) x[i][h][j] = load_fresh16(row + j * 64);
      }
#pragma unroll
      for (int h = 0; h < kParams; ++h) sz[i][h] = load_near4(params + place(tile, row_of<Tiles>(h, gid, tig)));
    }
    typename HeadScale<Tiles>::Taken taken[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int tile = first + i * kWarps;
      int dot[Tiles][4] = {};
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const uint4 low = x[i][0][j], high = x[i][1][j];
#pragma unroll
        for (int t = 0; t < Tiles; ++t) {
          mma_u8s8(dot[t], low.x, high.x, low.y, high.y, b[t][j].x, b[t][j].y);
          mma_u8s8(dot[t], low.z, high.z, low.w, high.w, b[t][j].z, b[t][j].w);
        }
      }
      settle<Tiles>(dot, head, gid, tig, sz[i], taken[i], [&](int r, int g, int nth, float score) {
        const int page = tile * kTile + r;
        return use(page, g, nth, page < count ? score : -inf());
      });
    }
    include<Tiles, kBatch>(state, taken);
  }
}
