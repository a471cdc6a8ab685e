"""Settings of the process. Ground truth, in fresh interpreters: environment, processor time, page faults and bits."""

import ctypes
import sys

import pytest
from support import fresh_python

from retro_np.kernels import blas_threads

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
SPINNING = """
{imports}
import time
import numpy as np
a = np.ones((300, 300))
def spin():  # seconds of the processor in the pause after a product, when nothing is left to do
    a @ a
    start = time.process_time()
    time.sleep(0.04)
    return time.process_time() - start
def spins():
    return max(spin() for _ in range(8))
"""
SPINS = SPINNING + "print(spins())"
BITS = """
{imports}
import hashlib, numpy as np, retro_np
from retro_np.tree import named_leaves
config = retro_np.RetroConfig(300, 128, 256, 2, 64, 2)
rng = np.random.default_rng(0)
params = retro_np.init_params(config, rng)
loss, vjp = retro_np.retro_loss(params, config, *rng.integers(1, 300, (2, 4, 161)), None)
retro_np.adamw_update(params, vjp(1.0), retro_np.adamw_init(params), lr=1e-3)
print(hashlib.sha256(b"".join(leaf.tobytes() for _, leaf in named_leaves(params))).hexdigest())
"""
COUNTS = """
import ctypes, numpy as np
from numpy.linalg import _umath_linalg
from retro_np.kernels import blas_threads
library = ctypes.CDLL(_umath_linalg.__file__)
count, limit = (blas_threads._function(library, f"{verb}_num_threads") for verb in ("get", "set"))
"""
ORDERS = {"retro_np first": "import retro_np", "numpy first": "import numpy, retro_np"}
WITH_TORCH = {"PyTorch first": "import torch, numpy, retro_np"}
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc or glibc's allocator")


def printed(code, **environment):
    out, err, status = fresh_python(code, **environment)
    assert status == 0, err
    return out


@linux
@pytest.mark.parametrize("order", ORDERS | WITH_TORCH)
def test_blas_threads_are_reported_as_asleep_in_any_order_of_imports(order):
    assert printed(f"{(ORDERS | WITH_TORCH)[order]}; {SHOW}").startswith("4 {'BLAS threads sleep': True")


@linux
@pytest.mark.parametrize("order", ORDERS)
def test_blas_threads_do_not_spin_after_a_product(order):
    environment = {"OPENBLAS_NUM_THREADS": "2"}
    assert float(printed(SPINS.format(imports="import numpy"), **environment)) > 0.005
    assert float(printed(SPINS.format(imports=ORDERS[order]), **environment)) < 0.002


def test_a_training_step_has_the_same_bits_in_any_order_of_imports():
    codes = [BITS.format(imports=imports) for imports in (ORDERS | WITH_TORCH).values()]
    assert len({printed(code, RETRO_NP_KERNELS="numpy") for code in codes}) == 1  # the products are BLAS's in any case


@linux
def test_numpy_keeps_its_number_of_blas_threads():
    code = COUNTS + "limit(3); print(blas_threads.restart(), count()); np.ones((500, 500)) @ np.ones((500, 500))"
    assert printed(code, OPENBLAS_NUM_THREADS="4") == "True 3"


BUSY = """
import numpy as np, sys, threading
sys.setswitchinterval(1e-4)
a, done = np.ones((400, 400), np.float32), []
def multiply():
    while len(done) < 10**6:
        a @ a
        done.append(1)
threading.Thread(target=multiply, daemon=True).start()
import retro_np
print(retro_np.runtime.tuned["BLAS threads sleep"])
before = len(done)
while len(done) < before + 10:
    pass
print("went on")
"""


@linux
def test_blas_threads_are_left_alone_while_another_thread_may_multiply():
    assert printed(BUSY, OPENBLAS_NUM_THREADS="2") == "False\nwent on"


class OtherLibrary:
    """A BLAS library without OpenBLAS's functions, or with those given."""

    def __init__(self, **functions):
        self.__dict__.update(functions)


@pytest.mark.parametrize("parallel", [None, 0, 2])
def test_other_blas_libraries_and_openblas_without_threads_of_its_own_are_left_alone(parallel, monkeypatch):
    functions = {} if parallel is None else {"openblas_get_parallel": lambda: parallel}
    names = ("openblas_get_num_threads", "openblas_set_num_threads", "openblas_read_env", "blas_thread_shutdown_")
    functions |= {} if parallel is None else dict.fromkeys(names, lambda *_: pytest.fail("called"))
    monkeypatch.setattr(sys, "_current_frames", lambda: {0: None})  # no other thread, whatever runs the tests
    monkeypatch.setattr(ctypes, "CDLL", lambda path: OtherLibrary(**functions))
    assert blas_threads.restart() is False


def test_a_users_own_setting_is_kept():
    assert printed(SHOW, OPENBLAS_THREAD_TIMEOUT="20").startswith("20 {'BLAS threads sleep': False")


def test_blas_is_reported_as_unchanged_if_its_threads_cannot_start_again():
    code = "import numpy, ctypes; real = ctypes.CDLL; ctypes.CDLL = lambda path: object() if path else real(path); "
    assert printed(code + SHOW).startswith("None {'BLAS threads sleep': False")


