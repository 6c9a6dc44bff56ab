// One decode step of one layer in one launch: the new token, pages by their 8-bit vectors, top-k, logits from the 4-bit keys, top-p, and attention.
//
// A cluster of blocks works on one (sequence, kv head), a row: 1 block where there are rows enough to fill the GPU, up to 16 where there are 8 rows. Everything between the stages
// stays in shared memory; the blocks of a row send each other keys, histograms and results, and each waits for what it is sent. Against a launch a stage this saves the scores' and
// logits' way to memory and back, 8 bytes a candidate and query head, and five launches, each of which waits for its slowest block and
// begins with loads that nothing hides: 35 of the 48 us that a step took at b=1, N=32k.
//
//     append   the new token, by one warp of one block, the one that scores its page
//     score    vectors [pages, Hkv, V*d], tiles of pages dealt to the blocks      -> scores, their maximum and sum
//     select   keys to everybody, each block finds the threshold                  -> the best pages, dealt to the blocks
//     estimate 4-bit keys of those                                                -> logits in fp16, their maximum and sum
//     prune    histograms of mass, cut by one block a head; of counts, with bounds -> the union's tokens of each block, and what each page lost
//     attend   each block over its own, pages' means with what they lost, merged   -> out, lse
//
// At b=1 everything but the streams is latency: six exchanges of the cluster, no loop that a warp could share with others, and nothing computed twice in a row. Dealing in
// turn, page by page, is what balances the blocks without another exchange: neighbours are heavy together.
// Where the list itself is asked for, pages are handed out in runs instead, so that it comes out in order.
// A list of tokens that somebody else has chosen is dealt out in tiles of 16, as pages are, and all after `select` is the same; 4 bytes of shared memory a token say where it lies.
// Floor: V*d + 4 bytes a page, d/2 + 4 bytes a candidate, and 4 more where it is one of a list, 4*d bytes a kept token: 260, 68 and 512 at d=128, V=2.
#include "fused_append.cuh"
#include "fused_attend.cuh"
#include "fused_bounds.cuh"
#include "fused_scores.cuh"
#include "fused_select.cuh"
#include "fused_tokens.cuh"
#include "fused_top_p.cuh"

// Where things lie in dynamic shared memory, as `fused_plan.py` lays them out. All blocks should leave 92 of a multiprocessor's 256 KB to its L1, where loads
// under way have their places: with 60 KB b=64 and 32k takes 5 % longer, with 28 the streams run at 60 % of their speed.
struct Layout {
  int numbers;        // behind the scores of pages (float): numbers of this block's pages
  int keys;           // then the keys of all (u32)
  int list;           // this block's candidates: logical and physical numbers of pages; or of tokens, rows of K (u32)
  int keep;           // who is kept (a byte for eight). Logits (half), rows of K and V (int) and the warps' O (float) lie where the scores were
  int bins;           // histograms; after them the mass that each page has lost (float)
  // Other blocks write to what follows; nobody may write elsewhere who does not know how far this block is.
  int mail;           // where there are others
  int results;        // what they have attended to
  int parts;          // of all blocks: maxima and sums of the heads, twice, and how many tokens are kept
};

