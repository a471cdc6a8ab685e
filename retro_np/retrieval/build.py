"""Build a database: corpus → texts → tokenizer → chunks → keys → indexes → neighbours → manifest. Paper §2.3.

Each stage is a function of the files of earlier stages and writes its own files atomically. A killed build therefore
resumes where it stopped and ends in the same bytes. Memory holds one shard, however large the corpus is. The layout:

    manifest.json        the database's facts, and every file's SHA-256; written last
    build.json           the settings that the build was started with
    tokenizer.json       documents.jsonl       duplicates.jsonl       tombstones.npy
    hashing.npy          the feature counts of the hashing embedder, if it made the keys
    shards/00000/        tokens.npy documents.npy keys.npy index.hnsw equal.npy: training documents, which can be
                         retrieved; without hnswlib there is no index.hnsw and no equal.npy
    splits/valid/00000/  tokens.npy documents.npy keys.npy: held-out documents, which cannot be retrieved
    splits/test/00000/   the same, if there are documents for a test
    neighbours/SPLIT/00000/   ids.npy distances.npy
    work/                the stages' temporary files; removed at the end"""

import heapq
import json
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
from tokenizers import Tokenizer

from retro_np.errors import UserError
from retro_np.files import hash_fraction, locked, outputs, remove_folder, remove_partial, write_array, write_json
from retro_np.files.untrusted import read_json
from retro_np.progress import progress_bar, say
from retro_np.renamed import new_names
from retro_np.retrieval import manifest as layout
from retro_np.retrieval import stages
from retro_np.retrieval import tokenizer as bpe
from retro_np.retrieval.config import D_KEY, D_KEY_OF_OTHERS, READING, BuildConfig
from retro_np.retrieval.corpus import Corpus, Source, find_corpus, limited
from retro_np.retrieval.database import Database
from retro_np.retrieval.documents import DUPLICATE, chained, completed, write_records
from retro_np.retrieval.embedders import Embedder, checked_embedder
from retro_np.retrieval.hashing import HASHED, HashingEmbedder, is_own, load_hashing, save_hashing
from retro_np.retrieval.index import EF_MARGIN
from retro_np.retrieval.splits import SplitOf, split_chooser
from retro_np.retrieval.texts import has_changed, read_texts, undone, write_texts
from retro_np.retrieval.vocabulary import Special, vocabulary
from retro_np.retrieval.workers import workers

STORED_FIELDS = ("key_dtype", "neighbours", "extra_candidates", "training_neighbours", "shard_bytes")  # manifest fields
# Fields that requests of older versions lack. A request leaves out those that have their default value.
ADDED = ("training_neighbours", "held_out_bytes", "text_field", "name_field", "split_field")


