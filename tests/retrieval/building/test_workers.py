"""Ground truth: the bytes of a build in one process. The scheduler and the workers are real processes on loopback."""

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import pytest
from support import SMALL, all_bytes, write_corpus

from retro_np.errors import UserError
from retro_np.files import temporary_name
from retro_np.retrieval import stages
from retro_np.retrieval.bert import load_bert
from retro_np.retrieval.build import build_database
from retro_np.retrieval.edit import add_documents, compact, remove_documents
from retro_np.retrieval.shards import index_shard
from retro_np.retrieval.workers import Task, workers

CONFIG = replace(SMALL, shard_bytes=1500, d_key=32)


@pytest.fixture(autouse=True)
def _earlier_clients_are_closed():
    """Collect clients that could not connect. One that is collected while another starts would wait for it for ever."""
    gc.collect()


@contextmanager
def process(*command):
    """A process that is killed at the end if it still runs."""
    running = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


@contextmanager
def cluster(folder, n_workers):
    """The address of a scheduler, and its workers' processes."""
    scheduler_file = folder / "scheduler.json"
    options = ["--scheduler-file", scheduler_file, "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    with ExitStack() as stack:
        scheduler = stack.enter_context(process("-m", "distributed.cli.dask_scheduler", *options))
        wait_until(scheduler_file.exists, scheduler)
        options = ["--scheduler-file", scheduler_file, "--nthreads", "1", "--no-nanny", "--no-dashboard"]
        options += ["--local-directory", folder, "--host", "127.0.0.1"]
        processes = [
            stack.enter_context(process("-m", "distributed.cli.dask_worker", *options, "--name", f"worker-{number}"))
            for number in range(n_workers)
        ]
        from distributed import Client

        with Client(scheduler_file=str(scheduler_file)) as client:
            client.wait_for_workers(n_workers, timeout=60)
            yield client.scheduler.address, processes


def wait_until(condition, running, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert running.poll() is None, running.stderr.read().decode()
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("dask") / "docs", documents=40, seed=8)


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory):
    """The bytes of the database that one process builds."""
    out = tmp_path_factory.mktemp("expected") / "db"
    build_database(corpus, out, CONFIG, "hashing")
    return all_bytes(out)


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_builds_the_same_bytes(corpus, expected, tmp_path):
    out = tmp_path / "db"
    with cluster(tmp_path, 2) as (address, processes):
        was_finished = []

        def kill_half_way():
            wait_until(lambda: (out / "shards" / "00003" / "tokens.npy").exists(), processes[0])
            os.kill(processes[0].pid, signal.SIGKILL)
            was_finished.append((out / "manifest.json").exists())

        killer = threading.Thread(target=kill_half_way)
        killer.start()
        build_database(corpus, out, CONFIG, "hashing", dask=address)
        killer.join()
        assert was_finished == [False]  # the worker was killed during the build
        assert processes[0].poll() == -signal.SIGKILL
        assert processes[1].poll() is None
        assert all_bytes(out) == expected
        # edits by the remaining worker, compared with edits in this process
        additions = write_corpus(tmp_path / "more", documents=6, seed=9)
        for path in list(additions.iterdir()):
            path.rename(path.with_name("new_" + path.name))
        build_database(corpus, tmp_path / "same", CONFIG, "hashing")
        for folder, dask in ((out, address), (tmp_path / "same", None)):
            add_documents(folder, additions, dask=dask)
            remove_documents(folder, [2, "new_module_03.py"])
            compact(folder, dask=dask)
        assert all_bytes(out) == all_bytes(tmp_path / "same")


@pytest.mark.slow
def test_partial_files_of_a_killed_worker_are_not_left_in_the_database(corpus, expected, tmp_path, monkeypatch):
    out, index = tmp_path / "db", stages.write_indexes

    def write_indexes(run, folders):
        temporary_name(folders[1] / "documents.npy").write_bytes(b"from a worker that died")
        index(run, folders)

    monkeypatch.setattr(stages, "write_indexes", write_indexes)
    build_database(corpus, out, CONFIG, "hashing")
    assert all_bytes(out) == expected


@pytest.mark.slow
def test_a_local_cluster_with_bert_builds_the_same_bytes(corpus, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    for path in sorted(corpus.iterdir())[:6]:
        (small / path.name).write_text(path.read_text())
    config, bert = replace(CONFIG, chunk_size=32), load_bert()
    build_database(small, tmp_path / "one", config, bert)
    build_database(small, tmp_path / "many", config, bert, dask="local")
    assert all_bytes(tmp_path / "one") == all_bytes(tmp_path / "many")


def test_an_exception_of_a_task_on_a_worker_is_raised_here(tmp_path):
    with workers("local") as run, pytest.raises(FileNotFoundError, match="nowhere"):
        run("failing", "", [Task(index_shard, (tmp_path / "nowhere",), 1)])


def test_a_pickled_bert_is_small_and_gives_the_same_keys():
    bert, pickled = load_bert(), pickle.dumps(load_bert())
    assert len(pickled) < 1000
    assert np.array_equal(pickle.loads(pickled).embed(["a text"], False), bert.embed(["a text"], False))


def test_an_unreachable_scheduler_is_reported_in_one_line(monkeypatch):
    monkeypatch.setattr("retro_np.retrieval.workers.SCHEDULER_TIMEOUT", "1s")
    with (
        pytest.raises(UserError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"),
        workers("tcp://127.0.0.1:9"),
    ):
        pass


@pytest.mark.parametrize("address", ["tls://a:1", "ucx://x", "tcp://", "nowhere", "inproc://x", ""])
def test_an_odd_address_of_a_scheduler_is_refused_in_one_line(address):
    with pytest.raises(UserError, match="no Dask scheduler answers at") as error, workers(address):
        pass
    assert "\n" not in str(error.value)
