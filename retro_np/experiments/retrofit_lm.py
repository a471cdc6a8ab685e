"""A memory for a language model

SmolLM2-135M, which others trained, gets a memory (`retro_np/nn/memory.py`) of five translations of a book, and one of a
manual whose held-out pages are younger than the model. Further conditions are the model adapted as long without
retrieval, other memories over the same database, sums with them, the paper's form, and a database that shares nothing
with the text.

Any pretrained transformer can be frozen and given retrieval. Training CCA and encoder takes 3 % of the sequences of
pretraining, and with retrieval off the model is exactly the original (§4.2)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from retro_np.evaluation.added_memory import CACHE, DATASTORE_KEYS, IN_CONTEXT, KNN_LM, METHODS, added_memory
from retro_np.evaluation.bits_per_byte import ScoredTokens, score_tokens
from retro_np.evaluation.breakdown import NEAR_COPY, SIMILARITY_EDGES, breakdown, nearest_similarities
from retro_np.evaluation.compare import SHUFFLE_SEED, compared
from retro_np.evaluation.knn_lm import continuous_cache, frozen_model, nearest_keys
from retro_np.evaluation.leakage import NO_LEAKAGE, chunk_leakage
from retro_np.evaluation.own_text import HASH_DIGITS
from retro_np.evaluation.prepending import prepended
from retro_np.experiments.corpora import MAN_PAGES, corpus, man_pages
from retro_np.experiments.experiment import Figures, Lab, Picture, Verdict, sentence
from retro_np.experiments.lab import Model, identity_of, mean_and_spread
from retro_np.experiments.recipe import NEIGHBOURS
from retro_np.files import sha256_of
from retro_np.nn.decoders import DecoderConfig
from retro_np.nn.memory import StateCache, is_added
from retro_np.parameters import init_params
from retro_np.pretrained.bundled import BUNDLED, MEMORY, trained_on
from retro_np.pretrained.decoder import Pretrained
from retro_np.pretrained.models import SMOLLM2, load_model, read_pretrained
from retro_np.progress import counted, say
from retro_np.report.plots import COLOURS, new_plot
from retro_np.retrieval.config import D_KEY_OF_OTHERS
from retro_np.retrieval.corpus import STDLIB
from retro_np.retrieval.database import Database, Split
from retro_np.retrieval.documents import document_runs
from retro_np.retrieval.join import Retrieval, retrieve_from
from retro_np.retrieval.manifest import TOKENIZER
from retro_np.retrieval.tokenizer import load_tokenizer, save_tokenizer
from retro_np.sequences import evaluation_windows
from retro_np.training.config import TrainingConfig
from retro_np.training.memory import ADAPTED, MEMORY_SETTINGS, PAPER_FORM, SHIPPED, UNTRAINED, begin
from retro_np.tree import named_leaves

NOT_READING = ("base", "off", ADAPTED)  # conditions without retrieval
MAN, UNRELATED = "man pages", "no shared content"  # corpora on which nothing is trained
BUILDS: dict[str, dict[str, Any]] = {"translations": {"held_out": 0.08}, "documentation": {}}  # of those with training
BEGINS = {"documentation": SHIPPED}  # as `train` begins a memory; the package's one was trained on the translations
LIKE_OURS = {name: getattr(TrainingConfig, name) for name in ("learning_rate", "weight_decay", "random_share")}
DRAWN = ("on", "others", ADAPTED, *METHODS, *(f"on+{name}" for name in METHODS), SHIPPED, UNTRAINED, PAPER_FORM)
IN_PARTS = ("base", "on", "others", ADAPTED, IN_CONTEXT, SHIPPED, UNTRAINED)  # are also compared on parts of a corpus


@dataclass(frozen=True)
class Size:
    """chunk_size, sequence_length: in tokens. documents: how many are scored, each up to its first sequence_length
    tokens. timed: how many of these are timed. keys: of kNN-LM. training: settings that differ from a memory's."""

    chunk_size: int
    sequence_length: int
    documents: int
    timed: int
    keys: int
    training: dict[str, Any]


