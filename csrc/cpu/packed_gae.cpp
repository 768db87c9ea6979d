// One backward pass over each sequence, whose moments are summed while it is still in the cache; sequences in parallel.
// The recursion is carried in double, so that a long response at gamma = lambda = 1 loses nothing to rounding.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "../checks.h"

namespace megatron_orz {
namespace {

// Tokens, or sums, in flight at once: enough to hide the latency of one addition behind those of the others.
constexpr int64_t kUnroll = 8;

// Threads pay off from about this many tokens.
constexpr int64_t kTokensPerTask = 16384;

// The powers of gamma lambda are (gamma lambda)^1 .. (gamma lambda)^kUnroll.
struct Discount {
  double gamma;
  std::array<double, kUnroll> powers;

  Discount(double gamma, double gae_lambda) : gamma(gamma) {
    double power = 1;
    for (double& p : powers) p = power *= gamma * gae_lambda;
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

// term(0) + ... + term(n - 1)
template <typename Term>
double sum(int64_t n, Term term) {
  double sums[kUnroll] = {};
  int64_t t = 0;
  for (; t + kUnroll <= n; t += kUnroll) {
    for (int64_t i = 0; i < kUnroll; ++i) sums[i] += term(t + i);
  }
  for (; t < n; ++t) sums[0] += term(t);
  double total = 0;
  for (double s : sums) total += s;
  return total;
}

template <typename scalar_t>
Moments moments_of(const scalar_t* x, const bool* mask, int64_t n) {
  const double count = sum(n, [&](int64_t t) { return mask[t] ? 1.0 : 0.0; });
  if (count == 0) return {};
  const double mean = sum(n, [&](int64_t t) { return mask[t] ? static_cast<double>(x[t]) : 0.0; }) / count;
  const double m2 = sum(n, [&](int64_t t) {
    const double deviation = mask[t] ? x[t] - mean : 0.0;
    return deviation * deviation;
  });
  return {count, mean, m2};
}

// Every pointer is at the sequence's first token.
template <typename scalar_t>
void gae_of_sequence(
    const scalar_t* rewards,
    const scalar_t* values,
    scalar_t* advantages,
    scalar_t* returns,
    int64_t length,
    const Discount& discount) {
  const double decay = discount.powers[0];
  double next_value = 0;
  double next_advantage = 0;
  for (int64_t end = length; end > 0; end -= kUnroll) {
    const int64_t start = std::max<int64_t>(0, end - kUnroll);
    // The advantage as if the block were the end of the sequence; what follows it is added after, the only step for
    // which the next block has to wait.
    double alone[kUnroll];
    double advantage = 0;
    for (int64_t t = end - 1; t >= start; --t) {
      const double value = values[t];
      advantage = rewards[t] + discount.gamma * next_value - value + decay * advantage;
      alone[t - start] = advantage;
      next_value = value;
    }
    for (int64_t t = start; t < end; ++t) {
      const double whole = alone[t - start] + discount.powers[end - 1 - t] * next_advantage;
      advantages[t] = static_cast<scalar_t>(whole);
      returns[t] = static_cast<scalar_t>(whole + values[t]);
    }
    next_advantage = alone[0] + discount.powers[end - 1 - start] * next_advantage;
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> packed_gae(
    const at::Tensor& rewards,
    const at::Tensor& values,
    const at::Tensor& cu_seqlens,
    const at::Tensor& loss_mask,
    double gamma,
    double gae_lambda) {
  CHECK_1D(rewards);
  CHECK_SAME_SHAPE(rewards, values);
  CHECK_SAME_DTYPE(rewards, values);
  CHECK_SAME_DEVICE(rewards, values);
  CHECK_SAME_SHAPE(rewards, loss_mask);
  CHECK_DTYPE(loss_mask, at::kBool);
  CHECK_SAME_DEVICE(rewards, loss_mask);
  CHECK_1D(cu_seqlens);
  CHECK_DTYPE(cu_seqlens, at::kInt);
  CHECK_SAME_DEVICE(rewards, cu_seqlens);

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
        gae_of_sequence(reward + t, value + t, advantage + t, ret + t, length, discount);
        of_sequences[i] = moments_of(advantage + t, mask + t, length);
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
