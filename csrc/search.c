/* retro_np._c: exact nearest neighbours by squared L2, for Python.
 *
 *   nearest(queries, keys, k, ids, distances)
 *     queries (N, d), keys (M, d): float32 or float64, both the same; k >= 1
 *     ids (N, k) int64, distances (N, k) of the queries' type: written
 *
 * search.h says what is computed, and computes it. Here the arguments are checked, before any pointer is followed:
 * buffers of two dimensions, contiguous, aligned, native byte order, of matching types and shapes, outputs writable,
 * every entry finite. TypeError or ValueError names the argument. The GIL is released around each block of queries, and
 * Ctrl-C is heard between two blocks.
 */

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000 /* one wheel for Python 3.11 and later */
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#define LANES 16         /* partial sums of a distance */
#define KEYS_ABREAST 4   /* keys measured in one pass over a query */
#define KEY_BLOCK 64     /* keys that stay in the cache while a block of queries meets them */
#define QUERY_BLOCK 64   /* queries between two looks at the signals */

#define INLINE inline

/* The same source for newer vector units, chosen when the module is loaded; the results are the same bits. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define VECTOR_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define VECTOR_CLONES
#endif

#define real float
#define NAME(x) x##_float
#include "search.h"
#undef real
#undef NAME

#define real double
#define NAME(x) x##_double
#include "search.h"
#undef real
#undef NAME

/* The type of a buffer's items as one letter, 'f', 'd' or 'i' (int64); 0 for any other, or for a foreign byte order. */
static char item_type(const Py_buffer *view)
{
    const uint16_t one = 1;
    const char native = *(const unsigned char *)&one ? '<' : '>';
    const char *format = view->format ? view->format : "B";
    if (*format == '@' || *format == '=' || *format == native)
        format++;
    if (format[0] == 0 || format[1] != 0)
        return 0;
    if (format[0] == 'f' && view->itemsize == (Py_ssize_t)sizeof(float))
        return 'f';
    if (format[0] == 'd' && view->itemsize == (Py_ssize_t)sizeof(double))
        return 'd';
    if ((format[0] == 'l' || format[0] == 'q') && view->itemsize == (Py_ssize_t)sizeof(int64_t))
        return 'i';
    return 0;
}

/* Take the buffer of a contiguous matrix. On failure the exception is set, nothing is held, and -1 is returned. */
static int take_matrix(PyObject *object, Py_buffer *view, const char *name, int written)
{
    if (!PyObject_CheckBuffer(object)) {
        PyErr_Format(PyExc_TypeError, "%s must be an array (an object with the buffer protocol)", name);
        return -1;
    }
    if (PyObject_GetBuffer(object, view, PyBUF_FULL_RO) < 0)
        return -1;
    const char *fault = NULL;
    if (view->ndim != 2)
        fault = "must have two dimensions";
    else if (view->suboffsets || !PyBuffer_IsContiguous(view, 'C'))
        fault = "must be C-contiguous";
    else if (written && view->readonly)
        fault = "is read-only and would be written";
    else if (view->itemsize <= 0 || view->shape[0] < 0 || view->shape[1] < 0)
        fault = "has a shape or item size that no array has";
    else if (view->shape[1] > 0 && view->shape[0] > PY_SSIZE_T_MAX / view->itemsize / view->shape[1])
        fault = "is larger than memory can be";
    else if (view->len != view->shape[0] * view->shape[1] * view->itemsize)
        fault = "has fewer or more bytes than its shape says";
    else if (view->len > 0 && (uintptr_t)view->buf % (uintptr_t)view->itemsize)
        fault = "must be aligned";
    if (!fault)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s %s", name, fault);
    PyBuffer_Release(view);
    return -1;
}

/* What the four matrices must be to one another. Returns the queries' type, or 0 with the exception set. */
static char check_together(const Py_buffer *queries, const Py_buffer *keys, Py_ssize_t k, const Py_buffer *ids,
                           const Py_buffer *distances)
{
    char type = item_type(queries);
    if (type != 'f' && type != 'd')
        PyErr_SetString(PyExc_TypeError, "queries must be float32 or float64, in native byte order");
    else if (item_type(keys) != type)
        PyErr_SetString(PyExc_TypeError, "keys must have the type of queries");
    else if (item_type(ids) != 'i')
        PyErr_SetString(PyExc_TypeError, "ids must be int64, in native byte order");
    else if (item_type(distances) != type)
        PyErr_SetString(PyExc_TypeError, "distances must have the type of queries");
    else if (keys->shape[1] != queries->shape[1])
        PyErr_Format(PyExc_ValueError, "keys have %zd columns and queries %zd", keys->shape[1], queries->shape[1]);
    else if (ids->shape[0] != queries->shape[0] || ids->shape[1] != k)
        PyErr_Format(PyExc_ValueError, "ids must be (%zd, %zd), a row a query", queries->shape[0], k);
    else if (distances->shape[0] != queries->shape[0] || distances->shape[1] != k)
        PyErr_Format(PyExc_ValueError, "distances must be (%zd, %zd), a row a query", queries->shape[0], k);
    else
        return type;
    return 0;
}

