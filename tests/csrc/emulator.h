// Runs CUDA kernels on the CPU, for tests of their logic: csrc/cuda/*.cu compiled as C++ see this file in place of
// CUDA's headers.
//
// Blocks run one after the other, and so do the warps of a block, each up to the next barrier of the block. A thread is
// a fiber, which runs until it waits for others (__syncthreads, a shuffle). Nothing runs in parallel, so that races
// show only by their effect: `set_schedule` runs blocks, warps and lanes in another order, and correct kernels give the
// same bits.
//
// A kernel in which some threads wait for others that never come (a barrier under a branch, a shuffle of part of a
// warp) stops with an error, which `take_error` returns. Dynamic shared memory begins as NaN; the static kind keeps
// what earlier blocks left. Not checked: alignment, unless compiled with -fsanitize=alignment; reads out of bounds;
// speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emulator::dynamic_shared.data())

using std::max;
using std::min;

// ---- Types ----

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <typename T>
void __stwb(T* p, T value) {
  *p = value;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// Both round to nearest, ties to even.
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) {
    return {0x7fff};
  }
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

struct __half {
  uint16_t bits;
};
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31;
  const int fraction = x.bits & 1023;
  const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(float(fraction), -24)
                                     : std::ldexp(float(fraction + 1024), exponent - 25);
  return x.bits >> 15 ? -size : size;
}
inline __half __float2half(float x) {
  const uint16_t sign = __float_as_uint(x) >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (x != x || size >= 65520.f) {
    return {static_cast<uint16_t>(sign | (x != x ? 0x7fff : 0x7c00))};
  }
  // Steps of half's last place at this size; a fraction that rounds up to 2048 carries into the exponent by itself.
  const int exponent = std::max(size > 0 ? std::ilogb(size) : -14, -14);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return {static_cast<uint16_t>(sign | (((exponent + 14) << 10) + steps))};
}

struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16(x), __float2bfloat16(y)}; }

struct __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }

// ---- What a thread sees ----

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Thread {
  State state = State::kDone;
  bool has_started = false;
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
};

constexpr size_t kStackBytes = 64 << 10;
constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;

inline std::vector<Thread> threads;
inline jmp_buf scheduler;
inline std::function<void()> kernel;
inline std::string error;
inline std::vector<uint4> dynamic_shared;
inline unsigned schedule = 0;
// What the lanes of a warp put into a shuffle. Two sets by turns: a lane may be one shuffle ahead of another's read.
inline uint32_t lane_words[2][kMaxThreads];
inline unsigned num_shuffles[kMaxThreads];

// 0: rising order; 1: falling; any other: shuffled anew for each turn, by this seed.
inline void set_schedule(unsigned seed) { schedule = seed; }

inline std::string take_error() { return std::exchange(error, {}); }

inline void wait(State state) {
  Thread& thread = threads[threadIdx.x];
  thread.state = state;
  if (_setjmp(thread.resume) == 0) {
    _longjmp(scheduler, 1);
  }
}

// A fiber lives on after its kernel: it waits, and runs the next one from here.
inline void run_kernels() {
  for (;;) {
    kernel();
    wait(State::kDone);
  }
}

inline void resume(unsigned index) {
  Thread& thread = threads[index];
  threadIdx.x = index;
  if (_setjmp(scheduler) != 0) {
    return;
  }
  if (thread.has_started) {
    _longjmp(thread.resume, 1);
  }
  thread.has_started = true;
  thread.stack.reset(new char[kStackBytes]);
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = thread.stack.get();
  thread.start.uc_stack.ss_size = kStackBytes;
  thread.start.uc_link = nullptr;
  makecontext(&thread.start, run_kernels, 0);
  setcontext(&thread.start);
}

inline std::vector<unsigned> ordered(unsigned count, std::mt19937& random) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (schedule == 1) {
    std::reverse(order.begin(), order.end());
  } else if (schedule > 1) {
    std::shuffle(order.begin(), order.end(), random);
  }
  return order;
}

