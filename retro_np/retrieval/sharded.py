"""The arrays of shards, checked against their schema and memory-mapped, and several of them read as one."""

from pathlib import Path
from typing import Any

import numpy as np

from retro_np.files.untrusted import mapped
from retro_np.retrieval.manifest import REBUILD

DTYPES: dict[str, Any] = {"tokens": (np.uint16, np.uint32), "documents": np.int64, "keys": (np.float16, np.float32)}
DTYPES |= {"ids": np.int64, "distances": np.float32}


def shard_array(
    folder: Path, name: str, rows: int | None = None, width: int | None = None, dtype: Any = None
) -> np.ndarray:
    """Memory-map an array in a shard's folder: tokens, documents, keys, ids or distances.

    rows, width, dtype: what the array must have, if that is known. Raises UserError if it does not."""
    shape = (rows,) if name == "documents" else (rows, width)
    return mapped(folder / f"{name}.npy", dtype or DTYPES[name], shape, REBUILD)


class Sharded:
    """The rows of several arrays, numbered consecutively. Indexing reads only the requested rows.

    parts: one or more arrays of equal width and dtype, usually memory maps. blank: sorted rows that read as `fill`."""

    def __init__(self, parts: list[np.ndarray], blank: np.ndarray | None = None, fill: int = 0):
        self.parts = parts
        self.starts: np.ndarray = np.cumsum([0, *[len(part) for part in parts]])
        self.shape: tuple[int, ...] = (int(self.starts[-1]), *parts[0].shape[1:])
        self.dtype: np.dtype[Any] = parts[0].dtype
        self._fill = fill
        self._blank = np.empty(0, np.int64) if blank is None else blank

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        """Rows by a slice, an integer or an integer array of any shape, as in NumPy (−1 is the last row).

        A tuple's first item selects rows, and its others index within rows. Returns a copy. Raises IndexError."""
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
        out[is_in(rows, self._blank)] = self._fill
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
