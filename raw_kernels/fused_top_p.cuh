// Top-p over logits that lie spread over the shared memory of a cluster: top_p.cu's rule, inside fused_decode.cu.
//
// Maximum and Z of every head come from the pass that made the logits. Every block makes a histogram of its slice, below its own maximum: bins lie on one grid and weigh
// relative to their own edges, so those of another block fit after a shift. Block g % size owns head g, gets everybody's bins by atomic adds of integers (whose order
// does not matter), finds the cut and tells it to all; once more where a bin is cut finer.
#pragma once

#include "fused_select.cuh"
#include "threshold.cuh"

template <int kMaxHeads>
struct TopPScratch {
  int shift[kMaxHeads];                       // from this block's bins to the cluster's
  float z[kMaxHeads];
  // In the owner: the mass still missing in the cut bin in units of its own weights, what one such unit is of the total, and the mass before.
  float missing[kMaxHeads], unit[kMaxHeads], share_before[kMaxHeads];
  // What the owner tells.
  u32 least[kMaxHeads];  // the smallest half that is kept, its bits
  u32 mass[kMaxHeads];   // float
  u32 refine[kMaxHeads];  // the cut bin + 1, or 0
  u32 counts[kMaxHeads];  // tokens kept; in block 0
  // Of the row: the origin of the cluster's bins, maximum and sum of exponentials below it, and whether these are numbers.
  float top[kMaxHeads], peak[kMaxHeads], total[kMaxHeads];
  int well[kMaxHeads];
  // Of bound_counts. In the owner: tokens that p keeps, and those before the range. What it tells: the rank that is looked for (0: none), at first and still; range and bins, in bins.
  u32 tally[kMaxHeads];
  int before[kMaxHeads], moved[kMaxHeads], wanted[kMaxHeads];
  float base[kMaxHeads], bin_width[kMaxHeads];
};

// 1 / x of a power of two: a division would be 20 instructions and a call.
__device__ __forceinline__ float inverse_power(float x) { return __int_as_float(0x7f000000 - __float_as_int(x)); }

__device__ __forceinline__ float half_bits_to_float(u32 bits) { return __half2float(__ushort_as_half(static_cast<u16>(bits))); }

// The smallest half x with origin - per_nat * x < edge, width = 1 / per_nat a power of two: bins are monotonic in the logit, so a comparison of halves says who is kept. By a
// warp, a lane for each of 32 neighbours of where it should be: rounding moves it by two or three.
__device__ __forceinline__ u32 least_half(float origin, float per_nat, float width, float edge) {
  const int bits = __half_as_ushort(__float2half_ru(fmaxf((origin - edge) * width, -65504.f)));
  const int nearby = (bits & 0x8000 ? -(bits & 0x7fff) : bits) + lane_id() - kWarp / 2;  // halves of one sign lie in the order of their bits
  const int own = min(max(nearby, -0x7bff), 0x7c00);                                     // finite, or +inf
  const u32 half_bits = own < 0 ? 0x8000 - own : own;
  const u32 kept = __ballot_sync(kFullMask, fmaf(-per_nat, half_bits_to_float(half_bits), origin) < edge);
  return __shfl_sync(kFullMask, half_bits, kept ? __ffs(kept) - 1 : kWarp - 1);
}

// Add to one of `count` words from a shared address on, if there is one of that number.
__device__ __forceinline__ void add_below(u32 number, u32 count, u32 at, u32 x) {
  asm volatile("{\n.reg .pred p;\nsetp.lt.u32 p, %0, %1;\n@p red.shared.add.u32 [%2], %3;\n}" ::"r"(number), "r"(count), "r"(at + number * 4), "r"(x) : "memory");
}

// round(one * exp(-f * width)) of a place f in a bin, as `bin_weight`, with the constants folded.
struct BinWeight {
  float c0, c1, c2, c3;
  __device__ __forceinline__ BinWeight(float width, float one) : c0(one + kMagic), c1(-one * width), c2(0.5f * one * width * width), c3(-one / 6.f * width * width * width) {}
  __device__ __forceinline__ u32 operator()(float f) const { return static_cast<u32>(low_bits(fmaf(fmaf(fmaf(c3, f, c2), f, c1), f, c0))); }
};

