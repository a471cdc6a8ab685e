"""The switch between implementations. Ground truth: functions that return their own names, and fresh interpreters."""

import contextlib
import inspect
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import EXPECT_C, fresh_python

from retro_np import kernels
from retro_np.errors import UserError
from retro_np.info import kernel_table
from retro_np.kernels.search import exact_search
from retro_np.kernels.substring import longest_common_substring
from retro_np.nn.checks import checks


@pytest.fixture(autouse=True)
def _switch(monkeypatch):
    """Each test has its own choice, registry and extension, and an environment without a choice."""
    monkeypatch.delenv(kernels.KERNELS_VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "_choice", None)
    monkeypatch.setattr(kernels, "registered", dict(kernels.registered))
    monkeypatch.setattr(kernels, "c_extension", lambda: object())


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(kernels, "c_extension", lambda: None)


@pytest.fixture
def no_numba(monkeypatch):
    monkeypatch.setattr(kernels, "numba_error", lambda: ImportError("No module named 'numba'"))


def in_numpy(shape, *, fill=0):
    """What it does."""
    return "numpy"


def in_numba(shape, *, fill=0):
    return "numba"


def in_c(shape, *, fill=0):
    return "c"


def underflow(x):
    return x * x


def full():
    return kernels.kernel("full", numpy=in_numpy, numba=f"{__name__}:in_numba", c=in_c)


@pytest.mark.parametrize("kind", ["numpy", "numba", "c"])
def test_use_chooses_the_implementation(kind):
    function = full()
    kernels.use(kind)
    assert function(3) == kind
    assert kernels.using() == kind


def test_the_default_is_the_best_kind_of_each_kernel():
    assert full()(3) == "c"
    assert kernels.kernel("other", numpy=in_numpy, numba=f"{__name__}:in_numba")(3) == "numba"
    assert kernels.kernel("plain", numpy=in_numpy)(3) == "numpy"
    assert kernels.using() == "auto"


def test_auto_takes_back_a_choice():
    function = full()
    kernels.use("numpy")
    kernels.use("auto")
    assert function(3) == "c"


@pytest.mark.usefixtures("no_extension")
def test_without_the_extension_the_default_is_the_next_best():
    assert full()(3) == "numba"


@pytest.mark.usefixtures("no_extension", "no_numba")
def test_without_the_extension_and_numba_the_default_is_numpy():
    assert full()(3) == "numpy"


@pytest.mark.usefixtures("no_numba")
def test_numba_that_cannot_be_imported_is_refused_with_the_reason_and_how_to_get_it():
    with pytest.raises(UserError, match=r"kernels.use: .*\(No module named 'numba'\); pip install -U numba, or choose"):
        kernels.use("numba")
    assert kernels.using() == "auto"


@pytest.mark.parametrize("kind", ["numba", "c"])
def test_a_kernel_without_the_chosen_kind_runs_in_numpy(kind):
    kernels.use(kind)
    assert kernels.kernel("plain", numpy=in_numpy)(3) == "numpy"


@pytest.mark.parametrize(
    ("x", "y", "kind"),
    [
        (np.zeros(1, np.float32), np.zeros(1, np.float32), "c"),
        (np.zeros(1), None, "c"),
        (np.zeros(1, np.float16), None, "numpy"),
        (np.zeros(1, np.float32), np.zeros(1), "numpy"),
        (np.zeros(1, ">f4"), None, "numpy"),
        (np.zeros(1, np.longdouble), np.zeros(1, np.longdouble), "numpy"),
    ],
)
def test_a_kernel_of_arrays_leaves_other_types_and_mixtures_to_numpy(x, y, kind):
    arrays = {"x": "f N", "y": "f N?", "mask": "b N"}
    function = kernels.kernel("typed", numpy=lambda x, y, mask: "numpy", c=lambda x, y, mask: "c", arrays=arrays)
    assert function(x, y, np.zeros(1, bool)) == kind


@pytest.mark.parametrize("kind", ["numpy", "numba", "c"])
def test_a_kernel_s_underflow_raises_in_no_version_but_c_where_only_the_extension_computes(kind):
    kernels.use(kind)
    function = kernels.kernel("tiny", numpy=underflow, numba=f"{__name__}:underflow", c=underflow)
    with np.errstate(under="raise"), pytest.raises(FloatingPointError) if kind == "c" else contextlib.nullcontext():
        function(np.float64(1e-200))


