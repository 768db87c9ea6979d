// The Python module megatron_orz._C. Importing it defines the ops, which are then called as torch.ops.megatron_orz.*;
// their implementations register themselves in csrc/cpu and csrc/cuda.

#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "ops.h"

TORCH_LIBRARY(megatron_orz, m) {
  m.def(megatron_orz::kPackedGae);
  m.def(megatron_orz::kLogitsStats);
  m.def(megatron_orz::kDlogits);
  m.def(megatron_orz::kPackedValueLoss);
  m.def(megatron_orz::kLongestPreviousFactor);
  m.def(megatron_orz::kSlotAttention);
  m.def(megatron_orz::kRmsNorm);
  m.def(megatron_orz::kRmsNormBackward);
  m.def(megatron_orz::kSwiglu);
  m.def(megatron_orz::kSwigluBackward);
  m.def(megatron_orz::kRotate);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of megatron_orz, registered as torch.ops.megatron_orz";
}
