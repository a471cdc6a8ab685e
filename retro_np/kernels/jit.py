"""How Numba compiles the loops, and when it may reuse the compiled code."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba

SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).digest()


def jit(function: Callable[..., Any]) -> Any:
    """Compile a function on its first call, into code that releases the GIL and is cached on disk.

    `reassoc` lets the compiler sum a row in several lanes, and `contract` fuses a product with a sum. The compiled
    order of operations is fixed, so results repeat bit for bit. Keep summing loops out of helpers that compiled
    functions call: the process that compiles such a loop may add in another order than one that loads it from disk."""
    options: Any = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
    with suppress(RuntimeError):  # Numba found no place to write.
        compiled: Any = numba.njit(cache=True, **options)(function)
        # Numba's cache checks only whether the loop's own file has changed. This stamp covers every file here.
        index: Any = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
        if hasattr(index, "_source_stamp"):  # not with NUMBA_DISABLE_JIT, or if Numba keeps its cache in another way
            index._source_stamp = SOURCES
            return compiled
    return numba.njit(**options)(function)  # compiled again in each process
