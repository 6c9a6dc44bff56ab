// SpGEMV: logits of candidate tokens from the 4-bit keys, for all query heads of a group at once, on int8 tensor cores.
//
// The unit of work is a tile of 16 candidate tokens of one (sequence, kv head), a row. Every warp takes an equal, contiguous share of all rows'
// tiles: the shares are found on the device from the rows' lengths, so ragged batches are even too (a search that costs 2 us: one sequence goes without). A block is 4 warps that share nothing but
// that search; the grid is what fits the GPU at once.
// Floor: d/2 + 4 bytes a token and kv head, plus the logits, sizeof(Out) * group bytes a token: 68 + 8 at d=128, G=4, fp16.
//
// cp.async brings tiles into a ring of the warp's own in shared memory, kStages - 1 ahead of the one that is scored. Where tiles lie is looked up
// further ahead still: indices two batches of tiles ahead, pages one batch.
//
// A tile is one sequence of m16n8k32. Keys are its 16 rows, u8 codes 0..15; query columns are s8. Lane (gid, tig) reads the bytes of rows gid and
// gid + 8 that its fragments need, 16 at a time: nothing is shuffled, because k may be permuted as long as both sides agree. Low nibbles are
// masked into one accumulator; high nibbles stay where they are (16 times too large) and get another, which spares the shifts.
// The query is split in two s8 numbers, q = s * (a + r / 254) with a, r in -127..127: 16 bits of it survive, so the estimate is as
// good as one with a float query (rms 2e-4 against 1.4e-2 for 8 bits) at no cost while 2 * group <= 8 columns.
// The sum 254 * (16 lo + hi) + ... is an exact int32: 254 * 240 * 127 * 256 < 2^31.
// CUDA cores would need 21 warp instructions a token at G=4, which caps them at 3 TB/s.
#include "mma.cuh"

struct SpgemvParams {
  const void* q;            // [b, Hq, d] half or bf16
  const u8* shadow;         // [pages, Hkv, P*d/2 + 4*P]
  const int* page_table;    // [b, max_pages]
  const int* seq_lens;      // [b]
  const int* indices;       // [b, Hkv, capacity]
  const int* lengths;       // [b, Hkv]
  const float* log_weight;  // [b, Hq, capacity], or null; P = 0 only
  void* out;                // [b, Hq, capacity * granularity]
  float sm_scale;
  int q_is_bf16;
  int rows;  // b * Hkv
  int kv_heads;
  int group;
  int capacity;
  int max_pages;
  int page_shift;         // log2 P
  int granularity_shift;  // log2 of the tokens of an entry
  int even;               // share out the rows' capacities instead of their lengths
};
CHECK_PARAMS(SpgemvParams);

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kTile = 16;
// Of a warp's ring of D/2 * 16 + 64 bytes a stage all but one stage are under way: 16 warps of 7 KB at d=128.
template <int D>
constexpr int kRing = D == 256 ? 5 : 8;

// The words of a row that lane tig needs: word j has bytes (j / 4) * 64 + tig * 16 + (j % 4) * 4, or tig * 8 + j * 4 at d = 64.
template <int D>
__device__ __forceinline__ int byte_of_word(int j, int tig) {
  return D == 64 ? tig * 8 + j * 4 : (j / 4) * 64 + tig * 16 + (j % 4) * 4;
}