@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS)
def test_retro_np_tune_0_changes_nothing(imports):
    assert printed(f"{imports}; {SHOW}", RETRO_NP_TUNE="0") == "None {}"


@linux
def test_freed_memory_is_reused_without_page_faults():
    assert int(printed(FAULTS)) < int(printed(FAULTS, RETRO_NP_TUNE="0")) / 10


# Threads that spin while tokens are sampled

STATE = """
import os, threading
from retro_np import runtime
from retro_np.generation import spinning_blas
def state():
    return os.environ.get("OPENBLAS_THREAD_TIMEOUT"), runtime.tuned.get("BLAS threads sleep")
"""
SAMPLING = SPINNING.format(imports="import retro_np") + STATE


def lines(code, **environment):
    return printed(code, OPENBLAS_NUM_THREADS="2", **environment).splitlines()


@linux
@pytest.mark.parametrize("ending", ["pass", "raise KeyboardInterrupt"])
def test_blas_threads_spin_within_spinning_blas_and_sleep_after_it_however_it_ends(ending):
    code = f"""
import contextlib
with contextlib.suppress(KeyboardInterrupt), spinning_blas():
    print(spins())
    {ending}
print(spins())
print(state())
"""
    within, after, state = lines(SAMPLING + code)
    assert float(within) > 0.005
    assert float(after) < 0.002
    assert state == "('4', True)"


@linux
def test_blas_threads_sleep_within_spinning_blas_while_another_thread_may_multiply():
    code = """
done = threading.Event()
threading.Thread(target=done.wait).start()
with spinning_blas():
    print(state())
    print(spins())
print(state())
done.set()
"""
    within, spun, after = lines(SAMPLING + code)
    assert float(spun) < 0.002
    assert within == after == "('4', True)"


@linux
def test_threads_that_cannot_be_put_to_sleep_again_are_reported_as_awake_until_they_can():
    code = """
done = threading.Event()
with spinning_blas():
    other = threading.Thread(target=done.wait)
    other.start()
print(state())
with spinning_blas():
    print(state())
done.set()
other.join()
with spinning_blas():
    pass
print(state(), spins() < 0.002)
"""
    assert lines(SAMPLING + code) == ["('4', False)", "('4', False)", "('4', True) True"]


@linux
def test_within_spinning_blas_another_one_changes_nothing():
    code = """
with spinning_blas():
    with spinning_blas():
        pass
    print(state())
print(state())
"""
    assert lines(SAMPLING + code) == ["('26', True)", "('4', True)"]


@pytest.mark.parametrize(
    ("environment", "state"),
    [({"RETRO_NP_TUNE": "0"}, (None, None)), ({"OPENBLAS_THREAD_TIMEOUT": "20"}, ("20", False))],
    ids=["RETRO_NP_TUNE=0", "a setting of the user"],
)
def test_spinning_blas_changes_nothing_where_the_import_changed_nothing(environment, state):
    code = """
from retro_np.kernels import blas_threads
def restart():
    raise AssertionError("called")
blas_threads.restart = restart
with spinning_blas():
    print(state())
print(state())
"""
    assert lines(STATE + code, **environment) == [str(state)] * 2


@linux
def test_the_threads_of_the_kernels_end_before_blas_threads_start_again_and_come_back_with_the_next_job():
    code = """
from retro_np.kernels.threads import parallel_for
def ours():
    return sum(thread.name.startswith("retro_np") for thread in threading.enumerate())
def job():
    barrier, done = threading.Barrier(2), []
    parallel_for(lambda part: (barrier.wait(20), done.append(part)), range(2))
    return sorted(done), ours()
print(job())
with spinning_blas():
    print(ours(), state())
    print(job())
print(ours(), state())
print(job())
"""
    both = "([0, 1], 1)"
    expected = [both, "0 ('26', True)", both, "0 ('4', True)", both]
    assert lines(SAMPLING + code, RETRO_NP_THREADS="2") == expected


SAMPLED = """
import hashlib, os, sys
import numpy as np, retro_np
from retro_np.nn.decoders import DecoderConfig
config = DecoderConfig(2000, 256, 512, n_heads=4, d_head=64, n_layers=2)
params = retro_np.init_params(config, np.random.default_rng(0))
timeouts = set()
tokens, _ = retro_np.generate(
    params, config, np.arange(1, 70), 12, on_token=lambda _: timeouts.add(os.environ.get("OPENBLAS_THREAD_TIMEOUT"))
)
print(timeouts, tokens.tolist())
"""


@linux
def test_a_decoder_of_others_samples_the_same_tokens_whether_blas_threads_spin_or_not():
    (spinning,), (untuned,) = lines(SAMPLED), lines(SAMPLED, RETRO_NP_TUNE="0")
    assert spinning.startswith("{'26'} [")
    assert spinning.removeprefix("{'26'}") == untuned.removeprefix("{None}")


@linux
def test_a_retro_model_samples_with_blas_threads_that_sleep():
    config = "config = retro_np.RetroConfig(2000, 32, 64, 2, 16, 2)\n"
    (sampled,) = lines("".join(config if "config =" in line else f"{line}\n" for line in SAMPLED.splitlines()))
    assert sampled.startswith("{'4'} [")
