/* The rotation on CPUs: see ../contract.py for what is computed. Plain C without Python or torch in it, called by ctypes and from
 * calls.c.
 *
 * What counts is memory: every element is read once and written once, both members of a pair together; the tables of one
 * layer stay in the first levels of the cache. Products and sums are rounded one by one (no fused multiply-add), as in
 * the eager implementation, so that both give the same bits.
 *
 * Threads: OpenMP, as many as the caller says. Rows are shared out evenly; the sums over rows are cut into tasks whose
 * sizes depend on the shapes alone, and added up in order, so that the result does not depend on the threads. */
#if defined(__linux__)
#define _DEFAULT_SOURCE /* madvise */
#include <sys/mman.h>
#endif
#include <stdlib.h>
#include <string.h>

#define INLINE static inline
#include "element.h"
#include "job.h"
#include "spans.h"

/* The sets of loops that were compiled (setup.py says which), and the best that this processor can run. */
extern const Spans spans_default;
#if defined(ROADIE_X86_LEVELS)
extern const Spans spans_v3, spans_v4, spans_v4_bf16;
#endif

static const Spans *spans(void) {
#if defined(ROADIE_X86_LEVELS)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
        return __builtin_cpu_supports("avx512bf16") ? &spans_v4_bf16 : &spans_v4;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
        return &spans_v3;
#endif
    return &spans_default;
}

enum { SHORT = 16, TASK_ROWS = 128, TASK_COLUMNS = 1024, BLOCK = 1024, AHEAD = 2, MOST_LINES = 64 };
enum { DONE = 0, OUT_OF_MEMORY = 1, UNKNOWN_TYPE = 2, UNKNOWN_SLOT = 3, ODD_GROUP = 4 };

/* Rows of one slot, and columns, that backward treats at a time: the rows are number `first` to `first + count` of the
 * slot's rows, which are those of the entries order[entries ...] of `slots`. */
typedef struct {
    int64_t slot, first, count, start, end;
    const int64_t *entries;
} Task;

static inline int64_t slot_of(const Job *job, int64_t row) { return job->slots ? job->slots[row / job->repeat] : 0; }

static inline int64_t group_of(const Job *job, int64_t slot) { return job->at.sizes ? job->at.sizes[slot] : job->at.group_size; }

static inline int64_t row_of(const Job *job, const Task *task, int64_t i) {
    int64_t number = task->first + i;
    return task->entries ? task->entries[number / job->repeat] * job->repeat + number % job->repeat : number;
}

/* Tables are float32, or of the type of the rows; of either type where rows are float32. */
static int is_known(const Job *job) {
    if (job->type < FLOAT32 || job->type > FLOAT16 || job->table_type < FLOAT32 || job->table_type > FLOAT16) return 0;
    return job->table_type == FLOAT32 || job->type == FLOAT32 || job->table_type == job->type;
}

static TurnSpan *turn_of(const Job *job, const Spans *loops) {
    if (job->type == FLOAT32) return loops->turn_wide[job->table_type];
    return loops->turn[job->type][job->table_type != FLOAT32];
}

/* The job with the stage of this number at hand. */
static Job at_stage(const Job *job, const Stage *stages, int64_t number) {
    Job at = *job;
    int64_t table = job->num_slots * job->width;
    at.at = stages[number];
    if (at.own && !at.partner) at.partner = at.own + table;
    if (at.own) at.own += 2 * number * table, at.partner += 2 * number * table;
    return at;
}

static int64_t bytes_of(int64_t type) { return type == FLOAT32 ? 4 : 2; }

static const void *row_at(const void *base, int64_t row, int64_t stride, int64_t type) {
    return (const char *)base + row * stride * bytes_of(type);
}

static double table_value(const Job *job, const void *table, int64_t slot, int64_t column) {
    int64_t place = slot * job->width + column;
    if (job->table_type == FLOAT32) return ((const float *)table)[place];
    uint16_t value = ((const uint16_t *)table)[place];
    return job->table_type == BFLOAT16 ? read_bf16(value) : read_f16(value);
}

/* Columns start to end of one row of x, turned into the same columns of z. */
static void turn_row(const Job *job, TurnSpan *turn, int64_t row, int64_t start, int64_t end, int back) {
    int64_t slot = slot_of(job, row), size = bytes_of(job->type);
    const void *x = row_at(job->x, row, job->x_stride, job->type);
    void *z = (void *)row_at(job->z, row, job->z_stride, job->type);
    if (slot < 0) {
        if (x != z) memcpy((char *)z + start * size, (const char *)x + start * size, (size_t)((end - start) * size));
        return;
    }
    const void *direct = row_at(job->at.direct, slot, job->width, job->table_type);
    const void *cross = row_at(job->at.cross, slot, job->width, job->table_type);
    turn(x, z, direct, cross, start, end, group_of(job, slot), back);
}