static int check_finite(const Py_buffer *view, char type, const char *name)
{
    ptrdiff_t row;
    Py_BEGIN_ALLOW_THREADS
    row = type == 'f' ? row_not_finite_float(view->buf, view->shape[0], view->shape[1])
                      : row_not_finite_double(view->buf, view->shape[0], view->shape[1]);
    Py_END_ALLOW_THREADS
    if (row < 0)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: row %zd holds NaN or infinity", name, (Py_ssize_t)row);
    return -1;
}

static int search_all(const Py_buffer *queries, const Py_buffer *keys, Py_ssize_t k, const Py_buffer *ids,
                      const Py_buffer *distances, char type)
{
    Py_ssize_t n_queries = queries->shape[0], n_keys = keys->shape[0], d = queries->shape[1];
    for (Py_ssize_t first = 0; first < n_queries; first += QUERY_BLOCK) {
        Py_ssize_t block = n_queries - first < QUERY_BLOCK ? n_queries - first : QUERY_BLOCK;
        int64_t *block_ids = (int64_t *)ids->buf + first * k;
        Py_BEGIN_ALLOW_THREADS
        if (type == 'f')
            search_float((const float *)queries->buf + first * d, block, keys->buf, n_keys, d, k, block_ids,
                         (float *)distances->buf + first * k);
        else
            search_double((const double *)queries->buf + first * d, block, keys->buf, n_keys, d, k, block_ids,
                          (double *)distances->buf + first * k);
        Py_END_ALLOW_THREADS
        if (PyErr_CheckSignals() < 0)
            return -1;
    }
    return 0;
}

static PyObject *nearest(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *objects[4], *k_object;
    if (!PyArg_ParseTuple(args, "OOOOO:nearest", &objects[0], &objects[1], &k_object, &objects[2], &objects[3]))
        return NULL;
    if (!PyIndex_Check(k_object)) {
        PyErr_SetString(PyExc_TypeError, "k must be an integer");
        return NULL;
    }
    Py_ssize_t k = PyNumber_AsSsize_t(k_object, NULL); /* clipped, so too large a k fails on the outputs' shapes */
    if (k == -1 && PyErr_Occurred())
        return NULL;
    if (k < 1) {
        PyErr_SetString(PyExc_ValueError, "k must be at least 1");
        return NULL;
    }
    static const char *const names[4] = {"queries", "keys", "ids", "distances"};
    Py_buffer views[4];
    int held = 0, done = 0;
    while (held < 4 && take_matrix(objects[held], &views[held], names[held], held >= 2) == 0)
        held++;
    if (held == 4) {
        char type = check_together(&views[0], &views[1], k, &views[2], &views[3]);
        done = type && check_finite(&views[0], type, "queries") == 0 && check_finite(&views[1], type, "keys") == 0 &&
               search_all(&views[0], &views[1], k, &views[2], &views[3], type) == 0;
    }
    while (held > 0)
        PyBuffer_Release(&views[--held]);
    if (!done)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"nearest", nearest, METH_VARARGS,
     "nearest(queries, keys, k, ids, distances)\n--\n\n"
     "Write the k nearest keys of each query, by squared L2, into ids and distances.\n\n"
     "queries (N, d) and keys (M, d): float32 or float64; ids (N, k) int64; distances (N, k) of the queries' type.\n"
     "Ascending by (distance, id); -1 and inf where there are fewer than k keys.\n"
     "Raises TypeError or ValueError, naming the argument, for anything else and for entries that are not finite."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "retro_np._c", "The kernels of retro_np that are written in C.", 0, methods, slots, NULL,
    NULL, NULL,
};

PyMODINIT_FUNC PyInit__c(void)
{
    return PyModuleDef_Init(&definition);
}
