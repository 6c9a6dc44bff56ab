// Page scores, for all query heads of a group: the product with the page's mean key (V = 1 vector a page), or Quest's upper bound of the page's logits,
// sum_c max(q_c * M_c, q_c * m_c) (V = 2).
//
// As max(q*M, q*m) = relu(q)*M + min(q, 0)*m, the bound is a dot product of length 2d, so it runs on tensor cores: 16 pages are the rows of
// a tile, query heads its columns. A block scores tiles of 16 pages for H neighbouring kv heads of one sequence, a warp a head; the heads of
// a page lie side by side, H times V*d codes and H pairs of halves (INT8) or H times d values in each of V tensors (native). Every block takes an
// equal, contiguous share of all sequences' tiles, found on the device from their lengths; the grid is what fits the GPU at once.
// Floor: V*d + 4 bytes (INT8) or 2*V*d bytes (native) a page and kv head, plus 4 bytes a page and query head: 260 + 16 at V=2, d=128, G=4.
//
// cp.async brings whole pages into shared memory, the codes of all H heads and then their pairs of halves, and the fragments are read from there by
// 32-bit words. Page rows are an odd multiple of 16 bytes apart, so 8 rows x 4 words meet 32 banks.
// INT8 reads the query as s * (a + r / 254), two s8 numbers a channel (see spgemv.cu); native metadata meets the query in its own type.
#include "mma.cuh"

struct PageScoresParams {
  const void* q;          // [b, Hq, d] half or bf16
  const u8* high;         // u8: [pages, Hkv, V*d] codes, of maxima before minima; native: [pages, Hkv, d], the maxima or means
  const u8* low;          // native: [pages, Hkv, d], the minima
  const u32* params;      // u8: [pages, Hkv], half scale and half zero
  const int* page_table;  // [b, max_pages]
  const int* seq_lens;    // [b]
  float* out;             // [b, Hq, num_pages], -inf behind a sequence's end
  int q_is_bf16;
  int kv_heads;
  int group;
  int max_pages;
  int num_pages;
  int page_size;
  int rows;        // b * Hkv / H: sequences times sets of H heads
  int even;        // share out `num_pages` a row instead of the real pages
  int page_words;  // 32-bit words between two pages of a tile in shared memory
};
CHECK_PARAMS(PageScoresParams);

constexpr int kTile = 16;

template <typename T>
constexpr bool kIsInt8 = sizeof(T) == 1;

