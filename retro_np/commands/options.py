"""What the commands share: options and tables, settings from the fields of a configuration, and the console.

A field is defined once: name, type and default in the dataclass, help in its docstring's paragraph `field: text`. It
becomes an option of a command, and a key in a file of settings: TOML, or the config.json of a training run."""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from inspect import Parameter
from pathlib import Path
from reprlib import repr as shortened
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from typer import Argument, Context, Option

from retro_np.errors import UserError
from retro_np.files.untrusted import read_settings
from retro_np.progress import safe_console
from retro_np.renamed import new_names

if TYPE_CHECKING:
    from retro_np.retrieval.database import Database

console = safe_console()

DatabasePath = Annotated[Path, Argument(metavar="DB", help="A database made by `retro-np build`.")]
CheckpointPath = Annotated[Path, Argument(metavar="CHECKPOINT", help="A run's checkpoint.safetensors.")]
EMBEDDERS = "a folder as sentence-transformers saves it, or MODULE:OBJECT, which runs the module"
EmbedderSpec = Annotated[str | None, Option("--embedder", help=f"A{EMBEDDERS[1:]}. Default: the database's embedder.")]
K = Annotated[int, Option("-k", "--neighbours", min=1, help="Neighbours per chunk.")]
MAX_SIZE = 1 << 20  # A larger sequence or batch would overflow array sizes before memory runs out.
SequenceLength = Annotated[int, Option(min=1, max=MAX_SIZE, help="Tokens per sequence, n: one or more whole chunks.")]
Temperature = Annotated[float, Option(min=0, help="Temperature of sampling; 0 is greedy.")]
TopP = Annotated[float, Option(min=0, max=1, help="Sample only the likeliest tokens, whose probabilities sum to this.")]
Seed = Annotated[int, Option(min=0, help="Random seed.")]
annotated: Any = Annotated  # A type checker takes a subscript of Annotated for a type.
Command = TypeVar("Command", bound=Callable[..., None])
# How an option gives a field's type: layers as 2,4 and names as an option that is repeated
OPTION_TYPES: dict[Any, Any] = {tuple[int, ...]: str, tuple[str, ...]: list[str] | None}
VALUE_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
MAX_NUMBER = 1 << 62  # Larger whole numbers are mistakes.


def open_database(path: Path, embedder: str | None = None, index: str = "hnsw") -> "Database":
    """Open a database for a command. embedder: what the user named, if anything (see `embedders.load_embedder`)."""
    from retro_np.retrieval.database import Database
    from retro_np.retrieval.embedders import load_embedder

    return Database.open(path, load_embedder(embedder) if embedder else None, index)


def finite(option: str, value: float) -> float:
    """The value of an option. Raises UserError if it is infinite or NaN."""
    if not math.isfinite(value):
        raise UserError(f"{option} must be a finite number, not {value}")
    return value


