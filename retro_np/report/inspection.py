"""A text under a RETRO, taken apart for one page: what each chunk retrieved, and what each token gained and read."""

import hashlib
import math
import re
from base64 import b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from jinja2 import Environment

from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import bits_per_byte, nats_of
from retro_np.evaluation.leakage import NEIGHBOURS
from retro_np.files import write_atomically
from retro_np.generation import Retrieved
from retro_np.kernels.substring import common_prefix_lengths, longest_common_substring
from retro_np.nn.model import attention_maps, read_part, retro
from retro_np.report.samples import BACKGROUNDS, FOREGROUNDS, LONGEST
from retro_np.retrieval.database import Database
from retro_np.retrieval.tokenizer import token_byte_lengths, token_texts
from retro_np.sequences import check_fit

MOST_TOKENS, MOST_NEIGHBOURS = 2048, 100  # on a page, and of a chunk
WHOLE = 999  # what a weight of 1 is on the page, which holds integers
# control characters, but for tab and line ends, and those that turn the direction of writing
UNSEEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Token:
    """A token of the text. on, off: nats it cost with retrieval and without; None where it was not predicted."""

    text: str
    on: float | None
    off: float | None
    run: int  # the longest run of tokens, ending here, that stands in a value which its chunk read; at most LONGEST
    reads: list[int]  # weights, of WHOLE, of the k · 2m retrieved tokens; empty where none were read
    prompt: bool


@dataclass(frozen=True)
class Value:
    """A retrieved value [N, F], its document, and its squared distance from the chunk that retrieved it."""

    document: str
    distance: float
    texts: list[str]  # of N's m tokens, and of F's m
    runs: list[int]  # of each, in the chunk that reads it


@dataclass(frozen=True)
class Chunk:
    """A chunk of the text. bits_on, bits_off: per byte, None where no token was scored; leakage: r(C), if whole."""

    tokens: list[Token]
    values: list[Value]  # retrieved by this chunk, read by the next
    bits_on: float | None
    bits_off: float | None
    leakage: float | None


@dataclass(frozen=True)
class Inspection:
    """Chunks in order, and bits per byte of all of them."""

    chunks: list[Chunk]
    bits_on: float
    bits_off: float


def check_request(config, n_tokens: int, k: int) -> None:
    """Raise UserError for what no page can show; see `inspect`."""
    if not config.retrieves:
        raise UserError("the checkpoint is a baseline, which reads no neighbours: inspect a RETRO")
    if n_tokens < 2:
        raise UserError("the text is too short: the first token is predicted by nothing, so give at least two")
    if n_tokens > MOST_TOKENS:
        raise UserError(f"the text has {n_tokens:,} tokens, and a page shows at most {MOST_TOKENS:,}: cut it")
    if not 1 <= k <= MOST_NEIGHBOURS:
        raise UserError(f"k is {k:,}: a page shows from 1 to {MOST_NEIGHBOURS} neighbours of a chunk")