// Fills s.least and s.mass. `logits` [group, pitch], `size` a multiple of 16 of them count; `parts` are maxima and sums of this block's warps [warps][kMaxHeads], `all_parts` has room for those of
// every block. `bins` and `sums` have [group, kMassBins] zeros, and are one where the cluster is one block. `length` candidates a row. A warp works for head warp % group.
template <int kThreads, int kMaxHeads>
__device__ __forceinline__ void find_threshold(const AnyCluster& cluster, TopPScratch<kMaxHeads>& s, const half* logits, int pitch, int size, int length, int group, float p,
                                               float per_nat, int bits, const float2* parts, float2* all_parts, u32* bins, u32* sums, Mail& mail) {
  constexpr int kWarps = kThreads / kWarp;
  const int lane = lane_id(), warp = uniform_warp_id(), team = kWarps / group, nth = warp / group, g = warp - nth * group;
  const int chunks = size / 8, first_chunk = nth < team ? nth * kWarp + lane : chunks, step = team * kWarp;
  const float width = inverse_power(per_nat), to_log2 = -kLog2e * width, one = static_cast<float>(1 << bits);

  // ---- where this block's histogram begins ----
  const float2 here = join_parts<kMaxHeads>(parts, kWarps);  // of head lane % kMaxHeads
  const float begin = ceilf(here.x * per_nat);
  const bool some = here.x > kLowest && here.y < inf();
  // Below ln(n / ((1 - p) Z)) nats everything together weighs less than (1 - p) Z and is not needed; with this block's Z, if anything, deeper. 2 % and
  // a bin are for rounding.
  const float deep = ceilf(fmaxf(__logf(__fdividef(1.02f * length, (1.f - p) * here.y)) * per_nat, 0.f)) + 2.f;
  const float limit = some && p < 1.f ? fminf(deep, kMassBins - 1) : -inf();
  if (!cluster.alone() && lane < group) {
#pragma unroll 1
    for (int r = warp; r < cluster.size; r += kWarps) cluster.send(all_parts + cluster.rank * kMaxHeads + lane, r, here, &mail.logits);
  }

  // Twice at most: all bins, then the bin that holds the cut, divided finer.
  const int owned = warp < group && cluster.owner(warp) == cluster.rank ? warp : -1;  // the head that this warp cuts
  float top = 0.f, from = __shfl_sync(kFullMask, begin, g), depth = __shfl_sync(kFullMask, limit, g);
#pragma unroll 1
  for (int pass = 0;; ++pass) {
    // ---- histogram ----
    if (depth > 0.f) {
      const float finer = pass ? kMassSubBins : 1.f, rate = per_nat * finer, origin = from * finer;
      const u32 at = smem_address(bins + g * kMassBins), count = static_cast<u32>(depth * finer);
      const BinWeight weight(width * inverse_power(finer), one);  // each bin below its own edge
      const half least = __float2half_rd((from - depth) * width);
#pragma unroll 1
      for (int chunk = first_chunk; chunk < chunks; chunk += step) {
        Chunk<half> v;
        v.load(logits + g * pitch + chunk * 8);
        if (!__hge(v.largest(), least)) continue;
        // All eight at once and without a branch: chains of some 20 instructions that would wait for one another otherwise. What lies above the bin that
        // is divided has been counted, and is a number below 0.
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float y = fmaf(-rate, v[i], origin), floored = __fadd_rd(y, kMagic);
          add_below(low_bits(floored), count, at, weight(y - (floored - kMagic)));
        }
      }
    }
    if (pass == 0) {
      if (!cluster.alone()) cluster.await(&mail.logits);
      const float2 row = cluster.alone() ? here : join_parts<kMaxHeads>(all_parts, cluster.size);
      top = ceilf(row.x * per_nat);
      if (warp == 0 && lane < group) {
        s.shift[lane] = some ? static_cast<int>(fminf(top - begin, 1e6f)) : kMassBins;
        // Z in units of the first bin's edge; 0 where all is kept: NaN and +inf show in the output of their own row then.
        s.z[lane] = p < 1.f && row.x > kLowest && row.y < inf() ? row.y * one * fast_exp2((row.x * per_nat - top) * -to_log2) : 0.f;
        s.top[lane] = top, s.peak[lane] = row.x, s.total[lane] = row.y, s.well[lane] = row.x > kLowest && row.y < inf();
        s.least[lane] = 0xfbff, s.refine[lane] = 0, s.mass[lane] = __float_as_uint(row.y < inf() && row.y > 0.f ? 1.f : 0.f);
      }
    }
    __syncthreads();

    // ---- everybody's bins to the owners ----
    if (!cluster.alone()) {
      u64* const box = pass ? &mail.finer : &mail.bins;
#pragma unroll 1
      for (int i = fresh_thread() * 4; i < group * kMassBins; i += kThreads * 4) {  // a warp has one head
        const uint4 four = *reinterpret_cast<const uint4*>(bins + i);
        const int head = i / kMassBins, bin = i % kMassBins + (pass ? 0 : s.shift[head]), to = cluster.owner(head);
        const u32 weights[4] = {four.x, four.y, four.z, four.w};
        u32 spared = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (weights[j] && bin + j < kMassBins) cluster.send_add(sums + head * kMassBins + bin + j, to, weights[j], box);
          else spared += 4;
        }
        spared = __reduce_add_sync(kFullMask, spared);
        if (lane == 0) cluster.spare(to, spared, box);
      }
      if (owned >= 0) cluster.await(box);
    }
    const float own_top = __shfl_sync(kFullMask, top, warp % kMaxHeads);
    u32 least = 0, kept = 0, refine = 0;
    if (owned >= 0) least = s.least[owned], kept = s.mass[owned];  // as long as there is no cut
    const bool looked_for = owned >= 0 && s.z[owned] > 0.f && (pass == 0 || s.refine[owned]);
    if (looked_for) {
      u32* const mine = sums + owned * kMassBins;
      const float z = s.z[owned], share = p * (1.f + 1.25f * inverse_power(one)) * z;  // above z no bin reaches it, and all is kept
      const Cut cut = find_cut<kMassBins / kWarp>(mine, pass ? to_log2 * (1.f / kMassSubBins) : to_log2, pass ? s.missing[owned] : share, one);
      float edge, mass;
      if (pass == 0) {
        const float scale = exp2f(to_log2 * cut.bin);
        if (lane == 0) s.missing[owned] = __fdividef(share - cut.before, scale), s.unit[owned] = __fdividef(scale, z), s.share_before[owned] = __fdividef(cut.before, z);
        edge = cut.bin + 1.f, mass = __fdividef(cut.mass, z), refine = cut.coarse ? cut.bin + 1 : 0;
      } else {
        refine = s.refine[owned];
        edge = refine - 1.f + (cut.bin + 1.f) / kMassSubBins, mass = fmaf(cut.mass, s.unit[owned], s.share_before[owned]);
      }
      if (cut.bin >= 0) least = least_half(own_top, per_nat, width, edge), kept = __float_as_uint(fminf(mass, 1.f));
      else refine = 0;
      __syncwarp();  // every lane has read its bins
#pragma unroll 1
      for (int i = lane; i < kMassBins / 4; i += kWarp) reinterpret_cast<uint4*>(mine)[i] = uint4{0, 0, 0, 0};
    }
    __syncwarp();  // and what one of them now overwrites
    if (pass == 1) {
      if (looked_for && lane < cluster.size) {
        AnyCluster::store(AnyCluster::address(s.least + owned, lane), least);
        AnyCluster::store(AnyCluster::address(s.mass + owned, lane), kept);
      }
      cluster.sync();
      return;
    }
    if (owned >= 0 && lane < cluster.size) {
      cluster.send(s.least + owned, lane, least, &mail.cuts);
      cluster.send(s.mass + owned, lane, kept, &mail.cuts);
      cluster.send(s.refine + owned, lane, refine, &mail.cuts);
    }
    cluster.await(&mail.cuts);
    const u32 coarse = lane < group ? s.refine[lane] : 0;
    if (!__any_sync(kFullMask, coarse != 0)) return;
    if (!cluster.alone()) {  // alone, the owner has emptied them
#pragma unroll 1
      for (int i = fresh_thread(); i < group * kMassBins / 4; i += kThreads) reinterpret_cast<uint4*>(bins)[i] = uint4{0, 0, 0, 0};
      cluster.sync();  // and the owners theirs
    }
    from += s.shift[g] - (s.refine[g] - 1.f), depth = s.refine[g] ? 1.f : 0.f;
  }
}