/* One task of backward: rows of one slot, columns start to end. Gradients of x, and the sums own and partner: of SHORT rows
 * at a time in float32, and these in float64, so that no sum of float32 has many terms. */
static void back_task(const Job *job, const Spans *loops, const Task *task, float *part, float *brief, double *total) {
    int64_t start = task->start, end = task->end, width = end - start;
    TurnSpan *turn = turn_of(job, loops);
    if (part) memset(total, 0, (size_t)(2 * width) * sizeof(double));
    for (int64_t from = 0; from < task->count; from += SHORT) {
        int64_t to = from + SHORT < task->count ? from + SHORT : task->count;
        if (part) memset(brief, 0, (size_t)(2 * width) * sizeof(float));
        for (int64_t i = from; i < to; i++) {
            int64_t row = row_of(job, task, i);
            if (job->z) turn_row(job, turn, row, start, end, 1);
            if (part)
                loops->sum[job->type](row_at(job->x, row, job->x_stride, job->type),
                                      row_at(job->kept, row, job->kept_stride, job->type), brief, brief + width, start,
                                      end, group_of(job, task->slot));
        }
        if (part) loops->widen_and_add(total, brief, 2 * width);
    }
    for (int64_t i = 0; part && i < 2 * width; i++) part[i] = (float)total[i];
}

/* What would read or write beyond the tensors is refused: the cost is a glance at every routed row. */
static int check(const Job *job) {
    if (!is_known(job)) return UNKNOWN_TYPE;
    if (!job->at.sizes && (job->at.group_size < 2 || job->at.group_size % 2 || job->width % job->at.group_size)) return ODD_GROUP;
    for (int64_t entry = 0; entry < (job->slots ? job->rows / job->repeat : 1); entry++) {
        int64_t slot = job->slots ? job->slots[entry] : 0;
        if (slot < -1 || slot >= job->num_slots) return UNKNOWN_SLOT;
        if (slot < 0 || !job->at.sizes) continue;
        if (job->at.sizes[slot] < 2 || job->at.sizes[slot] % 2 || job->width % job->at.sizes[slot]) return ODD_GROUP;
    }
    return DONE;
}

/* Large results lie in memory that nobody has touched: with pages of 2 MiB the system clears it several times faster. */
static void prefer_huge_pages(const Job *job) {
#if defined(MADV_HUGEPAGE)
    const int64_t page = 1 << 21, size = job->rows * job->z_stride * bytes_of(job->type);
    uintptr_t first = ((uintptr_t)job->z + page - 1) & ~(uintptr_t)(page - 1);
    uintptr_t last = ((uintptr_t)job->z + (uintptr_t)size) & ~(uintptr_t)(page - 1);
    if (job->z && job->z != job->x && last >= first + 2 * page) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)job;
#endif
}

/* A row with a slot of its own reads its table from memory, in pieces too short for the processor to foresee: the table of
 * the row after next is begun while this one is rotated, up to where a long one is foreseen. */
static void begin_row(const Job *job, int64_t row) {
    if (!job->slots || row + AHEAD >= job->rows) return;
    int64_t slot = slot_of(job, row + AHEAD), lines = job->width * bytes_of(job->table_type) / LINE;
    if (slot < 0 || slot == slot_of(job, row)) return;
    if (lines > MOST_LINES) lines = MOST_LINES;
    const char *direct = row_at(job->at.direct, slot, job->width, job->table_type);
    const char *cross = row_at(job->at.cross, slot, job->width, job->table_type);
    for (int64_t line = 0; line < lines; line++) PREFETCH(direct + line * LINE), PREFETCH(cross + line * LINE);
}

static int rotate(const Job *job) {
    int status = check(job);
    if (status) return status;
    TurnSpan *turn = turn_of(job, spans());
    prefer_huge_pages(job);
    int64_t pieces = job->threads < job->rows ? job->threads : job->rows;
    int64_t piece;
#pragma omp parallel for num_threads((int)pieces) schedule(static) if (pieces > 1)
    for (piece = 0; piece < pieces; piece++)
        for (int64_t row = job->rows * piece / pieces; row < job->rows * (piece + 1) / pieces; row++) {
            begin_row(job, row);
            turn_row(job, turn, row, 0, job->width, 0);
        }
    return DONE;
}

