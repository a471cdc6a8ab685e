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
    from one call to the next, so results repeat to the bit. A loop that sums must be in a function that Python calls.
    In a helper of one, the process that compiles it may take the terms in another order than those that load it.
    """
    options: Any = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
    try:
        compiled: Any = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # Numba found no place to write; it compiles again in each process.
        return numba.njit(**options)(function)
    if compiled is not function:  # as it is with NUMBA_DISABLE_JIT
        # Numba stamps the cached code with the age of its own file, and would keep using a loop compiled with the old
        # value of a constant from another file. With this stamp it replaces the code of any other sources.
        compiled._cache._cache_file._source_stamp = SOURCES
    return compiled
