/* Arrays from Python by the buffer protocol. They are checked before any pointer is followed. */

#ifndef RETRO_NP_BUFFERS_H
#define RETRO_NP_BUFFERS_H

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000 /* one wheel for Python 3.11 and later */
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* The type of a buffer's items as one letter: 'f' float32, 'd' float64, 'i' int64, '?' bool; 0 for any other type and
 * for a foreign byte order. */
char item_type(const Py_buffer *view);

/* Take the buffer of a C-contiguous, aligned array of `ndim` axes. written: whether it must be writable. On failure a
 * TypeError or ValueError names the argument, no buffer is held, and -1 is returned. */
int take_array(PyObject *object, Py_buffer *view, const char *name, int ndim, int written);

/* An array argument: its name, its number of axes, whether it is written, and whether it may be None. */
typedef struct {
    const char *name;
    int ndim, written, optional;
} argument_t;

/* Take `count` arrays. An absent one, which is NULL or an allowed None, gives a view without obj. Returns the number of
 * arrays taken, which the caller must release. If that number is less than `count`, an exception is set. */
int take_arrays(PyObject *const *objects, const argument_t *arguments, int count, Py_buffer *views);

/* Release the first `count` views. */
void release_arrays(Py_buffer *views, int count);

#endif
