// A row is read for its norm and, still in the cache, for what is made of it. Backward, blocks of rows run in parallel,
// each with a sum of its own for d_weight; the sums are added in order.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "../checks.h"
#include "simd.h"

namespace megatron_orz {
namespace {

constexpr int64_t kRowsPerBlock = 64;

template <typename T>
ALWAYS_INLINE void forward_rows(
    const T* x, const T* weight, T* out, T* inverse, int64_t H, T eps, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; ++t) {
    const T* row = x + t * H;
    Lanes<T> squares = {};
    for (int64_t i = 0; i < H; i += kWidth<T>) squares += load(row + i, H - i) * load(row + i, H - i);
    const T r = 1 / std::sqrt(sum_of<T>(squares) / H + eps);
    inverse[t] = r;
    for (int64_t i = 0; i < H; i += kWidth<T>) {
      store(out + t * H + i, load(row + i, H - i) * r * load(weight + i, H - i), H - i);
    }
  }
}

// d_weight: [H], added to.
template <typename T>
ALWAYS_INLINE void backward_rows(
    const T* grad,
    const T* x,
    const T* weight,
    const T* inverse,
    T* d_x,
    T* d_weight,
    int64_t H,
    int64_t first,
    int64_t last) {
  for (int64_t t = first; t < last; ++t) {
    const T *row = x + t * H, *g = grad + t * H;
    const T r = inverse[t];
    Lanes<T> products = {};
    for (int64_t i = 0; i < H; i += kWidth<T>) {
      products += load(g + i, H - i) * load(weight + i, H - i) * load(row + i, H - i);
    }
    const T along = sum_of<T>(products) / H * r * r;
    for (int64_t i = 0; i < H; i += kWidth<T>) {
      const Lanes<T> x_i = load(row + i, H - i), g_i = load(g + i, H - i);
      store(d_x + t * H + i, r * (g_i * load(weight + i, H - i) - x_i * along), H - i);
      store(d_weight + i, load(d_weight + i, H - i) + g_i * x_i * r, H - i);
    }
  }
}

template <typename T>
AVX2 void forward_rows_avx2(
    const T* x, const T* weight, T* out, T* inverse, int64_t H, T eps, int64_t first, int64_t last) {
  forward_rows(x, weight, out, inverse, H, eps, first, last);
}

template <typename T>
AVX2 void backward_rows_avx2(
    const T* grad,
    const T* x,
    const T* weight,
    const T* inverse,
    T* d_x,
    T* d_weight,
    int64_t H,
    int64_t first,
    int64_t last) {
  backward_rows(grad, x, weight, inverse, d_x, d_weight, H, first, last);
}

void check_rows(const at::Tensor& x, const at::Tensor& weight) {
  CHECK_2D(x);
  CHECK_CONTIGUOUS(x);
  const int64_t H = x.size(1);
  CHECK_SHAPE(weight, H);
  CHECK_CONTIGUOUS(weight);
  CHECK_SAME_DTYPE(x, weight);
}

std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check_rows(x, weight);
  const int64_t T = x.size(0), H = x.size(1);
  at::Tensor out = at::empty_like(x), inverse = at::empty({T}, x.options());
  static const bool use_avx2 = has_avx2();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "rms_norm", [&] {
    const auto *in = x.const_data_ptr<scalar_t>(), *w = weight.const_data_ptr<scalar_t>();
    auto *to = out.mutable_data_ptr<scalar_t>(), *r = inverse.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, T, rows_per_task(H), [&](int64_t first, int64_t last) {
      use_avx2 ? forward_rows_avx2<scalar_t>(in, w, to, r, H, eps, first, last)
               : forward_rows<scalar_t>(in, w, to, r, H, eps, first, last);
    });
  });
  return {out, inverse};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& inverse) {
  check_rows(x, weight);
  CHECK_SAME_SHAPE(grad, x);
  CHECK_SAME_DTYPE(grad, x);
  CHECK_CONTIGUOUS(grad);
  const int64_t T = x.size(0), H = x.size(1);
  CHECK_SHAPE(inverse, T);
  CHECK_SAME_DTYPE(x, inverse);
  CHECK_CONTIGUOUS(inverse);
  const int64_t num_blocks = (T + kRowsPerBlock - 1) / kRowsPerBlock;
  at::Tensor d_x = at::empty_like(x), d_weight = at::zeros({H}, x.options());
  at::Tensor d_weights = at::zeros({num_blocks, H}, x.options());
  static const bool use_avx2 = has_avx2();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "rms_norm_backward", [&] {
    const auto *g = grad.const_data_ptr<scalar_t>(), *in = x.const_data_ptr<scalar_t>();
    const auto *w = weight.const_data_ptr<scalar_t>(), *r = inverse.const_data_ptr<scalar_t>();
    auto *to = d_x.mutable_data_ptr<scalar_t>(), *of_blocks = d_weights.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, num_blocks, 1 + rows_per_task(H) / kRowsPerBlock, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t start = block * kRowsPerBlock, end = std::min(T, start + kRowsPerBlock);
        use_avx2 ? backward_rows_avx2(g, in, w, r, to, of_blocks + block * H, H, start, end)
                 : backward_rows(g, in, w, r, to, of_blocks + block * H, H, start, end);
      }
    });
    auto* sum = d_weight.mutable_data_ptr<scalar_t>();
    for (int64_t block = 0; block < num_blocks; ++block) {
      for (int64_t i = 0; i < H; ++i) sum[i] += of_blocks[block * H + i];
    }
  });
  return {d_x, d_weight};
}

TORCH_LIBRARY_IMPL(megatron_orz, CPU, m) {
  m.impl("rms_norm", &rms_norm);
  m.impl("rms_norm_backward", &rms_norm_backward);
}

}  // namespace
}  // namespace megatron_orz
