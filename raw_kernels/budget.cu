// Budget: how many tokens, and how many pages, each kv head may propose at this step. Once a step, for all layers.
//
// In float64, as the host: float32 would turn 0.1 * 2^24 into another number of tokens. One launch instead of a dozen of torch's.
#include "common.cuh"

struct BudgetParams {
  const int* seq_lens;  // [b]
  int* tokens;          // [b, Hkv]
  int* pages;           // [b, Hkv]
  double fraction;      // of the length; 0 for a number of tokens
  int value;            // that number
  int min_tokens;       // what a fraction asks for at least
  int batch;
  int kv_heads;
  int page_size;
};
CHECK_PARAMS(BudgetParams);

template <int Threads>
__global__ void __launch_bounds__(Threads) budget(const __grid_constant__ BudgetParams p) {
  const int i = blockIdx.x * Threads + threadIdx.x;
  if (i >= p.batch * p.kv_heads) return;
  const double length = p.seq_lens[i / p.kv_heads];
  const double wanted = p.fraction > 0. ? fmax(ceil(__dmul_rn(length, p.fraction)), static_cast<double>(p.min_tokens)) : static_cast<double>(p.value);
  const int tokens = static_cast<int>(fmin(wanted, length));
  p.tokens[i] = tokens;
  p.pages[i] = ceil_div(tokens, p.page_size);
}
