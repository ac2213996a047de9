/* What Python calls where microseconds count: callables that read tensors by themselves, in a third of the time that ctypes takes.
 *
 * torch tells C what a tensor is through DLPack's exchange API (roadie.kernels.cpu has the address of its function). Of Python
 * only functions of the stable ABI are used; they are declared here and found when the object is loaded, so that one object
 * serves every Python 3, and building it needs no headers. Each callable holds a tuple: bytes that Python packed, and what must
 * stay alive. */
#include <string.h>

#include "job.h"

typedef struct { /* Python's; nothing of what is in it is used */
    void *unknown;
} Object;
typedef Object *Method(Object *self, Object *const *arguments, intptr_t count);
typedef struct {
    const char *name;
    Method *method;
    int flags;
    const char *documentation;
} Definition;
enum { FASTCALL = 0x80 };

extern Object *PyCFunction_NewEx(Definition *definition, Object *self, Object *module);
extern Object *PyTuple_GetItem(Object *tuple, intptr_t place);
extern intptr_t PyTuple_Size(Object *tuple);
extern Object *PyDict_GetItem(Object *dict, Object *key);
extern Object *PyObject_Type(Object *object);
extern Object *PyObject_GetAttr(Object *object, Object *name);
extern int PyObject_IsTrue(Object *object);
extern Object *PyBool_FromLong(long value);
extern Object *PyLong_FromLong(long value);
extern long long PyLong_AsLongLong(Object *number);
extern char *PyBytes_AsString(Object *bytes);
extern char *PyByteArray_AsString(Object *bytes);
extern void Py_DecRef(Object *object);
extern void PyErr_Clear(void);
extern void *PyEval_SaveThread(void);
extern void PyEval_RestoreThread(void *thread);
extern Object _Py_NoneStruct;

/* DLPack's DLTensor. */
typedef struct {
    char *data;
    struct {
        int32_t kind, number;
    } device;
    int32_t dims;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape, *strides;
    uint64_t offset;
} Tensor;
enum { ON_CPU = 1, FLOAT = 2, BFLOAT = 4 };
typedef int Read(Object *object, Tensor *tensor);

static int is_of_type(Object *object, const void *type) {
    Object *found = PyObject_Type(object);
    Py_DecRef(found);
    return found == type;
}

/* Whether torch has told what a tensor is. */
static int is_read(Read *read, Object *object, Tensor *tensor) {
    if (read(object, tensor)) {
        PyErr_Clear();
        return 0;
    }
    tensor->data += tensor->offset;
    return 1;
}

static int is_on_cpu(Read *read, Object *object, Tensor *tensor) {
    return is_read(read, object, tensor) && tensor->device.kind == ON_CPU;
}

/* The number of elements, -1 where there are gaps in the memory. */
static int64_t size_of(const Tensor *tensor) {
    int64_t size = 1;
    for (int32_t i = tensor->dims - 1; i >= 0; i--) {
        if (tensor->shape[i] != 1 && tensor->strides[i] != size) return -1;
        size *= tensor->shape[i];
    }
    return size;
}

static int64_t type_of(const Tensor *tensor) {
    if (tensor->dtype.bits == 32 && tensor->dtype.code == FLOAT) return FLOAT32;
    if (tensor->dtype.bits != 16) return -1;
    return tensor->dtype.code == BFLOAT ? BFLOAT16 : tensor->dtype.code == FLOAT ? FLOAT16 : -1;
}

/* The same fields as roadie.kernels.cpu.PREPARED, then a Job and the Stages. */
typedef struct {
    Read *read;
    const void *tensor_type;
    int64_t routed, dims, lead[2]; /* entries of job.slots, or 1, and their shape */
    int64_t table_bytes, most;     /* what is read of tables at most, and how much work is too much for one thread */
    int64_t count;                 /* of stages */
    Job job;
    Stage stages[];
} Prepared;

/* Whether y is what was prepared for; then the job is completed. */
static int fits(const Prepared *prepared, Object *y, Object *z, Job *job) {
    Tensor from, into;
    if (!is_of_type(y, prepared->tensor_type) || !is_on_cpu(prepared->read, y, &from)) return 0;
    int64_t size = from.dims > 0 ? size_of(&from) : 0;
    if (size <= 0 || type_of(&from) != job->type || from.shape[from.dims - 1] != job->width) return 0;
    for (int64_t i = 0; i < prepared->dims; i++)
        if (i >= from.dims - 1 || from.shape[i] != prepared->lead[i]) return 0;
    if (2 * size * (job->type == FLOAT32 ? 4 : 2) + prepared->table_bytes >= prepared->most) return 0;
    job->x = job->z = from.data;
    job->rows = size / job->width;
    job->repeat = job->rows / prepared->routed;
    if (!z) return 1;
    if (!is_of_type(z, prepared->tensor_type) || !is_on_cpu(prepared->read, z, &into)) return 0;
    if (size_of(&into) != size || type_of(&into) != job->type) return 0;
    job->z = into.data;
    return 1;
}

