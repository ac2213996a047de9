/* The loops over one row, for one type of activations and one type of tables. Included once for each such pair with
 *
 *   NAME(function)                  name of a function for this pair of types
 *   X, READ, WRITE, ...VECTOR       activations: type, to float, from float; sixteen at a time
 *   W, READ_W, READ_W_VECTOR        table of direct and cross: type, to float
 *
 * A row is given as a span, `start` to `end`, of whole groups. Inside a group the loops run over the pairs (j, half + j),
 * so that from 32 elements a group on both members are read in vectors as they lie. In smaller groups whose size is a
 * power of two both members stand in one vector, and the pairs cost one permutation. */

/* z1 = d1 x1 - c1 x2, z2 = d2 x2 + c2 x1 (back: d1 x1 + c2 x2, d2 x2 - c1 x1). x and z are one row or do not overlap. */
INLINE void NAME(turn_group)(const X *x, X *z, const W *direct, const W *cross, int64_t half, int back) {
    int64_t j = 0;
#if defined(ROADIE_VECTORS)
    for (; j + 16 <= half; j += 16) {
        Floats x1 = READ_VECTOR(x + j), x2 = READ_VECTOR(x + half + j);
        Floats d1 = READ_W_VECTOR(direct + j), d2 = READ_W_VECTOR(direct + half + j);
        Floats c1 = READ_W_VECTOR(cross + j), c2 = READ_W_VECTOR(cross + half + j);
        WRITE_VECTOR(z + j, back ? d1 * x1 + c2 * x2 : d1 * x1 - c1 * x2);
        WRITE_VECTOR(z + half + j, back ? d2 * x2 - c1 * x1 : d2 * x2 + c2 * x1);
    }
#endif
    INDEPENDENT
    for (int64_t i = j; i < half; i++) {
        float x1 = READ(x[i]), x2 = READ(x[half + i]), c1 = READ_W(cross[i]), c2 = READ_W(cross[half + i]);
        float z1 = READ_W(direct[i]) * x1, z2 = READ_W(direct[half + i]) * x2, minus_c1 = negative(c1);
        z[i] = WRITE(z1 + (back ? c2 : minus_c1) * x2);
        z[half + i] = WRITE(z2 + (back ? minus_c1 : c2) * x1);
    }
}

#if !defined(TURNS_ONLY) /* sums do not depend on the type of the tables */
/* own and partner of one row, added to what is there; g and kept are rows, own and partner sums of this group. */
INLINE void NAME(sum_group)(const X *g, const X *kept, float *own, float *partner, int64_t half) {
    int64_t j = 0;
#if defined(ROADIE_VECTORS)
    for (; j + 16 <= half; j += 16) {
        Floats g1 = READ_VECTOR(g + j), g2 = READ_VECTOR(g + half + j);
        Floats k1 = READ_VECTOR(kept + j), k2 = READ_VECTOR(kept + half + j);
        write_f32_vector(own + j, read_f32_vector(own + j) + g1 * k1);
        write_f32_vector(own + half + j, read_f32_vector(own + half + j) + g2 * k2);
        write_f32_vector(partner + j, read_f32_vector(partner + j) + g1 * k2);
        write_f32_vector(partner + half + j, read_f32_vector(partner + half + j) + g2 * k1);
    }
#endif
    INDEPENDENT
    for (int64_t i = j; i < half; i++) {
        float g1 = READ(g[i]), g2 = READ(g[half + i]), k1 = READ(kept[i]), k2 = READ(kept[half + i]);
        own[i] += g1 * k1;
        own[half + i] += g2 * k2;
        partner[i] += g1 * k2;
        partner[half + i] += g2 * k1;
    }
}
#endif

#if defined(ROADIE_VECTORS)
#define TURN_SIXTEENS(HALF)                                                                         \
    for (; start + 16 <= end; start += 16) {                                                        \
        Floats value = READ_VECTOR(x + start), weight = READ_W_VECTOR(cross + start);               \
        weight = (Floats)((Words)weight ^ FIRSTS(HALF));                                            \
        if (back) weight = PARTNERS(weight, HALF);                                                  \
        WRITE_VECTOR(z + start, READ_W_VECTOR(direct + start) * value + weight * PARTNERS(value, HALF)); \
    }
#define SUM_SIXTEENS(HALF)                                                                          \
    for (; start + 16 <= end; start += 16) {                                                        \
        float *o = own + start - first, *p = partner + start - first;                               \
        Floats gradient = READ_VECTOR(g + start), value = READ_VECTOR(kept + start);                \
        write_f32_vector(o, read_f32_vector(o) + gradient * value);                                 \
        write_f32_vector(p, read_f32_vector(p) + gradient * PARTNERS(value, HALF));                 \
    }
#else
#define TURN_SIXTEENS(HALF)
#define SUM_SIXTEENS(HALF)
#endif

/* `back` and the common halves are constants where the loops are compiled. */
INLINE void NAME(turn_span_any)(const X *x, X *z, const W *direct, const W *cross, int64_t start, int64_t end,
                                int64_t group, int back) {
#define GROUPS(HALF)                     \
    for (; start < end; start += group) \
        NAME(turn_group)(x + start, z + start, direct + start, cross + start, HALF, back);
    switch (group) {
        case 2: TURN_SIXTEENS(1) GROUPS(1) break;
        case 4: TURN_SIXTEENS(2) GROUPS(2) break;
        case 8: TURN_SIXTEENS(4) GROUPS(4) break;
        case 16: TURN_SIXTEENS(8) GROUPS(8) break;
        case 32: GROUPS(16) break;
        case 64: GROUPS(32) break;
        case 128: GROUPS(64) break;
        default: GROUPS(group / 2)
    }
#undef GROUPS
}

static void NAME(turn_span)(const void *x, void *z, const void *direct, const void *cross, int64_t start, int64_t end,
                     int64_t group, int back) {
    if (back) NAME(turn_span_any)(x, z, direct, cross, start, end, group, 1);
    else NAME(turn_span_any)(x, z, direct, cross, start, end, group, 0);
}

#if !defined(TURNS_ONLY)
/* The sums stand from element 0 on, whatever `start` is. */
static void NAME(sum_span)(const void *gradient_row, const void *kept_row, float *own, float *partner, int64_t start,
                    int64_t end, int64_t group) {
    const X *g = gradient_row, *kept = kept_row;
    int64_t first = start;
#define GROUPS(HALF)                    \
    for (; start < end; start += group) \
        NAME(sum_group)(g + start, kept + start, own + start - first, partner + start - first, HALF);
    switch (group) {
        case 2: SUM_SIXTEENS(1) GROUPS(1) break;
        case 4: SUM_SIXTEENS(2) GROUPS(2) break;
        case 8: SUM_SIXTEENS(4) GROUPS(4) break;
        case 16: SUM_SIXTEENS(8) GROUPS(8) break;
        case 32: GROUPS(16) break;
        case 64: GROUPS(32) break;
        case 128: GROUPS(64) break;
        default: GROUPS(group / 2)
    }
#undef GROUPS
}
#endif

#undef TURN_SIXTEENS
#undef SUM_SIXTEENS
