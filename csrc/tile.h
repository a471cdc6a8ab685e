/* What a tile in the cache is worked on with: products, transposition, exponential. A template, as attention.h.
 *
 *   product   c[i][j] (+)= sum_t a[i][t] * b[t][j]
 *   naively   for i, j: for t: c[i][j] += a[i][t] * b[t][j], whose every step waits for the one before it
 *
 * Here ROWS rows and VECTORS vectors of columns are summed at once, in registers: each vector of b that is loaded
 * serves ROWS rows, each number of a VECTORS vectors, and no sum waits. ../csrc/README.md draws it.
 */

typedef real NAME(vector) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));

/* c (rows, vectors * LANES) (+)= a (rows, depth) b (depth, vectors * LANES), rows and vectors known when compiled.
 * a[i][t] is at a[i * a_row + t * a_column], so that a may be read transposed. */
TARGET ALWAYS_INLINE void NAME(block)(int rows, int vectors, ptrdiff_t depth, const real *a, ptrdiff_t a_row,
                                      ptrdiff_t a_column, const real *b, ptrdiff_t b_row, real *c, ptrdiff_t c_row,
                                      int add)
{
    NAME(vector) sum[ROWS][VECTORS];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int v = 0; v < vectors; v++)
            sum[i][v] = add ? *(const NAME(vector) *)(c + i * c_row + v * LANES) : (NAME(vector)){0};
    for (ptrdiff_t t = 0; t < depth; t++) {
        NAME(vector) columns[VECTORS];
        UNROLL for (int v = 0; v < vectors; v++)
            columns[v] = *(const NAME(vector) *)(b + t * b_row + v * LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            real number = a[i * a_row + t * a_column];
            UNROLL for (int v = 0; v < vectors; v++)
                sum[i][v] += number * columns[v];
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int v = 0; v < vectors; v++)
            *(NAME(vector) *)(c + i * c_row + v * LANES) = sum[i][v];
}

/* c (m, n) = a (m, depth) b (depth, n), or c += with add; n a multiple of LANES. */
TARGET static void NAME(product)(ptrdiff_t m, ptrdiff_t n, ptrdiff_t depth, const real *a, ptrdiff_t a_row,
                                 ptrdiff_t a_column, const real *b, ptrdiff_t b_row, real *c, ptrdiff_t c_row, int add)
{
    for (ptrdiff_t j = 0; j < n;) {
        int wide = n - j >= VECTORS * LANES;
        for (ptrdiff_t i = 0; i < m;) {
            const real *ai = a + i * a_row, *bj = b + j;
            real *cij = c + i * c_row + j;
            int whole = m - i >= ROWS;
            if (whole && wide)
                NAME(block)(ROWS, VECTORS, depth, ai, a_row, a_column, bj, b_row, cij, c_row, add);
            else if (whole)
                NAME(block)(ROWS, 1, depth, ai, a_row, a_column, bj, b_row, cij, c_row, add);
            else if (wide)
                NAME(block)(1, VECTORS, depth, ai, a_row, a_column, bj, b_row, cij, c_row, add);
            else
                NAME(block)(1, 1, depth, ai, a_row, a_column, bj, b_row, cij, c_row, add);
            i += whole ? ROWS : 1;
        }
        j += wide ? VECTORS * LANES : LANES;
    }
}

/* out (columns, rows) = the transpose of a (rows, columns), in squares whose lines stay in the first-level cache. */
TARGET static void NAME(transpose)(ptrdiff_t rows, ptrdiff_t columns, const real *restrict a, ptrdiff_t a_row, real *restrict out,
                                   ptrdiff_t out_row)
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

/* exp(x) for x in about [-87, 88] (float) or [-708, 709] (double); 0 below, exp(-inf) = 0.
 * exp(x) = 2^n exp(x - n ln 2), |x - n ln 2| <= ln 2 / 2: a Taylor polynomial does, and 2^n is added to the exponent's
 * bits. Adding and taking away ROUNDER leaves the nearest integer, and that integer in the last bits of the sum. */
TARGET ALWAYS_INLINE real NAME(exponential)(real x)
{
    real clamped = x < EXP_LOWEST ? EXP_LOWEST : x;
    real shifted = clamped * (real)1.4426950408889634 + ROUNDER;
    real n = shifted - ROUNDER;
    real rest = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    real sum = (real)INVERSE_FACTORIAL[EXP_DEGREE];
    UNROLL for (int degree = EXP_DEGREE - 1; degree >= 0; degree--)
        sum = sum * rest + (real)INVERSE_FACTORIAL[degree];
    bits exponent, result;
    memcpy(&exponent, &shifted, sizeof exponent);
    memcpy(&result, &sum, sizeof result);
    result += exponent << MANTISSA_BITS;
    memcpy(&sum, &result, sizeof sum);
    return x < EXP_LOWEST ? 0 : sum;
}

/* x = exp(x - shift), n of them. */
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

/* sum_j x[j] * y[j], or of x alone where y is NULL; n a multiple of LANES. */
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
