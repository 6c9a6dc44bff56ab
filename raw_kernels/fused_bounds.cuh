// A floor and a ceiling on the tokens that a query head keeps: top_p.cu's rule, inside fused_decode.cu.
//
// Where top-p keeps fewer than the floor or more than the ceiling, the cut moves to the token of that rank: a histogram of counts on the grid of find_threshold, 512 bins of 1/32 nat from the
// row's maximum down, then 512 in the bin that holds it. A row of 8192 candidates takes 2 us a pass, and only heads whose count is out of bounds take part.
#pragma once

#include "fused_top_p.cuh"

// Moves s.least and s.mass. `sums` are zeros, `bins` may be anything where the two are not the same; `warp_parts` [warps][kMaxHeads] and `all_parts` [blocks][kMaxHeads] are free.
template <int kThreads, int kMaxHeads>
__device__ __forceinline__ void bound_counts(const AnyCluster& cluster, TopPScratch<kMaxHeads>& s, const half* logits, int pitch, int size, int group, int least_tokens,
                                             int most_tokens, float per_nat, u32* bins, u32* sums, float2* warp_parts, float2* all_parts, Mail& mail) {
  constexpr int kWarps = kThreads / kWarp;
  const int lane = lane_id(), warp = uniform_warp_id(), team = kWarps / group, nth = warp / group, g = warp - nth * group;
  const int chunks = size / 8, first_chunk = nth < team ? nth * kWarp + lane : chunks, step = team * kWarp;
  const int owned = warp < group && cluster.owner(warp) == cluster.rank ? warp : -1;
  const half* const own = logits + g * pitch;
  // To every block, from the owner of a head.
  const auto tell = [&](auto& array, auto value) {
    static_assert(sizeof(value) == 4, "words only");
    if (lane < cluster.size) AnyCluster::store(AnyCluster::address(array + owned, lane), *reinterpret_cast<const u32*>(&value));
  };

  if (!cluster.alone()) {
#pragma unroll 1
    for (int i = fresh_thread(); i < group * kMassBins / 4; i += kThreads) reinterpret_cast<uint4*>(bins)[i] = uint4{0, 0, 0, 0};
  }
  // ---- how many p keeps ----
  {
    const half2 least = __half2half2(__ushort_as_half(static_cast<u16>(s.least[g])));
    const auto kept = [&](u32 w) { return __popc(__hge2_mask(*reinterpret_cast<const half2*>(&w), least)); };  // 16 for each
    int count = 0;
#pragma unroll 1
    for (int chunk = first_chunk; chunk < chunks; chunk += step) {
      const uint4 words = load16(own + chunk * 8);
      count += kept(words.x) + kept(words.y) + kept(words.z) + kept(words.w);
    }
    count = __reduce_add_sync(kFullMask, count) / 16;
    if (lane == 0 && nth < team) cluster.send_add(s.tally + g, cluster.owner(g), static_cast<u32>(count), &mail.tally);
  }
  cluster.await(&mail.tally);
  if (owned >= 0) {
    const int count = static_cast<int>(s.tally[owned]);
    // A head with a NaN or +inf keeps all.
    const int rank = !s.well[owned] ? 0 : count < least_tokens ? least_tokens : count > most_tokens ? most_tokens : 0;
    if (lane == 0) s.before[owned] = 0;
    tell(s.wanted, rank), tell(s.moved, rank), tell(s.base, 0.f), tell(s.bin_width, 1.f);
  }
  cluster.sync();
  if (!__any_sync(kFullMask, lane < group && s.moved[lane] != 0)) return;

  // ---- the token of that rank ----
#pragma unroll 1
  for (bool first = true; __any_sync(kFullMask, lane < group && s.wanted[lane] != 0); first = false) {
    if (s.wanted[g] != 0) {
      const float from = s.top[g] - s.base[g], per_width = inverse_power(s.bin_width[g]);
      const u32 at = smem_address(bins + g * kMassBins);
#pragma unroll 1
      for (int chunk = first_chunk; chunk < chunks; chunk += step) {
        Chunk<half> v;
        v.load(own + chunk * 8);
        if (fmaf(-per_nat, v.max(), from) * per_width >= kMassBins) continue;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float place = fmaf(-per_nat, v[i], from) * per_width;
          add_below(low_bits(__fadd_rd(place, kMagic)), kMassBins, at, 1);
        }
      }
    }
    if (!cluster.alone()) {
      __syncthreads();
#pragma unroll 1
      for (int i = threadIdx.x; i < group * kMassBins; i += kThreads) {
        if (const u32 count = bins[i]) AnyCluster::add(AnyCluster::address(sums + i, cluster.owner(i / kMassBins)), count), bins[i] = 0;
      }
    }
    cluster.sync();
    if (owned >= 0 && s.wanted[owned] != 0) {
      u32* const mine = sums + owned * kMassBins;
      const int rank = s.wanted[owned];
      const float width = s.bin_width[owned], base = s.base[owned];
      const int3 found = find_nth(mine, s.before[owned], rank);
      const float low = base + max(found.x, 0) * width;
      const bool fine = width <= fmaxf(per_nat / 16384.f, low * 1.1920929e-7f);  // a 16384th of a nat, or what a place resolves
      const u32 before = s.least[owned];
      __syncwarp();  // every lane has read what one of them now overwrites
      if (found.x < 0 && first) {  // further down: 2^23 bins, more than halves have nats for
        if (lane == 0) s.before[owned] = found.z;
        tell(s.base, static_cast<float>(kMassBins)), tell(s.bin_width, 16384.f);
      } else if (found.x < 0 || found.z == rank || fine) {
        const u32 least = least_half(s.top[owned], per_nat, inverse_power(per_nat), __fadd_ru(base, (found.x < 0 ? kMassBins : found.x + 1) * width));
        // A ceiling never widens what p keeps, and a floor never narrows it.
        const bool higher = half_bits_to_float(least) > half_bits_to_float(before);
        tell(s.least, higher == (static_cast<int>(s.tally[owned]) > most_tokens) ? least : before), tell(s.wanted, 0);
      } else {
        if (lane == 0) s.before[owned] = found.y;
        tell(s.base, low), tell(s.bin_width, width / kMassBins);
      }
#pragma unroll 1
      for (int i = lane; i < kMassBins; i += kWarp) mine[i] = 0;
    }
    cluster.sync();
  }

  // ---- the mass that is kept now ----
  float sum = 0.f;
  if (s.moved[g] != 0) {
    const float least = half_bits_to_float(s.least[g]), peak = s.peak[g];
#pragma unroll 1
    for (int chunk = first_chunk; chunk < chunks; chunk += step) {
      Chunk<half> v;
      v.load(own + chunk * 8);
      if (v.max() < least) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += v[i] >= least ? fast_exp2((v[i] - peak) * kLog2e) : 0.f;
    }
  }
  sum = warp_sum(sum);
  if (lane == 0) warp_parts[warp].x = sum;
  __syncthreads();
  if (warp == 0 && lane < group) {
    float all = 0.f;
#pragma unroll 1
    for (int i = 0; i < team; ++i) all += warp_parts[i * group + lane].x;
    cluster.send(all_parts + cluster.rank * kMaxHeads + lane, 0, make_float2(all, 0.f), &mail.mass);
  }
  if (cluster.rank != 0) return;
  cluster.await(&mail.mass);
  if (warp == 0 && lane < group && s.moved[lane] != 0) {
    float all = 0.f;
#pragma unroll 1
    for (int r = 0; r < cluster.size; ++r) all += all_parts[r * kMaxHeads + lane].x;
    s.mass[lane] = __float_as_uint(fminf(all / s.total[lane], 1.f));
  }
}
