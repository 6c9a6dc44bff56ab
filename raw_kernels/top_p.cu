// Top-p without sorting, the union over a group, and the list of kept tokens in order.
//
// A cluster of kCluster blocks (1 where there are rows enough to fill the GPU) works on one (sequence, kv head) and cuts
// its candidates into slices. Inside a block every warp works for one query head, on chunks of 8 neighbouring candidates
// a lane; who is kept is a byte a chunk and head, and the union over the group is an OR of G bytes. The logits lie in
// shared memory (kShared) or are read from L2 in every pass.
//
// With x = max - logit >= 0, a histogram of 512 bins of 1/32 nat gets round(2^bits * exp(-(x - k/32))) in bin k: relative to
// the bin's own edge, so that integers keep 16 bits of every weight however small it is, and the order of atomics cannot
// matter. (1/16 nat for p from 0.999 on, where deeper bins count.) A scan over bins scaled by exp(-k/32) finds the first
// whose prefix reaches p; it is kept whole. Where that bin holds more than 5 % of what
// is kept, and more than 4 candidates, 256 sub-bins cut it finer. Rounding is paid for by a margin on p of 1.25 * 2^-bits.
// Candidates below the last bin only count towards Z. In a block that has the whole row a pass sums Z first: what lies below
// ln(2n / ((1 - p) Z)) nats then weighs less than (1 - p) Z / 2 together, is not needed either, and stays out of the
// histogram too. On peaked rows that is nearly everything, and atomics are what is slow.
//
// kExtended adds bounds and a tail. Where p keeps fewer than min_tokens or more than max_tokens, the cut moves to the token of that
// rank: a histogram of counts, 512 bins from the maximum down, then 512 in the bin that holds it, each pass one more read of
// the logits; deeper than 512 bins, which a floor may reach, 512 far wider ones. What is kept is still everything above a cut, so
// that ties stay together, and the set contains the reference's. With the union known, the mass that every candidate page has
// lost to it is summed, a lane a page, and written as its logarithm: what attention takes for the logit of a pseudo-token.
//
// Floor: the logits once, G * sizeof(Logit) bytes a candidate, and 4 bytes a kept token.
#include "cluster.cuh"
#include "threshold.cuh"

struct TopPParams {
  const void* logits;        // [b, Hq, n], -inf past a row's end
  const int* indices;        // [b, Hkv, capacity], n = capacity << granularity_shift
  const int* lengths;        // [b, Hkv]
  const float* log_weight;   // [b, Hq, capacity] or null
  // outputs
  int* kept;                 // [b, Hkv, n], positions, ascending; not written past the length
  int* kept_lengths;         // [b, Hkv]
  int* per_query_head;       // [b, Hq]
  float* mass;               // [b, Hq]
  float* kept_log_weight;    // [b, Hq, n] or null
  float* tail;               // [b, Hq, capacity] or null: log of the pruned mass of each page; for pages of 8 tokens or more
  float p;
  float bins_per_nat;        // 32 or 16
  int capacity;
  int granularity_shift;
  int slice_capacity;        // candidates of a block that shared memory has room for, a multiple of 8
  int bits;                  // of a weight: n * 2^bits stays below 2^32
  int group;                 // G, up to 16
  int min_tokens;            // of a query head, kExtended only
  int max_tokens;
};
CHECK_PARAMS(TopPParams);

constexpr int kMaxGroup = 16;

