"""Does a continuation stay on topic? The first chunks of held-out documents are continued with retrieval on and off.

One model continues each prompt twice with the same random numbers. The measures are the shares of a continuation's
token 4-grams that also occur in the rest of the prompt's document, in the rest of another document (the control), in
the values retrieved with retrieval on, and earlier in the continuation itself. The continuation without retrieval is
compared with the same values, which shows how much it shares with them without reading them.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from retro_np.evaluation.compare import OFF, ON
from retro_np.experiments import recipe
from retro_np.experiments.experiment import Experiment, Figures, Verdict
from retro_np.experiments.lab import Lab, mean_and_spread
from retro_np.generation import generate
from retro_np.progress import progress_bar
from retro_np.report.plots import COLOURS, new_axes, save_plot
from retro_np.report.samples import write_page
from retro_np.report.shown import show_chunks
from retro_np.retrieval.database import Database
from retro_np.retrieval.tokenizer import END_OF_TEXT, PADDING

N = 4  # tokens per n-gram
PROMPT_CHUNKS = 4
PROMPTS, LENGTH, DRAWS = 24, 128, 3  # prompts, tokens of a continuation, continuations per prompt
TINY_PROMPTS, TINY_LENGTH = 3, 32
TOP_P = 0.9
SHOWN = 4  # prompts whose texts are part of the result
REMAINDER, OTHER, RETRIEVED, REPEATED = "rest of its document", "rest of another", "retrieved values", "itself, earlier"
MEASURES = (REMAINDER, OTHER, RETRIEVED, REPEATED)


def measure(lab: Lab) -> Figures:
    """Shares by measure and condition, their paired difference, and a few texts. Also writes samples.html.

    `seeds` has one value per prompt, which is the mean over DRAWS continuations.
    """
    database = lab.database()
    retro = lab.pair(database, 0)[1]
    n_prompts, length = (TINY_PROMPTS, TINY_LENGTH) if lab.scale.name == "tiny" else (PROMPTS, LENGTH)
    parts = prompts_and_rests(database, n_prompts)
    shares: dict[str, Any] = {name: {line: [] for line in (ON, OFF)} for name in MEASURES}
    texts, pages = [], []
    with progress_bar("sampling", len(parts) * DRAWS) as advance:
        for number, (document, prompt, rest) in enumerate(parts):
            other_rest = parts[number - 1][2]
            runs = []
            for seed in range(DRAWS):
                runs.append(_continuations(retro, database, prompt, length, seed))
                advance()
            for line in (ON, OFF):
                draws = [_shares(run[line][0], rest, other_rest, run[ON][1]) for run in runs]
                for name in MEASURES:
                    shares[name][line].append(np.mean([draw[name] for draw in draws]))
            if number < SHOWN:
                name = database.documents[document]["name"]
                texts.append({"document": name} | _texts(database, prompt, rest, runs[0]))
                for line, (sample, retrieved) in runs[0].items():
                    chunks = show_chunks(prompt, sample, retrieved, database)
                    pages.append({"heading": f"{name}, {line}", "chunks": chunks})
    facts = {"prompts": f"{PROMPT_CHUNKS * database.chunk_size} tokens of held-out documents", "model": retro.name}
    write_page(lab.folder / "samples.html", "The same prompts with retrieval on and off", pages, facts)
    gains = np.subtract(*(shares[REMAINDER][line] for line in (ON, OFF)))
    return {
        "shares": {name: {line: mean_and_spread(shares[name][line]) for line in (ON, OFF)} for name in MEASURES},
        "gain": {"mean": gains.mean(), "standard_error": gains.std(ddof=1) / np.sqrt(len(gains))},
        "prompts": len(parts), "tokens": length, "page": f"{lab.folder.name}/samples.html", "texts": texts,
    }  # fmt: skip


def prompts_and_rests(database: Database, n_prompts: int, seed: int = 0) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Draw at most n_prompts held-out documents: the number, prompt and remaining tokens of each.

    The prompt is the first PROMPT_CHUNKS chunks. Only documents of at least twice as many chunks are drawn.
    """
    split = database.split("valid")
    documents = np.asarray(split.documents)
    numbers, starts, counts = np.unique(documents, return_index=True, return_counts=True)
    eligible = np.flatnonzero(counts >= 2 * PROMPT_CHUNKS)
    parts = []
    for i in np.random.default_rng(seed).permutation(eligible)[:n_prompts]:
        tokens = split.tokens[starts[i] : starts[i] + counts[i]].reshape(-1).astype(np.int64)
        cut = PROMPT_CHUNKS * database.chunk_size
        rest = tokens[cut:]
        parts.append((int(numbers[i]), tokens[:cut], rest[(rest != PADDING) & (rest != END_OF_TEXT)]))
    return parts


