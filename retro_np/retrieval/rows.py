"""Rows with fields: lines of JSON, parquet files, datasets that `save_to_disk` wrote, datasets of the Hugging Face Hub.

Every reader is a stream. Memory holds one line, or one batch of rows and what its library keeps of a row group."""

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from retro_np.errors import UserError
from retro_np.files.untrusted import loaded_json, reporting
from retro_np.progress import one_line, say

LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON and file names can hold one, UTF-8 cannot
HUB_LOCATION = re.compile(r"hub:(.+?)(?:@([^@#/]+))?(?:#([^#/]+))?", re.DOTALL)
SPLIT_NAMES = dict(train="train", valid="valid", validation="valid", dev="valid", val="valid", test="test")
NO_FIELD = "none"  # as the name of the field of the split: there is none
ROWS_PER_BATCH = 16
DAMAGED_ROWS = "the data are damaged or incomplete; write them again"
CHECK_NAME = "check its name, and the network if it is on the Hub"


@dataclass(frozen=True)
class Fields:
    """The fields that hold a document's text, name and split.

    text: the text, a string. name: a string or a number; None: `name`, else `id`, else there is none. split: train,
    valid or test, or a word of SPLIT_NAMES; None: `split`, if the first row has such a word in it; NO_FIELD: none."""

    text: str = "text"
    name: str | None = None
    split: str | None = None

    def columns(self, names: Sequence[str]) -> list[str]:
        """The columns to read of those there are: all if one is missing, since the error about a row lists them."""
        named = {self.text, self.name, None if self.split == NO_FIELD else self.split} - {None}
        wanted = {*named, *(() if self.name else ("name", "id")), *(() if self.split else ("split",))}
        return [name for name in dict.fromkeys(names) if name in wanted or not named.issubset(names)]


class Row(NamedTuple):
    """A row. name: the name of a document without one. place, number: where it stands, as messages say it.

    replaced: how many invalid byte sequences became U+FFFD."""

    record: dict[str, Any]
    name: str
    place: str
    number: str = ""
    replaced: int = 0


def split_of(value: Any) -> str:
    """The split that a value names, whatever its case and the blanks around it; "" for any other value."""
    return SPLIT_NAMES.get(str(value).strip().lower(), "")


def listed(names: Iterable[str]) -> str:
    """The names of fields for a message, at most 300 characters of them."""
    return one_line(", ".join(map(str, names)))[:300] or "none"


def without_surrogates(text: str) -> str:
    """Replace each lone surrogate by U+FFFD, so that the text can be encoded in UTF-8."""
    return LONE_SURROGATE.sub("\ufffd", text)


def decoded(data: bytes) -> tuple[str, int]:
    """Bytes as UTF-8 text, and how many invalid byte sequences became U+FFFD."""
    text = data.decode("utf-8", "replace")
    return text, text.count("\ufffd") - data.count("\ufffd".encode())


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn the system's error into a UserError that names the file or folder."""
    try:
        yield
    except OSError as error:
        reason, path = error.strerror or error, without_surrogates(path)
        raise UserError(f"cannot read {path} ({reason}): fix that, or leave the file out") from error


