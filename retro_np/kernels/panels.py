"""A product of few rows with a matrix that stays the same: what embedding one text, at query time, is made of.

A BLAS copies the matrix into its own order for each product, which pays only where many rows share the copy.
"""

from dataclasses import dataclass, field

import numpy as np

from retro_np.kernels import c_extension, kernel
from retro_np.kernels.threads import blocks, count, parallel_for

PANEL = 64  # columns, as in csrc/panels.c
FEW = 160  # rows: beyond, BLAS is as fast


@dataclass(frozen=True)
class Frozen:
    """A matrix (K, N) that will not change, and, where N fits, its columns in panels (N / 64, K, 64)."""

    matrix: np.ndarray
    panels: np.ndarray | None = field(repr=False)


def freeze(matrix: np.ndarray) -> Frozen:
    """Get a matrix (K, N) ready for `frozen_product`. It is kept twice where N is a multiple of 64."""
    matrix = np.ascontiguousarray(matrix)
    depth, width = matrix.shape
    if width % PANEL or width == 0:
        return Frozen(matrix, None)
    return Frozen(matrix, np.ascontiguousarray(matrix.reshape(depth, width // PANEL, PANEL).swapaxes(0, 1)))


def _product_numpy(x, frozen):
    """x @ frozen.matrix. x: (rows, K) of the matrix's dtype. Returns (rows, N)."""
    return x @ frozen.matrix


def _product_c(x, frozen):
    if frozen.panels is None or len(x) > FEW or x.dtype != frozen.panels.dtype:
        return x @ frozen.matrix
    x = np.ascontiguousarray(x)
    out = np.empty((len(x), frozen.matrix.shape[1]), x.dtype)
    run, panels = c_extension().multiply_panels, len(frozen.panels)
    parallel_for(lambda some: run(x, frozen.panels, out, some.start, some.stop), blocks(panels, -(-panels // count())))
    return out


frozen_product = kernel("frozen_product", numpy=_product_numpy, c=_product_c)
