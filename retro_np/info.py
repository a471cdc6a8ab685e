"""What is installed and what runs: `retro-np info`."""

import importlib
import importlib.metadata
import math
import os
import platform
from contextlib import suppress
from pathlib import Path

import numpy as np

from retro_np import kernels, runtime
from retro_np.errors import UserError
from retro_np.kernels import threads

PACKAGES = (
    "numpy", "numba", "hnswlib", "tokenizers", "safetensors", "typer", "rich", "matplotlib", "jinja2", "filelock",
    "pathspec", "huggingface-hub", "datasets", "pyarrow", "dask", "distributed", "torch", "transformers",
)  # fmt: skip
THREAD_LIMITS = (
    threads.THREADS_VARIABLE, "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
)  # fmt: skip
KERNEL_MODULES = ("attention", "bert", "decoders", "hashing", "minhash", "panels", "rowwise", "search", "substring")
GPU = "none is used; for GPUs: RETRO-pytorch (lucidrains), or RETRO in Megatron-LM (NVIDIA), both on PyTorch"


def facts() -> list[tuple[str, str]]:
    """The name and value of each row of the table. Packages that are not installed are listed as such."""
    rows = [("python", f"{platform.python_version()} on {platform.machine()}")]
    rows += [(name, _version(name)) for name in PACKAGES]
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    rows += [("GPU", GPU), ("BERT weights", _bert()), ("threads", _threads())]
    rows.append(("BLAS", f"{blas['name']} {blas.get('version', '')}".strip()))
    tuned = [f"{setting}: {'yes' if done else 'no'}" for setting, done in runtime.tuned.items()]
    rows.append(("process", ", ".join(tuned) or "unchanged (RETRO_NP_TUNE=0)"))
    extension = kernels.c_extension()
    if extension is None:
        built = "missing, so NumPy and Numba are used; with a C compiler: pip install --force-reinstall --no-deps ."
    else:
        built = f"built; attention uses {extension.vector_unit()} vectors"
    rows += [("C extension", built), ("kernels", f"{kernels.using()} (set RETRO_NP_KERNELS to choose)")]
    for name, kind, available in kernel_table():
        alternatives = ", ".join(other for other in available if other != kind)
        rows.append((f"  {name}", f"{kind}; also available: {alternatives}" if alternatives else kind))
    return rows


def kernel_table() -> list[tuple[str, str, tuple[str, ...]]]:
    """A row per kernel: name, kind that runs now, installed kinds, fastest first. UserError like `kernels.using`."""
    for module in KERNEL_MODULES:
        importlib.import_module(f"retro_np.kernels.{module}")
    installed = {name: tuple(filter(kernels.is_installed, kinds)) for name, kinds in kernels.registered.items()}
    return [(name, kernels.running(name), kinds) for name, kinds in sorted(installed.items())]


def check_memory(needed: int, what: str, option: str, value: int) -> None:
    """Raise UserError if fewer bytes are free than are needed.

    what: for which they are needed. option, value: what sets their number, in proportion."""
    if needed > (free := free_memory()):
        fault = f"{what} need {needed / 1e6:,.0f} MB, but only {free / 1e6:,.0f} MB of memory are free"
        raise UserError(f"{fault}: give {option} at most {int(value * free / needed):,}")


def free_memory() -> float:
    """How many bytes of memory are free; infinity where there is no /proc/meminfo."""
    with suppress(OSError, LookupError):
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(fields["MemAvailable"].split()[0])
    return math.inf


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed: pip install {package}"


def _bert() -> str:
    try:
        from retro_np.retrieval.weights import find_bert, read_bert

        files = read_bert(find_bert())
    except UserError as error:
        return str(error)
    except ModuleNotFoundError as error:
        return f"not read, because {error.name} is not installed"
    return f"{files.name} ({files.sha256[:6]}…), up to {files.max_length} word pieces"


def _threads() -> str:
    limits = " ".join(f"{name}={os.environ[name]}" for name in THREAD_LIMITS if name in os.environ)
    counts = f"{threads.cores()} cores; kernels use {threads.count()} threads; BLAS has threads of its own"
    return f"{counts} ({limits})" if limits else counts
