// One pass over the heads: both halves of a head are read and written together.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "simd.h"

namespace megatron_orz {
namespace {

// The arrays of ops.h. sign: -1 to turn back.
template <typename T>
struct Arrays {
  const T *x, *cos, *sin;
  T* out;
  int64_t heads, half, token_stride, head_stride;
  T sign;
};

template <typename T>
ALWAYS_INLINE void turn(const Arrays<T>& a, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; ++t) {
    const T *cos = a.cos + t * a.half, *sin = a.sin + t * a.half;
    for (int64_t h = 0; h < a.heads; ++h) {
      const T* x = a.x + t * a.token_stride + h * a.head_stride;
      T* out = a.out + (t * a.heads + h) * 2 * a.half;
      for (int64_t i = 0; i < a.half; i += kWidth<T>) {
        const int64_t n = a.half - i;
        const Lanes<T> left = load(x + i, n), right = load(x + a.half + i, n);
        const Lanes<T> c = load(cos + i, n), s = a.sign * load(sin + i, n);
        store(out + i, left * c - right * s, n);
        store(out + a.half + i, right * c + left * s, n);
      }
    }
  }
}

template <typename T>
AVX2 void turn_avx2(const Arrays<T>& a, int64_t first, int64_t last) {
  turn(a, first, last);
}

at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool back) {
  TORCH_CHECK_VALUE(
      x.dim() == 3 && x.size(2) % 2 == 0 && x.stride(2) == 1,
      "x must be [T, heads, d] with d even and a head contiguous, not ", x.sizes(), " with strides ", x.strides());
  const int64_t T = x.size(0), heads = x.size(1), half = x.size(2) / 2;
  for (const at::Tensor* of_angles : {&cos, &sin}) {
    CHECK_SHAPE(*of_angles, T, half);
    CHECK_SAME_DTYPE(x, *of_angles);
    CHECK_CONTIGUOUS(*of_angles);
  }
  at::Tensor out = at::empty(x.sizes(), x.options());
  static const bool use_avx2 = has_avx2();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "rotate", [&] {
    const Arrays<scalar_t> arrays{
        x.const_data_ptr<scalar_t>(),
        cos.const_data_ptr<scalar_t>(),
        sin.const_data_ptr<scalar_t>(),
        out.mutable_data_ptr<scalar_t>(),
        heads,
        half,
        x.stride(0),
        x.stride(1),
        static_cast<scalar_t>(back ? -1 : 1)};
    at::parallel_for(0, T, rows_per_task(heads * 2 * half), [&](int64_t first, int64_t last) {
      use_avx2 ? turn_avx2(arrays, first, last) : turn(arrays, first, last);
    });
  });
  return out;
}

TORCH_LIBRARY_IMPL(megatron_orz, CPU, m) {
  m.impl("rotate", &rotate);
}

}  // namespace
}  // namespace megatron_orz
