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

// A cluster whose size the launch decides. A block alone is a cluster of 1, before sm_90 too.
struct AnyCluster {
  u32 size, rank;

  __device__ AnyCluster() : size(1), rank(0) {
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  }
  __device__ void sync() const {
#if __CUDA_ARCH__ >= 900
    if (size > 1) {
      asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
      return;
    }
#endif
    __syncthreads();
  }
  // Where `local` lies in block `at`, for the functions below.
  __device__ static u32 address(const void* local, u32 at) {
    u32 there = smem_address(local);
#if __CUDA_ARCH__ >= 900
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(there) : "r"(at));
#endif
    return there;
  }
  __device__ static void store(u32 there, u32 x) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there), "r"(x) : "memory");
#else
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(there), "r"(x) : "memory");
#endif
  }
  __device__ static void store(u32 there, float x) { store(there, __float_as_uint(x)); }
  __device__ static void add(u32 there, u32 x) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.cluster.shared::cluster.add.u32 [%0], %1;" ::"r"(there), "r"(x) : "memory");
#else
    asm volatile("red.shared.add.u32 [%0], %1;" ::"r"(there), "r"(x) : "memory");
#endif
  }
  __device__ static float read(u32 there) {
    float v;
#if __CUDA_ARCH__ >= 900
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(there) : "memory");
#else
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(there) : "memory");
#endif
    return v;
  }
  __device__ static float2 read2(u32 there) {
    float2 v;
#if __CUDA_ARCH__ >= 900
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(there) : "memory");
#else
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(there) : "memory");
#endif
    return v;
  }
  __device__ static float4 read4(u32 there) {
    float4 v;
#if __CUDA_ARCH__ >= 900
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(there) : "memory");
#else
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(there) : "memory");
#endif
    return v;
  }
};

#if __CUDA_ARCH__ >= 900
#define CLUSTER_DIMS(n) __cluster_dims__(n, 1, 1)
#else
#define CLUSTER_DIMS(n)
#endif
