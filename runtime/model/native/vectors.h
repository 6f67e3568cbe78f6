// Sixteen numbers at a time, with or without instructions of the machine's own.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16, PANEL = 2 * LANES;
#if defined(__AVX512F__)
constexpr int TILE = 12;  // rows of a tile: with two vectors of sums each they fill most of the 32 registers
#else
constexpr int TILE = 3;
#endif

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint16_t BF16;

#define INLINE static inline __attribute__((always_inline))

constexpr float INFINITE = std::numeric_limits<float>::infinity(), NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
const Ints LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <class V, class X>
INLINE V splat(X x) {
    return V{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

INLINE int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) || defined(__aarch64__)
    for (int lane = 0; lane < LANES; ++lane) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return c;
#else
    return a * b + c;
#endif
}

// sum += weight * x over the one or two features of a word
template <class E>
INLINE Vec multiply_add(Vec sum, Words weights, uint32_t x) {
    if constexpr (std::is_same_v<E, float>) return fma((Vec)weights, (Vec)splat<Words>(x), sum);
#if defined(__AVX512BF16__)
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)splat<Words>(x));
#else
    sum = fma((Vec)(weights << 16), (Vec)splat<Words>(x << 16), sum);
    return fma((Vec)(weights & 0xffff0000u), (Vec)splat<Words>(x & 0xffff0000u), sum);
#endif
}

template <class V>
INLINE V load(const void* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// 16 numbers as float, and back, rounded to nearest even
INLINE Vec widen(const float* from) { return load<Vec>(from); }
INLINE Vec widen(Halves halves) {
#if defined(__AVX512F__)
    return (Vec)((Words)_mm512_cvtepu16_epi32((__m256i)halves) << 16);
#else
    return (Vec)(__builtin_convertvector(halves, Words) << 16);
#endif
}
INLINE Vec widen(const BF16* from) { return widen(load<Halves>(from)); }
INLINE Halves halves(Vec value) {
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtneps_pbh((__m512)value);
#else
    const Words bits = (Words)value;
    return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves);
#endif
}
// Both return what `to` now holds
INLINE Vec narrow(Vec value, float* to) { return std::memcpy(to, &value, sizeof value), value; }
INLINE Vec narrow(Vec value, BF16* to) {
    const Halves rounded = halves(value);
    std::memcpy(to, &rounded, sizeof rounded);
    return widen(rounded);
}

// The same for the first `count` of them; the others read as 0 and are not written
template <class E>
INLINE Vec widen(const E* from, int64_t count) {
    if (count >= LANES) return widen(from);
    E padded[LANES] = {};
    std::memcpy(padded, from, count * sizeof(E));
    return widen(padded);
}
template <class E>
INLINE void narrow(Vec value, E* to, int64_t count) {
    if (count >= LANES) return (void)narrow(value, to);
    E all[LANES];
    narrow(value, all);
    std::memcpy(to, all, count * sizeof(E));
}

// 16 truth values as masks
INLINE Ints flags(const uint8_t* from) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepu8_epi32(load<__m128i>(from)) != 0;
#else
    return __builtin_convertvector(load<Bytes>(from), Ints) != 0;
#endif
}

INLINE Vec select(Ints condition, Vec yes, Vec no) { return (Vec)(((Ints)yes & condition) | ((Ints)no & ~condition)); }

INLINE Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return select(a > b, a, b);
#endif
}
INLINE Vec smaller(Vec a, Vec b) { return -larger(-a, -b); }

// Whether any of them is NaN, which `larger` and `maximum` may pass over
INLINE bool has_nan(Vec values) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)values, (__m512)values, _CMP_UNORD_Q) != 0;
#else
    int32_t found = 0;
    const Ints is_nan = values != values;
    for (int lane = 0; lane < LANES; ++lane) found |= is_nan[lane];
    return found != 0;
#endif
}

INLINE float maximum(Vec values) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)values);
#else
    float most = values[0];
    for (int lane = 1; lane < LANES; ++lane) most = std::max(most, values[lane]);
    return most;
#endif
}

INLINE float total(Vec values) {
    float sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += values[lane];
    return sum;
}

// e^x within 2 units in the last place, where that is a normal number: x from -87 to 88
INLINE Vec exponential(Vec x) {
    const Vec shifted = fma(x, splat<Vec>(1.44269504f), splat<Vec>(12582912.0f));  // its low bits are the exponent
    const Vec whole = shifted - 12582912.0f;
    Vec rest = fma(whole, splat<Vec>(-0.693359375f), x);
    rest = fma(whole, splat<Vec>(2.12194440e-4f), rest);
    Vec result = splat<Vec>(1.9875691500e-4f);
    for (float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        result = fma(result, rest, splat<Vec>(factor));
    result = fma(result, rest * rest, rest + 1.0f);
    return (Vec)((Ints)result + ((Ints)shifted << 23));
}

// The same for x up to 0, and 0 where it is below -87
INLINE Vec weight_of(Vec x) { return select(x < -87.0f, Vec{}, exponential(x)); }

}  // namespace
