/* Relative attention for Python: the argument checks.
 *
 * attention.h contains the computation, with the operations of product.h and tile.h. This file checks the arguments
 * before any pointer is followed: arrays must be contiguous, aligned, in native byte order, of one type and of matching
 * shapes, and outputs must be writable. If a check fails, a TypeError or ValueError names the argument. The GIL is
 * released during the work. A call runs only the tasks in the range that it is given, so several threads can share the
 * tasks. How they share them does not change the results.
 */

#include "module.h"

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "settings.h"

#define TILE 32 /* queries per tile */

/* The arguments of one call. Its tasks are the h heads of `parts`: in the forward pass the groups of queries of the
 * items, in the backward pass parts of the batch, each with its own sums dtable, du and dv. Absent arrays are NULL. */
typedef struct {
    ptrdiff_t batch, g, n, k, r, h, c, n_table, causal_offset, parts;
    int causal;
    const void *q, *keys, *values, *table, *u, *v, *dout, *dlse;
    const unsigned char *key_mask;
    void *out, *lse, *dq, *dkeys, *dvalues, *dtable, *du, *dv;
} attention_t;

#define TEMPLATES "attention.h"
#include "units.h"

typedef int (*run_t)(const attention_t *, ptrdiff_t first, ptrdiff_t last, int backward);
static const run_t RUN[][2] = FOR_UNITS(run);

/* Whether a view has this shape; if not, an exception is set. */
static int has_shape(const Py_buffer *view, const char *name, const ptrdiff_t *shape)
{
    for (int axis = 0; axis < view->ndim; axis++)
        if (view->shape[axis] != shape[axis]) {
            PyErr_Format(PyExc_ValueError, "%s has size %zd along axis %d, not %zd", name, view->shape[axis], axis,
                         (Py_ssize_t)shape[axis]);
            return 0;
        }
    return 1;
}

/* Take an optional integer. *present tells whether it was passed. Returns -1 with an exception set on failure. */
static int take_integer(PyObject *object, const char *name, ptrdiff_t *value, int *present)
{
    *present = object != Py_None;
    if (!*present)
        return 0;
    if (!PyIndex_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s must be an integer", name);
        return -1;
    }
    *value = PyNumber_AsSsize_t(object, PyExc_OverflowError);
    return *value == -1 && PyErr_Occurred() ? -1 : 0;
}

/* Check the inputs q, keys, values, table, u, v and key_mask, and fill in a's sizes and pointers. Returns the type of
 * q, or 0 with an exception set. */
static char check_inputs(attention_t *a, const Py_buffer *views, const argument_t *arguments)
{
    const Py_buffer *q = &views[0], *keys = &views[1], *table = &views[3];
    char type = item_type(q);
    if (type != 'f' && type != 'd') {
        PyErr_SetString(PyExc_TypeError, "q must be float32 or float64, in native byte order");
        return 0;
    }
    a->batch = q->shape[0], a->g = q->shape[1], a->n = q->shape[2], a->h = q->shape[3], a->c = q->shape[4];
    if (a->c < 1) {
        PyErr_SetString(PyExc_ValueError, "q has heads of size 0");
        return 0;
    }
    a->k = keys->shape[1], a->r = keys->shape[2], a->n_table = table->obj ? table->shape[0] : 0;
    /* An offset of -n hides every key and one of r hides none, so that sums with the offset cannot overflow. */
    a->causal_offset = a->causal_offset < -a->n ? -a->n : a->causal_offset > a->r ? a->r : a->causal_offset;
    const ptrdiff_t keys_shape[] = {a->batch, a->k, a->r, a->h, a->c}, table_shape[] = {a->n_table, a->h, a->c};
    const ptrdiff_t *bias_shape = table_shape + 1;
    const ptrdiff_t *shapes[] = {q->shape, keys_shape, keys_shape, table_shape, bias_shape, bias_shape, keys_shape};
    for (int i = 0; i < 7; i++) {
        if (!views[i].obj)
            continue;
        if (item_type(&views[i]) != (i == 6 ? '?' : type)) {
            PyErr_Format(PyExc_TypeError, i == 6 ? "%s must be bool" : "%s must have the type of q", arguments[i].name);
            return 0;
        }
        if (!has_shape(&views[i], arguments[i].name, shapes[i]))
            return 0;
    }
    if (!table->obj != !views[4].obj || !table->obj != !views[5].obj) {
        PyErr_SetString(PyExc_TypeError, "table, u and v must all be arrays, or all be None");
        return 0;
    }
    if (table->obj && a->n_table > a->n + a->r - 1) {
        PyErr_Format(PyExc_ValueError, "table has %zd distances, more than n + r - 1 = %zd", (Py_ssize_t)a->n_table,
                     (Py_ssize_t)(a->n + a->r - 1));
        return 0;
    }
    a->q = q->buf, a->keys = keys->buf, a->values = views[2].buf; /* buf is NULL for absent arrays */
    a->table = table->buf, a->u = views[4].buf, a->v = views[5].buf, a->key_mask = views[6].buf;
    return type;
}

/* Whether each array has q's type and its expected shape; if not, an exception is set. Absent arrays are skipped. */
static int check_arrays(const Py_buffer *views, const argument_t *arguments, const ptrdiff_t *const *shapes, int count,
                        char type)
{
    for (int i = 0; i < count; i++) {
        if (!views[i].obj)
            continue;
        if (item_type(&views[i]) != type) {
            PyErr_Format(PyExc_TypeError, "%s must have the type of q", arguments[i].name);
            return 0;
        }
        if (!has_shape(&views[i], arguments[i].name, shapes[i]))
            return 0;
    }
    return 1;
}