static inline int64_t stage_group(const Stage *stage, int64_t slot) {
    return stage->sizes ? stage->sizes[slot] : stage->group_size;
}

/* Columns to take through all rotations at a time, whole groups of each: about BLOCK where groups nest, else all. */
static int64_t block_of(const Job *job, const Stage *stages, int64_t count, int64_t slot) {
    int64_t largest = 0;
    for (int64_t k = 0; k < count; k++)
        if (stage_group(stages + k, slot) > largest) largest = stage_group(stages + k, slot);
    for (int64_t k = 0; k < count; k++) {
        int64_t group = stage_group(stages + k, slot);
        if (group && largest % group) return job->width;
    }
    if (!largest) return 0;
    int64_t block = largest < BLOCK ? BLOCK - BLOCK % largest : largest;
    return block < job->width ? block : job->width;
}

static void widened(const Job *job, const Spans *loops, const void *from, float *to, int64_t count) {
    if (job->type == FLOAT32) memcpy(to, from, (size_t)count * sizeof(float));
    else loops->widen[job->type](from, to, count);
}

/* One row through all rotations of its slot, a block after the other, which stays in the first level of the cache: in float32
 * in `scratch` (in z itself where that is float32), and rounded once. */
static void turn_row_chain(const Job *job, const Spans *loops, const Stage *stages, int64_t count, int64_t row,
                           float *scratch) {
    int64_t slot = slot_of(job, row), size = bytes_of(job->type), table_size = bytes_of(job->table_type);
    const char *x = row_at(job->x, row, job->x_stride, job->type);
    char *z = (char *)row_at(job->z, row, job->z_stride, job->type);
    int64_t block = slot < 0 ? 0 : block_of(job, stages, count, slot);
    if (!block) {
        if (x != z) memcpy(z, x, (size_t)(job->width * size));
        return;
    }
    TurnSpan *turn = loops->turn_wide[job->table_type];
    for (int64_t start = 0; start < job->width; start += block) {
        int64_t columns = start + block < job->width ? block : job->width - start;
        int64_t place = (slot * job->width + start) * table_size;
        const void *from = x + start * size;
        void *into = job->type == FLOAT32 ? (void *)(z + start * size) : scratch;
        if (job->type != FLOAT32) {
            loops->widen[job->type](from, scratch, columns);
            from = scratch;
        }
        for (int64_t k = 0; k < count; k++) {
            int64_t group = stage_group(stages + k, slot);
            if (!group) continue;
            turn(from, into, (const char *)stages[k].direct + place, (const char *)stages[k].cross + place, 0, columns,
                 group, 0);
            from = into;
        }
        if (job->type != FLOAT32) loops->narrow[job->type](scratch, z + start * size, columns);
    }
}

/* As back_task, through several rotations in a row, of which the input was kept: what each was given is computed again, in
 * float32 in `scratch`, a line of `columns` for each stage, and one for the gradient. */
static void back_task_chain(const Job *job, const Stage *stages, int64_t count, const Spans *loops, const Task *task,
                            float *part, int64_t columns, float *scratch, float *brief, double *total) {
    int64_t slot = task->slot, start = task->start, width = task->end - start, size = bytes_of(job->type);
    int64_t sums = count * 2 * columns, place = (slot * job->width + start) * bytes_of(job->table_type);
    TurnSpan *turn = loops->turn_wide[job->table_type];
    float *value = scratch + count * columns;
    if (part) memset(total, 0, (size_t)sums * sizeof(double));
    for (int64_t from = 0; from < task->count; from += SHORT) {
        int64_t to = from + SHORT < task->count ? from + SHORT : task->count;
        if (part) memset(brief, 0, (size_t)sums * sizeof(float));
        for (int64_t i = from; i < to; i++) {
            int64_t row = row_of(job, task, i);
            const char *gradient = (const char *)row_at(job->x, row, job->x_stride, job->type) + start * size;
            char *z = job->z ? (char *)row_at(job->z, row, job->z_stride, job->type) + start * size : NULL;
            if (slot < 0) {
                if (z) memcpy(z, gradient, (size_t)(width * size));
                continue;
            }
            if (part) {
                const char *kept = (const char *)row_at(job->kept, row, job->kept_stride, job->type) + start * size;
                widened(job, loops, kept, scratch, width);
            }
            for (int64_t k = 0; part && k < count - 1; k++) {
                float *given = scratch + k * columns, *gives = given + columns;
                const char *direct = stages[k].direct, *cross = stages[k].cross;
                int64_t group = stage_group(stages + k, slot);
                if (group) turn(given, gives, direct + place, cross + place, 0, width, group, 0);
                else memcpy(gives, given, (size_t)width * sizeof(float));
            }
            widened(job, loops, gradient, value, width);
            for (int64_t k = count - 1; k >= 0; k--) {
                float *own = brief + k * 2 * columns;
                const char *direct = stages[k].direct, *cross = stages[k].cross;
                int64_t group = stage_group(stages + k, slot);
                if (!group) continue;
                if (part) loops->sum[FLOAT32](value, scratch + k * columns, own, own + width, 0, width, group);
                if (z || k) turn(value, value, direct + place, cross + place, 0, width, group, 1);
            }
            if (z && job->type == FLOAT32) memcpy(z, value, (size_t)width * sizeof(float));
            else if (z) loops->narrow[job->type](value, z, width);
        }
        if (part) loops->widen_and_add(total, brief, sums);
    }
    for (int64_t i = 0; part && i < sums; i++) part[i] = (float)total[i];
}

