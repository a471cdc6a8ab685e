"""What the commands share: options and tables, settings from the fields of a configuration, and the console.

A field is defined once: name, type and default in the dataclass, help in its docstring's paragraph `field: text`, the
first sentence. It becomes an option of a command, and a key in a file of settings: TOML, or a run's config.json."""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter
from pathlib import Path
from reprlib import repr as shortened
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from typer import Argument, BadParameter, Context, Option

from retro_np.errors import UserError
from retro_np.files.untrusted import read_settings
from retro_np.progress import safe_console
from retro_np.renamed import new_names
from retro_np.training.config import MAX_SIZE

if TYPE_CHECKING:
    from retro_np.retrieval.database import Database

console = safe_console()

DatabasePath = Annotated[Path, Argument(metavar="DB", help="A database made by `retro-np build`.")]
MODEL_HELP = "A run's folder, a checkpoint, retro, baseline, smollm2, or another's model: folder, .gguf, hub name."
OptionalModel = Annotated[Path | None, Argument(metavar="MODEL", help=MODEL_HELP)]
ShippedMemory = Annotated[bool, Option("--memory", help="Use the bundled memory for smollm2 in place of MODEL.")]
EMBEDDERS = "a folder as sentence-transformers saves it, or MODULE:OBJECT, which runs the module"
EmbedderSpec = Annotated[str | None, Option("--embedder", help=f"A{EMBEDDERS[1:]}. Default: the database's embedder.")]
K = Annotated[int, Option("-k", "--neighbours", min=1, help="Neighbours per chunk.")]
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
# The sections that a file of settings may have. Each command reads its own.
SECTIONS = ("build", "model", "encoder", "training", "data")


def open_database(path: Path, embedder: str | None = None, index: str = "hnsw") -> "Database":
    """Open a database for a command. embedder: what the user named, if anything (see `embedders.load_embedder`)."""
    from retro_np.retrieval.database import Database
    from retro_np.retrieval.embedders import load_embedder

    return Database.open(path, load_embedder(embedder) if embedder else None, index)


def with_memory(memory: bool, *arguments: Any) -> tuple[Any, ...]:
    """A command's arguments, MODEL first; with --memory, that stands for MODEL, and the first one typed is DB."""
    if not memory:
        return arguments
    from retro_np.pretrained.bundled import MEMORY

    if arguments[-1] is not None:
        raise UserError("--memory stands for MODEL: leave MODEL out")
    if arguments[0] is None:
        raise UserError("--memory reads a DB: give one, which retro-np build FOLDER -o DB --tokenizer smollm2 makes")
    return MEMORY, *arguments[:-1]


def named(text: str) -> str:
    """A name of a file or folder that was typed. An empty one would stand for the current folder."""
    if not text:
        raise BadParameter("it is empty: give the name of a file or folder")
    return text


def path(text: str | Path) -> Path:
    """`named` as a path."""
    return Path(named(str(text)))


def with_checked_paths(command: Command) -> Command:
    """Let a command refuse an empty name for each file or folder that it takes."""
    for parameter in inspect.signature(command).parameters.values():
        kind, *infos = get_args(parameter.annotation) or (Any,)
        if "Path" in str(kind) or parameter.name in ("db", "embedder", "tokenizer"):
            infos[0].parser = path if "Path" in str(kind) else named
    return command


def finite(option: str, value: float) -> float:
    """The value of an option. Raises UserError if it is infinite or NaN."""
    if not math.isfinite(value):
        raise UserError(f"{option} must be a finite number, not {value}")
    return value


Group = dict[str, Parameter]  # the option of each field of a dataclass, by the field's name


