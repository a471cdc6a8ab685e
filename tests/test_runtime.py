"""Settings of the process. Ground truth: its environment and its page faults, in fresh interpreters."""

import sys

import pytest
from support import fresh_python

SHOW = "import os; from retro_np import runtime; print(os.environ.get('OPENBLAS_THREAD_TIMEOUT'), runtime.tuned)"
FAULTS = """
import retro_np, resource, numpy as np
for _ in range(3):
    np.ones(10_000_000)
start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
"""


def printed(code, **environment):
    out, err, status = fresh_python(code, **environment)
    assert status == 0, err
    return out


def test_blas_threads_sleep_if_retro_np_is_imported_before_numpy():
    assert printed(SHOW).startswith("4 {'BLAS threads sleep': True")


def test_blas_is_reported_as_unchanged_if_numpy_was_imported_first():
    assert printed("import numpy; " + SHOW).startswith("None {'BLAS threads sleep': False")


def test_a_users_own_setting_is_kept():
    assert printed(SHOW, OPENBLAS_THREAD_TIMEOUT="20").startswith("20 {'BLAS threads sleep': False")


def test_retro_np_tune_0_changes_nothing():
    assert printed(SHOW, RETRO_NP_TUNE="0") == "None {}"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_reused_without_page_faults():
    assert int(printed(FAULTS)) < int(printed(FAULTS, RETRO_NP_TUNE="0")) / 10