SIZE_OF_SCALE = {
    "tiny": Size(16, 128, 12, 4, 1024, {"batch_size": 16, "steps": 3, "warmup": 1}),
    "small": Size(64, 512, 100, 8, DATASTORE_KEYS, {"batch_size": 4}),
}


@dataclass(frozen=True)
class Bench:
    """What a corpus is measured with. retrieval: the documents that are scored, and the database that they read.

    encoded: neighbours as the base has encoded them, which is the same for all its memories in the same layers."""

    lab: Lab
    base: Pretrained
    size: Size
    database: Database
    retrieval: Retrieval
    encoded: StateCache

    @property
    def windows(self) -> dict[str, Any]:
        """What is scored: one window for each document."""
        length = self.size.sequence_length
        return {"sequence_length": length, "stride": length, "retrieval": self.retrieval}

    @cached_property
    def plain(self) -> Model:
        """The base."""
        return Model(*load_model(self.base, self.database), self.base.sha256)

    def untrained(self) -> Model:
        """The base with a memory that is not trained."""
        config, start = begin(self.base, self.database, UNTRAINED, np.random.default_rng(0))
        return Model(start["begin_from"][0], config, f"{UNTRAINED} 0 {config.to_dict()} {self.base.sha256}")

    def trained(self, form: str, seed: int = 0, **changes: Any) -> Model:
        """Train what is added to the base, or load it. form: what is added. changes: of a memory's settings."""
        sizes = {"sequence_length": self.size.sequence_length, "neighbours": NEIGHBOURS}
        settings = TrainingConfig(**sizes | MEMORY_SETTINGS | self.size.training | changes | {"seed": seed})
        # The encoder of the paper's form embeds tokens as the base does.
        config = replace(self.plain.config, share_embeddings=form == PAPER_FORM)
        config, start = begin(self.base, self.database, form, np.random.default_rng(seed), config=config)
        return self.lab.trained(self.database, config, settings, **start)

    def score(self, name: str, model: Model, cache: StateCache | None = None) -> ScoredTokens:
        """What a model makes of the documents in a condition, which `name` tells."""
        k, seed = 0 if name in NOT_READING else NEIGHBOURS, SHUFFLE_SEED if name.endswith("others") else None
        settings = self.windows | {"k": k, "shuffle_seed": seed, "cache": cache, "description": name}
        return score_tokens(model.params, model.config, self.database, **settings)

    def stored(self, name: str, *models: Model) -> list[ScoredTokens]:
        """`score` of each model, or what the lab has of it."""

        def one(model: Model) -> ScoredTokens:
            facts = self.facts(name, model.name)
            return ScoredTokens(**self.lab.stored("tokens", facts, lambda: vars(self.score(name, model, self.encoded))))

        return [one(model) for model in models]

    def facts(self, *further: Any) -> list[Any]:
        """What identifies a measurement in the lab."""
        numbers = np.unique(self.retrieval.split.documents).tolist()
        return [self.database.identity, identity_of(self.retrieval), numbers, asdict(self.size), *further]

    def reading(self, form: str, *models: Model) -> dict[str, list[ScoredTokens]]:
        """Memories of a form that read their own neighbours, and those of other chunks."""
        others = "others" if form == "on" else f"{form}, others"
        return {name: self.stored(name, *models) for name in (form, others)}

    def added(self, on: Sequence[ScoredTokens], names: Sequence[str]) -> dict[str, list[ScoredTokens]]:
        """The other memories, alone and in sums with each trained one. on: its tokens. names: of the trained ones."""
        seeds = {f"on{seed}": tokens for seed, tokens in enumerate(on)}

        def measured() -> dict[str, np.ndarray]:
            model, settings = (self.plain.params, self.plain.config, self.database), {"limit": None, **self.windows}
            rows = added_memory(METHODS, *model, k=NEIGHBOURS, keys=self.size.keys, on=seeds, **settings)
            return {row: tokens.nats for row, (tokens, _) in rows.items()}

        nats = self.lab.stored("added", self.facts(self.base.sha256, list(names)), measured)
        rows = {name: [name] for name in METHODS} | {f"on+{name}": [f"{s}+{name}" for s in seeds] for name in METHODS}
        return {name: [replace(on[0], nats=nats[row]) for row in of_seeds] for name, of_seeds in rows.items()}

    def seconds(self, on: Model, adapted: Model, paper_form: Model) -> dict[str, float]:
        """Seconds for each token of the longest documents, by condition: in the same process, the better of two runs.

        kNN-LM searches as many keys as it has, which are random here."""
        split, (numbers, lengths) = self.retrieval.split, np.unique(self.retrieval.split.documents, return_counts=True)
        longest = numbers[np.argsort(-lengths, kind="stable")[: self.size.timed]]
        few = _rows(split, np.flatnonzero(np.isin(split.documents, longest)))
        part = replace(self, retrieval=replace(self.retrieval, split=few))
        plain, encoded = (self.plain.params, self.plain.config, self.database), StateCache()
        keys = np.random.default_rng(0).standard_normal((self.size.keys, self.plain.config.d_model), np.float32)
        runs: dict[str, Callable[[], Any]] = {
            "base": partial(part.score, "base", self.plain), "off": partial(part.score, "off", on),
            "on": partial(part.score, "on", on), "on, neighbours encoded": partial(part.score, "on", on, encoded),
            ADAPTED: partial(part.score, ADAPTED, adapted), PAPER_FORM: partial(part.score, PAPER_FORM, paper_form),
            IN_CONTEXT: partial(prepended, *plain, k=NEIGHBOURS, **part.windows),
            KNN_LM: lambda: nearest_keys(frozen_model(*plain, **part.windows)[1], keys),
            CACHE: lambda: continuous_cache(*frozen_model(*plain, **part.windows)),
        }  # fmt: skip

        def measured() -> dict[str, np.ndarray]:
            tokens = len(part.score("on", on, encoded).nats)  # The first run compiles the kernels.
            times = dict.fromkeys(runs, np.array(np.inf))
            for name, run in [*runs.items()] * 2:
                begin = time.perf_counter()
                run()
                times[name] = np.minimum(times[name], (time.perf_counter() - begin) / tokens)
            return times

        stored = self.lab.stored("seconds", part.facts(on.name, adapted.name, paper_form.name), measured)
        return {name: float(value) for name, value in stored.items()}


