// Every op of the extension once: formula, shapes, and its signature as a torch schema. The Python faces are in
// megatron_orz/ops, the same formulas in plain PyTorch in megatron_orz/ops/reference.py.
//
// Letters: T packed tokens, B sequences in a pack. `cu_seqlens` is [B + 1] int32: first 0, last T, never falling.
//
// To add an op: write its signature here and define it in bindings.cpp; implement it in csrc/cpu/<op>.cpp and
// csrc/cuda/<op>.{cpp,cu}, each file registering its own implementation; give it a reference and a Python face.
#pragma once

namespace megatron_orz {

// Generalised advantage estimation, restarting at every sequence; the state after its last token has value 0.
//
//   delta_t = r_t + gamma V_{t+1} - V_t
//   A_t     = delta_t + gamma lambda A_{t+1}
//   R_t     = A_t + V_t
//
// rewards, values: [T] float32 or float64; advantages, returns: [T] of the same type. Not differentiable.
inline constexpr char kPackedGae[] =
    "packed_gae(Tensor rewards, Tensor values, Tensor cu_seqlens, float gamma, float gae_lambda)"
    " -> (Tensor advantages, Tensor returns)";

}  // namespace megatron_orz
