// What CUDA's header of this name declares, as far as csrc/cuda uses it.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
  __half() = default;
  __half(float value) : bits(emulator::half_of_float(value)) {}
  operator float() const { return emulator::float_of_half(bits); }
};

struct __align__(4) __half2 {
  __half x, y;
};

inline __half __float2half_rn(float value) { return value; }
inline __half __float2half(float value) { return value; }
inline float __half2float(__half value) { return value; }
inline __half2 __floats2half2_rn(float first, float second) { return {first, second}; }
inline float2 __half22float2(__half2 pair) { return {pair.x, pair.y}; }
