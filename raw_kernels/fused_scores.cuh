// The two streams of fused_decode.cu: scores of pages from their 8-bit vectors, and logits of tokens from the 4-bit keys.
//
// Both are u8 x s8 products on m16n8k32 tiles: 16 pages or tokens are the rows, query heads the columns, and where they leave columns
// free, the 8-bit residuals of the same heads (see spgemv.cu: 16 bits of the query survive). k may be permuted as long as both sides agree, so
// that lane (gid, tig) loads whole 16-byte pieces of rows gid and gid + 8 straight into its fragments: no shared memory, no shuffles, and
// every warp has 16 such loads under way.
#pragma once

#include "mma.cuh"

constexpr int kTile = 16;

__device__ __forceinline__ float2 unpack_query(u32 w, bool bf) { return bf ? unpack2<bf16>(w) : unpack2<half>(w); }

// The query of one column, N words of 4 channels in this lane; the 4 lanes of a column hold all of it. Gives the s8 codes of q / step (or of what they
// leave over), which channels are positive and negative (bytes of ones), the step and the sum.
template <int N>
struct QueryColumn {
  u32 codes[N], positive[N], negative[N];
  float step, sum;

  template <typename Load>
  __device__ __forceinline__ void quantize(const Load& load, bool bf, bool residual) {
    uint2 raw[N];
    float largest = 0.f;
    sum = 0.f;
#pragma unroll
    for (int j = 0; j < N; ++j) raw[j] = load(j);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float2 x = unpack_query(raw[j].x, bf), y = unpack_query(raw[j].y, bf);
      largest = fmaxf(fmaxf(largest, fmaxf(fabsf(x.x), fabsf(x.y))), fmaxf(fabsf(y.x), fabsf(y.y)));
      sum += (x.x + x.y) + (y.x + y.y);
    }
    largest = warp_max<4>(largest);
    sum = warp_sum<4>(sum);  // carries a NaN of the query into every score of this head
    step = largest / 127.f;
    const float inverse = step > 0.f ? 1.f / step : 0.f;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      codes[j] = positive[j] = negative[j] = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 pair = unpack_query(k < 2 ? raw[j].x : raw[j].y, bf);
        const float x = k % 2 ? pair.y : pair.x;
        int code = min(max(__float2int_rn(x * inverse), -127), 127);
        if (residual) code = min(max(__float2int_rn(fmaf(-step, static_cast<float>(code), x) * inverse * 254.f), -127), 127);
        codes[j] |= static_cast<u32>(code & 255) << (8 * k);
        positive[j] |= x > 0.f ? 255u << (8 * k) : 0, negative[j] |= x < 0.f ? 255u << (8 * k) : 0;
      }
    }
  }
};

// What turns a tile's integers into the scores of the heads that this lane owns after `settle`.
template <int Tiles>
struct HeadScale {
  static constexpr int kHeadTiles = Tiles == 1 ? 1 : Tiles / 2;
  float scale[kHeadTiles][2], sum[kHeadTiles][2];

  __device__ __forceinline__ void collect(const float (&step)[Tiles], const float (&total)[Tiles], int tig, float factor, float sum_factor) {
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int column = (Tiles == 1 ? 2 * (tig & 1) : 2 * tig) + k;  // column c lives in lanes 4c..4c+3
        scale[t][k] = __shfl_sync(kFullMask, step[t], 4 * column) * factor;
        sum[t][k] = __shfl_sync(kFullMask, total[t], 4 * column) * sum_factor;
      }
  }
};

// Hand every score of a tile to `use(row, head, score)`. `params(row)` gives (scale, zero) of a row. With one column tile a lane has 2 heads of one row:
// heads lie in tig 0 and 1, residuals in tig 2 and 3, and two shuffles give tig 0 and 1 row gid, 2 and 3 row gid + 8.
template <int Tiles, typename Params, typename Use>
__device__ __forceinline__ void settle(const int (&dot)[Tiles][4], const HeadScale<Tiles>& head, int gid, int tig, const Params& params, const Use& use) {
  if constexpr (Tiles == 1) {
    const bool upper = tig >= 2;
    const int got0 = __shfl_xor_sync(kFullMask, upper ? dot[0][0] : dot[0][2], 2);
    const int got1 = __shfl_xor_sync(kFullMask, upper ? dot[0][1] : dot[0][3], 2);
    const int first = upper ? got0 * 254 + dot[0][2] : dot[0][0] * 254 + got0;
    const int second = upper ? got1 * 254 + dot[0][3] : dot[0][1] * 254 + got1;
    const int r = gid + (upper ? 8 : 0), g = 2 * (tig & 1);
    const float2 sz = params(upper);
    use(r, g, 0, fmaf(sz.x * head.scale[0][0], static_cast<float>(first), sz.y * head.sum[0][0]));
    use(r, g + 1, 1, fmaf(sz.x * head.scale[0][1], static_cast<float>(second), sz.y * head.sum[0][1]));
  } else {
    constexpr int kHeadTiles = Tiles / 2;
#pragma unroll
    for (int t = 0; t < kHeadTiles; ++t)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 sz = params(k >= 2);
        const int sum = dot[t][k] * 254 + dot[t + kHeadTiles][k];
        use(gid + (k < 2 ? 0 : 8), 8 * t + 2 * tig + k % 2, 2 * t + k % 2, fmaf(sz.x * head.scale[t][k % 2], static_cast<float>(sum), sz.y * head.sum[t][k % 2]));
      }
  }
}

