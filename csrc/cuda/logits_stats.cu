// What softmax needs of each row of a block of logits.
//
// Reads: the logits, once, and each row's target. Saves: stats. Overwrites: nothing.
//
// A thread keeps, over the logits z it has seen, in base 2 and with u = (z - max) scale log2(e),
//
//   max z,   sum 2^u,   sum u 2^u
//
// and rescales the sums when max grows. Subtracting before scaling keeps rows with huge logits exact.

#include "reduce.cuh"

namespace megatron_orz::cuda {
namespace {

constexpr int kBlock = 512;
constexpr int kWarpsBlock = 256;  // of the small vocabularies, a row for each warp
constexpr int kSmall = 2048;      // columns
constexpr int kPerThread = 8;     // logits in flight

struct RowStats {
  float max, sum, moment;
};

constexpr __device__ RowStats kEmpty{kLowest, 0.f, 0.f};

// The same sums around another maximum. `scale` includes the log2(e).
__device__ __forceinline__ RowStats with_max(RowStats a, float max, float scale) {
  const float shift = fmaxf((a.max - max) * scale, kLowest);
  const float factor = exp2_fast(shift);
  return {max, factor * a.sum, factor * (a.moment + shift * a.sum)};
}

__device__ __forceinline__ RowStats merge(RowStats a, RowStats b, float scale) {
  const float max = fmaxf(a.max, b.max);
  a = with_max(a, max, scale);
  b = with_max(b, max, scale);
  return {max, a.sum + b.sum, a.moment + b.moment};
}

// kTeam threads share a row: a warp, or the block.
template <int kTeam, int kWidth>
__global__ void __launch_bounds__(kTeam == kWarp ? kWarpsBlock : kTeam) logits_stats_kernel(
    const float* __restrict__ logits, const int64_t* __restrict__ targets, int64_t vocab_start,
    float4* __restrict__ stats, int64_t n, int64_t v, float scale, bool entropy) {
  constexpr int kGroups = kPerThread / kWidth;
  const int64_t row = kTeam == kWarp ? (int64_t{blockIdx.x} * kWarpsBlock + threadIdx.x) / kWarp : blockIdx.x;
  if (row >= n) {
    return;
  }
  const float* z = logits + row * v;
  const float scale_2 = scale * kLog2E;
  const int member = threadIdx.x % kTeam;
  RowStats total = kEmpty;
  for (int64_t tile = member * kWidth; tile < v; tile += kTeam * kPerThread) {
    Pack<float, kWidth> group[kGroups];
    float max = total.max;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      group[i] = load_pack<kWidth>(z, tile + i * kTeam * kWidth, v, -INFINITY);
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      max = fmaxf(max, group[i / kWidth].at[i % kWidth]);
    }
    if (max > total.max) {
      total = with_max(total, max, scale_2);
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const float u = (group[i / kWidth].at[i % kWidth] - max) * scale_2;
      const float exp = exp2_fast(u);
      total.sum += exp;
      total.moment += fmaxf(u, kLowest) * exp;  // u may be -inf; a NaN still reaches both sums through exp
    }
  }
  const auto combine = [=](RowStats a, RowStats b) { return merge(a, b, scale_2); };
  if constexpr (kTeam == kWarp) {
    total = warp_reduce(total, combine);
  } else {
    total = block_reduce(total, combine, kEmpty);
  }
  if (member == 0) {
    const int64_t target = targets[row] - vocab_start;
    const float x_target = target >= 0 && target < v ? z[target] * scale : 0.f;
    const float max = total.max == kLowest ? -INFINITY : total.max * scale;
    stats[row] = make_float4(max, total.sum, entropy ? kLn2 * total.moment : 0.f, x_target);
  }
}

}  // namespace

void logits_stats(
    const float* logits, const int64_t* targets, int64_t vocab_start, float* stats, int64_t n, int64_t v, float scale,
    bool entropy, cudaStream_t stream) {
  const bool aligned = rows_are_aligned(logits, v, 16);
  const bool small = v <= kSmall;
  const auto kernel = small ? (aligned ? logits_stats_kernel<kWarp, 4> : logits_stats_kernel<kWarp, 1>)
                            : (aligned ? logits_stats_kernel<kBlock, 4> : logits_stats_kernel<kBlock, 1>);
  const int64_t num_blocks = small ? ceil_div<int64_t>(n, kWarpsBlock / kWarp) : n;
  launch(
      kernel, {num_blocks, small ? kWarpsBlock : kBlock}, stream,
      logits, targets, vocab_start, reinterpret_cast<float4*>(stats), n, v, scale, entropy);
}

}  // namespace megatron_orz::cuda
