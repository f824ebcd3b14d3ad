// Vectors of one target, whichever it is: the compiler's own vector types, and intrinsics only where these have no
// word.
//
// Every file that includes this is compiled once per target (setup.py) with -DAR_TARGET=portable, avx2 or avx512 and
// that target's flags, into a namespace of that name. Nothing here may come from a template of the standard library:
// the linker keeps one copy of each, and it could be one that the machine has no instructions for.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define AR_UNROLL _Pragma("clang loop unroll(full)")
#else
#define AR_UNROLL _Pragma("GCC unroll 32")
#endif

namespace ar_kernels::AR_TARGET {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr bool kManyRegisters = true;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr bool kManyRegisters = false;
#else
inline constexpr int kVectorBytes = 16;
#if defined(__aarch64__)
inline constexpr bool kManyRegisters = true;
#else
inline constexpr bool kManyRegisters = false;
#endif
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// What sums are kept in.
template <class T>
struct AccumulatorOf {
  typedef float type;
};
template <>
struct AccumulatorOf<double> {
  typedef double type;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t bits __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t lane;
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t bits __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t lane;
};
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));  // as many as floats fit a vector

template <class A>
using Vector = typename VectorOf<A>::type;
template <class A>
using Bits = typename VectorOf<A>::bits;

template <class A>
inline constexpr int kLanes = kVectorBytes / sizeof(A);

template <class A>
inline int64_t padded(int64_t count) {
  return (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

template <class A>
inline Vector<A> all(A value) {
  return value - Vector<A>{};  // 0 - 0 is 0, x - 0 is x: a broadcast that keeps every value as it is
}

template <class A>
inline Bits<A> bits_of(Vector<A> value) {
  Bits<A> bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <class A>
inline Vector<A> of_bits(Bits<A> bits) {
  Vector<A> value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// ------------------------------------------------------------------------------------------- loads and stores

// By the compiler's own conversion, but for AVX-512, whose vectors GCC 12 cuts into pieces for it.
inline Bits<float> wide(Halves halves) {
#if defined(__AVX512F__)  // with a mask of all lanes: GCC 12 takes its own unmasked ones for uninitialised
  return (Bits<float>)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)halves);
#else
  return __builtin_convertvector(halves, Bits<float>);
#endif
}

inline Halves low_halves(Bits<float> bits) {
#if defined(__AVX512F__)
  return (Halves)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bits);
#else
  return __builtin_convertvector(bits, Halves);
#endif
}

inline Vector<float> widened(Halves halves, BFloat16) { return of_bits<float>(wide(halves) << 16); }

inline Halves narrowed(Vector<float> value, BFloat16) {  // to nearest, ties to even; a NaN stays one
  const Bits<float> bits = bits_of<float>(value);
  const Bits<float> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits<float> nan = (bits >> 16) | 0x40;
  return low_halves((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
inline Vector<float> widened(Halves halves, Half) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)halves);
#else
  return (Vector<float>)_mm256_cvtph_ps((__m128i)halves);
#endif
}

inline Halves narrowed(Vector<float> value, Half) {
#if defined(__AVX512F__)
  return (Halves)_mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (Halves)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
}
#else
inline Vector<float> widened(Halves halves, Half) {
  const Bits<float> bits = wide(halves), sign = (bits & 0x8000) << 16, magnitude = (bits & 0x7fff) << 13;
  // The exponents' biases differ by 112; as a product this is right for subnormal numbers too.
  const Bits<float> finite = bits_of<float>(of_bits<float>(magnitude) * 0x1p112f);
  return of_bits<float>(sign | (magnitude >= (0x7c00u << 13) ? magnitude | 0x7f800000 : finite));
}

inline Halves narrowed(Vector<float> value, Half) {  // to nearest, ties to even; a NaN stays one
  const Bits<float> bits = bits_of<float>(value), magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
  const Bits<float> normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Beside 0.5 a float has steps of 2^-24, as subnormal halves do: the sum rounds, and its low bits are the half's.
  const Bits<float> subnormal = bits_of<float>(of_bits<float>(magnitude) + 0.5f) - 0x3f000000;
  Bits<float> half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x47800000 ? (Bits<float>{} + 0x7c00) : half;
  half = magnitude > 0x7f800000 ? (Bits<float>{} + 0x7e00) : half;
  return low_halves(half | sign);
}
#endif

template <class T>
inline Vector<Accumulator<T>> load(const T* from) {
  if constexpr (sizeof(T) == 2) {
    Halves halves;
    memcpy(&halves, from, sizeof(halves));
    return widened(halves, T{});
  } else {
    Vector<T> value;
    memcpy(&value, from, sizeof(value));
    return value;
  }
}

// The first `count` elements (at least 1, at most a vector's), 0 in the lanes beyond; touches no memory beyond.
template <class T>
inline Vector<Accumulator<T>> load(const T* from, int count) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint32_t mask = (uint32_t{1} << count) - 1;
  if constexpr (sizeof(T) == 2)
    return widened((Halves)_mm256_maskz_loadu_epi16((__mmask16)mask, from), T{});
  else if constexpr (sizeof(T) == 4)
    return (Vector<float>)_mm512_maskz_loadu_ps((__mmask16)mask, from);
  else
    return (Vector<double>)_mm512_maskz_loadu_pd((__mmask8)mask, from);
#else
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return (Vector<float>)_mm256_maskload_ps((const float*)from, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes));
  }
  if constexpr (sizeof(T) == 8) {
    const __m256i lanes = _mm256_setr_epi64x(0, 1, 2, 3);
    return (Vector<double>)_mm256_maskload_pd((const double*)from,
                                              _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), lanes));
  }
