// The launchers of csrc/cuda under the emulator, by name, for ctypes.

#include "../../csrc/cuda/device.cuh"

using namespace megatron_orz::cuda;

__global__ void barrier_under_a_branch() {
  if (threadIdx.x < 32) {
    __syncthreads();
  }
}

// Reads what the next thread writes, without a barrier.
__global__ void race(int* out) {
  __shared__ int shared[64];
  shared[threadIdx.x] = static_cast<int>(blockIdx.x * 64 + threadIdx.x);
  out[blockIdx.x * 64 + threadIdx.x] = shared[(threadIdx.x + 1) % 64];
}

static void launch_barrier_under_a_branch() { launch(barrier_under_a_branch, {1, 64}, nullptr); }
static void launch_race(int* out) { launch(race, {2, 64}, nullptr, out); }

extern "C" void* address_of(const char* name) {
#define RETURN_IF_NAMED(function) \
  if (strcmp(name, #function) == 0) return reinterpret_cast<void*>(&function)
  RETURN_IF_NAMED(logits_stats);
  RETURN_IF_NAMED(dlogits);
  RETURN_IF_NAMED(packed_value_loss);
  RETURN_IF_NAMED(packed_value_loss_workspace_bytes);
  RETURN_IF_NAMED(packed_gae);
  RETURN_IF_NAMED(packed_gae_workspace_bytes);
  RETURN_IF_NAMED(launch_barrier_under_a_branch);
  RETURN_IF_NAMED(launch_race);
  return nullptr;
}

extern "C" void set_schedule(unsigned seed) { emulator::set_schedule(seed); }

// Copies the last error into `text`, empty if there was none.
extern "C" void take_error(char* text, size_t size) {
  strncpy(text, emulator::take_error().c_str(), size - 1);
}

extern "C" void half_round_trip(const float* x, uint16_t* bits, float* back, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const __half half = __float2half(x[i]);
    bits[i] = half.bits;
    back[i] = __half2float(half);
  }
}
