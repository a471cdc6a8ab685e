"""A memory for a language model

SmolLM2-135M, which others trained, gets a memory (`retro_np/nn/memory.py`) of five translations of a book, and one of a
manual whose held-out pages are younger than the model. Further conditions are the model adapted as long without
retrieval, other memories over the same database, sums with them, the paper's form, and a database that shares nothing
with the text.

Any pretrained transformer can be frozen and given retrieval. Training CCA and encoder takes 3 % of the sequences of
pretraining, and with retrieval off the model is exactly the original (§4.2). Neighbours that share no text do not help
(§4.4)."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np

from retro_np.config import EncoderConfig
from retro_np.evaluation.added_memory import CACHE, DATASTORE_KEYS, IN_CONTEXT, KNN_LM, METHODS, added_memory
from retro_np.evaluation.bits_per_byte import ScoredTokens, score_tokens
from retro_np.evaluation.breakdown import SIMILARITY_EDGES, breakdown, nearest_similarities
from retro_np.evaluation.compare import SHUFFLE_SEED, compared
from retro_np.evaluation.knn_lm import CACHE_THETAS, cache_probability, frozen_model, nearest_keys
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
from retro_np.retrieval.corpus import STDLIB
from retro_np.retrieval.database import Database, Split
from retro_np.retrieval.documents import document_runs
from retro_np.retrieval.join import Retrieval, retrieve_from
from retro_np.retrieval.manifest import TOKENIZER
from retro_np.retrieval.tokenizer import load_tokenizer, save_tokenizer
from retro_np.sequences import evaluation_windows
from retro_np.training.config import TrainingConfig
from retro_np.training.loop import retrofit
from retro_np.training.memory import MEMORY_SETTINGS, adapt, add_memory, default_layers
from retro_np.tree import named_leaves

OWN: dict[str, Any] = {"k": NEIGHBOURS}  # the neighbours that a memory reads
OF_OTHERS: dict[str, Any] = OWN | {"shuffle_seed": SHUFFLE_SEED}
UNTRAINED, SHIPPED, PAPER_FORM = "untrained", "shipped", "paper-form"
MAN, UNRELATED = "man pages", "no shared content"
TOKENS_PER_STEP = 2048
CORPORA_BUILDS: dict[str, dict[str, Any]] = {"translations": {"held_out": 0.08}, "documentation": {}}
DRAWN = ("on", "others", "adapted", *METHODS, *(f"on+{name}" for name in METHODS), SHIPPED, UNTRAINED, PAPER_FORM)


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


SIZES = {
    "tiny": Size(16, 128, 12, 4, 1024, {"steps": 3, "warmup": 1}),
    "small": Size(64, 512, 100, 8, DATASTORE_KEYS, {}),
}


@dataclass(frozen=True)
class Bench:
    """What a corpus is measured with. retrieval: the documents that are scored, and the database that they read."""

    lab: Lab
    base: Pretrained
    size: Size
    database: Database
    retrieval: Retrieval

    @property
    def windows(self) -> dict[str, int]:
        """One window for each document."""
        return {"sequence_length": self.size.sequence_length, "stride": self.size.sequence_length}

    @cached_property
    def plain(self) -> Model:
        """The base."""
        return Model(*load_model(self.base, self.database), self.base.sha256)

    def untrained(self, seed: int = 0) -> Model:
        """The base with an untrained memory."""
        config, rng = cast(DecoderConfig, self.plain.config), np.random.default_rng(seed)
        layers = default_layers({}, config, False)
        begin = self.database.end_of_text if self.database.end_of_text < config.vocabulary_size else self.base.start
        params, config = add_memory(self.plain.params, config, layers, rng, begin_id=begin)
        return Model(params, config, f"{UNTRAINED} {seed} {config.to_dict()} {self.base.sha256}")

    def adaptation(self) -> Model:
        """The base with untrained changes to its own attention, of the same rank and in the same layers."""
        config = cast(DecoderConfig, self.plain.config)
        layers = default_layers({}, config, False)
        return Model(*adapt(self.plain.params, config, layers, np.random.default_rng(0)), "")

    def paper_form(self) -> Model:
        """The base with a fresh encoder, and with fresh CCA in every third layer."""
        config = cast(DecoderConfig, self.plain.config)
        encoder = EncoderConfig(config.d_model, config.d_ffw, config.n_heads, config.d_head)
        layers = default_layers({}, config, True)
        return Model(*retrofit(self.plain.params, config, layers, encoder, np.random.default_rng(0)), "")

    def trained(self, begun: Model, seed: int = 0, **changes: Any) -> Model:
        """Train what is added to the base, or load it. changes: of a memory's settings."""
        length = self.size.sequence_length
        sizes = {"sequence_length": length, "batch_size": TOKENS_PER_STEP // length, "neighbours": NEIGHBOURS}
        settings = TrainingConfig(**sizes | MEMORY_SETTINGS | self.size.training | changes | {"seed": seed})
        base = {"name": self.base.name, "sha256": self.base.sha256}
        start = {"begin_from": (begun.params, self.base.sha256), "trainable": is_added, "base": base}
        return self.lab.trained(self.database, begun.config, settings, **start)

    def facts(self, *further: Any) -> list[Any]:
        """What identifies a measurement in the lab."""
        numbers = np.unique(self.retrieval.split.documents).tolist()
        return [self.database.identity, identity_of(self.retrieval), numbers, asdict(self.size), *further]

    def score(self, model: Model, description: str, cache: StateCache | None = None, **condition: Any) -> ScoredTokens:
        """What a model makes of the documents. condition: arguments of `score_tokens`."""
        settings = condition | self.windows | {"retrieval": self.retrieval, "cache": cache}
        return score_tokens(model.params, model.config, self.database, description=description, **settings)

    def stored(self, model: Model, description: str, **condition: Any) -> ScoredTokens:
        """`score`, or what the lab has of it."""
        score = lambda: vars(self.score(model, description, **condition))  # noqa: E731
        return ScoredTokens(**self.lab.stored("tokens", self.facts(model.name, condition), score))

    def pair(self, name: str, model: Model) -> dict[str, list[ScoredTokens]]:
        """A memory that reads its own neighbours, and those of other chunks."""
        others = f"{name}, others"
        return {name: [self.stored(model, name, **OWN)], others: [self.stored(model, others, **OF_OTHERS)]}

    def added(self, models: Sequence[Model], on: Sequence[ScoredTokens]) -> dict[str, list[ScoredTokens]]:
        """The other memories, alone and in sums with each model, whose tokens are `on`."""
        seeds = {f"on{seed}": tokens for seed, tokens in enumerate(on)}

        def measured() -> dict[str, np.ndarray]:
            model = self.plain.params, self.plain.config, self.database, self.retrieval
            settings: dict[str, Any] = {"k": NEIGHBOURS, "keys": self.size.keys, "limit": None, **self.windows}
            rows = added_memory(METHODS, *model, on=seeds, **settings)
            return {row: tokens.nats for row, (tokens, _) in rows.items()}

        nats = self.lab.stored("added", self.facts(self.base.sha256, [model.name for model in models]), measured)
        rows = {name: [name] for name in METHODS} | {f"on+{name}": [f"{s}+{name}" for s in seeds] for name in METHODS}
        return {name: [replace(on[0], nats=nats[row]) for row in of_seeds] for name, of_seeds in rows.items()}

    def seconds(self, models: dict[str, Model]) -> dict[str, float]:
        """Seconds for each token of a few documents, by condition, one after the other in the same process.

        models: "on", "adapted" and "paper-form". kNN-LM searches as many keys as it has, which are random here."""
        split = self.retrieval.split
        few = split.documents <= np.unique(split.documents)[: self.size.timed][-1]
        part = replace(self, retrieval=replace(self.retrieval, split=_rows(split, np.flatnonzero(few))))
        plain = self.plain.params, self.plain.config, self.database
        settings: dict[str, Any] = part.windows | {"retrieval": part.retrieval}
        encoded, d = StateCache(), self.plain.config.d_model
        keys = np.random.default_rng(0).standard_normal((self.size.keys, d), np.float32)

        def knn() -> None:
            nearest_keys(frozen_model(*plain, **settings)[1], keys)

        def cache() -> None:
            scored, hidden, documents = frozen_model(*plain, **settings)
            cache_probability(hidden, scored.tokens, documents, CACHE_THETAS[0])

        def measured() -> dict[str, np.ndarray]:
            runs = {
                "base": lambda: part.score(self.plain, "base", k=0),
                "off": lambda: part.score(models["on"], "off", k=0),
                "on": lambda: part.score(models["on"], "on", **OWN),
                "on, neighbours encoded": lambda: part.score(models["on"], "on", encoded, **OWN),
                "adapted": lambda: part.score(models["adapted"], "adapted", k=0),
                PAPER_FORM: lambda: part.score(models[PAPER_FORM], PAPER_FORM, **OWN),
                IN_CONTEXT: lambda: prepended(*plain, k=NEIGHBOURS, **settings), KNN_LM: knn, CACHE: cache,
            }  # fmt: skip
            tokens = len(part.score(models["on"], "before timing", encoded, **OWN).nats)
            times = {}
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                times[name] = np.array((time.perf_counter() - begin) / tokens)
            return times

        names = {name: model.name for name, model in models.items()}
        return {name: float(value) for name, value in self.lab.stored("seconds", part.facts(names), measured).items()}


def measure(lab: Lab) -> Figures:
    """Bits per byte of each condition on each corpus, differences with intervals, and seconds per token."""
    size, base = SIZES[lab.scale.name], _tiny_decoder() if lab.scale.name == "tiny" else read_pretrained(SMOLLM2)
    figures: Figures = {"base": {"name": base.name, "sha256": base.sha256}, "corpora": {}, "comparisons": []}
    memories: dict[str, list[Model]] = {}  # the trained ones by the database that they read
    for name, bench in _benches(lab, base, size).items():
        counts = counted(len(np.unique(bench.retrieval.split.documents)), "document")
        say(f"corpus {name}: {counts}; what {lab.folder} has already is only read")
        tokens, place = {"base": [bench.stored(bench.plain, "base", k=0)]}, str(bench.retrieval.database.path)
        if name not in (MAN, UNRELATED):
            memories[place] = [bench.trained(bench.untrained(seed), seed) for seed in range(lab.seeds)]
            tokens["off"] = [bench.stored(model, "off", k=0) for model in memories[place]]
        if place in memories:
            tokens["on"] = [bench.stored(model, "on", **OWN) for model in memories[place]]
            tokens["others"] = [bench.stored(model, "others", **OF_OTHERS) for model in memories[place]]
        if "off" in tokens:
            tokens |= bench.added(memories[place], tokens["on"])
            # The paper's form is trained like a model of ours.
            own = {field: getattr(TrainingConfig, field) for field in ("learning_rate", "weight_decay", "random_share")}
            adapted = bench.trained(bench.adaptation(), random_share=0.0)
            paper = bench.trained(bench.paper_form(), **own)
            tokens |= {"adapted": [bench.stored(adapted, "adapted", k=0)], **bench.pair(PAPER_FORM, paper)}
            if "seconds_per_token" not in figures:
                models = {"on": memories[place][0], "adapted": adapted, PAPER_FORM: paper}
                figures["trained_parameters"] = {form: _n_added(model) for form, model in models.items()}
                figures["seconds_per_token"] = bench.seconds(models)
        tokens |= bench.pair(UNTRAINED, bench.untrained())
        if base.name == SMOLLM2:
            shipped = Model(*load_model(MEMORY, bench.database), f"{SHIPPED} {sha256_of(MEMORY)}")
            tokens |= bench.pair(SHIPPED, shipped)
        figures["corpora"][name], records = _compared(bench, tokens, name)
        figures["comparisons"] += records
    return figures


def draw(figures: Figures, path: Picture) -> None:
    """The difference of each condition to the base, with its interval, on each corpus."""
    with new_plot(path, "bits per byte against the base (%), with 95 % intervals", "") as axes:
        for place, (name, colour) in enumerate(zip(figures["corpora"], COLOURS.values(), strict=False)):
            against = differences(figures, name)
            drawn = [(row, against[each]) for row, each in enumerate(DRAWN) if each in against]
            rows, means = (
                [row + 0.18 * (place - 1.5) for row, _ in drawn],
                [each["difference_percent"] for _, each in drawn],
            )
            ends = [each["interval_percent"] or [mean] * 2 for (_, each), mean in zip(drawn, means, strict=True)]
            errors = np.abs(np.transpose(ends) - means)
            axes.errorbar(means, rows, xerr=errors, fmt="o", markersize=3, color=colour, label=name)
        axes.axvline(0, color="#666666", linewidth=0.8)
        axes.set_yticks(range(len(DRAWN)), DRAWN, fontsize=8)
        axes.invert_yaxis()


def verdict(figures: Figures) -> Verdict:
    """Whether on each corpus with a trained memory, ON lies below the base and below others', intervals clear of 0, and
    OFF equals the base."""
    corpora = {}
    for name, facts in figures["corpora"].items():
        if name not in (MAN, UNRELATED):
            corpora[name] = {"base": differences(figures, name), "on": differences(figures, name, of="on"), **facts}
    clear = [
        facts["on"][other]["interval_percent"] is not None and facts["on"][other]["interval_percent"][1] < 0
        for facts in corpora.values() for other in ("base", "others")
    ]  # fmt: skip
    same = all(facts["off_equals_base"] for facts in corpora.values())
    unrelated = differences(figures, UNRELATED)["on"]
    return all(clear) and same, sentence(__name__, figures, trained=corpora, same=same, unrelated=unrelated)


def differences(figures: Figures, corpus: str, of: str | None = None) -> dict[str, Any]:
    """The records of a whole corpus: of each condition against the base, by condition; or of one, by what it is
    compared with."""
    records = [each for each in figures["comparisons"] if each["corpus"] == corpus and each["alpha"] is None]
    if of is not None:
        return {each["against"]: each for each in records if each["of"] == of}
    return {each["of"]: each for each in records if each["against"] == "base"}


def _compared(bench: Bench, tokens: dict[str, list[ScoredTokens]], name: str) -> tuple[dict[str, Any], list[Any]]:
    """The facts about a corpus, and its records of comparisons: all, without leakage, and without near-copies."""
    split, main = bench.retrieval.split, "on" if "on" in tokens else UNTRAINED if SHIPPED not in tokens else SHIPPED
    losses = {each: [t.losses(bench.database, split) for t in of_seeds] for each, of_seeds in tokens.items()}
    ratios = chunk_leakage(bench.database, retrieval=bench.retrieval)
    similarity = nearest_similarities(bench.retrieval.database, split)
    subsets = [(name, None, np.full(len(ratios), True)), (name, NO_LEAKAGE, ratios <= NO_LEAKAGE)]
    subsets += [(f"{name}, similarity below {edge:g}", None, similarity < edge) for edge in SIMILARITY_EDGES[1:-1]]
    records = []
    for part_name, alpha, rows in subsets:
        part = {each: [loss[rows] for loss in of_seeds] for each, of_seeds in losses.items()}
        if part["base"][0].bytes.any():
            records += [{"corpus": part_name} | record for record in compared(part, "base", main, alpha)]
    numbers = np.unique(split.documents).tolist()
    known = {bench.database.documents[number]["sha256"][:HASH_DIGITS] for number in numbers} & trained_on(MEMORY)
    windows = evaluation_windows(split, **bench.windows)
    whole: dict[str, Any] = {
        "windows": windows,
        "k": NEIGHBOURS,
        "limit": None,
        "ratios": ratios,
        "similarity": similarity,
    }
    parts = breakdown(tokens[main][0], tokens["base"][0], bench.database, bench.retrieval, **whole)
    return {
        "documents": len(numbers), "shipped_trained_on": len(known), "splits": bench.database.manifest["splits"],
        "retrieved_from": bench.retrieval.database.manifest["splits"]["train"],
        "off_equals_base": all(np.array_equal(t.nats, tokens["base"][0].nats) for t in tokens.get("off", [])),
        "bits_per_byte": {
            each: mean_and_spread(loss.bits_per_byte() for loss in of_seeds) for each, of_seeds in losses.items()
        },
        "parts": {"of": main, "against": "base", **parts},
    }, records  # fmt: skip


def _benches(lab: Lab, base: Pretrained, size: Size) -> dict[str, Bench]:
    """The corpora by name: two with training, one read by the other's database, and this machine's manual pages."""
    folder = lab.folder / "corpora"
    common = {"chunk_size": size.chunk_size, "tokenizer": str(folder / TOKENIZER), "d_key": 1024}
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(base.tokenizer, folder / TOKENIZER)
    if lab.scale.name == "tiny":
        parts: dict[str, Any] = {
            name: (STDLIB, {"include": (f"{name}/*",), "held_out": 0.3}) for name in ("asyncio", "email")
        }
    else:
        parts = {name: (corpus(name, folder), changes) for name, changes in CORPORA_BUILDS.items()}
        if MAN_PAGES.is_dir():
            parts[MAN] = man_pages(folder / f"{MAN}.jsonl"), {"training_neighbours": False}
    databases = {name: lab.database(where, name, **common, **changes) for name, (where, changes) in parts.items()}
    read = {name: Retrieval(_chosen(database.split("valid"), size), database) for name, database in databases.items()}
    (_, first), (text, second), *_ = databases.items()
    read[UNRELATED] = retrieve_from(second, first, split=read[text].split)
    databases[UNRELATED] = second
    return {name: Bench(lab, base, size, databases[name], retrieval) for name, retrieval in read.items()}


def _chosen(split: Split, size: Size) -> Split:
    """The first chunks of random documents that have at least two."""
    length = size.sequence_length // size.chunk_size
    runs = [(start, min(stop, start + length)) for start, stop in document_runs(split.documents[:]) if stop - start > 1]
    order = np.sort(np.random.default_rng(0).permutation(len(runs))[: size.documents])
    return _rows(split, np.concatenate([np.arange(*runs[number]) for number in order]))


def _rows(split: Split, rows: np.ndarray) -> Split:
    arrays: dict[str, Any] = {
        name: getattr(split, name)[rows] for name in ("tokens", "documents", "neighbours", "distances")
    }
    return replace(split, **arrays, removed=np.empty(0, np.int64))


def _n_added(model: Model) -> int:
    return sum(leaf.size for name, leaf in named_leaves(model.params) if is_added(name))


def _tiny_decoder() -> Pretrained:
    """A random Llama with the bundled tokenizer, so that the experiment can be tried out without a download."""
    tokenizer = load_tokenizer(BUNDLED / TOKENIZER)
    config = DecoderConfig(
        tokenizer.get_vocab_size(), 32, 64, n_heads=4, d_head=8, n_layers=6, n_kv_heads=2, tie_readout=True
    )
    read = lambda: init_params(config, np.random.default_rng(0))  # noqa: E731
    return Pretrained("a random decoder", [], config, tokenizer, read)
