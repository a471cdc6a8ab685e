"""Builds the C extension retro_np._c from csrc/ and copies the tutorials; pyproject.toml holds the rest. Without a C
compiler the installation continues without the extension."""

import re
import shutil
import warnings
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CCompilerError, CompileError, ExecError, LinkError, PlatformError

# Without -march=native, a wheel runs on other processors too. The hot loops are compiled for several vector units, and
# the first call chooses among them.
FLAGS = ["-std=c11", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra"]
FUSED = "-ffp-contract=fast"  # a product and a sum in one instruction, where the processor has it
PICTURE = re.compile(r"\]\(\.\./docs/landing/([\w.-]+\.(?:svg|png))\)")  # as in retro_np/tutorials.py
SEPARATE = {"csrc/search.c": "-ffp-contract=off"}  # the same bits on every machine


class BuildOrWarn(build_ext):
    """Compile with our flags. If that fails, warn, and let setuptools continue without the extension."""

    def build_extension(self, ext):
        sources = list(ext.sources)
        try:
            if self.compiler.compiler_type == "msvc":
                raise CompileError("csrc/ uses vector types of GCC and clang, which MSVC does not have")
            for source, flag in SEPARATE.items():
                ext.extra_objects += self.compiler.compile(
                    [source], output_dir=self.build_temp, extra_postargs=[*FLAGS, flag], depends=ext.depends
                )
            ext.sources = [source for source in sources if source not in SEPARATE]
            ext.extra_compile_args = [*FLAGS, FUSED]
            super().build_extension(ext)
        except (CCompilerError, CompileError, ExecError, LinkError, PlatformError) as error:
            warnings.warn(
                f"{ext.name} was not built ({error}). retro_np works without it, slower, on NumPy and Numba. "
                "For the C kernels install GCC or clang and Python's headers, and reinstall.",
                stacklevel=1,
            )
            raise  # Extension(optional=True) turns the error into a message.
        finally:
            ext.sources = sources  # the source distribution needs all of them


class BuildWithTutorials(build_py):
    """Copy the tutorials into the package of a wheel, where retro_np/tutorials.py looks for them: notebooks, checks,
    answers and mistakes, mini_retro.py, and the pictures that the notebooks show."""

    def run(self):
        super().run()
        if self.editable_mode:
            return  # The clone has them.
        source, target = Path(__file__).parent / "tutorials", Path(self.build_lib) / "retro_np" / "_tutorials"
        patterns, copies = ("[0-9]*.ipynb", "mini_retro.py", "*/*.py", "*/*.json"), {}
        for path in (path for pattern in patterns for path in source.glob(pattern)):
            copies[target / path.relative_to(source)] = path
            shown = PICTURE.findall(path.read_text(encoding="utf-8")) if path.suffix == ".ipynb" else ()
            copies |= {target / "pictures" / name: source.parent / "docs" / "landing" / name for name in shown}
        shutil.rmtree(target, ignore_errors=True)  # what an earlier build left there
        for copy, path in copies.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


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
    cmdclass={"build_ext": BuildOrWarn, "build_py": BuildWithTutorials},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