template <int D>
__device__ __forceinline__ void read_row(u32 (&words)[D / 32], const u8* row, int tig) {
  if constexpr (D == 64) {
    const uint2 v = *reinterpret_cast<const uint2*>(row + tig * 8);
    words[0] = v.x, words[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < D / 128; ++i) {
      const uint4 v = load16(row + i * 64 + tig * 16);
      words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
  }
}

// One column of B in registers: channels of word j, and of word j + d/2, as s8 codes. The four lanes of a column hold all of it between them.
template <int D>
__device__ __forceinline__ void read_query(const SpgemvParams& p, int first_head, int g, bool residual, int tig, u32 (&low)[D / 32],
                                           u32 (&high)[D / 32], float& scale, float& sum) {
  constexpr int kWords = D / 32;
  uint2 raw[2][kWords];
  float largest = 0.f;
  sum = 0.f;
  const auto value = [&](uint2 w, int k) {
    const u32 word = k < 2 ? w.x : w.y;
    const float2 v = unpack2(p.q_is_bf16, word);
    return k % 2 ? v.y : v.x;
  };
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      const u16* at = static_cast<const u16*>(p.q) + static_cast<long long>(first_head + g) * D + h * (D / 2) + byte_of_word<D>(j, tig);
      raw[h][j] = g < p.group ? *reinterpret_cast<const uint2*>(at) : make_uint2(0, 0);
    }
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int j = 0; j < kWords; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float x = value(raw[h][j], k);
        largest = fmaxf(largest, fabsf(x)), sum += x;
      }
  largest = warp_max<4>(largest);
  sum = warp_sum<4>(sum);  // carries a NaN of the query into every logit of this head
  const float step = largest / 127.f, inverse = step > 0.f ? 1.f / step : 0.f;
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      u32 word = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float x = value(raw[h][j], k);
        int code = min(max(__float2int_rn(x * inverse), -127), 127);
        if (residual) code = min(max(__float2int_rn(fmaf(-step, static_cast<float>(code), x) * inverse * 254.f), -127), 127);
        word |= static_cast<u32>(code & 255) << (8 * k);
      }
      (h ? high : low)[j] = word;
    }
  scale = step * p.sm_scale * (1.f / (254.f * 16.f)), sum *= p.sm_scale;
}

