/* The loops over one row, as rotate.c calls them: one set for each instruction set that was compiled. */
#ifndef ROADIE_SPANS_H
#define ROADIE_SPANS_H

#include <stdint.h>

typedef void TurnSpan(const void *x, void *z, const void *direct, const void *cross, int64_t start, int64_t end,
                      int64_t group, int back);
typedef void SumSpan(const void *gradient, const void *kept, float *own, float *partner, int64_t start, int64_t end,
                     int64_t group);

typedef void ConvertSpan(const void *from, void *to, int64_t count);

/* By type of activations (float32, bfloat16, float16). turn: of 16 bits, and whether the tables are of that type too. */
typedef struct {
    TurnSpan *turn[3][2];
    SumSpan *sum[3];
    TurnSpan *turn_wide[3];     /* activations in float32, by type of the tables */
    ConvertSpan *widen[3];      /* to float32, by type; NULL for float32 */
    ConvertSpan *narrow[3];     /* and back, with one rounding */
    void (*widen_and_add)(double *total, const float *term, int64_t count);
} Spans;

#endif