struct FusedDecodeParams {
  NewTokens fresh;           // counted in seq_lens
  const void* q;             // [b, Hq, d] half or bf16
  void* k_pages;             // [pages, Hkv, P, d]
  void* v_pages;             // likewise
  u8* shadow;                // [pages, Hkv, P*d/2 + 4*P]
  u8* codes;                 // [pages, Hkv, V*d]: V = 0 takes every page, 1 means, 2 maxima and minima
  u32* code_params;          // [pages, Hkv, 2] half: scale, zero
  u8* value_codes;           // [pages, Hkv, d]: means of the values, or null: the pruned mass is dropped
  u32* value_params;         // [pages, Hkv, 2] half
  const int* page_table;     // [b, max_pages]
  const int* seq_lens;       // [b]
  const int* page_budget;    // [b, Hkv]
  const int* given;          // [b, Hkv, capacity], pages or tokens that somebody else has chosen, V = 0 only; or null
  const int* given_lengths;  // [b, Hkv]
  // outputs
  int* candidates;           // [b, Hkv, capacity] or null
  int* candidate_lengths;    // [b, Hkv]
  int* kept;                 // [b, Hkv, tokens of the candidates] or null, positions, ascending; not written past the length
  int* kept_lengths;         // [b, Hkv]
  int* per_query_head;       // [b, Hq]
  float* mass;               // [b, Hq]
  float* tail;               // [b, Hq, capacity] or null: log of the pruned mass of each candidate page
  void* out;                 // [b, Hq, d]
  float* lse;                // [b, Hq]
  float sm_scale;
  float p;
  float bins_per_nat;        // 32 or 16
  int bits;                  // of a weight: candidates * 2^bits stay below 2^32
  int reduce;                // how query heads are combined: 0 softmax, 1 sum, 2 max
  int q_is_bf16;
  int kv_heads;
  int group;
  int max_pages;
  int capacity;              // pages, or tokens where these are given
  int page_shift;            // log2 P, 4 or 5
  int page_share;            // pages of a block at most, a multiple of 16
  int entry_share;           // candidate pages of a block at most, or tiles of 16 tokens
  int min_tokens;            // that a query head keeps at least, and at most
  int max_tokens;
  Layout at;
  int stagger;               // rows that begin late, from this one on and as many; or 0
  float stagger_ns;          // how late, for each page
};
CHECK_PARAMS(FusedDecodeParams);

// Tiles of 16 tokens that a warp has under way: as many as 128 registers a thread hold.
template <int D, int Tiles>
constexpr int kTokenBatch = D == 256 || Tiles == 2 ? 2 : 4;

