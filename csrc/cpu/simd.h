// One vector type for AVX-512, AVX2, NEON and plain C++: GCC and Clang vector extensions, and
// intrinsics only where those leave the compiler no single instruction.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace rdfkern {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kTileVectors = 2;
#else
constexpr int kLanes = 4;
constexpr int kTileVectors = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UintVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

inline Vec load(const float* source) {
  Vec value;
  std::memcpy(&value, source, sizeof(Vec));
  return value;
}

inline void store(float* target, Vec value) { std::memcpy(target, &value, sizeof(Vec)); }

inline Vec broadcast(float value) { return value - Vec{}; }

template <class To, class From>
inline To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// b where either is NaN.
inline Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// 2^x, 0 below 2^-126, NaN stays NaN; relative error 1e-7. Minimax polynomial of degree 6
// on [-1/2, 1/2]; exactly 1 at 0, or repeated rescaling by 2^0 would drift.
inline Vec exp2(Vec x) {
  const Vec clamped = maximum(broadcast(-127.0f), x);
  const Vec shifted = clamped + 12582912.0f;  // 1.5 * 2^23: the integer part lands in the low bits
  const Vec fraction = clamped - (shifted - 12582912.0f);
  Vec p = fraction * 1.53533619e-4f + 1.33988744e-3f;
  p = p * fraction + 9.61843736e-3f;
  p = p * fraction + 5.55033247e-2f;
  p = p * fraction + 2.40226479e-1f;
  p = p * fraction + 6.93147203e-1f;
  p = p * fraction + 1.0f;
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_scalef_ps(
      _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ),
      (__m512)p, (__m512)(shifted - 12582912.0f));
#else
  const IntVec power = bits<IntVec>(p) + (bits<IntVec>(shifted) << 23);
  const IntVec vanishes = x < -126.0f;
  return bits<Vec>(power & ~vanishes);
#endif
}

inline float sum(Vec value) {
  float total = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) total += value[lane];
  return total;
}

inline Vec from_bfloat16(const uint16_t* source) {
#if defined(__AVX512F__)
  const UintVec wide = (UintVec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)source));
#elif defined(__AVX2__)
  const UintVec wide = (UintVec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)source));
#else
  HalfVec raw;
  std::memcpy(&raw, source, sizeof(HalfVec));
  const UintVec wide = __builtin_convertvector(raw, UintVec);
#endif
  return bits<Vec>(wide << 16);
}

inline void to_bfloat16(uint16_t* target, Vec value) {
  const UintVec raw = bits<UintVec>(value);
  const UintVec rounded = (raw + 0x7fffu + ((raw >> 16) & 1u)) >> 16;
  const IntVec is_nan = value != value;
  const UintVec result = (rounded & ~bits<UintVec>(is_nan)) | (bits<UintVec>(is_nan) & 0x7fc0u);
  const HalfVec narrow = __builtin_convertvector(result, HalfVec);
  std::memcpy(target, &narrow, sizeof(HalfVec));
}

// float16 by its bits: normal numbers by an exponent shift, the rest by exact multiplication.
inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  const float value = bits<float>(magnitude << 13) * bits<float>(uint32_t(0x77800000u));  // 2^112
  return bits<float>(bits<uint32_t>(value) | sign);
}

inline uint16_t float_to_half(float value) {
  const uint32_t raw = bits<uint32_t>(value);
  const uint16_t sign = uint16_t((raw >> 16) & 0x8000u);
  const uint32_t magnitude = raw & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x47800000u) return sign | 0x7c00u;
  if (magnitude < 0x38800000u) {  // subnormal: let the adder of floats round
    const float rounded = bits<float>(magnitude) + 0.5f;
    return sign | uint16_t(bits<uint32_t>(rounded) - 0x3f000000u);
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return sign | uint16_t((magnitude - 0x38000000u + 0xfffu + odd) >> 13);
}

inline Vec from_float16(const uint16_t* source) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)source));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)source));
#else
  Vec value;
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = half_to_float(source[lane]);
  return value;
#endif
}

inline void to_float16(uint16_t* target, Vec value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)target, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128((__m128i*)target, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kLanes; ++lane) target[lane] = float_to_half(value[lane]);
#endif
}

// Lanes `first`... of a and b in turn: a0 b0 a1 b1 ...
template <int FIRST, int... LANE>
inline Vec interleave(Vec a, Vec b, std::integer_sequence<int, LANE...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (FIRST + LANE / 2 + LANE % 2 * kLanes)...);
#else
  return __builtin_shuffle(a, b, IntVec{(FIRST + LANE / 2 + LANE % 2 * kLanes)...});
#endif
}

// rows[i][j] -> rows[j][i] for a square of kLanes vectors: log2(kLanes) rounds of interleaving.
inline void transpose(Vec (&rows)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  Vec next[kLanes];
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 16
    for (int row = 0; row < kLanes / 2; ++row) {
      next[2 * row] = interleave<0>(rows[row], rows[row + kLanes / 2], lanes);
      next[2 * row + 1] = interleave<kLanes / 2>(rows[row], rows[row + kLanes / 2], lanes);
    }
#pragma GCC unroll 16
    for (int row = 0; row < kLanes; ++row) rows[row] = next[row];
  }
}

// Sums of neighbours STEP lanes apart, those of a where lane / STEP is even, else those of b.
template <int STEP, int... LANE>
inline Vec add_halves(Vec a, Vec b, std::integer_sequence<int, LANE...>) {
  constexpr auto left = [](int lane) { return lane / STEP % 2 ? kLanes + lane - STEP : lane; };
#if defined(__clang__)
  return __builtin_shufflevector(a, b, left(LANE)...) +
         __builtin_shufflevector(a, b, (left(LANE) + STEP)...);
#else
  return __builtin_shuffle(a, b, IntVec{left(LANE)...}) +
         __builtin_shuffle(a, b, IntVec{(left(LANE) + STEP)...});
#endif
}

// Lane i: the sum of rows[i].
template <int STEP = kLanes / 2>
inline Vec sums(Vec (&rows)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
#pragma GCC unroll 8
  for (int row = 0; row < STEP; ++row)
    rows[row] = add_halves<STEP>(rows[row], rows[row + STEP], lanes);
  if constexpr (STEP > 1) return sums<STEP / 2>(rows);
  else return rows[0];
}

}  // namespace rdfkern
