// Checks of op arguments. Every message prints what was given; failures are ValueError in Python.
#pragma once

#include <ATen/core/Formatting.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>

namespace megatron_orz {

#define CHECK_1D(x) TORCH_CHECK_VALUE((x).dim() == 1, #x " must have one dimension, not shape ", (x).sizes())

#define CHECK_2D(x) TORCH_CHECK_VALUE((x).dim() == 2, #x " must have two dimensions, not shape ", (x).sizes())

#define CHECK_CONTIGUOUS(x) \
  TORCH_CHECK_VALUE( \
      (x).is_contiguous(), #x " must be contiguous; it is ", (x).sizes(), " with strides ", (x).strides())

#define CHECK_SHAPE(x, ...) \
  TORCH_CHECK_VALUE( \
      (x).sizes() == at::IntArrayRef({__VA_ARGS__}), \
      #x " must be [" #__VA_ARGS__ "] = ", at::IntArrayRef({__VA_ARGS__}), ", not ", (x).scalar_type(), " ", \
      (x).sizes(), " on ", (x).device())

#define CHECK_DTYPE(x, expected) \
  TORCH_CHECK_VALUE((x).scalar_type() == (expected), #x " must be ", (expected), ", not ", (x).scalar_type())

#define CHECK_SAME_SHAPE(x, y) \
  TORCH_CHECK_VALUE( \
      (x).sizes() == (y).sizes(), #x " and " #y " must have one shape, not ", (x).sizes(), " and ", (y).sizes())

#define CHECK_SAME_DTYPE(x, y) \
  TORCH_CHECK_VALUE( \
      (x).scalar_type() == (y).scalar_type(), \
      #x " and " #y " must have one dtype, not ", (x).scalar_type(), " and ", (y).scalar_type())

#define CHECK_SAME_DEVICE(x, y) \
  TORCH_CHECK_VALUE( \
      (x).device() == (y).device(), #x " and " #y " must be on one device, not ", (x).device(), " and ", (y).device())

// A kernel that trusted a wrong boundary would read outside its arrays. Reads the values: CPU tensors only.
inline void check_boundaries(const at::Tensor& cu_seqlens, int64_t num_tokens) {
  const auto* bounds = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t last = cu_seqlens.numel() - 1;
  TORCH_CHECK_VALUE(
      last >= 0 && bounds[0] == 0 && bounds[last] == num_tokens,
      "cu_seqlens must run from 0 to the ", num_tokens, " packed tokens, but is ", cu_seqlens);
  for (int64_t i = 0; i < last; ++i) {
    TORCH_CHECK_VALUE(
        bounds[i] <= bounds[i + 1], "cu_seqlens falls from ", bounds[i], " to ", bounds[i + 1], " at sequence ", i);
  }
}

}  // namespace megatron_orz
