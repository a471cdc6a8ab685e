"""What is installed here, what runs where, and what is missing: `retro-np info`."""

import importlib.metadata
import importlib.util
import os
import platform

import numpy as np

from retro_np import kernels, runtime
from retro_np.errors import UserError
from retro_np.kernels import threads
from retro_np.retrieval.weights import find_bert, read_bert

PACKAGES = ("numpy", "numba", "hnswlib", "tokenizers", "safetensors")
THREAD_LIMITS = (
    threads.VARIABLE,
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


def facts() -> list[tuple[str, str]]:
    """Name and value of each line of the table."""
    lines = [("python", f"{platform.python_version()} on {platform.machine()}")]
    lines += [(name, importlib.metadata.version(name)) for name in PACKAGES]
    lines += [("BLAS", _blas()), ("threads", _threads())]
    settled = [f"{what}: {'yes' if done else 'no'}" for what, done in runtime.settled.items()]
    lines.append(("process", ", ".join(settled) or "left as it is (RETRO_NP_TUNE=0)"))
    if kernels.c_extension() is None:
        missing = "missing: NumPy and Numba serve instead. With a C compiler: pip install --force-reinstall --no-deps ."
        lines.append(("C extension", missing))
    else:
        lines.append(("C extension", f"built; attention on {kernels.c_extension().vector_unit()} vectors"))
    lines.append(("kernels", kernels.using()))
    lines += [(f"  {row[0]}", row[1]) for row in kernels.table()]
    try:
        files = read_bert(find_bert())
        lines.append(("BERT weights", f"{files.name} ({files.sha256[:6]}…), up to {files.max_length} word pieces"))
    except UserError as error:
        lines.append(("BERT weights", f"missing: {error}"))
    for name in ("torch", "transformers"):
        there = importlib.util.find_spec(name) is not None
        lines.append((f"{name} (oracle of the tests)", importlib.metadata.version(name) if there else "not installed"))
    return lines


def _threads() -> str:
    limits = [f"{name}={os.environ[name]}" for name in THREAD_LIMITS if name in os.environ]
    found = f"{threads.cores()} cores; our kernels use {threads.count()} threads, BLAS its own"
    return f"{found} ({' '.join(limits)})" if limits else found


def _blas() -> str:
    found = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"{found['name']} {found.get('version', '')}".strip()
