// What each op asks of its arguments on any device. A device adds what its own kernels ask beyond that.
#pragma once

#include "checks.h"

namespace megatron_orz {

// A block of logits and the targets of its rows.
inline void check_block(const at::Tensor& logits, const at::Tensor& targets) {
  CHECK_2D(logits);
  CHECK_CONTIGUOUS(logits);
  const int64_t n = logits.size(0);
  CHECK_SHAPE(targets, n);
  CHECK_DTYPE(targets, at::kLong);
  CHECK_SAME_DEVICE(logits, targets);
}

inline void check_dlogits(
    const at::Tensor& logits,
    const at::Tensor& targets,
    const at::Tensor& log_sum_exp,
    const at::Tensor& entropy,
    const at::Tensor& grad_log_prob,
    const at::Tensor& grad_entropy,
    const at::Tensor& out) {
  check_block(logits, targets);
  const int64_t n = logits.size(0);
  for (const at::Tensor* of_row : {&log_sum_exp, &entropy, &grad_log_prob, &grad_entropy}) {
    CHECK_SHAPE(*of_row, n);
    CHECK_SAME_DTYPE(logits, *of_row);
    CHECK_CONTIGUOUS(*of_row);
    CHECK_SAME_DEVICE(logits, *of_row);
  }
  CHECK_SAME_SHAPE(logits, out);
  CHECK_CONTIGUOUS(out);
  CHECK_SAME_DEVICE(logits, out);
}

inline void check_packed_value_loss(
    const at::Tensor& hidden,
    const at::Tensor& head,
    const at::Tensor& old_values,
    const at::Tensor& returns,
    const at::Tensor& weights,
    const at::Tensor& d_head) {
  CHECK_2D(hidden);
  CHECK_CONTIGUOUS(hidden);
  const int64_t T = hidden.size(0);
  const int64_t H = hidden.size(1);
  const at::ScalarType wide = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  CHECK_SHAPE(head, H);
  CHECK_SAME_DTYPE(hidden, head);
  CHECK_SAME_DEVICE(hidden, head);
  for (const at::Tensor* of_token : {&old_values, &returns, &weights}) {
    CHECK_SHAPE(*of_token, T);
    CHECK_DTYPE(*of_token, wide);
    CHECK_SAME_DEVICE(hidden, *of_token);
  }
  CHECK_SHAPE(d_head, H);
  CHECK_DTYPE(d_head, wide);
  CHECK_CONTIGUOUS(d_head);
  CHECK_SAME_DEVICE(hidden, d_head);
}

inline void check_packed_gae(
    const at::Tensor& rewards, const at::Tensor& values, const at::Tensor& cu_seqlens, const at::Tensor& loss_mask) {
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
}

}  // namespace megatron_orz
