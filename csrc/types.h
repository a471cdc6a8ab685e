/* Includes TEMPLATES, which is written for a type `real`, for float and for double on one vector unit of units.h. */

#define real float
#define bits uint32_t
#define NAME(x) UNIT(x##_float)
#define MANTISSA_BITS 23
#define EXP_DEGREE 7
#define EXP_LOWEST -87.0f
#define ROUNDER 12582912.0f /* 1.5 * 2^23 */
#define LN2_HIGH 0.693359375f
#define LN2_LOW -2.12194440e-4f
#include TEMPLATES
#undef real
#undef bits
#undef NAME
#undef MANTISSA_BITS
#undef EXP_DEGREE
#undef EXP_LOWEST
#undef ROUNDER
#undef LN2_HIGH
#undef LN2_LOW

#define real double
#define bits uint64_t
#define NAME(x) UNIT(x##_double)
#define MANTISSA_BITS 52
#define EXP_DEGREE 13
#define EXP_LOWEST -708.0
#define ROUNDER 6755399441055744.0 /* 1.5 * 2^52 */
#define LN2_HIGH 6.93147180369123816490e-01
#define LN2_LOW 1.90821492927058770002e-10
#include TEMPLATES
#undef real
#undef bits
#undef NAME
#undef MANTISSA_BITS
#undef EXP_DEGREE
#undef EXP_LOWEST
#undef ROUNDER
#undef LN2_HIGH
#undef LN2_LOW
