/* Exact nearest neighbours by squared L2, for Python.
 *
 *   nearest(queries, keys, first_id, ids, distances)
 *   nearest_screened(queries, keys, products, query_norms, key_norms, first_id, ids, distances)
 *     queries (N, d), keys (M, d): float32 or float64, both the same; key j has the id first_id + j
 *     products (N, M), query_norms (N), key_norms (M) of the same type: used to exclude keys, see search.h
 *     ids (N, k) int64, distances (N, k) of the same type, k >= 1: lists of the nearest keys so far, ascending, with
 *     (-1, inf) for missing entries; read and written
 *
 * search.h contains the computation. This file checks the arguments before any pointer is followed: arrays must be
 * contiguous, aligned, in native byte order and of matching types and shapes, and outputs must be writable. If a check
 * fails, a TypeError or ValueError names the argument. `nearest` also refuses entries that are not finite. The GIL is
 * released for each block of queries, and signals such as Ctrl-C are handled between two blocks.
 */

#include "module.h"

#include <float.h>
#include <stddef.h>
#include <stdint.h>

#define LANES 16       /* partial sums of a distance */
#define KEY_BLOCK 64   /* keys that stay in the cache while a block of queries meets them */
#define QUERY_BLOCK 64 /* queries between two checks for signals */

#define INLINE inline

/* The same source for newer vector units, chosen when the module is loaded. The results have the same bits. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define VECTOR_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define VECTOR_CLONES
#endif

/* The arrays of a call that search.h reads and writes. The pointers are to the type real. */
typedef struct {
    const void *queries, *keys, *products, *query_norms, *key_norms;
    int64_t *ids;
    void *distances;
    ptrdiff_t n_queries, n_keys, d, k;
    int64_t first_id;
} Search;

#define real float
#define EPSILON FLT_EPSILON
#define NAME(x) x##_float
#include "search.h"
#undef real
#undef EPSILON
#undef NAME

#define real double
#define EPSILON DBL_EPSILON
#define NAME(x) x##_double
#include "search.h"
#undef real
#undef EPSILON
#undef NAME

enum { QUERIES, KEYS, PRODUCTS, QUERY_NORMS, KEY_NORMS, IDS, DISTANCES, ARRAYS };

static const argument_t arrays[ARRAYS] = {
    {"queries", 2, 0, 0},   {"keys", 2, 0, 0}, {"products", 2, 0, 0},  {"query_norms", 1, 0, 0},
    {"key_norms", 1, 0, 0}, {"ids", 2, 1, 0},  {"distances", 2, 1, 0},
};

/* Check that types and shapes match; absent arrays have no obj. Returns the queries' type, or 0 with an exception
 * set. */
static char check_arrays(const Py_buffer views[ARRAYS])
{
    Py_ssize_t n_queries = views[QUERIES].shape[0], n_keys = views[KEYS].shape[0], k = views[IDS].shape[1];
    const Py_ssize_t shapes[ARRAYS][2] = {[QUERIES] = {n_queries, views[QUERIES].shape[1]},
                                          [KEYS] = {n_keys, views[QUERIES].shape[1]},
                                          [PRODUCTS] = {n_queries, n_keys},
                                          [QUERY_NORMS] = {n_queries},
                                          [KEY_NORMS] = {n_keys},
                                          [IDS] = {n_queries, k},
                                          [DISTANCES] = {n_queries, k}};
    char type = item_type(&views[QUERIES]);
    if (type != 'f' && type != 'd') {
        PyErr_SetString(PyExc_TypeError, "queries must be float32 or float64, in native byte order");
        return 0;
    }
    for (int i = 0; i < ARRAYS; i++) {
        if (!views[i].obj)
            continue;
        if (item_type(&views[i]) != (i == IDS ? 'i' : type)) {
            PyErr_Format(PyExc_TypeError, "%s must %s", arrays[i].name,
                         i == IDS ? "be int64, in native byte order" : "have the type of queries");
            return 0;
        }
        for (int axis = 0; axis < arrays[i].ndim; axis++)
            if (views[i].shape[axis] != shapes[i][axis]) {
                PyErr_Format(PyExc_ValueError, "%s must have %zd %s", arrays[i].name, shapes[i][axis],
                             axis == 0 ? (arrays[i].ndim == 2 ? "rows" : "entries") : "columns");
                return 0;
            }
    }
    if (k < 1) {
        PyErr_SetString(PyExc_ValueError, "ids must have k columns, at least one");
        return 0;
    }
    return type;
}

