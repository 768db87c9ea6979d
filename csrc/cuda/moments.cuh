// Count, mean and sum of squared deviations, merged as by Chan, Golub and LeVeque: nothing cancels.
#pragma once

#include "reduce.cuh"

namespace megatron_orz::cuda {

struct Moments {
  double count, mean, m2;
};

__device__ __forceinline__ Moments merge_moments(const Moments& a, const Moments& b) {
  const double count = a.count + b.count;
  if (count == 0.) {
    return Moments{};
  }
  const double difference = b.mean - a.mean;
  const double share = b.count / count;
  return {count, a.mean + difference * share, a.m2 + b.m2 + difference * difference * a.count * share};
}

__device__ __forceinline__ Moments block_moments(const Moments& of_thread) {
  return block_reduce(
      of_thread, [](const Moments& a, const Moments& b) { return merge_moments(a, b); }, Moments{});
}

}  // namespace megatron_orz::cuda