def test_a_kernel_has_the_numpy_function_s_signature_and_docstring():
    function = full()
    assert inspect.signature(function) == inspect.signature(in_numpy)
    assert function.__doc__ == in_numpy.__doc__
    assert function.__name__ == "full"


def test_an_unknown_name_is_refused_with_the_choices_and_changes_nothing():
    kernels.use("numpy")
    with pytest.raises(UserError, match="'fortran'; choose one of numpy, numba, c, auto"):
        kernels.use("fortran")
    assert kernels.using() == "numpy"


@pytest.mark.usefixtures("no_extension")
def test_c_without_the_extension_is_refused_with_how_to_build_it():
    with pytest.raises(UserError, match=r"C compiler .* and reinstall"):
        kernels.use("c")
    assert kernels.using() == "auto"


@pytest.mark.usefixtures("no_extension")
def test_c_in_the_environment_without_the_extension_is_refused_on_first_use(monkeypatch):
    monkeypatch.setenv(kernels.KERNELS_VARIABLE, "c")
    function = full()
    with pytest.raises(UserError, match=r"RETRO_NP_KERNELS: .* C compiler"):
        function(3)


@pytest.mark.parametrize("kind", ["numpy", "numba"])
def test_the_environment_chooses(kind):
    code = "from retro_np import kernels; import retro_np.kernels.search; print(kernels.using())"
    assert fresh_python(code, RETRO_NP_KERNELS=kind)[0] == kind


def test_an_unknown_name_in_the_environment_is_refused_on_first_use_and_not_at_import():
    code = "import retro_np.kernels.search as s; print('imported'); s.exact_search([[0.0]], [[0.0]], 1)"
    out, err, status = fresh_python(code, RETRO_NP_KERNELS="fortran")
    assert out == "imported"
    assert status == 1
    assert "RETRO_NP_KERNELS: unknown kernels 'fortran'; choose one of numpy, numba, c, auto" in err


def test_importing_the_kernels_does_not_import_numba():
    code = "import sys, retro_np.kernels.search, retro_np.kernels.substring; print('numba' in sys.modules)"
    assert fresh_python(code)[0] == "False"


def test_the_table_lists_the_running_and_the_installed_kinds():
    kernels.use("numpy")
    assert ("exact_search", "numpy", ("c", "numpy")) in kernel_table()
    kernels.use("auto")
    assert ("exact_search", "c", ("c", "numpy")) in kernel_table()
    assert ("longest_common_substring", "numba", ("numba", "numpy")) in kernel_table()


@pytest.mark.usefixtures("no_extension")
def test_the_table_leaves_out_kinds_that_were_not_built():
    assert ("exact_search", "numpy", ("numpy",)) in kernel_table()


@pytest.mark.usefixtures("no_numba")
def test_the_table_leaves_out_numba_if_it_cannot_be_imported():
    assert ("longest_common_substring", "numpy", ("numpy",)) in kernel_table()
    assert not any("numba" in kinds for _, _, kinds in kernel_table())


BLOCKED = "import sys; sys.modules |= dict.fromkeys({names})\n"
OPERATORS = (
    BLOCKED.format(names=("numba", "llvmlite", "hnswlib", "tokenizers", "scipy", "fcntl", "resource"))
    + """
from retro_np import gradcheck, retro
from retro_np.info import kernel_table
from retro_np.nn.checks import checks
passed = [check.name for check in checks() if gradcheck(check.f, *check.arrays)]
print(len(passed), "CCA" in passed, sorted({kind for _, _, kinds in kernel_table() for kind in kinds}))
"""
)


@pytest.mark.slow
def test_without_numba_and_without_posix_every_operator_passes_its_gradient_check():
    out, err, status = fresh_python(OPERATORS)
    assert status == 0, err
    assert out == f"{len(list(checks()))} True {['c', 'numpy'] if EXPECT_C else ['numpy']}"


