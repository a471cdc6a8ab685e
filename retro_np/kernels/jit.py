"""How Numba compiles the loops, and when it may reuse the compiled code."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).digest()


def jit(function: Callable[..., Any]) -> Any:
    """Compile a function at its first call, to code that releases the GIL and is cached on disk.

    `reassoc` lets the compiler sum a row in several lanes, and `contract` fuses a product with a sum. Neither changes
    from one call to the next, so results repeat to the bit. Do not put a loop that sums into a helper of a compiled
    function: the process that compiles it may then add in another order than a process that loads it from disk.
    """
    options: Any = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
    try:
        compiled: Any = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # Numba found no place to write; it compiles again in each process.
        return numba.njit(**options)(function)
    # Numba compares only the file of the loop, and would keep using code compiled with the old value of a constant from
    # another file. With this stamp it replaces code from other sources.
    index: Any = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if not hasattr(index, "_source_stamp"):  # with NUMBA_DISABLE_JIT, or if Numba keeps its cache in another way
        return numba.njit(**options)(function)
    index._source_stamp = SOURCES
    return compiled
