"""Does a continuation stay on topic? Held-out documents' beginnings, continued with retrieval on and off.

The same model goes on from the same prompt with the same random numbers. Shares of a continuation's token 4-grams say
what it has in common with the rest of the prompt's document, with the rest of another prompt's document (what any two
texts of the corpus share), with what was retrieved while retrieval was on, and with itself. The continuation without
retrieval is held against the same retrieved values: what it shares with them it does not owe to them.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from retro_np.evaluation.compare import OFF, ON
from retro_np.experiments import recipe
from retro_np.experiments.experiment import Experiment
from retro_np.experiments.lab import mean_and_spread
from retro_np.generation import generate
from retro_np.progress import progress_bar
from retro_np.report.plots import COLOURS, figure_and_axes, finish
from retro_np.report.samples import show_chunks, write_page
from retro_np.retrieval.database import Database
from retro_np.retrieval.tokenizer import END_OF_TEXT, PADDING

N = 4  # tokens of a run that counts as shared
PROMPT_CHUNKS = 4
PROMPTS, LENGTH, DRAWS = 24, 128, 3
TINY_PROMPTS, TINY_LENGTH = 3, 32
NUCLEUS = 0.9  # top-p, Holtzman et al. 2020
SHOWN = 4  # prompts whose texts are kept
REMAINDER, OTHER, RETRIEVED, REPEATED = "its document's rest", "another's rest", "what was retrieved", "itself, before"
MEASURES = (REMAINDER, OTHER, RETRIEVED, REPEATED)


def measure(lab):
    """Shares by measure and line (`seeds` holds a value a prompt), the paired difference, and a few texts.

    Each prompt is continued DRAWS times, and its shares are means over them. Leaves samples.html, too.
    """
    database = lab.database()
    retro = lab.pair(database, 0)[1]
    wanted, length = (TINY_PROMPTS, TINY_LENGTH) if lab.scale.name == "tiny" else (PROMPTS, LENGTH)
    parts = prompts_and_rests(database, wanted)
    shares = {name: {line: [] for line in (ON, OFF)} for name in MEASURES}
    texts, pages = [], []
    with progress_bar("sampling", len(parts) * DRAWS) as advance:
        for number, (document, prompt, rest) in enumerate(parts):
            other = parts[number - 1][2]
            runs = []
            for seed in range(DRAWS):
                runs.append(_continuations(retro, database, prompt, length, seed))
                advance()
            for line in (ON, OFF):
                found = [_shares(run[line][0], rest, other, run[ON][1]) for run in runs]
                for name in MEASURES:
                    shares[name][line].append(float(np.mean([one[name] for one in found])))
            if number < SHOWN:
                texts.append(_texts(database, document, prompt, rest, runs[0]))
                pages += _page(database, document, prompt, runs[0])
    facts = {"prompts": f"{PROMPT_CHUNKS * database.chunk_size} tokens of held-out documents", "model": retro.name}
    write_page(lab.folder / "samples.html", "The same prompts, retrieval on and off", pages, facts)
    gains = np.subtract(*(shares[REMAINDER][line] for line in (ON, OFF)))
    return {
        "shares": {name: {line: mean_and_spread(shares[name][line]) for line in (ON, OFF)} for name in MEASURES},
        "gain": {"mean": gains.mean(), "standard_error": gains.std(ddof=1) / np.sqrt(len(gains))},
        "prompts": len(parts), "tokens": length, "page": f"{lab.folder.name}/samples.html", "texts": texts,
    }  # fmt: skip


def prompts_and_rests(database: Database, wanted: int, seed: int = 0) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Held-out documents in an order of chance: number, first PROMPT_CHUNKS chunks, and the tokens behind them.

    Those with as much again behind the prompt; at most `wanted`.
    """
    split = database.split("valid")
    documents = np.asarray(split.documents)
    numbers, starts, counts = np.unique(documents, return_index=True, return_counts=True)
    long = np.flatnonzero(counts >= 2 * PROMPT_CHUNKS)
    parts = []
    for place in np.random.default_rng(seed).permutation(long)[:wanted]:
        tokens = split.tokens[starts[place] : starts[place] + counts[place]].reshape(-1).astype(np.int64)
        cut = PROMPT_CHUNKS * database.chunk_size
        rest = tokens[cut:]
        parts.append((int(numbers[place]), tokens[:cut], rest[(rest != PADDING) & (rest != END_OF_TEXT)]))
    return parts


