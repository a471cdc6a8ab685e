"""Record how tutorial 7's model learns to read without aids: `python docs/landing/learning_curve.py`.

It trains the model of tutorials/07_train_one.py for 1,500 steps from ordinary random weights, once for each of three
seeds. Every 50 steps, it asks for the codes of 100 other people, whom only the database knows: with retrieval on, with
retrieval off, and with the neighbours of other questions. learning_curve.json receives the shares of right codes, the
bits of a code, and what the trained model says about one person. inspect-code.html shows how it reads that person's
code."""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # Set before NumPy is imported: the seconds are those of one thread.

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from retro_np import EncoderConfig, RetroConfig
from retro_np.experiments import facts as world
from retro_np.experiments.knowledge import answers, found_share
from retro_np.experiments.lab import Model
from retro_np.nn.model import retro
from retro_np.optim import adamw_init
from retro_np.parameters import count_parameters, init_params
from retro_np.report.inspection import inspect, write_inspection
from retro_np.retrieval.build import BuildConfig, build_database
from retro_np.retrieval.tokenizer import encode_batch
from retro_np.training.batches import training_batch
from retro_np.training.config import TrainingConfig
from retro_np.training.curriculum import with_curriculum
from retro_np.training.loop import train_step

COMMAND = "python docs/landing/learning_curve.py"
CONDITIONS = {"on": {}, "off": {"k": 0}, "others": {"shift": 1}}
EVERY, TRAINED_ON, ASKED = 50, 1000, 100  # steps, people, people


def worlds(folder):
    """The people to ask about, the database to train on, and the one that tells the codes of those asked about."""
    people = world.invent(TRAINED_ON + ASKED, seed=7)
    known, unseen = people[:TRAINED_ON], people[TRAINED_ON:]
    build = BuildConfig(
        chunk_size=world.CHUNK, vocabulary_size=258, held_out=0.1, neighbours=4, extra_candidates=8, d_key=512
    )
    corpus = world.write_facts(folder / "known.jsonl", known, ("told", "asked"))
    database = build_database(corpus, folder / "known", build, "hashing")
    corpus = world.write_facts(folder / "unseen.jsonl", unseen, ("told",))
    return unseen, database, build_database(corpus, folder / "told", replace(build, held_out=0.0), "hashing")


def said(model, unseen, told):
    """What the model says, digit by digit, when it is asked for each person's code: a list for each condition."""
    tokens, places = world.questions(told.tokenizer, unseen)
    rows = np.arange(len(unseen))
    ids, _ = told.search_keys(told.embed_chunks(tokens[:, : world.CHUNK]), 1)
    spoken = {}
    for condition, how in CONDITIONS.items():
        text, neighbours = tokens.copy(), None
        if how.get("k") != 0:
            neighbours = np.zeros((len(unseen), 2, 1, 2 * world.CHUNK), np.int64)
            neighbours[:, 0] = np.roll(told.value(ids), how.get("shift", 0), axis=0)
        for row, first in enumerate(places[:, 0]):
            text[row, first:] = 0  # The answer stands in `tokens`, so it is removed before it is predicted.
        for place in places.T:
            logits = retro(model.params, model.config, text, neighbours)[0]
            text[rows, place] = logits[rows, place - 1].argmax(axis=-1)
        spoken[condition] = [told.text(row[where]) for row, where in zip(text, places, strict=True)]
    return spoken


