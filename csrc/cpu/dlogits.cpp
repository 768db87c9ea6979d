// One pass over each row, in place if asked; rows in parallel.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <type_traits>

#include "../arguments.h"
#include "simd.h"

namespace megatron_orz {
namespace {

// What a row shares, in the letters of ops.h.
template <typename T>
struct Row {
  T lse, entropy, g, h;
};

// z, out: one row. The target's own term is not added here.
template <typename T>
ALWAYS_INLINE void softmax_gradient(const T* z, int64_t num_columns, T scale, const Row<T>& row, T* out) {
  const T g = -scale * row.g, h = -scale * row.h;
  for (int64_t i = 0; i < num_columns; i += kWidth<T>) {
    const Lanes<T> log_p = exponent_in_range<T>(load(z + i, num_columns - i) * scale - row.lse);
    store<T>(out + i, exp_lanes(log_p) * (g + h * (log_p + row.entropy)), num_columns - i);
  }
}

AVX2 void softmax_gradient_avx2(const float* z, int64_t num_columns, float scale, const Row<float>& row, float* out) {
  softmax_gradient(z, num_columns, scale, row, out);
}

template <typename T>
void softmax_gradient_of_row(const T* z, int64_t num_columns, T scale, const Row<T>& row, T* out) {
  static const bool use_avx2 = has_avx2();
  if constexpr (std::is_same_v<T, float>) {
    if (use_avx2) return softmax_gradient_avx2(z, num_columns, scale, row, out);
  }
  softmax_gradient(z, num_columns, scale, row, out);
}

void dlogits(
    const at::Tensor& logits,
    const at::Tensor& targets,
    const at::Tensor& log_sum_exp,
    const at::Tensor& entropy,
    const at::Tensor& grad_log_prob,
    const at::Tensor& grad_entropy,
    int64_t vocab_start,
    double scale,
    at::Tensor& out) {
  check_dlogits(logits, targets, log_sum_exp, entropy, grad_log_prob, grad_entropy, out);
  CHECK_SAME_DTYPE(logits, out);
  const int64_t n = logits.size(0);
  const int64_t v = logits.size(1);

  const at::Tensor ids = targets.contiguous();
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "dlogits", [&] {
    const auto* z = logits.const_data_ptr<scalar_t>();
    const auto* target = ids.const_data_ptr<int64_t>();
    const auto* lse = log_sum_exp.const_data_ptr<scalar_t>();
    const auto* H = entropy.const_data_ptr<scalar_t>();
    const auto* g = grad_log_prob.const_data_ptr<scalar_t>();
    const auto* h = grad_entropy.const_data_ptr<scalar_t>();
    auto* gradient = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, n, rows_per_task(v), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        softmax_gradient_of_row<scalar_t>(z + i * v, v, scale, {lse[i], H[i], g[i], h[i]}, gradient + i * v);
        const int64_t column = target[i] - vocab_start;
        if (0 <= column && column < v) gradient[i * v + column] += static_cast<scalar_t>(scale) * g[i];
      }
    });
  });
}

TORCH_LIBRARY_IMPL(megatron_orz, CPU, m) {
  m.impl("dlogits", &dlogits);
}

}  // namespace
}  // namespace megatron_orz