def measure(lab: Lab) -> Figures:
    """Bits per byte of each condition on each corpus, differences with intervals, and seconds per token."""
    size, base = (
        SIZE_OF_SCALE[lab.scale.name],
        _tiny_decoder() if lab.scale.name == "tiny" else read_pretrained(SMOLLM2),
    )
    figures: Figures = {"base": {"name": base.name, "sha256": base.sha256}, "corpora": {}, "comparisons": []}
    if lab.scale.name != "tiny":  # seconds of a training step and of all evaluations, measured on two cores
        hours = (MEMORY_SETTINGS["steps"] * (12 * lab.seeds + 11) + 3000 + 300 * lab.seeds) / 3600
        say(f"this takes about {hours:.1f} hours on two cores, less what {lab.folder} holds already")
    memories: dict[str, list[Model]] = {}  # by the database that they read
    for name, bench in _benches(lab, base, size).items():
        say(f"{name}: {counted(len(np.unique(bench.retrieval.split.documents)), 'document')}")
        tokens, place = {"base": bench.stored("base", bench.plain)}, str(bench.retrieval.database.path)
        is_trained = name not in (MAN, UNRELATED)
        if is_trained:
            memories[place] = [bench.trained(BEGINS.get(name, UNTRAINED), seed) for seed in range(lab.seeds)]
            tokens["off"] = bench.stored("off", *memories[place])
        if on := memories.get(place):
            tokens |= bench.reading("on", *on)
        if on and is_trained:
            tokens |= bench.added(tokens["on"], [model.name for model in on])
            adapted = bench.trained(ADAPTED, random_share=0.0)
            tokens[ADAPTED] = bench.stored(ADAPTED, adapted)
            if "seconds_per_token" not in figures:  # The paper's form is trained on one corpus.
                paper_form = bench.trained(PAPER_FORM, **LIKE_OURS)
                tokens |= bench.reading(PAPER_FORM, paper_form)
                forms = {"on": on[0], ADAPTED: adapted, PAPER_FORM: paper_form}
                figures["trained_parameters"] = {
                    form: sum(leaf.size for leaf_name, leaf in named_leaves(model.params) if is_added(leaf_name))
                    for form, model in forms.items()
                }
                figures["seconds_per_token"] = bench.seconds(*forms.values())
        tokens |= bench.reading(UNTRAINED, bench.untrained())
        if base.name == SMOLLM2:
            tokens |= bench.reading(SHIPPED, Model(*load_model(MEMORY, bench.database), sha256_of(MEMORY)))
        figures["corpora"][name], records = _compared(bench, tokens, name)
        figures["comparisons"] += records
    return figures


