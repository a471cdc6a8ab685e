/* The product of two tiles in the cache. A template like attention.h.
 *
 *   c[i][j] (+)= sum_t a[i][t] * b[t][j]
 *
 * In the naive loop there is one sum over t for each i and j, and every step waits for the previous one. Here ROWS rows
 * and VECTORS vectors of columns are summed together, in registers: a loaded vector of b serves ROWS rows, a loaded
 * number of a serves VECTORS vectors, and no sum waits. csrc/README.md draws this; benchmarks/product_steps.c measures
 * it step by step.
 */

typedef real NAME(vector) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));

/* c (rows, vectors * LANES) (+)= a (rows, depth) b (depth, vectors * LANES); rows and vectors are constants.
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
            int tall = m - i >= ROWS;
            if (tall && wide)
                NAME(block)(ROWS, VECTORS, depth, ai, a_row, a_column, bj, b_row, cij, c_row, add);
            else if (tall)
                NAME(block)(ROWS, 1, depth, ai, a_row, a_column, bj, b_row, cij, c_row, add);
            else if (wide)
                NAME(block)(1, VECTORS, depth, ai, a_row, a_column, bj, b_row, cij, c_row, add);
            else
                NAME(block)(1, 1, depth, ai, a_row, a_column, bj, b_row, cij, c_row, add);
            i += tall ? ROWS : 1;
        }
        j += wide ? VECTORS * LANES : LANES;
    }
}
