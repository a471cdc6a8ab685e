"""Arrays in several memory-mapped files, read as one."""

from typing import Any

import numpy as np


class Sharded:
    """The rows of several arrays, numbered consecutively. Indexing reads only the requested rows.

    parts: one or more arrays of equal width and dtype, usually memory maps. blank: sorted numbers of rows that read as
    zeros, whatever the files contain.
    """

    def __init__(self, parts: list[np.ndarray], blank: np.ndarray | None = None):
        self.parts = parts
        self.starts: np.ndarray = np.cumsum([0, *[len(part) for part in parts]])
        self.shape: tuple[int, ...] = (int(self.starts[-1]), *parts[0].shape[1:])
        self.dtype: np.dtype[Any] = parts[0].dtype
        self._blank = np.empty(0, np.int64) if blank is None else blank

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        """Rows by a slice, an integer or an integer array of any shape, as in NumPy (−1 is the last row).

        The key may be a tuple whose first item selects rows and whose other items index within rows. Returns a new
        array. Raises IndexError for a row that does not exist.
        """
        rows, *within = key if isinstance(key, tuple) else (key,)
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        rows = np.asarray(rows, np.int64)
        if rows.size and (rows.min() < -len(self) or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} are out of range for {len(self)} rows")
        rows = np.where(rows < 0, rows + len(self), rows)
        out = np.empty((*rows.shape, *self.shape[1:]), self.dtype)
        part = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(part):
            in_part = part == number
            out[in_part] = self.parts[number][rows[in_part] - self.starts[number]]
        out[is_in(rows, self._blank)] = 0
        return out[(slice(None),) * rows.ndim + tuple(within)] if within else out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All rows, read into memory."""
        return np.asarray(self[:], dtype)


def is_in(ids: np.ndarray, sorted_ids: np.ndarray) -> np.ndarray:
    """Whether each id, in an array of any shape, occurs in a sorted array."""
    if not len(sorted_ids):
        return np.zeros(np.shape(ids), bool)
    position = np.minimum(np.searchsorted(sorted_ids, ids), len(sorted_ids) - 1)
    return sorted_ids[position] == ids
