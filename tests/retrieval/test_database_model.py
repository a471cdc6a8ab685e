"""Ground truth: a database as plain lists. The tokenizers library encodes the documents, the embedder makes the key of
each chunk separately, and all (distance, id) pairs are sorted. Keys have 16 columns. Their distances are summed in the
same order here as in the kernels, so the comparison is bit for bit.
"""

import os
import shutil

import numpy as np
import pytest
from database_assertions import assert_equal
from database_model import Model, add, build, compacted, plans, remove
from hypothesis import HealthCheck, Phase, given, settings


@pytest.fixture(autouse=True)
def _no_flushing(monkeypatch):
    """Flushing is slow, and only matters if the machine crashes."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def play(folder, plan):
    """Build and edit a database, and compare it with the model after each step."""
    config, embedder, first, edits = plan
    model, path, rng = Model(config, config.duplicates is not None), folder / "db", np.random.default_rng(0)
    if build(model, path, first, embedder) is None:
        return
    last = None
    for kind, argument in [("built", None), *edits]:
        if kind == "again":
            kind, argument = last or ("built", None)
        if kind == "add":
            add(model, path, argument)
        elif kind == "remove":
            remove(model, path, argument)
        elif kind == "compact":
            compacted(model, path)
        last = kind, argument
        assert_equal(path, model, rng)


# A failing plan is reported as drawn, because shrinking it would take minutes.
SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": [Phase.generate]}


@pytest.mark.slow
@given(plans())
@settings(max_examples=20, **SETTINGS)
def test_an_edited_database_equals_its_model_of_lists_after_every_edit(tmp_path_factory, plan):
    folder = tmp_path_factory.mktemp("model")
    play(folder, plan)
    shutil.rmtree(folder)


@pytest.mark.slow
@given(plans())
@settings(max_examples=60, **SETTINGS)
def test_a_database_that_is_edited_often_equals_its_model_of_lists_after_every_edit(tmp_path_factory, plan):
    folder = tmp_path_factory.mktemp("model")
    play(folder, plan)
    shutil.rmtree(folder)
