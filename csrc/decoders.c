/* The norms, SwiGLU and rotary positions of decoders of others, for Python: the argument checks. decoders.h contains the
 * computation. A call computes only the rows, parts or entries of its range, so several threads can share the work. */

#include "module.h"

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "settings.h"

#define MAX_ARRAYS 7
#define SUMS (2 * LANES) /* partial sums of a row */

/* The sizes of the axes that an axis' letter stands for; -1 until known. */
typedef struct {
    ptrdiff_t N, d, P, h, T, two;
} sizes_t;

#define TEMPLATES "decoders.h"
#include "units.h"

typedef void (*work_t)(void *const *arrays, const sizes_t *sizes, double eps, ptrdiff_t first, ptrdiff_t last);

/* A function: its computation, its arrays, a letter for each of their axes, and the letter that its range counts. */
typedef struct {
    work_t work[3][2];
    int count;
    argument_t arguments[MAX_ARRAYS];
    const char *axes[MAX_ARRAYS], range;
} kernel_t;

static ptrdiff_t *size_of(sizes_t *sizes, char letter)
{
    switch (letter) {
    case 'N': return &sizes->N;
    case 'd': return &sizes->d;
    case 'P': return &sizes->P;
    case 'h': return &sizes->h;
    case 'T': return &sizes->T;
    default: return &sizes->two;
    }
}

/* Whether all arrays have the type of the first, float32 or float64, and axes with the same letter have the same size;
 * if not, an exception is set. */
static int check_arrays(const kernel_t *kernel, const Py_buffer *views, sizes_t *sizes)
{
    const char type = item_type(&views[0]), *first = kernel->arguments[0].name;
    if (type != 'f' && type != 'd') {
        PyErr_Format(PyExc_TypeError, "%s must be float32 or float64, in native byte order", first);
        return 0;
    }
    for (int i = 0; i < kernel->count; i++) {
        const char *name = kernel->arguments[i].name;
        if (views[i].obj && item_type(&views[i]) != type) {
            PyErr_Format(PyExc_TypeError, "%s must have the type of %s", name, first);
            return 0;
        }
        for (int axis = 0; views[i].obj && axis < views[i].ndim; axis++) {
            ptrdiff_t *size = size_of(sizes, kernel->axes[i][axis]);
            *size = *size < 0 ? views[i].shape[axis] : *size;
            if (views[i].shape[axis] != *size) {
                PyErr_Format(PyExc_ValueError, "%s has size %zd along axis %d, not %zd", name, views[i].shape[axis],
                             axis, (Py_ssize_t)*size);
                return 0;
            }
        }
    }
    return 1;
}

/* Check the range and compute it without the GIL. Returns 0 with an exception set on failure. */
static int run(const kernel_t *kernel, const Py_buffer *views, sizes_t *sizes, double eps, Py_ssize_t first,
               Py_ssize_t last)
{
    const ptrdiff_t end = *size_of(sizes, kernel->range);
    if (first < 0 || last < first || last > end) {
        PyErr_Format(PyExc_ValueError, "%zd to %zd are not within 0 to %zd", first, last, (Py_ssize_t)end);
        return 0;
    }
    if (sizes->P > 0 && sizes->N > PTRDIFF_MAX / sizes->P) {
        PyErr_SetString(PyExc_ValueError, "dgain has too many parts");
        return 0;
    }
    if (sizes->T == 0 && last > first) {
        PyErr_SetString(PyExc_ValueError, "cos and sin have no rows");
        return 0;
    }
    void *arrays[MAX_ARRAYS];
    for (int i = 0; i < kernel->count; i++)
        arrays[i] = views[i].obj ? views[i].buf : NULL;
    work_t work = kernel->work[current_unit()][item_type(&views[0]) == 'd'];
    Py_BEGIN_ALLOW_THREADS
    work(arrays, sizes, eps, first, last);
    Py_END_ALLOW_THREADS
    return 1;
}