// T: u8, half or bf16. V: vectors a page. Tiles: column tiles of 8; for u8 the second half of the columns are residuals. kStages: tiles in shared memory. Block: 32 * H threads, H in 1, 2, 4, 8.
template <typename T, int D, int V, int Tiles, int kStages>
__global__ void __launch_bounds__(256, (sizeof(T) * D * Tiles > 512 ? 1 : 2)) page_scores(const __grid_constant__ PageScoresParams p) {
  constexpr int kPart = D * sizeof(T);                        // bytes of one vector
  constexpr int kRecord = kIsInt8<T> ? V * kPart : kPart;     // bytes of a page and head that lie together
  constexpr int kQuery = kPart / 32, kSteps = V * kQuery;     // mma: 32 bytes deep for either type
  constexpr int kHeads = kIsInt8<T> ? 4 * Tiles : 8 * Tiles;  // query heads that the columns hold
  extern __shared__ __align__(16) u32 s_pages[];              // [kStages][kTile][page_words]
  __shared__ int s_scan[9], s_start[2];

  const int lane = lane_id(), gid = lane / 4, tig = lane % 4;
  const int heads = blockDim.x / kWarp, sets = p.kv_heads / heads;
  const auto pages_of = [&](int row) { return min(ceil_div(p.seq_lens[row / sets], p.page_size), p.num_pages); };
  const int row_tiles = ceil_div(p.num_pages, kTile);
  const auto tiles_of = [&](int row) { return p.even ? row_tiles : ceil_div(pages_of(row), kTile); };
  const auto share = [&](int total, int block) {
    const int blocks = gridDim.x;
    return total / blocks * block + min(block, total % blocks);
  };

  // 1. This block's share of all tiles: `begin` to `end`, and the row in which `begin` lies. Warp 0 adds up, a lane a stretch of rows.
  if (!p.even && warp_id() == 0) {
    const int per_lane = ceil_div(p.rows, kWarp), first_row = lane * per_lane, last_row = min(first_row + per_lane, p.rows);
    int mine = 0;
    for (int row = first_row; row < last_row; ++row) mine += tiles_of(row);
    const int up_to = warp_inclusive_scan(mine), total = __shfl_sync(kFullMask, up_to, kWarp - 1);
    const int start = share(total, blockIdx.x);
    if (lane == 0) s_scan[0] = total;
    if (start >= up_to - mine && start < up_to) {
      int row = first_row, at = up_to - mine;
      for (int tiles = tiles_of(row); at + tiles <= start; tiles = tiles_of(++row)) at += tiles;
      s_start[0] = row, s_start[1] = at;
    }
  }
  if (!p.even) __syncthreads();
  const int total = p.even ? p.rows * row_tiles : s_scan[0];
  const int begin = share(total, blockIdx.x), end = share(total, blockIdx.x + 1);

  // 2. Copying, 2 * heads threads to a page. The cursor of the copies runs kStages tiles ahead of the one of the scores: a page's number is loaded one
  // tile before its bounds are fetched.
  struct Cursor {
    int tile, row, row_begin, row_end, pages;  // tiles of all rows; `pages` of this row
  };
  const auto advance = [&](Cursor& c) {
    if (++c.tile < end)
      while (c.tile >= c.row_end) c.row_begin = c.row_end, c.pages = pages_of(++c.row), c.row_end += p.even ? row_tiles : ceil_div(c.pages, kTile);
  };
  Cursor here = {begin, 0, 0, 0, 0};
  if (begin < end) {
    here.row = p.even ? begin / row_tiles : s_start[0], here.row_begin = p.even ? here.row * row_tiles : s_start[1];
    here.pages = pages_of(here.row), here.row_end = here.row_begin + tiles_of(here.row);
  }
  Cursor ahead = here;
  const int copiers = 2 * heads, copy_row = threadIdx.x / copiers, copy_lane = threadIdx.x % copiers;
  const int run = heads * kRecord;  // contiguous bytes of these heads in a page
  int next_page = -1, next_set = 0;
  const auto look_up = [&]() {
    const int logical = (ahead.tile - ahead.row_begin) * kTile + copy_row;
    next_page = -1, next_set = ahead.row % sets;
    if (ahead.tile < end && logical < ahead.pages) next_page = p.page_table[static_cast<long long>(ahead.row / sets) * p.max_pages + logical];
    advance(ahead);
  };
  const auto fetch = [&](int stage) {
    if (next_page >= 0) {
      u8* row = reinterpret_cast<u8*>(s_pages + (stage * kTile + copy_row) * p.page_words);
      const long long place = static_cast<long long>(next_page) * p.kv_heads + next_set * heads, at = place * kRecord;
      for (int i = copy_lane * 16; i < run; i += copiers * 16) {
        cp_async16(row + i, p.high + at + i);
        if constexpr (!kIsInt8<T> && V == 2) cp_async16(row + run + i, p.low + at + i);
      }
      if constexpr (kIsInt8<T>)
        if (copy_lane < heads) cp_async4(row + run + 4 * copy_lane, p.params + place + copy_lane);
    }
    cp_async_commit();
    look_up();
  };
  look_up();
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) fetch(s);

  // 3. Columns of B, straight into registers. Lane (gid, tig) holds, of column gid, bytes 32s + 4tig..+3 and 16 bytes on, for every step s; the four
  // lanes of a column hold all of it between them. With two vectors, steps of the first half meet maxima (relu(q)), of the second half minima.
  u32 b[Tiles][kSteps][2];
  constexpr int kHeadTiles = kIsInt8<T> && Tiles > 1 ? Tiles / 2 : Tiles;
  float q_scale[kHeadTiles][2], q_sum[kHeadTiles][2];
  const auto read_query = [&](int first_head) {
    float my_scale[Tiles], my_sum[Tiles];
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
      const int column = 8 * t + gid, g = column % kHeads;
      const bool residual = column >= kHeads;
      const u32* query = static_cast<const u32*>(p.q) + static_cast<long long>(first_head + g) * (D / 2);
      if constexpr (kIsInt8<T>) {
        float largest = 0.f, sum = 0.f;
        u32 upper[V == 1 ? kQuery : 1][2];
        // Where the second word of a step is kept until the second round, in which its two words become codes.
        const auto second = [&](int s, int h) -> u32& {
          if constexpr (V == 2) return b[t][s + kQuery][h];
          else return upper[s][h];
        };
#pragma unroll
        for (int s = 0; s < kQuery; ++s)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int c = 32 * s + 16 * h + 4 * tig;
            const uint2 w = g < p.group ? *reinterpret_cast<const uint2*>(query + c / 2) : make_uint2(0, 0);
            b[t][s][h] = w.x, second(s, h) = w.y;
            const float2 x = unpack2(p.q_is_bf16, w.x), y = unpack2(p.q_is_bf16, w.y);
            largest = fmaxf(fmaxf(largest, fmaxf(fabsf(x.x), fabsf(x.y))), fmaxf(fabsf(y.x), fabsf(y.y)));
            sum += (x.x + x.y) + (y.x + y.y);
          }
        largest = warp_max<4>(largest);
        sum = warp_sum<4>(sum);  // carries a NaN of the query into every score of this head
        const float scale = largest / 127.f, inverse = scale > 0.f ? 1.f / scale : 0.f;
        my_scale[t] = scale * (1.f / 254.f), my_sum[t] = sum;
#pragma unroll
        for (int s = 0; s < kQuery; ++s)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const u32 words[2] = {b[t][s][h], second(s, h)};
            u32 positive = 0, negative = 0;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              const float2 pair = unpack2(p.q_is_bf16, words[k / 2]);
              const float x = k % 2 ? pair.y : pair.x;
              int code = min(max(__float2int_rn(x * inverse), -127), 127);
              if (residual) code = min(max(__float2int_rn(fmaf(-scale, static_cast<float>(code), x) * inverse * 254.f), -127), 127);
              const u32 byte = static_cast<u32>(code & 255) << (8 * k);
              positive |= x > 0.f ? byte : 0, negative |= x < 0.f ? byte : 0;
            }
            if constexpr (V == 2) b[t][s][h] = positive, b[t][s + kQuery][h] = negative;
            else b[t][s][h] = positive | negative;
          }
      } else {
#pragma unroll
        for (int s = 0; s < kQuery; ++s)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const u32 w = g < p.group ? query[8 * s + 4 * h + tig] : 0;
            if constexpr (V == 1) {
              b[t][s][h] = w;
            } else {
              const float2 x = unpack2<T>(w);
              // `x < 0 ? 0 : x` keeps a NaN, which fmaxf would drop.
              b[t][s][h] = pack2<T>(x.x < 0.f ? 0.f : x.x, x.y < 0.f ? 0.f : x.y);
              b[t][s + kQuery][h] = pack2<T>(x.x > 0.f ? 0.f : x.x, x.y > 0.f ? 0.f : x.y);
            }
          }
      }
    }
    // This lane's output columns are 2 * tig and 2 * tig + 1 of each tile of heads; column c lives in lanes 4c..4c+3.
    if constexpr (kIsInt8<T>) {
#pragma unroll
      for (int t = 0; t < kHeadTiles; ++t)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int column = (Tiles == 1 ? 2 * (tig & 1) : 2 * tig) + k;
          q_scale[t][k] = __shfl_sync(kFullMask, my_scale[t], 4 * column);
          q_sum[t][k] = __shfl_sync(kFullMask, my_sum[t], 4 * column);
        }
    }
  };

  float* out = nullptr;
  const auto write = [&](int page, int g, float score) {
    if (g < p.group && page < p.num_pages) out[static_cast<long long>(g) * p.num_pages + page] = page < here.pages ? score : -inf();
  };
  int current = -1;
  for (int i = 0; here.tile < end; ++i, advance(here)) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the tile has come, and everybody is done with the one before
    fetch((i + kStages - 1) % kStages);
    if (here.row != current) {
      current = here.row;
      const int first_head = (current / sets * p.kv_heads + current % sets * heads + warp_id()) * p.group;
      out = p.out + static_cast<long long>(first_head) * p.num_pages;
      read_query(first_head);
    }
    const u32* s_tile = s_pages + i % kStages * kTile * p.page_words;
    const u32* row0 = s_tile + gid * p.page_words + warp_id() * (kRecord / 4) + tig;
    const u32* row1 = row0 + 8 * p.page_words;
    const int page0 = (here.tile - here.row_begin) * kTile + gid;
    if constexpr (kIsInt8<T>) {
      int sum[Tiles][4] = {};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const u32 a0 = row0[8 * s], a1 = row1[8 * s], a2 = row0[8 * s + 4], a3 = row1[8 * s + 4];
#pragma unroll
        for (int t = 0; t < Tiles; ++t) mma_u8s8(sum[t], a0, a1, a2, a3, b[t][s][0], b[t][s][1]);
      }
      const u32* const pair = s_tile + gid * p.page_words + run / 4 + warp_id();
      const float2 params0 = unpack2<half>(pair[0]), params1 = unpack2<half>(pair[8 * p.page_words]);
      if constexpr (Tiles == 1) {
        // Heads lie in tig 0 and 1, residuals in tig 2 and 3: two shuffles, then tig 0 and 1 own row gid, 2 and 3 row gid + 8.
        const bool upper = tig >= 2;
        const int got0 = __shfl_xor_sync(kFullMask, upper ? sum[0][0] : sum[0][2], 2);
        const int got1 = __shfl_xor_sync(kFullMask, upper ? sum[0][1] : sum[0][3], 2);
        const int dot0 = upper ? got0 * 254 + sum[0][2] : sum[0][0] * 254 + got0;
        const int dot1 = upper ? got1 * 254 + sum[0][3] : sum[0][1] * 254 + got1;
        const float2 params = upper ? params1 : params0;
        const int page = page0 + (upper ? 8 : 0), g = 2 * (tig & 1);
        write(page, g, fmaf(params.x * q_scale[0][0], static_cast<float>(dot0), params.y * q_sum[0][0]));
        write(page, g + 1, fmaf(params.x * q_scale[0][1], static_cast<float>(dot1), params.y * q_sum[0][1]));
      } else {
#pragma unroll
        for (int t = 0; t < kHeadTiles; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 params = i < 2 ? params0 : params1;
            const int dot = sum[t][i] * 254 + sum[t + Tiles / 2][i];
            write(page0 + (i < 2 ? 0 : 8), 8 * t + 2 * tig + i % 2,
                  fmaf(params.x * q_scale[t][i % 2], static_cast<float>(dot), params.y * q_sum[t][i % 2]));
          }
      }
    } else {
      float sum[Tiles][4] = {};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const u32* from0 = row0 + (s < kQuery ? 0 : run / 4 - kPart / 4) + 8 * s;
        const u32* from1 = row1 + (s < kQuery ? 0 : run / 4 - kPart / 4) + 8 * s;
        const u32 a0 = from0[0], a1 = from1[0], a2 = from0[4], a3 = from1[4];
#pragma unroll
        for (int t = 0; t < Tiles; ++t) mma_16bit<T>(sum[t], a0, a1, a2, a3, b[t][s][0], b[t][s][1]);
      }
#pragma unroll
      for (int t = 0; t < Tiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) write(page0 + (i < 2 ? 0 : 8), 8 * t + 2 * tig + i % 2, sum[t][i]);
    }
  }
  cp_async_wait<0>();

  // 4. What lies behind the sequences' ends.
  const int warps = gridDim.x * heads;
  for (int item = blockIdx.x * heads + warp_id(); item < p.rows * heads * p.group; item += warps) {
    const int row = item / (heads * p.group);
    float* const padding = p.out + static_cast<long long>(item) * p.num_pages;
    for (int page = tiles_of(row) * kTile + lane; page < p.num_pages; page += kWarp) padding[page] = -inf();
  }
}