// Scores of `count` pages whose numbers lie in shared memory, Vectors codes of D channels each: 1 the mean key, 2 maxima and minima, of which the first
// meet what is positive of the query and the second what is negative. `use(page, head, score)`, scores as they come, not scaled.
template <int D, int Vectors, int Tiles, int kWarps, typename Use>
__device__ __forceinline__ void score_pages(const u16* q, bool bf, int group, const u8* codes, const u32* params, const int* pages, int count,
                                            int kv_heads, int kv_head, const Use& use) {
  constexpr int kPieces = Vectors * D / 64;                                // 16 bytes each, of a row, a lane
  constexpr int kBatch = kPieces >= 8 ? 1 : (kPieces == 1 ? 4 : 8 / kPieces);  // tiles under way
  constexpr int kHeads = 4 * Tiles, kWords = D / 16;
  const int lane = lane_id(), gid = lane / 4, tig = lane % 4, warp = warp_id();

  u32 b[Tiles][kPieces * 4];
  HeadScale<Tiles> head;
  {
    float step[Tiles], sum[Tiles];
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
      const int column = 8 * t + gid, g = column % kHeads;
      QueryColumn<kWords> query;
      query.quantize(
          [&](int j) {  // word j: 4 channels of piece j / 4
            const int c = j / 4 * 64 + tig * 16 + j % 4 * 4;
            return g < group ? *reinterpret_cast<const uint2*>(q + g * D + c) : make_uint2(0, 0);
          },
          bf, column >= kHeads);
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        if constexpr (Vectors == 1) b[t][j] = query.codes[j];
        else b[t][j] = query.codes[j] & query.positive[j], b[t][kWords + j] = query.codes[j] & query.negative[j];
      }
      step[t] = query.step, sum[t] = query.sum;
    }
    head.collect(step, sum, tig, 1.f / 254.f, 1.f);
  }

  const int tiles = ceil_div(count, kTile);
  for (int first = warp; first < tiles; first += kWarps * kBatch) {
    uint4 x[kBatch][2][kPieces];
    u32 sz[kBatch][Tiles == 1 ? 1 : 2];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int tile = first + i * kWarps;
      if (tile >= tiles) break;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // Behind the end the last page is read again.
        const long long place = static_cast<long long>(pages[min(tile * kTile + gid + 8 * h, count - 1)]) * kv_heads + kv_head;
        const u8* const row = codes + place * (Vectors * D) + tig * 16;
#pragma unroll
        for (int j = 0; j < kPieces; ++j) x[i][h][j] = load_stream16(row + j * 64);
        if constexpr (Tiles > 1) sz[i][h] = __ldg(params + place);
        else if (h == (tig >= 2)) sz[i][0] = __ldg(params + place);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int tile = first + i * kWarps;
      if (tile >= tiles) break;
      int dot[Tiles][4] = {};
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const uint4 low = x[i][0][j], high = x[i][1][j];
#pragma unroll
        for (int t = 0; t < Tiles; ++t) {
          mma_u8s8(dot[t], low.x, high.x, low.y, high.y, b[t][4 * j], b[t][4 * j + 1]);
          mma_u8s8(dot[t], low.z, high.z, low.w, high.w, b[t][4 * j + 2], b[t][4 * j + 3]);
        }
      }
      settle<Tiles>(
          dot, head, gid, tig, [&](bool upper) { return unpack2<half>(sz[i][Tiles == 1 ? 0 : upper]); },
          [&](int r, int g, int, float score) {
            const int page = tile * kTile + r;
            if (g < group && page < count) use(page, g, score);
          });
    }
  }
}

