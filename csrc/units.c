/* The vector unit that the kernels run on: the best one of the processor, or the one that was asked for. */

#include "module.h"

#include <string.h>

/* In the order of FOR_UNITS (units.h): the best is last. */
static const char *const NAMES[] = {"plain", "avx2", "avx512"};

/* The number of these units that the processor has. */
static int units_here(void)
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
        unit = units_here() - 1;
    return unit;
}

PyObject *vector_unit(PyObject *module, PyObject *args)
{
    (void)module;
    const char *name = NULL;
    if (!PyArg_ParseTuple(args, "|z:vector_unit", &name))
        return NULL;
    int wanted = current_unit();
    if (name)
        for (wanted = units_here() - 1; wanted >= 0 && strcmp(name, NAMES[wanted]); wanted--)
            continue;
    if (wanted < 0)
        return PyErr_Format(PyExc_ValueError, "no vector unit %s here", name);
    unit = wanted;
    return PyUnicode_FromString(NAMES[unit]);
}
