/* Sixteen elements at a time, in the vector language of GCC and Clang, which every target lowers to what it has: one
 * register with AVX-512, two with AVX, four with SSE or NEON. Other compilers do without (no ROADIE_VECTORS). */
#ifndef ROADIE_VECTOR_H
#define ROADIE_VECTOR_H

#include "element.h"

#if defined(__GNUC__)
#define ROADIE_VECTORS
#pragma GCC diagnostic ignored "-Wpsabi" /* nothing here crosses a call: all of it is inlined */

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Places __attribute__((vector_size(64)));
typedef uint16_t Shorts __attribute__((vector_size(32)));

INLINE Floats read_f32_vector(const float *from) {
    Floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void write_f32_vector(float *to, Floats value) { memcpy(to, &value, sizeof value); }

#if defined(__AVX512F__)
INLINE Floats read_bf16_vector(const bf16 *from) {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
}

#if defined(__AVX512BF16__)
/* Numbers below the normal range become 0 here, as in the matrix products of such processors. */
INLINE void write_bf16_vector(bf16 *to, Floats value) {
    __m256bh narrow = _mm512_cvtneps_pbh((__m512)value);
    memcpy(to, &narrow, sizeof narrow);
}
#else
INLINE void write_bf16_vector(bf16 *to, Floats value) {
    __m512i bits = (__m512i)value, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)value, (__m512)value, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(BF16_NAN));
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(rounded));
}
#endif

INLINE Floats read_f16_vector(const f16 *from) {
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}

INLINE void write_f16_vector(f16 *to, Floats value) {
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
/* The upper halves, rounded; a NaN stays one. */
INLINE Words rounded_bf16(Floats value) {
    Words bits = (Words)value, is_nan = (Words)(value != value);
    Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (is_nan & BF16_NAN) | (~is_nan & rounded);
}

INLINE Floats read_bf16_vector(const bf16 *from) {
    Shorts value;
    memcpy(&value, from, sizeof value);
    return (Floats)(__builtin_convertvector(value, Words) << 16);
}

INLINE void write_bf16_vector(bf16 *to, Floats value) {
    Shorts narrow = __builtin_convertvector(rounded_bf16(value), Shorts);
    memcpy(to, &narrow, sizeof narrow);
}

#if defined(__F16C__)
INLINE Floats read_f16_vector(const f16 *from) {
    float value[16];
    for (int i = 0; i < 16; i += 8) _mm256_storeu_ps(value + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
    return read_f32_vector(value);
}

INLINE void write_f16_vector(f16 *to, Floats value) {
    float values[16];
    write_f32_vector(values, value);
    for (int i = 0; i < 16; i += 8)
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
}
#else
INLINE Floats read_f16_vector(const f16 *from) {
    float value[16];
    for (int i = 0; i < 16; i++) value[i] = read_f16(from[i]);
    return read_f32_vector(value);
}

INLINE void write_f16_vector(f16 *to, Floats value) {
    float values[16];
    write_f32_vector(values, value);
    for (int i = 0; i < 16; i++) to[i] = write_f16(values[i]);
}
#endif
#endif

/* Element j comes from j ^ distance: the partner in groups of 2 * distance. */
#define PARTNERS(v, d)                                                                                               \
    __builtin_shufflevector(v, v, 0 ^ (d), 1 ^ (d), 2 ^ (d), 3 ^ (d), 4 ^ (d), 5 ^ (d), 6 ^ (d), 7 ^ (d), 8 ^ (d),   \
                            9 ^ (d), 10 ^ (d), 11 ^ (d), 12 ^ (d), 13 ^ (d), 14 ^ (d), 15 ^ (d))

#if !defined(__clang__) && __GNUC__ < 12
#undef PARTNERS
#define PARTNERS(v, d)                                                                                               \
    __builtin_shuffle(v, (Places){0 ^ (d), 1 ^ (d), 2 ^ (d), 3 ^ (d), 4 ^ (d), 5 ^ (d), 6 ^ (d), 7 ^ (d), 8 ^ (d),     \
                                9 ^ (d), 10 ^ (d), 11 ^ (d), 12 ^ (d), 13 ^ (d), 14 ^ (d), 15 ^ (d)})
#endif

/* The sign bit in the elements whose bit `distance` is clear (first members), or set. */
#define FIRST(d, j) (((j) & (d)) ? 0u : 0x80000000u)
#define FIRSTS(d)                                                                                                    \
    ((Words){FIRST(d, 0), FIRST(d, 1), FIRST(d, 2), FIRST(d, 3), FIRST(d, 4), FIRST(d, 5), FIRST(d, 6), FIRST(d, 7), \
             FIRST(d, 8), FIRST(d, 9), FIRST(d, 10), FIRST(d, 11), FIRST(d, 12), FIRST(d, 13), FIRST(d, 14),         \
             FIRST(d, 15)})

#endif
#endif
