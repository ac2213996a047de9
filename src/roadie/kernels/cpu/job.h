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

/* The same fields, in the same order, as roadie.kernels.cpu.Job. Strides are in elements. */
typedef struct {
    const void *x;          /* [rows, width]; in backward the gradient of the output */
    const void *kept;       /* [rows, width], backward only */
    void *z;                /* [rows, width]; in backward the gradient of the input, or NULL */
    const void *direct;     /* [slots, width] */
    const void *cross;      /* [slots, width] */
    const int64_t *slots;   /* [rows / repeat], or NULL: all rows use slot 0 */
    const int32_t *sizes;   /* [slots], or NULL: all slots have group_size */
    float *own;             /* [slots, width], backward only, or NULL */
    float *partner;         /* [slots, width], backward only, or NULL */
    int64_t rows, width, x_stride, kept_stride, z_stride, repeat, num_slots, group_size;
    int64_t type;           /* of x, kept and z */
    int64_t table_type;     /* of direct and cross: FLOAT32, or that of x; any where that is FLOAT32 */
    int64_t threads;
} Job;

/* One of several rotations in a row: the fields of a Job that it has of its own. A size of 0: no rotation for that slot. */
typedef struct {
    const void *direct, *cross;
    const int32_t *sizes;
    int64_t group_size;
} Stage;

/* One more with every change of what the numbers and fields here mean, as in roadie.kernels.cpu. */
enum { INTERFACE = 2 };

/* What a job can be; GRADIENTS is BACKWARD, and then the gradients of its sums. */
enum { ROTATE, BACKWARD, GRADIENTS, GRADIENTS_OF_OUTPUT };

int roadie_rotate(const Job *job);
EXPORT int roadie_run(int64_t operation, const Job *job);
EXPORT int roadie_rotate_chain(const Stage *stages, int64_t count, const Job *job);

#endif
