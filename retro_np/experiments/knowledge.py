"""Facts that only the database contains

When the database changes, the answers change, without any training.
A small model is trained on documents about some names, each with a second document to retrieve. Then it is asked for
the codes of names that it never saw, with databases of documents about these names. See `facts.py`.

A model may be kept up to date by changing its database, without training (§3.2). The paper does not measure this. Our
result agrees if the model gives the codes in the database, even after a change, and otherwise guesses."""

from dataclasses import replace
from functools import partial

import numpy as np

from retro_np.evaluation.compare import OFF, ON, SHUFFLED
from retro_np.evaluation.likelihood import nats_of
from retro_np.experiments import recipe
from retro_np.experiments.experiment import Figures, Picture, Verdict, sentence
from retro_np.experiments.facts import CHANCE, CHUNK, Fact, invent, invent_code, questions, write_facts
from retro_np.experiments.lab import Lab, Model, mean_and_spread, spreads
from retro_np.nn.model import retro
from retro_np.report.plots import plot_bars
from retro_np.retrieval.database import Database
from retro_np.retrieval.tokenizer import MIN_VOCABULARY_SIZE

FACTS_K = 1  # If the nearest chunk does not contain the name, no chunk does.
SWAPPED = "other codes in the database"
REMAINING, REMOVED = "half removed: remaining names", "half removed: removed names"
ANSWER_LINES = (ON, OFF, SHUFFLED, SWAPPED, REMAINING, REMOVED)

Told = tuple[list[Fact], Database]  # facts, and the database that tells them


def measure(lab: Lab) -> Figures:
    """For each condition and training seed: the share of codes answered entirely right, and the bits per code."""
    database, original, changed = setting(lab)
    by_seed = [conditions(train_model(lab, database, seed), original, changed) for seed in range(lab.seeds)]
    return {
        "lines": {name: spreads([lines[name] for lines in by_seed]) for name in ANSWER_LINES},
        "old_codes_after_swap": mean_and_spread(lines["old codes"]["right"] for lines in by_seed),
        "chance": CHANCE, "chance_bits": -np.log2(CHANCE), "found": found_share(*original), "asked": len(original[0]),
    }  # fmt: skip


def setting(lab: Lab) -> tuple[Database, Told, Told]:
    """The training database, new facts in their database, and the same facts with new codes in theirs."""
    n_training, n_asked = (64, 8) if lab.scale.name == "tiny" else (3000, 256)  # numbers of names
    facts = invent(n_training + n_asked, seed=0)
    database = _database(lab, "to-train-on", facts[:n_training], ("told", "asked"))
    told = facts[n_training:]
    swapped = other_codes(told, seed=1)
    original = told, _database(lab, "told", told, ("told",))
    return database, original, (swapped, _database(lab, "swapped", swapped, ("told",)))


def _database(lab, name, facts, roles) -> Database:
    corpus = write_facts(lab.folder / "corpora" / f"facts-{name}.jsonl", facts, roles)
    return lab.database(
        corpus, f"facts-{name}", chunk_size=CHUNK, vocabulary_size=MIN_VOCABULARY_SIZE, held_out=0.0, limit_bytes=None,
        d_key=512,  # With 256 columns, search finds the right chunk for only 95 % of the names, not for 99 %.
    )  # fmt: skip


def train_model(lab: Lab, database: Database, seed: int) -> Model:
    """Train a small version of the recipe's RETRO. Its documents are not about the names that are asked for later."""
    config = recipe.retro_config(database.vocabulary_size, CHUNK, d_model=64, n_layers=2)
    training = lab.training(
        config, seed, steps=min(600, lab.scale.steps), batch_size=4, sequence_length=8 * CHUNK, neighbours=FACTS_K,
        learning_rate=4e-3, retrieval_off=0.2,  # low, because codes cannot be learned without retrieval
    )  # fmt: skip
    return lab.trained(database, config, training)


