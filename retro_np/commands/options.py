"""Options of a command that are derived from the fields of a configuration's dataclass.

A field is defined once: name, type and default in the dataclass, help in its docstring's paragraph `field: text`."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from inspect import Parameter
from typing import Annotated, Any, TypeVar, get_type_hints

from typer import Context, Option

from retro_np.errors import UserError

annotated: Any = Annotated  # A type checker takes a subscript of Annotated for a type.
Command = TypeVar("Command", bound=Callable[..., None])
# How an option gives a field's type: layers as 2,4 and names as an option that is repeated
OPTION_TYPES: dict[Any, Any] = {tuple[int, ...]: str, tuple[str, ...]: list[str] | None}


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
        return {field: _value(name, value, kinds[field]) for field, (name, value) in given.items()} | kept

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
    for field in fields(config):
        if field.name in leave_out:
            continue
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
        parameters = [*own, *(option for group in groups for option in group.options.values())]
        parameters = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in parameters]
        function: Any = command
        function.__signature__ = inspect.Signature(parameters)
        function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def is_typed(context: Context, name: str) -> bool:
    """Whether an option or argument, by its parameter's name, is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _value(name: str, value: Any, kind: Any) -> Any:
    """What an option's value stands for in the dataclass."""
    if kind != tuple[int, ...]:
        return tuple(value) if kind == tuple[str, ...] else value
    try:
        return tuple(int(part) for part in value.split(",") if part.strip())
    except ValueError as error:
        option = "--" + name.replace("_", "-")
        raise UserError(f"{option} must be numbers separated by commas, such as 2,4, not {value!r}") from error
