// What every kernel shares: 16-byte accesses of any float type, the fast exponential, the launch.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#else
#include "emulator.h"  // the same names on the CPU, for tests
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace megatron_orz::cuda {

constexpr float kLog2E = 1.44269504088896f;
constexpr float kLn2 = 0.693147180559945f;
// Stands in for -inf where -inf times 0 would give NaN.
constexpr float kLowest = -1e30f;

// 2^x in one instruction, relative error below 2^-22; 0 for x < -126.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half(x);
  } else {
    return __float2bfloat16(x);
  }
}

// Two numbers rounded to 16 bits each, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pair_bits(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, 4);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, 4);
  }
  return bits;
}

// N neighbours in a row.
template <typename T, int N>
struct Pack {
  T at[N];
};

// What moves a pack in one access, or in accesses of 16 bytes.
template <int kBytes>
using Word = std::conditional_t<
    kBytes % 16 == 0, uint4,
    std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;

// p is aligned to the pack's word.
template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* p) {
  using W = Word<sizeof(Pack<T, N>)>;
  W words[sizeof(Pack<T, N>) / sizeof(W)];
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(words) / sizeof(W)); ++i) {
    words[i] = reinterpret_cast<const W*>(p)[i];
  }
  Pack<T, N> pack;
  memcpy(&pack, words, sizeof(words));
  return pack;
}

// Rounds to T and stores to global memory. A plain store may be split, where the compiler loses sight of the alignment.
template <int N, typename T>
__device__ __forceinline__ void store_pack(T* p, const Pack<float, N>& pack) {
  if constexpr (N == 1) {
    *p = from_float<T>(pack.at[0]);
  } else {
    constexpr int kCount = N * sizeof(T) / 4;
    uint32_t bits[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (sizeof(T) == 4) {
        bits[i] = __float_as_uint(pack.at[i]);
      } else {
        bits[i] = pair_bits<T>(pack.at[2 * i], pack.at[2 * i + 1]);
      }
    }
    if constexpr (kCount == 2) {
      __stwb(reinterpret_cast<uint2*>(p), make_uint2(bits[0], bits[1]));
    } else {
      static_assert(kCount % 4 == 0);
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const uint4 word = make_uint4(bits[i], bits[i + 1], bits[i + 2], bits[i + 3]);
        __stwb(reinterpret_cast<uint4*>(p) + i / 4, word);
      }
    }
  }
}

// Columns [column, column + N) of a row of `num_columns`, with `fill` where it has ended.
template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* row, int64_t column, int64_t num_columns, T fill) {
  if (column + N <= num_columns) {
    return load_pack<N>(row + column);
  }
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    pack.at[i] = column + i < num_columns ? row[column + i] : fill;
  }
  return pack;
}

template <int N, typename T>
__device__ __forceinline__ void store_pack(
    T* row, int64_t column, int64_t num_columns, const Pack<float, N>& pack) {
  if (column + N <= num_columns) {
    store_pack(row + column, pack);
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (column + i < num_columns) {
      row[column + i] = from_float<T>(pack.at[i]);
    }
  }
}

// Whether every row of a matrix begins on `bytes`.
template <typename T>
bool rows_are_aligned(const T* base, int64_t ld, int bytes) {
  return reinterpret_cast<uintptr_t>(base) % bytes == 0 && ld * sizeof(T) % bytes == 0;
}

template <typename Integer>
constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

struct Grid {
  int64_t num_blocks;
  int num_threads;  // of a block
  size_t dynamic_shared_bytes = 0;
};

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream, Arguments... arguments) {
  if (grid.num_blocks == 0) {
    return;  // an empty grid is an error to CUDA
  }
  constexpr size_t kUnasked = 48 << 10;
  if (grid.dynamic_shared_bytes > kUnasked) {
    const int bytes = static_cast<int>(grid.dynamic_shared_bytes);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.num_blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.num_threads));
  config.dynamicSmemBytes = grid.dynamic_shared_bytes;
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace megatron_orz::cuda
