"""How Numba compiles the loops, and when it may reuse the compiled code."""

import hashlib
import os
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
    settings: Any = numba.config
    previous, compiled = settings.CACHE_DIR, None
    with suppress(RuntimeError):  # Numba found no place to write, or the user has no home.
        # What is left in the package's folder would survive an uninstallation, and could still be imported.
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        settings.CACHE_DIR = previous or str(Path(caches, "retro_np"))
        compiled = numba.njit(cache=True, **options)(function)
    folder, settings.CACHE_DIR = settings.CACHE_DIR, previous
    # Numba's cache checks only whether the loop's own file has changed. This stamp covers every file here.
    index: Any = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if hasattr(index, "_source_stamp") and index._cache_path.startswith(folder):  # not with NUMBA_DISABLE_JIT
        index._source_stamp = SOURCES
        return compiled
    return numba.njit(**options)(function)  # compiled again in each process