/* rotate(y) or rotate(y, z): R y in place, or into z; whether that was done. Nothing is done where y is not as expected. */
static Object *rotate(Object *self, Object *const *arguments, intptr_t count) {
    const Prepared *prepared = (const Prepared *)PyBytes_AsString(PyTuple_GetItem(self, 0));
    Job job = prepared->job;
    if (count < 1 || !fits(prepared, arguments[0], count > 1 ? arguments[1] : NULL, &job)) return PyBool_FromLong(0);
    return PyBool_FromLong(!roadie_run(ROTATE, &job, prepared->stages, prepared->count));
}

/* Rows ``[T, D]``, each without gaps; what None stands for has no data. */
typedef struct {
    char *data;
    int64_t rows, width, stride, type;
} Rows;

static int are_rows(Read *read, Object *object, Rows *rows) {
    Tensor tensor;
    *rows = (Rows){0};
    if (object == &_Py_NoneStruct) return 1;
    if (!is_on_cpu(read, object, &tensor) || tensor.dims != 2 || (tensor.shape[1] > 1 && tensor.strides[1] != 1)) return 0;
    *rows = (Rows){tensor.data, tensor.shape[0], tensor.shape[1], tensor.strides[0], type_of(&tensor)};
    return rows->type >= 0;
}

static const void *memory_of(Read *read, Object *object, int *is_right) {
    Tensor tensor;
    if (object == &_Py_NoneStruct) return NULL;
    *is_right = *is_right && is_on_cpu(read, object, &tensor) && size_of(&tensor) >= 0;
    return *is_right ? tensor.data : NULL;
}

static int64_t integer_at(Object *tuple, intptr_t place) { return PyLong_AsLongLong(PyTuple_GetItem(tuple, place)); }

enum { NOT_READ = -1, LARGE = 1 << 20, MOST_STAGES = 16 };

static Stage stage_of(Read *read, Object *turns, int *is_right) {
    return (Stage){
        .direct = memory_of(read, PyTuple_GetItem(turns, 0), is_right),
        .cross = memory_of(read, PyTuple_GetItem(turns, 1), is_right),
        .sizes = memory_of(read, PyTuple_GetItem(turns, 4), is_right),
        .group_size = integer_at(turns, 5),
    };
}

/* run(operation, x, kept, z, chain, own, partner, threads): one of the kernels, on tensors; its status. kept: an address and a
 * stride, or None; chain: Turns of contract.py; z, own, partner: a tensor or None. */
static Object *run(Object *self, Object *const *arguments, intptr_t count) {
    Read *read = *(Read *const *)PyBytes_AsString(PyTuple_GetItem(self, 0));
    if (count != 8) return PyLong_FromLong(NOT_READ);
    Object *kept = arguments[2], *chain = arguments[4];
    Rows x = {0}, z = {0}, direct = {0};
    if (!are_rows(read, arguments[1], &x) || !are_rows(read, arguments[3], &z) || !x.data) return PyLong_FromLong(NOT_READ);
    Stage stages[MOST_STAGES];
    int64_t length = PyTuple_Size(chain);
    if (length < 1 || length > MOST_STAGES) return PyLong_FromLong(NOT_READ);
    Object *first = PyTuple_GetItem(chain, 0);
    int is_right = are_rows(read, PyTuple_GetItem(first, 0), &direct);
    for (int64_t k = 0; k < length; k++) stages[k] = stage_of(read, PyTuple_GetItem(chain, k), &is_right);
    Job job = {
        .x = x.data, .z = z.data,
        .slots = memory_of(read, PyTuple_GetItem(first, 2), &is_right),
        .own = (float *)memory_of(read, arguments[5], &is_right),
        .partner = (float *)memory_of(read, arguments[6], &is_right),
        .rows = x.rows, .width = x.width, .x_stride = x.stride, .z_stride = z.stride,
        .repeat = integer_at(first, 3), .num_slots = direct.rows,
        .type = x.type, .table_type = direct.type, .threads = PyLong_AsLongLong(arguments[7]),
    };
    if (kept != &_Py_NoneStruct) {
        job.kept = (const void *)(intptr_t)integer_at(kept, 0);
        job.kept_stride = integer_at(kept, 1);
    }
    if (!is_right) return PyLong_FromLong(NOT_READ);
    int64_t operation = PyLong_AsLongLong(arguments[0]);
    void *thread = job.rows * job.width >= LARGE ? PyEval_SaveThread() : NULL; /* other threads may run Python meanwhile */
    int status = roadie_run(operation, &job, stages, length);
    if (thread) PyEval_RestoreThread(thread);
    return PyLong_FromLong(status);
}