#endif
  T some[kLanes<Accumulator<T>>] = {};
  memcpy(some, from, count * sizeof(T));
  return load(some);
#endif
}

// A vector of one element.
template <class T>
inline Vector<Accumulator<T>> spread(const T* from) {
  if constexpr (sizeof(T) == 2)
    return widened(Halves{} + from->bits, T{});
  else
    return all<T>(*from);
}

template <class T>
inline void store(T* to, Vector<Accumulator<T>> value) {
  if constexpr (sizeof(T) == 2) {
    const Halves halves = narrowed(value, T{});
    memcpy(to, &halves, sizeof(halves));
  } else {
    memcpy(to, &value, sizeof(value));
  }
}

template <class T>
inline void store(T* to, Vector<Accumulator<T>> value, int count) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint32_t mask = (uint32_t{1} << count) - 1;
  if constexpr (sizeof(T) == 2)
    _mm256_mask_storeu_epi16(to, (__mmask16)mask, (__m256i)narrowed(value, T{}));
  else if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(to, (__mmask16)mask, (__m512)value);
  else
    _mm512_mask_storeu_pd(to, (__mmask8)mask, (__m512d)value);
#else
  T some[kLanes<Accumulator<T>>];
  store(some, value);
  memcpy(to, some, count * sizeof(T));
#endif
}

// A vector of which `count` elements are there.
template <class T>
inline Vector<Accumulator<T>> some(const T* from, int count) {
  return count == kLanes<Accumulator<T>> ? load(from) : load(from, count);
}

template <class T>
inline void put(T* to, Vector<Accumulator<T>> value, int count) {
  if (count == kLanes<Accumulator<T>>)
    store(to, value);
  else
    store(to, value, count);
}

// A store past the caches: memory that is written and not read again soon need not be read first. Where the address
// is not aligned, and where a target has no such instruction, it is a plain store. streamed() ends a run of them.
template <class T>
inline void stream(T* to, Vector<Accumulator<T>> value) {
#if defined(__x86_64__)
  constexpr int kBytes = kLanes<Accumulator<T>> * sizeof(T);
  if ((uintptr_t)to % kBytes == 0) {
    if constexpr (kBytes == kVectorBytes) {
#if defined(__AVX512F__)
      return _mm512_stream_ps((float*)to, (__m512)value);
#elif defined(__AVX2__)
      return _mm256_stream_ps((float*)to, (__m256)value);
#else
      return _mm_stream_ps((float*)to, (__m128)value);
#endif
    } else if constexpr (kBytes >= 16) {
      [[maybe_unused]] const Halves halves = narrowed(value, T{});
#if defined(__AVX512F__)
      return _mm256_stream_si256((__m256i*)to, (__m256i)halves);
#elif defined(__AVX2__)
      return _mm_stream_si128((__m128i*)to, (__m128i)halves);
#endif
    }
  }
#endif
  store(to, value);
}

inline void streamed() {
#if defined(__x86_64__)
  _mm_sfence();  // other threads see what was streamed before they see what comes next
#endif
}

// ------------------------------------------------------------------------------------------- functions

template <class A>
inline Vector<A> maximum(Vector<A> a, Vector<A> b) {  // b where a is NaN
  return a > b ? a : b;
}

// Is a lane of it larger?
template <class A>
inline bool any_above(Vector<A> value, A than) {
  const auto above = value > all<A>(than);
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  if constexpr (sizeof(A) == 4) return _mm512_movepi32_mask((__m512i)above) != 0;
  return _mm512_movepi64_mask((__m512i)above) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)above) != 0;
