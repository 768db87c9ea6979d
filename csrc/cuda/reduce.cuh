// Reductions over a warp and a block, each in an order fixed by the shape.
#pragma once

#include "device.cuh"

namespace megatron_orz::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

// Applies a 32-bit shuffle to every word of x.
template <typename T, typename Shuffle>
__device__ __forceinline__ T shuffle_words(const T& x, Shuffle shuffle) {
  constexpr int kWords = sizeof(T) / 4;
  static_assert(sizeof(T) % 4 == 0);
  unsigned words[kWords];
  memcpy(words, &x, sizeof(T));
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    words[i] = shuffle(words[i]);
  }
  T result;
  memcpy(&result, words, sizeof(T));
  return result;
}

template <typename T>
__device__ __forceinline__ T shuffle_xor(const T& x, int mask) {
  return shuffle_words(x, [=](unsigned word) { return __shfl_xor_sync(kAllLanes, word, mask); });
}

// x of the lane `distance` below; one's own where there is none.
template <typename T>
__device__ __forceinline__ T shuffle_up(const T& x, int distance) {
  return shuffle_words(x, [=](unsigned word) { return __shfl_up_sync(kAllLanes, word, distance); });
}

struct Add {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

template <typename T, int N>
struct Array {
  T at[N];

  friend __device__ Array operator+(Array a, Array b) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      a.at[i] += b.at[i];
    }
    return a;
  }
};

template <typename T, typename Combine>
__device__ __forceinline__ T warp_reduce(T x, Combine combine) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x = combine(x, shuffle_xor(x, distance));
  }
  return x;
}

// Every thread gets the result, to the last bit the same if `combine` commutes to the last bit. A block is whole warps.
template <typename T, typename Combine>
__device__ __forceinline__ T block_reduce(T x, Combine combine, T identity) {
  __shared__ T of_warp[kWarp];
  const int lane = threadIdx.x % kWarp;
  x = warp_reduce(x, combine);
  __syncthreads();  // a block that reduces again overwrites what slower warps may still read
  if (lane == 0) {
    of_warp[threadIdx.x / kWarp] = x;
  }
  __syncthreads();
  return warp_reduce(lane < static_cast<int>(blockDim.x) / kWarp ? of_warp[lane] : identity, combine);
}

}  // namespace megatron_orz::cuda