@dataclass(frozen=True)
class Group:
    """Fields of a dataclass as options of a command: the option of each field, by the field's name."""

    config: type
    options: dict[str, Parameter]

    def chosen(self, context: Context, values: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the fields: what was typed, or else is in a file, `stored`, or else is the option's default.

        Without any of them a field is left out."""
        kinds, kept = get_type_hints(self.config), self.kept(context, stored)
        given = {f: (o.name, values[o.name]) for f, o in self.options.items() if values[o.name] is not None}
        return {field: _option_value(name, value, kinds[field]) for field, (name, value) in given.items()} | kept

    def kept(self, context: Context, stored: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a file that no typed option overrides."""
        typed = {field for field, option in self.options.items() if is_typed(context, option.name)}
        return {field: value for field, value in stored.items() if field not in typed}


def group_of(
    config: type, panel: str, *, prefix: str = "", leave_out: Iterable[str] = (), hidden: Iterable[str] = (),
    **changes: dict[str, Any],
) -> Group:  # fmt: skip
    """The fields of a dataclass as options.

    panel: the options' heading in the help. prefix: what the options' names begin with. leave_out: fields without an
    option. hidden: fields whose option is accepted, but not in the help. changes: field → what differs from the
    dataclass: `default`, `names` (all the option's names), and what `typer.Option` takes."""
    paragraphs = re.findall(r"^(\w+): ((?:.|\n )+)", inspect.cleandoc(config.__doc__ or ""), re.MULTILINE)
    texts, kinds = {name: " ".join(text.split()) for name, text in paragraphs}, get_type_hints(config)
    options = {}
    for field in (field for field in fields(config) if field.name not in leave_out):
        change = {"default": field.default, "names": (), **changes.get(field.name, {})}
        default, names = change.pop("default"), change.pop("names")
        if isinstance(default, tuple):
            default = ",".join(map(str, default)) if kinds[field.name] == tuple[int, ...] else None
        text = f"{texts[field.name][0].upper()}{texts[field.name][1:].rstrip('.')}."
        if not isinstance(default, bool) and default not in (None, "", MISSING):
            text += f" Default: {default}."
        option = Option(
            *names, help=text, show_default=False, rich_help_panel=panel, hidden=field.name in hidden, **change
        )
        name = next((name[2:].replace("-", "_") for name in names if name.startswith("--")), prefix + field.name)
        kind, default = Parameter.KEYWORD_ONLY, Parameter.empty if default is MISSING else default
        annotation = annotated[OPTION_TYPES.get(kinds[field.name], kinds[field.name]), option]
        options[field.name] = Parameter(name, kind, default=default, annotation=annotation)
    return Group(config, options)


def with_options(*groups: Group) -> Callable[[Command], Command]:
    """Decorate a command so that its `**values` are the options of these groups, for typer and in `values`."""

    def decorate(command: Command) -> Command:
        own = [p for p in inspect.signature(command).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        parameters = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in own]
        parameters += [option for group in groups for option in group.options.values()]
        function: Any = command
        function.__signature__ = inspect.Signature(parameters)
        function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def is_typed(context: Context, name: str) -> bool:
    """Whether an option or argument, by its parameter's name, is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _option_value(name: str, value: Any, kind: Any) -> Any:
    """What an option's value stands for in the dataclass."""
    if kind != tuple[int, ...]:
        return tuple(value) if kind == tuple[str, ...] else value
    try:
        return tuple(int(part) for part in value.split(",") if part.strip())
    except ValueError as error:
        option = "--" + name.replace("_", "-")
        raise UserError(f"{option} must be numbers separated by commas, such as 2,4, not {value!r}") from error


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
    return {name: _file_value(value, hints[name], f"{where} {name}") for name, value in stored.items()}


def _check_names(stored: Mapping[str, Any], known: Any, where: str, kind: str) -> None:
    for name in stored:
        if name not in known:
            close = difflib.get_close_matches(name[:100], known, 1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
            raise UserError(f"{where}: unknown {kind} {name:.100}; {hint}")


def _file_value(value: Any, hint: Any, where: str) -> Any:
    """A value as one of the types that a field may have: lists become tuples, and whole numbers floats."""
    kinds = get_args(hint) if get_origin(hint) not in (None, tuple) else (hint,)
    too_large = type(value) is int and abs(value) >= MAX_NUMBER
    for kind in kinds:
        if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
            return _section(value, kind, where)
        if get_origin(kind) is tuple and isinstance(value, list):
            return tuple(_file_value(part, get_args(kind)[0], f"{where}, entry {i}") for i, part in enumerate(value, 1))
        if not too_large and (type(value) is kind or (kind is float and type(value) is int)):
            return float(value) if kind is float else value
    names = [VALUE_KINDS.get(kind) or ("a list" if get_args(kind) else "a section") for kind in kinds]
    shown = "a number that is too large" if too_large else shortened(value)
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
