// Arithmetic on 32 bytes of numbers at a time, in the vector types of GCC and clang. These compile for any machine;
// functions marked AVX2 are compiled for it besides, and `has_avx2` says at run time whether to call them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define ALWAYS_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma")))
#else
#define AVX2
#endif

namespace megatron_orz {

// Rows of `num_columns` that are worth a thread of their own: about 16,000 numbers.
inline int64_t rows_per_task(int64_t num_columns) {
  return 1 + 16384 / (num_columns + 1);
}

inline bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

template <typename T>
struct LanesOf {
  typedef T type __attribute__((vector_size(32)));
};
template <typename T>
using Lanes = typename LanesOf<T>::type;
template <typename T>
inline constexpr int64_t kWidth = 32 / sizeof(T);

template <typename T>
ALWAYS_INLINE Lanes<T> splat(T x) {
  return Lanes<T>{} + x;
}

// The first `n` numbers at p, at most a full width; the rest are `fill`.
template <typename T>
ALWAYS_INLINE Lanes<T> load(const T* p, int64_t n = kWidth<T>, T fill = 0) {
  Lanes<T> x = splat(fill);
  if (n >= kWidth<T>) {
    std::memcpy(&x, p, sizeof(x));
  } else {
    std::memcpy(&x, p, n * sizeof(T));
  }
  return x;
}

template <typename T>
ALWAYS_INLINE void store(T* p, Lanes<T> x, int64_t n = kWidth<T>) {
  if (n >= kWidth<T>) {
    std::memcpy(p, &x, sizeof(x));
  } else {
    std::memcpy(p, &x, n * sizeof(T));
  }
}

template <typename L>
ALWAYS_INLINE L larger(L x, L y) {
  return x > y ? x : y;
}

template <typename T>
ALWAYS_INLINE T sum_of(Lanes<T> x) {
  T sum = 0;
  for (int i = 0; i < kWidth<T>; ++i) sum += x[i];
  return sum;
}

template <typename T>
ALWAYS_INLINE T largest_of(Lanes<T> x) {
  T largest = x[0];
  for (int i = 1; i < kWidth<T>; ++i) largest = larger<T>(largest, x[i]);
  return largest;
}

// Where e^x is still a normal number. NaN passes.
template <typename T>
inline constexpr T kLowestExponent = sizeof(T) == 4 ? T(-87) : T(-708);
template <typename T>
ALWAYS_INLINE Lanes<T> exponent_in_range(Lanes<T> x) {
  const Lanes<T> lowest = splat(kLowestExponent<T>);
  return x < lowest ? lowest : x;
}

// e^x, -87 <= x <= 88, to 2 units in the last place: x = k ln 2 + r with |r| <= ln 2 / 2, and e^r = 1 + r + r^2 q(r)
// with the polynomial q of Cephes' expf.
ALWAYS_INLINE Lanes<float> exp_lanes(Lanes<float> x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves k in the low bits
  const Lanes<float> shifted = x * 1.44269504f + kRound;
  const Lanes<float> k = shifted - kRound;
  const Lanes<float> r = x - k * 0.693359375f + k * 2.12194440e-4f;
  Lanes<float> q = splat(1.9875691500e-4f);
  q = q * r + 1.3981999507e-3f;
  q = q * r + 8.3334519073e-3f;
  q = q * r + 4.1665795894e-2f;
  q = q * r + 1.6666665459e-1f;
  q = q * r + 5.0000001201e-1f;
  const Lanes<float> exp_r = q * (r * r) + r + 1.0f;
  const Lanes<int32_t> two_to_the_k = (reinterpret_cast<Lanes<int32_t>>(shifted) << 23) + (127 << 23);
  return exp_r * reinterpret_cast<Lanes<float>>(two_to_the_k);
}

ALWAYS_INLINE Lanes<double> exp_lanes(Lanes<double> x) {
  for (int i = 0; i < kWidth<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

}  // namespace megatron_orz