def other_codes(facts: list[Fact], seed: int) -> list[Fact]:
    """The same names and wordings with new random codes, each different from the old one."""
    codes = iter(partial(invent_code, np.random.default_rng(seed)), None)
    return [replace(fact, code=next(code for code in codes if code != fact.code)) for fact in facts]


def conditions(model: Model, original: Told, changed: Told) -> dict[str, dict[str, float]]:
    """The `answers` of a model under each condition; "old codes" after the swap. original, changed: from `setting`."""
    facts, database = original
    removed = facts[::2]
    names = {f"{fact.name} told" for fact in removed}
    remaining = database.without({record["sha256"] for record in database.documents if record["name"] in names})
    return {
        ON: answers(model, facts, database), OFF: answers(model, facts, database, k=0),
        SHUFFLED: answers(model, facts, database, shift=1),
        SWAPPED: answers(model, *changed), "old codes": answers(model, facts, changed[1]),
        REMAINING: answers(model, facts[1::2], remaining), REMOVED: answers(model, removed, remaining),
    }  # fmt: skip


def answers(model: Model, facts: list[Fact], database: Database, k: int = FACTS_K, shift: int = 0) -> dict[str, float]:
    """The share of codes that greedy decoding gives entirely right ("right"), and the mean bits per code ("bits").

    k = 0 turns retrieval off. shift: each question reads what the question `shift` rows before it retrieved. One pass
    suffices: greedy decoding gives a code if and only if each of its tokens is the likeliest after those before it."""
    tokens, positions = questions(database.tokenizer, facts)
    neighbours = None
    if k:
        neighbours = np.zeros((len(facts), 2, k, 2 * CHUNK), np.int64)  # nothing is asked after the second chunk
        neighbours[:, 0] = np.roll(database.value(_nearest(database, tokens, k)), shift, axis=0)
    rows = np.arange(len(facts))[:, None]
    logits = retro(model.params, model.config, tokens, neighbours)[0][rows, positions - 1]
    codes = tokens[rows, positions]
    right = (logits.argmax(axis=-1) == codes).all(axis=1)
    return {"right": right.mean(), "bits": nats_of(logits, codes).sum(axis=1).mean() / np.log(2)}


def found_share(facts: list[Fact], database: Database) -> float:
    """The share of questions whose nearest chunk is from the document with the answer, a bound on "right"."""
    nearest = _nearest(database, questions(database.tokenizer, facts)[0], 1)[:, 0]
    names = [database.documents[int(number)]["name"] for number in database.document_of(nearest)]
    return float(np.mean([name == f"{fact.name} told" for name, fact in zip(names, facts, strict=True)]))


def _nearest(database, tokens, k):
    return database.search_keys(database.embed_chunks(tokens[:, :CHUNK]), k)[0]


def draw(figures: Figures, path: Picture) -> None:
    """Bars of the share of right codes, with a dot for every seed."""
    right = {name: line["right"] for name, line in figures["lines"].items()}
    notes = {name: f"   {line['bits']['mean']:.1f} bits per code" for name, line in figures["lines"].items()}
    label = "share of codes answered entirely right (%); dots: seeds"
    plot_bars(right, path, label, scale=100, notes=notes, limits=(0, 140))  # The notes need the space beyond 100 %.


def verdict(figures: Figures) -> Verdict:
    """Whether the model is right if the database contains the fact, also after a swap, and guesses otherwise."""
    right = {name: line["right"] for name, line in figures["lines"].items()}
    knows = all(right[name]["from"] >= 0.9 for name in (ON, SWAPPED, REMAINING))
    guesses = all(right[name]["to"] <= 0.01 for name in (OFF, SHUFFLED, REMOVED))
    names = {"swapped": SWAPPED, "remaining": REMAINING, "removed": REMOVED}
    return knows and guesses, sentence(__name__, figures, right=right, **names)
