// One backward pass over each sequence, sequences in parallel. The recursion is carried in double, so that a long
// response at gamma = lambda = 1 loses nothing to rounding.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../checks.h"

namespace megatron_orz {
namespace {

struct Discount {
  double gamma;
  double gae_lambda;
};

// Every pointer is at the sequence's first token.
template <typename scalar_t>
void gae_of_sequence(
    const scalar_t* rewards, const scalar_t* values, scalar_t* advantages, scalar_t* returns, int64_t length, Discount d) {
  double next_value = 0;
  double advantage = 0;
  for (int64_t t = length - 1; t >= 0; --t) {
    const double value = values[t];
    const double delta = rewards[t] + d.gamma * next_value - value;
    advantage = delta + d.gamma * d.gae_lambda * advantage;
    advantages[t] = static_cast<scalar_t>(advantage);
    returns[t] = static_cast<scalar_t>(advantage + value);
    next_value = value;
  }
}

std::tuple<at::Tensor, at::Tensor> packed_gae(
    const at::Tensor& rewards,
    const at::Tensor& values,
    const at::Tensor& cu_seqlens,
    double gamma,
    double gae_lambda) {
  CHECK_1D(rewards);
  CHECK_SAME_SHAPE(rewards, values);
  CHECK_SAME_DTYPE(rewards, values);
  CHECK_SAME_DEVICE(rewards, values);
  CHECK_1D(cu_seqlens);
  CHECK_DTYPE(cu_seqlens, at::kInt);
  CHECK_SAME_DEVICE(rewards, cu_seqlens);

  const int64_t num_tokens = rewards.numel();
  const at::Tensor bounds = cu_seqlens.contiguous();
  check_boundaries(bounds, num_tokens);

  const at::Tensor r = rewards.contiguous();
  const at::Tensor v = values.contiguous();
  at::Tensor advantages = at::empty_like(r);
  at::Tensor returns = at::empty_like(r);

  // Threads pay off from about this many tokens; a sequence is never split.
  constexpr int64_t kTokensPerTask = 16384;
  const int64_t num_sequences = bounds.numel() - 1;
  const int64_t grain = std::max<int64_t>(1, num_sequences * kTokensPerTask / std::max<int64_t>(1, num_tokens));

  AT_DISPATCH_FLOATING_TYPES(r.scalar_type(), "packed_gae", [&] {
    const auto* bound = bounds.const_data_ptr<int32_t>();
    const auto* reward = r.const_data_ptr<scalar_t>();
    const auto* value = v.const_data_ptr<scalar_t>();
    auto* advantage = advantages.mutable_data_ptr<scalar_t>();
    auto* ret = returns.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, num_sequences, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t t = bound[i];
        gae_of_sequence(reward + t, value + t, advantage + t, ret + t, bound[i + 1] - t, Discount{gamma, gae_lambda});
      }
    });
  });
  return {advantages, returns};
}

TORCH_LIBRARY_IMPL(megatron_orz, CPU, m) {
  m.impl("packed_gae", &packed_gae);
}

}  // namespace
}  // namespace megatron_orz
