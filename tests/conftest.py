"""What several tests share: an embedder that needs no weights, small corpora, a small database."""

import hashlib
import keyword
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retro_np import kernels
from retro_np.kernels import threads
from retro_np.retrieval.build import BuildConfig, build_database

EXPECT_C = os.environ.get("RETRO_NP_EXPECT_C") != "0"
needs_c = pytest.mark.skipif(not EXPECT_C, reason="no C compiler, as the environment says")
VECTOR_UNITS = ["plain", "avx2", "avx512"]  # as the C extension names them, best last
OURS = (kernels.VARIABLE, threads.VARIABLE, "RETRO_NP_TUNE", "OPENBLAS_THREAD_TIMEOUT")  # variables that are heeded

WORDS = [*keyword.kwlist, "self", "value", "index", "token", "chunk", "neighbour"]


class CountingEmbedder:
    """A stand-in for BERT: counts of hashed pairs of bytes, turned by a fixed matrix. Deterministic and quick."""

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
        # one row at a time: a key's bits then do not depend on its batch
        return np.stack([row @ self.matrix for row in counts]) if texts else np.empty((0, self.d_key), np.float32)


def write_corpus(folder: Path, documents: int = 30, seed: int = 0) -> Path:
    """Documents of invented code, of lengths from a few to a few hundred words."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        words = rng.choice(WORDS, size=int(rng.integers(3, 300)))
        lines = [" ".join(words[i : i + 8]) for i in range(0, len(words), 8)]
        (folder / f"module_{number:02d}.py").write_text("\n".join(lines) + "\n")
    return folder


def all_bytes(folder: Path) -> dict[str, str]:
    """The hash of every file below a folder but locks and logs, whose lines hold times."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in (".lock", "log.jsonl"))
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def fresh_python(code: str, **environment: str) -> tuple[str, str, int]:
    """Standard output, standard error and exit status of a new interpreter; of the variables heeded, those given."""
    clean = {name: value for name, value in os.environ.items() if name not in OURS}
    done = subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)
    return done.stdout.strip(), done.stderr, done.returncode


def run(*arguments, cwd=None):
    """Run retro-np in a process of its own; return its status, standard output and standard error."""
    command = [sys.executable, "-c", "from retro_np.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "160", "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout, done.stderr


def refused(*arguments):
    """Run retro-np with something wrong; return the one line that it must print."""
    status, _, err = run(*arguments)
    assert status == 2, err
    assert "Traceback" not in err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("retro-np: ")
    return lines[0]


@pytest.fixture(autouse=True)
def _choices_are_put_back():
    """Whatever a test chooses, kernels or threads, the next one finds the choice of before."""
    before = kernels.using(), threads.count()
    yield
    kernels.use(before[0])
    threads.use_threads(before[1])


SMALL = BuildConfig(chunk_size=8, vocabulary_size=300, held_out=0.2, neighbours=4, spares=6)


@pytest.fixture(scope="session")
def embedder():
    return CountingEmbedder()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "docs")


@pytest.fixture(scope="session")
def database(corpus, tmp_path_factory, embedder):
    return build_database(corpus, tmp_path_factory.mktemp("databases") / "db", SMALL, embedder)
