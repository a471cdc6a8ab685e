/* Includes TEMPLATES, a header that is written for a type `real`, for float and double on each vector unit. Its names
 * NAME(x) become x_float_plain, x_double_plain, x_float_avx2 and so on; FOR_UNITS(x) lists them.
 */

#define TARGET
#define VECTOR_BYTES 16
#define VECTORS 2
#define UNIT(x) x##_plain
#include "types.h"
#undef TARGET
#undef VECTOR_BYTES
#undef VECTORS
#undef UNIT

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx2,fma")))
#define VECTOR_BYTES 32
#define VECTORS 2
#define UNIT(x) x##_avx2
#include "types.h"
#undef TARGET
#undef VECTOR_BYTES
#undef VECTORS
#undef UNIT

#define TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma")))
#define VECTOR_BYTES 64
#define VECTORS 4
#define UNIT(x) x##_avx512
#include "types.h"
#undef TARGET
#undef VECTOR_BYTES
#undef VECTORS
#undef UNIT

#define FOR_UNITS(x)                                                                         \
    {                                                                                        \
        {x##_float_plain, x##_double_plain}, {x##_float_avx2, x##_double_avx2},              \
        {x##_float_avx512, x##_double_avx512}                                                \
    }
#else
#define FOR_UNITS(x) {{x##_float_plain, x##_double_plain}}
#endif
