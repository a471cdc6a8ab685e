"""Kernels in forked and spawned processes and beside other threads. Ground truth: the results in this process."""

import multiprocessing
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from retro_np import kernels, retro_loss
from retro_np.kernels import threads
from retro_np.kernels.search import exact_search
from retro_np.nn.checks import CONFIG, perturbed_params
from retro_np.tree import named_leaves

KINDS = ["numpy", "numba", "c"]


def results(kind: str) -> bytes:
    """The bits of a training step and of a search that are large enough to run on several threads."""
    if kind == "c" and kernels.c_extension() is None:
        return b""
    kernels.use(kind)
    threads.use_threads(3)
    rng = np.random.default_rng(0)
    tokens, neighbours = rng.integers(1, 11, (8, 40)), rng.integers(1, 11, (8, 13, 2, 6))
    loss, vjp = retro_loss(perturbed_params(CONFIG), CONFIG, tokens, tokens, neighbours)
    queries, keys = (rng.standard_normal((n, 16)).astype(np.float32) for n in (100, 9000))
    arrays = [loss, *(array for _, array in named_leaves(vjp(1.0))), *exact_search(queries, keys, 3)]
    return b"".join(np.asarray(array).tobytes() for array in arrays)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
@pytest.mark.parametrize("kind", KINDS)
def test_a_forked_process_computes_on_several_threads_what_its_parent_does(kind):
    expected = results(kind)  # starts the parent's threads, which do not survive the fork
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        sender.send_bytes(results(kind) or b"-")
        os._exit(0)
    try:
        assert receiver.poll(120), "the forked process hangs"
        assert receiver.recv_bytes() == (expected or b"-")
        assert results(kind) == expected  # the parent goes on as before
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
@pytest.mark.parametrize("kind", KINDS)
def test_a_process_forked_while_other_threads_compute_can_compute(kind):
    expected, stop = results(kind), threading.Event()

    def work():
        while not stop.is_set():
            results(kind)

    busy = threading.Thread(target=work)
    busy.start()
    try:
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map_async(results, [kind] * 3).get(timeout=120) == [expected] * 3
    finally:
        stop.set()
        busy.join()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_spawned_process_computes_what_this_one_does(kind):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply_async(results, [kind]).get(timeout=300) == results(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_from_several_threads_at_once_give_what_one_call_gives(kind):
    expected = results(kind)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(results, [kind] * 8)) == {expected}


def test_the_caller_s_errstate_holds_in_every_thread_and_no_longer():
    threads.use_threads(3)
    seen = []

    def job(part):
        seen.append(np.geterr()["over"])

    with np.errstate(over="raise"):
        threads.parallel_for(job, range(64))
    assert set(seen) == {"raise"}
    seen.clear()
    threads.parallel_for(job, range(64))
    assert set(seen) == {np.geterr()["over"]}