def example(model, unseen, told):
    """What the model says about everybody, and one person as the essay shows them.

    "believed" is the share of questions whose answer is the code in another person's document if it reads that one.
    The person is the first one whose three answers are typical: right, a guess, and the code of the other person."""
    codes = [person.code for person in unseen]
    others = codes[-1:] + codes[:-1]  # as `shift` hands neighbours on
    spoken = said(model, unseen, told)
    right, believed = np.array(spoken["on"]) == codes, np.array(spoken["others"]) == others
    number = int(np.argmax(right & believed))
    person, other = unseen[number], unseen[number - 1]
    documents = {"told": world.document(person, person.told), "asked": world.document(person, person.asked)}
    return {
        "number": number, "name": person.name, "code": person.code, "other_name": other.name, "other_code": other.code,
        **{role: [text[: world.CHUNK], text[world.CHUNK :]] for role, text in documents.items()},
        "said": {condition: answers[number] for condition, answers in spoken.items()},
        "right": float(right.mean()), "believed": float(believed.mean()),
    }  # fmt: skip


def learn(steps, seed, people):
    """Train from one seed. Returns the trained model and the record of the run."""
    unseen, database, told = people
    m = world.CHUNK
    encoder = EncoderConfig(64, 256, n_heads=4, d_head=16, n_layers=1, ca_layers=(1,))
    config = RetroConfig(
        database.vocabulary_size, 64, 256, n_heads=4, d_head=16, n_layers=2, cca_layers=(2,), chunk_size=m,
        encoder=encoder, copying_start=False,
    )  # fmt: skip
    training = TrainingConfig(
        steps=steps, sequence_length=8 * m, batch_size=4, neighbours=1, learning_rate=4e-3, warmup=20,
        retrieval_off=0.2, seed=seed,
    )  # fmt: skip
    params = init_params(config, np.random.default_rng(training.seed))
    state, split, curve, seconds = adamw_init(params), database.split("train"), [], 0.0
    settings = {name: getattr(training, name) for name in ("sequence_length", "batch_size", "seed", "random_share")}
    model = Model(params, config, "learner")
    for step in range(steps + 1):
        if step % EVERY == 0 or step == steps:
            asked = {name: answers(model, unseen, told, **how) for name, how in CONDITIONS.items()}
            rounded = {name: {key: round(float(x), 4) for key, x in line.items()} for name, line in asked.items()}
            curve.append({"step": step, **rounded})
            print(seed, step, {name: f"{100 * answer['right']:.0f} %" for name, answer in asked.items()}, flush=True)
        if step < steps:
            start = time.perf_counter()
            tokens, targets, neighbours = training_batch(database, split, 1, step=step, **settings)
            neighbours = with_curriculum(neighbours, tokens, training, step, database.padding)
            train_step(params, state, config, (tokens, targets, neighbours), training, step)
            seconds += time.perf_counter() - start
    return model, {"seed": seed, "seconds": round(seconds, 1), "curve": curve}


def write_page(path, model, unseen, told, number):
    """Write the page of `retro-np inspect` about the document that asks for a person's code."""
    tokens = np.array(encode_batch(told.tokenizer, [world.document(unseen[number], unseen[number].asked)])[0])
    facts = {
        "trained on": f"{TRAINED_ON:,} other people",
        "database": f"the codes of {ASKED} people, this one among them",
    }
    page = inspect(model.params, model.config, told, tokens, k=1)
    write_inspection(path, "A code that only the database knows", facts, page)


def record(steps, seeds, folder, page):
    """The whole record. The example's answers and the page are of the first seed's model."""
    people = unseen, _, told = worlds(folder)
    learned = [learn(steps, seed, people) for seed in range(seeds)]
    model = learned[0][0]
    shown = example(model, unseen, told)
    write_page(page, model, unseen, told, shown["number"])
    return {
        "command": COMMAND, "steps": steps, "threads": 1, "trained_on": TRAINED_ON, "asked": len(unseen),
        "parameters": count_parameters(model.config, embeddings=True), "codes": round(1 / world.CHANCE),
        "guess_bits": round(float(-np.log2(world.CHANCE)), 4), "found": found_share(unseen, told),
        "example": shown, "runs": [run for _, run in learned],
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description="Record how a small RETRO learns to read.")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--to", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = arguments.to.with_name("inspect-code.html")
        content = record(arguments.steps, arguments.seeds, Path(folder), page)
    arguments.to.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
