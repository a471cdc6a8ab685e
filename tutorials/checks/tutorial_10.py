"""Checks of tutorial 10's exercises. Ground truth: the library's kNN-LM, and its table of parameters."""

import numpy as np

from retro_np import RetroConfig
from retro_np.evaluation import knn_lm
from retro_np.parameters import is_retrieval, parameter_shapes
from retro_np.tree import named_leaves
from retro_np.tutorials.checks.judge import CLOSE_32, compare, exercise, holds


@exercise("10.1", "knn_distribution", right="rows sum to one, and agree with the library's kNN-LM at every token")
def check_10_1(knn_distribution):
    rng, vocabulary = np.random.default_rng(0), 12
    hidden, keys = rng.standard_normal((20, 4)), rng.standard_normal((300, 4))
    values = rng.integers(0, vocabulary, len(keys))
    ids, distances = knn_lm.nearest_keys(hidden, keys)
    for beta in (0.1, 1.0, 500.0, 1e5):
        hits = [values[ids] == token for token in range(vocabulary)]
        expected = np.stack([knn_lm.knn_probability(distances, hit, beta) for hit in hits], axis=1)
        got = knn_distribution(hidden, keys, values, beta, vocabulary)
        yield compare(got, expected, "the distribution", where=f"beta = {beta:g}")


@exercise("10.2", "hindsight", right="no fixed share is better at any token, and each loss is one of the two")
def check_10_2(hindsight):
    rng = np.random.default_rng(0)
    nats, p = rng.exponential(2, 200), rng.random(200) * (rng.random(200) > 0.2)
    with np.errstate(divide="ignore"):
        expected = np.minimum(nats, -np.log(p))
    with np.errstate(divide="ignore"):
        best = hindsight(nats, p)
    yield compare(best, expected, "the array of nats")
    rounding = CLOSE_32 if np.asarray(best).dtype.itemsize < 8 else 1e-9
    for share in np.linspace(0, 0.98, 8):
        no_worse = np.all(np.asarray(best) <= knn_lm.mixed(nats, p, share) + rounding)
        yield holds(no_worse, f"a mixture with the share {share:.2f} is better at some token")


@exercise("10.3", "share_trained", right="23.4 % of retro-172m and 7.3 % of retro-7.5b: the larger, the smaller")
def check_10_3(share_trained):
    for baseline, name in (("baseline-132m", "retro-172m"), ("baseline-7b", "retro-7.5b")):
        retro = RetroConfig.preset(name)
        shapes = [(path, shape) for path, shape in named_leaves(parameter_shapes(retro)) if counted(path)]
        sizes = {added: sum(np.prod(s) for path, s in shapes if is_retrieval(path) == added) for added in (True, False)}
        expected = sizes[True] / (sizes[True] + sizes[False])
        yield compare(share_trained(RetroConfig.preset(baseline), retro), expected, "the share", where=name)


def counted(path):
    """Whether a parameter is none of the embeddings, among which the readout counts."""
    return not path.endswith("embedding") and path != "readout"
