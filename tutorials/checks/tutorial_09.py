"""Checks of tutorial 9's exercises. Ground truth: the library's decoding loop and kernel, and the bytes of files."""

import contextlib
import io
import tempfile
from pathlib import Path

import numpy as np

from retro_np import Database, EncoderConfig, RetroConfig, init_params
from retro_np.experiments import facts as world
from retro_np.generation import decode_tokens
from retro_np.kernels.substring import common_prefix_lengths
from retro_np.retrieval.build import BuildConfig, build_database
from retro_np.retrieval.tokenizer import encode
from retro_np.tutorials.checks.judge import compare, exercise, holds


def searched(n_prompt, length, m):
    """The chunks for which the library's loop searches."""
    encoder = EncoderConfig(d_model=4, d_ffw=8, n_heads=1, d_head=4, n_layers=1)
    config = RetroConfig(20, 4, 8, n_heads=1, d_head=4, n_layers=1, cca_layers=(1,), chunk_size=m, encoder=encoder)
    chunks, params = [], init_params(config, np.random.default_rng(0))
    decode_tokens(params, config, np.ones(n_prompt, int), length, lambda _: 1, lambda chunk, _: chunks.append(chunk))
    return chunks


@exercise("9.1", "searches", right="for seven prompts these are the chunks for which the library's loop searches")
def check_9_1(searches):
    cases = (3, 5, 16), (15, 1, 16), (16, 1, 16), (16, 16, 16), (17, 16, 16), (1, 48, 16), (8, 9, 4)
    for n_prompt, length, m in cases:
        chunks = searches(n_prompt, length, m)
        where = f"n_prompt = {n_prompt}, length = {length}, m = {m}"
        yield compare(chunks, searched(n_prompt, length, m), "the list of chunks", where=where)


@exercise("9.2", "run_lengths", right="as the library colours 50 random samples")
def check_9_2(run_lengths):
    tokens, values = np.array([7, 1, 2, 3]), np.array([[9, 9, 1, 2], [3, 4, 9, 9]])
    where = "a run that begins in one value and goes on in the next"
    yield compare(run_lengths(tokens, values), np.array([0, 1, 2, 1]), "the list of lengths", where=where)
    rng = np.random.default_rng(0)
    for number in range(50):
        tokens, values = rng.integers(0, 3, 10), rng.integers(0, 3, (2, 12))
        expected = common_prefix_lengths(tokens, values)
        yield compare(run_lengths(tokens, values), expected, "the list of lengths", where=f"sample {number}")


def traces(folder, database, fact):
    """Which files of a database hold the fact's code as tokens, or its name."""
    code, found = encode(database.tokenizer, fact.code), []
    for file in sorted(part for part in folder.rglob("*") if part.is_file()):
        is_tokens = file.name == "tokens.npy"
        stored = np.load(file) if is_tokens else np.frombuffer(file.read_bytes(), np.uint8)
        wanted = np.array(code, stored.dtype).tobytes() if is_tokens else fact.name.encode()
        if wanted in stored.tobytes():
            found.append(file.relative_to(folder).as_posix())
    return found


@exercise("9.3", "forget", right="no file holds a trace of the document, and the other nine are as they were")
def check_9_3(forget):
    facts = world.invent(10, seed=3)
    build = BuildConfig(chunk_size=16, vocabulary_size=258, held_out=0.0, neighbours=2, d_key=64)
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        corpus = world.write_facts(home / "told.jsonl", facts, ("told",))
        with contextlib.redirect_stderr(io.StringIO()):  # It says that nothing is held out.
            build_database(corpus, home / "memory", build, "hashing")
        gone, kept = facts[4], [fact for fact in facts if fact is not facts[4]]
        with contextlib.redirect_stderr(io.StringIO()):
            names = forget(home / "memory", f"{gone.name} told")
        database = Database.open(home / "memory")
        ids, _ = database.search_keys(database.embed_chunks(database.split("train").tokens[:]), 20)
        found = [database.text(value) for value in database.value(np.unique(ids[ids >= 0]))]
        yield holds(not any(gone.name in text for text in found), "a search still finds the document")
        left = traces(home / "memory", database, gone)
        yield holds(not left, f"the document still stands in {', '.join(left)}")
        lost = [fact.name for fact in kept if not traces(home / "memory", database, fact)]
        yield holds(not lost, f"other documents have gone, too: {', '.join(lost)}")
        yield compare(names, {f"{fact.name} told" for fact in kept}, "the list of names")
