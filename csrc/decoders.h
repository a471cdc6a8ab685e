/* The loops over rows and entries of decoders that others trained: their norms, SwiGLU and rotary positions. A template:
 * units.h includes it for float and for double, each for several vector units.
 *
 *   norm     y = gain * unit + bias,  unit = (x - mean) * scale,  scale = 1 / sqrt(mean((x - mean)^2) + eps)
 *            LayerNorm (Ba et al. 2016). Without a bias the mean is not subtracted: RMSNorm (Zhang & Sennrich 2019).
 *   swiglu   y = gate * s(gate) * up,  s(x) = 1 / (1 + exp(-x))                                       Shazeer 2020
 *   rotary   the pair (a, b) turned: (a cos - b sin, b cos + a sin)                                Su et al. 2021
 *
 * NumPy passes through memory once for each operation. Here a row stays in the first-level cache while the loops below
 * pass over it. The backward pass computes a row's mean and scale again, so that nothing but x is kept for it.
 *
 * Each function gets its arrays in the order of the Python function, with NULL for an absent one, and the sizes of the
 * arrays' axes by letter: N, d, P, the number of parts that have sums of their own, and for rotary h heads and T angles.
 */

#include "exponential.h"

/* sum_j x[j] * y[j] * z[j] in SUMS sums that do not wait for each other; y, or both y and z, may be NULL,
 * which stands for ones. */
TARGET ALWAYS_INLINE real NAME(sum)(const real *x, const real *y, const real *z, ptrdiff_t n)
{
    real lanes[SUMS] = {0};
    ptrdiff_t j = 0;
    for (; j + SUMS <= n; j += SUMS)
        for (int l = 0; l < SUMS; l++)
            lanes[l] += x[j + l] * (y ? y[j + l] : 1) * (z ? z[j + l] : 1);
    for (int l = 0; j + l < n; l++)
        lanes[l] += x[j + l] * (y ? y[j + l] : 1) * (z ? z[j + l] : 1);
    for (int half = SUMS / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++)
            lanes[l] += lanes[l + half];
    return lanes[0];
}

/* unit = (x - mean) * scale of a row of d numbers. Returns scale. */
TARGET ALWAYS_INLINE real NAME(normalise)(const real *restrict x, ptrdiff_t d, int centred, double eps,
                                          real *restrict unit)
{
    const real mean = centred ? NAME(sum)(x, NULL, NULL, d) / d : 0;
    for (ptrdiff_t j = 0; j < d; j++)
        unit[j] = x[j] - mean;
    const real scale = (real)(1 / sqrt((double)(NAME(sum)(unit, unit, NULL, d) / d + (real)eps)));
    for (ptrdiff_t j = 0; j < d; j++)
        unit[j] *= scale;
    return scale;
}

/* The rows first <= i < last of y. Arrays: x (N, d), gain (d), bias (d) or NULL, y (N, d). */
TARGET static void NAME(norm)(void *const *arrays, const sizes_t *sizes, double eps, ptrdiff_t first, ptrdiff_t last)
{
    const ptrdiff_t d = sizes->d;
    const real *restrict gain = arrays[1], *restrict bias = arrays[2];
    for (ptrdiff_t i = first; i < last && d > 0; i++) {
        real *restrict y = (real *)arrays[3] + i * d;
        NAME(normalise)((const real *)arrays[0] + i * d, d, bias != NULL, eps, y);
        for (ptrdiff_t j = 0; j < d; j++)
            y[j] = gain[j] * y[j] + (bias ? bias[j] : 0);
    }
}

/* The parts first <= p < last: dx of the rows p * N / P <= i < (p + 1) * N / P, and their sums dgain and dbias.
 *   dunit = dy * gain;  dx = scale * (dunit - unit * mean(dunit * unit) - mean(dunit)), the last term with a bias
 * Arrays: dy and x (N, d), gain (d), bias (d) or NULL, dx (N, d), dgain and dbias (P, d). */