// Logits of the tokens of `count` pages from the 4-bit keys. `use(slot, head, nth, logit)`: slots count the tokens of the list, -inf for those behind
// the sequence's end; a lane's scores of one `nth` are all of one head. Low nibbles are masked into one accumulator, high ones stay
// where they are (16 times too large) and get another, which spares the shifts.
template <int D, int Tiles, int kWarps, int kBatch, typename Use>
__device__ __forceinline__ void score_tokens(const u16* q, bool bf, int group, float sm_scale, const u8* shadow, const int* pages, const int* logical, int count,
                                             int page_shift, int seq_len, int kv_heads, int kv_head, const Use& use) {
  constexpr int kHeads = 4 * Tiles, kWords = D / 32;  // words of a row that a lane takes
  constexpr int kPieces = D == 256 ? 2 : 1;
  const int lane = lane_id(), gid = lane / 4, tig = lane % 4, warp = warp_id();
  const int page_size = 1 << page_shift, half_shift = page_shift - 4;
  const int block_bytes = (D / 2 + 4) << page_shift;

  u32 low_codes[Tiles][kWords], high_codes[Tiles][kWords];
  HeadScale<Tiles> head;
  {
    float step[Tiles], sum[Tiles];
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
      const int column = 8 * t + gid, g = column % kHeads;
      QueryColumn<2 * kWords> query;
      query.quantize(
          [&](int j) {  // channels of word j, and of word j + d/2
            const int w = j % kWords, c = j / kWords * (D / 2) + (D == 64 ? tig * 8 + w * 4 : w / 4 * 64 + tig * 16 + w % 4 * 4);
            return g < group ? *reinterpret_cast<const uint2*>(q + g * D + c) : make_uint2(0, 0);
          },
          bf, column >= kHeads);
#pragma unroll
      for (int j = 0; j < kWords; ++j) low_codes[t][j] = query.codes[j], high_codes[t][j] = query.codes[kWords + j];
      step[t] = query.step, sum[t] = query.sum;
    }
    head.collect(step, sum, tig, sm_scale * (1.f / (254.f * 16.f)), sm_scale);
  }

  const int tiles = count << half_shift;
  for (int first = warp; first < tiles; first += kWarps * kBatch) {
    uint4 x[kBatch][2][kPieces];
    u32 sz[kBatch][Tiles == 1 ? 1 : 2];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int tile = first + i * kWarps;
      if (tile >= tiles) break;
      const int start = (tile << 4) & (page_size - 1);
      const u8* const block = shadow + (static_cast<long long>(pages[tile >> half_shift]) * kv_heads + kv_head) * block_bytes;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const u8* const row = block + (start + gid + 8 * h) * (D / 2);
        if constexpr (D == 64) {
          const uint2 v = load_stream8(row + tig * 8);
          x[i][h][0].x = v.x, x[i][h][0].y = v.y;
        } else {
#pragma unroll
          for (int j = 0; j < kPieces; ++j) x[i][h][j] = load_stream16(row + j * 64 + tig * 16);
        }
        if (Tiles > 1 || h == (tig >= 2)) sz[i][Tiles == 1 ? 0 : h] = load_stream4(block + page_size * (D / 2) + (start + gid + 8 * h) * 4);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int tile = first + i * kWarps;
      if (tile >= tiles) break;
      const int start = (tile << 4) & (page_size - 1);
      const int real = seq_len - (logical[tile >> half_shift] << page_shift) - start;  // tokens of the tile that are there
      int dot[Tiles][4];
      constexpr u32 kLow = 0x0f0f0f0fu, kHigh = 0xf0f0f0f0u;
#pragma unroll
      for (int t = 0; t < Tiles; ++t) {
        int lo[4] = {}, hi[4] = {};
#pragma unroll
        for (int j = 0; j < kWords; j += 2) {
          const uint4 lower = x[i][0][j / 4], upper = x[i][1][j / 4];
          const u32 a0 = j % 4 ? lower.z : lower.x, a1 = j % 4 ? upper.z : upper.x, a2 = j % 4 ? lower.w : lower.y, a3 = j % 4 ? upper.w : upper.y;
          mma_u8s8(lo, a0 & kLow, a1 & kLow, a2 & kLow, a3 & kLow, low_codes[t][j], low_codes[t][j + 1]);
          mma_u8s8(hi, a0 & kHigh, a1 & kHigh, a2 & kHigh, a3 & kHigh, high_codes[t][j], high_codes[t][j + 1]);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) dot[t][k] = lo[k] * 16 + hi[k];
      }
      settle<Tiles>(
          dot, head, gid, tig, [&](bool upper) { return unpack2<half>(sz[i][Tiles == 1 ? 0 : upper]); },
          [&](int r, int g, int nth, float logit) {
            if (g < group) use(tile * kTile + r, g, nth, r < real ? logit : -inf());
          });
    }
  }
}
