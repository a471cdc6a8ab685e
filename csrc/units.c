/* The vector unit that the kernels run on: the processor's best unit, or the one that was requested. */

#include "module.h"

#include <string.h>

/* In the order of FOR_UNITS (units.h): the best is last. */
static const char *const NAMES[] = {"plain", "avx2", "avx512"};

/* How many of these units the processor supports. */
static int supported_units(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return 1;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw"))
        return 3;
    return 2;
#else
    return 1;
#endif
}

static int unit = -1; /* -1 until the first call */

int current_unit(void)
{
    if (unit < 0)
        unit = supported_units() - 1;
    return unit;
}

PyObject *vector_unit(PyObject *module, PyObject *args)
{
    (void)module;
    const char *name = NULL;
    if (!PyArg_ParseTuple(args, "|z:vector_unit", &name))
        return NULL;
    int chosen = current_unit();
    if (name)
        for (chosen = supported_units() - 1; chosen >= 0 && strcmp(name, NAMES[chosen]); chosen--)
            continue;
    if (chosen < 0)
        return PyErr_Format(PyExc_ValueError, "this processor has no vector unit %s", name);
    unit = chosen;
    return PyUnicode_FromString(NAMES[unit]);
}
