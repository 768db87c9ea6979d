// Every op of the extension once: formula, shapes, and its signature as a torch schema. The Python faces are in
// megatron_orz/ops, the same formulas in plain PyTorch in megatron_orz/ops/reference.py.
//
// Letters: T packed tokens, B sequences in a pack, n tokens and v columns of a block of logits. `cu_seqlens` is
// [B + 1] int32: first 0, last T, never falling.
//
// To add an op: write its signature here and define it in bindings.cpp; implement it in csrc/cpu/<op>.cpp, which
// registers it, and in csrc/cuda/<op>.cu, which csrc/cuda/bindings.cpp registers; give it a reference and a Python face.
#pragma once

namespace megatron_orz {

// Generalised advantage estimation, restarting at every sequence; the state after its last token has value 0.
//
//   delta_t = r_t + gamma V_{t+1} - V_t
//   A_t     = delta_t + gamma lambda A_{t+1}
//   R_t     = A_t + V_t
//
// rewards, values: [T] float32 or float64; loss_mask: [T] bool; advantages, returns: [T] of the same type. moments: [3]
// float64, the count of the advantages under the mask, their mean, and the sum of their squared deviations from it; 0
// under an empty mask, and untouched by what lies outside, NaN included. Not differentiable.
inline constexpr char kPackedGae[] =
    "packed_gae(Tensor rewards, Tensor values, Tensor cu_seqlens, Tensor loss_mask, float gamma, float gae_lambda)"
    " -> (Tensor advantages, Tensor returns, Tensor moments)";

// What softmax needs of a block of logits z: v columns of the vocabulary, from vocab_start on. With x = scale z,
//
//   m = max_v x_v,  s = sum_v e^(x_v - m),  y = sum_v (x_v - m) e^(x_v - m),  t = x_target, 0 if it lies elsewhere
//
// logits: [n, v] float32 (on the CPU also float64), contiguous; targets: [n] int64, ids in the whole vocabulary;
// stats: [n, 4] = (m, s, y, t) of the logits' type. y is 0 without `entropy`; without columns m is -inf and s is 0.
// NaN stays NaN. Blocks, and the shards of tensor-parallel ranks, combine in Python: `reference.combine_stats`.
inline constexpr char kLogitsStats[] =
    "logits_stats(Tensor logits, Tensor targets, int vocab_start, float scale, bool entropy) -> Tensor stats";

// The gradient of a loss with respect to such a block, where the loss has gradient g in each token's log-probability
// and h in its entropy H. With p_v = e^(x_v - lse),
//
//   out_v = scale (g [v is target] - p_v (g + h (x_v - lse + H)))
//
// log_sum_exp, entropy, grad_log_prob, grad_entropy: [n], contiguous, of the logits' type. out: [n, v], the logits
// themselves or another tensor of their type (on CUDA also bfloat16 or float16), contiguous.
inline constexpr char kDlogits[] =
    "dlogits(Tensor logits, Tensor targets, Tensor log_sum_exp, Tensor entropy, Tensor grad_log_prob,"
    " Tensor grad_entropy, int vocab_start, float scale, *, Tensor(a!) out) -> ()";

// A linear value head under the clipped squared error, and the gradient of the weighted sum of errors, in one pass:
//
//   V = hidden . head,  loss = 0.5 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)
//   d_value  = weight (V - R),  0 where the clipped square is the larger one
//   d_hidden = d_value head,  d_head += sum_t d_value_t hidden_t
//
// hidden: [T, H] float32, bfloat16, float16 or (on the CPU) float64, contiguous; head: [H] of its type; old_values,
// returns, weights, values: [T], and d_head: [H], float32 (float64 for float64 hidden); d_hidden: [T, H] of hidden's
// type. A token of weight 0 has a value but adds to no gradient, even if it is not finite. clip_eps 0: no clipping.
// d_head is summed in an order that depends on the shapes alone.
inline constexpr char kPackedValueLoss[] =
    "packed_value_loss(Tensor hidden, Tensor head, Tensor old_values, Tensor returns, Tensor weights, float clip_eps,"
    " *, Tensor(a!) d_head) -> (Tensor values, Tensor d_hidden)";

// How far each token continues what was there before: the length of the longest prefix of its suffix s_t s_{t+1} ...
// that also begins at an earlier position of its sequence. The two occurrences may overlap.
//
//   lpf_t = max_{u < t} (length of the longest common prefix of s_t s_{t+1} ... and s_u s_{u+1} ...)
//
// tokens: [T] int64; lpf: [T] int32, 0 for the first token of a sequence. On the CPU alone.
inline constexpr char kLongestPreviousFactor[] =
    "longest_previous_factor(Tensor tokens, Tensor cu_seqlens) -> Tensor lpf";

// Attention of one new token per row over keys and values that lie in slots of a cache. With K, V the first lengths_b
// of slot slots_b, of which a window w > 0 sees the last w alone, and kv the head that query head h shares:
//
//   out_bh = softmax(scale q_bh . K_kv) V_kv
//
// query: [B, heads, d]; keys, values: [S, kv_heads, C, d], contiguous, of its type; slots, lengths: [B] int64, every
// length at least 1. float32 or float64. On the CPU alone. Not differentiable.
inline constexpr char kSlotAttention[] =
    "slot_attention(Tensor query, Tensor keys, Tensor values, Tensor slots, Tensor lengths, float scale, int window)"
    " -> Tensor out";

// Root mean square normalisation of rows, r = (mean_i x_i^2 + eps)^(-1/2), out_i = x_i r w_i, and its gradients for a
// gradient g of the rows:
//
//   d_x_i = r (g_i w_i - x_i r^2 mean_j (g_j w_j x_j)),  d_w_i = sum_t g_ti x_ti r_t
//
// x, grad: [T, H], contiguous; weight, d_weight: [H]; inverse: [T], the r; one type, float32 or float64. d_weight is
// summed in an order that depends on the shapes alone. On the CPU alone.
inline constexpr char kRmsNorm[] = "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor out, Tensor inverse)";
inline constexpr char kRmsNormBackward[] =
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inverse) -> (Tensor d_x, Tensor d_weight)";

// The gated activation of a row [a, b], out = silu(a) b, and for a gradient g of it [d_a, d_b]. With s = sigmoid(a):
//
//   d_a = g b s (1 + a (1 - s)),  d_b = g a s
//
// x, d_x: [T, 2 F]; out, grad: [T, F]; contiguous, float32 or float64. On the CPU alone.
inline constexpr char kSwiglu[] = "swiglu(Tensor x) -> Tensor out";
inline constexpr char kSwigluBackward[] = "swiglu_backward(Tensor grad, Tensor x) -> Tensor d_x";

// Rotary position embedding: pair i of a head's d features, x_i and x_{i + d/2}, turned by the token's angle theta_i;
// `back` turns the other way, which is the gradient.
//
//   out_i = x_i cos - x_{i + d/2} sin,  out_{i + d/2} = x_{i + d/2} cos + x_i sin
//
// x: [T, heads, d], contiguous within a head; cos, sin: [T, d/2], contiguous, of its type, float32 or float64; out:
// [T, heads, d], contiguous. On the CPU alone.
inline constexpr char kRotate[] = "rotate(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor out";

}  // namespace megatron_orz
