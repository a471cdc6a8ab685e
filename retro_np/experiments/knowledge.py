"""Facts that only the database holds: change it and the answers change, with no step of training.

A small model is trained on documents about some names, each of which has a second document to retrieve. Then it is
asked for the codes of names that it never saw, with databases of documents about them, see `facts.py`.
"""

from dataclasses import replace

import numpy as np

from retro_np.evaluation.bits_per_byte import nats_of
from retro_np.evaluation.compare import OFF, ON, SHUFFLED
from retro_np.experiments import recipe
from retro_np.experiments.experiment import Experiment
from retro_np.experiments.facts import CHANCE, CHUNK, Fact, invent, invent_code, questions, write_facts
from retro_np.experiments.lab import mean_and_spread, spreads
from retro_np.nn.model import retro
from retro_np.report.plots import plot_bars
from retro_np.retrieval.database import Database
from retro_np.retrieval.tokenizer import SMALLEST_VOCABULARY

TRAINED, ASKED = 3000, 256  # names
TINY_TRAINED, TINY_ASKED = 64, 8
STEPS = 600  # of 512 tokens
D_MODEL, LAYERS = 64, 2
D_KEY = 512  # of chunks that differ in a name alone, 256 columns of hashed pairs of bytes find 95 % and not 99 %
K = 1  # the nearest chunk names the same, or none does
SWAPPED, KEPT, REMOVED = "other codes in the database", "half removed: those kept", "half removed: those removed"
MOSTLY, SELDOM = 0.9, 0.01  # shares of right answers of a model that knows, and of one that guesses
LINES = (ON, OFF, SHUFFLED, SWAPPED, KEPT, REMOVED)


def measure(lab):
    """By line: the share of codes answered fully right, and the bits that a code costs; over seeds of training."""
    database, asked, changed = setting(lab)
    by_seed = [conditions(train_model(lab, database, seed), asked, changed) for seed in range(lab.seeds)]
    return {
        "lines": {name: spreads([one[name] for one in by_seed]) for name in LINES},
        "old_codes_after_swap": mean_and_spread(one["old codes"]["right"] for one in by_seed),
        "chance": CHANCE, "chance_bits": -np.log2(CHANCE), "found": found_share(*asked), "asked": len(asked[0]),
    }  # fmt: skip


def setting(lab):
    """The database to train on; facts of other names and a database that tells them; the same with other codes."""
    trained, asked = (TINY_TRAINED, TINY_ASKED) if lab.scale.name == "tiny" else (TRAINED, ASKED)
    facts = invent(trained + asked, seed=0)
    database = _database(lab, "to-train-on", facts[:trained], ("told", "asked"))
    facts = facts[trained:]
    swapped = other_codes(facts, seed=1)
    return (
        database,
        (facts, _database(lab, "told", facts, ("told",))),
        (swapped, _database(lab, "swapped", swapped, ("told",))),
    )


def _database(lab, name, facts, ways) -> Database:
    corpus = write_facts(lab.folder / "corpora" / f"facts-{name}.jsonl", facts, ways)
    return lab.database(
        corpus, f"facts-{name}", chunk_size=CHUNK, vocabulary_size=SMALLEST_VOCABULARY, held_out=0.0, d_key=D_KEY,
        limit_bytes=None,
    )  # fmt: skip


def train_model(lab, database: Database, seed: int):
    """The recipe's RETRO, small, trained on the documents of other names than those asked for."""
    config = recipe.retro_config(database.vocabulary_size, CHUNK, d_model=D_MODEL, n_layers=LAYERS)
    training = lab.training(
        config, seed, steps=min(STEPS, lab.scale.steps), batch_size=4, sequence_length=8 * CHUNK, neighbours=K,
        learning_rate=4e-3, retrieval_off=0.2,  # little is to be learned without: codes are in the database alone
    )  # fmt: skip
    return lab.trained(database, config, training)


def other_codes(facts: list[Fact], seed: int) -> list[Fact]:
    """The same names in the same words with codes drawn anew, none the old one."""
    rng = np.random.default_rng(seed)
    changed = []
    for fact in facts:
        code = fact.code
        while code == fact.code:
            code = invent_code(rng)
        changed.append(replace(fact, code=code))
    return changed