// Chunks of 8 candidates that a thread takes.
struct Chunks {
  int first, end, stride;
};

// The union of who is kept, a byte a chunk of 8 candidates in `keep`, and s.counts of this block added up in block 0. Returns the kept in chunks of the threads before this one inside the block; `total`
// gets all of them. In order (`runs`) a thread has neighbours; else a warp has, which spares it conflicts of banks.
template <int kThreads, int kMaxHeads, int kHeads>
__device__ __forceinline__ int mark_kept(const AnyCluster& cluster, TopPScratch<kMaxHeads>& s, const half* logits, int pitch, int size, int group, unsigned char* keep,
                                         int* scan, bool runs, Chunks& own, int& total, Mail& mail) {
  const int chunks = size / 8, run = ceil_div(chunks, kThreads);
  own.stride = runs ? 1 : kWarp;
  own.first = runs ? static_cast<int>(threadIdx.x) * run : uniform_warp_id() * kWarp * run + lane_id();
  own.end = min(own.first + run * own.stride, chunks);
  int kept_here = 0, counts[kHeads] = {};
#pragma unroll 2
  for (int chunk = own.first; chunk < own.end; chunk += own.stride) {
    u32 any = 0;
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      if (g >= group) break;
      const uint4 words = load16(logits + g * pitch + chunk * 8);
      const half2 least = __half2half2(__ushort_as_half(static_cast<u16>(s.least[g])));
      const auto bits = [&](u32 w) { return __hgeu2_mask(*reinterpret_cast<const half2*>(&w), least); };  // unordered: NaN is kept
      const u32 kept = (bits(words.x) & 0x00010001u) | (bits(words.y) & 0x00040004u) | (bits(words.z) & 0x00100010u) | (bits(words.w) & 0x00400040u);
      counts[g] += __popc(kept);
      any |= kept;
    }
    any = (any | any >> 15) & 0xff;  // the upper halves are the odd candidates
    keep[chunk] = static_cast<unsigned char>(any);
    kept_here += __popc(any);
  }
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
    if (g >= group) break;
    const int sum = __reduce_add_sync(kFullMask, counts[g]);
    if (lane_id() == 0) cluster.send_add(s.counts + g, 0, static_cast<u32>(sum), &mail.results);
  }
  return scan_block<kThreads>(kept_here, scan, total);
}