#else
  bool any = false;
  AR_UNROLL for (int lane = 0; lane < kLanes<A>; ++lane)
    any = any || above[lane] != 0;
  return any;
#endif
}

template <class A>
inline A sum(Vector<A> value) {
  A total = 0;
  AR_UNROLL for (int lane = 0; lane < kLanes<A>; ++lane)
    total += value[lane];
  return total;
}

// exp x = 2^n exp r, n the nearest integer to x / ln 2, |r| <= ln 2 / 2, exp r by Taylor's series: within 2 ulp.
// Below the smallest normal number it is 0, beyond exp 88 (float64: 709) infinite; NaN stays NaN.
template <class A>
inline Vector<A> exponential(Vector<A> x) {
  constexpr bool kDouble = sizeof(A) == 8;
  constexpr int kMantissa = kDouble ? 52 : 23, kTerms = kDouble ? 13 : 7;
  constexpr A kLowest = kDouble ? A(-708) : A(-87), kHighest = kDouble ? A(709) : A(88);
  constexpr A kMagic = kDouble ? A(0x1.8p52) : A(0x1.8p23);  // adding it rounds to an integer, in the lowest bits
  // ln 2 in two parts, the first short enough for n times it to be exact
  constexpr A kHigh = kDouble ? A(0x1.62e42feep-1) : A(0x1.62ep-1);
  constexpr A kLow = kDouble ? A(0x1.a39ef35793c76p-33) : A(0x1.0bfbe8p-15);
  const Vector<A> clamped = x > kHighest ? all<A>(kHighest) : x < kLowest ? all<A>(kLowest) : x;
  const Vector<A> shifted = clamped * A(1.4426950408889634074) + kMagic;
  const Vector<A> n = shifted - kMagic;
  const Vector<A> r = (clamped - n * kHigh) - n * kLow;
  A inverse_factorials[kTerms + 1] = {1};
  AR_UNROLL for (int i = 1; i <= kTerms; ++i)
    inverse_factorials[i] = inverse_factorials[i - 1] / A(i);
  Vector<A> result = all<A>(inverse_factorials[kTerms]);
  AR_UNROLL for (int i = kTerms - 1; i >= 0; --i)
    result = result * r + inverse_factorials[i];
  const Vector<A> scaled = of_bits<A>(bits_of<A>(result) + (bits_of<A>(shifted) << kMantissa));
  // A NaN returns as it came: its payload would be taken for a power.
  return x < kLowest ? Vector<A>{} : x > kHighest ? all<A>(A(INFINITY)) : x == x ? scaled : x;
}

inline float exponential(float x) { return expf(x); }
inline double exponential(double x) { return exp(x); }
inline float logarithm(float x) { return logf(x); }
inline double logarithm(double x) { return log(x); }
inline float hyperbolic_tangent(float x) { return tanhf(x); }
inline double hyperbolic_tangent(double x) { return tanh(x); }

// One of the two halves of every group of `Group` lanes, of a and then of b.
template <int Group, bool Second>
constexpr int place_in_halves(int lane, int count) {
  const int half = count / 2;
  return lane / half * count + lane % half / (Group / 2) * Group + lane % (Group / 2) + (Second ? Group / 2 : 0);
}

template <int Group, bool Second, class V, int... Lane>
inline V halves_of_groups(V a, V b, std::integer_sequence<int, Lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, place_in_halves<Group, Second>(Lane, sizeof...(Lane))...);
#else  // GCC has that from version 12 on, this always
  using Places = decltype(a < b);
  return __builtin_shuffle(a, b, Places{place_in_halves<Group, Second>(Lane, sizeof...(Lane))...});
#endif
}

// The sums over lanes of `Count` vectors, a vector's lanes of them at a time: sums[i] has those of values[i *
// lanes...].
template <class A, int Count, int Group = kLanes<A>>
inline void sums_of_vectors(Vector<A>* values) {
  if constexpr (Group > 1) {
    const auto lanes = std::make_integer_sequence<int, kLanes<A>>{};
    AR_UNROLL for (int i = 0; i < Count / 2; ++i) {
      const Vector<A> a = values[2 * i], b = values[2 * i + 1];
      values[i] = halves_of_groups<Group, false>(a, b, lanes) + halves_of_groups<Group, true>(a, b, lanes);
    }
    sums_of_vectors<A, Count / 2, Group / 2>(values);
  }
}

}  // namespace ar_kernels::AR_TARGET