def inspect(
    params, config, database: Database, tokens, *, k: int = 2, n_prompt: int = 0, retrieved: Iterable[Retrieved] = ()
) -> Inspection:
    """Run a text through a RETRO with retrieval on and off, and keep what each token cost and read.

    tokens: (n,), at least two; each whole chunk retrieves its k nearest values from the database. The weights of a
    token are those of the position that predicts it, the one before, averaged over heads and CCA layers: all of what a
    chunk reads was thus retrieved by the chunk before. Of a sample: n_prompt, so many of the tokens were given;
    retrieved, what `generate` found for k, which is then not looked for again (a graph that is asked for one chunk, and
    not for all, may answer otherwise).
    Raises UserError for a baseline, which reads nothing, for fewer than two tokens or more than MOST_TOKENS, and for
    more than MOST_NEIGHBOURS neighbours.
    """
    tokens = np.asarray(tokens, np.int64)
    check_fit(config, database)
    check_request(config, len(tokens), k)
    m, n = config.chunk_size, len(tokens)
    whole = tokens[: n // m * m].reshape(-1, m)
    ids, distances, leakage = _retrieved(database, whole, max(k, NEIGHBOURS))
    ids, distances = ids[:, :k], distances[:, :k]
    for item in retrieved:
        if item.chunk < len(whole):
            ids[item.chunk], distances[item.chunk] = item.ids, item.distances
    values = database.value(ids)  # (l, k, 2m)
    neighbours = values[None] if len(whole) else None

    targets = np.append(tokens[1:], 0)[None]
    on, off = (nats_of(retro(params, config, tokens[None], given)[0], targets)[0] for given in (neighbours, None))
    if not (np.all(np.isfinite(on)) and np.all(np.isfinite(off))):
        raise UserError("the model's losses are not finite: its weights are damaged, take another checkpoint")
    reads = _reads(params, config, tokens, neighbours)
    lengths = token_byte_lengths(database.tokenizer)
    texts = token_texts(database.tokenizer, tokens)

    chunks = []
    for number in range(-(-n // m)):
        begin, end = number * m, min(n, (number + 1) * m)
        runs = np.zeros(end - begin, np.int64)
        if number:
            runs = common_prefix_lengths(tokens[begin:end], values[number - 1])
        shown = [
            Token(
                texts[t], float(on[t - 1]) if t else None, float(off[t - 1]) if t else None,
                min(int(runs[t - begin]), LONGEST), reads.get(t, []), t < n_prompt,
            )
            for t in range(begin, end)
        ]  # fmt: skip
        scored = slice(max(begin, 1), end)
        n_bytes = lengths[tokens[scored]]
        bits = [
            bits_per_byte(nats[scored.start - 1 : end - 1], n_bytes) if n_bytes.sum() else None for nats in (on, off)
        ]
        kept = (
            _values(database, ids[number], distances[number], values[number], tokens[end : end + m])
            if (number < len(whole))
            else []
        )
        chunks.append(Chunk(shown, kept, *bits, float(leakage[number]) if number < len(whole) else None))
    totals = [bits_per_byte(nats[: n - 1], lengths[tokens[1:]]) for nats in (on, off)]
    return Inspection(chunks, *totals)


def _retrieved(database, whole, k):
    """Ids and squared distances (l, k) of whole chunks (l, m), and r(C) of each over its NEIGHBOURS nearest values."""
    if not len(whole):
        return np.zeros((0, k), np.int64), np.zeros((0, k)), np.zeros(0)
    ids, distances = database.search_keys(database.embed_chunks(whole), k)
    longest = longest_common_substring(whole, database.value(ids[:, :NEIGHBOURS]))
    return ids, distances, longest / whole.shape[1]


def _reads(params, config, tokens, neighbours) -> dict[int, list[int]]:
    """Position → what the position before it read: the weights of k · 2m retrieved tokens, as parts of WHOLE."""
    if neighbours is None:
        return {}
    maps = attention_maps(params, config, tokens[None], neighbours)
    weights = np.mean([w[0].mean(axis=1) for name, w in maps.items() if name.endswith("cca")], axis=0)  # (l, m, k, r)
    m = config.chunk_size
    full = np.zeros((*weights.shape[:3], 2 * m))
    read_part(full, config)[...] = weights
    rows = np.rint(WHOLE * full.reshape(len(full) * m, -1)).astype(int)
    # row i of attending chunk u is the query at u·m + m − 1 + i, counted from 0, which predicts the token after it
    return {m + i: rows[i].tolist() for i in range(len(rows)) if m + i < len(tokens)}


def _values(database, ids, distances, values, reader):
    shown = []
    for chunk, distance, value in zip(ids, distances, values, strict=True):
        runs = common_prefix_lengths(value, reader[None]) if len(reader) else np.zeros(len(value), np.int64)
        name = database.documents[int(database.document_of(chunk))]["name"] if chunk >= 0 else "nothing more was found"
        texts = token_texts(database.tokenizer, value)
        shown.append(Value(name, float(distance), texts, np.minimum(runs, LONGEST).tolist()))
    return shown


def visible(text: str) -> str:
    """A text whose control characters are seen: what has no shape, and what turns the direction of writing."""
    return UNSEEN.sub(lambda found: chr(0x2400 + ord(found[0])) if found[0] < " " else f"[U+{ord(found[0]):04X}]", text)


def write_inspection(path, title: str, facts: dict[str, str], inspection: Inspection) -> None:
    """One self-contained HTML page, without network. All text in it is escaped, and control characters are shown."""
    folder = files("retro_np.report")
    template, script = (folder.joinpath(f"inspection.{kind}").read_text(encoding="utf-8") for kind in ("html", "js"))
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = visible
    page = environment.from_string(template)
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    spread = max([abs(t.off - t.on) for c in inspection.chunks for t in c.tokens if t.on is not None] or [0])
    rendered = page.render(
        title=title, facts=facts, inspection=inspection, script=script, script_hash=f"sha256-{digest}",
        whole=WHOLE, longest=LONGEST,
        colours=list(zip(range(LONGEST + 1), BACKGROUNDS, FOREGROUNDS, strict=True)),
        strongest=min(spread, math.log(16)) or 1.0,
        reads=[[token.reads for token in chunk.tokens] for chunk in inspection.chunks],
    )  # fmt: skip
    write_atomically(path, rendered.encode())
