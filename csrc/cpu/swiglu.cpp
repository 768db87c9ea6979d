// One pass over the rows each way: both halves of a row are read, and written, where they lie.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../checks.h"
#include "simd.h"

namespace megatron_orz {
namespace {

// Below, e^-x leaves the range of exponents; the sigmoid is 0 to rounding in what it is multiplied with.
template <typename T>
ALWAYS_INLINE Lanes<T> sigmoid(Lanes<T> x) {
  const Lanes<T> highest = splat(-kLowestExponent<T>);
  const Lanes<T> negated = -x;
  return 1 / (1 + exp_lanes(exponent_in_range<T>(negated > highest ? highest : negated)));
}

template <typename T>
ALWAYS_INLINE void forward_rows(const T* x, T* out, int64_t F, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; ++t) {
    const T *a = x + t * 2 * F, *b = a + F;
    for (int64_t i = 0; i < F; i += kWidth<T>) {
      const Lanes<T> a_i = load(a + i, F - i);
      store(out + t * F + i, a_i * sigmoid<T>(a_i) * load(b + i, F - i), F - i);
    }
  }
}

template <typename T>
ALWAYS_INLINE void backward_rows(const T* grad, const T* x, T* d_x, int64_t F, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; ++t) {
    const T *a = x + t * 2 * F, *b = a + F;
    T *d_a = d_x + t * 2 * F, *d_b = d_a + F;
    for (int64_t i = 0; i < F; i += kWidth<T>) {
      const Lanes<T> a_i = load(a + i, F - i), g = load(grad + t * F + i, F - i), s = sigmoid<T>(a_i);
      store(d_a + i, g * load(b + i, F - i) * s * (1 + a_i * (1 - s)), F - i);
      store(d_b + i, g * a_i * s, F - i);
    }
  }
}

template <typename T>
AVX2 void forward_rows_avx2(const T* x, T* out, int64_t F, int64_t first, int64_t last) {
  forward_rows(x, out, F, first, last);
}

template <typename T>
AVX2 void backward_rows_avx2(const T* grad, const T* x, T* d_x, int64_t F, int64_t first, int64_t last) {
  backward_rows(grad, x, d_x, F, first, last);
}

at::Tensor swiglu(const at::Tensor& x) {
  CHECK_2D(x);
  CHECK_CONTIGUOUS(x);
  TORCH_CHECK_VALUE(x.size(1) % 2 == 0, "x must be [T, 2 F], not ", x.sizes());
  const int64_t T = x.size(0), F = x.size(1) / 2;
  at::Tensor out = at::empty({T, F}, x.options());
  static const bool use_avx2 = has_avx2();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "swiglu", [&] {
    const auto* in = x.const_data_ptr<scalar_t>();
    auto* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, T, rows_per_task(F), [&](int64_t first, int64_t last) {
      use_avx2 ? forward_rows_avx2(in, to, F, first, last) : forward_rows(in, to, F, first, last);
    });
  });
  return out;
}

at::Tensor swiglu_backward(const at::Tensor& grad, const at::Tensor& x) {
  CHECK_2D(x);
  CHECK_CONTIGUOUS(x);
  CHECK_CONTIGUOUS(grad);
  CHECK_SAME_DTYPE(grad, x);
  const int64_t T = x.size(0), F = x.size(1) / 2;
  CHECK_SHAPE(grad, T, F);
  at::Tensor d_x = at::empty_like(x);
  static const bool use_avx2 = has_avx2();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "swiglu_backward", [&] {
    const auto *g = grad.const_data_ptr<scalar_t>(), *in = x.const_data_ptr<scalar_t>();
    auto* to = d_x.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, T, rows_per_task(F), [&](int64_t first, int64_t last) {
      use_avx2 ? backward_rows_avx2(g, in, to, F, first, last) : backward_rows(g, in, to, F, first, last);
    });
  });
  return d_x;
}

TORCH_LIBRARY_IMPL(megatron_orz, CPU, m) {
  m.impl("swiglu", &swiglu);
  m.impl("swiglu_backward", &swiglu_backward);
}

}  // namespace
}  // namespace megatron_orz