// Tiles: column tiles of 8; the first half of the columns are the group's heads, the second half their residuals.
// P: the page size if entries are pages of 16 or 32 tokens; 0 for entries of any power of two tokens, which are located one by one.
template <typename Out, int D, int Tiles, int P>
__global__ void __launch_bounds__(kThreads, Tiles == 4 ? 2 : 4) spgemv(const __grid_constant__ SpgemvParams p) {
  constexpr int kStages = kRing<D>;
  constexpr int kHeads = 4 * Tiles, kWords = D / 32, kHeadTiles = Tiles == 1 ? 1 : Tiles / 2;
  constexpr int kCodes = kTile * D / 2, kTileBytes = kCodes + kTile * 4;
  constexpr int kBatch = P ? 32 : 2;           // tiles that are looked up together: a lane a page, or a lane a token
  constexpr int kLanesATile = kWarp / kBatch;  // 1 or 16
  static_assert(P == 0 || P % kTile == 0, "a tile must not cross a page");

  __shared__ __align__(16) u8 s_ring[kWarps][kStages][kTileBytes];
  __shared__ int4 s_tile[kWarps][kStages];  // row, tile of the row, which of its 16 tokens are real
  __shared__ int s_scan[kWarps + 1];
  __shared__ int2 s_start[kWarps];

  const int lane = lane_id(), warp = uniform_warp_id(), gid = lane / 4, tig = lane % 4;
  const int page_shift = P ? (P == 16 ? 4 : 5) : p.page_shift;
  const int granularity_shift = P ? page_shift : p.granularity_shift;
  const int slots = p.capacity << granularity_shift;
  const int block_bytes = (D / 2 + 4) << page_shift;
  const int row_tiles = ceil_div(slots, kTile);
  const auto tiles_of = [&](int row) { return p.even ? row_tiles : ceil_div(min(p.lengths[row], p.capacity) << granularity_shift, kTile); };

  // 1. This warp's share of all tiles: `begin` to `end`, and the row in which `begin` lies.
  int total = p.rows * row_tiles, row = 0, row_begin = 0;
  const auto share = [&](int w) {
    const int warps = gridDim.x * kWarps, me = blockIdx.x * kWarps + w;
    return total / warps * me + min(me, total % warps);
  };
  if (!p.even) {
    const int per_thread = ceil_div(p.rows, kThreads), first_row = threadIdx.x * per_thread;
    const int last_row = min(first_row + per_thread, p.rows);
    int mine = 0;
    for (int r = first_row; r < last_row; ++r) mine += tiles_of(r);
    const int before = block_exclusive_scan<kThreads>(mine, s_scan, total);
    for (int w = 0; w < kWarps; ++w) {
      const int start = share(w);
      if (start < before || start >= before + mine) continue;
      int r = first_row, at = before;
      for (int tiles = tiles_of(r); at + tiles <= start; tiles = tiles_of(++r)) at += tiles;
      s_start[w] = make_int2(r, at);
    }
    __syncthreads();
  }
  const int begin = share(warp), end = share(warp + 1);
  if (p.even) {
    row = begin / row_tiles, row_begin = row * row_tiles;
  } else if (begin < end) {
    row = s_start[warp].x, row_begin = s_start[warp].y;
  }

  // 2. Looking ahead. This lane's tile of a batch, its row (which ends at row_end, counted in tiles of all rows), and what has been found out.
  const int sub = lane / kLanesATile;
  int tile = begin + sub, row_end = begin < end ? row_begin + tiles_of(row) : 0;
  struct Found {
    int row, tile, logical, offset;  // tile of the row; entry's index, or -1; the token in it
  } ahead = {0, 0, -1, 0};
  struct Fetched {
    int row, tile, page, position, seq_len;  // position: of the tile's first token, or of the lane's token; -1 if there is none
  } next = {0, 0, 0, -1, 0};
  struct Place {
    int row, tile, place, valid;  // place: (page * kv_heads + head) << page_shift, and the slot in it, or -1; valid: real tokens
  } now;
  const auto look_up = [&]() {  // the index of this lane's next tile or token
    ahead.logical = -1;
    if (tile < end) {
      while (tile >= row_end) row_begin = row_end, row_end += tiles_of(++row);
      ahead.row = row, ahead.tile = tile - row_begin;
      const int slot = ahead.tile * kTile + (P ? 0 : lane % kTile), entry = slot >> granularity_shift;
      if (entry < min(p.lengths[row], p.capacity)) ahead.logical = p.indices[static_cast<long long>(row) * p.capacity + entry];
      ahead.offset = slot & ((1 << granularity_shift) - 1);
    }
    tile += kBatch;
  };
  // Loads only: what they bring is looked at a batch later, so that nothing waits here.
  const auto locate = [&]() {
    next.row = ahead.row, next.tile = ahead.tile, next.position = -1;
    if (ahead.logical < 0) return;
    const int batch = ahead.row / p.kv_heads;
    next.position = (ahead.logical << granularity_shift) + ahead.offset;
    next.seq_len = p.seq_lens[batch];
    next.page = p.page_table[static_cast<long long>(batch) * p.max_pages + min(next.position >> page_shift, p.max_pages - 1)];
  };
  const auto settle = [&]() {
    now.row = next.row, now.tile = next.tile;
    now.valid = next.position < 0 ? 0 : min(max(next.seq_len - next.position, 0), P ? kTile : 1);
    // A shadow of more than 2^31 tokens does not fit a GPU.
    const int block = next.page * p.kv_heads + next.row % p.kv_heads;
    now.place = now.valid > 0 ? (block << page_shift) + (next.position & ((1 << page_shift) - 1)) : -1;
  };
  look_up(), locate(), look_up(), settle(), locate(), look_up();

  const u8* const lane_shadow = p.shadow + lane * 16;
  // 3. Fetching tile `begin + i` into stage i % kStages.
  const auto fetch = [&](int i) {
    if (i < end - begin) {
      const int in_batch = i % kBatch;
      if (i > 0 && in_batch == 0) settle(), locate(), look_up();
      u8* stage = s_ring[warp][i % kStages];
      u32 real;
      if constexpr (P != 0) {
        const int place = __shfl_sync(kFullMask, now.place, in_batch), valid = __shfl_sync(kFullMask, now.valid, in_batch);
        real = (1u << valid) - 1;
        if (valid > 0) {  // one pointer for all of it where a page is a tile: its codes and then its pairs, as in the ring
          const int start = P == kTile ? 0 : place & (P - 1);
          const u8* const from = mad_wide(lane_shadow, place >> page_shift, block_bytes) + start * (D / 2);
#pragma unroll
          for (int c = 0; c < kCodes / 16; c += kWarp)
            if (kCodes / 16 % kWarp == 0 || c + lane < kCodes / 16) cp_async16(stage + (c + lane) * 16, from + c * 16);
          if (lane < 4) cp_async16(stage + kCodes + lane * 16, from + P * (D / 2) - start * (D / 2 - 4));
        }
      } else {
        const auto source = [&](int place, int bytes, int skip) {
          return p.shadow + static_cast<long long>(place >> page_shift) * block_bytes + skip + (place & ((1 << page_shift) - 1)) * bytes;
        };
        real = __ballot_sync(kFullMask, now.place >= 0) >> (in_batch * kTile) & 0xffffu;
#pragma unroll
        for (int c = 0; c < kCodes / 16; c += kWarp) {
          constexpr int kChunks = D / 32;  // 16-byte chunks of a key
          const int r = (c + lane) / kChunks, place = __shfl_sync(kFullMask, now.place, in_batch * kTile + r);
          if (place >= 0) cp_async16(stage + (c + lane) * 16, source(place, D / 2, 0) + (c + lane) % kChunks * 16);
        }
        const int place = __shfl_sync(kFullMask, now.place, in_batch * kTile + lane % kTile);
        if (lane < kTile && place >= 0) cp_async4(stage + kCodes + lane * 4, source(place, 4, (D / 2) << page_shift));
      }
      const int its_row = __shfl_sync(kFullMask, now.row, in_batch * kLanesATile), its_tile = __shfl_sync(kFullMask, now.tile, in_batch * kLanesATile);
      if (lane == 0) s_tile[warp][i % kStages] = make_int4(its_row, its_tile, static_cast<int>(real), 0);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch(i);

  // 4. Scoring.
  u32 b_low[Tiles][kWords], b_high[Tiles][kWords];
  float q_scale[kHeadTiles][2], q_sum[kHeadTiles][2];  // of the two heads a column tile that this lane writes
  int current = -1;
  Out* out = nullptr;
  [[maybe_unused]] const float* log_weight = nullptr;

  for (int i = 0; i < end - begin; ++i) {
    cp_async_wait<kStages - 2>();
    __syncwarp();  // everybody's part of tile i has come, and everybody is done with tile i - 1
    fetch(i + kStages - 1);
    const int4 info = s_tile[warp][i % kStages];
    const u8* stage = s_ring[warp][i % kStages];
    const int its_row = __shfl_sync(kFullMask, info.x, 0);  // which the compiler then knows to be the same everywhere
    if (its_row != current) {
      current = its_row;
      const int first_head = current * p.group;
      float scale[Tiles], sum[Tiles];
#pragma unroll
      for (int t = 0; t < Tiles; ++t) {
        const int column = 8 * t + gid;
        read_query<D>(p, first_head, column % kHeads, column >= kHeads, tig, b_low[t], b_high[t], scale[t], sum[t]);
      }
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int column = (Tiles == 1 ? 2 * (tig & 1) : 2 * tig) + k;  // lives in lanes 4 * column ..
          q_scale[t][k] = __shfl_sync(kFullMask, scale[t], 4 * column), q_sum[t][k] = __shfl_sync(kFullMask, sum[t], 4 * column);
        }
      out = static_cast<Out*>(p.out) + static_cast<long long>(first_head) * slots;
      if constexpr (P == 0) {
        if (p.log_weight != nullptr) log_weight = p.log_weight + static_cast<long long>(first_head) * p.capacity;
      }
    }

    u32 l[kWords], h[kWords];
    read_row<D>(l, stage + gid * (D / 2), tig);
    read_row<D>(h, stage + (gid + 8) * (D / 2), tig);
    int sum[Tiles][4];
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
      int lo[4] = {0, 0, 0, 0}, hi[4] = {0, 0, 0, 0};
#pragma unroll
      for (int j = 0; j < kWords; j += 2) {
        constexpr u32 kLow = 0x0f0f0f0fu, kHigh = 0xf0f0f0f0u;
        mma_u8s8(lo, l[j] & kLow, h[j] & kLow, l[j + 1] & kLow, h[j + 1] & kLow, b_low[t][j], b_low[t][j + 1]);
        mma_u8s8(hi, l[j] & kHigh, h[j] & kHigh, l[j + 1] & kHigh, h[j + 1] & kHigh, b_high[t][j], b_high[t][j + 1]);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[t][k] = lo[k] * 16 + hi[k];
    }

    const int slot0 = info.y * kTile;
    const auto logit_of = [&](int r, int t, int k, int dot) {
      const float2 scale_zero = unpack2<half>(*reinterpret_cast<const u32*>(stage + kCodes + r * 4));
      float logit = fmaf(scale_zero.x * q_scale[t][k], static_cast<float>(dot), scale_zero.y * q_sum[t][k]);
      const bool real = info.z >> r & 1;
      if constexpr (P == 0) {
        const int g = (Tiles == 1 ? 2 * (tig & 1) : 8 * t + 2 * tig) + k;
        if (log_weight != nullptr && real && g < p.group) logit += log_weight[static_cast<long long>(g) * p.capacity + ((slot0 + r) >> granularity_shift)];
      }
      return real ? logit : -inf();
    };
    // The logits of heads g and g + 1 for row r. For halves, lanes of neighbouring rows swap, so that each has one head's two neighbours: 4-byte stores.
    const auto exchange = [&](float first, float second) {
      const bool odd = gid & 1;
      const half sent = to_half_clamped(odd ? first : second), kept = to_half_clamped(odd ? second : first);
      const u32 got = __shfl_xor_sync(kFullMask, static_cast<u32>(__half_as_ushort(sent)), 4), own = __half_as_ushort(kept);
      return odd ? got | own << 16 : own | got << 16;
    };
    const auto store_pair = [&](int g, int r, u32 pair) {
      if (g >= p.group) return;
      half* at = reinterpret_cast<half*>(out) + (g * slots + slot0 + r);  // a group's slots are fewer than 2^31
      if (P != 0 || (slots & 1) == 0) {
        if (P != 0 || slot0 + r < slots) *reinterpret_cast<u32*>(at) = pair;
      } else {
        if (slot0 + r < slots) at[0] = __ushort_as_half(static_cast<u16>(pair));
        if (slot0 + r + 1 < slots) at[1] = __ushort_as_half(static_cast<u16>(pair >> 16));
      }
    };
    const auto store = [&](int g, int r, float logit) {
      if (g < p.group && (P != 0 || slot0 + r < slots)) reinterpret_cast<float*>(out)[g * slots + slot0 + r] = logit;
    };
    if constexpr (Tiles == 1) {
      // Heads lie in tig 0 and 1, residuals in tig 2 and 3. Two shuffles give every lane both: tig 0 and 1 of row gid, 2 and 3 of row gid + 8.
      const bool upper = tig >= 2;
      const int got0 = __shfl_xor_sync(kFullMask, upper ? sum[0][0] : sum[0][2], 2);
      const int got1 = __shfl_xor_sync(kFullMask, upper ? sum[0][1] : sum[0][3], 2);
      const int r = gid + (upper ? 8 : 0), g = 2 * (tig & 1);
      const float first = logit_of(r, 0, 0, upper ? got0 * 254 + sum[0][2] : sum[0][0] * 254 + got0);
      const float second = logit_of(r, 0, 1, upper ? got1 * 254 + sum[0][3] : sum[0][1] * 254 + got1);
      if constexpr (sizeof(Out) == 2) {
        store_pair(g + (gid & 1), r & ~1, exchange(first, second));
      } else {
        store(g, r, first), store(g + 1, r, second);
      }
    } else {
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t) {
        float logit[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) logit[k] = logit_of(gid + (k < 2 ? 0 : 8), t, k % 2, sum[t][k] * 254 + sum[t + kHeadTiles][k]);
        if constexpr (sizeof(Out) == 2) {
          // One more swap, between tig and tig ^ 2, so that a store covers all 16 rows of a head: a whole sector instead of half of two.
          const u32 low = exchange(logit[0], logit[1]), high = exchange(logit[2], logit[3]);
          const bool upper = tig >= 2;
          const u32 got = __shfl_xor_sync(kFullMask, upper ? low : high, 2);
          const int g = 8 * t + 2 * (tig & 1) + (gid & 1), r = (gid & ~1) + (upper ? 8 : 0);
          store_pair(g, r, upper ? got : low);
          store_pair(g + 4, r, upper ? high : got);
        } else {
#pragma unroll
          for (int k = 0; k < 4; ++k) store(8 * t + 2 * tig + k % 2, gid + (k < 2 ? 0 : 8), logit[k]);
        }
      }
    }
  }
  cp_async_wait<0>();

  // 5. What lies behind the rows' ends.
  for (int item = blockIdx.x * kWarps + warp; item < p.rows * p.group; item += gridDim.x * kWarps) {
    Out* const padding = static_cast<Out*>(p.out) + static_cast<long long>(item) * slots;
    for (int slot = tiles_of(item / p.group) * kTile + lane; slot < slots; slot += kWarp) padding[slot] = from_float<Out>(-inf());
  }
}
