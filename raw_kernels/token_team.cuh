// The blocks that rank the tokens of one row together, for token_ranks.cuh: what they let each other see, and where they meet.
//
// A cluster of up to 16, whose shared memory they read, or, without clusters, blocks that are launched together and meet at counters in global memory.
#pragma once

#include "cluster.cuh"
#include "radix.cuh"

constexpr int kMaxGroup = 16;
constexpr int kCoarse = 64, kFine = kRadixBins / kCoarse;

// What a block lets the others of its team see.
struct Exchange {
  int histogram[2][kRadixBins];
  int coarse[2][kCoarse];
  float head_max[kMaxGroup], head_sum[kMaxGroup];
  int there[2];      // entries to rank: by sums, and by logarithms
  int above, same;   // entries above the threshold, and equal to it
};

// The blocks of a row. kGlobal: without clusters; what is shared is copied out to global memory.
template <bool kGlobal>
struct Team : AnyCluster {
  static constexpr bool kApart = false;
  template <typename T>
  __device__ void publish(const T*, int) const {}
  template <typename T>
  __device__ T read(const T* local, int at) const {
    return alone() ? *local : AnyCluster::read(local, at);
  }
  __device__ void leave() const { sync(); }  // a block that leaves takes its shared memory along
};
template <>
struct Team<true> {
  static constexpr bool kApart = true;
  int size, rank;
  Exchange *shared, *all;
  u32* counters;  // arrived, generation, left

  // `exchange` [rows, size], `counters` [rows, 3] at zero.
  __device__ Team(Exchange* shared, void* exchange, u32* counters, int row)
      : size(gridDim.x), rank(blockIdx.x), shared(shared), all(static_cast<Exchange*>(exchange) + static_cast<size_t>(row) * gridDim.x), counters(counters + 3 * row) {}
  // The 32-bit words of `local`, after a barrier of the block. Visible to the team after the next `sync`.
  template <typename T>
  __device__ void publish(const T* local, int words) const {
    const int first = reinterpret_cast<const int*>(local) - reinterpret_cast<const int*>(shared);
    for (int i = threadIdx.x; i < words; i += blockDim.x) reinterpret_cast<int*>(all + rank)[first + i] = reinterpret_cast<const int*>(local)[i];
  }
  template <typename T>
  __device__ T read(const T* local, int at) const {
    const int first = reinterpret_cast<const int*>(local) - reinterpret_cast<const int*>(shared);
    const u32 word = load_l2(reinterpret_cast<const u32*>(all + at) + first);
    return *reinterpret_cast<const T*>(&word);
  }
  __device__ void sync() const {
    __syncthreads();
    if (threadIdx.x == 0) {
      const u32 before = load_l2(counters + 1);
      __threadfence();
      if (atomicInc(counters, size - 1) == size - 1) {
        atomicAdd(counters + 1, 1u);
      } else {
        while (load_l2(counters + 1) == before) {}
      }
      __threadfence();
    }
    __syncthreads();
  }
  __device__ void leave() const {  // the last one puts the generation back to zero; nobody waits for it any more
    if (threadIdx.x == 0 && atomicInc(counters + 2, size - 1) == size - 1) counters[1] = 0;
  }
};
