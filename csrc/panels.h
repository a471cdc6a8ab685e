/* A product of a few rows with a constant matrix: out (m, width) = x (m, depth) w (depth, width). A template.
 *
 * For a few rows a BLAS spends its time on copying w into the order in which it reads it. Here w has been copied
 * once, into panels of PANEL columns, each (depth, PANEL) and contiguous, and is read sequentially.
 */

#include "product.h"

TARGET static void NAME(multiply)(const void *x, const void *panels, void *out, ptrdiff_t m, ptrdiff_t depth,
                                  ptrdiff_t width, ptrdiff_t first, ptrdiff_t last)
{
    for (ptrdiff_t panel = first; panel < last; panel++)
        NAME(product)(m, PANEL, depth, x, depth, 1, (const real *)panels + panel * depth * PANEL, PANEL,
                      (real *)out + panel * PANEL, width, 0);
}
