/* The functions that Python sees. module.c documents their arguments. */

#ifndef RETRO_NP_MODULE_H
#define RETRO_NP_MODULE_H

#include "buffers.h"

PyObject *nearest(PyObject *module, PyObject *args);            /* search.c */
PyObject *nearest_screened(PyObject *module, PyObject *args);   /* search.c */
PyObject *attention_forward(PyObject *module, PyObject *args);  /* attention.c */
PyObject *attention_backward(PyObject *module, PyObject *args); /* attention.c */
PyObject *multiply_panels(PyObject *module, PyObject *args);    /* panels.c */
PyObject *norm_forward(PyObject *module, PyObject *args);       /* decoders.c */
PyObject *norm_backward(PyObject *module, PyObject *args);      /* decoders.c */
PyObject *swiglu_forward(PyObject *module, PyObject *args);     /* decoders.c */
PyObject *swiglu_backward(PyObject *module, PyObject *args);    /* decoders.c */
PyObject *rotary(PyObject *module, PyObject *args);             /* decoders.c */
PyObject *vector_unit(PyObject *module, PyObject *args);        /* units.c */

/* The index in FOR_UNITS (units.h) of the vector unit in use. */
int current_unit(void);

#endif
