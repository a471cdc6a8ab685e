/* A product of few rows with a matrix that stays: out (m, width) = x (m, depth) w (depth, width). A template.
 *
 * For a handful of rows a BLAS spends its time on bringing w into the order in which it reads it. Here w has been
 * brought into that order once, in panels of PANEL columns, each (depth, PANEL) and contiguous: it is read straight
 * through.
 */

#include "product.h"

TARGET static void NAME(multiply)(const void *x, const void *panels, void *out, ptrdiff_t m, ptrdiff_t depth,
                                  ptrdiff_t width, ptrdiff_t first, ptrdiff_t last)
{
    for (ptrdiff_t panel = first; panel < last; panel++)
        NAME(product)(m, PANEL, depth, x, depth, 1, (const real *)panels + panel * depth * PANEL, PANEL,
                      (real *)out + panel * PANEL, width, 0);
}