def n_grams(tokens: np.ndarray) -> list[tuple[int, ...]]:
    """All N-grams of rows of tokens (..., n), except those with padding."""
    tokens = np.asarray(tokens)
    if tokens.shape[-1] < N:
        return []
    windows = sliding_window_view(tokens, N, axis=-1).reshape(-1, N)
    return list(map(tuple, windows[(windows != PADDING).all(axis=1)].tolist()))


def shared(tokens: np.ndarray, text: np.ndarray) -> float:
    """The share of a row's N-grams that occur in `text`, (..., n); 0 for a row of fewer than N tokens."""
    grams, others = n_grams(tokens), set(n_grams(text))
    return sum(gram in others for gram in grams) / max(1, len(grams))


def repeated(tokens: np.ndarray) -> float:
    """The share of a row's N-grams that occur in it earlier; 0 for a row of fewer than N tokens."""
    grams = n_grams(tokens)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _continuations(retro, database, prompt, length, seed):
    """For each condition, the new tokens and what was retrieved for them."""
    return {
        line: generate(
            retro.params, retro.config, prompt, length, database=source, k=recipe.NEIGHBOURS, top_p=TOP_P, seed=seed,
            stop_token=END_OF_TEXT,
        )
        for line, source in ((ON, database), (OFF, None))
    }  # fmt: skip


def _shares(sample, rest, other_rest, retrieved):
    values = np.stack([item.values for item in retrieved if item.chunk >= PROMPT_CHUNKS - 1])
    return {
        REMAINDER: shared(sample, rest), OTHER: shared(sample, other_rest), RETRIEVED: shared(sample, values),
        REPEATED: repeated(sample),
    }  # fmt: skip


def _texts(database, prompt, rest, run):
    samples = {line: tokens for line, (tokens, _) in run.items()}
    rows = {"prompt": prompt, "rest": rest[: max(map(len, samples.values()))]} | samples
    return {name: database.text(row) for name, row in rows.items()}


def draw(figures: Figures, path: Path) -> None:
    """Two bars per measure, and two joined dots for each prompt."""
    axes = new_axes(ylabel=f"share of token {N}-grams found in … (%)")
    columns, shifts = np.arange(len(MEASURES)), {ON: -0.2, OFF: 0.2}
    for line, shift in shifts.items():
        means = [100 * figures["shares"][name][line]["mean"] for name in MEASURES]
        axes.bar(columns + shift, means, 0.38, color=COLOURS[line], alpha=0.5, label=line)
    for column, name in enumerate(MEASURES):
        pairs = 100 * np.array([figures["shares"][name][line]["seeds"] for line in shifts])
        axes.plot([column + shift for shift in shifts.values()], pairs, "o-", color="#444444", ms=2, lw=0.4)
    axes.set_xticks(range(len(MEASURES)), MEASURES)
    axes.set_ylim(bottom=0)
    save_plot(axes, path)


def verdict(figures: Figures) -> Verdict:
    """Whether retrieval raises the share found in the rest of the document by more than two standard errors."""
    shares, gain = figures["shares"], figures["gain"]
    percent = {(name, line): 100 * shares[name][line]["mean"] for name in MEASURES for line in (ON, OFF)}
    pairs = list(zip(shares[REMAINDER][ON]["seeds"], shares[REMAINDER][OFF]["seeds"], strict=True))
    higher, lower = sum(on > off for on, off in pairs), sum(on < off for on, off in pairs)

    def on_and_off(name):
        return f"{percent[name, ON]:.1f} % with retrieval and {percent[name, OFF]:.1f} % without"

    return gain["mean"] > 2 * gain["standard_error"], (
        f"The share of a continuation's token {N}-grams that also occur in the rest of the prompt's document is "
        f"{on_and_off(REMAINDER)}. The difference is {100 * gain['mean']:+.1f} ± {100 * gain['standard_error']:.1f} "
        f"points (standard error); retrieval raises the share for {higher} and lowers it for {lower} of "
        f"{figures['prompts']} prompts. For comparison, the share of those in the rest of another document is "
        f"{on_and_off(OTHER)}; in the "
        f"retrieved values, {on_and_off(RETRIEVED)}; earlier in the continuation itself, {on_and_off(REPEATED)}."
    )


EXPERIMENT = Experiment(
    "Samples with and without retrieval",
    "Samples with retrieval stay on the prompt's topic and take runs of tokens from what was retrieved (tables 6, 7 "
    "and 16–21). The paper shows texts; the counts of shared 4-grams are ours.",
    measure, draw, verdict, over_seeds=False, position=14,
)  # fmt: skip
