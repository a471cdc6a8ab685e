"""Samples with and without retrieval

Does a continuation stay on topic? The first chunks of held-out documents are continued with retrieval on and off.
One model continues each prompt twice with the same random numbers. The measures are the shares of a continuation's
token 4-grams that also occur in the rest of the prompt's document, in the rest of another document (the control), in
the values retrieved with retrieval on (for both continuations), and earlier in the continuation itself.

Samples with retrieval stay on the prompt's topic and take runs of tokens from what was retrieved (tables 6, 7,
20 and 21). The paper shows texts; the counts of shared 4-grams are ours."""

from functools import partial
from typing import Any

import numpy as np

from retro_np.evaluation.compare import OFF, ON
from retro_np.experiments import recipe
from retro_np.experiments.experiment import Figures, Picture, Verdict, sentence
from retro_np.experiments.lab import Lab, mean_and_spread
from retro_np.generation import generate
from retro_np.progress import progress_bar
from retro_np.report.plots import COLOURS, new_plot
from retro_np.report.samples import show_chunks, write_page
from retro_np.retrieval.database import Database
from retro_np.retrieval.documents import document_runs
from retro_np.retrieval.vocabulary import PADDING

N = 4  # tokens per n-gram
PROMPT_CHUNKS = 4
PROMPTS, LENGTH, DRAWS = 24, 128, 3  # prompts, tokens of a continuation, continuations per prompt
TINY_PROMPTS, TINY_LENGTH = 3, 32
REMAINDER, OTHER, RETRIEVED, REPEATED = "rest of its document", "rest of another", "retrieved values", "itself, earlier"
MEASURES = (REMAINDER, OTHER, RETRIEVED, REPEATED)


def measure(lab: Lab) -> Figures:
    """Shares by measure and condition, their paired difference, and a few texts. Also writes samples.html.

    `seeds` has one value per prompt, which is the mean over DRAWS continuations."""
    database = lab.database()
    retro = lab.pair(database, 0)[1]
    n_prompts, length = (TINY_PROMPTS, TINY_LENGTH) if lab.scale.name == "tiny" else (PROMPTS, LENGTH)
    parts = prompts_and_rests(database, n_prompts)
    settings: dict[str, Any] = {"length": length, "k": recipe.NEIGHBOURS, "top_p": 0.9}
    shares = {line: np.empty((len(MEASURES), len(parts))) for line in (ON, OFF)}
    texts, pages = [], []
    with progress_bar("sampling", len(parts)) as advance:
        for number, (document, prompt, rest) in enumerate(parts):
            go_on = partial(generate, retro.params, retro.config, prompt, stop_token=database.end_of_text, **settings)
            runs = [{ON: go_on(database=database, seed=seed), OFF: go_on(seed=seed)} for seed in range(DRAWS)]
            for line in (ON, OFF):
                draws = [_shares(run[line][0], rest, parts[number - 1][2], run[ON][1]) for run in runs]
                shares[line][:, number] = np.mean(draws, axis=0)
            if number < 4:  # Only these texts are part of the result.
                name = database.documents[document]["name"]
                samples = {line: sample for line, (sample, _) in runs[0].items()}
                rows = {"prompt": prompt, "rest": rest[: max(map(len, samples.values()))]} | samples
                texts.append({"document": name} | {part: database.text(row) for part, row in rows.items()})
                for line, (sample, retrieved) in runs[0].items():
                    chunks = show_chunks(prompt, sample, retrieved, database)
                    pages.append({"heading": f"{name}, {line}", "chunks": chunks})
            advance()
    facts = {"prompts": f"{PROMPT_CHUNKS * database.chunk_size} tokens of held-out documents", "model": retro.name}
    write_page(lab.folder / "samples.html", "The same prompts with retrieval on and off", pages, facts)
    gains = shares[ON][0] - shares[OFF][0]  # MEASURES begins with the rest of the prompt's document
    by_name = {name: {line: mean_and_spread(shares[line][i]) for line in shares} for i, name in enumerate(MEASURES)}
    return {
        "shares": by_name, "gain": {"mean": gains.mean(), "standard_error": gains.std(ddof=1) / np.sqrt(len(gains))},
        "prompts": len(parts), "tokens": length, "page": f"{lab.folder.name}/samples.html", "texts": texts,
    }  # fmt: skip


