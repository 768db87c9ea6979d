// One backward pass over each sequence, whose moments are summed while it is still in the cache; sequences in parallel.
// The recursion is carried in double, so that a long response at gamma = lambda = 1 loses nothing to rounding.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "../arguments.h"
#include "simd.h"

namespace megatron_orz {
namespace {

// Tokens, or sums, in flight at once: enough to hide the latency of one addition behind those of the others.
constexpr int64_t kUnroll = 8;

// Threads pay off from about this many tokens.
constexpr int64_t kTokensPerTask = 16384;

struct Discount {
  double gamma;
  double decay;  // gamma lambda
  std::array<double, kUnroll + 1> powers;  // decay^0 .. decay^kUnroll

  Discount(double gamma, double gae_lambda) : gamma(gamma), decay(gamma * gae_lambda) {
    double power = 1;
    for (double& p : powers) p = std::exchange(power, power * decay);
  }
};

// Of some numbers: how many, their mean, and the sum of their squared deviations from it.
struct Moments {
  double count = 0, mean = 0, m2 = 0;
};

// The moments of both sets together (Chan, Golub and LeVeque).
Moments combine(const Moments& a, const Moments& b) {
  const double count = a.count + b.count;
  if (count == 0) return a;
  const double difference = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + difference * share, a.m2 + b.m2 + difference * difference * a.count * share};
}

// The arrays of ops.h, from a sequence's first token on.
template <typename T>
struct Sequence {
  const T *rewards, *values;
  const bool* mask;
  T *advantages, *returns;
  int64_t length;
};

// Tokens [start, start + n), n at most kUnroll; returns the advantage of the first. The advantages as if the sequence
// ended with the block come first; `next_advantage` is added after, the only step that waits for the block behind.
template <typename T>
ALWAYS_INLINE double gae_of_block(
    const Sequence<T>& s, int64_t start, int64_t n, double next_advantage, const Discount& d) {
  const T* values = s.values + start;
  double a[kUnroll] = {};
  for (int64_t i = 0; i < n - 1; ++i) a[i] = s.rewards[start + i] + d.gamma * values[i + 1] - values[i];
  const double next_value = start + n < s.length ? values[n] : T(0);
  a[n - 1] = s.rewards[start + n - 1] + d.gamma * next_value - values[n - 1];
  for (int64_t i = n - 2; i >= 0; --i) a[i] += d.decay * a[i + 1];
  for (int64_t i = 0; i < n; ++i) {
    a[i] += d.powers[n - i] * next_advantage;
    s.advantages[start + i] = static_cast<T>(a[i]);
    s.returns[start + i] = static_cast<T>(a[i] + values[i]);
  }
  return a[0];
}

// Sums over some numbers of their distances from one of them, and of the squares.
struct Sums {
  int64_t count = 0;
  double of_distances[kUnroll] = {}, of_squares[kUnroll] = {};
};

template <typename T>
ALWAYS_INLINE void add_block(const Sequence<T>& s, int64_t start, int64_t n, double origin, Sums& sums) {
  for (int64_t i = 0; i < n; ++i) sums.count += s.mask[start + i];
  for (int64_t i = 0; i < n; ++i) {
    const double distance = s.advantages[start + i] - origin;
    const double counted = s.mask[start + i] ? distance : 0.0;
    sums.of_distances[i] += counted;
    sums.of_squares[i] += counted * counted;
  }
}

// A number is no farther from the mean of all than they are spread: its squared distances lose no digits.
template <typename T>
ALWAYS_INLINE Moments moments_of_advantages(const Sequence<T>& s) {
  int64_t start = std::find(s.mask, s.mask + s.length, true) - s.mask;
  if (start == s.length) return {};
  const double origin = s.advantages[start];
  Sums sums;
  for (; start + kUnroll <= s.length; start += kUnroll) add_block(s, start, kUnroll, origin, sums);
  add_block(s, start, s.length - start, origin, sums);
  const double count = sums.count;
  const double distance = std::accumulate(sums.of_distances, sums.of_distances + kUnroll, 0.0);
  const double square = std::accumulate(sums.of_squares, sums.of_squares + kUnroll, 0.0);
  return {count, origin + distance / count, std::max(0.0, square - distance * distance / count)};
}

template <typename T>
ALWAYS_INLINE Moments gae_of_sequence(const Sequence<T>& s, const Discount& discount) {
  int64_t start = s.length;
  double advantage = 0;
  while (start >= kUnroll) {
    start -= kUnroll;
    advantage = gae_of_block(s, start, kUnroll, advantage, discount);
  }
  if (start > 0) gae_of_block(s, 0, start, advantage, discount);
  return moments_of_advantages(s);
}

template <typename T>
AVX2 Moments gae_of_sequence_avx2(const Sequence<T>& s, const Discount& discount) {
  return gae_of_sequence(s, discount);
}

template <typename T>
Moments gae(const Sequence<T>& s, const Discount& discount) {
  static const bool use_avx2 = has_avx2();
  return use_avx2 ? gae_of_sequence_avx2(s, discount) : gae_of_sequence(s, discount);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> packed_gae(
    const at::Tensor& rewards,
    const at::Tensor& values,
    const at::Tensor& cu_seqlens,
    const at::Tensor& loss_mask,
    double gamma,
    double gae_lambda) {
  check_packed_gae(rewards, values, cu_seqlens, loss_mask);
  const int64_t num_tokens = rewards.numel();
  const at::Tensor bounds = cu_seqlens.contiguous();
  check_boundaries(bounds, num_tokens);

  const at::Tensor r = rewards.contiguous();
  const at::Tensor v = values.contiguous();
  const at::Tensor counted = loss_mask.contiguous();
  at::Tensor advantages = at::empty_like(r);
  at::Tensor returns = at::empty_like(r);
  const int64_t num_sequences = bounds.numel() - 1;
  std::vector<Moments> of_sequences(num_sequences);
  const Discount discount(gamma, gae_lambda);

  AT_DISPATCH_FLOATING_TYPES(r.scalar_type(), "packed_gae", [&] {
    const auto* bound = bounds.const_data_ptr<int32_t>();
    const auto* reward = r.const_data_ptr<scalar_t>();
    const auto* value = v.const_data_ptr<scalar_t>();
    const auto* mask = counted.const_data_ptr<bool>();
    auto* advantage = advantages.mutable_data_ptr<scalar_t>();
    auto* ret = returns.mutable_data_ptr<scalar_t>();
    // A task takes the sequences that begin among its tokens.
    at::parallel_for(0, num_tokens, kTokensPerTask, [&](int64_t first, int64_t last) {
      int64_t i = std::lower_bound(bound, bound + num_sequences, first) - bound;
      for (; i < num_sequences && bound[i] < last; ++i) {
        const int64_t t = bound[i];
        const int64_t length = bound[i + 1] - t;
        const Sequence<scalar_t> sequence{reward + t, value + t, mask + t, advantage + t, ret + t, length};
        of_sequences[i] = gae(sequence, discount);
      }
    });
  });

  Moments total;
  for (const Moments& m : of_sequences) total = combine(total, m);
  at::Tensor moments = at::empty({3}, r.options().dtype(at::kDouble));
  auto* moment = moments.mutable_data_ptr<double>();
  moment[0] = total.count, moment[1] = total.mean, moment[2] = total.m2;
  return {advantages, returns, moments};
}

TORCH_LIBRARY_IMPL(megatron_orz, CPU, m) {
  m.impl("packed_gae", &packed_gae);
}

}  // namespace
}  // namespace megatron_orz