def _compared(bench: Bench, tokens: dict[str, list[ScoredTokens]], name: str) -> tuple[dict[str, Any], list[Any]]:
    """The facts about a corpus, and its records of comparisons: all, without leakage, and without near-copies."""
    split, main = bench.retrieval.split, next(form for form in ("on", SHIPPED, UNTRAINED) if form in tokens)
    losses = {each: [t.losses(bench.database, split) for t in of_seeds] for each, of_seeds in tokens.items()}
    ratios = chunk_leakage(bench.database, retrieval=bench.retrieval)
    similarity = nearest_similarities(bench.retrieval.database, split)
    records = compared(losses, "base", main)
    subsets: list[tuple[str, float | None, np.ndarray]] = [(name, NO_LEAKAGE, ratios <= NO_LEAKAGE)]
    subsets += [(f"{name}, similarity below {edge:g}", None, similarity < edge) for edge in SIMILARITY_EDGES[1:-1]]
    for part_name, alpha, rows in subsets:
        some = {each: of_seeds for each, of_seeds in losses.items() if each.removesuffix(", others") in IN_PARTS}
        part = {each: [loss[rows] for loss in of_seeds] for each, of_seeds in some.items()}
        if part["base"][0].bytes.any():
            records += [{"corpus": part_name} | record for record in compared(part, "base", main, alpha)]
    numbers = np.unique(split.documents).tolist()
    known = {bench.database.documents[number]["sha256"][:HASH_DIGITS] for number in numbers} & trained_on(MEMORY)
    parts = breakdown(
        tokens[main][0], tokens["base"][0], bench.database, bench.retrieval, k=NEIGHBOURS, limit=None, ratios=ratios,
        similarity=similarity, windows=evaluation_windows(split, *[bench.size.sequence_length] * 2),
    )  # fmt: skip
    return {
        "documents": len(numbers), "shipped_trained_on": len(known), "splits": bench.database.manifest["splits"],
        "retrieved_from": bench.retrieval.database.manifest["splits"]["train"],
        "off_equals_base": all(np.array_equal(t.nats, tokens["base"][0].nats) for t in tokens.get("off", [])),
        "bits_per_byte": {
            each: mean_and_spread(loss.bits_per_byte() for loss in of_seeds) for each, of_seeds in losses.items()
        },
        "parts": {"of": main, "against": "base", **parts},
    }, [{"corpus": name} | record for record in records]  # fmt: skip


def _benches(lab: Lab, base: Pretrained, size: Size) -> dict[str, Bench]:
    """The corpora by name: two with training, one read by the other's database, and this machine's manual pages."""
    folder = lab.folder / "corpora"
    common = {"chunk_size": size.chunk_size, "tokenizer": str(folder / TOKENIZER), "d_key": D_KEY_OF_OTHERS}
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(base.tokenizer, folder / TOKENIZER)
    if lab.scale.name == "tiny":
        builds = {name: {"include": (f"{name}/*",), "held_out": 0.3} for name in ("asyncio", "email")}
        places: dict[str, Any] = dict.fromkeys(builds, STDLIB)
    else:
        builds, places = dict(BUILDS), {name: corpus(name, folder) for name in BUILDS}
        if MAN_PAGES.is_dir():
            builds[MAN], places[MAN] = {"training_neighbours": False}, man_pages(folder / f"{MAN}.jsonl")
    databases = {name: lab.database(places[name], name, **common, **changes) for name, changes in builds.items()}
    read = {name: Retrieval(_chosen(database.split("valid"), size), database) for name, database in databases.items()}
    (_, first), (text, databases[UNRELATED]), *_ = databases.items()
    read[UNRELATED] = retrieve_from(databases[UNRELATED], first, split=read[text].split)
    encoded = StateCache(4 << 30)
    return {name: Bench(lab, base, size, databases[name], retrieval, encoded) for name, retrieval in read.items()}


