"""Near-duplicates. Ground truth: Jaccard similarity of Python sets of tuples of words, all pairs by brute force, and
the formulas for the error of an estimate and for the probability of agreeing in a band."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_np import kernels
from retro_np.errors import UserError
from retro_np.kernels import threads
from retro_np.retrieval import deduplicate
from retro_np.retrieval.deduplicate import (
    DedupConfig,
    band_index,
    candidates,
    detection_probability,
    find_duplicates,
    grams,
    jaccard,
    signatures,
)

CONFIG = DedupConfig()
WORD = re.compile(rb"[A-Za-z0-9_\x80-\xff]+|[^\x00-\x20\x7f]")


def set_of_grams(text, words=13):
    tokens = [word.lower() for word in WORD.findall(text.encode("utf-8", "surrogatepass"))]
    length = min(words, len(tokens))
    return {tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)} if tokens else set()


def slow_jaccard(text_a, text_b, words=13):
    a, b = set_of_grams(text_a, words), set_of_grams(text_b, words)
    return len(a & b) / len(a | b) if a | b else 0.0


def invented(rng, length):
    return [f"w{number}" for number in rng.integers(0, 5000, length)]


def edited(rng, words, edits):
    """The words, with `edits` of them replaced."""
    words = list(words)
    for position in rng.choice(len(words), edits, replace=False):
        words[position] = f"new{rng.integers(0, 10**9)}"
    return words


def planted(seed, held_count, copies):
    """Training and held-out texts. Half of the former are held-out texts with up to 3 % of their words replaced."""
    rng = np.random.default_rng(seed)
    originals = [invented(rng, int(length)) for length in rng.integers(100, 900, held_count)]
    near = [edited(rng, words, int(rng.uniform(0, 0.03) * len(words))) for words in originals for _ in range(copies)]
    fresh = [invented(rng, 300) for _ in near]
    return [" ".join(words) for words in near + fresh], [" ".join(words) for words in originals]


def search(texts, originals, config=CONFIG):
    return find_duplicates(texts, band_index(signatures(originals, config), config), originals.__getitem__)


def pairs(signed, held_signatures, config=CONFIG):
    """Rows, held-out rows and estimates of candidates; of equal held-out signatures the first row."""
    index = band_index(held_signatures, config)
    return [
        (row, index.members[held][0], estimate)
        for row, near, estimates in candidates(signed, index)
        for held, estimate in zip(near.tolist(), estimates.tolist(), strict=True)
    ]


@settings(deadline=None)
@given(
    pieces=st.lists(st.sampled_from(["if", "IF", "x", "é", "(", " ", "\n", "\0", "\ud800", "= "]), max_size=16),
    suffix=st.lists(st.sampled_from(["if ", "x", "(", " "]), max_size=10),
    words=st.integers(1, 14),
)
def test_jaccard_is_that_of_sets_of_tuples(pieces, suffix, words):
    text, other = "".join(pieces), "".join(pieces[5:] + suffix)
    assert jaccard(text, other, words) == pytest.approx(slow_jaccard(text, other, words), abs=1e-15)
    assert [len(text_grams) for text_grams in grams([text, other], words)] == [
        len(set_of_grams(text, words)),
        len(set_of_grams(other, words)),
    ]


def test_an_estimate_has_no_bias_and_the_variance_of_independent_draws():
    rng = np.random.default_rng(3)
    originals = [invented(rng, 400) for _ in range(1500)]
    pairs = [(" ".join(words), " ".join(edited(rng, words, int(rng.integers(1, 12))))) for words in originals]
    left, right = (signatures(side, CONFIG) for side in zip(*pairs, strict=True))
    exact = np.array([slow_jaccard(*pair) for pair in pairs])
    scores = ((left == right).mean(axis=1) - exact) / np.sqrt(exact * (1 - exact) / CONFIG.hashes)
    assert abs(scores.mean()) < 4 / np.sqrt(len(scores))  # four standard errors of the mean; below, of the variance
    assert abs(scores.var() - 1) < 4 * np.sqrt(2 / len(scores))


@pytest.mark.slow
@pytest.mark.parametrize(("bands", "hashes"), [(32, 128), (16, 128), (25, 125)])
def test_pairs_agree_in_a_band_as_often_as_the_formula_says(bands, hashes, monkeypatch):
    monkeypatch.setattr(deduplicate, "STANDARD_ERRORS", 1000)  # accept every estimate
    config = DedupConfig(hashes=hashes, bands=bands)
    rng = np.random.default_rng(bands)
    originals = [invented(rng, 400) for _ in range(1000)]
    near = [edited(rng, words, int(rng.integers(4, 25))) for words in originals]
    left, right = (signatures([" ".join(words) for words in side], config) for side in (originals, near))
    agree = sum(len(pairs(left[i : i + 1], right[i : i + 1], config)) for i in range(len(left)))
    exact = [slow_jaccard(" ".join(a), " ".join(b)) for a, b in zip(originals, near, strict=True)]
    chances = [detection_probability(similarity, config) for similarity in exact]
    spread = np.sqrt(sum(chance * (1 - chance) for chance in chances))
    assert 50 < sum(chances) < 950  # otherwise the formula would hardly be tested
    assert abs(agree - sum(chances)) < 4 * spread


def test_planted_duplicates_are_found_with_full_precision_and_at_least_99_percent_recall():
    texts, originals = planted(1, 60, 8)
    sets, held_sets = [set_of_grams(text) for text in texts], [set_of_grams(text) for text in originals]
    exact = np.array([[len(a & b) / len(a | b) for b in held_sets] for a in sets])
    true = exact.max(axis=1) >= 0.8
    duplicates = search(texts, originals)
    rows = [record.row for record in duplicates]
    assert 100 < true.sum() < len(texts) - 100
    assert true[rows].all()
    assert len(set(rows)) == len(rows) >= 0.99 * true.sum()
    for record in duplicates:
        assert record.exact == pytest.approx(exact[record.row, record.held], abs=1e-15)
        assert abs(record.estimated - record.exact) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(("threshold", "bands"), [(0.3, 128), (0.6, 64), (0.95, 16), (1.0, 1)])
def test_other_thresholds_find_exactly_the_texts_that_reach_them(threshold, bands):
    texts, originals = planted(2, 15, 6)
    rows = {record.row for record in search(texts, originals, DedupConfig(threshold=threshold, bands=bands))}
    assert rows == {i for i, text in enumerate(texts) if max(slow_jaccard(text, b) for b in originals) >= threshold}


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(0, 6), st.integers(1, 9), st.integers(4, 6), st.integers(1, 2)),
    threshold=st.floats(0.8, 1),
    seed=st.integers(0, 2**32),
)
def test_candidates_are_the_pairs_that_agree_in_a_band_and_may_reach_the_threshold_best_first(shape, threshold, seed):
    count, held_count, bands, width = shape
    rng = np.random.default_rng(seed)  # few different entries, so that bands agree
    signed, held = (rng.integers(0, 3, (rows, bands * width)).astype(np.uint32) for rows in (count, held_count))
    config = DedupConfig(threshold=threshold, hashes=bands * width, bands=bands)
    least = threshold - 4 * np.sqrt(threshold * (1 - threshold) / config.hashes)
    expected = []
    for i, signature in enumerate(signed):
        first_rows = {tuple(row): j for j, row in reversed(list(enumerate(held.tolist())))}.values()
        agree = {j: signature == held[j] for j in first_rows}
        share = {j: np.mean(equal) for j, equal in agree.items() if equal.reshape(-1, width).all(axis=1).any()}
        expected += [(i, j, share[j]) for j in sorted(share, key=lambda j: (-share[j], j)) if share[j] >= least - 1e-9]
    assert pairs(signed, held, config) == expected


def test_a_match_is_not_hidden_by_worse_candidates_with_better_estimates():
    rng = np.random.default_rng(4)
    words = invented(rng, 600)
    text = " ".join(words)
    exact_of = lambda other: slow_jaccard(text, other)  # noqa: E731
    others = [" ".join(edited(rng, words, int(edits))) for edits in rng.integers(4, 8, 300)]
    worse = [other for other in others if 0.74 < exact_of(other) < 0.8]
    signed = signatures([text], CONFIG)[0]
    estimate = lambda other: (signatures([other], CONFIG)[0] == signed).mean()  # noqa: E731
    match = min((other for other in others if 0.8 <= exact_of(other) < 0.86), key=estimate)
    better = [other for other in worse if estimate(other) > estimate(match)]
    assert len(better) > 8  # otherwise nothing would be tested
    (record,) = search([text], [*better, match])
    assert record.held == len(better)
    assert record.exact == pytest.approx(exact_of(match), abs=1e-15)


def test_a_match_is_not_hidden_by_another_document_with_the_same_signature():
    rng = np.random.default_rng(5)
    words = invented(rng, 1500)
    text, longer = " ".join(words), " ".join(words + invented(rng, 150))
    hiding = next(
        other
        for other in (f"{longer} last{number}" for number in range(100))
        if (signatures([other], CONFIG) == signatures([longer], CONFIG)).all()
    )
    exact, lower = slow_jaccard(text, longer), slow_jaccard(text, hiding)
    config = DedupConfig(threshold=(exact + lower) / 2)
    assert lower < config.threshold < exact
    (record,) = search([text], [hiding, hiding, longer], config)
    assert (record.held, record.exact) == (2, pytest.approx(exact, abs=1e-15))


@pytest.mark.parametrize("edits", [2, 5])  # similarity 0.87 is a match; 0.73 is not, but its estimate may be
def test_thousands_of_equal_documents_give_one_pair_each_and_are_compared_once(edits):
    rng = np.random.default_rng(6)
    words = invented(rng, 400)
    held_text, text = " ".join(words), " ".join(edited(rng, words, edits))
    signed = np.repeat(signatures([text], CONFIG), 10_000, axis=0)
    index = band_index(np.repeat(signatures([held_text], CONFIG), 1000, axis=0), CONFIG)
    assert [(row, near.tolist()) for row, near, _ in candidates(signed, index)] == [(row, [0]) for row in range(10_000)]
    assert index.members == [list(range(1000))]
    rows_read = []
    duplicates = find_duplicates([text] * 100, index, lambda row: rows_read.append(row) or held_text)
    is_match = slow_jaccard(text, held_text) >= 0.8
    assert [record[:2] for record in duplicates] == ([(row, 0) for row in range(100)] if is_match else [])
    assert len(rows_read) == (1 if is_match else 1001)  # without a match, the others are read once, and the first again


def test_texts_without_words_resemble_nothing_not_even_each_other():
    texts = ["", " \n\0\x7f", "a"]
    signed = signatures(texts, CONFIG)
    assert (signed[:2] == 2**32 - 1).all()
    assert pairs(signed, signed) == [(2, 2, 1.0)]
    assert [record[:2] for record in search(texts, [" ", "", "a"])] == [(2, 2)]
    assert search(texts, ["", "\n"]) == []
    assert search([], ["a"]) == []
    assert search(["a"], []) == []
    assert jaccard("", "") == 0.0


def test_short_texts_are_compared_by_all_their_words():
    assert jaccard("to be or not", "To be,or not") == 0.0  # five words, including the comma
    assert jaccard("to be or not", "TO\tbe\n or not ") == 1.0
    assert jaccard("\ud800 x\0y", "\ud800  X y") == 1.0


@pytest.mark.parametrize("text", ["x = 1\n" * 10**6, "f(a," * 10**6, "z" * 10**7, "é" * 10**6 + " b" * 20])
def test_long_texts_of_odd_shapes_are_compared(text):
    assert [record[:2] for record in search(["other", text], [text + " ", "none of it"])] == [(1, 0)]


def test_the_result_does_not_depend_on_threads_batches_or_kernels(monkeypatch):
    texts, originals = planted(7, 20, 3)
    expected, signed = search(texts, originals), signatures(texts, CONFIG)
    monkeypatch.setattr(deduplicate, "BATCH_BYTES", 5000)
    monkeypatch.setattr(deduplicate, "CACHED_DOCUMENTS", 1)
    for kind in ("numpy", "numba"):
        kernels.use(kind)
        for count in (1, 3):
            threads.use_threads(count)
            np.testing.assert_array_equal(signatures(texts, CONFIG), signed)
            assert search(texts, originals) == expected
    assert search(texts[5:9], originals) == [r._replace(row=r.row - 5) for r in expected if 5 <= r.row < 9]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"threshold": 0}, r"must be a number in \(0, 1\]"),
        ({"threshold": 1.01}, r"must be a number in \(0, 1\]"),
        ({"threshold": float("nan")}, r"must be a number in \(0, 1\]"),
        ({"threshold": "0.8"}, "must be a number"),
        ({"words": 0}, "words"),
        ({"words": 2.5}, "words must be a whole number"),
        ({"words": 10**9}, "words"),
        ({"hashes": 0}, "hashes"),
        ({"bands": 0}, "bands"),
        ({"bands": 33}, "33 bands"),
    ],
)
def test_the_error_for_an_invalid_setting_names_it(wrong, message):
    with pytest.raises(UserError, match=message):
        DedupConfig(**wrong)


def test_signatures_made_with_different_settings_are_refused():
    signed = signatures(["a"], CONFIG)
    with pytest.raises(UserError, match="must be uint32"):
        band_index(signed[:, :64], CONFIG)
    with pytest.raises(UserError, match="must be uint32"):
        list(candidates(signed.astype(np.int64), band_index(signed, CONFIG)))