def runs_of(tokens) -> list[tuple[int, ...]]:
    """All runs of N tokens of rows (..., n), those with padding left out."""
    tokens = np.asarray(tokens)
    if tokens.shape[-1] < N:
        return []
    windows = sliding_window_view(tokens, N, axis=-1).reshape(-1, N)
    return list(map(tuple, windows[(windows != PADDING).all(axis=1)].tolist()))


def shared(tokens, text) -> float:
    """The share of a row's runs of N tokens that stand in `text`, (..., n); 0 where it has no run."""
    runs, there = runs_of(tokens), set(runs_of(text))
    return sum(run in there for run in runs) / max(1, len(runs))


def repeated(tokens) -> float:
    """The share of a row's runs of N tokens that it had before; 0 where it has no run."""
    runs = runs_of(tokens)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _continuations(retro, database, prompt, length, seed):
    """By line: the new tokens, and what was retrieved for them."""
    made = {}
    for line, source in ((ON, database), (OFF, None)):
        made[line] = generate(
            retro.params, retro.config, prompt, length, database=source, k=recipe.NEIGHBOURS, top_p=NUCLEUS, seed=seed,
            stop_token=END_OF_TEXT,
        )  # fmt: skip
    return made


def _shares(sample, rest, other, retrieved):
    values = np.stack([item.values for item in retrieved if item.chunk >= PROMPT_CHUNKS - 1])
    return {
        REMAINDER: shared(sample, rest), OTHER: shared(sample, other), RETRIEVED: shared(sample, values),
        REPEATED: repeated(sample),
    }  # fmt: skip


def _texts(database, document, prompt, rest, run):
    rows = {"prompt": prompt, "rest": rest[: max(map(len, (run[ON][0], run[OFF][0])))]}
    rows |= {line: run[line][0] for line in (ON, OFF)}
    return {"document": database.documents[document]["name"]} | {name: database.text(row) for name, row in rows.items()}


def _page(database, document, prompt, run):
    name = database.documents[document]["name"]
    return [
        {"heading": f"{name}, {line}", "chunks": show_chunks(prompt, *run[line], database)} for line in (ON, OFF)
    ]  # fmt: skip


def draw(figures, path):
    """Two bars a measure, and each prompt as a dot on each, joined."""
    figure, axes = figure_and_axes()
    for place, name in enumerate(MEASURES):
        lines = figures["shares"][name]
        for shift, line in ((-0.2, ON), (0.2, OFF)):
            axes.bar(
                place + shift, 100 * lines[line]["mean"], 0.38, color=COLOURS[line], alpha=0.5,
                label=line if place == 0 else None,
            )  # fmt: skip
        for pair in zip(lines[ON]["seeds"], lines[OFF]["seeds"], strict=True):
            axes.plot([place - 0.2, place + 0.2], 100 * np.array(pair), "o-", color="#444444", ms=2, lw=0.4)
    axes.set_xticks(range(len(MEASURES)), MEASURES)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"% of a continuation's token {N}-grams found in …")
    axes.legend(frameon=False)
    finish(figure, axes, path)


def verdict(figures):
    """Whether continuations with retrieval have more of the document's rest than those without, by two errors."""
    shares, gain = figures["shares"], figures["gain"]
    percent = {(name, line): 100 * shares[name][line]["mean"] for name in MEASURES for line in (ON, OFF)}
    pairs = list(zip(shares[REMAINDER][ON]["seeds"], shares[REMAINDER][OFF]["seeds"], strict=True))
    more, fewer = sum(on > off for on, off in pairs), sum(on < off for on, off in pairs)

    def both(name):
        return f"{percent[name, ON]:.1f} % with retrieval, {percent[name, OFF]:.1f} % without"

    return gain["mean"] > 2 * gain["standard_error"], (
        f"Of a continuation's token {N}-grams there stand in the rest of the prompt's document {both(REMAINDER)} "
        f"(difference {100 * gain['mean']:+.1f} ± {100 * gain['standard_error']:.1f} points, one standard error; more "
        f"in {more} and fewer in {fewer} of {figures['prompts']} prompts); in another document's rest {both(OTHER)}; "
        f"in what was retrieved {both(RETRIEVED)}; in the continuation itself, before: {both(REPEATED)}."
    )


EXPERIMENT = Experiment(
    "Samples with and without retrieval",
    "Samples with retrieval stay on the prompt's topic and take runs of tokens from what was retrieved (tables 6, 7 "
    "and 16–21). The paper shows texts; counts of shared runs are ours.",
    measure,
    draw,
    verdict,
    over_seeds=False,
)