/* Returns -1 with an exception set if a row contains an entry that is not finite. */
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

/* Search one block of queries after another. Returns -1 with an exception set on failure. */
static int search_blocks(const Search *call, ptrdiff_t (*search)(const Search *, ptrdiff_t, ptrdiff_t))
{
    for (ptrdiff_t first = 0; first < call->n_queries; first += QUERY_BLOCK) {
        ptrdiff_t row;
        Py_BEGIN_ALLOW_THREADS
        row = search(call, first, call->n_queries - first < QUERY_BLOCK ? call->n_queries - first : QUERY_BLOCK);
        Py_END_ALLOW_THREADS
        if (row >= 0) {
            PyErr_Format(PyExc_ValueError, "keys: row %zd holds NaN or infinity", (Py_ssize_t)row);
            return -1;
        }
        if (PyErr_CheckSignals() < 0)
            return -1;
    }
    return 0;
}

/* Check the arrays and search. Returns -1 with an exception set on failure. */
static int search_arrays(const Py_buffer views[ARRAYS], int64_t first_id)
{
    char type = check_arrays(views);
    if (!type)
        return -1;
    Search call = {
        .queries = views[QUERIES].buf,
        .keys = views[KEYS].buf,
        .products = views[PRODUCTS].buf,
        .query_norms = views[QUERY_NORMS].buf,
        .key_norms = views[KEY_NORMS].buf,
        .ids = views[IDS].buf,
        .distances = views[DISTANCES].buf,
        .n_queries = views[QUERIES].shape[0],
        .n_keys = views[KEYS].shape[0],
        .d = views[KEYS].shape[1],
        .k = views[IDS].shape[1],
        .first_id = first_id,
    };
    if (first_id < 0 || first_id > INT64_MAX - call.n_keys) {
        PyErr_SetString(PyExc_ValueError, "first_id must leave each key an id between 0 and 2^63");
        return -1;
    }
    if (views[PRODUCTS].obj)
        return search_blocks(&call, type == 'f' ? search_screened_float : search_screened_double);
    if (check_finite(&views[QUERIES], type, "queries") < 0)
        return -1;
    if (call.n_queries == 0) /* otherwise the search checks the keys as it reads them */
        return check_finite(&views[KEYS], type, "keys");
    return search_blocks(&call, type == 'f' ? search_float : search_double);
}

/* Search with arrays from Python; unused arrays are NULL. `id` is the first key's id. */
static PyObject *search_objects(PyObject *const objects[ARRAYS], PyObject *id)
{
    if (!PyIndex_Check(id)) {
        PyErr_SetString(PyExc_TypeError, "first_id must be an integer");
        return NULL;
    }
    Py_ssize_t first_id = PyNumber_AsSsize_t(id, NULL); /* if too large, clipped, and then refused by search_arrays */
    if (first_id == -1 && PyErr_Occurred())
        return NULL;
    Py_buffer views[ARRAYS];
    int taken = take_arrays(objects, arrays, ARRAYS, views);
    int done = taken == ARRAYS && search_arrays(views, first_id) == 0;
    release_arrays(views, taken);
    if (!done)
        return NULL;
    Py_RETURN_NONE;
}

PyObject *nearest(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *objects[ARRAYS] = {NULL}, *first_id;
    if (!PyArg_ParseTuple(args, "OOOOO:nearest", &objects[QUERIES], &objects[KEYS], &first_id, &objects[IDS],
                          &objects[DISTANCES]))
        return NULL;
    return search_objects(objects, first_id);
}

PyObject *nearest_screened(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *objects[ARRAYS] = {NULL}, *first_id;
    if (!PyArg_ParseTuple(args, "OOOOOOOO:nearest_screened", &objects[QUERIES], &objects[KEYS], &objects[PRODUCTS],
                          &objects[QUERY_NORMS], &objects[KEY_NORMS], &first_id, &objects[IDS], &objects[DISTANCES]))
        return NULL;
    return search_objects(objects, first_id);
}
