"""The switch: which implementation runs. Ground truth: functions that return their own names."""

import inspect

import numpy as np
import pytest
from support import EXPECT_C, fresh_python

from retro_np import kernels
from retro_np.errors import UserError
from retro_np.kernels.search import exact_search
from retro_np.kernels.substring import longest_common_substring


@pytest.fixture(autouse=True)
def _switch(monkeypatch):
    """Each test has its own choice, registry and extension, and an environment that says nothing."""
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "_choice", None)
    monkeypatch.setattr(kernels, "_kernels", dict(kernels._kernels))
    monkeypatch.setattr(kernels, "c_extension", lambda: object())


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(kernels, "c_extension", lambda: None)


def in_numpy(shape, *, fill=0):
    """What it does."""
    return "numpy"


def in_numba(shape, *, fill=0):
    return "numba"


def in_c(shape, *, fill=0):
    return "c"


def full():
    return kernels.kernel("full", numpy=in_numpy, numba=in_numba, c=in_c)


@pytest.mark.parametrize("kind", ["numpy", "numba", "c"])
def test_use_chooses_the_implementation(kind):
    function = full()
    kernels.use(kind)
    assert function(3) == kind
    assert kernels.using() == kind


def test_the_default_is_the_best_kind_of_each_kernel():
    assert full()(3) == "c"
    assert kernels.kernel("other", numpy=in_numpy, numba=in_numba, c=in_c, best=("numba", "c", "numpy"))(3) == "numba"
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


@pytest.mark.parametrize("kind", ["numba", "c"])
def test_a_kernel_without_the_chosen_kind_runs_its_numpy_one(kind):
    kernels.use(kind)
    assert kernels.kernel("plain", numpy=in_numpy)(3) == "numpy"


@pytest.mark.parametrize(
    ("arrays", "kind"),
    [
        ((np.zeros(1, np.float32), np.zeros(1, np.float32), np.zeros(1, bool), None, 3), "c"),
        ((np.zeros(1), np.zeros(1, int)), "c"),
        ((np.zeros(1, np.float16),), "numpy"),
        ((np.zeros(1, np.float32), np.zeros(1)), "numpy"),
        ((np.zeros(1, ">f4"),), "numpy"),
        ((np.zeros(1, complex),), "numpy"),
    ],
)
def test_a_kernel_of_one_type_leaves_others_and_mixtures_to_numpy(arrays, kind):
    function = kernels.kernel("typed", numpy=lambda *_: "numpy", c=lambda *_: "c", one_type=True)
    assert function(*arrays) == kind


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
def test_c_without_the_extension_is_refused_with_the_way_to_get_it():
    with pytest.raises(UserError, match=r"C compiler .* and reinstall"):
        kernels.use("c")
    assert kernels.using() == "auto"


@pytest.mark.usefixtures("no_extension")
def test_c_in_the_environment_without_the_extension_is_refused_at_first_use(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "c")
    function = full()
    with pytest.raises(UserError, match=r"RETRO_NP_KERNELS: .* C compiler"):
        function(3)


@pytest.mark.parametrize("kind", ["numpy", "numba"])
def test_the_environment_chooses(kind):
    code = "from retro_np import kernels; import retro_np.kernels.search; print(kernels.using())"
    assert fresh_python(code, RETRO_NP_KERNELS=kind)[0] == kind


def test_an_unknown_name_in_the_environment_is_refused_at_first_use_and_not_at_import():
    code = "import retro_np.kernels.search as s; print('imported'); s.exact_search([[0.0]], [[0.0]], 1)"
    out, err, status = fresh_python(code, RETRO_NP_KERNELS="fortran")
    assert out == "imported"
    assert status == 1
    assert "RETRO_NP_KERNELS: no kernels 'fortran'; choose one of numpy, numba, c, auto" in err


def test_importing_the_kernels_does_not_import_numba():
    code = "import sys, retro_np.kernels.search, retro_np.kernels.substring; print('numba' in sys.modules)"
    assert fresh_python(code)[0] == "False"


def test_the_table_says_what_runs_and_what_there_is():
    kernels.use("numpy")
    assert ("exact_search", "numpy", ("c", "numpy")) in kernels.table()
    kernels.use("auto")
    assert ("exact_search", "c", ("c", "numpy")) in kernels.table()
    assert ("longest_common_substring", "numba", ("numba", "numpy")) in kernels.table()


@pytest.mark.usefixtures("no_extension")
def test_the_table_leaves_out_what_was_not_built():
    assert ("exact_search", "numpy", ("numpy",)) in kernels.table()


def test_the_extension_that_is_found_is_the_one_that_was_built():
    code = "from retro_np import kernels; print(getattr(kernels.c_extension(), '__name__', None))"
    assert fresh_python(code)[0] == ("retro_np._c" if EXPECT_C else "None")


def test_the_public_kernels_are_documented():
    for function in (exact_search, longest_common_substring):
        assert "Returns" in function.__doc__
        assert "Raises" in function.__doc__