def conditions(model, asked, changed) -> dict[str, dict]:
    """What a model answers under each of LINES, and ("old codes") whether it gives the old ones after the swap.

    asked, changed: facts and the database that tells them, see `setting`.
    """
    facts, told = asked
    removed = facts[::2]
    gone = {f"{fact.name} told" for fact in removed}
    rest = told.without({record["sha256"] for record in told.documents if record["name"] in gone})
    return {
        ON: answers(model, facts, told),
        OFF: answers(model, facts, told, k=0),
        SHUFFLED: answers(model, facts, told, shift=1),
        SWAPPED: answers(model, *changed),
        "old codes": answers(model, facts, changed[1]),
        KEPT: answers(model, facts[1::2], rest),
        REMOVED: answers(model, removed, rest),
    }


def answers(model, facts: list[Fact], database: Database, k: int = K, shift: int = 0) -> dict:
    """The share of codes that greedy decoding gives fully right, and the mean bits of a code.

    k = 0: retrieval off. shift: each question is given what the one so many places before it retrieved. The answers
    stand in what the model reads: greedy decoding gives a code if and only if each of its tokens is the likeliest one
    after those before it.
    """
    tokens, places = questions(database.tokenizer, facts)
    neighbours = None
    if k:
        neighbours = np.zeros((len(facts), 2, k, 2 * CHUNK), np.int64)  # behind the second chunk nothing is asked
        neighbours[:, 0] = np.roll(database.value(_nearest(database, tokens, k)), shift, axis=0)
    rows = np.arange(len(facts))[:, None]
    logits = retro(model.params, model.config, tokens, neighbours)[0][rows, places - 1]
    codes = tokens[rows, places]
    right = (logits.argmax(axis=-1) == codes).all(axis=1)
    return {"right": right.mean(), "bits": nats_of(logits, codes).sum(axis=1).mean() / np.log(2)}


def found_share(facts: list[Fact], database: Database) -> float:
    """The share of questions whose nearest chunk is of the document with their answer: the most that can be right."""
    nearest = _nearest(database, questions(database.tokenizer, facts)[0], 1)[:, 0]
    names = [database.documents[int(number)]["name"] for number in database.document_of(nearest)]
    return float(np.mean([name == f"{fact.name} told" for name, fact in zip(names, facts, strict=True)]))


def _nearest(database, tokens, k):
    return database.search_keys(database.embed_chunks(tokens[:, :CHUNK]), k)[0]


def draw(figures, path):
    """A bar a line: the share of codes right; dots: seeds."""
    lines = {name: figures["lines"][name] for name in LINES}
    plot_bars(
        {name: 100 * line["right"]["mean"] for name, line in lines.items()}, path,
        "% of codes answered fully right; dots: seeds",
        dots={name: [100 * right for right in line["right"]["seeds"]] for name, line in lines.items()},
        notes={name: f" {line['bits']['mean']:.1f} bits a code" for name, line in lines.items()},
        limits=(0, 140),  # room for the notes
    )  # fmt: skip


def verdict(figures):
    """Right where the database holds the fact, after a swap too, and not otherwise."""
    right = {name: figures["lines"][name]["right"] for name in LINES}
    knows = all(right[name]["from"] >= MOSTLY for name in (ON, SWAPPED, KEPT))
    guesses = all(right[name]["to"] <= SELDOM for name in (OFF, SHUFFLED, REMOVED))
    percent = {name: f"{100 * right[name]['mean']:.1f} %" for name in LINES}
    bits = {name: figures["lines"][name]["bits"]["mean"] for name in LINES}
    return knows and guesses, (
        f"Of {figures['asked']} codes of names that training never saw, {percent[ON]} are right with their documents "
        f"in the database ({bits[ON]:.1f} bits a code), {percent[OFF]} without retrieval ({bits[OFF]:.1f} bits; "
        f"chance: {100 * figures['chance']:.3f} %, {figures['chance_bits']:.1f} bits) and {percent[SHUFFLED]} with the "
        f"neighbours of others. With a database that gives the names other codes, {percent[SWAPPED]} of the answers "
        f"are those, and {100 * figures['old_codes_after_swap']['mean']:.1f} % the old ones. With half of the "
        f"documents removed, {percent[KEPT]} of the others' codes are right, and {percent[REMOVED]} of theirs. The "
        f"nearest chunk is of the right document for {100 * figures['found']:.1f} %."
    )


EXPERIMENT = Experiment(
    "Facts that only the database holds",
    "The database can be changed with no training, and what a model knows with it (§1, §5). The paper has no figure of "
    "it; here it agrees where names answered from the database are right, after a swap too, and others are guesses.",
    measure,
    draw,
    verdict,
)
