// Gradient of log-probability and entropy with respect to the logits.
//
// Reads: the logits, once; five numbers a row. Saves: nothing. Overwrites: out, which may be the logits themselves.
//
// With u = log2 p = (scale z - log_sum_exp) log2(e), a row is
//
//   -scale p (g + h (log p + entropy)) = 2^u (offset + slope u)
//
// with two constants, and scale g more at the target.

#include "reduce.cuh"

namespace megatron_orz::cuda {
namespace {

constexpr int kPerThread = 8;

// A block a row, tile by tile. In place, a thread overwrites what it alone has read.
template <typename Out, int kWidth>
__global__ void __launch_bounds__(512) dlogits_kernel(
    const float* logits, const int64_t* __restrict__ targets, int64_t vocab_start,
    const float* __restrict__ log_sum_exp, const float* __restrict__ entropy, const float* __restrict__ grad_log_prob,
    const float* __restrict__ grad_entropy, Out* out, int64_t v, float scale) {
  constexpr int kGroups = kPerThread / kWidth;
  const int64_t row = blockIdx.x;
  const float* z = logits + row * v;
  Out* d_z = out + row * v;
  const float lse = log_sum_exp[row];
  const float g = grad_log_prob[row] * scale;
  const float h = grad_entropy[row] * scale;
  const float offset = -g - h * entropy[row];
  const float slope = -h * kLn2;
  const int64_t target = targets[row] - vocab_start;  // no column's, if it lies elsewhere

  for (int64_t tile = 0; tile < v; tile += blockDim.x * kPerThread) {
    const int64_t first = tile + threadIdx.x * kWidth;
    Pack<float, kWidth> group[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      group[i] = load_pack<kWidth>(z, first + i * blockDim.x * kWidth, v, -INFINITY);
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int64_t column = first + i * blockDim.x * kWidth;
      Pack<float, kWidth> result;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float u = fmaf(group[i].at[j], scale, -lse) * kLog2E;
        // u may be -inf; a NaN still comes through the exponential.
        const float d = exp2_fast(u) * fmaf(slope, fmaxf(u, kLowest), offset);
        result.at[j] = column + j == target ? d + g : d;
      }
      store_pack<kWidth>(d_z, column, v, result);
    }
  }
}

template <typename Out>
void launch_dlogits(
    const float* logits, Out* out, int64_t n, int64_t v, cudaStream_t stream, const int64_t* targets,
    int64_t vocab_start, const float* log_sum_exp, const float* entropy, const float* grad_log_prob,
    const float* grad_entropy, float scale) {
  const bool aligned = rows_are_aligned(logits, v, 16) && rows_are_aligned(out, v, 4 * sizeof(Out));
  const int num_threads = v <= 1024 ? 128 : v <= 16384 ? 256 : 512;
  launch(
      aligned ? dlogits_kernel<Out, 4> : dlogits_kernel<Out, 1>, {v == 0 ? 0 : n, num_threads}, stream,
      logits, targets, vocab_start, log_sum_exp, entropy, grad_log_prob, grad_entropy, out, v, scale);
}

}  // namespace

void dlogits(
    const float* logits, const int64_t* targets, int64_t vocab_start, const float* log_sum_exp, const float* entropy,
    const float* grad_log_prob, const float* grad_entropy, void* out, Dtype dtype, int64_t n, int64_t v, float scale,
    cudaStream_t stream) {
  const auto launch_as = [&](auto* typed_out) {
    launch_dlogits(
        logits, typed_out, n, v, stream, targets, vocab_start, log_sum_exp, entropy, grad_log_prob, grad_entropy,
        scale);
  };
  if (dtype == Dtype::kFloat32) {
    launch_as(static_cast<float*>(out));
  } else if (dtype == Dtype::kBFloat16) {
    launch_as(static_cast<__nv_bfloat16*>(out));
  } else {
    launch_as(static_cast<__half*>(out));
  }
}

}  // namespace megatron_orz::cuda