/* Take the arrays, check them, and run. */
static PyObject *call(const kernel_t *kernel, PyObject *const *objects, double eps, Py_ssize_t first, Py_ssize_t last)
{
    Py_buffer views[MAX_ARRAYS];
    sizes_t sizes = {-1, -1, -1, -1, -1, 2};
    int taken = take_arrays(objects, kernel->arguments, kernel->count, views);
    int done = taken == kernel->count && check_arrays(kernel, views, &sizes) &&
               run(kernel, views, &sizes, eps, first, last);
    release_arrays(views, taken);
    if (!done)
        return NULL;
    Py_RETURN_NONE;
}

static const kernel_t NORM = {
    FOR_UNITS(norm),
    4,
    {{"x", 2, 0, 0}, {"gain", 1, 0, 0}, {"bias", 1, 0, 1}, {"y", 2, 1, 0}},
    {"Nd", "d", "d", "Nd"},
    'N',
};

PyObject *norm_forward(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *objects[4];
    double eps;
    Py_ssize_t first, last;
    if (!PyArg_ParseTuple(args, "OOOdOnn:norm_forward", &objects[0], &objects[1], &objects[2], &eps, &objects[3],
                          &first, &last))
        return NULL;
    return call(&NORM, objects, eps, first, last);
}

static const kernel_t NORM_PULLBACK = {
    FOR_UNITS(norm_pullback),
    7,
    {{"dy", 2, 0, 0}, {"x", 2, 0, 0}, {"gain", 1, 0, 0}, {"bias", 1, 0, 1}, {"dx", 2, 1, 0}, {"dgain", 2, 1, 0},
     {"dbias", 2, 1, 1}},
    {"Nd", "Nd", "d", "d", "Nd", "Pd", "Pd"},
    'P',
};

PyObject *norm_backward(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *objects[7];
    double eps;
    Py_ssize_t first, last;
    if (!PyArg_ParseTuple(args, "OOOOdOOOnn:norm_backward", &objects[0], &objects[1], &objects[2], &objects[3], &eps,
                          &objects[4], &objects[5], &objects[6], &first, &last))
        return NULL;
    if ((objects[3] == Py_None) != (objects[6] == Py_None)) {
        PyErr_SetString(PyExc_TypeError, "bias and dbias must both be arrays, or both None");
        return NULL;
    }
    return call(&NORM_PULLBACK, objects, eps, first, last);
}

static const kernel_t SWIGLU = {
    FOR_UNITS(swiglu), 3, {{"gate", 1, 0, 0}, {"up", 1, 0, 0}, {"y", 1, 1, 0}}, {"N", "N", "N"}, 'N',
};

PyObject *swiglu_forward(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *objects[3];
    Py_ssize_t first, last;
    if (!PyArg_ParseTuple(args, "OOOnn:swiglu_forward", &objects[0], &objects[1], &objects[2], &first, &last))
        return NULL;
    return call(&SWIGLU, objects, 0, first, last);
}

static const kernel_t SWIGLU_PULLBACK = {
    FOR_UNITS(swiglu_pullback),
    5,
    {{"dy", 1, 0, 0}, {"gate", 1, 0, 0}, {"up", 1, 0, 0}, {"dgate", 1, 1, 0}, {"dup", 1, 1, 0}},
    {"N", "N", "N", "N", "N"},
    'N',
};

PyObject *swiglu_backward(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *objects[5];
    Py_ssize_t first, last;
    if (!PyArg_ParseTuple(args, "OOOOOnn:swiglu_backward", &objects[0], &objects[1], &objects[2], &objects[3],
                          &objects[4], &first, &last))
        return NULL;
    return call(&SWIGLU_PULLBACK, objects, 0, first, last);
}

static const kernel_t ROTARY = {
    FOR_UNITS(rotary),
    4,
    {{"x", 4, 0, 0}, {"cos", 2, 0, 0}, {"sin", 2, 0, 0}, {"y", 4, 1, 0}},
    {"Nh2d", "Td", "Td", "Nh2d"},
    'N',
};

PyObject *rotary(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *objects[4];
    Py_ssize_t first, last;
    if (!PyArg_ParseTuple(args, "OOOOnn:rotary", &objects[0], &objects[1], &objects[2], &objects[3], &first, &last))
        return NULL;
    return call(&ROTARY, objects, 0, first, last);
}