def _chosen(split: Split, size: Size) -> Split:
    """The first chunks of random documents that have more than two."""
    length = size.sequence_length // size.chunk_size
    runs = [(start, min(stop, start + length)) for start, stop in document_runs(split.documents[:]) if stop - start > 2]
    order = np.sort(np.random.default_rng(0).permutation(len(runs))[: size.documents])
    return _rows(split, np.concatenate([np.arange(*runs[number]) for number in order]))


def _rows(split: Split, rows: np.ndarray) -> Split:
    names = ("tokens", "documents", "neighbours", "distances")
    arrays: dict[str, Any] = {name: getattr(split, name)[rows] for name in names}
    return replace(split, **arrays, removed=np.empty(0, np.int64))


def _tiny_decoder() -> Pretrained:
    """A random Llama with the bundled tokenizer, so that the experiment can be tried out without a download."""
    tokenizer = load_tokenizer(BUNDLED / TOKENIZER)
    sizes: dict[str, Any] = {"n_heads": 4, "n_kv_heads": 2, "d_head": 8, "n_layers": 6}
    config = DecoderConfig(tokenizer.get_vocab_size(), 32, 64, **sizes, tie_readout=True)
    read = lambda: init_params(config, np.random.default_rng(0))  # noqa: E731
    return Pretrained("a random decoder", [], config, tokenizer, read)


def draw(figures: Figures, path: Picture) -> None:
    """The difference of each condition to the base, with its interval, on each corpus."""
    with new_plot(path, "bits per byte against the base (%), with 95 % intervals", "") as axes:
        for place, (name, colour) in enumerate(zip(figures["corpora"], COLOURS.values(), strict=False)):
            against = differences(figures, name)
            known = SHIPPED if figures["corpora"][name]["shipped_trained_on"] else None  # trained on what is held out
            drawn = [(row, against[each]) for row, each in enumerate(DRAWN) if each in against and each != known]
            rows = [row + 0.18 * (place - 1.5) for row, _ in drawn]
            means = [each["difference_percent"] for _, each in drawn]
            ends = [each["interval_percent"] or [mean] * 2 for (_, each), mean in zip(drawn, means, strict=True)]
            errors = np.abs(np.transpose(ends) - means)
            axes.errorbar(means, rows, xerr=errors, fmt="o", markersize=3, color=colour, label=name)
        axes.axvline(0, color="#666666", linewidth=0.8)
        axes.set_yticks(range(len(DRAWN)), DRAWN, fontsize=8)
        axes.invert_yaxis()


def verdict(figures: Figures) -> Verdict:
    """Whether on each corpus with training, ON needs fewer bits than the base and than with others' neighbours, with
    intervals clear of 0, and OFF equals the base."""
    names = [name for name in figures["corpora"] if name not in (MAN, UNRELATED)]
    trained = {name: figures["corpora"][name] | {"base": differences(figures, name)} for name in names}
    for name in names:
        trained[name]["on"], trained[name]["without_copies"] = (
            {each["against"]: each for each in _whole(figures, corpus) if each["of"] == "on"}
            for corpus in (name, f"{name}, similarity below {NEAR_COPY:g}")
        )
    pairs = [trained[name]["on"][other]["interval_percent"] for name in names for other in ("base", "others")]
    same = all(facts["off_equals_base"] for facts in trained.values())
    values = {"trained": trained, "same": same, "unrelated": differences(figures, UNRELATED)["on"]}
    return same and all(pair is not None and pair[1] < 0 for pair in pairs), sentence(__name__, figures, **values)


def differences(figures: Figures, name: str) -> dict[str, Any]:
    """The records of comparisons with the base on a whole corpus, by condition."""
    return {each["of"]: each for each in _whole(figures, name) if each["against"] == "base"}


def _whole(figures: Figures, name: str) -> list[dict[str, Any]]:
    return [each for each in figures["comparisons"] if each["corpus"] == name and each["alpha"] is None]
