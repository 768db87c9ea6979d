// Value head and the gradients of its clipped squared error, in one pass over the hidden states.
//
// Reads: hidden [T, H] once; three numbers a token. Saves: nothing. Adds to: d_head. Overwrites: values, d_hidden, the
// workspace.
//
// A block takes kRows rows at a time, twice: for their dot products with the head, then for the gradients, when they
// come from the cache. A thread has the same columns of every row and sums their d_head in shared memory. Each block
// saves its d_head, [num_blocks, H] float32 in the workspace, and add_column_sums adds those of all blocks.

#include "reduce.cuh"

namespace megatron_orz::cuda {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kBlocksPerProcessor = 2;
constexpr int kMaxBlocks = kBlocksPerProcessor * 132;  // the multiprocessors of an H100 or H200
constexpr int kRows = 4;

struct Tokens {
  const float* old_values;
  const float* returns;
  const float* weights;
  float* values;
  int64_t count;
  float clip_eps;
};

// The gradient of token t's loss with respect to its value.
__device__ __forceinline__ float value_gradient(const Tokens& tokens, int64_t t, float value) {
  const float weight = tokens.weights[t];
  if (weight == 0.f) {
    return 0.f;  // whatever the token holds
  }
  const float error = value - tokens.returns[t];
  const float eps = tokens.clip_eps;
  if (eps > 0.f) {
    // A value within the range comes back unchanged, to the last bit.
    const float clipped = fminf(fmaxf(value, tokens.old_values[t] - eps), tokens.old_values[t] + eps);
    if (fabsf(clipped - tokens.returns[t]) > fabsf(error)) {
      return 0.f;
    }
  }
  return weight * error;
}

template <int N>
__device__ __forceinline__ void store_shared(float* p, const Pack<float, N>& x) {
  if constexpr (N == 1) {
    *p = x.at[0];
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      reinterpret_cast<float4*>(p)[i / 4] = make_float4(x.at[i], x.at[i + 1], x.at[i + 2], x.at[i + 3]);
    }
  }
}

// Packs of kWidth columns, which divides H.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerProcessor) value_loss_kernel(
    const T* __restrict__ hidden, const T* __restrict__ head, Tokens tokens, T* __restrict__ d_hidden,
    float* __restrict__ d_head_of_block, int hidden_size) {
  DYNAMIC_SHARED(float, d_head);  // [H], of a column only ever touched by its thread
  const int first_column = threadIdx.x * kWidth;
  const int stride = blockDim.x * kWidth;
  for (int column = first_column; column < hidden_size; column += stride) {
    store_shared(d_head + column, Pack<float, kWidth>{});
  }

  for (int64_t first = int64_t{blockIdx.x} * kRows; first < tokens.count; first += int64_t{gridDim.x} * kRows) {
    const int num_rows = tokens.count - first < kRows ? static_cast<int>(tokens.count - first) : kRows;
    const T* row = hidden + first * hidden_size;
    T* d_row = d_hidden + first * hidden_size;

    Array<float, kRows> value{};
    for (int column = first_column; column < hidden_size; column += stride) {
      const auto w = load_pack<kWidth>(head + column);
      Pack<T, kWidth> h[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        h[r] = load_pack<kWidth>(row + min(r, num_rows - 1) * hidden_size + column);
      }
#pragma unroll
      for (int i = 0; i < kRows * kWidth; ++i) {
        value.at[i / kWidth] += to_float(h[i / kWidth].at[i % kWidth]) * to_float(w.at[i % kWidth]);
      }
    }
    value = block_reduce(value, Add{}, Array<float, kRows>{});

    float d_value[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < num_rows) {
        d_value[r] = value_gradient(tokens, first + r, value.at[r]);
        if (threadIdx.x == 0) {
          tokens.values[first + r] = value.at[r];
        }
      }
    }
    for (int column = first_column; column < hidden_size; column += stride) {
      const auto w = load_pack<kWidth>(head + column);
      auto d_w = load_pack<kWidth>(d_head + column);
      Pack<T, kWidth> h[kRows]{};
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (d_value[r] != 0.f) {  // the prompt's rows may hold anything, and need no second reading
          h[r] = load_pack<kWidth>(row + r * hidden_size + column);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r < num_rows) {
          Pack<float, kWidth> d_h;
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            d_w.at[i] += d_value[r] * to_float(h[r].at[i]);
            d_h.at[i] = d_value[r] * to_float(w.at[i]);
          }
          store_pack(d_row + r * hidden_size + column, d_h);
        }
      }
      store_shared(d_head + column, d_w);
    }
  }

  for (int column = first_column; column < hidden_size; column += stride) {
    store_pack(d_head_of_block + int64_t{blockIdx.x} * hidden_size + column, load_pack<kWidth>(d_head + column));
  }
}

