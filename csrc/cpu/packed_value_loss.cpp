// One pass over the hidden states: a row is read for its value and, still in the cache, for its gradients. Blocks of
// rows in parallel, each with a sum of its own for d_head; the sums are added in order.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../arguments.h"
#include "simd.h"

namespace megatron_orz {
namespace {

constexpr int64_t kRowsPerBlock = 64;
constexpr int64_t kChains = 4;

template <typename T>
ALWAYS_INLINE T dot(const T* x, const T* y, int64_t n) {
  Lanes<T> sums[kChains] = {};
  for (int64_t i = 0; i < n; i += kChains * kWidth<T>) {
    for (int64_t c = 0; c < kChains; ++c) {
      const int64_t at = i + c * kWidth<T>;
      if (at < n) sums[c] += load(x + at, n - at) * load(y + at, n - at);
    }
  }
  return sum_of<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The gradient of half the larger square with respect to the value.
template <typename T>
ALWAYS_INLINE T error_gradient(T value, T old_value, T ret, T clip_eps) {
  const T error = value - ret;
  if (clip_eps > 0) {
    // A value within the range comes back unchanged, to the last bit.
    const T clipped_error = std::min(std::max(value, old_value - clip_eps), old_value + clip_eps) - ret;
    if (clipped_error * clipped_error > error * error) return 0;
  }
  return error;
}

// Reductions are float32, or float64 for float64 hidden states.
template <typename scalar_t>
using Wide = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// The arrays of ops.h; `head` is already wide.
template <typename scalar_t>
struct Arrays {
  const scalar_t* hidden;
  const Wide<scalar_t>*head, *old_values, *returns, *weights;
  Wide<scalar_t>* values;
  scalar_t* d_hidden;
  int64_t H;
  Wide<scalar_t> clip_eps;
};

template <typename scalar_t>
ALWAYS_INLINE const Wide<scalar_t>* widen(const scalar_t* row, int64_t n, Wide<scalar_t>* buffer) {
  if constexpr (std::is_same_v<scalar_t, Wide<scalar_t>>) {
    return row;
  } else {
    for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<float>(row[i]);
    return buffer;
  }
}

// Rows [first, last). d_head: [H], added to; buffer: [H], for a row in float32.
template <typename scalar_t>
ALWAYS_INLINE void do_rows(
    const Arrays<scalar_t>& a, int64_t first, int64_t last, Wide<scalar_t>* d_head, Wide<scalar_t>* buffer) {
  for (int64_t t = first; t < last; ++t) {
    const Wide<scalar_t>* row = widen(a.hidden + t * a.H, a.H, buffer);
    scalar_t* d_row = a.d_hidden + t * a.H;
    const Wide<scalar_t> value = dot(row, a.head, a.H);
    a.values[t] = value;
    if (a.weights[t] == 0) {
      std::fill_n(d_row, a.H, scalar_t(0));
      continue;
    }
    const Wide<scalar_t> d_value = a.weights[t] * error_gradient(value, a.old_values[t], a.returns[t], a.clip_eps);
    for (int64_t i = 0; i < a.H; ++i) d_row[i] = static_cast<scalar_t>(d_value * a.head[i]);
    for (int64_t i = 0; i < a.H; ++i) d_head[i] += d_value * row[i];
  }
}

template <typename scalar_t>
AVX2 void do_rows_avx2(
    const Arrays<scalar_t>& a, int64_t first, int64_t last, Wide<scalar_t>* d_head, Wide<scalar_t>* buffer) {
  do_rows(a, first, last, d_head, buffer);
}

std::tuple<at::Tensor, at::Tensor> packed_value_loss(
    const at::Tensor& hidden,
    const at::Tensor& head,
    const at::Tensor& old_values,
    const at::Tensor& returns,
    const at::Tensor& weights,
    double clip_eps,
    at::Tensor& d_head) {
  check_packed_value_loss(hidden, head, old_values, returns, weights, d_head);
  const int64_t T = hidden.size(0);
  const int64_t H = hidden.size(1);
  const at::ScalarType wide = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;

  const at::Tensor w = head.to(wide).contiguous();
  const at::Tensor v_old = old_values.contiguous(), r = returns.contiguous(), per_token = weights.contiguous();
  const int64_t num_blocks = (T + kRowsPerBlock - 1) / kRowsPerBlock;
  at::Tensor values = at::empty({T}, r.options());
  at::Tensor d_hidden = at::empty_like(hidden);
  at::Tensor d_heads = at::zeros({num_blocks, H}, r.options());

  static const bool use_avx2 = has_avx2();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, hidden.scalar_type(), "packed_value_loss", [&] {
    using wide_t = Wide<scalar_t>;
    const Arrays<scalar_t> arrays{
        hidden.const_data_ptr<scalar_t>(),
        w.const_data_ptr<wide_t>(),
        v_old.const_data_ptr<wide_t>(),
        r.const_data_ptr<wide_t>(),
        per_token.const_data_ptr<wide_t>(),
        values.mutable_data_ptr<wide_t>(),
        d_hidden.mutable_data_ptr<scalar_t>(),
        H,
        static_cast<wide_t>(clip_eps)};
    auto* d_head_of_block = d_heads.mutable_data_ptr<wide_t>();
    at::parallel_for(0, num_blocks, 1 + rows_per_task(H) / kRowsPerBlock, [&](int64_t first, int64_t last) {
      std::vector<wide_t> buffer(H);
      for (int64_t block = first; block < last; ++block) {
        const int64_t start = block * kRowsPerBlock, end = std::min(T, start + kRowsPerBlock);
        if (use_avx2) {
          do_rows_avx2(arrays, start, end, d_head_of_block + block * H, buffer.data());
        } else {
          do_rows(arrays, start, end, d_head_of_block + block * H, buffer.data());
        }
      }
    });
    auto* sum = d_head.mutable_data_ptr<wide_t>();
    for (int64_t block = 0; block < num_blocks; ++block) {
      for (int64_t i = 0; i < H; ++i) sum[i] += d_head_of_block[block * H + i];
    }
  });
  return {values, d_hidden};
}

TORCH_LIBRARY_IMPL(megatron_orz, CPU, m) {
  m.impl("packed_value_loss", &packed_value_loss);
}

}  // namespace
}  // namespace megatron_orz
