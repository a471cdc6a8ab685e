#include "buffers.h"

#include <stdint.h>
#include <string.h>

char item_type(const Py_buffer *view)
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
    if (format[0] == '?' && view->itemsize == 1)
        return '?';
    return 0;
}

/* What is wrong with a buffer's shape and bytes, or NULL. */
static const char *fault_of(const Py_buffer *view, int ndim, int written)
{
    static const char *const axes[] = {"must have no dimension", "must have one dimension", "must have two dimensions",
                                       "must have three dimensions", "must have four dimensions",
                                       "must have five dimensions"};
    if (view->ndim != ndim)
        return axes[ndim];
    if (view->suboffsets || !PyBuffer_IsContiguous(view, 'C'))
        return "must be C-contiguous";
    if (written && view->readonly)
        return "is read-only but must be writable";
    if (view->itemsize <= 0)
        return "has a negative dimension or no item size";
    Py_ssize_t bytes = view->itemsize, empty = 0;
    for (int axis = 0; axis < ndim; axis++) {
        Py_ssize_t size = view->shape[axis];
        if (size < 0)
            return "has a negative dimension or no item size";
        if (size > 0 && bytes > PY_SSIZE_T_MAX / size) /* also in an empty array, so that products of sizes fit */
            return "is larger than any memory";
        bytes *= size > 0 ? size : 1;
        empty |= size == 0;
    }
    if (view->len != (empty ? 0 : bytes))
        return "has fewer or more bytes than its shape says";
    if (view->len > 0 && (uintptr_t)view->buf % (uintptr_t)view->itemsize)
        return "must be aligned";
    return NULL;
}

int take_array(PyObject *object, Py_buffer *view, const char *name, int ndim, int written)
{
    if (!PyObject_CheckBuffer(object)) {
        PyErr_Format(PyExc_TypeError, "%s must be an array (an object with the buffer protocol)", name);
        return -1;
    }
    if (PyObject_GetBuffer(object, view, PyBUF_FULL_RO) < 0)
        return -1;
    const char *fault = fault_of(view, ndim, written);
    if (!fault)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s %s", name, fault);
    PyBuffer_Release(view);
    return -1;
}

int take_arrays(PyObject *const *objects, const argument_t *arguments, int count, Py_buffer *views)
{
    for (int i = 0; i < count; i++) {
        if (!objects[i] || (arguments[i].optional && objects[i] == Py_None))
            memset(&views[i], 0, sizeof views[i]);
        else if (take_array(objects[i], &views[i], arguments[i].name, arguments[i].ndim, arguments[i].written) < 0)
            return i;
    }
    return count;
}

void release_arrays(Py_buffer *views, int count)
{
    while (count-- > 0)
        if (views[count].obj)
            PyBuffer_Release(&views[count]);
}
