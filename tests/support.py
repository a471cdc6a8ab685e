"""Helpers that several test modules share: a small embedder, corpora, models, processes, interruptions."""

import hashlib
import json
import keyword
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retro_np import EncoderConfig, RetroConfig, kernels
from retro_np.kernels import threads
from retro_np.retrieval.build import BuildConfig
from retro_np.training.config import TrainingConfig
from retro_np.tree import named_leaves

EXPECT_C = os.environ.get("RETRO_NP_EXPECT_C") != "0"
needs_c = pytest.mark.skipif(not EXPECT_C, reason="RETRO_NP_EXPECT_C=0: there is no C compiler")
VECTOR_UNITS = ["plain", "avx2", "avx512"]  # the C extension's names, slowest first
# The environment variables that retro_np reads.
VARIABLES = (kernels.KERNELS_VARIABLE, threads.THREADS_VARIABLE, "RETRO_NP_TUNE", "OPENBLAS_THREAD_TIMEOUT")
WORDS = [*keyword.kwlist, "self", "value", "index", "token", "chunk", "neighbour"]


class CountingEmbedder:
    """A quick, deterministic replacement for BERT: counts of hashed byte pairs, times a fixed matrix."""

    name = "counting"
    sha256 = "c0" * 32
    d_key = 16

    def __init__(self):
        self.matrix = np.random.default_rng(5).standard_normal((64, self.d_key)).astype(np.float32)

    def embed(self, texts, show_progress=False):
        counts = np.zeros((len(texts), 64), np.float32)
        for row, text in enumerate(texts):
            data = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
            np.add.at(counts[row], (data[:-1] * 31 + data[1:]) % 64, 1)
        # One row at a time, so that the bits of a key do not depend on its batch.
        return np.stack([row @ self.matrix for row in counts]) if texts else np.empty((0, self.d_key), np.float32)


def write_corpus(folder: Path, documents: int = 30, seed: int = 0) -> Path:
    """Write documents of random code, each of 3 to 299 words."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        words = rng.choice(WORDS, size=int(rng.integers(3, 300)))
        lines = [" ".join(words[i : i + 8]) for i in range(0, len(words), 8)]
        (folder / f"module_{number:02d}.py").write_text("\n".join(lines) + "\n")
    return folder


def all_bytes(folder: Path) -> dict[str, str]:
    """The hash of every file in a folder, except locks and logs, because logs contain times."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in (".lock", "log.jsonl"))
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def fresh_python(code: str, **environment: str) -> tuple[str, str, int]:
    """Run code in a new interpreter; of VARIABLES, only `environment` is set. Returns output, errors and status."""
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    child = subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)
    return child.stdout.strip(), child.stderr, child.returncode


def run(*arguments, cwd=None):
    """Run retro-np in its own process. Returns its exit status, output and errors."""
    command = [sys.executable, "-c", "from retro_np.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "160", "NO_COLOR": "1"}
    child = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, stdin=subprocess.DEVNULL)
    return child.returncode, child.stdout, child.stderr


def refused(*arguments):
    """Run retro-np with a mistake. Returns the one line that it must print."""
    status, _, err = run(*arguments)
    assert status == 2, err
    assert "Traceback" not in err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("retro-np: ")
    return lines[0]


SMALL = BuildConfig(chunk_size=8, vocabulary_size=300, held_out=0.2, neighbours=4, extra_candidates=6)


class Interrupter:
    """Counts every rename and removal of a file or folder, and raises KeyboardInterrupt before or after one of them."""

    def __init__(self, monkeypatch):
        self.count, self.target = 0, None
        for name in ("replace", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, change):
        def counted(*args, **options):
            self.count += 1
            number = self.count
            if self.target == (number, "before"):
                raise KeyboardInterrupt
            change(*args, **options)
            if self.target == (number, "after"):
                raise KeyboardInterrupt

        return counted

    def count_changes(self, action) -> int:
        """The number of changes that an action makes."""
        self.count, self.target = 0, None
        action()
        return self.count

    def interrupt(self, action, change: int, when: str):
        """Run an action and interrupt it "before" or "after" one of its changes, which count from 1."""
        self.count, self.target = 0, (change, when)
        with pytest.raises(KeyboardInterrupt):
            action()
        self.target = None


EMBEDDER = CountingEmbedder()
SHARDS = replace(SMALL, shard_bytes=4000)


def json_lines(path: Path, texts: dict[str, str]) -> Path:
    """Write named documents as a .jsonl file."""
    path.write_text("".join(json.dumps({"name": name, "text": text}) + "\n" for name, text in texts.items()))
    return path


TRAINING = TrainingConfig(
    steps=8, sequence_length=32, batch_size=2, learning_rate=1e-2, warmup=2, checkpoint_every=3, neighbours=2
)


def small_config(database, **change):
    config = RetroConfig(
        database.vocabulary_size, 16, 32, 2, 8, 3, (2, 3), database.chunk_size, EncoderConfig(8, 16, 2, 4, 1, (1,))
    )
    return replace(config, **change)


def assert_same_gradients(actual, expected, rtol, floor):
    """Assert that every leaf agrees within rtol of its largest entry.

    floor, a share of the largest entry in all leaves, is for leaves that are zero in exact arithmetic and hold only
    rounding errors, such as W_q if there is a single key.
    """
    expected = dict(named_leaves(expected))
    largest = max(np.abs(grad).max() for grad in expected.values())
    names = [name for name, _ in named_leaves(actual)]
    assert sorted(names) == sorted(expected)
    for name, grad in named_leaves(actual):
        tolerance = rtol * np.abs(expected[name]).max() + floor * largest
        worst = np.abs(grad - expected[name]).max()
        assert worst <= tolerance, f"{name} is off by {worst:.3g}, more than {tolerance:.3g}"
