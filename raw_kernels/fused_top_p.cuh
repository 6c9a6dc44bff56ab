// Top-p over logits that lie spread over the shared memory of a cluster: top_p.cu's rule, inside fused_decode.cu.
//
// Every block makes a histogram of its slice; block g % size owns head g, gets everybody's bins by atomic adds of integers (whose order does not
// matter), finds the cut and tells it to all. Three barriers of the cluster, five where a bin is cut finer.
#pragma once

#include "cluster.cuh"
#include "threshold.cuh"

template <int kMaxHeads, int kMaxBlocks>
struct TopPScratch {
  float top[kMaxHeads];  // of this block, read by the others
  float warp_value[kMaxHeads], origin[kMaxHeads], limit[kMaxHeads], mass_sum[kMaxHeads];
  float tail[kMaxHeads][kMaxBlocks];  // in the owner: what each block found below the last bin
  float missing[kMaxHeads], unit[kMaxHeads], share_before[kMaxHeads];
  // told by the owner
  float edge[kMaxHeads], kept_mass[kMaxHeads];
  int cut_bin[kMaxHeads], refine[kMaxHeads];
  int warp_count[kMaxHeads], counts[kMaxBlocks][kMaxHeads], totals[kMaxBlocks];
};

// Fills scratch.edge: candidate i of head g is kept if not origin[g] - per_nat * logit >= edge[g]. `logits` [group, pitch], `size` a multiple of 8 of them count; s.top is
// set and not yet synchronised. `bins` and `sums` have [group, kMassBins] words, and are one where the cluster is one block. A warp works for head warp % group.
template <int kThreads, int kMaxHeads, int kMaxBlocks>
__device__ __forceinline__ void find_edges(const AnyCluster& cluster, TopPScratch<kMaxHeads, kMaxBlocks>& s, const half* logits, int pitch, int size, int length,
                                           int group, float p, float per_nat, int bits, u32* bins, u32* sums) {
  const int lane = lane_id(), warp = warp_id(), team = kThreads / kWarp / group, g = warp % group;
  const int chunks = size / 8, first_chunk = warp < team * group ? warp / group * kWarp + lane : chunks, step = team * kWarp;
  const half* const own = logits + g * pitch;
  const auto load = [&](int chunk) {
    Chunk<half> v;
    v.load(own + chunk * 8);
    return v;
  };
  const auto team_sum = [&] {  // of the value of every warp, for head threadIdx.x
    float sum = s.warp_value[threadIdx.x];
    for (int i = 1; i < team; ++i) sum += s.warp_value[threadIdx.x + i * group];
    return sum;
  };
  const bool alone = cluster.size == 1;
  for (int i = threadIdx.x; i < group * kMassBins / 4; i += kThreads) {
    reinterpret_cast<uint4*>(bins)[i] = uint4{0, 0, 0, 0};
    if (!alone) reinterpret_cast<uint4*>(sums)[i] = uint4{0, 0, 0, 0};
  }
  cluster.sync();

  // ---- maximum of each query head ----
  for (int h = warp; h < group; h += kThreads / kWarp) {
    float x = lane < cluster.size ? AnyCluster::read(AnyCluster::address(s.top + h, lane)) : -inf();
#pragma unroll
    for (int distance = kWarp / 2; distance; distance /= 2) x = max_nan(x, __shfl_xor_sync(kFullMask, x, distance));
    if (lane == 0) {
      // NaN and +inf show in the output of their own row if all of it is kept. origin 0, edge inf: every y but that of -inf is below.
      const bool all = !(x < inf()) || x == -inf() || p >= 1.f;
      s.origin[h] = all ? 0.f : x * per_nat;
      s.edge[h] = inf();
      s.limit[h] = all ? -inf() : kMassBins - 1;
      s.kept_mass[h] = x < inf() && x > -inf() ? 1.f : 0.f;
      s.cut_bin[h] = all ? -1 : 0;
      s.refine[h] = 0;
    }
  }
  __syncthreads();
  if (p >= 1.f) return;
  // y = max - logit in bins, rounded once, hence monotonic: all passes agree on it.
  const float from = s.origin[g], width = 1.f / per_nat, to_log2 = -kLog2e * width;
  const auto offset = [&](float logit) { return fmaf(-per_nat, logit, from); };
  const float one = static_cast<float>(1 << bits);

  // ---- Z, and how deep the histogram must go: a block that has the whole row sums first, see top_p.cu ----
  if (alone) {
    float sum = 0.f;
    if (s.limit[g] > 0.f) {
      for (int chunk = first_chunk; chunk < chunks; chunk += step) {
        const Chunk<half> v = load(chunk);
        float part = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) part += exp2f(offset(v[i]) * to_log2);
        sum += part;
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) s.warp_value[warp] = sum;
    __syncthreads();
    if (threadIdx.x < group && s.limit[threadIdx.x] > 0.f) {
      const float z = team_sum();
      s.mass_sum[threadIdx.x] = z * one;
      const float depth = logf(2.f * length / ((1.f - p) * z)) * per_nat;
      s.limit[threadIdx.x] = fminf(s.limit[threadIdx.x], ceilf(fmaxf(depth, 0.f)) + 1.f);
    }
    __syncthreads();
  }

  // ---- histogram ----
  {
    const float depth = s.limit[g];
    u32* const mine = bins + g * kMassBins;
    float below = 0.f;
    if (depth > 0.f) {
      for (int chunk = first_chunk; chunk < chunks; chunk += step) {
        const Chunk<half> v = load(chunk);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float y = offset(v[i]);
          if (y < depth) {
            const float floored = __fadd_rd(y, kMagic);
            atomicAdd(mine + low_bits(floored), bin_weight(y - (floored - kMagic), width, one));
          } else if (!alone) {
            below += exp2f(y * to_log2);
          }
        }
      }
    }
    if (!alone) {
      below = warp_sum(below);
      if (lane == 0) s.warp_value[warp] = below;
    }
  }
  const auto gather = [&](int count) {  // everybody's bins to the owners
    if (alone) return __syncthreads();
    __syncthreads();
    for (int i = threadIdx.x; i < group * kMassBins; i += kThreads) {
      const u32 weight = i % kMassBins < count ? bins[i] : 0;
      if (weight) AnyCluster::add(AnyCluster::address(sums + i, i / kMassBins % cluster.size), weight);
    }
    if (count == kMassBins && threadIdx.x < group) {
      AnyCluster::store(AnyCluster::address(&s.tail[threadIdx.x][cluster.rank], threadIdx.x % cluster.size), team_sum() * one);
    }
    cluster.sync();
  };
  gather(kMassBins);
  const float share = fminf(p * (1.f + 1.25f / one), 1.f);
  const bool owner = warp < group && warp % cluster.size == cluster.rank;
  const auto tell = [&](float edge, float mass, int refine, int bin) {
    if (lane >= cluster.size) return;
    AnyCluster::store(AnyCluster::address(s.edge + warp, lane), edge);
    AnyCluster::store(AnyCluster::address(s.kept_mass + warp, lane), mass);
    AnyCluster::store(AnyCluster::address(s.refine + warp, lane), static_cast<u32>(refine));
    AnyCluster::store(AnyCluster::address(s.cut_bin + warp, lane), static_cast<u32>(bin));
  };
  if (owner && s.cut_bin[warp] >= 0) {
    u32* const mine = sums + warp * kMassBins;
    float z = s.mass_sum[warp];
    if (!alone) {
      z = lane < cluster.size ? s.tail[warp][lane] : 0.f;
#pragma unroll 4
      for (int i = lane; i < kMassBins; i += kWarp) z = fmaf(static_cast<float>(mine[i]), exp2f(to_log2 * i), z);
      z = warp_sum(z);
    }
    const Cut cut = find_cut<kMassBins / kWarp>(mine, to_log2, share * z, one);
    // The mass still missing in the cut bin, in units of its own weights, and what one such unit is of the total.
    const float scale = exp2f(to_log2 * max(cut.bin, 0));
    if (lane == 0) s.missing[warp] = (share * z - cut.before) / scale, s.unit[warp] = scale / z, s.share_before[warp] = cut.before / z;
    __syncwarp();
    tell(cut.bin < 0 ? inf() : cut.bin + 1.f, cut.bin < 0 ? 1.f : fminf(cut.mass / z, 1.f), cut.bin >= 0 && cut.coarse, cut.bin);
    for (int i = lane; i < kMassBins; i += kWarp) mine[i] = 0;
  }
  cluster.sync();

  // ---- the cut bin again, finer ----
  bool any = false;
  for (int h = 0; h < group; ++h) any |= s.refine[h] != 0;
  if (!any) return;
  if (!alone) {  // alone, the owners have emptied them
    for (int i = threadIdx.x; i < group * kMassBins / 4; i += kThreads) reinterpret_cast<uint4*>(bins)[i] = uint4{0, 0, 0, 0};
    __syncthreads();
  }
  if (s.refine[g]) {
    const float low = static_cast<float>(s.cut_bin[g]);
    for (int chunk = first_chunk; chunk < chunks; chunk += step) {
      const Chunk<half> v = load(chunk);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float f = offset(v[i]) - low;
        if (f >= 0.f && f < 1.f) atomicAdd(bins + g * kMassBins + low_bits(__fadd_rd(f * kMassSubBins, kMagic)), bin_weight(f, width, one));
      }
    }
  }
  gather(kMassSubBins);
  if (owner && s.refine[warp]) {
    const Cut cut = find_cut<kMassSubBins / kWarp>(sums + warp * kMassBins, 0.f, s.missing[warp], one);
    if (cut.bin >= 0) {
      tell(s.cut_bin[warp] + (cut.bin + 1.f) / kMassSubBins, fminf(fmaf(cut.mass, s.unit[warp], s.share_before[warp]), 1.f), 1, s.cut_bin[warp]);
    }
  }
  cluster.sync();
}

