/* Operations on a tile in the cache: transposition, exponential, sums along a row. A template like attention.h. */

#include "exponential.h"

/* out (columns, rows) = the transpose of a (rows, columns), in squares whose lines stay in the first-level cache. */
TARGET static void NAME(transpose)(ptrdiff_t rows, ptrdiff_t columns, const real *restrict a, ptrdiff_t a_row,
                                   real *restrict out, ptrdiff_t out_row)
{
    ptrdiff_t i = 0;
    for (; i + SQUARE <= rows; i += SQUARE)
        for (ptrdiff_t j = 0; j < columns; j++)
            UNROLL for (ptrdiff_t l = 0; l < SQUARE; l++)
                out[j * out_row + i + l] = a[(i + l) * a_row + j];
    for (; i < rows; i++)
        for (ptrdiff_t j = 0; j < columns; j++)
            out[j * out_row + i] = a[i * a_row + j];
}

/* x = exp(x - shift) for n numbers. */
TARGET static void NAME(exponentials)(real *restrict x, ptrdiff_t n, real shift)
{
    for (ptrdiff_t j = 0; j < n; j++)
        x[j] = NAME(exponential)(x[j] - shift);
}

/* The largest of n numbers; n a multiple of LANES, at least one. */
TARGET static real NAME(largest)(const real *restrict x, ptrdiff_t n)
{
    real lanes[LANES];
    memcpy(lanes, x, sizeof lanes);
    for (ptrdiff_t j = LANES; j < n; j += LANES)
        for (int l = 0; l < LANES; l++)
            lanes[l] = x[j + l] > lanes[l] ? x[j + l] : lanes[l];
    for (int l = 1; l < LANES; l++)
        lanes[0] = lanes[l] > lanes[0] ? lanes[l] : lanes[0];
    return lanes[0];
}

/* sum_j x[j] * y[j], or sum_j x[j] if y is NULL; n a multiple of LANES. */
TARGET ALWAYS_INLINE real NAME(dot)(const real *restrict x, const real *restrict y, ptrdiff_t n)
{
    real lanes[LANES] = {0};
    for (ptrdiff_t j = 0; j < n; j += LANES)
        for (int l = 0; l < LANES; l++)
            lanes[l] += y ? x[j + l] * y[j + l] : x[j + l];
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++)
            lanes[l] += lanes[l + half];
    return lanes[0];
}
