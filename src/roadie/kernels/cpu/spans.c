/* The loops of template.h for all types, compiled once for each instruction set: ROADIE_SET names it (see setup.py). */
#include "spans.h"

#if defined(_MSC_VER)
#define INLINE static __forceinline
#define INDEPENDENT __pragma(loop(ivdep))
#else
#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif
#endif

#include "vector.h"

#define JOIN(function, types) function##_##types
#define NAME_OF(function, types) JOIN(function, types)
#define NAME(function) NAME_OF(function, TYPES)

#define TYPES f32
#define X float
#define READ read_f32
#define WRITE write_f32
#define READ_VECTOR read_f32_vector
#define WRITE_VECTOR write_f32_vector
#define W float
#define READ_W read_f32
#define READ_W_VECTOR read_f32_vector
#include "template.h"
#undef TYPES
#undef W
#undef READ_W
#undef READ_W_VECTOR

#define TURNS_ONLY
#define TYPES f32_bf16
#define W bf16
#define READ_W read_bf16
#define READ_W_VECTOR read_bf16_vector
#include "template.h"
#undef TYPES
#undef W
#undef READ_W
#undef READ_W_VECTOR

#define TYPES f32_f16
#define W f16
#define READ_W read_f16
#define READ_W_VECTOR read_f16_vector
#include "template.h"
#undef TYPES
#undef W
#undef READ_W
#undef READ_W_VECTOR
#undef TURNS_ONLY
#undef X
#undef READ
#undef WRITE
#undef READ_VECTOR
#undef WRITE_VECTOR

#define W float
#define READ_W read_f32
#define READ_W_VECTOR read_f32_vector
#define TYPES bf16
#define X bf16
#define READ read_bf16
#define WRITE write_bf16
#define READ_VECTOR read_bf16_vector
#define WRITE_VECTOR write_bf16_vector
#include "template.h"
#undef TYPES
#undef W
#undef READ_W
#undef READ_W_VECTOR

#define TYPES bf16_narrow
#define TURNS_ONLY
#define W bf16
#define READ_W read_bf16
#define READ_W_VECTOR read_bf16_vector
#include "template.h"
#undef TURNS_ONLY
#undef TYPES
#undef X
#undef READ
#undef WRITE
#undef READ_VECTOR
#undef WRITE_VECTOR
#undef W
#undef READ_W
#undef READ_W_VECTOR

#define TYPES f16
#define X f16
#define READ read_f16
#define WRITE write_f16
#define READ_VECTOR read_f16_vector
#define WRITE_VECTOR write_f16_vector
#define W float
#define READ_W read_f32
#define READ_W_VECTOR read_f32_vector
#include "template.h"
#undef TYPES
#undef W
#undef READ_W
#undef READ_W_VECTOR

#define TYPES f16_narrow
#define TURNS_ONLY
#define W f16
#define READ_W read_f16
#define READ_W_VECTOR read_f16_vector
#include "template.h"
#undef TURNS_ONLY
#undef TYPES

static void widen_and_add(double *total, const float *term, int64_t count) {
    INDEPENDENT
    for (int64_t i = 0; i < count; i++) total[i] += term[i];
}

#if defined(ROADIE_VECTORS)
#define SIXTEENS(READ, WRITE) \
    for (; i + 16 <= count; i += 16) WRITE##_vector(z + i, READ##_vector(x + i));
#else
#define SIXTEENS(READ, WRITE)
#endif
#define CONVERT(NAME, FROM, READ, TO, WRITE)                                    \
    static void NAME(const void *from, void *to, int64_t count) {               \
        const FROM *x = from;                                                   \
        TO *z = to;                                                             \
        int64_t i = 0;                                                          \
        SIXTEENS(READ, WRITE)                                                   \
        for (int64_t j = i; j < count; j++) z[j] = WRITE(READ(x[j]));           \
    }
CONVERT(widen_bf16, bf16, read_bf16, float, write_f32)
CONVERT(narrow_bf16, float, read_f32, bf16, write_bf16)
CONVERT(widen_f16, f16, read_f16, float, write_f32)
CONVERT(narrow_f16, float, read_f32, f16, write_f16)

#define TURN(types) turn_span_##types
#define SUM(types) sum_span_##types
const Spans ROADIE_SET = {
    {{0, 0}, {TURN(bf16), TURN(bf16_narrow)}, {TURN(f16), TURN(f16_narrow)}},
    {SUM(f32), SUM(bf16), SUM(f16)},
    {TURN(f32), TURN(f32_bf16), TURN(f32_f16)},
    {0, widen_bf16, widen_f16},
    {0, narrow_bf16, narrow_f16},
    widen_and_add,
};