def build_database(
    source: str | Path | list[Source], out: str | Path, config: BuildConfig, embedder: Embedder | str,
    dask: str | None = None, tokenizer: Tokenizer | str | Path | None = None,
) -> Database:  # fmt: skip
    """Build a database from a corpus, resume an interrupted build, or open the database if it is finished.

    source: a location (see `corpus.find_corpus`), or a list of Source to mix. out: the folder, apart from the corpus.
    config: how to cut and index the corpus. A build is resumed only with the settings that it was started with.
    embedder: "hashing", or an object such as `load_bert` returns (see `embedders.Embedder`).
    dask: None for this process, "local", or the address of a scheduler whose workers see `out` under the same path.
    tokenizer: in place of config.tokenizer, any tokenizer of the tokenizers library, or a path (see `load_tokenizer`).
    Returns the open database. Raises UserError for an empty corpus, for a folder with another build or a build in
    progress, for a full disk, and for keys that are not finite."""
    out = Path(out)
    if isinstance(embedder, str) and embedder != HASHED:
        raise UserError(f'embedder must be "{HASHED}" or an object that embeds, not {embedder!r}')
    user_embedder = None if isinstance(embedder, str) else checked_embedder(embedder)
    corpus = find_corpus(source, leave_out=out, **{name: getattr(config, name) for name in READING})
    corpus = limited(corpus, config.limit_bytes)
    split_of = split_chooser(corpus, config)
    outputs.claim(out, outputs.DATABASE)
    tokenizer = config.tokenizer if tokenizer is None else tokenizer
    given = None if tokenizer is None else bpe.load_tokenizer(tokenizer)
    if config.d_key is None:
        config = replace(config, d_key=D_KEY if given is None or is_own(given) else D_KEY_OF_OTHERS)
    request = _request(corpus, config, user_embedder, given)
    _check_request(out, request)  # before anything is changed
    with locked(out, "build"):
        remove_partial(out, outputs.DATABASE_FOLDERS)
        if is_new := _check_request(out, request):
            write_json(out / layout.REQUEST, request)
        if (out / layout.MANIFEST).exists():
            remove_folder(out / layout.WORK)
            manifest = layout.read_manifest(out)
            if has_changed(corpus, manifest["corpus"]):
                change = "was started with another corpus (its documents have changed since)"
                raise UserError(f"{out} {change}: give another folder, or update this one with retro-np add and remove")
            edits = f" (edited {manifest['generation']} times since)" if manifest["generation"] else ""
            say(f"{out} already holds this database{edits}; using it")
        else:
            with workers(dask) as run, undone(is_new, out / layout.WORK, out / layout.REQUEST):
                _build(run, out, corpus, config, user_embedder, split_of, given)
    database = Database.open(out, user_embedder)
    held = {name: database.manifest["splits"][name]["bytes"] for name in database.held_out_splits}
    if not any(held.values()):
        advice = "to evaluate a model, build another folder with --held-out-bytes 0.1, or with --train and --valid"
        say(f"{out} holds out no text: {advice}")
    elif not all(held.values()):
        full, hint = ("valid", "") if held["valid"] else ("test", ", and train without --eval-every")
        say(f"{out} holds out text for {full} alone: evaluate with --split {full}{hint}")
    return database


def _build(run, out: Path, corpus, config: BuildConfig, user_embedder, split_of: SplitOf, given) -> None:
    work, tokenizer_path = out / layout.WORK, out / layout.TOKENIZER
    changed = f"{out} was started with another corpus (its documents have changed): give another folder"
    facts = write_texts(corpus, work, split_of, config.shard_bytes, changed)
    splits, texts = facts["splits"], stages.text_files(work, facts["splits"])
    tokenizer = _tokenizer(tokenizer_path, texts["train"], splits["train"], config, given)
    left_out = _left_out(run, out, work, texts, config)
    folders = stages.write_tokens(run, out, tokenizer_path, texts, config.chunk_size, 0, (0, left_out))
    training = folders["train"]
    if not (out / layout.DOCUMENTS).exists():
        records = [chained(map(stages.record_file, paths)) for paths in texts.values()]
        write_records(out / layout.DOCUMENTS, heapq.merge(*records, key=lambda record: record["id"]))
    reasons = {"train": "training document resembles a held-out one", "valid": "document of valid is in test as well"}
    for split, reason in reasons.items():
        if splits[split]["documents"] and not any(map(stages.chunk_count, folders[split])):
            raise UserError(f"every {reason} (see {out / layout.DUPLICATES}): give more, and another folder")
    for split in splits:
        write_array(out / layout.tombstones_of(split), np.empty(0, np.int64))
    embedder = _embedder(run, out, training, tokenizer, config, user_embedder)
    stages.write_keys(run, work, tokenizer_path, [*chain(*folders.values())], embedder, config.key_dtype)
    stages.write_indexes(run, training)
    manifest = _manifest(out, config, corpus, facts, tokenizer, embedder)
    stages.write_neighbours(run, out, work, stages.all_queries(folders), manifest)
    remove_partial(out, outputs.DATABASE_FOLDERS)  # A killed worker may have left some although another did its task.
    layout.write_manifest(out, completed(out, manifest, {}) | {"files": layout.file_facts(out)})
    remove_folder(work)


def _tokenizer(path: Path, files: list[Path], training: dict, config: BuildConfig, given: Tokenizer | None):
    """Store the given tokenizer, or train one on a sample, since the trainer keeps all distinct words in memory."""
    if given is not None and not path.exists():
        bpe.save_tokenizer(given, path)
    elif not path.exists():
        share = config.tokenizer_bytes / max(1, training["bytes"])
        with progress_bar("training the tokenizer", training["documents"], unit="documents") as advance:
            texts = _sample(files, share, advance)
            bpe.save_tokenizer(bpe.train_tokenizer(texts, config.vocabulary_size), path)
    return bpe.load_tokenizer(path)