def chosen(group: Group, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the fields whose option has one, typed or by default. values: of the options, by their names."""
    given = {field: values[option.name] for field, option in group.items() if values[option.name] is not None}
    return {field: tuple(value) if isinstance(value, list) else value for field, value in given.items()}


def group_of(
    config: type, panel: str, *, prefix: str = "", leave_out: Iterable[str] = (), hidden: Iterable[str] = (),
    **changes: dict[str, Any],
) -> Group:  # fmt: skip
    """The fields of a dataclass as options.

    panel: the options' heading in the help. prefix: what the options' names begin with. leave_out: fields without an
    option. hidden: fields whose option is accepted, but not in the help. changes: field → what differs: `default`,
    `names` (all the option's names), and what `typer.Option` takes."""
    paragraphs = re.findall(r"^(\w+): ((?:.|\n )+)", inspect.cleandoc(config.__doc__ or ""), re.MULTILINE)
    texts, kinds = {name: " ".join(text.split()) for name, text in paragraphs}, get_type_hints(config)
    options: Group = {}
    for field in (field for field in fields(config) if field.name not in leave_out):
        change = {"default": field.default, "names": (), **changes.get(field.name, {})}
        default, names = change.pop("default"), change.pop("names")
        if kinds[field.name] == tuple[int, ...]:
            default, change = ",".join(map(str, default)), {"metavar": "2,4", "parser": _layers, **change}
        default = None if default == () else default
        text = texts[field.name].partition(". ")[0].rstrip(".")
        text = f"{text[0].upper()}{text[1:]}."
        if not isinstance(default, bool) and default not in (None, "", MISSING):
            text += f" Default: {default}."
        shown: dict[str, Any] = {"show_default": False, "rich_help_panel": panel, "hidden": field.name in hidden}
        option = Option(*names, help=text, **shown | change)
        name = next((name[2:].replace("-", "_") for name in names if name.startswith("--")), prefix + field.name)
        kind, default = Parameter.KEYWORD_ONLY, Parameter.empty if default is MISSING else default
        annotation = annotated[OPTION_TYPES.get(kinds[field.name], kinds[field.name]), option]
        options[field.name] = Parameter(name, kind, default=default, annotation=annotation)
    return options


def with_options(*groups: Group) -> Callable[[Command], Command]:
    """Decorate a command so that its `**values` are the options of these groups, for typer and in `values`."""

    def decorate(command: Command) -> Command:
        own = [p for p in inspect.signature(command).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        parameters = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in own]
        parameters += [option for group in groups for option in group.values()]
        function: Any = command
        function.__signature__ = inspect.Signature(parameters)
        function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def is_typed(context: Context, name: str) -> bool:
    """Whether an option or argument, by its parameter's name, is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_typed(context: Context, names: Iterable[str], reason: str) -> None:
    """Raise UserError if an option is on the command line that has no effect for this reason. names: of parameters."""
    for name in names:
        if is_typed(context, name):
            raise UserError(f"{reason}: leave out {'-k' if name == 'k' else '--' + name.replace('_', '-')}")


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace("()", "").split(",") if part.strip())
    except ValueError as error:
        raise BadParameter(f"{text!r} is not numbers separated by commas, such as 2,4") from error


def read_sections(path: Path | None, sections: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The values in each of these sections of a file. Without a path all are empty.

    sections: a dataclass, or {key: type}, for each; None for one that is not looked into. Raises UserError, with file
    and key, for a file that does not parse, for an unknown section or key, and for a value of the wrong type. Whether
    values fit together is not checked."""
    if path and path.is_dir():  # A run's folder stands for its settings.
        path /= "config.json"
    stored: dict[str, Any] = {} if path is None else read_settings(path)
    _check_names(stored, SECTIONS, f"{path}", "section")
    return {name: _section(stored.get(name, {}), keys, f"{path}: [{name}]") for name, keys in sections.items()}


def _section(stored: Any, keys: Any, where: str) -> dict[str, Any]:
    if not isinstance(stored, dict):
        raise UserError(f"{where} must be a section with keys, not {shortened(stored)}")
    if keys is None:
        return stored
    hints, stored = get_type_hints(keys) if is_dataclass(keys) else keys, new_names(stored)
    _check_names(stored, hints, where, "key")
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
    kinds = tuple(str if kind is Path else kind for kind in kinds)
    too_large = type(value) is int and abs(value) >= MAX_NUMBER
    for kind in kinds:
        if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
            return _section(value, kind, where)
        if get_origin(kind) in (tuple, list) and isinstance(value, list):
            return tuple(_file_value(part, get_args(kind)[0], f"{where}, entry {i}") for i, part in enumerate(value, 1))
        if not too_large and (type(value) is kind or (kind is float and type(value) is int)):
            return float(value) if kind is float else value
    names = [VALUE_KINDS.get(kind) or ("a list" if get_args(kind) else "a section") for kind in kinds]
    shown = "a number that is too large" if too_large else shortened(value)
    raise UserError(f"{where} must be {' or '.join(names)}, not {shown}")


@contextmanager
def naming(path: Path | None, keys: Iterable[str]) -> Iterator[None]:
    """Let a UserError that is about one of these keys of a file name the file."""
    try:
        yield
    except UserError as error:
        if not set(keys).isdisjoint(re.findall(r"[a-z]\w*", str(error).lower().replace("-", "_"))):
            raise UserError(f"{path}: {error}") from error
        raise