static int check_stage(const Job *job, const Stage *stage) {
    if (!stage->sizes && (stage->group_size < 2 || stage->group_size % 2 || job->width % stage->group_size)) return ODD_GROUP;
    for (int64_t entry = 0; stage->sizes && entry < (job->slots ? job->rows / job->repeat : 1); entry++) {
        int64_t slot = job->slots ? job->slots[entry] : 0;
        int64_t group = slot < 0 ? 0 : stage->sizes[slot];
        if (group && (group < 2 || group % 2 || job->width % group)) return ODD_GROUP;
    }
    return DONE;
}

static int check_chain(const Job *job, const Stage *stages, int64_t count) {
    if (!is_known(job)) return UNKNOWN_TYPE;
    for (int64_t entry = 0; job->slots && entry < job->rows / job->repeat; entry++)
        if (job->slots[entry] < -1 || job->slots[entry] >= job->num_slots) return UNKNOWN_SLOT;
    int status = DONE;
    for (int64_t k = 0; k < count && !status; k++) status = check_stage(job, stages + k);
    return status;
}

/* As rotate, through `count` rotations in a row. */
static int rotate_chain(const Job *job, const Stage *stages, int64_t count) {
    int status = check_chain(job, stages, count);
    if (status) return status;
    const Spans *loops = spans();
    prefer_huge_pages(job);
    int64_t pieces = job->threads < job->rows ? job->threads : job->rows;
    int64_t piece;
    int failed = 0;
#pragma omp parallel for num_threads((int)pieces) schedule(static) if (pieces > 1)
    for (piece = 0; piece < pieces; piece++) {
        float *scratch = job->type == FLOAT32 ? NULL : malloc((size_t)job->width * sizeof(float));
        if (job->type != FLOAT32 && !scratch) {
#pragma omp atomic write
            failed = 1;
        } else {
            for (int64_t row = job->rows * piece / pieces; row < job->rows * (piece + 1) / pieces; row++)
                turn_row_chain(job, loops, stages, count, row, scratch);
        }
        free(scratch);
    }
    return failed ? OUT_OF_MEMORY : DONE;
}

/* Everything backward needs besides the job: tasks, the order of the routed rows by slot, and room for partial sums. */
typedef struct {
    Task *tasks;
    int64_t count, columns;     /* tasks; columns of a task */
    int64_t *order;             /* entries of job->slots by slot, -1 first */
    int64_t *begin;             /* [num_slots + 2]: where the entries of slot s begin in `order`, at index s + 1 */
    int64_t *first_task;        /* [num_slots + 1]: where the tasks of slot s begin */
    float *parts;               /* [tasks, stages, 2, columns] */
    int64_t stages;
} Plan;

static void release(Plan *plan) {
    free(plan->tasks), free(plan->order), free(plan->begin), free(plan->first_task), free(plan->parts);
}

/* Columns of a task: whole groups of each stage, about TASK_COLUMNS; all where slots differ in group size, or groups do not nest. */
static int64_t task_columns(const Job *job, const Stage *stages, int64_t count) {
    int64_t largest = 0;
    for (int64_t k = 0; k < count; k++) {
        if (stages[k].sizes) return job->width;
        if (stages[k].group_size > largest) largest = stages[k].group_size;
    }
    for (int64_t k = 0; k < count; k++)
        if (largest % stages[k].group_size) return job->width;
    int64_t columns = largest < TASK_COLUMNS ? TASK_COLUMNS - TASK_COLUMNS % largest : largest;
    return columns < job->width ? columns : job->width;
}

