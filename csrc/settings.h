/* Block sizes, macros and constants for product.h and tile.h. */

#if !defined(__GNUC__)
#error "the vector types need GCC or clang"
#endif

#define SQUARE 16 /* rows of the squares in which a matrix is transposed */
#define ROWS 4    /* rows of a product that are summed together, in registers */

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define LANES ((ptrdiff_t)(VECTOR_BYTES / sizeof(real)))

static const double INVERSE_FACTORIAL[] = {
    1.0,          1.0,           1.0 / 2,        1.0 / 6,         1.0 / 24,         1.0 / 120,         1.0 / 720,
    1.0 / 5040,   1.0 / 40320,   1.0 / 362880,   1.0 / 3628800,   1.0 / 39916800,   1.0 / 479001600,   1.0 / 6227020800,
};