/* One tensor, as roadie.kernels.stamp.SEEN packs it. writes: how many torch has counted, or -1 on the CPU, where there is content to
 * compare; hint: an address inside what torch keeps of the tensor, noted at the first look. */
typedef struct {
    const char *data, *content;
    int64_t bytes, writes;
    const char *hint;
} Seen;

/* The same fields as roadie.kernels.stamp.HEAD. */
typedef struct {
    Read *read;
    int64_t count;
    Seen seen[];
} Stamp;

/* The time of a look is that of cache misses, some ten for each tensor: those of a later one are begun ahead. */
enum { AHEAD = 8 };

static void begin(const Seen *seen, Object *store, Object *tensor) {
    PREFETCH(store), PREFETCH(tensor), PREFETCH(seen->data), PREFETCH(seen->content);
    for (int line = -3; line < 4; line++) PREFETCH(seen->hint + line * LINE);
}

/* Whether a tensor elsewhere than on the CPU is not trained, and torch has counted no write. */
static int is_unwritten(Object *tensor, Object *version, Object *requires_grad, int64_t writes) {
    Object *now = PyObject_GetAttr(tensor, version), *is_trained = PyObject_GetAttr(tensor, requires_grad);
    int is_same = now && is_trained && PyLong_AsLongLong(now) == writes && !PyObject_IsTrue(is_trained);
    Py_DecRef(now), Py_DecRef(is_trained), PyErr_Clear();
    return is_same;
}

/* holds(): whether tensors stand where they stood, in the same memory, which holds the same; self goes on with a tuple of dicts,
 * one of keys, and one of tensors, and the names of two attributes: _version and requires_grad. */
static Object *holds(Object *self, Object *const *arguments, intptr_t count) {
    Stamp *stamp = (Stamp *)PyByteArray_AsString(PyTuple_GetItem(self, 0));
    Object *stores = PyTuple_GetItem(self, 1), *keys = PyTuple_GetItem(self, 2), *tensors = PyTuple_GetItem(self, 3);
    Object *version = PyTuple_GetItem(self, 4), *requires_grad = PyTuple_GetItem(self, 5);
    (void)arguments, (void)count;
    for (int64_t i = 0; i < stamp->count; i++) {
        Seen *seen = stamp->seen + i;
        Object *expected = PyTuple_GetItem(tensors, i);
        if (i + AHEAD < stamp->count) begin(seen + AHEAD, PyTuple_GetItem(stores, i + AHEAD), PyTuple_GetItem(tensors, i + AHEAD));
        Tensor tensor;
        if (PyDict_GetItem(PyTuple_GetItem(stores, i), PyTuple_GetItem(keys, i)) != expected) return PyBool_FromLong(0);
        int64_t size = is_read(stamp->read, expected, &tensor) ? size_of(&tensor) : -1;
        if (size < 0 || size * tensor.dtype.bits / 8 != seen->bytes || tensor.data != seen->data) return PyBool_FromLong(0);
        if (seen->writes >= 0 && !is_unwritten(expected, version, requires_grad, seen->writes)) return PyBool_FromLong(0);
        seen->hint = (const char *)tensor.shape;
    }
    for (const Seen *seen = stamp->seen; seen < stamp->seen + stamp->count; seen++)
        if (seen->writes < 0 && memcmp(seen->data, seen->content, (size_t)seen->bytes)) return PyBool_FromLong(0);
    return PyBool_FromLong(1);
}

static Definition definitions[] = {
    {"rotate", rotate, FASTCALL, "Rotate as before; see roadie.kernels.cpu."},
    {"holds", holds, FASTCALL, "Whether all is as before; see roadie.kernels.stamp."},
    {"run", run, FASTCALL, "Compute; see roadie.kernels.cpu."},
};

/* The callable of this number, a new reference, which holds `self`. */
EXPORT Object *roadie_callable(int number, Object *self) { return PyCFunction_NewEx(definitions + number, self, NULL); }