// Who is kept, a byte a chunk of 8 candidates and head in `keep` [group, pitch / 8]; s.counts[rank] and s.totals of all blocks, complete after the caller's next barrier of the
// cluster. Returns the kept of the union before this thread's run of chunks inside the block.
template <int kThreads, int kMaxHeads, int kMaxBlocks>
__device__ __forceinline__ int mark_kept(const AnyCluster& cluster, TopPScratch<kMaxHeads, kMaxBlocks>& s, const half* logits, int pitch, int size, int group,
                                         float per_nat, unsigned char* keep, int* scan, int& run_begin, int& run_end) {
  const int lane = lane_id(), warp = warp_id(), team = kThreads / kWarp / group, g = warp % group;
  const int chunks = size / 8, first_chunk = warp < team * group ? warp / group * kWarp + lane : chunks, step = team * kWarp;
  const int keep_pitch = pitch / 8;
  const float above = s.edge[g], from = s.origin[g];
  int count = 0;
  for (int chunk = first_chunk; chunk < chunks; chunk += step) {
    Chunk<half> v;
    v.load(logits + g * pitch + chunk * 8);
    u32 mine = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) mine |= (fmaf(-per_nat, v[i], from) >= above ? 0u : 1u) << i;  // NaN is kept
    count += __popc(mine);
    keep[g * keep_pitch + chunk] = static_cast<unsigned char>(mine);
  }
  count = __reduce_add_sync(kFullMask, count);
  if (lane == 0) s.warp_count[warp] = count;
  __syncthreads();
  if (threadIdx.x < group) {
    int sum = s.warp_count[threadIdx.x];
    for (int i = 1; i < team; ++i) sum += s.warp_count[threadIdx.x + i * group];
    AnyCluster::store(AnyCluster::address(&s.counts[cluster.rank][threadIdx.x], 0), static_cast<u32>(sum));
  }
  // The union, in order: a run of chunks a thread.
  const int run = ceil_div(chunks, kThreads);
  run_begin = min(static_cast<int>(threadIdx.x) * run, chunks), run_end = min(run_begin + run, chunks);
  int kept_here = 0;
  for (int chunk = run_begin; chunk < run_end; ++chunk) {
    u32 any = 0;
    for (int head = 0; head < group; ++head) any |= keep[head * keep_pitch + chunk];
    keep[chunk] = static_cast<unsigned char>(any);  // of the first head: nobody else reads it
    kept_here += __popc(any);
  }
  int total;
  const int at = block_exclusive_scan<kThreads>(kept_here, scan, total);
  if (threadIdx.x < cluster.size) AnyCluster::store(AnyCluster::address(s.totals + cluster.rank, threadIdx.x), static_cast<u32>(total));
  return at;
}
