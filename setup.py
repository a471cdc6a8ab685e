"""Builds the C extension retro_np._c from csrc/; pyproject.toml holds the rest. Without a compiler the
install goes on."""

import warnings
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError, ExecError, LinkError, PlatformError

# no -march=native: a wheel runs elsewhere too; what is hot is compiled for several processors and chosen when called
FLAGS = ["-std=c11", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra"]
FUSED = "-ffp-contract=fast"  # a product and a sum in one instruction, where the processor has it
APART = {"csrc/search.c": "-ffp-contract=off"}  # one result, to the bit, on every machine


class BuildOrWarn(build_ext):
    """Compile with our flags; where that fails, say what is lost before setuptools goes on without the extension."""

    def build_extension(self, ext):
        sources = list(ext.sources)
        try:
            for source, flag in APART.items():
                ext.extra_objects += self.compiler.compile(
                    [source], output_dir=self.build_temp, extra_postargs=[*FLAGS, flag], depends=ext.depends
                )
            ext.sources = [source for source in sources if source not in APART]
            ext.extra_compile_args = [*FLAGS, FUSED]
            super().build_extension(ext)
        except (CCompilerError, CompileError, ExecError, LinkError, PlatformError) as error:
            warnings.warn(
                f"{ext.name} was not built ({error}). retro_np works without it: its kernels run on NumPy and Numba, "
                "slower. For the C kernels install a C compiler (gcc or clang) and Python's headers, and reinstall.",
                stacklevel=1,
            )
            raise  # Extension(optional=True) turns it into a message
        finally:
            ext.sources = sources  # all of them, for the source distribution


setup(
    ext_modules=[
        Extension(
            "retro_np._c",
            sources=sorted(glob("csrc/*.c")),
            depends=sorted(glob("csrc/*.h")),
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildOrWarn},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
