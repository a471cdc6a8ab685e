"""Ground truth: a database as plain lists. Documents are cut by the tokenizers library's own encoding, keys come from
the embedder on each chunk, neighbours from a sort of all (distance, id) pairs. Keys have 16 columns, of which a
distance is a tree of sums that is written down here, so that everything is compared to the bit."""

import os
import shutil

import numpy as np
import pytest
from database_assertions import assert_equal
from database_model import Model, add, build, compacted, plans, remove
from hypothesis import HealthCheck, Phase, given, settings


@pytest.fixture(autouse=True)
def _no_flushing(monkeypatch):
    """Slow, and of use only where the machine itself stops."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def play(folder, plan):
    """Build, edit, and compare after each."""
    config, embedder, first, edits = plan
    model, path, rng = Model(config, config.duplicates is not None), folder / "db", np.random.default_rng(0)
    if build(model, path, first, embedder) is None:
        return
    last = None
    for kind, what in [("built", None), *edits]:
        if kind == "again":
            kind, what = last or ("built", None)
        if kind == "add":
            add(model, path, what)
        elif kind == "remove":
            remove(model, path, what)
        elif kind == "compact":
            compacted(model, path)
        last = kind, what
        assert_equal(path, model, rng)


# a failing plan is told as it was drawn: to make it smaller would take minutes
PLAYED = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": [Phase.generate]}


@given(plans())
@settings(max_examples=20, **PLAYED)
def test_a_database_that_is_edited_is_at_every_moment_what_lists_say(tmp_path_factory, plan):
    folder = tmp_path_factory.mktemp("model")
    play(folder, plan)
    shutil.rmtree(folder)


@pytest.mark.slow
@given(plans())
@settings(max_examples=60, **PLAYED)
def test_a_database_that_is_edited_often_is_at_every_moment_what_lists_say(tmp_path_factory, plan):
    folder = tmp_path_factory.mktemp("model")
    play(folder, plan)
    shutil.rmtree(folder)
