"""Arrays that lie in several memory-mapped files, read as one."""

import numpy as np


class Sharded:
    """Rows of several arrays, numbered through. Indexing reads only the rows asked for.

    parts: arrays of equal width and dtype, usually memory maps; there is at least one. blank: sorted numbers of rows
    that read as zeros, whatever the files hold.
    """

    def __init__(self, parts: list[np.ndarray], blank: np.ndarray | None = None):
        self.parts = parts
        self.starts = np.cumsum([0, *[len(part) for part in parts]])
        self.shape = (int(self.starts[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype
        self._blank = np.empty(0, np.int64) if blank is None else blank

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key) -> np.ndarray:
        """Rows by a slice, an integer or an integer array of any shape, as NumPy has it (−1: the last one), alone or as
        first item of a tuple whose others index within rows. Returns a new array."""
        rows, *within = key if isinstance(key, tuple) else (key,)
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        rows = np.asarray(rows, np.int64)
        if rows.size and (rows.min() < -len(self) or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        rows = np.where(rows < 0, rows + len(self), rows)
        out = np.empty((*rows.shape, *self.shape[1:]), self.dtype)
        part = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(part):
            here = part == number
            out[here] = self.parts[number][rows[here] - self.starts[number]]
        if len(self._blank):
            place = np.minimum(np.searchsorted(self._blank, rows), len(self._blank) - 1)
            out[self._blank[place] == rows] = 0
        return out[(slice(None),) * rows.ndim + tuple(within)] if within else out

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """All rows, read into memory."""
        return np.asarray(self[:], dtype)