TARGET static void NAME(norm_pullback)(void *const *arrays, const sizes_t *sizes, double eps, ptrdiff_t first,
                                       ptrdiff_t last)
{
    const ptrdiff_t d = sizes->d;
    const real *restrict gain = arrays[2];
    const int centred = arrays[3] != NULL;
    for (ptrdiff_t part = first; part < last && d > 0; part++) {
        real *restrict dgain = (real *)arrays[5] + part * d;
        real *restrict dbias = centred ? (real *)arrays[6] + part * d : NULL;
        for (ptrdiff_t j = 0; j < d; j++)
            dgain[j] = 0;
        for (ptrdiff_t j = 0; j < d && centred; j++)
            dbias[j] = 0;
        for (ptrdiff_t i = part * sizes->N / sizes->P; i < (part + 1) * sizes->N / sizes->P; i++) {
            const real *restrict dy = (const real *)arrays[0] + i * d;
            real *restrict dx = (real *)arrays[4] + i * d;
            const real scale = NAME(normalise)((const real *)arrays[1] + i * d, d, centred, eps, dx);
            const real along = NAME(sum)(dy, gain, dx, d) / d, shift = centred ? NAME(sum)(dy, gain, NULL, d) / d : 0;
            for (ptrdiff_t j = 0; j < d; j++) {
                dgain[j] += dy[j] * dx[j]; /* dx still holds unit */
                dx[j] = scale * (dy[j] * gain[j] - dx[j] * along - shift);
            }
            for (ptrdiff_t j = 0; j < d && centred; j++)
                dbias[j] += dy[j];
        }
    }
}

/* s(-|x|) and s(|x|), without overflow or cancellation; any numbers if x is NaN. exp(-|x|) is the square of a number
 * that is never denormal, so that it becomes denormal, and then 0, where the exact value does. There is no branch, so
 * that the compiler makes vectors of the loops. */
TARGET ALWAYS_INLINE void NAME(logistic)(real x, real *smaller, real *larger)
{
    const real half = (x < 0 ? x : -x) / 2;
    const real root = NAME(exponential_within)(half < EXP_LOWEST ? EXP_LOWEST : half), small = root * root;
    *larger = 1 / (1 + small);
    *smaller = small * *larger;
}

/* The entries first <= i < last of y. Arrays: gate, up, y (N). */
TARGET static void NAME(swiglu)(void *const *arrays, const sizes_t *sizes, double eps, ptrdiff_t first, ptrdiff_t last)
{
    (void)sizes, (void)eps;
    const real *restrict gate = arrays[0], *restrict up = arrays[1];
    real *restrict y = arrays[2];
    for (ptrdiff_t i = first; i < last; i++) {
        real smaller, larger;
        NAME(logistic)(gate[i], &smaller, &larger);
        y[i] = gate[i] * (gate[i] < 0 ? smaller : larger) * up[i];
    }
}

/* The entries first <= i < last of dgate and dup, with the slope s(x) (1 + x s(-x)) of x s(x). Arrays: dy, gate, up,
 * dgate, dup (N). */
TARGET static void NAME(swiglu_pullback)(void *const *arrays, const sizes_t *sizes, double eps, ptrdiff_t first,
                                         ptrdiff_t last)
{
    (void)sizes, (void)eps;
    const real *restrict dy = arrays[0], *restrict gate = arrays[1], *restrict up = arrays[2];
    real *restrict dgate = arrays[3], *restrict dup = arrays[4];
    for (ptrdiff_t i = first; i < last; i++) {
        real smaller, larger;
        NAME(logistic)(gate[i], &smaller, &larger);
        const real sigmoid = gate[i] < 0 ? smaller : larger, rest = gate[i] < 0 ? larger : smaller;
        dup[i] = dy[i] * (gate[i] * sigmoid);
        dgate[i] = dy[i] * up[i] * (sigmoid * (1 + gate[i] * rest));
    }
}

/* The rows first <= i < last of y, turned by the angles of row i mod T. Arrays: x (N, h, 2, d), cos and sin (T, d),
 * y (N, h, 2, d). */
TARGET static void NAME(rotary)(void *const *arrays, const sizes_t *sizes, double eps, ptrdiff_t first, ptrdiff_t last)
{
    (void)eps;
    const ptrdiff_t d = sizes->d, row = sizes->h * 2 * d;
    for (ptrdiff_t i = first; i < last; i++) {
        const real *restrict cosine = (const real *)arrays[1] + i % sizes->T * d;
        const real *restrict sine = (const real *)arrays[2] + i % sizes->T * d;
        for (ptrdiff_t head = 0; head < row; head += 2 * d) {
            const real *restrict x = (const real *)arrays[0] + i * row + head;
            real *restrict y = (real *)arrays[3] + i * row + head;
            for (ptrdiff_t j = 0; j < d; j++) {
                y[j] = x[j] * cosine[j] - x[j + d] * sine[j];
                y[j + d] = x[j + d] * cosine[j] + x[j] * sine[j];
            }
        }
    }
}
