// Two passes over each row, the second from cache; rows in parallel.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>
#include <type_traits>

#include "../arguments.h"
#include "simd.h"

namespace megatron_orz {
namespace {

// Independent sums per row: they hide the latency of additions, and shorten the chains whose roundings add up.
constexpr int64_t kChains = 4;

// x: the logits of one row; stats: m, s and y of ops.h. Padding a row with -inf changes none of them.
template <typename T>
ALWAYS_INLINE void softmax_sums(const T* z, int64_t num_columns, T scale, bool entropy, T* stats) {
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  constexpr int64_t kStep = kChains * kWidth<T>;

  Lanes<T> top[kChains];
  for (auto& lanes : top) lanes = splat(kNone);
  for (int64_t i = 0; i < num_columns; i += kStep) {
    for (int64_t c = 0; c < kChains; ++c) {
      const int64_t at = i + c * kWidth<T>;
      if (at < num_columns) top[c] = larger(load(z + at, num_columns - at, kNone), top[c]);
    }
  }
  const T m = scale * largest_of<T>(larger(larger(top[0], top[1]), larger(top[2], top[3])));
  const T shift = m == kNone ? 0 : m;  // -inf - -inf would be NaN

  Lanes<T> s[kChains] = {}, y[kChains] = {};
  for (int64_t i = 0; i < num_columns; i += kStep) {
    for (int64_t c = 0; c < kChains; ++c) {
      const int64_t at = i + c * kWidth<T>;
      if (at >= num_columns) break;
      const Lanes<T> below = exponent_in_range<T>(load(z + at, num_columns - at, kNone) * scale - shift);
      const Lanes<T> exp = exp_lanes(below);
      s[c] += exp;
      if (entropy) y[c] += below * exp;
    }
  }
  stats[0] = m;
  stats[1] = sum_of<T>((s[0] + s[1]) + (s[2] + s[3]));
  stats[2] = sum_of<T>((y[0] + y[1]) + (y[2] + y[3]));
}

AVX2 void softmax_sums_avx2(const float* z, int64_t num_columns, float scale, bool entropy, float* stats) {
  softmax_sums(z, num_columns, scale, entropy, stats);
}

template <typename T>
void softmax_sums_of_row(const T* z, int64_t num_columns, T scale, bool entropy, T* stats) {
  static const bool use_avx2 = has_avx2();
  if constexpr (std::is_same_v<T, float>) {
    if (use_avx2) return softmax_sums_avx2(z, num_columns, scale, entropy, stats);
  }
  softmax_sums(z, num_columns, scale, entropy, stats);
}

at::Tensor logits_stats(
    const at::Tensor& logits, const at::Tensor& targets, int64_t vocab_start, double scale, bool entropy) {
  check_block(logits, targets);
  const int64_t n = logits.size(0);
  const int64_t v = logits.size(1);

  const at::Tensor ids = targets.contiguous();
  at::Tensor stats = at::empty({n, 4}, logits.options());
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "logits_stats", [&] {
    const auto* z = logits.const_data_ptr<scalar_t>();
    const auto* target = ids.const_data_ptr<int64_t>();
    auto* stat = stats.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, n, rows_per_task(v), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const auto* row = z + i * v;
        const int64_t column = target[i] - vocab_start;
        const bool is_here = 0 <= column && column < v;
        softmax_sums_of_row<scalar_t>(row, v, scale, entropy, stat + 4 * i);
        stat[4 * i + 3] = is_here ? static_cast<scalar_t>(scale) * row[column] : 0;
      }
    });
  });
  return stats;
}

TORCH_LIBRARY_IMPL(megatron_orz, CPU, m) {
  m.impl("logits_stats", &logits_stats);
}

}  // namespace
}  // namespace megatron_orz