def needed(module: str, place: str, advice: str) -> Any:
    """Import an optional package. Raises UserError, with the advice what to install, if it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"{place} needs the package {module.split('.')[0]}: pip install {advice}") from error


def json_rows(path: str, packing: str = "") -> Iterator[Row]:
    """The lines of a file of JSON lines, in order; blank lines are skipped. packing: "", gzip or zstd.

    A document without a name is called file:line. Raises UserError, with the line's number, if a line is not an object,
    or if compressed data are truncated or damaged."""
    shown, number = without_surrogates(path), 0
    pyarrow = needed("pyarrow", shown, "pyarrow") if packing == "zstd" else None
    with reading(path), open(path, "rb") as raw:
        file = io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd")) if pyarrow else raw
        try:
            for number, line in enumerate(gzip.GzipFile(fileobj=raw) if packing == "gzip" else file, start=1):
                if (line := line.removeprefix(codecs.BOM_UTF8)).strip():
                    text, replaced = decoded(line)
                    record = _parsed(f"{shown}:{number}", text)
                    yield Row(record, f"{os.path.basename(shown)}:{number}", f"{shown}:{number}", "", replaced)
        except (EOFError, zlib.error, OSError) as error:
            if getattr(error, "errno", None):  # the disk, not the data
                raise
            fault = f"{shown}:{number + 1} cannot be unpacked ({error})"
            raise UserError(f"{fault}: the {packing} file is damaged or incomplete; download it again") from error


def _parsed(where: str, text: str) -> dict:
    """The object in a line of JSON."""
    record = loaded_json(text, where, "each line of a .jsonl must be an object in UTF-8")
    if not isinstance(record, dict):
        raise UserError(f'{where} has no `text` string: each line must be an object like {{"text": "…"}}')
    return record


def parquet_rows(path: str, name: str, fields: Fields) -> Iterator[Row]:
    """The rows of a parquet file, in order. A document without a name is called name:row, from 0."""
    place = without_surrogates(path)
    parquet = needed("pyarrow.parquet", place, "pyarrow")

    def tables() -> Iterator[Any]:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            columns = fields.columns(file.schema_arrow.names)
            yield from file.iter_batches(ROWS_PER_BATCH, columns=columns, use_threads=False)

    return rows_of(_records(tables()), place, name, DAMAGED_ROWS)


def saved_rows(folder: str, name: str, fields: Fields) -> Iterator[tuple[str, Iterator[Row]]]:
    """The splits of a dataset that `save_to_disk` wrote to a folder: the name of each, or "", and its rows.

    A document without a name is called name:row or name/split:row, from 0. A split without rows is left out."""
    datasets, place = needed("datasets", without_surrogates(folder), "retro-np[hub]"), without_surrogates(folder)
    with reporting(f"{place} cannot be read", DAMAGED_ROWS):
        listing = Path(folder, "dataset_dict.json")
        splits = list(map(str, json.loads(listing.read_bytes())["splits"])) if listing.exists() else [""]
    for split in splits:
        inner = f"/{split}" if split else ""
        with reporting(f"{place}{inner} cannot be read", DAMAGED_ROWS):
            if not json.loads(Path(folder + inner, "state.json").read_bytes())["_data_files"]:
                continue  # `datasets` cannot open it.
            saved = datasets.load_from_disk(folder + inner)
        rows = saved.select_columns(fields.columns(saved.column_names)).with_format("arrow")
        yield split, rows_of(_records(rows.iter(ROWS_PER_BATCH)), place + inner, name + inner, DAMAGED_ROWS)


def _records(tables: Iterable[Any]) -> Iterator[dict]:
    """The rows of pyarrow's tables. Their memory may be a damaged file's, so it is checked first."""
    for table in tables:
        table.validate(full=True)
        metadata = (table.schema.metadata or {}).get(b"huggingface", b"")
        facts = json.loads(metadata) if b"ClassLabel" in metadata else {}
        yield from _named(table.to_pylist(), facts.get("info", {}).get("features", {}))


def _named(records: Iterable[dict], features: dict[str, Any]) -> Iterator[dict]:
    """Records with the names of class labels in place of their numbers. features: of the package datasets, as dicts."""
    labels = {c: f["names"] for c, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
    for record in records:
        yield record | {c: names[record[c]] for c, names in labels.items() if record.get(c) in range(len(names))}


def hub_dataset(location: str, fields: Fields) -> Any:
    """Open `hub:NAME[@CONFIG][#SPLIT]` as a stream, an IterableDataset. Without SPLIT, train is read, and that is said.

    NAME is a dataset of the Hugging Face Hub, or a local folder of data files, which needs no network. Only the columns
    of the fields are read. Raises UserError if the package or the dataset is missing."""
    name, config, split = hub_parts(location)
    datasets = needed("datasets", location, "retro-np[hub]")
    # an absolute path cannot be mistaken for a dataset of the Hub or for a format such as `json`
    path = os.path.abspath(name) if os.path.isdir(name) else name
    with reporting(f"{location} cannot be read", CHECK_NAME):
        splits = datasets.load_dataset(path, config, streaming=True)
        if (split or "train") not in splits:
            raise UserError(f"{location} cannot be read (its splits are {listed(splits)}): give hub:{name}#SPLIT")
        dataset = splits[split or "train"]
        columns = dataset.column_names
    if not split and len(splits) > 1:
        say(f"{location}: only train is read of its splits {listed(splits)}; to read another one: hub:{name}#SPLIT")
    return dataset if columns is None else dataset.select_columns(fields.columns(columns))


def hub_rows(dataset: Any, location: str, name: str) -> Iterator[Row]:
    """The rows of a dataset that `hub_dataset` opened. A document without a name is called name:row, from 0."""
    features = {} if dataset.features is None else dataset.features.to_dict()
    return rows_of(_named(dataset, features), location, name, CHECK_NAME)


def rows_of(records: Iterable[dict], place: str, name: str, advice: str) -> Iterator[Row]:
    """A row for each record, called name:row, from 0.

    place, advice: the beginning and the end of the UserError for any error while records are read."""
    after, remaining = "", enumerate(records)
    while True:
        # The errors of the Hub, the network and the file formats share no base class.
        with reporting(f"{place} cannot be read{after}", advice):
            number, record = next(remaining, (-1, {}))
        if number < 0:
            return
        yield Row(record, f"{name}:{number}", place, f" in row {number}")
        after = f" after row {number}"


def hub_parts(location: str) -> tuple[str, str | None, str | None]:
    """The name, configuration and split of `hub:NAME[@CONFIG][#SPLIT]`."""
    if match := HUB_LOCATION.fullmatch(location):
        return match[1], match[2], match[3]
    raise UserError(f"{location} names no dataset: write hub:NAME, hub:NAME@CONFIG or hub:NAME#SPLIT")