// out[c] += sum of column c of [num_rows, num_columns].
//
// A block takes 32 columns; its warps share the rows, and the first adds up their sums.
constexpr int kColumnSumWarps = 8;

__global__ void __launch_bounds__(kColumnSumWarps * kWarp) add_column_sums_kernel(
    const float* __restrict__ rows, float* __restrict__ out, int64_t num_rows, int64_t num_columns) {
  __shared__ float of_warp[kColumnSumWarps][kWarp];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t column = blockIdx.x * int64_t{kWarp} + lane;
  float sum = 0.f;
  if (column < num_columns) {
#pragma unroll 4
    for (int64_t row = warp; row < num_rows; row += kColumnSumWarps) {
      sum += rows[row * num_columns + column];
    }
  }
  of_warp[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && column < num_columns) {
    float total = 0.f;
    for (int i = 0; i < kColumnSumWarps; ++i) {
      total += of_warp[i][lane];
    }
    out[column] += total;
  }
}

void add_column_sums(const float* rows, float* out, int64_t num_rows, int64_t num_columns, cudaStream_t stream) {
  launch(
      add_column_sums_kernel, {ceil_div<int64_t>(num_columns, kWarp), kColumnSumWarps * kWarp}, stream,
      rows, out, num_rows, num_columns);
}

int64_t num_value_blocks(int64_t num_tokens) {
  const int64_t num_blocks = ceil_div<int64_t>(num_tokens, kRows);
  return num_blocks < kMaxBlocks ? num_blocks : kMaxBlocks;
}

template <typename T>
void launch_value_loss(
    const T* hidden, const T* head, const Tokens& tokens, T* d_hidden, float* d_head_of_block,
    int64_t hidden_size, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const bool aligned = rows_are_aligned(hidden, hidden_size, 16) && rows_are_aligned(d_hidden, hidden_size, 16) &&
                       rows_are_aligned(head, 0, 16);
  const auto kernel = aligned ? value_loss_kernel<T, kWidth> : value_loss_kernel<T, 1>;
  // As many threads as share the packs of a row evenly, in as few turns as kMaxThreads allows.
  const int num_packs = static_cast<int>(ceil_div<int64_t>(hidden_size, aligned ? kWidth : 1));
  const int num_turns = ceil_div(num_packs, kMaxThreads);
  const int num_threads = num_packs == 0 ? kWarp : ceil_div(ceil_div(num_packs, num_turns), kWarp) * kWarp;
  launch(
      kernel, {num_value_blocks(tokens.count), num_threads, hidden_size * sizeof(float)}, stream,
      hidden, head, tokens, d_hidden, d_head_of_block, static_cast<int>(hidden_size));
}

}  // namespace

size_t packed_value_loss_workspace_bytes(int64_t num_tokens, int64_t hidden_size) {
  return num_value_blocks(num_tokens) * hidden_size * sizeof(float);
}

void packed_value_loss(
    const void* hidden, const void* head, Dtype dtype, const float* old_values, const float* returns,
    const float* weights, float* values, void* d_hidden, float* d_head, void* workspace, int64_t num_tokens,
    int64_t hidden_size, float clip_eps, cudaStream_t stream) {
  const Tokens tokens{old_values, returns, weights, values, num_tokens, clip_eps};
  const auto d_head_of_block = static_cast<float*>(workspace);
  const auto launch_as = [&](auto zero) {
    using T = decltype(zero);
    launch_value_loss(
        static_cast<const T*>(hidden), static_cast<const T*>(head), tokens, static_cast<T*>(d_hidden), d_head_of_block,
        hidden_size, stream);
  };
  if (dtype == Dtype::kFloat32) {
    launch_as(float{});
  } else if (dtype == Dtype::kBFloat16) {
    launch_as(__nv_bfloat16{});
  } else {
    launch_as(__half{});
  }
  add_column_sums(d_head_of_block, d_head, num_value_blocks(num_tokens), hidden_size, stream);
}

}  // namespace megatron_orz::cuda
