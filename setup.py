"""Builds the C extension retro_np._c from csrc/; pyproject.toml holds the rest. Without a compiler the
install goes on."""

import warnings

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError, ExecError, LinkError, PlatformError

# no -march=native: a wheel runs elsewhere too. No fused products: one result on every machine
UNIX_FLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
MSVC_FLAGS = ["/std:c11", "/O2", "/fp:precise"]


class BuildOrWarn(build_ext):
    """Compile with our flags; where that fails, say what is lost before setuptools goes on without the extension."""

    def build_extension(self, ext):
        ext.extra_compile_args = MSVC_FLAGS if self.compiler.compiler_type == "msvc" else UNIX_FLAGS
        try:
            super().build_extension(ext)
        except (CCompilerError, CompileError, ExecError, LinkError, PlatformError) as error:
            warnings.warn(
                f"{ext.name} was not built ({error}). retro_np works without it: its kernels run on NumPy and Numba, "
                "slower. For the C kernels install a C compiler (gcc or clang) and Python's headers, and reinstall.",
                stacklevel=1,
            )
            raise  # Extension(optional=True) turns it into a message


setup(
    ext_modules=[
        Extension(
            "retro_np._c",
            sources=["csrc/search.c"],
            depends=["csrc/search.h"],
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildOrWarn},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