// 16 warps a block where there is one block a multiprocessor, else 8. kListed: tokens are given. kPlain: there is neither a bound on how many tokens are kept nor a tail. Code for these
// that is skipped, 20 KB, is fetched in parts where the kernel has gone from the caches, as in a model.
template <int D, int Tiles, int Vectors, int kWarps, bool kListed, bool kPlain>
__global__ void __launch_bounds__(kWarps * kWarp, D == 256 || kWarps == 16 ? 1 : 2) fused_decode(const __grid_constant__ FusedDecodeParams p) {
  static_assert(!kListed || Vectors == 0, "they have been chosen");
  constexpr int kThreads = kWarps * kWarp, kMaxHeads = 4 * Tiles;
  extern __shared__ __align__(16) unsigned char smem[];
  __shared__ __align__(16) u8 s_query[24 * Tiles * D];  // its codes, then the query itself; at a place that no register has to hold
  __shared__ SelectScratch<kThreads> s_select;
  __shared__ TopPScratch<kMaxHeads> s_top_p;
  __shared__ __align__(16) float2 s_warps[kWarps][kMaxHeads];
  __shared__ float s_step[kMaxHeads], s_sum[kMaxHeads];
  const AnyCluster cluster;
  const int blocks = cluster.size, rank = cluster.rank, row = blockIdx.y, batch = row / p.kv_heads, kv_head = row - batch * p.kv_heads;
  const int lane = lane_id(), warp = uniform_warp_id();
  const int page_size = 1 << p.page_shift, first_head = row * p.group;
  const int entry_shift = kListed ? 4 : p.page_shift;  // log2 of the tokens of an entry
  float* const scores = reinterpret_cast<float*>(smem);
  half* const logits = reinterpret_cast<half*>(smem);
  u32* const keys = reinterpret_cast<u32*>(smem + p.at.keys);
  unsigned char* const keep = smem + p.at.keep;
  int* const numbers = reinterpret_cast<int*>(smem + p.at.numbers);
  int* const logical = reinterpret_cast<int*>(smem + p.at.list);
  int* const physical = logical + p.entry_share;
  u32* const located = reinterpret_cast<u32*>(logical);  // of tokens
  u32* const bins = reinterpret_cast<u32*>(smem + p.at.bins);
  u32* const sums = blocks > 1 ? bins + p.group * kMassBins : bins;
  Mail& mail = *reinterpret_cast<Mail*>(smem + p.at.mail);
  // [blocks][kMaxHeads], two of them, and [blocks].
  const auto parts = [&](int nth) { return reinterpret_cast<float2*>(smem + p.at.parts) + nth * blocks * kMaxHeads; };
  const auto totals = [&] { return reinterpret_cast<u32*>(parts(2)); };
  const int* const table = p.page_table + static_cast<long long>(batch) * p.max_pages;

#pragma unroll 1
  for (int i = fresh_thread(); i < (p.at.mail - p.at.bins) / 16; i += kThreads) reinterpret_cast<uint4*>(bins)[i] = uint4{0, 0, 0, 0};
  if (const int i = fresh_thread(); i < kMaxHeads) s_top_p.counts[i] = s_top_p.tally[i] = 0;
  // ---- everything that can be asked for before anything is known ----
  const u16* const q = static_cast<const u16*>(p.q) + static_cast<long long>(first_head) * D;
  u32 raw[D / 64];
  if (warp < p.group) {
#pragma unroll
    for (int i = 0; i < D / 64; ++i) raw[i] = reinterpret_cast<const u32*>(q + warp * D)[lane * (D / 64) + i];
  }
  const int seq_len = p.seq_lens[batch];
  const int* const counts = Vectors ? p.page_budget : p.given_lengths;
  const int budget = Vectors || counts != nullptr ? max(min(counts[row], p.capacity), 0) : p.capacity;
  const int guess = global_page(cluster, threadIdx.x);
  const int guessed = Vectors && guess < p.max_pages ? table[guess] : 0;

  const int real = min(ceil_div(seq_len, page_size), p.max_pages);
  if (real <= 0) {  // the whole cluster leaves
    if (rank == 0 && threadIdx.x == 0) p.kept_lengths[row] = p.candidate_lengths[row] = 0;
    if (rank == 0 && threadIdx.x < p.group) p.per_query_head[first_head + threadIdx.x] = 0, p.mass[first_head + threadIdx.x] = 0.f;
    if (rank == 0 && threadIdx.x < p.group) p.lse[first_head + threadIdx.x] = -inf();
#pragma unroll 1
    for (int i = threadIdx.x; rank == 0 && i < p.group * D / 8; i += kThreads) store16(static_cast<u16*>(p.out) + static_cast<long long>(first_head) * D + i * 8, uint4{0, 0, 0, 0});
    return;
  }
  if (p.stagger && row >= p.stagger && row < 2 * p.stagger && Vectors && budget < real) {
    // All rows of a wave would stream together and search together. Some of the first wave wait, and from then on some search while others stream.
    const u32 wait = static_cast<u32>(static_cast<float>(real) * p.stagger_ns);
    u32 begin, now;
    asm volatile("mov.u32 %0, %%globaltimer_lo;" : "=r"(begin));
    do {
      __nanosleep(500);
      asm volatile("mov.u32 %0, %%globaltimer_lo;" : "=r"(now));
    } while (now - begin < wait);
  }
  const QueryCodes query{s_query, s_step, s_sum, p.group};
  query.quantize<D>(raw, p.q_is_bf16);

  // ---- the new token ----
  int taken, entries, count = 0;
  const int tiles = ceil_div(real, kTile);
  const bool runs = p.kept != nullptr, last_here = cluster.owner(tiles - 1) == rank;
  if (!cluster.alone() && warp == kWarps - 1) {  // a lane a box, in the order of Mail
    const int owned = cluster.share(p.group), team = kWarps / p.group, histograms = blocks * owned * kMassBins * 4;
    const int sent[] = {blocks * kMaxHeads * 8,                                                          // scores
                        Vectors ? (tiles - cluster.share(tiles)) * kTile * 4 + blocks * 16 : 0,          // keys
                        blocks * p.group * 8,                                                            // logits
                        histograms, histograms,                                                          // bins, finer
                        p.group * 12,                                                                    // cuts
                        owned * team * blocks * 4,                                                       // tally
                        blocks * p.group * 8,                                                            // mass
                        blocks * p.group * ((D / 4 >> cluster.shift) * 16 + 8 + (rank == 0 ? kWarps * 4 : 0)) + (rank == 0 ? blocks * 4 : 0)};  // results
    u32 bytes = 0;
#pragma unroll
    for (int i = 0; i < kMails; ++i) bytes = lane == i ? sent[i] : bytes;
    u64* const box = reinterpret_cast<u64*>(&mail) + lane;
    AnyCluster::open(lane < kMails, box, bytes);
  }
  if (threadIdx.x == 0) s_select.wanted = Vectors == 0 && counts != nullptr ? budget : min(real, budget);
  if (Vectors && budget < real) {
    count = cluster.share(tiles) * kTile - (last_here ? tiles * kTile - real : 0);
#pragma unroll 1
    for (int i = threadIdx.x + kThreads; i < count; i += kThreads) cp_async4(numbers + i, table + global_page(cluster, i));
    if (threadIdx.x < count) numbers[threadIdx.x] = guessed;
    cp_async_commit(), cp_async_wait<0>();
  }
  __syncthreads();
  // Looked up each time, as no register is free while pages are scored.
  const auto wanted = [&] { return *static_cast<const volatile int*>(&s_select.wanted); };
  const auto chosen = [&] { return Vectors != 0 && wanted() < real; };
  // By the warp that scores the last tile: nobody else waits.
  bool appended = false;
  if (last_here && warp == (cluster.place(tiles - 1) & (kWarps - 1)) && p.fresh.k != nullptr && p.fresh.counts[batch] != 0) {
    const long long place = static_cast<long long>(chosen() ? numbers[count - 1] : table[real - 1]) * p.kv_heads + kv_head;
    const int channel = lane * (D / kWarp);
    const long long first = (place << p.page_shift) * D + channel;
    const u16* const k = static_cast<const u16*>(p.fresh.k) + batch * p.fresh.k_strides[0] + kv_head * p.fresh.k_strides[1] + channel;
    const u16* const v = static_cast<const u16*>(p.fresh.v) + batch * p.fresh.v_strides[0] + kv_head * p.fresh.v_strides[1] + channel;
    const PagePlace page{static_cast<u16*>(p.k_pages) + first, static_cast<u16*>(p.v_pages) + first, p.shadow + place * ((D / 2 + 4) << p.page_shift),
                         p.codes + place * (Vectors * D) + channel, !kPlain && p.value_codes ? p.value_codes + place * D + channel : nullptr, p.code_params + place,
                         p.value_params + place};
    append_token<D, Vectors>(k, v, p.q_is_bf16, page, (seq_len - 1) & (page_size - 1), page_size);
    __syncwarp();
    appended = true;
  }
  // A block may write to another once that one runs: each waits before its first such store. What has been appended is seen then, too; what lies in shared memory is there since the last barrier.
  if (appended) cluster.arrive();
  else cluster.arrive_relaxed();

  // ---- which pages ----
  constexpr int kOwned = HeadScale<Tiles>::kOwned;
  if constexpr (Vectors != 0) {
    if (chosen()) {
      float2 state[kOwned];
#pragma unroll
      for (int i = 0; i < kOwned; ++i) state[i] = make_float2(kLowest, 0.f);
      if (count > 0) {
        score_pages<D, Vectors, Tiles, kWarps>(query, p.sm_scale, p.codes, p.code_params, numbers, count, p.kv_heads, kv_head, state, [&](int page, int g, int nth, float score) {
          if (g < p.group && page < p.page_share) scores[g * p.page_share + page] = score;
          return score;
        });
      }
      join_lanes<Tiles>(state, s_warps[uniform_warp_id()]);
      __syncthreads();
      float2 all = join_parts<kMaxHeads>(s_warps[0], kWarps);
      if (blocks > 1) {
        cluster.wait();
#pragma unroll 1
        for (int r = uniform_warp_id(); r < blocks; r += kWarps) {
          if (lane < kMaxHeads) cluster.send(parts(0) + rank * kMaxHeads + lane, r, all, &mail.scores);
        }
        __syncthreads();  // everybody has read s_warps
        cluster.await(&mail.scores);
        all = join_parts<kMaxHeads>(parts(0), blocks);
      }
      share_keys<kThreads, 4 * Tiles>(cluster, s_select, reinterpret_cast<uint4*>(s_warps), scores, p.page_share, count, real, p.group, all, p.reduce, keys, mail);
      entries = best_pages<kThreads>(cluster, s_select, keys, real, runs, reinterpret_cast<int*>(bins), blocks > 1 ? nullptr : numbers, table, logical, physical, taken);
    }
  }
  const bool all_pages = !chosen();
  if (all_pages) taken = kListed ? ceil_div(budget, kTile) : wanted();
  const int per_block = (taken + blocks - 1) >> cluster.shift;
  const int before = rank * per_block;  // with runs, the entries of the blocks before
  if (all_pages) {                      // all of them, those that are given, or the first ones for a budget that no selector filled
    if (blocks > 1) cluster.wait();
    entries = runs ? max(min(per_block, taken - before), 0) : cluster.share(taken);
    if constexpr (kListed) {
      locate_tokens<kThreads>(located, entries, min(seq_len, real << p.page_shift), table, p.page_shift, p.kv_heads, kv_head, [&](int i) {
        const int at = (runs ? before + i / kTile : cluster.nth(i / kTile)) * kTile + i % kTile;
        return at < budget ? p.given[static_cast<long long>(row) * p.capacity + at] : -1;
      });
    }
#pragma unroll 1
    for (int i = threadIdx.x; !kListed && i < entries; i += kThreads) {
      int page = runs ? before + i : cluster.nth(i);
      if (Vectors == 0 && p.given != nullptr) page = p.given[static_cast<long long>(row) * p.capacity + page];
      logical[i] = min(static_cast<u32>(page), static_cast<u32>(real));  // behind the end no token counts
      cp_async4(physical + i, table + min(static_cast<u32>(page), static_cast<u32>(real - 1)));
    }
    cp_async_commit(), cp_async_wait<0>();
  }
  if (rank == 0 && threadIdx.x == 0) p.candidate_lengths[row] = kListed ? budget : taken;
  __syncthreads();
  if (!kListed && p.candidates) {
#pragma unroll 1
    for (int i = threadIdx.x; i < entries; i += kThreads) p.candidates[static_cast<long long>(row) * p.capacity + before + i] = logical[i];
  }

  // ---- logits ----
  const int pitch = p.entry_share << entry_shift, size = entries << entry_shift;
  {
    float2 state[kOwned];
#pragma unroll
    for (int i = 0; i < kOwned; ++i) state[i] = make_float2(kLowest, 0.f);
    const auto take = [&](int slot, int g, int nth, float logit) {
      const half rounded = to_half_clamped(logit);
      if (g < p.group && slot < size) logits[g * pitch + slot] = rounded;
      return to_float(rounded);
    };
    constexpr int kBatch = kTokenBatch<D, Tiles>;
    if constexpr (kListed) score_listed<D, Tiles, kWarps, kBatch>(query, p.sm_scale, p.shadow, located, entries, p.page_shift, state, take);
    else score_tokens<D, Tiles, kWarps, kBatch>(query, p.sm_scale, p.shadow, physical, logical, entries, p.page_shift, seq_len, p.kv_heads, kv_head, state, take);
    join_lanes<Tiles>(state, s_warps[uniform_warp_id()]);
  }
  __syncthreads();
  // Made anew: attention has no register to keep it in.
  const auto row_again = [] {
    u32 y;
    asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(y));
    return static_cast<int>(y);
  };
  const auto head_again = [&] { return row_again() * p.group; };
  // The codes of the query are of no more use: attention finds the query itself there, which is under way meanwhile.
  u16* const plain_query = reinterpret_cast<u16*>(s_query);