template <typename Logit, int kThreads, int kCluster, bool kShared, bool kExtended = false>
__global__ void CLUSTER_DIMS(kCluster) __launch_bounds__(kThreads, kThreads == 384 ? 3 : 1024 / kThreads)
    top_p(const __grid_constant__ TopPParams p) {
  using C = Cluster<kCluster>;
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kMaxGroup * kCluster <= kThreads, "a thread for each head and rank");
  const int G = p.group;  // at most kWarps
  extern __shared__ __align__(16) unsigned char smem_raw[];
  u32* const bins = reinterpret_cast<u32*>(smem_raw);                    // [G, 512]
  u32* const sums = kCluster > 1 ? bins + G * kMassBins : bins;              // [G, 512] over the cluster
  Logit* const stored = reinterpret_cast<Logit*>(sums + G * kMassBins);      // [G, slice_capacity] if kShared
  // Who is kept: a byte a chunk and head. It takes the place of the bins where they have room, for they are done with by then.
  const int keep_pitch = p.slice_capacity / 8;
  unsigned char* const keep = reinterpret_cast<unsigned char*>(
      keep_pitch <= kMassBins * 4 ? sums : reinterpret_cast<u32*>(stored + (kShared ? G * p.slice_capacity : 0)));
  __shared__ float warp_value[kWarps];
  __shared__ int warp_count[kWarps];
  __shared__ float top[kMaxGroup], origin[kMaxGroup], edge[kMaxGroup], limit[kMaxGroup], kept_mass[kMaxGroup];
  __shared__ float mass_sum[kMaxGroup], tail[kMaxGroup], missing[kMaxGroup], unit[kMaxGroup], share_before[kMaxGroup];
  __shared__ int cut_bin[kMaxGroup], refine[kMaxGroup], counts[kMaxGroup];
  __shared__ int total_kept, scan_scratch[kWarps + 1];
  // kExtended: the rank that is looked for (0: none), tokens before the range, the range's start and the width of its bins.
  __shared__ int rank_wanted[kMaxGroup], met[kMaxGroup], before[kMaxGroup];
  __shared__ float base[kMaxGroup], bin_width[kMaxGroup], warp_all[kWarps];

  const int row = blockIdx.y, rank = C::rank();
  const int lane = lane_id(), warp = uniform_warp_id();
  const int length = min(max(p.lengths[row], 0), p.capacity) << p.granularity_shift;
  const int n = p.capacity << p.granularity_shift;
  if (length == 0) {  // the whole cluster leaves
    if (rank == 0 && threadIdx.x == 0) p.kept_lengths[row] = 0;
    if (rank == 0 && threadIdx.x < G) p.per_query_head[row * G + threadIdx.x] = 0, p.mass[row * G + threadIdx.x] = 0.f;
    return;
  }
  // A page's tokens stay in one block, which sums what the page lost.
  const int grain = kExtended && p.tail ? max(8, 1 << p.granularity_shift) : 8;
  const int slice = ceil_div(length, kCluster * grain) * grain, first = rank * slice;
  const int size = max(0, min(slice, length - first)), chunks = ceil_div(size, 8);

  // Warps g, g + G, g + 2G, ... work for head g; a few have no head where G does not divide them.
  const int team = kWarps / G, g = warp % G;
  const int first_chunk = warp < team * G ? warp / G * kWarp + lane : chunks, step = team * kWarp;
  const auto logits_at = [&](int i) {  // not a pointer that lives on: registers are what bounds the blocks a multiprocessor
    return static_cast<const Logit*>(p.logits) + (static_cast<size_t>(row) * G + g) * n + first + i;
  };
  Logit* const own = stored + g * p.slice_capacity;
  const bool aligned = n % 8 == 0;
  const auto load_global = [&](int chunk) {
    Chunk<Logit> v;
    if (aligned && chunk * 8 + 8 <= size) v.load(logits_at(chunk * 8));
    else v.load_some(logits_at(chunk * 8), size - chunk * 8);
    return v;
  };
  const auto load = [&](int chunk) {
    if constexpr (!kShared) return load_global(chunk);
    Chunk<Logit> v;
    v.load(own + chunk * 8);
    return v;
  };
  // The value of every warp, summed over the team of head threadIdx.x.
  const auto team_sum = [&](const auto* values) {
    auto sum = values[threadIdx.x];
    for (int i = 1; i < team; ++i) sum += values[threadIdx.x + i * G];
    return sum;
  };

  // ---- maximum of each query head ----
  for (int i = threadIdx.x; i < G * kMassBins / 4; i += kThreads) reinterpret_cast<uint4*>(bins)[i] = uint4{0, 0, 0, 0};
  {
    float best = -inf();
    if constexpr (kShared) {  // everything under way at once
      for (int chunk = first_chunk; chunk < chunks; chunk += step) {
        if (aligned && chunk * 8 + 8 <= size) {
#pragma unroll
          for (int i = 0; i < 8; i += 16 / sizeof(Logit)) cp_async16(own + chunk * 8 + i, logits_at(chunk * 8 + i));
        } else {
          load_global(chunk).store(own + chunk * 8);
        }
      }
      cp_async_commit();
      cp_async_wait<0>();  // every thread reads back what it copied itself
    }
    for (int chunk = first_chunk; chunk < chunks; chunk += step) best = max_nan(best, load(chunk).max());
#pragma unroll
    for (int distance = kWarp / 2; distance; distance /= 2) best = max_nan(best, __shfl_xor_sync(kFullMask, best, distance));
    if (lane == 0) warp_value[warp] = best;
  }
  __syncthreads();
  if (threadIdx.x < G) {
    float x = warp_value[threadIdx.x];
    for (int i = 1; i < team; ++i) x = max_nan(x, warp_value[threadIdx.x + i * G]);
    top[threadIdx.x] = x;
  }
  C::sync();
  if (threadIdx.x < ceil_div(G * kCluster, kWarp) * kWarp) {  // a thread for each head and rank
    const int head = min(static_cast<int>(threadIdx.x) / kCluster, G - 1);
    float x = C::read(top + head, threadIdx.x % kCluster);
#pragma unroll
    for (int distance = kCluster / 2; distance; distance /= 2) x = max_nan(x, __shfl_xor_sync(kFullMask, x, distance));
    if (threadIdx.x % kCluster == 0 && threadIdx.x < G * kCluster) {
      // NaN and +inf show in the output of their own row if all of it is kept. origin 0, edge inf: every y but that of -inf is below.
      const bool sick = !(x < inf()) || x == -inf(), all = sick || p.p >= 1.f;
      origin[head] = (kExtended ? sick : all) ? 0.f : x * p.bins_per_nat;
      if constexpr (kExtended) rank_wanted[head] = !sick;
      edge[head] = inf();
      limit[head] = all ? -inf() : kMassBins - 1;
      kept_mass[head] = x < inf() && x > -inf() ? 1.f : 0.f;
      cut_bin[head] = all ? -1 : 0;
      refine[head] = 0;
    }
  }
  __syncthreads();
  // y = max - logit in bins, rounded once, hence monotonic: all passes agree on it.
  const float from = origin[g], per_nat = p.bins_per_nat, width = 1.f / per_nat, to_log2 = -kLog2e * width;
  const auto offset = [&](float logit) { return fmaf(-per_nat, logit, from); };
  const float one = static_cast<float>(1 << p.bits);

  if (p.p < 1.f) {
    // ---- Z, and how deep the histogram must go ----
    constexpr bool kBounded = kCluster == 1;
    if constexpr (kBounded) {
      float sum = 0.f;
      if (limit[g] > 0.f) {
        for (int chunk = first_chunk; chunk < chunks; chunk += step) {
          const Chunk<Logit> v = load(chunk);
          float part = 0.f;
#pragma unroll
          for (int i = 0; i < 8; ++i) part += exp2f(offset(v[i]) * to_log2);
          sum += part;
        }
      }
      sum = warp_sum(sum);
      if (lane == 0) warp_value[warp] = sum;
      __syncthreads();
      if (threadIdx.x < G && limit[threadIdx.x] > 0.f) {
        const float z = team_sum(warp_value);
        mass_sum[threadIdx.x] = z * one;
        const float depth = logf(2.f * length / ((1.f - p.p) * z)) * per_nat;
        limit[threadIdx.x] = fminf(limit[threadIdx.x], ceilf(fmaxf(depth, 0.f)) + 1.f);
      }
      __syncthreads();
    }

    // ---- histogram ----
    {
      const float depth = limit[g];
      u32* const mine = bins + g * kMassBins;
      float below = 0.f;
      if (depth > 0.f) {
        for (int chunk = first_chunk; chunk < chunks; chunk += step) {
          const Chunk<Logit> v = load(chunk);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const float y = offset(v[i]);
            if (y < depth) {
              const float floored = __fadd_rd(y, kMagic);
              atomicAdd(mine + low_bits(floored), bin_weight(y - (floored - kMagic), width, one));
            } else if constexpr (!kBounded) {
              below += exp2f(y * to_log2);
            }
          }
        }
      }
      if constexpr (!kBounded) {
        below = warp_sum(below);
        if (lane == 0) warp_value[warp] = below;
        __syncthreads();
        if (threadIdx.x < G) tail[threadIdx.x] = team_sum(warp_value) * one;
      }
    }
    C::sync();
    if constexpr (kCluster > 1) {
      for (int i = threadIdx.x; i < G * kMassBins; i += kThreads) {
        u32 sum = 0;
#pragma unroll
        for (u32 r = 0; r < kCluster; ++r) sum += C::read(bins + i, r);
        sums[i] = sum;
      }
      __syncthreads();
    }
    const float share = p.p * (1.f + 1.25f / one);  // above 1 no bin reaches it, and all is kept
    if (warp < G && cut_bin[warp] >= 0) {
      float z = mass_sum[warp];
      if constexpr (!kBounded) {
        z = lane < kCluster ? C::read(tail + warp, lane) : 0.f;
        const u32* const mine = sums + warp * kMassBins;
#pragma unroll 4
        for (int i = lane; i < kMassBins; i += kWarp) z = fmaf(static_cast<float>(mine[i]), exp2f(to_log2 * i), z);
        z = warp_sum(z);
      }
      const Cut cut = find_cut<kMassBins / kWarp>(sums + warp * kMassBins, to_log2, share * z, one);
      if (lane == 0) {
        if constexpr (kExtended) mass_sum[warp] = z;
        cut_bin[warp] = cut.bin;
        edge[warp] = cut.bin < 0 ? inf() : cut.bin + 1.f;
        kept_mass[warp] = cut.bin < 0 ? 1.f : fminf(cut.mass / z, 1.f);
        refine[warp] = cut.bin >= 0 && cut.coarse;
        // The mass still missing in the cut bin, in units of its own weights, and what one such unit is of the total.
        const float scale = exp2f(to_log2 * max(cut.bin, 0));
        missing[warp] = (share * z - cut.before) / scale;
        unit[warp] = scale / z, share_before[warp] = cut.before / z;
      }
    }
    __syncthreads();

    // ---- the cut bin again, finer ----
    bool any = false;
    for (int head = 0; head < G; ++head) any |= refine[head] != 0;
    if (any) {
      if constexpr (kCluster > 1) C::sync();  // others may still read our bins
      for (int i = threadIdx.x; i < G * kMassBins / 4; i += kThreads) reinterpret_cast<uint4*>(bins)[i] = uint4{0, 0, 0, 0};
      __syncthreads();
      if (refine[g]) {
        const float low = static_cast<float>(cut_bin[g]);
        for (int chunk = first_chunk; chunk < chunks; chunk += step) {
          const Chunk<Logit> v = load(chunk);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const float f = offset(v[i]) - low;
            if (f >= 0.f && f < 1.f) {
              atomicAdd(bins + g * kMassBins + low_bits(__fadd_rd(f * kMassSubBins, kMagic)), bin_weight(f, width, one));
            }
          }
        }
      }
      C::sync();
      if constexpr (kCluster > 1) {
        for (int i = threadIdx.x; i < G * kMassBins; i += kThreads) {
          u32 sum = 0;
#pragma unroll
          for (u32 r = 0; r < kCluster; ++r) sum += C::read(bins + i, r);
          sums[i] = sum;
        }
        __syncthreads();
      }
      if (warp < G && refine[warp]) {
        const Cut cut = find_cut<kMassSubBins / kWarp>(sums + warp * kMassBins, 0.f, missing[warp], one);
        if (lane == 0 && cut.bin >= 0) {
          edge[warp] = cut_bin[warp] + (cut.bin + 1.f) / kMassSubBins;
          kept_mass[warp] = fminf(fmaf(cut.mass, unit[warp], share_before[warp]), 1.f);
        }
      }
      __syncthreads();
    }
  }

  if constexpr (kExtended) {
    // ---- how many p keeps, and whether that is too few or too many ----
    {
      int count = 0;
      const float above = edge[g];
      for (int chunk = first_chunk; chunk < chunks; chunk += step) {
        const Chunk<Logit> v = load(chunk);
#pragma unroll
        for (int i = 0; i < 8; ++i) count += offset(v[i]) < above;
      }
      count = __reduce_add_sync(kFullMask, count);
      if (lane == 0) warp_count[warp] = count;
    }
    __syncthreads();
    if (threadIdx.x < G) met[threadIdx.x] = team_sum(warp_count);
    C::sync();
    if (threadIdx.x < G) {
      int count = 0;
#pragma unroll 2
      for (u32 r = 0; r < kCluster; ++r) count += C::read(met + threadIdx.x, r);
      const bool well = rank_wanted[threadIdx.x] != 0;
      rank_wanted[threadIdx.x] = well && count < p.min_tokens ? p.min_tokens : well && count > p.max_tokens ? p.max_tokens : 0;
      if (count > p.max_tokens) limit[threadIdx.x] = edge[threadIdx.x];  // a ceiling never widens the set
      else limit[threadIdx.x] = inf();
      before[threadIdx.x] = 0, base[threadIdx.x] = 0.f, bin_width[threadIdx.x] = 1.f;
    }
    __syncthreads();

    // ---- the token of that rank ----
#pragma unroll 1
    for (bool first_pass = true;; first_pass = false) {
      bool any = false;
      for (int head = 0; head < G; ++head) any |= rank_wanted[head] != 0;
      if (!any) break;
      if constexpr (kCluster > 1) C::sync();  // others may still read our bins
      for (int i = threadIdx.x; i < G * kMassBins / 4; i += kThreads) reinterpret_cast<uint4*>(bins)[i] = uint4{0, 0, 0, 0};
      __syncthreads();
      if (rank_wanted[g]) {
        const float low = base[g], per_width = 1.f / bin_width[g];  // powers of two: every place below is exact
        for (int chunk = first_chunk; chunk < chunks; chunk += step) {
          const Chunk<Logit> v = load(chunk);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const float place = (offset(v[i]) - low) * per_width;
            if (place >= 0.f && place < kMassBins) atomicAdd(bins + g * kMassBins + low_bits(__fadd_rd(place, kMagic)), 1u);
          }
        }
      }
      C::sync();
      if constexpr (kCluster > 1) {
        for (int i = threadIdx.x; i < G * kMassBins; i += kThreads) {
          u32 sum = 0;
#pragma unroll 2  // all at once take registers that there are not
          for (u32 r = 0; r < kCluster; ++r) sum += C::read(bins + i, r);
          sums[i] = sum;
        }
        __syncthreads();
      }
      if (warp < G && rank_wanted[warp]) {
        const int3 found = find_nth(sums + warp * kMassBins, before[warp], rank_wanted[warp]);
        if (lane == 0) {
          const float w = bin_width[warp], low = base[warp] + max(found.x, 0) * w;
          const bool fine = w <= fmaxf(per_nat / 16384.f, low * 1.1920929e-7f);  // a 16384th of a nat, or what y resolves
          if (found.x < 0 && first_pass) {  // further down: up to 2^23 bins, beyond which everything is kept
            before[warp] = found.z, base[warp] = kMassBins, bin_width[warp] = 16384.f;
          } else if (found.x < 0 || found.z == rank_wanted[warp] || fine) {
            edge[warp] = found.x < 0 ? inf() : fminf(__fadd_ru(base[warp], (found.x + 1) * w), limit[warp]);
            rank_wanted[warp] = 0;
          } else {
            before[warp] = found.y, base[warp] = low, bin_width[warp] = w / kMassBins;
          }
        }
      }
      __syncthreads();
    }
  }

  // ---- who is kept ----
  {
    int count = 0;
    [[maybe_unused]] float sum = 0.f, all = 0.f;
    const float above = edge[g];
    for (int chunk = first_chunk; chunk < chunks; chunk += step) {
      const Chunk<Logit> v = load(chunk);
      u32 mine = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) mine |= (offset(v[i]) >= above ? 0u : 1u) << i;  // NaN is kept
      if constexpr (kExtended) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (!(mine >> i & 1) && p.p < 1.f) continue;
          const float weight = exp2f(offset(v[i]) * to_log2);
          if (mine >> i & 1) sum += weight;
          all += weight;
        }
      }
      count += __popc(mine);
      keep[g * keep_pitch + chunk] = static_cast<unsigned char>(mine);
    }
    count = __reduce_add_sync(kFullMask, count);
    if (lane == 0) warp_count[warp] = count;
    if constexpr (kExtended) {
      sum = warp_sum(sum), all = warp_sum(all);
      if (lane == 0) warp_value[warp] = sum, warp_all[warp] = all;
    }
  }
  __syncthreads();
  if (threadIdx.x < G) counts[threadIdx.x] = team_sum(warp_count);
  if constexpr (kExtended) {
    if (threadIdx.x < G) tail[threadIdx.x] = team_sum(warp_value), missing[threadIdx.x] = team_sum(warp_all);
  }

  // ---- the union, in order: a run of chunks a thread ----
  const int run = ceil_div(chunks, kThreads);
  const int run_begin = min(static_cast<int>(threadIdx.x) * run, chunks);
  int run_end = min(run_begin + run, chunks);
  int kept_here = 0;
  for (int chunk = run_begin; chunk < run_end; ++chunk) {
    u32 any = 0;
    for (int head = 0; head < G; ++head) any |= keep[head * keep_pitch + chunk];
    keep[chunk] = static_cast<unsigned char>(any);  // of the first head: nobody else reads it
    kept_here += __popc(any);
  }
  if (!kept_here) run_end = run_begin;
  int total;
  int at = block_exclusive_scan<kThreads>(kept_here, scan_scratch, total);

  // ---- what every page has lost to the union: a page a lane ----
  if constexpr (kExtended) {
    if (p.tail) {
      const int per_page = (1 << p.granularity_shift) / 8, pages = ceil_div(chunks, per_page);
      float* const out = p.tail + (static_cast<size_t>(row) * G + g) * p.capacity + (first >> p.granularity_shift);
#pragma unroll 1
      for (int page = first_chunk; page < pages; page += step) {
        float sum = 0.f;
#pragma unroll 1
        for (int chunk = page * per_page; chunk < min((page + 1) * per_page, chunks); ++chunk) {
          const u32 kept = keep[chunk];
          const Chunk<Logit> v = load(chunk);
#pragma unroll
          for (int i = 0; i < 8; ++i) sum += kept >> i & 1 ? 0.f : exp2f(offset(v[i]) * to_log2);
        }
        out[page] = sum > 0.f ? fmaf(from, width, logf(sum)) : -inf();
      }
    }
  }

  if (kCluster > 1 && threadIdx.x == 0) total_kept = total;
  int kept_before = 0, kept_row = total;
  if constexpr (kCluster > 1) {
    C::sync();
    int of_rank = C::read(&total_kept, lane % kCluster);
    kept_row = warp_sum<kCluster>(of_rank);
    kept_before = warp_sum<kCluster>(lane % kCluster < rank ? of_rank : 0);
  }
  if (rank == 0) {
    if (threadIdx.x < G) {
      int count = 0;
#pragma unroll
      for (u32 r = 0; r < kCluster; ++r) count += C::read(counts + threadIdx.x, r);
      p.per_query_head[row * G + threadIdx.x] = count;
      float mass = kept_mass[threadIdx.x];
      if (kExtended && mass > 0.f) {
        float sum = 0.f, all = 0.f;
#pragma unroll 2
        for (u32 r = 0; r < kCluster; ++r) sum += C::read(tail + threadIdx.x, r), all += C::read(missing + threadIdx.x, r);
        mass = fminf(sum / (p.p < 1.f ? mass_sum[threadIdx.x] / one : all), 1.f);
      }
      p.mass[row * G + threadIdx.x] = mass;
    }
    if (threadIdx.x == 0) p.kept_lengths[row] = kept_row;
  }
  const int* const indices = p.indices + static_cast<size_t>(row) * p.capacity;
  int* const kept = p.kept + static_cast<size_t>(row) * n;
  at += kept_before;
  for (int chunk = run_begin; chunk < run_end; ++chunk) {
    for (u32 mine = keep[chunk]; mine; mine &= mine - 1) {
      const int candidate = first + chunk * 8 + __ffs(mine) - 1, entry = candidate >> p.granularity_shift;
      kept[at] = (indices[entry] << p.granularity_shift) + (candidate & ((1 << p.granularity_shift) - 1));
      if (p.kept_log_weight) {
#pragma unroll 1
        for (int head = 0; head < G; ++head) {
          const size_t of = static_cast<size_t>(row) * G + head;
          p.kept_log_weight[of * n + at] = p.log_weight[of * p.capacity + entry];
        }
      }
      ++at;
    }
  }
  if constexpr (kCluster > 1) C::sync();  // a block that leaves takes its shared memory along
}
