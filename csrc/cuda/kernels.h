// The CUDA launchers of this directory, one for each op of ops.h, where the formulas are. Needs no header of CUDA or
// torch.
//
// How each is called
//   - Pointers are to contiguous device memory, aligned to its elements. Rows that all begin on 16 bytes are read 16
//     bytes at a time; others work and are slower. Arrays do not overlap unless said so.
//   - Work is queued on `stream`; nothing is allocated, copied to the host or synchronised. A failed launch is left for
//     cudaGetLastError (C10_CUDA_KERNEL_LAUNCH_CHECK).
//   - No sum uses atomics: results repeat bit for bit.
//   - Any size may be 0.
//   - `workspace` points to 16-byte aligned scratch memory of `<name>_workspace_bytes(...)` bytes, dead after the call.
//
// Letters: T packed tokens, B sequences, H hidden size, n rows and v columns of a block of logits.
#pragma once

#include <cstddef>
#include <cstdint>

typedef struct CUstream_st* cudaStream_t;

namespace megatron_orz::cuda {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16, kFloat64 };

// Row statistics of a block of logits. logits: [n, v]; targets: [n]; stats: [n, 4] = (m, s, y, t), 16-byte aligned.
// A row of nothing but -inf gives (-inf, 0, 0, t).
void logits_stats(
    const float* logits, const int64_t* targets, int64_t vocab_start, float* stats, int64_t n, int64_t v, float scale,
    bool entropy, cudaStream_t stream);

// Gradient with respect to such a block. out: [n, v] float32, which may be logits, or bfloat16 or float16.
void dlogits(
    const float* logits, const int64_t* targets, int64_t vocab_start, const float* log_sum_exp, const float* entropy,
    const float* grad_log_prob, const float* grad_entropy, void* out, Dtype dtype, int64_t n, int64_t v, float scale,
    cudaStream_t stream);

// Value head, and the gradients of its clipped squared error; hidden states are read once.
//
// hidden, d_hidden: [T, H] and head: [H], all float32, bfloat16 or float16; products are added in float32.
// old_values, returns, weights, values: [T] float32; d_head: [H] float32, added to.
// H is at most kMaxValueHidden: a row of float32 in shared memory.
constexpr int64_t kMaxValueHidden = 40960;
size_t packed_value_loss_workspace_bytes(int64_t num_tokens, int64_t hidden_size);
void packed_value_loss(
    const void* hidden, const void* head, Dtype dtype, const float* old_values, const float* returns,
    const float* weights, float* values, void* d_hidden, float* d_head, void* workspace, int64_t num_tokens,
    int64_t hidden_size, float clip_eps, cudaStream_t stream);

// Generalised advantage estimation, carried in float64, and the moments (count, mean, M2) of the advantages that the
// mask selects.
//
// rewards, values, advantages, returns: [T] float32 or float64; cu_seqlens: [B + 1] int32, its values trusted;
// mask: [T]; moments: [3] float64.
size_t packed_gae_workspace_bytes(int64_t num_sequences);
void packed_gae(
    const void* rewards, const void* values, Dtype dtype, const int32_t* cu_seqlens, const bool* mask,
    void* advantages, void* returns, double* moments, void* workspace, int64_t num_sequences, double gamma,
    double gae_lambda, cudaStream_t stream);

}  // namespace megatron_orz::cuda
