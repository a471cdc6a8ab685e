"""An HTML page that shows how a RETRO reads a text: what each chunk retrieved, and what each token gained and read."""

import hashlib
import math
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2  # noqa: F401  # A missing package is reported before the model runs, not when the page is written.
import numpy as np

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import bits_per_byte
from retro_np.evaluation.leakage import LEAKAGE_NEIGHBOURS
from retro_np.evaluation.likelihood import token_nats
from retro_np.generation import Retrieved
from retro_np.kernels.substring import longest_common_substring
from retro_np.nn.attention_maps import attention_maps
from retro_np.nn.cca import read_part
from retro_np.nn.memory import model_neighbours
from retro_np.progress import counted, progress_bar
from retro_np.report.samples import Chunk, show_chunks, write_template
from retro_np.retrieval.database import Database
from retro_np.retrieval.tokenizer import token_byte_lengths
from retro_np.sequences import check_fit
from retro_np.tree import Tree

MAX_PAGE_TOKENS = 2048
MAX_PAGE_NEIGHBOURS = 100  # neighbours per chunk
WHOLE = 9999  # stands for an attention weight of 1 on the page, where weights are integers


@dataclass(frozen=True)
class Inspection:
    """The chunks of a text in order, and the bits per byte of all of them with and without retrieval.

    bits_on: None for a model without cross-attention, which reads nothing that is retrieved. shared: whether a token's
    weights sum to a share of its attention, because what is retrieved is read beside the text (nn/memory.py)."""

    chunks: list[Chunk]
    bits_on: float | None
    bits_off: float
    shared: bool = False


def check_request(config: RetroConfig, n_tokens: int, k: int) -> None:
    """Raise UserError for fewer than 2 or over `page_tokens` tokens, and for k that a page cannot show."""
    if not 2 <= n_tokens <= page_tokens(config):
        size = f"too {'short' if n_tokens < 2 else 'long'} for a page, with {counted(n_tokens, 'token')}"
        most = f"{page_tokens(config):,}"
        raise UserError(f"the text is {size}: give from 2 (the first is not predicted) to {most} tokens")
    if not 1 <= k <= MAX_PAGE_NEIGHBOURS:
        raise UserError(f"k is {k:,}, but a page shows 1 to {MAX_PAGE_NEIGHBOURS} neighbours per chunk")


def page_tokens(config: RetroConfig) -> int:
    """How many tokens a page about a model can show: not more than a decoder that others trained has positions."""
    return int(min(MAX_PAGE_TOKENS, getattr(config, "max_positions", MAX_PAGE_TOKENS)))


