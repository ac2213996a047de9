/* Activation types: how an element is read as float and written with one rounding (to nearest, ties to even).
 *
 * Integer arithmetic only, without branches, so that every compiler turns loops over these functions into vector code,
 * also on processors without half-precision instructions, and whatever the processor does with denormal numbers. */
#ifndef ROADIE_ELEMENT_H
#define ROADIE_ELEMENT_H

#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;
typedef uint16_t f16;

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The sign by its bit: of alternating plus and minus GCC 12 makes fused multiply-adds, whatever it was told. */
INLINE float negative(float value) { return float_of(bits_of(value) ^ 0x80000000u); }

INLINE float read_f32(float value) { return value; }
INLINE float write_f32(float value) { return value; }

/* bfloat16 is the upper half of a float. */
#define BF16_NAN 0x7fc0u
INLINE float read_bf16(bf16 value) { return float_of((uint32_t)value << 16); }

INLINE bf16 write_bf16(float value) {
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bf16)((bits & 0x7fffffffu) > 0x7f800000u ? BF16_NAN : rounded);
}

/* float16: 5 bits of exponent (bias 15) and 10 of mantissa; float: 8 (bias 127) and 23. */
INLINE float read_f16(f16 value) {
    uint32_t magnitude = ((uint32_t)value & 0x7fffu) << 13;
    uint32_t sign = ((uint32_t)value & 0x8000u) << 16;
    uint32_t normal = magnitude + (112u << 23);
    uint32_t special = magnitude + (224u << 23);                                  /* infinities and NaN */
    uint32_t small = bits_of(float_of(magnitude + (113u << 23)) - 0x1p-14f);      /* denormal, and zero */
    uint32_t result = magnitude >= (31u << 23) ? special : (magnitude < (1u << 23) ? small : normal);
    return float_of(result | sign);
}

INLINE f16 write_f16(float value) {
    uint32_t bits = bits_of(value);
    uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);         /* rounds to multiples of 2^-24 */
    uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;               /* NaN; too large is infinite */
    uint32_t result = magnitude >= (143u << 23) ? special : (magnitude < (113u << 23) ? small : normal);
    return (f16)(result | sign);
}

#endif
