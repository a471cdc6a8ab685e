"""Build a database: corpus → texts → tokenizer → chunks → keys → indexes → neighbours → manifest. Paper §2.3.

Each stage is a function of files that earlier ones left and leaves its own whole or not at all, so a build that was
killed anywhere goes on where it was and ends in the same bytes. What a stage does to a shard is in `shards.py`; memory
holds a shard, however large the corpus. The layout:

    manifest.json        what is here, and every file's SHA-256; written last
    build.json           what was asked for
    tokenizer.json       documents.jsonl       duplicates.jsonl       tombstones.npy
    hashing.npy          what the hashing embedder counted, where it made the keys
    shards/00000/        tokens.npy documents.npy keys.npy index.hnsw equal.npy: the training documents, which can be
                         retrieved
    splits/valid/00000/  tokens.npy documents.npy keys.npy: the held-out ones, which can't
    neighbours/SPLIT/00000/   ids.npy distances.npy
    work/                what stages leave for later ones; removed at the end
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from retro_np.errors import UserError
from retro_np.files import (
    disk_full_said,
    locked,
    remove_folder,
    remove_partial,
    visible,
    write_array,
    write_atomically,
    write_json,
)
from retro_np.progress import progress_bar
from retro_np.renamed import accept_old_names, new_names
from retro_np.retrieval import stages
from retro_np.retrieval.corpus import Corpus, Source, check_apart, find_corpus, held_out, limited, place_of
from retro_np.retrieval.database import Database
from retro_np.retrieval.deduplicate import DedupConfig
from retro_np.retrieval.documents import Documents, chained, in_order, survey, write_records
from retro_np.retrieval.hashing import D_KEY, HashingEmbedder, load_hashing, save_hashing
from retro_np.retrieval.index import EF_MARGIN
from retro_np.retrieval.manifest import (
    DOCUMENTS,
    DUPLICATES,
    FORMAT,
    HASHING,
    MANIFEST,
    REQUEST,
    SPLITS,
    TOKENIZER,
    WORK,
    file_facts,
    file_names,
    manifest_bytes,
    read_manifest,
    sealed,
    tombstones_of,
)
from retro_np.retrieval.texts import FACTS, corpus_digest, read_texts, write_texts
from retro_np.retrieval.tokenizer import (
    check_vocabulary_size,
    load_tokenizer,
    pieces_of,
    save_tokenizer,
    tokenizer_sha256,
    train_tokenizer,
)
from retro_np.retrieval.workers import Runner, workers

NEAR_DUPLICATE = DedupConfig()
WHOLE_NUMBERS = (
    "chunk_size", "vocabulary_size", "neighbours", "extra_candidates", "limit_bytes", "shard_bytes", "tokenizer_bytes",
    "d_key",
)  # fmt: skip
HASHED = "hashing"  # as embedder: hashed unigrams and bigrams of tokens, weighted by what the build counts
LONGEST_CHUNK, MOST_NEIGHBOURS = 65_536, 10_000  # far beyond use: a mistake is refused before anything is made


@accept_old_names
@dataclass(frozen=True)
class BuildConfig:
    """How to cut and index a corpus."""

    chunk_size: int = 64  # m
    vocabulary_size: int = 4096
    tokenizer: str | None = None  # an existing tokenizer.json; None: train one on the training documents
    held_out: float = 0.1  # share of documents, chosen by a hash of the name
    key_dtype: str = "float32"
    neighbours: int = 10  # k kept for each chunk
    extra_candidates: int = 22  # more candidates, for those that a training sequence's documents exclude
    limit_bytes: int | None = None  # a slice of the corpus, about so many bytes of text
    shard_bytes: int = 32_000_000  # of text, about; what memory holds
    tokenizer_bytes: int = 16_000_000  # of text that a tokenizer is trained on, about
    duplicates: DedupConfig | None = NEAR_DUPLICATE  # training documents this like a held-out one are left out
    include: tuple[str, ...] = ()  # globs: which files of a folder
    exclude: tuple[str, ...] = ()
    d_key: int = D_KEY  # of the hashing embedder
    training_neighbours: bool = True  # False: of held-out chunks alone, to evaluate and sample: much sooner built

    def __post_init__(self):
        for name in WHOLE_NUMBERS:
            value = getattr(self, name)
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if not whole and not (value is None and name == "limit_bytes"):
                raise UserError(f"{name} is a whole number, not {value!r}")
        if not isinstance(self.held_out, int | float) or not isinstance(self.duplicates, DedupConfig | None):
            raise UserError("held_out is a number, and duplicates are a DedupConfig or None")
        if self.chunk_size < 1 or self.neighbours < 1 or self.extra_candidates < 0:
            raise UserError("chunk_size and neighbours are at least 1, extra_candidates at least 0")
        if self.chunk_size > LONGEST_CHUNK or self.neighbours + self.extra_candidates > MOST_NEIGHBOURS:
            raise UserError(
                f"chunk_size is at most {LONGEST_CHUNK:,}; neighbours + extra_candidates at most {MOST_NEIGHBOURS:,}"
            )
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out is a share of at least 0 and below 1, not {self.held_out}")
        if self.key_dtype not in ("float16", "float32"):
            raise UserError(f"keys are float16 or float32, not {self.key_dtype}")
        if self.limit_bytes is not None and self.limit_bytes < 1:
            raise UserError("a slice of the corpus has at least one byte")
        if self.shard_bytes < 1 or self.tokenizer_bytes < 1:
            raise UserError("a shard, and what a tokenizer is trained on, have at least one byte")
        if self.d_key < 1:
            raise UserError(f"a key has at least one entry, not {self.d_key}")
        if self.tokenizer is None:
            check_vocabulary_size(self.vocabulary_size)


def build_database(
    source: str | Path | list[Source], out: str | Path, config: BuildConfig, embedder, dask: str | None = None
) -> Database:
    """Build a database from a corpus (see `corpus.find_corpus`), go on with one that was begun, or open a finished one.

    embedder: "hashing", or an object with embed(texts, show_progress) -> (N, d_key) float32, d_key, name and sha256, as
    load_bert gives. dask: None, "local" or a scheduler's address, whose workers see `out` under the same path.
    Raises UserError for an empty corpus, for a folder that holds another build, that another process builds in, for a
    full disk, and for keys that are not finite.
    """
    out = Path(out)
    corpus = find_corpus(source, leave_out=out, include=config.include, exclude=config.exclude)
    check_apart(out, corpus)
    corpus = limited(corpus, config.limit_bytes)
    if all(held_out(name, config.held_out) for name in corpus.names()):
        raise UserError(f"every document of the corpus is held out: give more documents, or --held-out 0 ({source})")
    if out.is_dir() and not (out / REQUEST).exists() and any(visible(out)):
        raise UserError(f"{out} holds other files: give a new folder for the database")
    with locked(out, "build"), disk_full_said(out):
        remove_partial(out)
        _settle_request(out, _request(corpus, config, embedder))
        if (out / MANIFEST).exists():
            remove_folder(out / WORK)
            manifest = read_manifest(out)
            _check_corpus(out, corpus, manifest["corpus"])
            edited = f", edited {manifest['generation']} times since," if manifest["generation"] else ""
            print(f"{out} is a finished database of just this{edited} and used as it is", file=sys.stderr)
        else:
            with workers(dask) as run:
                _build(run, out, corpus, config, embedder)
    return Database.open(out, None if embedder == HASHED else embedder)


def _build(run: Runner, out: Path, corpus: Corpus, config: BuildConfig, embedder) -> None:
    work, tokenizer_path = out / WORK, out / TOKENIZER
    facts = _texts(out, work, corpus, config)
    splits = facts["splits"]
    tokenizer = _tokenizer(tokenizer_path, work, splits["train"], config)
    left_out = _left_out(run, out, work, splits, config)
    folders = stages.write_tokens(run, out, work, tokenizer_path, splits, config.chunk_size, 0, (0, left_out))
    if not (out / DOCUMENTS).exists():
        pieces = ([stages.record_file(work, s, n) for n in range(f["shards"])] for s, f in splits.items())
        write_records(out / DOCUMENTS, in_order(*map(chained, pieces)))
    training = folders[: splits["train"]["shards"]]
    if not any(stages.chunk_count(folder) for folder in training):
        raise UserError(f"every training document is too like a held-out one (see {out / DUPLICATES}): give more")
    for split in SPLITS:
        write_array(out / tombstones_of(split), np.empty(0, np.int64))
    if embedder == HASHED:
        embedder = _hashing(run, out, work, training, tokenizer, config.d_key)
    elif isinstance(embedder, HashingEmbedder):  # another database's: it is kept with these keys too
        save_hashing(embedder, out / HASHING)
    stages.write_keys(run, work, tokenizer_path, folders, embedder, config.key_dtype)
    stages.write_indexes(run, training)
    queries = stages.all_queries(training, folders[len(training) :])
    candidates = config.neighbours + config.extra_candidates
    stages.write_neighbours(run, out, work, queries, candidates, margin_of(embedder), config.training_neighbours)
    remove_partial(out)  # of a worker that was killed, whose task another has done
    write_atomically(out / MANIFEST, manifest_bytes(_manifest(out, config, corpus, facts, tokenizer, embedder)))
    remove_folder(work)


def _texts(out: Path, work: Path, corpus: Corpus, config: BuildConfig) -> dict:
    """The facts of the text shards, which are written first."""
    path = work / FACTS
    if path.exists():
        facts = json.loads(path.read_bytes())
        _check_corpus(out, corpus, facts["digest"])
        return facts

    def split_of(document):
        return "valid" if held_out(document.name, config.held_out) else "train"

    changed = (
        f"{out} was begun with another corpus, or it changed while it was read: remove {out}, or give another folder"
    )
    return write_texts(corpus, work, split_of, config.shard_bytes, changed)


def _check_corpus(out: Path, corpus: Corpus, digest: str) -> None:
    if any(source.place.startswith("hub:") for source in corpus.sources):
        return  # it would have to be fetched again
    if corpus_digest(corpus) != digest:
        raise UserError(
            f"{out} was begun with another corpus (its documents have changed since): give another folder, or bring "
            "this one up to date with retro-np add and remove"
        )


def _tokenizer(path: Path, work: Path, training: dict, config: BuildConfig):
    """Train a tokenizer, on a sample where there is much text: its trainer holds every distinct word in memory."""
    if not path.exists():
        if config.tokenizer is not None:
            tokenizer = load_tokenizer(config.tokenizer)
        else:
            share = config.tokenizer_bytes / max(1, training["bytes"])
            with progress_bar("training the tokenizer", training["documents"], unit="documents") as advance:
                texts = _sample(stages.text_files(work, "train", training), share, advance)
                tokenizer = train_tokenizer(texts, config.vocabulary_size)
        save_tokenizer(tokenizer, path)
    return load_tokenizer(path)


def _sample(files, share, advance):
    for path in files:
        for text in read_texts(path):
            for number, piece in enumerate(pieces_of(text.text)):  # of a long document, some
                if share >= 1 or place_of(f"tokenizer {number} {text.name}") < share:
                    yield piece
            advance()


def _left_out(run, out, work, splits, config) -> np.ndarray:
    """The corpus numbers of training documents that are too like a held-out one; duplicates.jsonl lists them."""
    path = out / DUPLICATES
    if not path.exists():
        found = []
        if config.duplicates is not None:
            training, held = (stages.text_files(work, split, splits[split]) for split in ("train", "valid"))
            found = stages.write_duplicates(run, work, training, held, config.duplicates)
        write_records(path, chained(found))
    return np.array([record["number"] for record in chained([path])], np.int64)


def _hashing(run, out, work, training, tokenizer, d_key) -> HashingEmbedder:
    path = out / HASHING
    if not path.exists():
        counts = stages.write_counts(run, work, training)
        chunks = sum(map(stages.chunk_count, training))
        save_hashing(HashingEmbedder(tokenizer, counts, chunks, d_key), path)
    return load_hashing(path, tokenizer)


def _manifest(out, config, corpus, facts, tokenizer, embedder) -> dict:
    documents = Documents(out / DOCUMENTS)
    splits, rows = survey(documents, SPLITS)
    manifest = {
        "format": FORMAT,
        "generation": 0,  # edits since it was built
        "chunk_size": config.chunk_size,
        "vocabulary_size": tokenizer.get_vocab_size(),
        "tokenizer": tokenizer_sha256(tokenizer),
        "embedder": {"name": embedder.name, "sha256": embedder.sha256, "d_key": int(embedder.d_key)}
        | {"margin": margin_of(embedder)},
        "key_dtype": config.key_dtype,
        "neighbours": config.neighbours,
        "extra_candidates": config.extra_candidates,
        "training_neighbours": config.training_neighbours,
        "shard_bytes": config.shard_bytes,
        "duplicates": None if config.duplicates is None else asdict(config.duplicates),
        "corpus": facts["digest"],
        "skipped": facts["skipped"],
        "skipped_names": facts["skipped_names"],
        "splits": splits,
        "sources": [{"name": s.name, "weight": s.weight, "rows": rows.get(s.name, [])} for s in corpus.sources],
    }
    return sealed(manifest | {"files": file_facts([out], file_names(out))})


def margin_of(embedder) -> int:
    """The candidates that an index keeps beyond k for an embedder's keys: some are harder to search than others."""
    return int(getattr(embedder, "margin", EF_MARGIN))


def _request(corpus: Corpus, config: BuildConfig, embedder) -> dict:
    request = asdict(config) | {"embedder": embedder if embedder == HASHED else embedder.sha256}
    if config.tokenizer is not None:
        request |= {"tokenizer": tokenizer_sha256(load_tokenizer(config.tokenizer)), "vocabulary_size": None}
    if embedder != HASHED:
        request["d_key"] = None
    if config.training_neighbours:
        del request["training_neighbours"]  # as builds were begun that knew of no other way
    request |= {"sources": [[source.name, source.weight] for source in corpus.sources]}
    return json.loads(json.dumps(request))


def _settle_request(out: Path, request: dict) -> None:
    """Record what is asked for, or hold it against what was asked for when this folder was begun."""
    path = out / REQUEST
    if not path.exists():
        write_json(path, request)
        return
    try:
        begun = new_names(json.loads(path.read_bytes()))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: remove {out}, or give another folder") from error
    for name, value in request.items():
        if begun.get(name) != value:
            raise UserError(
                f"{out} was begun with another {name} ({begun.get(name)}, now {value}): "
                "give the same as then, or another folder"
            )
