"""Ground truth: kNN-LM, the continuous cache and prepended neighbours as plain loops over tokens."""

import math

import numpy as np
import pytest
from support import small_config

from retro_np import init_params, retro
from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import ScoredTokens, score
from retro_np.evaluation.knn_lm import (
    MIXTURE_WEIGHTS,
    cache_probability,
    continuous_cache,
    datastore,
    frozen_model,
    knn_lm,
    knn_probability,
    mixed,
    nearest_keys,
    tuned,
)
from retro_np.evaluation.prepending import prepended, prepended_nats
from retro_np.nn.checks import CONFIG, perturbed_params
from retro_np.nn.model import hidden_states, readout
from retro_np.nn.operators import log_softmax
from retro_np.sequences import sequence_neighbours
from retro_np.tree import map_tree

WINDOW = {"sequence_length": 32}


@pytest.fixture(scope="module")
def model(database):
    """A baseline in float64, so that loops and batches differ only by rounding."""
    config = small_config(database, cca_layers=(), encoder=None)
    params = init_params(config, np.random.default_rng(0))
    return map_tree(lambda _, array: array.astype(float) * 2, params), config


@pytest.fixture(scope="module")
def frozen(model, database):
    return frozen_model(*model, database, **WINDOW)


def token_windows(database, n=32):
    """For each scored token: its position, document, rows up to it, the window's tokens before it, and the token."""
    split, m = database.split("valid"), database.chunk_size
    for document in np.unique(split.documents[:]):
        rows = np.flatnonzero(split.documents[:] == document)
        tokens = split.tokens[rows].reshape(-1).astype(int)
        for t in range(1, len(tokens)):
            if tokens[t] not in (0, 1):
                start = max(0, -(-(t - n) // (n // 2))) * (n // 2)
                yield rows[0] * m + t, document, rows[: t // m + 1], tokens[start:t], tokens[t]


def test_logits_are_hidden_states_times_the_readout():
    rng, params = np.random.default_rng(0), perturbed_params(CONFIG)
    tokens = rng.integers(1, CONFIG.vocabulary_size, (2, 3 * CONFIG.chunk_size + 1))
    neighbours = rng.integers(0, CONFIG.vocabulary_size, (2, 3, 2, 2 * CONFIG.chunk_size))
    for retrieved in (neighbours, None):
        logits = hidden_states(params, CONFIG, tokens, retrieved) @ readout(params, CONFIG)
        np.testing.assert_allclose(logits, retro(params, CONFIG, tokens, retrieved)[0], rtol=1e-12, atol=1e-12)


def test_the_frozen_model_is_a_forward_pass_over_each_tokens_window(model, frozen, database):
    scored, hidden, documents = frozen
    params, config = model
    windows = list(token_windows(database))
    assert scored.positions.tolist() == [position for position, *_ in windows]
    assert documents.tolist() == [document for _, document, *_ in windows]
    assert scored.tokens.tolist() == [token for *_, token in windows]
    for i in range(0, len(windows), 7):
        *_, context, token = windows[i]
        np.testing.assert_allclose(hidden[i], hidden_states(params, config, context[None], None)[0, -1], atol=1e-10)
        logits, _ = retro(params, config, context[None], None)
        assert scored.nats[i] == pytest.approx(-log_softmax(logits[0, -1])[token], rel=1e-10)


@pytest.mark.parametrize("limit", [None, 11, 12])  # a full window ends at 12, so its last target is beyond the limit
def test_losses_of_the_frozen_model_equal_those_of_score_bit_for_bit(model, database, limit):
    losses = frozen_model(*model, database, limit=limit, **WINDOW)[0].losses(database, limit=limit)
    expected = score(*model, database, k=0, stride=16, limit=limit, **WINDOW)
    assert np.array_equal(losses.nats, expected.nats)
    assert np.array_equal(losses.bytes, expected.bytes)
    assert np.array_equal(losses.documents, expected.documents)


def test_mixed_is_the_mixture_and_with_a_weight_of_zero_exactly_the_baseline():
    nats, p_knn = np.array([0.3, 2.0, 30.0, 0.0]), np.array([0.0, 0.5, 0.0, 1.0])
    assert np.array_equal(mixed(nats, p_knn, 0.0), nats)
    for weight in (0.1, 0.98):
        expected = [-math.log((1 - weight) * math.exp(-a) + weight * p) for a, p in zip(nats, p_knn, strict=True)]
        np.testing.assert_allclose(mixed(nats, p_knn, weight), expected, rtol=1e-12, atol=1e-15)


def test_weights_are_tuned_on_the_other_half_of_the_documents():
    documents = np.array([3, 3, 5, 5, 8])  # halves {3, 8} and {5}
    scored = ScoredTokens(np.arange(5), np.full(5, 2), np.full(5, 2.0))
    p_knn = np.array([0.9, 0.9, 0.0, 0.0, 0.9])
    result, chosen = tuned(scored, documents, lambda _: p_knn, [1.0])
    assert chosen[0][1] == 0.0  # mixing does not help the half {5}, so nothing is mixed into {3, 8}
    assert chosen[1][1] == 0.98
    assert np.array_equal(result.nats[[0, 1, 4]], scored.nats[[0, 1, 4]])
    assert (result.nats[[2, 3]] > 5).all()
    untuned, _ = tuned(scored, np.zeros(5, int), lambda _: p_knn, [1.0])  # one document: nothing to tune on
    assert np.array_equal(untuned.nats, scored.nats)


def test_the_datastore_holds_hidden_states_of_training_text_and_the_tokens_that_follow(model, database):
    params, config = model
    keys, values = datastore(params, config, database, None, **WINDOW)
    split = database.split("train")
    expected = int((split.tokens[:] > 1).sum()) - len(np.unique(split.documents[:]))  # all but the first tokens
    assert keys.shape == (expected, config.d_model)
    first = split.tokens[np.flatnonzero(split.documents[:] == split.documents[0])].reshape(-1).astype(int)[:32]
    np.testing.assert_allclose(keys[:31], hidden_states(params, config, first[None], None)[0, :31], atol=1e-10)
    assert np.array_equal(values[:31], first[1:])


def test_a_sampled_datastore_is_a_part_of_the_complete_one_and_no_larger_than_requested(model, database):
    all_keys = {tuple(row) for row in np.round(datastore(*model, database, None, **WINDOW)[0], 8)}
    for size in (1, 100, 301):
        keys, values = datastore(*model, database, size, **WINDOW)
        assert size - 2 * database.chunk_size < len(keys) == len(values) <= size  # documents end in padding
        # Not every key is found, because the 8th digit may round differently.
        assert len({tuple(row) for row in np.round(keys, 8)} & all_keys) >= 0.9 * len(keys)
    repeated_keys, _ = datastore(*model, database, 301, **WINDOW)
    assert np.array_equal(keys, repeated_keys)


def plain_knn(h, keys, values, alpha, vocabulary_size, k=10):
    """p_kNN over the vocabulary, by loops: Khandelwal et al., eq. 2."""
    distances = [sum((a - b) ** 2 for a, b in zip(h, key, strict=True)) for key in keys]
    nearest = sorted(range(len(keys)), key=lambda i: (distances[i], i))[:k]
    p = [0.0] * vocabulary_size
    for i in nearest:
        p[values[i]] += math.exp(-alpha * distances[i])
    return np.array(p) / sum(p)


@pytest.mark.parametrize("stored", [6, 40])
@pytest.mark.parametrize("alpha", [0.01, 1.0])
def test_knn_probability_equals_plain_loops_and_sums_to_one(stored, alpha):
    rng, vocabulary_size = np.random.default_rng(stored), 7
    keys, values = rng.standard_normal((stored, 5)), rng.integers(0, vocabulary_size, stored)
    hidden = rng.standard_normal((4, 5))
    ids, distances = nearest_keys(hidden, keys)
    p = np.array([knn_probability(distances, values[ids] == w, alpha) for w in range(vocabulary_size)]).T
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-12)
    for row, h in zip(p, hidden, strict=True):
        np.testing.assert_allclose(row, plain_knn(h, keys, values, alpha, vocabulary_size), rtol=1e-9, atol=1e-15)


def test_knn_lm_is_the_tuned_mixture(model, frozen, database):
    scored, hidden, documents = frozen
    keys, values = datastore(*model, database, 500, **WINDOW)
    result, chosen = knn_lm(scored, hidden, documents, keys, values)
    assert result.nats.sum() < scored.nats.sum()  # an untrained model gains from frequent tokens
    half = np.unique(documents, return_inverse=True)[1] % 2
    for i in range(0, len(documents), 97):
        alpha, weight = chosen[half[i]]
        p = plain_knn(hidden[i], keys, values, alpha, database.vocabulary_size)[scored.tokens[i]]
        assert result.nats[i] == pytest.approx(
            -math.log((1 - weight) * math.exp(-scored.nats[i]) + weight * p), rel=1e-8
        )
    with pytest.raises(UserError, match="datastore is empty"):
        knn_lm(scored, hidden, documents, keys[:0], values[:0])


def plain_cache(hidden, tokens, documents, t, theta, window, vocabulary_size):
    """p_cache of position t over the vocabulary, by loops: Grave et al., eq. 3. All zero where the cache is empty."""
    p = np.zeros(vocabulary_size)
    for i in range(t):
        if documents[i] == documents[t] and t - i <= window:
            p[tokens[i]] += math.exp(theta * sum(a * b for a, b in zip(hidden[t], hidden[i], strict=True)))
    return p / max(p.sum(), 1e-300)


@pytest.mark.parametrize("window", [1, 5, 1000])
def test_the_cache_equals_plain_loops_and_sums_to_one(window):
    rng, vocabulary_size, n = np.random.default_rng(window), 5, 300  # more than a block of positions
    hidden, documents = rng.standard_normal((n, 3)), np.repeat([2, 3, 7], [1, 280, 19])
    tokens = rng.integers(0, vocabulary_size, n)
    p = np.array([plain_cache(hidden, tokens, documents, t, 0.7, window, vocabulary_size) for t in range(n)])
    cached = cache_probability(hidden, tokens, documents, 0.7, window)
    first = np.flatnonzero(np.diff(documents, prepend=-1))
    assert np.flatnonzero(np.isnan(cached)).tolist() == first.tolist()
    rest = np.setdiff1d(np.arange(n), first)
    np.testing.assert_allclose(cached[rest], p[rest, tokens[rest]], rtol=1e-9)
    t, sums = 290, 0.0  # over all tokens that could come next, the probabilities sum to one
    for w in range(vocabulary_size):
        tokens[t] = w
        sums += cache_probability(hidden, tokens, documents, 0.7, window)[t]
    assert sums == pytest.approx(1)


def test_the_weight_of_the_cache_is_tuned_on_the_other_half_of_the_documents():
    """Tokens repeat in the documents of one half but not of the other, so each half gets the wrong weight."""
    documents = np.repeat([0, 1], 30)
    tokens = np.where(documents == 0, 7, np.arange(60))
    hidden = np.zeros((60, 4), np.float32)
    scored = ScoredTokens(np.arange(60), tokens, np.full(60, 3.0))
    result, settings = continuous_cache(scored, hidden, documents)
    assert settings[0][1] == 0  # tuned where no token repeats
    assert settings[1][1] == max(MIXTURE_WEIGHTS)
    assert (result.nats[documents == 0] == 3).all()
    assert result.nats[documents == 1].mean() > 3


def test_an_empty_cache_leaves_the_prediction_of_the_model(frozen):
    scored, hidden, documents = frozen
    result, chosen = continuous_cache(scored, hidden, documents)
    first = np.flatnonzero(np.diff(documents, prepend=-1))
    np.testing.assert_allclose(result.nats[first], scored.nats[first], rtol=1e-12)
    assert max(weight for _, weight in chosen) > 0
    assert result.nats.sum() < scored.nats.sum()


def test_no_later_token_changes_an_earlier_probability_of_the_cache():
    rng, n = np.random.default_rng(0), 300
    hidden, tokens = rng.standard_normal((n, 3)), rng.integers(0, 5, n)
    original = cache_probability(hidden, tokens, np.zeros(n, int), 0.5, 100)
    for t in (1, 255, 256, 299):
        changed, states = tokens.copy(), hidden.copy()
        changed[t:] = (changed[t:] + 1) % 5
        states[t:] *= 2
        altered = cache_probability(states, changed, np.zeros(n, int), 0.5, 100)
        assert np.array_equal(altered[1:t], original[1:t])
        assert not np.array_equal(altered[t:], original[t:])


def test_prepending_is_a_forward_pass_with_the_neighbours_before_the_text(model, database):
    params, config = model
    scored, m, k, n = prepended(params, config, database, k=1, **WINDOW), database.chunk_size, 1, 32
    split = database.split("valid")
    windows = list(token_windows(database))
    assert scored.positions.tolist() == [position for position, *_ in windows]
    n_cut = 0
    for i in range(0, len(windows), 7):
        _, _, rows, context, token = windows[i]
        retrieved = np.empty(0, int)
        if len(rows) > 1:  # the neighbours of the previous chunk
            retrieved = sequence_neighbours(database, split, rows[-2:-1][None], k).reshape(-1)
        retrieved = retrieved[retrieved != 0]
        chunk_end = len(context) + m - scored.positions[i] % m  # the end of the token's chunk in the window
        room = n - len(retrieved)
        text_end = min(chunk_end - 1, n)  # the chunk's last token is predicted, not read
        dropped = max(0, text_end - room)
        n_cut += dropped > 0
        text = np.concatenate([retrieved, context[dropped:]])
        logits, _ = retro(params, config, text[None], None)
        assert scored.nats[i] == pytest.approx(-log_softmax(logits[0, -1])[token], rel=1e-9)
    assert n_cut  # some contexts were cut


def test_the_nearest_neighbour_comes_last(model):
    params, config = model
    m, rng = config.chunk_size, np.random.default_rng(0)
    tokens = rng.integers(2, 300, (1, 2 * m))
    targets = np.roll(tokens, -1)
    targets[0, : m - 1], targets[0, m:] = 0, 0  # score only the token after the first chunk
    neighbours = rng.integers(2, 300, (1, 2, 2, 2 * m))
    nats = prepended_nats(params, config, tokens, targets, neighbours, 8 * m)
    text = np.concatenate([neighbours[0, 0, 1], neighbours[0, 0, 0], tokens[0, :m]])
    expected = -log_softmax(retro(params, config, text[None], None)[0][0, -1])[tokens[0, m]]
    assert nats[0, m - 1] == pytest.approx(expected, rel=1e-10)


def test_prepending_nothing_equals_the_baseline(model, frozen, database):
    scored = prepended(*model, database, k=0, **WINDOW)
    assert np.array_equal(scored.positions, frozen[0].positions)
    np.testing.assert_allclose(scored.nats, frozen[0].nats, rtol=1e-9)


def test_no_later_token_or_neighbour_changes_an_earlier_prepended_score(model):
    params, config = model
    m, rng = config.chunk_size, np.random.default_rng(0)
    tokens, neighbours = rng.integers(2, 300, (1, 4 * m)), rng.integers(2, 300, (1, 4, 1, 2 * m))
    targets = np.roll(tokens, -1)
    targets[0, -1] = 0
    original = prepended_nats(params, config, tokens, targets, neighbours, 4 * m)
    for t in (1, m - 1, m, 2 * m + 3):  # the first token that changes
        changed, altered_lists, new_targets = tokens.copy(), neighbours.copy(), targets.copy()
        changed[0, t:] = 299 - changed[0, t:] + 2
        new_targets[0, t:-1] = changed[0, t + 1 :]
        altered_lists[0, t // m :] = 299 - altered_lists[0, t // m :] + 2  # lists of the chunks with a changed token
        altered = prepended_nats(params, config, changed, new_targets, altered_lists, 4 * m)
        # Not bit for bit, because different batches round differently.
        np.testing.assert_allclose(altered[0, : t - 1], original[0, : t - 1], rtol=1e-12)
        assert not np.isclose(altered[0, t : 4 * m - 1], original[0, t : 4 * m - 1]).all()


def test_neighbours_that_leave_no_context_are_refused(model, database):
    with pytest.raises(UserError, match="2 neighbours of 16 tokens, with 16 tokens of context, need 48 tokens"):
        prepended(*model, database, k=2, **WINDOW)