#pragma unroll 1
  for (int i = fresh_thread(); i < p.group * D / 8; i += kThreads) {
    cp_async16(plain_query + i * 8, static_cast<const u16*>(p.q) + static_cast<long long>(head_again()) * D + i * 8);
  }
  cp_async_commit();

  // ---- top-p ----
  find_threshold<kThreads, kMaxHeads>(cluster, s_top_p, logits, pitch, size, taken << entry_shift, p.group, p.p, p.bins_per_nat, p.bits, s_warps[0], parts(1), bins, sums, mail);
  if (!kPlain && (p.min_tokens > 1 || p.max_tokens < taken << entry_shift)) {
    bound_counts<kThreads, kMaxHeads>(cluster, s_top_p, logits, pitch, size, p.group, p.min_tokens, p.max_tokens, p.bins_per_nat, bins, sums, s_warps[0], parts(1), mail);
  }
  Chunks own;
  int kept_here;
  int at = mark_kept<kThreads, kMaxHeads, 4 * Tiles>(cluster, s_top_p, logits, pitch, size, p.group, keep, s_select.scan, runs, own, kept_here, mail);

  // ---- what is pruned ----
  PrunedPages tail{nullptr, nullptr, physical, reinterpret_cast<const float*>(bins), 0, p.kv_heads};
  if (!kPlain && !kListed && p.value_codes) {
    tail.codes = p.value_codes + kv_head * D, tail.params = p.value_params + kv_head, tail.count = entries;
    weigh_pruned<kThreads, kMaxHeads>(s_top_p, logits, pitch, entries, p.page_shift, p.group, keep, reinterpret_cast<float*>(bins),
                                      p.tail ? p.tail + static_cast<size_t>(head_again()) * p.capacity + before : nullptr, p.capacity);
    __syncthreads();
  }

  // ---- the list ----
  int* const places = reinterpret_cast<int*>(smem);  // nobody reads logits any more
  int* kept = nullptr;
  int kept_before = 0;
  if (runs) {
    kept = p.kept + (static_cast<long long>(row) * p.capacity << (kListed ? 0 : p.page_shift));
    if (threadIdx.x < blocks) AnyCluster::store(AnyCluster::address(totals() + rank, threadIdx.x), static_cast<u32>(kept_here));
    cluster.sync();
#pragma unroll 1
    for (int r = 0; r < rank; ++r) kept_before += totals()[r];
  }
