// Generalised advantage estimation over packed sequences: a block a sequence, from its last token to its first.
//
// Reads: rewards, values and mask, once. Saves: nothing. Overwrites: advantages, returns, moments, the workspace.
//
// A token maps the advantage after it to its own, A -> delta + gamma lambda A. Such maps compose to maps of the same
// kind, so a tile of tokens is a scan: each thread composes those of its tokens, a warp scans its threads, and every
// thread walks over the warps' maps to what its own warp starts from and to what the next tile does. Nothing is divided
// by a power of the discount, so gamma lambda may be 1 or 0.
//
// A block saves the moments of its sequence, [B, 3] float64 in the workspace, and a last block merges them in an order
// that depends on B alone.

#include "moments.cuh"

namespace megatron_orz::cuda {
namespace {

constexpr int kBlock = 256;
constexpr int kWarps = kBlock / kWarp;
constexpr int kPerThread = 4;

struct Affine {
  double offset, slope;

  __device__ double operator()(double x) const { return offset + slope * x; }
};

// x -> outer(inner(x))
__device__ __forceinline__ Affine compose(const Affine& outer, const Affine& inner) {
  return {outer(inner.offset), outer.slope * inner.slope};
}

template <typename T>
__global__ void __launch_bounds__(kBlock) packed_gae_kernel(
    const T* __restrict__ rewards, const T* __restrict__ values, const int32_t* __restrict__ cu_seqlens,
    const bool* __restrict__ mask, T* __restrict__ advantages, T* __restrict__ returns,
    Moments* __restrict__ of_sequence, double gamma, double discount) {
  __shared__ Affine of_warp[2][kWarps];  // by turns, so that one barrier a tile is enough
  const int64_t begin = cu_seqlens[blockIdx.x];
  const int64_t end = cu_seqlens[blockIdx.x + 1];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  double after_tile = 0.;  // the advantage of the token after the tile
  Moments moments{};
  int turn = 0;
  for (int64_t tile_end = end; tile_end > begin; tile_end -= kBlock * kPerThread, turn ^= 1) {
    const int64_t last = tile_end - 1 - threadIdx.x * kPerThread;  // of this thread's tokens, last to first
    double value[kPerThread], delta[kPerThread];
    Affine map{0., 1.};
    double next_value = last >= begin && last + 1 < end ? static_cast<double>(values[last + 1]) : 0.;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (last - i >= begin) {
        value[i] = values[last - i];
        delta[i] = rewards[last - i] + gamma * next_value - value[i];
        next_value = value[i];
        map = compose({delta[i], discount}, map);
      }
    }

    // Lane by lane towards the front: a lane's map goes outside those of the lanes below it.
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const Affine below = shuffle_up(map, distance);
      if (lane >= distance) {
        map = compose(map, below);
      }
    }
    if (lane == kWarp - 1) {
      of_warp[turn][warp] = map;
    }
    __syncthreads();
    double before_warp = 0.;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      before_warp = i == warp ? after_tile : before_warp;
      after_tile = of_warp[turn][i](after_tile);
    }
    const Affine below = shuffle_up(map, 1);
    double advantage = lane == 0 ? before_warp : below(before_warp);

#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (const int64_t t = last - i; t >= begin) {
        advantage = delta[i] + discount * advantage;
        const T rounded = static_cast<T>(advantage);
        advantages[t] = rounded;
        returns[t] = static_cast<T>(advantage + value[i]);
        if (mask[t]) {
          moments = merge_moments(moments, {1., static_cast<double>(rounded), 0.});
        }
      }
    }
  }
  moments = block_moments(moments);
  if (threadIdx.x == 0) {
    of_sequence[blockIdx.x] = moments;
  }
}

__global__ void __launch_bounds__(kBlock)
    combine_moments_kernel(const Moments* __restrict__ parts, Moments* __restrict__ whole, int64_t n) {
  Moments moments{};
  for (int64_t i = threadIdx.x; i < n; i += kBlock) {
    moments = merge_moments(moments, parts[i]);
  }
  moments = block_moments(moments);
  if (threadIdx.x == 0) {
    *whole = moments;
  }
}

}  // namespace

size_t packed_gae_workspace_bytes(int64_t num_sequences) { return num_sequences * sizeof(Moments); }

void packed_gae(
    const void* rewards, const void* values, Dtype dtype, const int32_t* cu_seqlens, const bool* mask,
    void* advantages, void* returns, double* moments, void* workspace, int64_t num_sequences, double gamma,
    double gae_lambda, cudaStream_t stream) {
  const auto of_sequence = static_cast<Moments*>(workspace);
  const auto launch_as = [&](auto zero) {
    using T = decltype(zero);
    launch(
        packed_gae_kernel<T>, {num_sequences, kBlock}, stream,
        static_cast<const T*>(rewards), static_cast<const T*>(values), cu_seqlens, mask, static_cast<T*>(advantages),
        static_cast<T*>(returns), of_sequence, gamma, gamma * gae_lambda);
  };
  dtype == Dtype::kFloat64 ? launch_as(double{}) : launch_as(float{});
  launch(combine_moments_kernel, {1, kBlock}, stream, of_sequence, reinterpret_cast<Moments*>(moments), num_sequences);
}

}  // namespace megatron_orz::cuda