def _sample(files, share, advance):
    """A share of the pieces of all texts, chosen by a hash. A short text is one piece."""
    for path in files:
        for text in read_texts(path):
            for number, piece in enumerate(bpe.pieces_of(text.text)):
                if share >= 1 or hash_fraction(f"tokenizer {number} {text.name}") < share:
                    yield piece
            advance()


def _left_out(run, out, work, texts, config) -> np.ndarray:
    """The numbers of the documents that resemble one which is held out from them. duplicates.jsonl lists them.

    These are training documents, and documents of valid that have the grams of one of test."""
    path, config = out / layout.DUPLICATES, config.duplicates
    if not path.exists():
        train, valid, *test = texts.values()
        duplicates = stages.write_duplicates(run, work, train, [*chain(*test), *valid], config)
        if test and config is not None:
            duplicates += stages.write_duplicates(run, work, valid, test[0], replace(config, threshold=1.0))
        write_records(path, chained(duplicates, DUPLICATE))
    return np.sort(np.array([record["number"] for record in chained([path], DUPLICATE)], np.int64))


def _embedder(run, out, training, tokenizer, config, user_embedder) -> Embedder:
    """The user's embedder, or a hashing embedder that counts the features of the chunks in the folders `training`."""
    path = out / layout.HASHING
    if isinstance(user_embedder, HashingEmbedder):  # Its counts may exist nowhere else.
        save_hashing(user_embedder, path)
    if user_embedder is None and not path.exists():
        counts = stages.write_counts(run, out / layout.WORK, training, out / layout.TOKENIZER)
        chunks = sum(map(stages.chunk_count, training))
        save_hashing(HashingEmbedder(tokenizer, counts, chunks, cast(int, config.d_key)), path)
    return load_hashing(path, tokenizer) if user_embedder is None else user_embedder


def _manifest(out, config, corpus, facts, tokenizer, embedder) -> dict[str, Any]:
    """A manifest, not yet `completed`, without the files."""
    training = [source for source in corpus.sources if source.split in ("", "train")]
    known = vocabulary(tokenizer)
    return {
        "format": layout.FORMAT,
        "generation": 0,  # the number of edits
        "chunk_size": config.chunk_size,
        "vocabulary_size": len(known.pieces),
        **({} if known.special == Special() else known.special._asdict()),
        "tokenizer": bpe.tokenizer_sha256(tokenizer),
        "embedder": {"name": embedder.name, "sha256": embedder.sha256, "d_key": embedder.d_key}
        | {"margin": getattr(embedder, "ef_margin", EF_MARGIN)},
        **{name: getattr(config, name) for name in STORED_FIELDS},
        "duplicates": None if config.duplicates is None else asdict(config.duplicates),
        "corpus": facts["digest"],
        **{name: facts[name] for name in ("skipped", "skipped_names")},
        "splits": facts["splits"],
        "sources": [{"name": s.name, "weight": s.weight, "rows": []} for s in training],
    }


def _request(corpus: Corpus, config: BuildConfig, embedder: Embedder | None, given) -> dict[str, Any]:
    identity = {"embedder": HASHED} if embedder is None else {"embedder": embedder.sha256, "d_key": None}
    sources = [[s.name, s.weight, *[s.split] * bool(s.split)] for s in corpus.sources]
    request = asdict(config) | identity | {"sources": sources}
    if given is not None:
        request |= {"tokenizer": bpe.tokenizer_sha256(given), "vocabulary_size": None}
    return json.loads(json.dumps({n: v for n, v in request.items() if n not in ADDED or v != getattr(BuildConfig, n)}))


def _check_request(out: Path, request: dict[str, Any]) -> bool:
    """Whether the build is new. Raises UserError if the folder was started with another request."""
    path = out / layout.REQUEST
    if not path.exists():
        return True
    defaults = {name: getattr(BuildConfig, name) for name in ADDED}
    stored = defaults | new_names(read_json(path, hint=f"remove {out}, or give another folder"))
    for name, value in (defaults | request).items():
        if stored.get(name) != value:
            change = f"{name} = {stored.get(name)}, not {value}"
            raise UserError(f"{out} was started with {change}; give the same value, or another folder")
    return False