#pragma unroll 1
  for (int chunk = own.first; chunk < own.end; chunk += own.stride) {
    u32 mine = keep[chunk];
    if (mine == 0) continue;
    if constexpr (kListed) {
      do {
        const int i = chunk * 8 + __ffs(mine) - 1;
        mine &= mine - 1;
        if (kept) kept[kept_before + at] = p.given[static_cast<long long>(row) * p.capacity + before * kTile + i];
        places[at++] = located[i];
      } while (mine);
      continue;
    }
    const int entry = chunk * 8 >> p.page_shift, offset = chunk * 8 & (page_size - 1);  // one page has all eight
    const int place = ((physical[entry] * p.kv_heads + kv_head) << p.page_shift) + offset, position = (logical[entry] << p.page_shift) + offset;
    do {
      const int candidate = __ffs(mine) - 1;
      mine &= mine - 1;
      if (kept) kept[kept_before + at] = position + candidate;
      places[at++] = place + candidate;
    } while (mine);
  }
  const auto report = [&](const AnyCluster& mates) {  // by block 0, once it has everybody's counts
    if (mates.rank != 0) return;
    if (const int i = fresh_thread(); i < p.group) {
      p.per_query_head[head_again() + i] = s_top_p.counts[i], p.mass[head_again() + i] = __uint_as_float(s_top_p.mass[i]);
    }
    if (uniform_warp_id() == 0) {
      const int nth = lane_id(), total = __reduce_add_sync(kFullMask, nth < mates.size ? totals()[nth] : 0);
      if (nth == 0) p.kept_lengths[row_again()] = total;
    }
  };
  // ---- attention over this block's tokens ----
  if (threadIdx.x == 0) cluster.send(totals() + rank, 0, static_cast<u32>(kept_here), &mail.results);
  cp_async_wait<0>();
  __syncthreads();
  float top, sum;
  float* const outputs = scores;
  const auto attend = [&](auto type) {  // one kernel for both types, which differ in nothing else
    using T = decltype(type);
    attend_warp<T, D, kWarps, kListed || kPlain>(reinterpret_cast<const T*>(plain_query), static_cast<const T*>(p.k_pages), static_cast<const T*>(p.v_pages), places, kept_here,
                                                 p.group, p.sm_scale * kLog2e, tail, outputs, top, sum);
  };
  if (p.q_is_bf16) attend(bf16());
  else attend(half());
  if (lane % 4 == 0 && lane < 4 * kMaxHeads) s_warps[fresh_thread() / kWarp][lane / 4] = make_float2(top, sum);
  __syncthreads();

  // ---- the warps' results, then the blocks': float4 number e of the group's is finished by its owner ----
  const AnyCluster mates;  // made anew, too
  const int all = p.group * (D / 4), each = all >> mates.shift;  // D / 4 is at least the size of the cluster
  float4* const received = reinterpret_cast<float4*>(smem + p.at.results);  // [blocks][each]
  const auto finish = [&](int e, float4 x, float2 joint) {
    const int head = head_again() + e / (D / 4), d = e % (D / 4) * 4;
    const float scale = joint.y == 0.f ? 0.f : 1.f / joint.y;
    x.x *= scale, x.y *= scale, x.z *= scale, x.w *= scale;
    *reinterpret_cast<uint2*>(static_cast<u16*>(p.out) + static_cast<long long>(head) * D + d) =
        make_uint2(pack2(p.q_is_bf16, x.x, x.y), pack2(p.q_is_bf16, x.z, x.w));
    if (d == 0) p.lse[head] = joint.y == 0.f ? -inf() : (joint.x + log2f(joint.y)) * kLn2;
  };
