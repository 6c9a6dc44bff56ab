// Thread block clusters: blocks that run at the same time and read each other's shared memory. sm_90 and later; elsewhere, and with
// a cluster of 1, a barrier is a block barrier and the only rank is 0.
#pragma once

#include "common.cuh"

template <int kCluster>
struct Cluster {
  static constexpr bool kReal = kCluster > 1;

  __device__ static u32 rank() {
    u32 r = 0;
#if __CUDA_ARCH__ >= 900
    if constexpr (kReal) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
#endif
    return r;
  }
  // Every thread of every block comes. What was written to shared memory before is visible to the whole cluster after.
  __device__ static void sync() {
#if __CUDA_ARCH__ >= 900
    if constexpr (kReal) {
      asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
      return;
    }
#endif
    __syncthreads();
  }
  // The 32-bit word of block `rank` that lies where `local` lies in this one.
  template <typename T>
  __device__ static T read(const T* local, u32 rank) {
    static_assert(sizeof(T) == 4, "words only");
#if __CUDA_ARCH__ >= 900
    if constexpr (kReal) {
      u32 address, word;
      asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(smem_address(local)), "r"(rank));
      asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
      return *reinterpret_cast<T*>(&word);
    }
#endif
    return *local;
  }
};

#if __CUDA_ARCH__ >= 900
#define CLUSTER_DIMS(n) __cluster_dims__(n, 1, 1)
#else
#define CLUSTER_DIMS(n)
#endif
