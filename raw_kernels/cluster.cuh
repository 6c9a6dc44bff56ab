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

#define SEND "st.async.shared::cluster.mbarrier::complete_tx::bytes"

// A cluster whose size, a power of two, the launch decides. A block alone is a cluster of 1, before sm_90 too.
struct AnyCluster {
  int size, rank, shift;

  __device__ AnyCluster() : size(1), rank(0) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));  // volatile: another one need not live in registers as long as the first
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    shift = 31 - __clz(size);
  }
  // Things are dealt out in turn: whose thing number i is, and its number there; how many of n this block has, and the number of its i-th.
  __device__ int owner(int i) const { return i & (size - 1); }
  __device__ int place(int i) const { return i >> shift; }
  __device__ int share(int n) const { return (n - rank + size - 1) >> shift; }
  __device__ int nth(int i) const { return (i << shift) + rank; }
  __device__ bool alone() const { return size == 1; }
  // A barrier in two halves, between which a block may do what needs nobody. Every thread comes to both.
  __device__ void arrive() const {
#if __CUDA_ARCH__ >= 900
    if (size > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
  }
  // Without publishing what this warp has stored.
  __device__ void arrive_relaxed() const {
#if __CUDA_ARCH__ >= 900
    if (size > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
  }
  __device__ void wait() const {
#if __CUDA_ARCH__ >= 900
    if (size > 1) {
      asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
      return;
    }
#endif
    __syncthreads();
  }
  __device__ void sync() const { arrive(), wait(); }

  // Where `local` lies in block `at`, for the stores below.
  __device__ static u32 address(const void* local, int at) {
    u32 there = smem_address(local);
#if __CUDA_ARCH__ >= 900
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(there) : "r"(at));
#endif
    return there;
  }
  // The 32-bit word of block `at` that lies where `local` lies in this one.
  template <typename T>
  __device__ static T read(const T* local, int at) {
    static_assert(sizeof(T) == 4, "words only");
#if __CUDA_ARCH__ >= 900
    u32 word;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(word) : "r"(address(local, at)) : "memory");
    return *reinterpret_cast<T*>(&word);
#else
    return *local;
#endif
  }
#if __CUDA_ARCH__ >= 900
#define CLUSTER_STORE "st.shared::cluster"
#define CLUSTER_ADD "red.relaxed.cluster.shared::cluster.add.u32"
#else
#define CLUSTER_STORE "st.shared"
#define CLUSTER_ADD "red.shared.add.u32"
#endif
  __device__ static void store(u32 there, u32 x) { asm volatile(CLUSTER_STORE ".u32 [%0], %1;" ::"r"(there), "r"(x) : "memory"); }
  __device__ static void store(u32 there, float2 x) {
    asm volatile(CLUSTER_STORE ".v2.f32 [%0], {%1, %2};" ::"r"(there), "f"(x.x), "f"(x.y) : "memory");
  }
  __device__ static void store(u32 there, uint4 x) {
    asm volatile(CLUSTER_STORE ".v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(there), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
  }
  __device__ static void add(u32 there, u32 x) { asm volatile(CLUSTER_ADD " [%0], %1;" ::"r"(there), "r"(x) : "memory"); }
#undef CLUSTER_STORE
#undef CLUSTER_ADD

  // ---- what blocks send one another ----
  // A barrier of the cluster that publishes what was stored is a MEMBAR.ALL.GPU for every warp, 0.3 to 0.4 us, and empties the L1. A block that knows how many bytes it is sent waits
  // for these instead, at a box of its own, a barrier in its shared memory. A block alone stores, and its box is __syncthreads.

  // By a warp, before the block first arrives at a barrier of the cluster; nothing may be sent before everybody has. A lane that opens has a box of its own, good for one exchange of
  // so many bytes.
  __device__ static void open(bool opens, u64* box, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    if (opens) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(smem_address(box)) : "memory");
    __syncwarp();  // each lane goes on with its own box; racecheck takes that for a race without
    if (opens) asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(box)), "r"(bytes) : "memory");
#endif
  }
  // By one thread: so many bytes that `box` of block `at` waits for are not sent. (To say how many will be takes PTX 8.6, CUDA 12.8.)
  __device__ void spare(int at, u32 bytes, u64* box) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.complete_tx.relaxed.cluster.shared::cluster.b64 [%0], %1;" ::"r"(address(box, at)), "r"(bytes) : "memory");
#endif
  }
  // What was sent to `box` is there for the thread that comes back; nothing is said of what the threads of this block have done.
  __device__ void await(u64* box) const {
#if __CUDA_ARCH__ >= 900
    if (!alone()) {
      asm volatile("{\n.reg .pred there;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 there, [%0], 0;\n@!there bra again;\n}" ::"r"(smem_address(box)) : "memory");
      return;
    }
#endif
    __syncthreads();
  }
  // Store x, or add it, where `local` lies in block `at`, whose `box` counts its bytes.
  __device__ void send(u32* local, int at, u32 x, u64* box) const {
#if __CUDA_ARCH__ >= 900
    if (!alone()) {
      asm volatile(SEND ".b32 [%0], %1, [%2];" ::"r"(address(local, at)), "r"(x), "r"(address(box, at)) : "memory");
      return;
    }
#endif
    *local = x;
  }
  __device__ void send(float2* local, int at, float2 x, u64* box) const {
#if __CUDA_ARCH__ >= 900
    if (!alone()) {
      asm volatile(SEND ".v2.f32 [%0], {%1, %2}, [%3];" ::"r"(address(local, at)), "f"(x.x), "f"(x.y), "r"(address(box, at)) : "memory");
      return;
    }
#endif
    *local = x;
  }
  __device__ void send(uint4* local, int at, uint4 x, u64* box) const {
#if __CUDA_ARCH__ >= 900
    if (!alone()) {
      asm volatile(SEND ".v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address(local, at)), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(address(box, at)) : "memory");
      return;
    }
#endif
    *local = x;
  }
  __device__ void send_add(u32* local, int at, u32 x, u64* box) const {
#if __CUDA_ARCH__ >= 900
    if (!alone()) {
      asm volatile("red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%0], %1, [%2];" ::"r"(address(local, at)), "r"(x), "r"(address(box, at))
                   : "memory");
      return;
    }
#endif
    atomicAdd(local, x);
  }
};
#undef SEND

#if __CUDA_ARCH__ >= 900
#define CLUSTER_DIMS(n) __cluster_dims__(n, 1, 1)
#else
#define CLUSTER_DIMS(n)
#endif