#pragma unroll 1
  for (int e = threadIdx.x; e < all; e += kThreads) {
    const int head = e / (D / 4);
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
    float2 joint = make_float2(-inf(), 0.f), state[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) state[w] = s_warps[w][head], joint.x = fmaxf(joint.x, state[w].x);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {  // a warp without tokens has a factor of 0, and zeros
      const float factor = fast_exp2(state[w].x - finite_max(joint.x));
      const float4 y = *reinterpret_cast<const float4*>(outputs + w * p.group * D + e * 4);
      joint.y += factor * state[w].y, x.x += factor * y.x, x.y += factor * y.y, x.z += factor * y.z, x.w += factor * y.w;
    }
    if (mates.alone()) {
      finish(e, x, joint);
    } else {
      const int to = mates.owner(e);
      mates.send(reinterpret_cast<uint4*>(received + mates.rank * each + mates.place(e)), to, uint4{__float_as_uint(x.x), __float_as_uint(x.y), __float_as_uint(x.z), __float_as_uint(x.w)}, &mail.results);
      if (e % (D / 4) < mates.size) mates.send(parts(0) + mates.rank * kMaxHeads + head, to, joint, &mail.results);
    }
  }
  mates.await(&mail.results);
  report(mates);
  if (mates.alone()) return;
  // A half warp joins one float4, a lane a block.
#pragma unroll 1
  for (int pair = uniform_warp_id() * 2; pair < each; pair += kWarps * 2) {
    const int own_lane = fresh_thread() % kWarp, r = own_lane % kMaxCluster, i = pair + own_lane / kMaxCluster, e = mates.nth(min(i, each - 1));
    float2 joint = make_float2(-inf(), 0.f);
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
    if (r < mates.size) joint = parts(0)[r * kMaxHeads + e / (D / 4)], x = received[r * each + mates.place(e)];
    const float best = warp_max<kMaxCluster>(joint.x), factor = fast_exp2(joint.x - finite_max(best));
    x.x = warp_sum<kMaxCluster>(x.x * factor), x.y = warp_sum<kMaxCluster>(x.y * factor);
    x.z = warp_sum<kMaxCluster>(x.z * factor), x.w = warp_sum<kMaxCluster>(x.w * factor);
    joint.y = warp_sum<kMaxCluster>(joint.y * factor), joint.x = best;
    if (r == 0 && i < each) finish(e, x, joint);
  }
}
