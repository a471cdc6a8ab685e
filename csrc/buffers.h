/* Arrays as they come from Python, by the buffer protocol: taken with checks, before any pointer is followed. */

#ifndef RETRO_NP_BUFFERS_H
#define RETRO_NP_BUFFERS_H

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000 /* one wheel for Python 3.11 and later */
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* The type of a buffer's items as one letter: 'f' float32, 'd' float64, 'i' int64, '?' bool; 0 for any other, or for a
 * foreign byte order. */
char item_type(const Py_buffer *view);

/* Take the buffer of a C-contiguous, aligned array of `ndim` axes. written: it must not be read-only. On failure
 * TypeError or ValueError names the argument, nothing is held, and -1 is returned. */
int take_array(PyObject *object, Py_buffer *view, const char *name, int ndim, int written);

#endif
