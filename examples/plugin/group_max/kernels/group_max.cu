// Group max: of each page, the largest product of its mean key with the query heads of a group. A warp a page.
//
// The mean is read once for all heads: G d multiplications for 2 d bytes. Pages past a row's end are not read.
#include "common.cuh"  // twilight's: found from anywhere

struct GroupMaxParams {
  const void* q;          // [b, Hq, d]
  const void* means;      // [pages, Hkv, d]
  const int* page_table;  // [b, max_pages]
  const int* seq_lens;    // [b]
  float* scores;          // [b, Hkv, max_pages]
  int max_pages;
  int kv_heads;
  int group;
  int head_dim;
  int page_size;
};
CHECK_PARAMS(GroupMaxParams);

template <typename T, int Threads>
__global__ void __launch_bounds__(Threads) group_max(const __grid_constant__ GroupMaxParams p) {
  const int page = blockIdx.x * (Threads / kWarp) + warp_id();
  const int head = blockIdx.y, row = blockIdx.z;
  if (page >= p.max_pages) return;
  float best = -inf();
  if (page * p.page_size < p.seq_lens[row]) {
    const size_t held = p.page_table[static_cast<size_t>(row) * p.max_pages + page];
    const T* mean = static_cast<const T*>(p.means) + (held * p.kv_heads + head) * p.head_dim;
    const T* q = static_cast<const T*>(p.q) + (static_cast<size_t>(row) * p.kv_heads + head) * p.group * p.head_dim;
    for (int g = 0; g < p.group; ++g, q += p.head_dim) {
      float sum = 0.f;
      for (int c = lane_id(); c < p.head_dim; c += kWarp) sum += to_float(q[c]) * to_float(mean[c]);
      sum = warp_sum(sum);
      if (sum > best || sum != sum) best = sum;  // fmaxf would drop a NaN
    }
  }
  if (lane_id() == 0) p.scores[(static_cast<size_t>(row) * p.kv_heads + head) * p.max_pages + page] = best;
}
