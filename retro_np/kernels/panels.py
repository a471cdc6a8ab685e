"""The product of a few rows with a constant matrix: what it takes to embed one text.
BLAS copies the matrix for each product, which pays only for many rows. Here it is packed once, in panels of columns."""

from dataclasses import dataclass, field

import numpy as np

from retro_np.kernels import Array, c_extension, ignore_underflow, kernel
from retro_np.kernels.threads import blocks, count, parallel_for

PANEL_COLUMNS = 64  # the same as PANEL in csrc/panels.c
MAX_PREPACKED_ROWS = 160  # With more rows BLAS is as fast.


@dataclass(frozen=True)
class Prepacked:
    """A constant matrix (K, N) and, if N is a multiple of 64, its columns in panels (N / 64, K, 64)."""

    matrix: Array
    panels: Array | None = field(repr=False)


def prepack(matrix: np.ndarray) -> Prepacked:
    """Prepare a matrix (K, N) for `prepacked_matmul`. It is stored twice if N is a multiple of 64."""
    matrix = np.ascontiguousarray(matrix)
    depth, width = matrix.shape
    if width % PANEL_COLUMNS or width == 0:
        return Prepacked(matrix, None)
    panels = matrix.reshape(depth, width // PANEL_COLUMNS, PANEL_COLUMNS).swapaxes(0, 1)
    return Prepacked(matrix, np.ascontiguousarray(panels))


def _matmul(x: Array, packed: Prepacked) -> Array:
    """x @ packed.matrix. x: (rows, K) of the matrix's dtype. Returns (rows, N)."""
    out: Array = x @ packed.matrix
    return out


@ignore_underflow
def _matmul_c(x: Array, packed: Prepacked) -> Array:
    if packed.panels is None or len(x) > MAX_PREPACKED_ROWS or x.dtype != packed.panels.dtype:
        return _matmul(x, packed)
    x, out = np.ascontiguousarray(x), np.empty((len(x), packed.matrix.shape[1]), x.dtype)
    run, panels = c_extension().multiply_panels, len(packed.panels)
    parallel_for(lambda part: run(x, packed.panels, out, part.start, part.stop), blocks(panels, -(-panels // count())))
    return out


prepacked_matmul = kernel("prepacked_matmul", numpy=_matmul, c=_matmul_c, arrays={"x": "f NK"})