def test_numba_whose_import_raises_is_skipped_and_named_in_one_line(tmp_path):
    (tmp_path / "numba.py").write_text('raise ImportError("Numba needs NumPy 2.3 or less.\\nGot NumPy 9.")')
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import numpy as np
from retro_np import kernels
from retro_np.kernels import rowwise
print(rowwise.gelu_forward(np.zeros(2)))
kernels.use("numba")
"""
    out, err, status = fresh_python(code)
    assert (out, status) == ("[0. 0.]", 1)
    assert err.splitlines()[-1].endswith(
        "kernels.use: Numba cannot be imported (Numba needs NumPy 2.3 or less.); "
        "pip install -U numba, or choose numpy, c or auto"
    )


def test_numba_in_the_environment_without_numba_is_refused_on_first_use():
    code = (
        BLOCKED.format(names=("numba",)) + "import retro_np.kernels.rowwise as r, numpy; r.gelu_forward(numpy.ones(1))"
    )
    _, err, status = fresh_python(code, RETRO_NP_KERNELS="numba")
    assert status == 1
    assert "UserError: RETRO_NP_KERNELS: Numba cannot be imported" in err.splitlines()[-1]


GELU_OF_A_COPY = """
import sys; sys.path.insert(0, {path!r})
import numpy as np
from retro_np import kernels
from retro_np.kernels import rowwise, rowwise_numba
kernels.use("numba")
value, stats = rowwise.gelu_forward(np.ones(3))[0], rowwise_numba._gelu_forward.stats
print(rowwise.__file__, float(value), sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def test_compiled_code_is_reused_until_a_constant_in_another_file_changes(tmp_path):
    package = Path(kernels.__file__).parents[1]
    shutil.copytree(package, tmp_path / "retro_np", ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "retro_np" / "kernels" / "rowwise.py"
    home = str(tmp_path / "caches")

    def run():
        out, err, status = fresh_python(
            GELU_OF_A_COPY.format(path=str(tmp_path)), NUMBA_CACHE_DIR="", XDG_CACHE_HOME=home
        )
        assert status == 0, err
        path, value, hits, misses = out.split()
        assert Path(path) == source
        return float(value), int(hits), int(misses)

    def compiled_files():
        return sorted(path.name for path in Path(home, "retro_np").rglob("*.nbc"))

    def gelu_of_1(cubic):
        return pytest.approx(0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (1 + cubic))), rel=1e-12)

    assert run() == (gelu_of_1(0.044715), 0, 1)
    assert run() == (gelu_of_1(0.044715), 1, 0)
    text = source.read_text()
    assert text.count("0.044715  #") == 1
    source.write_text(text.replace("0.044715  #", "0.5  #"))
    files = compiled_files()
    assert run() == (gelu_of_1(0.5), 0, 1)
    assert compiled_files() == files != []  # the code of the other sources was replaced
    assert not list(source.parent.rglob("*.nb?"))


HASHES_OF_RESULTS = """
import hashlib
import numpy as np
from retro_np.kernels import attention_numba, rowwise
from retro_np.kernels.attention import attention_backward, attention_forward
rng = np.random.default_rng(0)
def normal(*shape):
    return rng.standard_normal(shape, dtype=np.float32)
q, keys, values = normal(1, 1, 64, 2, 64), normal(1, 2, 128, 2, 64), normal(1, 2, 128, 2, 64)
arrays = q, keys, values, normal(191, 2, 64), normal(2, 64), normal(2, 64)
out, lse = attention_forward(*arrays)
fixed_lse = 6 + 0.1 * normal(*lse.shape)
x, gain = normal(300, 257), normal(257)
y, scale = rowwise.rms_norm_forward(x, gain)
results = [out, lse, y, scale, rowwise.gelu_forward(x.ravel())]
results += [*attention_backward(out, fixed_lse, *arrays), *rowwise.rms_norm_backward(y, x, gain, scale)]
print(sum(attention_numba._forward.stats.cache_hits.values()))
print(*(hashlib.sha256(array.tobytes()).hexdigest() for array in results), sep="\\n")
"""


@pytest.mark.slow
def test_the_process_that_compiles_and_one_that_loads_the_code_give_the_same_bits(tmp_path):
    printed = []
    for _ in range(2):
        out, err, status = fresh_python(HASHES_OF_RESULTS, RETRO_NP_KERNELS="numba", NUMBA_CACHE_DIR=str(tmp_path))
        assert status == 0, err
        printed.append(out.splitlines())
    assert (printed[0][0], printed[1][0]) == ("0", "1")
    assert printed[0][1:] == printed[1][1:]
    assert len(printed[0]) == 14


def test_the_extension_that_is_found_is_the_one_that_was_built():
    code = "from retro_np import kernels; print(getattr(kernels.c_extension(), '__name__', None))"
    assert fresh_python(code)[0] == ("retro_np._c" if EXPECT_C else "None")


def test_the_public_kernels_are_documented():
    for function in (exact_search, longest_common_substring):
        assert "Returns" in function.__doc__
        assert "Raises" in function.__doc__