def inspect(
    params: Tree, config: RetroConfig, database: Database, tokens: Sequence[int] | np.ndarray, *, k: int = 2,
    n_prompt: int = 0, retrieved: Iterable[Retrieved] = (),
) -> Inspection:  # fmt: skip
    """Run a text through a RETRO with retrieval on and off, and record each token's losses and attention weights.

    A model without cross-attention is run once; what is retrieved is shown, although it does not read that.

    tokens: (n,), of which the first n_prompt are the prompt of a sample. Each complete chunk retrieves its k nearest
    values. A token's weights are those of the position before it, which predicts it, averaged over heads and CCA
    layers. retrieved: what `generate` retrieved for a sample with this k. It replaces the search results, because an
    approximate index may answer differently when it is searched for all chunks together.
    Raises UserError as `check_request` does, and for damaged weights."""
    tokens = np.asarray(tokens, np.int64)
    check_fit(config, database)
    check_request(config, len(tokens), k)
    m, n = config.chunk_size, len(tokens)
    complete = tokens[: n // m * m].reshape(-1, m)
    ids, distances, leakage = _search(database, complete, k)
    for item in retrieved:
        if item.chunk < len(complete):
            ids[item.chunk], distances[item.chunk] = item.ids, item.distances
    values = database.value(ids)  # (l, k, 2m)
    neighbours = values[None] if len(complete) else None
    x, targets = tokens[None], np.append(tokens[1:], -1)[None]
    # Rolled by one, the losses stand at the tokens that they are of. The first token is not predicted.
    contexts = {"bits_on": neighbours, "bits_off": None} if config.retrieves else {"bits_off": None}
    nats = {}
    with progress_bar("inspecting", len(contexts) + 1) as advance:
        for name, read in contexts.items():
            nats[name] = np.roll(token_nats(params, config, x, targets, read)[0][0], 1)
            if not np.isfinite(nats[name]).all():
                raise UserError("the model's losses are not finite: its weights are damaged; use another checkpoint")
            advance()
        reads = _reads(params, config, tokens, model_neighbours(params, config, contexts.get("bits_on")))
    lengths = token_byte_lengths(database.tokenizer)
    # A sample may have tokens that another's model has, but its tokenizer has not: they have no bytes.
    n_bytes = np.where(tokens < len(lengths), lengths[np.minimum(tokens, len(lengths) - 1)], 0)
    n_bytes[0] = 0

    def bits(part: slice) -> dict[str, Any]:
        return {name: bits_per_byte(array[part], n_bytes[part]) for name, array in nats.items() if n_bytes[part].any()}

    columns = {name: [None, *array[1:].tolist()] for name, array in nats.items()}
    figures = columns.get("bits_on", [None] * n), columns["bits_off"], reads
    rows = [Retrieved(u, *row) for u, row in enumerate(zip(ids, distances, values, strict=True))]
    ratios = [*leakage.tolist(), None]
    chunks = [
        replace(chunk, leakage=ratios[chunk.number], **bits(slice(chunk.number * m, (chunk.number + 1) * m)))
        for chunk in show_chunks(tokens[:n_prompt], tokens[n_prompt:], rows, database, figures)
    ]
    return Inspection(chunks, **{"bits_on": None} | bits(slice(None)), shared=config.reads_itself)


def _search(database, chunks, k):
    """Ids and squared distances, (l, k), of the values nearest to each chunk, and each chunk's leakage, (l,).

    chunks: (l, m). Leakage: the longest run shared with one of the first LEAKAGE_NEIGHBOURS values, divided by m."""
    if not len(chunks):
        return np.zeros((0, k), np.int64), np.zeros((0, k)), np.zeros(0)
    ids, distances = database.search_keys(database.embed_chunks(chunks), max(k, LEAKAGE_NEIGHBOURS))
    longest = longest_common_substring(chunks, database.value(ids[:, :LEAKAGE_NEIGHBOURS]), database.padding)
    return ids[:, :k], distances[:, :k], longest / chunks.shape[1]


def _reads(params, config, tokens, neighbours) -> list[list[int]]:
    """For each token, the weights of the k · 2m retrieved tokens when it is predicted, in units of 1 / WHOLE."""
    if neighbours is None:
        return [[] for _ in tokens]
    maps = attention_maps(params, config, tokens[None], neighbours)
    weights = np.mean([w[0].mean(axis=1) for name, w in maps.items() if name.endswith("cca")], axis=0)  # (l, m, k, r)
    m = config.chunk_size
    full = np.zeros((*weights.shape[:3], 2 * m))
    read_part(full, config)[...] = weights
    rows = np.rint(WHOLE * full.reshape(len(full) * m, -1)).astype(int)
    # Row i of `rows`, over all attending chunks, is the query at position m − 1 + i, which predicts token m + i.
    return ([[]] * m + rows.tolist())[: len(tokens)]


def write_inspection(path: Path | str, title: str, facts: dict[str, str], inspection: Inspection) -> None:
    """Write one self-contained HTML page. facts: name → text, listed at the top. All text is escaped."""
    script = files("retro_np.report").joinpath("inspection.js").read_text(encoding="utf-8")
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shown = [token for chunk in inspection.chunks for token in chunk.tokens if token.off is not None]
    gains = [abs(token.off - (token.on or 0)) for token in shown if token.off is not None]
    write_template(
        path, "inspection.html", title=title, facts=facts, inspection=inspection, script=script,
        script_hash=f"sha256-{digest}", whole=WHOLE, strongest=min(max(gains, default=0), math.log(16)) or 1.0,
        reads=[[token.reads for token in chunk.tokens] for chunk in inspection.chunks],
    )  # fmt: skip
