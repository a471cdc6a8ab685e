"""The settings of a command in a file: TOML, or the config.json of a training run."""

import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from reprlib import repr as shortened
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from retro_np.errors import UserError
from retro_np.files.untrusted import read_settings
from retro_np.renamed import new_names

VALUE_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
MAX_NUMBER = 1 << 62  # Larger whole numbers are mistakes.


def read_sections(path: Path | None, sections: Mapping[str, type]) -> dict[str, dict[str, Any]]:
    """The values in each section of a file, as the fields of the section's dataclass. Without a path all are empty.

    A section of a plain `dict` is not looked into. Raises UserError, with file and key, for a file that does not parse,
    for an unknown section or key, and for a value of the wrong type. Whether values fit together is not checked."""
    stored: dict[str, Any] = {} if path is None else read_settings(path)
    _check_names(stored, sections, f"{path}", "section")
    return {name: _section(stored.get(name, {}), config, f"{path}: [{name}]") for name, config in sections.items()}


def _section(stored: Any, config: type, where: str) -> dict[str, Any]:
    if not isinstance(stored, dict):
        raise UserError(f"{where} must be a section with keys, not {shortened(stored)}")
    if config is dict:
        return stored
    hints, stored = get_type_hints(config), new_names(stored)
    _check_names(stored, [field.name for field in fields(config)], where, "key")
    return {name: _value(value, hints[name], f"{where} {name}") for name, value in stored.items()}


def _check_names(stored: Mapping[str, Any], known: Any, where: str, kind: str) -> None:
    for name in stored:
        if name not in known:
            close = difflib.get_close_matches(name[:100], known, 1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
            raise UserError(f"{where}: unknown {kind} {name:.100}; {hint}")


def _value(value: Any, hint: Any, where: str) -> Any:
    """A value as one of the types that a field may have: lists become tuples, and whole numbers floats."""
    kinds = get_args(hint) if get_origin(hint) not in (None, tuple) else (hint,)
    for kind in kinds:
        if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
            return _section(value, kind, where)
        if get_origin(kind) is tuple and isinstance(value, list):
            return tuple(_value(part, get_args(kind)[0], f"{where}, entry {i}") for i, part in enumerate(value, 1))
        if type(value) is kind and (kind is not int or abs(value) < MAX_NUMBER):
            return value
        if kind is float and type(value) is int and abs(value) < MAX_NUMBER:
            return float(value)
    names = [VALUE_KINDS.get(kind) or ("a list" if get_args(kind) else "a section") for kind in kinds]
    shown = "a number that is too large" if type(value) is int and abs(value) >= MAX_NUMBER else shortened(value)
    raise UserError(f"{where} must be {' or '.join(names)}, not {shown}")


@contextmanager
def naming(path: Path | None, sections: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Let a UserError that is about a key in one of the file's sections name the file."""
    try:
        yield
    except UserError as error:
        if set(re.findall(r"\w+", str(error))) & {key for section in sections.values() for key in section}:
            raise UserError(f"{path}: {error}") from error
        raise