/* A stable counting sort of the entries by slot. */
static int sort_entries(const Job *job, Plan *plan) {
    int64_t entries = job->slots ? job->rows / job->repeat : 0, slots = job->num_slots;
    plan->order = malloc((size_t)(entries + 1) * sizeof(int64_t));
    plan->begin = calloc((size_t)(slots + 3), sizeof(int64_t));
    if (!plan->order || !plan->begin) return OUT_OF_MEMORY;
    for (int64_t e = 0; e < entries; e++) plan->begin[job->slots[e] + 3]++;
    for (int64_t s = 1; s < slots + 3; s++) plan->begin[s] += plan->begin[s - 1];
    /* begin[s + 2] is now where slot s goes on; after placing its entries it is where slot s + 1 begins. */
    for (int64_t e = 0; e < entries; e++) plan->order[plan->begin[job->slots[e] + 2]++] = e;
    return DONE;
}

static int64_t rows_of_slot(const Job *job, const Plan *plan, int64_t slot) {
    if (!job->slots) return slot == 0 ? job->rows : 0;
    return (plan->begin[slot + 2] - plan->begin[slot + 1]) * job->repeat;
}

static int64_t divided_up(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

static void add_tasks(const Job *job, Plan *plan, int64_t slot) {
    int64_t rows = rows_of_slot(job, plan, slot);
    const int64_t *entries = job->slots ? plan->order + plan->begin[slot + 1] : NULL;
    for (int64_t start = 0; start < job->width; start += plan->columns)
        for (int64_t first = 0; first < rows; first += TASK_ROWS) {
            int64_t end = start + plan->columns < job->width ? start + plan->columns : job->width;
            int64_t count = first + TASK_ROWS < rows ? TASK_ROWS : rows - first;
            plan->tasks[plan->count++] = (Task){slot, first, count, start, end, entries};
        }
}

static int make_plan(const Job *job, const Stage *stages, int64_t count, Plan *plan) {
    int64_t number = 0, strips;
    plan->columns = task_columns(job, stages, count), plan->stages = count;
    strips = divided_up(job->width, plan->columns);
    if (sort_entries(job, plan)) return OUT_OF_MEMORY;
    for (int64_t s = -1; s < job->num_slots; s++) number += divided_up(rows_of_slot(job, plan, s), TASK_ROWS) * strips;
    plan->tasks = malloc((size_t)(number + 1) * sizeof(Task));
    plan->first_task = malloc((size_t)(job->num_slots + 1) * sizeof(int64_t));
    if (job->own) plan->parts = malloc((size_t)(number * count * 2 * plan->columns + 1) * sizeof(float));
    if (!plan->tasks || !plan->first_task || (job->own && !plan->parts)) return OUT_OF_MEMORY;
    for (int64_t s = 0; s < job->num_slots; s++) {
        plan->first_task[s] = plan->count;
        add_tasks(job, plan, s);
    }
    plan->first_task[job->num_slots] = plan->count;
    if (job->z && job->slots) add_tasks(job, plan, -1); /* the base's rows pass their gradient on */
    return DONE;
}

/* own and partner of one slot in a stage: the parts of its tasks, strip by strip, in float64 and in order. */
static void add_up(const Job *job, const Spans *loops, const Plan *plan, int64_t slot, int64_t stage, double *total) {
    int64_t task = plan->first_task[slot], last = plan->first_task[slot + 1];
    for (int64_t start = 0; start < job->width; start += plan->columns) {
        int64_t end = start + plan->columns < job->width ? start + plan->columns : job->width, width = end - start;
        memset(total, 0, (size_t)(2 * width) * sizeof(double));
        for (; task < last && plan->tasks[task].start == start; task++)
            loops->widen_and_add(total, plan->parts + (task * plan->stages + stage) * 2 * plan->columns, 2 * width);
        float *own = job->own + slot * job->width + start, *partner = job->partner + slot * job->width + start;
        for (int64_t i = 0; i < width; i++) own[i] = (float)total[i];
        for (int64_t i = 0; i < width; i++) partner[i] = (float)total[width + i];
    }
}

static int run_plan(const Job *job, const Stage *stages, const Plan *plan) {
    const Spans *loops = spans();
    const int64_t count = plan->stages, sums = count * 2 * plan->columns, lines = count > 1 ? (count + 1) * plan->columns : 1;
    int failed = 0;
    int threads = job->threads > 1 ? (int)job->threads : 1;
    (void)threads;
#pragma omp parallel num_threads(threads)
    {
        float *brief = malloc((size_t)sums * sizeof(float)), *scratch = malloc((size_t)lines * sizeof(float));
        double *total = malloc((size_t)sums * sizeof(double));
        int usable = brief && total && scratch;
        int64_t i;
        if (!usable) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (i = 0; i < plan->count; i++) {
            const Task *task = plan->tasks + i;
            float *part = job->own && task->slot >= 0 ? plan->parts + i * sums : NULL;
            if (!usable) continue;
            if (count == 1) back_task(job, loops, task, part, brief, total);
            else back_task_chain(job, stages, count, loops, task, part, plan->columns, scratch, brief, total);
        }
#pragma omp for schedule(static)
        for (i = 0; i < (job->own ? job->num_slots * count : 0); i++)
            if (usable) {
                Job at = at_stage(job, stages, i % count);
                add_up(&at, loops, plan, i / count, i % count, total);
            }
        free(brief), free(scratch), free(total);
    }
    return failed ? OUT_OF_MEMORY : DONE;
}

static int backward(const Job *job, const Stage *stages, int64_t count) {
    Plan plan = {0};
    int status = count == 1 ? check(job) : check_chain(job, stages, count);
    if (!status) prefer_huge_pages(job);
    if (!status) status = make_plan(job, stages, count, &plan);
    if (!status) status = run_plan(job, stages, &plan);
    release(&plan);
    return status;
}

/* Columns i and k of one slot: from sums to gradients of direct and cross. Where the output was kept, sum of g output^T =
 * M R^T, and M is what is wanted. */
static void gradient_of_pair(const Job *job, int64_t slot, int64_t i, int64_t k, int of_output) {
    float *own = job->own + slot * job->width, *partner = job->partner + slot * job->width;
    double ii = own[i], ik = partner[i], ki = partner[k], kk = own[k];
    if (of_output) {
        double d1 = table_value(job, job->at.direct, slot, i), d2 = table_value(job, job->at.direct, slot, k);
        double c1 = table_value(job, job->at.cross, slot, i), c2 = table_value(job, job->at.cross, slot, k);
        double determinant = d1 * d2 + c1 * c2, m_ii = ii, m_ki = ki;
        int is_unused = ii == 0 && ik == 0 && ki == 0 && kk == 0;
        double scale = is_unused ? 0.0 : 1.0 / determinant;
        ii = (m_ii * d2 + ik * c1) * scale, ik = (ik * d1 - m_ii * c2) * scale;
        ki = (m_ki * d2 + kk * c1) * scale, kk = (kk * d1 - m_ki * c2) * scale;
    }
    own[i] = (float)ii, own[k] = (float)kk;
    partner[i] = (float)-ik, partner[k] = (float)ki;
}

/* Turns the sums own and partner into the gradients of direct and cross, in place. may_lack: slots may have no rotation. */
static int gradient(const Job *job, int of_output, int may_lack) {
    for (int64_t slot = 0; slot < job->num_slots; slot++) {
        int64_t group = group_of(job, slot), half = group / 2;
        if (!group && may_lack) continue; /* its sums are 0 */
        if (group < 2 || group % 2 || job->width % group) return ODD_GROUP; /* of a slot that no row uses */
        for (int64_t start = 0; start < job->width; start += group)
            for (int64_t j = start; j < start + half; j++) gradient_of_pair(job, slot, j, j + half, of_output);
    }
    return DONE;
}

/* One of the operations, through `count` rotations in a row; gives a status. */
EXPORT int roadie_run(int64_t operation, const Job *job, const Stage *stages, int64_t count) {
    Job first = at_stage(job, stages, 0);
    if (operation == ROTATE) return count == 1 ? rotate(&first) : rotate_chain(job, stages, count);
    int status = backward(&first, stages, count);
    for (int64_t k = 0; k < count && !status && operation != BACKWARD; k++) {
        Job at = at_stage(job, stages, k);
        status = gradient(&at, operation == GRADIENTS_OF_OUTPUT, count > 1);
    }
    return status;
}

/* So that the caller can see that both sides mean the same. */
EXPORT int64_t roadie_interface(void) { return INTERFACE; }
EXPORT int64_t roadie_stage_bytes(void) { return (int64_t)sizeof(Stage); }
EXPORT int64_t roadie_job_bytes(void) { return (int64_t)sizeof(Job); }
