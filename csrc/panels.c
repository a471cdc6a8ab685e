/* A product of a few rows, for Python: the argument checks. panels.h contains the computation. */

#include "module.h"

#include <stddef.h>
#include <stdint.h>

#include "settings.h"

#define PANEL 64 /* columns per panel: a multiple of every unit's vectors, in float and double */

#define TEMPLATES "panels.h"
#include "units.h"

typedef void (*multiply_t)(const void *, const void *, void *, ptrdiff_t, ptrdiff_t, ptrdiff_t, ptrdiff_t, ptrdiff_t);
static const multiply_t MULTIPLY[][2] = FOR_UNITS(multiply);

/* Whether the arguments match; if not, an exception is set. */
static int check_arguments(const Py_buffer *x, const Py_buffer *panels, const Py_buffer *out, Py_ssize_t first,
                           Py_ssize_t last)
{
    char type = item_type(x);
    if (type != 'f' && type != 'd')
        PyErr_SetString(PyExc_TypeError, "x must be float32 or float64, in native byte order");
    else if (item_type(panels) != type)
        PyErr_SetString(PyExc_TypeError, "panels must have the type of x");
    else if (item_type(out) != type)
        PyErr_SetString(PyExc_TypeError, "out must have the type of x");
    else if (panels->shape[1] != x->shape[1] || panels->shape[2] != PANEL)
        PyErr_Format(PyExc_ValueError, "panels must be (P, %zd, %d)", x->shape[1], PANEL);
    else if (out->shape[0] != x->shape[0] || out->shape[1] != panels->shape[0] * PANEL)
        PyErr_Format(PyExc_ValueError, "out must be (%zd, %zd)", x->shape[0], panels->shape[0] * PANEL);
    else if (first < 0 || last < first || last > panels->shape[0])
        PyErr_Format(PyExc_ValueError, "panels %zd to %zd are not within 0 to %zd", first, last, panels->shape[0]);
    else
        return 1;
    return 0;
}

PyObject *multiply_panels(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *objects[3];
    Py_ssize_t first, last;
    if (!PyArg_ParseTuple(args, "OOOnn:multiply_panels", &objects[0], &objects[1], &objects[2], &first, &last))
        return NULL;
    static const argument_t arguments[3] = {{"x", 2, 0, 0}, {"panels", 3, 0, 0}, {"out", 2, 1, 0}};
    Py_buffer views[3];
    int taken = take_arrays(objects, arguments, 3, views), done = 0;
    if (taken == 3 && check_arguments(&views[0], &views[1], &views[2], first, last)) {
        multiply_t multiply = MULTIPLY[current_unit()][item_type(&views[0]) == 'd'];
        Py_BEGIN_ALLOW_THREADS
        multiply(views[0].buf, views[1].buf, views[2].buf, views[0].shape[0], views[0].shape[1], views[2].shape[1],
                 first, last);
        Py_END_ALLOW_THREADS
        done = 1;
    }
    release_arrays(views, taken);
    if (!done)
        return NULL;
    Py_RETURN_NONE;
}
