// The ops on CUDA: checks, memory, and the device and stream on which the launchers of kernels.h do the work.
//
// Of torch's CUDA headers only those of c10 are used: they compile against a CPU build of torch, so that
// tools/check_kernels.py can check this file on any machine.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "../arguments.h"
#include "kernels.h"

namespace megatron_orz {
namespace {

using cuda::Dtype;

Dtype dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    case at::kDouble:
      return Dtype::kFloat64;
    default:
      TORCH_CHECK_VALUE(false, "there is no CUDA kernel for ", x.scalar_type());
  }
}

at::Tensor workspace_of(size_t num_bytes, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(num_bytes)}, like.options().dtype(at::kByte));
}

at::Tensor logits_stats(
    const at::Tensor& logits, const at::Tensor& targets, int64_t vocab_start, double scale, bool entropy) {
  check_block(logits, targets);
  CHECK_DTYPE(logits, at::kFloat);
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor ids = targets.contiguous();
  at::Tensor stats = at::empty({logits.size(0), 4}, logits.options());
  cuda::logits_stats(
      logits.const_data_ptr<float>(), ids.const_data_ptr<int64_t>(), vocab_start, stats.mutable_data_ptr<float>(),
      logits.size(0), logits.size(1), static_cast<float>(scale), entropy, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return stats;
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
  CHECK_DTYPE(logits, at::kFloat);
  TORCH_CHECK_VALUE(
      out.scalar_type() == at::kFloat || out.scalar_type() == at::kBFloat16 || out.scalar_type() == at::kHalf,
      "out must be float32, bfloat16 or float16, not ", out.scalar_type());

  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor ids = targets.contiguous();
  cuda::dlogits(
      logits.const_data_ptr<float>(), ids.const_data_ptr<int64_t>(), vocab_start, log_sum_exp.const_data_ptr<float>(),
      entropy.const_data_ptr<float>(), grad_log_prob.const_data_ptr<float>(), grad_entropy.const_data_ptr<float>(),
      out.mutable_data_ptr(), dtype_of(out), logits.size(0), logits.size(1), static_cast<float>(scale),
      c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
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
  TORCH_CHECK_VALUE(
      hidden.scalar_type() == at::kFloat || hidden.scalar_type() == at::kBFloat16 || hidden.scalar_type() == at::kHalf,
      "hidden must be float32, bfloat16 or float16, not ", hidden.scalar_type());
  TORCH_CHECK_VALUE(
      H <= cuda::kMaxValueHidden, "a hidden size of ", H, " is more than the ", cuda::kMaxValueHidden,
      " of which a row of float32 fits in shared memory");

  const c10::cuda::CUDAGuard guard(hidden.device());
  const at::Tensor w = head.contiguous();
  const at::Tensor old = old_values.contiguous();
  const at::Tensor ret = returns.contiguous();
  const at::Tensor weight = weights.contiguous();
  at::Tensor values = at::empty({T}, hidden.options().dtype(at::kFloat));
  at::Tensor d_hidden = at::empty_like(hidden);
  at::Tensor workspace = workspace_of(cuda::packed_value_loss_workspace_bytes(T, H), hidden);
  cuda::packed_value_loss(
      hidden.const_data_ptr(), w.const_data_ptr(), dtype_of(hidden), old.const_data_ptr<float>(),
      ret.const_data_ptr<float>(), weight.const_data_ptr<float>(), values.mutable_data_ptr<float>(),
      d_hidden.mutable_data_ptr(), d_head.mutable_data_ptr<float>(), workspace.mutable_data_ptr(), T, H,
      static_cast<float>(clip_eps), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {values, d_hidden};
}

// The values of cu_seqlens are trusted: to look at them would wait for the device.
std::tuple<at::Tensor, at::Tensor, at::Tensor> packed_gae(
    const at::Tensor& rewards,
    const at::Tensor& values,
    const at::Tensor& cu_seqlens,
    const at::Tensor& loss_mask,
    double gamma,
    double gae_lambda) {
  check_packed_gae(rewards, values, cu_seqlens, loss_mask);
  TORCH_CHECK_VALUE(
      rewards.scalar_type() == at::kFloat || rewards.scalar_type() == at::kDouble,
      "rewards must be float32 or float64, not ", rewards.scalar_type());
  const int64_t num_sequences = cu_seqlens.numel() - 1;
  TORCH_CHECK_VALUE(num_sequences >= 0, "cu_seqlens must be [B + 1], not ", cu_seqlens.sizes());

  const c10::cuda::CUDAGuard guard(rewards.device());
  const at::Tensor r = rewards.contiguous();
  const at::Tensor v = values.contiguous();
  const at::Tensor bounds = cu_seqlens.contiguous();
  const at::Tensor mask = loss_mask.contiguous();
  at::Tensor advantages = at::empty_like(r);
  at::Tensor returns = at::empty_like(r);
  at::Tensor moments = at::empty({3}, r.options().dtype(at::kDouble));
  at::Tensor workspace = workspace_of(cuda::packed_gae_workspace_bytes(num_sequences), r);
  cuda::packed_gae(
      r.const_data_ptr(), v.const_data_ptr(), dtype_of(r), bounds.const_data_ptr<int32_t>(),
      mask.const_data_ptr<bool>(), advantages.mutable_data_ptr(), returns.mutable_data_ptr(),
      moments.mutable_data_ptr<double>(), workspace.mutable_data_ptr(), num_sequences, gamma, gae_lambda,
      c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {advantages, returns, moments};
}

}  // namespace

TORCH_LIBRARY_IMPL(megatron_orz, CUDA, m) {
  m.impl("logits_stats", &logits_stats);
  m.impl("dlogits", &dlogits);
  m.impl("packed_value_loss", &packed_value_loss);
  m.impl("packed_gae", &packed_gae);
}

}  // namespace megatron_orz