/* Run the tasks first <= t < last without the GIL. Returns 0 with an exception set on failure. */
static int run_tasks(const attention_t *a, char type, Py_ssize_t first, Py_ssize_t last, int backward)
{
    if (first < 0 || last < first || last > a->h * a->parts) {
        PyErr_Format(PyExc_ValueError, "tasks %zd to %zd are not within 0 to %zd", first, last,
                     (Py_ssize_t)(a->h * a->parts));
        return 0;
    }
    run_t run = RUN[current_unit()][type == 'd'];
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = run(a, first, last, backward);
    Py_END_ALLOW_THREADS
    if (status < 0)
        PyErr_NoMemory();
    return status == 0;
}

static const argument_t FORWARD[] = {
    {"q", 5, 0, 0}, {"keys", 5, 0, 0},     {"values", 5, 0, 0}, {"table", 3, 0, 1}, {"u", 2, 0, 1},
    {"v", 2, 0, 1}, {"key_mask", 3, 0, 1}, {"out", 5, 1, 0},    {"lse", 4, 1, 0},
};

PyObject *attention_forward(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *objects[9], *offset;
    Py_ssize_t first, last;
    if (!PyArg_ParseTuple(args, "OOOOOOOOOOnn:attention_forward", &objects[0], &objects[1], &objects[2], &objects[3],
                          &objects[4], &objects[5], &objects[6], &offset, &objects[7], &objects[8], &first, &last))
        return NULL;
    attention_t a = {0};
    Py_buffer views[9];
    int taken = 0, done = 0;
    char type;
    if (take_integer(offset, "causal_offset", &a.causal_offset, &a.causal) == 0 &&
        (taken = take_arrays(objects, FORWARD, 9, views)) == 9 && (type = check_inputs(&a, views, FORWARD)) != 0) {
        const ptrdiff_t lse_shape[] = {a.batch, a.h, a.g, a.n}, *const shapes[] = {views[0].shape, lse_shape};
        a.out = views[7].buf, a.lse = views[8].buf, a.parts = a.batch * a.g;
        done = check_arrays(views + 7, FORWARD + 7, shapes, 2, type) && run_tasks(&a, type, first, last, 0);
    }
    release_arrays(views, taken);
    if (!done)
        return NULL;
    Py_RETURN_NONE;
}

static const argument_t BACKWARD[] = {
    {"q", 5, 0, 0},  {"keys", 5, 0, 0},     {"values", 5, 0, 0},  {"table", 3, 0, 1},  {"u", 2, 0, 1},
    {"v", 2, 0, 1},  {"key_mask", 3, 0, 1}, {"dout", 5, 0, 0},    {"lse", 4, 0, 0},    {"dlse", 4, 0, 1},
    {"dq", 5, 1, 0}, {"dkeys", 5, 1, 0},    {"dvalues", 5, 1, 0}, {"dtable", 4, 1, 1}, {"du", 3, 1, 1},
    {"dv", 3, 1, 1},
};

PyObject *attention_backward(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *objects[16], *offset;
    Py_ssize_t first, last;
    if (!PyArg_ParseTuple(args, "OOOOOOOOOOOOOOOOOnn:attention_backward", &objects[7], &objects[8], &objects[9],
                          &objects[0], &objects[1], &objects[2], &objects[3], &objects[4], &objects[5], &objects[6],
                          &offset, &objects[10], &objects[11], &objects[12], &objects[13], &objects[14], &objects[15],
                          &first, &last))
        return NULL;
    attention_t a = {0};
    Py_buffer views[16];
    int taken = 0, done = 0;
    char type;
    if (take_integer(offset, "causal_offset", &a.causal_offset, &a.causal) == 0 &&
        (taken = take_arrays(objects, BACKWARD, 16, views)) == 16 && (type = check_inputs(&a, views, BACKWARD)) != 0) {
        const Py_buffer *dtable_view = &views[13], *du_view = &views[14], *dv_view = &views[15];
        a.parts = a.table && dtable_view->obj ? dtable_view->shape[0] : a.batch;
        const ptrdiff_t lse[] = {a.batch, a.h, a.g, a.n}, dtable[] = {a.parts, a.n_table, a.h, a.c};
        const ptrdiff_t du[] = {a.parts, a.h, a.c}, *q = views[0].shape, *keys = views[1].shape;
        const ptrdiff_t *const shapes[] = {q, lse, lse, q, keys, keys, dtable, du, du};
        a.dout = views[7].buf, a.lse = views[8].buf, a.dlse = views[9].buf;
        a.dq = views[10].buf, a.dkeys = views[11].buf, a.dvalues = views[12].buf;
        a.dtable = dtable_view->buf, a.du = du_view->buf, a.dv = dv_view->buf;
        int positions = a.table != NULL;
        int consistent = positions == (dtable_view->obj != NULL) && positions == (du_view->obj != NULL) &&
                         positions == (dv_view->obj != NULL);
        if (!consistent)
            PyErr_SetString(PyExc_TypeError, "dtable, du and dv must be arrays if table is one, otherwise None");
        else if (a.parts < 1 && a.batch > 0)
            PyErr_SetString(PyExc_ValueError, "dtable needs at least one part");
        else if (a.batch > 0 && a.parts > PTRDIFF_MAX / 2 / a.batch)
            PyErr_SetString(PyExc_ValueError, "dtable has too many parts");
        else
            done = check_arrays(views + 7, BACKWARD + 7, shapes, 9, type) && run_tasks(&a, type, first, last, 1);
    }
    release_arrays(views, taken);
    if (!done)
        return NULL;
    Py_RETURN_NONE;
}