// Lets the threads [first, last) go on if all of them wait at a barrier of this kind.
inline bool release(unsigned first, unsigned last, State barrier) {
  const auto waits = [=](const Thread& thread) { return thread.state == barrier; };
  if (!std::all_of(threads.begin() + first, threads.begin() + last, waits)) {
    return false;
  }
  std::for_each(threads.begin() + first, threads.begin() + last, [](Thread& thread) { thread.state = State::kReady; });
  return true;
}

// Runs a warp for as long as it does not wait for others: as far ahead of them as it may ever get.
inline void run_warp(unsigned first, unsigned last, std::mt19937& random) {
  do {
    for (const unsigned lane : ordered(last - first, random)) {
      if (threads[first + lane].state == State::kReady) {
        resume(first + lane);
      }
    }
  } while (release(first, last, State::kAtWarpBarrier));
}

inline void run_block(std::mt19937& random) {
  std::for_each(threads.begin(), threads.begin() + blockDim.x, [](Thread& t) { t.state = State::kReady; });
  const auto is_done = [](const Thread& thread) { return thread.state == State::kDone; };
  do {
    for (const unsigned warp : ordered((blockDim.x + kWarpSize - 1) / kWarpSize, random)) {
      run_warp(warp * kWarpSize, min((warp + 1) * kWarpSize, blockDim.x), random);
    }
    if (std::all_of(threads.begin(), threads.begin() + blockDim.x, is_done)) {
      return;
    }
  } while (release(0, blockDim.x, State::kAtBlockBarrier));
  error = "block " + std::to_string(blockIdx.x) + ": some threads wait at a barrier that others never reach";
  threads.clear();  // with the stacks of those that wait
}

inline void run_grid(dim3 grid, dim3 block) {
  gridDim = grid;
  blockDim = block;
  if (block.x == 0 || block.x > kMaxThreads || grid.x == 0 || grid.y * grid.z * block.y * block.z != 1) {
    error = "bad launch: grid " + std::to_string(grid.x) + ", block " + std::to_string(block.x);
    return;
  }
  std::mt19937 random(schedule);
  for (const unsigned index : ordered(grid.x, random)) {
    if (!error.empty()) {
      return;
    }
    threads.resize(std::max<size_t>(threads.size(), block.x));
    blockIdx.x = index;
    memset(static_cast<void*>(dynamic_shared.data()), 0xff, dynamic_shared.size() * sizeof(uint4));  // NaN
    run_block(random);
  }
}

// Every lane of the warp must come; `source` is the lane whose word is returned.
inline uint32_t shuffle(unsigned mask, uint32_t word, unsigned source) {
  if (mask != 0xffffffffu) {
    error = "a shuffle of part of a warp";
  }
  const unsigned index = threadIdx.x;
  uint32_t* words = lane_words[num_shuffles[index]++ % 2];
  words[index] = word;
  wait(State::kAtWarpBarrier);
  return words[index / kWarpSize * kWarpSize + source];
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::State::kAtBlockBarrier); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulator::wait(emulator::State::kAtWarpBarrier); }
inline unsigned __shfl_xor_sync(unsigned mask, unsigned word, int lanes) {
  return emulator::shuffle(mask, word, threadIdx.x % 32 ^ lanes);
}
inline unsigned __shfl_up_sync(unsigned mask, unsigned word, unsigned distance) {
  const unsigned lane = threadIdx.x % 32;
  return emulator::shuffle(mask, word, lane >= distance ? lane - distance : lane);
}

// ---- Launch ----

typedef struct CUstream_st* cudaStream_t;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename Kernel>
void cudaFuncSetAttribute(Kernel, int, int) {}

template <typename... Parameters, typename... Arguments>
void cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  emulator::dynamic_shared.resize((config->dynamicSmemBytes + sizeof(uint4) - 1) / sizeof(uint4));
  emulator::kernel = [=] { kernel(arguments...); };
  emulator::run_grid(config->gridDim, config->blockDim);
}
