// A task is a key-value head of a row: its keys are read once for all query heads that share it, then its values.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../checks.h"
#include "simd.h"

namespace megatron_orz {
namespace {

// The arrays of ops.h.
template <typename T>
struct Arrays {
  const T *query, *keys, *values;
  const int64_t *slots, *lengths;
  T* out;
  int64_t kv_heads, heads_per_kv, capacity, d, window;
  T scale;
};

template <typename T>
ALWAYS_INLINE T dot(const T* x, const T* y, int64_t n) {
  Lanes<T> sum = {};
  for (int64_t i = 0; i < n; i += kWidth<T>) sum += load(x + i, n - i) * load(y + i, n - i);
  return sum_of<T>(sum);
}

// scores to weights that sum to 1.
template <typename T>
ALWAYS_INLINE void softmax(T* scores, int64_t n) {
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  Lanes<T> maxima = splat(kLowest), sums = {};
  for (int64_t i = 0; i < n; i += kWidth<T>) maxima = larger(maxima, load(scores + i, n - i, kLowest));
  const T maximum = largest_of<T>(maxima);
  for (int64_t i = 0; i < n; i += kWidth<T>) {
    const Lanes<T> exp = exp_lanes(exponent_in_range<T>(load(scores + i, n - i, kLowest) - maximum));
    store(scores + i, exp, n - i);
    sums += exp;  // the lanes behind the last score add the smallest numbers there are
  }
  const T inverse = 1 / sum_of<T>(sums);
  for (int64_t i = 0; i < n; ++i) scores[i] *= inverse;
}

// out += weight row.
template <typename T>
ALWAYS_INLINE void add(T weight, const T* row, T* out, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth<T>) store(out + i, load(out + i, n - i) + weight * load(row + i, n - i), n - i);
}

// Heads [first, last) of all rows' key-value heads. scores: room for those of a group of query heads.
template <typename T>
ALWAYS_INLINE void attend(const Arrays<T>& a, int64_t first, int64_t last, std::vector<T>& scores) {
  for (int64_t task = first; task < last; ++task) {
    const int64_t row = task / a.kv_heads, kv = task % a.kv_heads;
    const int64_t end = a.lengths[row], begin = a.window > 0 ? std::max<int64_t>(0, end - a.window) : 0;
    const int64_t n = end - begin;
    const int64_t in_cache = ((a.slots[row] * a.kv_heads + kv) * a.capacity + begin) * a.d;
    const int64_t in_query = task * a.heads_per_kv * a.d;
    const T *keys = a.keys + in_cache, *values = a.values + in_cache, *query = a.query + in_query;
    T* out = a.out + in_query;
    scores.resize(a.heads_per_kv * n);
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t h = 0; h < a.heads_per_kv; ++h) {
        scores[h * n + t] = a.scale * dot(query + h * a.d, keys + t * a.d, a.d);
      }
    }
    for (int64_t h = 0; h < a.heads_per_kv; ++h) softmax(scores.data() + h * n, n);
    std::fill_n(out, a.heads_per_kv * a.d, T(0));
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t h = 0; h < a.heads_per_kv; ++h) add(scores[h * n + t], values + t * a.d, out + h * a.d, a.d);
    }
  }
}

template <typename T>
AVX2 void attend_avx2(const Arrays<T>& a, int64_t first, int64_t last, std::vector<T>& scores) {
  attend(a, first, last, scores);
}

at::Tensor slot_attention(
    const at::Tensor& query,
    const at::Tensor& keys,
    const at::Tensor& values,
    const at::Tensor& slots,
    const at::Tensor& lengths,
    double scale,
    int64_t window) {
  TORCH_CHECK_VALUE(query.dim() == 3 && keys.dim() == 4, "query must be [B, heads, d] and keys [S, kv_heads, C, d]");
  const int64_t B = query.size(0), heads = query.size(1), d = query.size(2);
  const int64_t S = keys.size(0), kv_heads = keys.size(1), C = keys.size(2);
  CHECK_SHAPE(keys, S, kv_heads, C, d);
  CHECK_SAME_SHAPE(keys, values);
  CHECK_SAME_DTYPE(query, keys);
  CHECK_SAME_DTYPE(query, values);
  CHECK_CONTIGUOUS(keys);
  CHECK_CONTIGUOUS(values);
  CHECK_SHAPE(slots, B);
  CHECK_SHAPE(lengths, B);
  CHECK_DTYPE(slots, at::kLong);
  CHECK_DTYPE(lengths, at::kLong);
  TORCH_CHECK_VALUE(
      kv_heads > 0 && heads % kv_heads == 0, heads, " query heads cannot share ", kv_heads, " key-value heads");
  const at::Tensor q = query.contiguous(), slot = slots.contiguous(), length = lengths.contiguous();
  const auto *of_row = slot.const_data_ptr<int64_t>(), *len = length.const_data_ptr<int64_t>();
  int64_t num_keys = 0;
  for (int64_t b = 0; b < B; ++b) {
    TORCH_CHECK_VALUE(
        0 <= of_row[b] && of_row[b] < S && 1 <= len[b] && len[b] <= C,
        "row ", b, " has ", len[b], " tokens in slot ", of_row[b], "; there are ", S, " slots of ", C, " tokens");
    num_keys += len[b];
  }

  at::Tensor out = at::empty_like(q);
  static const bool use_avx2 = has_avx2();
  const int64_t tasks_together = B > 0 ? rows_per_task(num_keys / B * d) : 1;
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "slot_attention", [&] {
    const Arrays<scalar_t> arrays{
        q.const_data_ptr<scalar_t>(),
        keys.const_data_ptr<scalar_t>(),
        values.const_data_ptr<scalar_t>(),
        of_row,
        len,
        out.mutable_data_ptr<scalar_t>(),
        kv_heads,
        heads / kv_heads,
        C,
        d,
        window,
        static_cast<scalar_t>(scale)};
    at::parallel_for(0, B * kv_heads, tasks_together, [&](int64_t first, int64_t last) {
      std::vector<scalar_t> scores;
      use_avx2 ? attend_avx2(arrays, first, last, scores) : attend(arrays, first, last, scores);
    });
  });
  return out;
}

TORCH_LIBRARY_IMPL(megatron_orz, CPU, m) {
  m.impl("slot_attention", &slot_attention);
}

}  // namespace
}  // namespace megatron_orz