def prompts_and_rests(database: Database, n_prompts: int, seed: int = 0) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Draw at most n_prompts held-out documents: the number, prompt and remaining tokens of each.

    The prompt is the first PROMPT_CHUNKS chunks. Only documents of at least twice as many chunks are drawn."""
    split, cut = database.split("valid"), PROMPT_CHUNKS * database.chunk_size
    runs = [(start, stop) for start, stop in document_runs(split.documents[:]) if stop - start >= 2 * PROMPT_CHUNKS]
    parts = []
    for start, stop in np.random.default_rng(seed).permutation(runs)[:n_prompts]:
        tokens = split.tokens[start:stop].reshape(-1).astype(np.int64)
        rest = tokens[cut:][~np.isin(tokens[cut:], (split.padding, split.end_of_text))]
        parts.append((int(split.documents[start]), tokens[:cut], rest))
    return parts


def n_grams(tokens: np.ndarray) -> list[tuple[int, ...]]:
    """All N-grams of rows of tokens (..., n), except those with padding."""
    rows = np.reshape(tokens, (-1, max(1, np.shape(tokens)[-1]))).tolist()
    slices = (zip(*(row[i:] for i in range(N)), strict=False) for row in rows)
    return [gram for grams in slices for gram in grams if PADDING not in gram]


def shared(tokens: np.ndarray, text: np.ndarray) -> float:
    """The share of a row's N-grams that occur in `text`, (..., n); 0 for a row of fewer than N tokens."""
    grams, others = n_grams(tokens), set(n_grams(text))
    return sum(gram in others for gram in grams) / max(1, len(grams))


def repeated(tokens: np.ndarray) -> float:
    """The share of a row's N-grams that occur in it earlier; 0 for a row of fewer than N tokens."""
    grams = n_grams(tokens)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _shares(sample, rest, other_rest, retrieved):
    """The share of each of MEASURES."""
    values = np.stack([item.values for item in retrieved if item.chunk >= PROMPT_CHUNKS - 1])
    return [*(shared(sample, text) for text in (rest, other_rest, values)), repeated(sample)]


def draw(figures: Figures, path: Picture) -> None:
    """Two bars per measure, and two joined dots for each prompt."""
    label, columns = f"share of token {N}-grams found in … (%)", np.arange(len(MEASURES))
    shifts = {ON: -0.2, OFF: 0.2}
    with new_plot(path, "", label, xticks=columns, xticklabels=MEASURES) as axes:
        for line, shift in shifts.items():
            means = [100 * figures["shares"][name][line]["mean"] for name in MEASURES]
            axes.bar(columns + shift, means, 0.38, color=COLOURS[line], alpha=0.5, label=line)
        for column, name in enumerate(MEASURES):
            pairs = 100 * np.array([figures["shares"][name][line]["seeds"] for line in shifts])
            axes.plot([column + shift for shift in shifts.values()], pairs, "o-", color="#444444", ms=2, lw=0.4)
        axes.set_ylim(bottom=0)


def verdict(figures: Figures) -> Verdict:
    """Whether retrieval raises the share found in the rest of the document by more than two standard errors."""
    shares, gain = figures["shares"], figures["gain"]
    pairs = list(zip(shares[REMAINDER][ON]["seeds"], shares[REMAINDER][OFF]["seeds"], strict=True))
    values = {"higher": sum(on > off for on, off in pairs), "lower": sum(on < off for on, off in pairs)}
    agrees = gain["mean"] > 2 * gain["standard_error"]
    return agrees, sentence(__name__, figures, n=N, measures=MEASURES, **values)
