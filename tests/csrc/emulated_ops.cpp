// csrc/cuda/bindings.cpp on CPU tensors, with the launchers of the emulator: its ops are torch.ops.emulated.*.

#include <torch/library.h>

#include "../../csrc/ops.h"

TORCH_LIBRARY(emulated, m) {
  m.def(megatron_orz::kPackedGae);
  m.def(megatron_orz::kLogitsStats);
  m.def(megatron_orz::kDlogits);
  m.def(megatron_orz::kPackedValueLoss);
}

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(ns, key, m) _TORCH_LIBRARY_IMPL(emulated, CPU, m, C10_UID)

#include "../../csrc/cuda/bindings.cpp"
