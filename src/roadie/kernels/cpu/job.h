/* What the kernels are told, and how they are called: by ctypes, with bytes that roadie.kernels.cpu packs, or from calls.c. */
#ifndef ROADIE_JOB_H
#define ROADIE_JOB_H

#include <stdint.h>

#if defined(_MSC_VER)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* Begin to fetch a line of the cache, which may be no memory at all. */
#if defined(__GNUC__)
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define PREFETCH(address) (void)(address)
#endif
enum { LINE = 64 };

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

/* One of the rotations in a row, most often the only one. A size of 0, of several: no rotation for that slot. */
typedef struct {
    const void *direct;     /* [slots, width] */
    const void *cross;      /* [slots, width] */
    const int32_t *sizes;   /* [slots], or NULL: all slots have group_size */
    int64_t group_size;
} Stage;

/* The same fields, in the same order, as roadie.kernels.cpu.JOB. Strides are in elements. */
typedef struct {
    const void *x;          /* [rows, width]; in backward the gradient of the output */
    const void *kept;       /* [rows, width], backward only */
    void *z;                /* [rows, width]; in backward the gradient of the input, or NULL */
    const int64_t *slots;   /* [rows / repeat], or NULL: all rows use slot 0 */
    float *own;             /* [slots, width], backward only, or NULL; those of the next stage stand 2 slots width further on */
    float *partner;         /* the same; NULL: right behind own */
    int64_t rows, width, x_stride, kept_stride, z_stride, repeat, num_slots;
    int64_t type;           /* of x, kept and z */
    int64_t table_type;     /* of direct and cross: FLOAT32, or that of x; any where that is FLOAT32 */
    int64_t threads;
    Stage at;               /* the one at hand, which C notes here */
} Job;

/* One more with every change of what the numbers and fields here mean, as in roadie.kernels.cpu. */
enum { INTERFACE = 3 };

/* What a job can be; GRADIENTS is BACKWARD, and then the gradients of its sums. Of several stages the input was kept. */
enum { ROTATE, BACKWARD, GRADIENTS, GRADIENTS_OF_OUTPUT };

EXPORT int roadie_run(int64_t operation, const Job *job, const Stage *stages, int64_t count);

#endif
