"""Old names of configuration fields and options. They work until version 0.3, and each use prints the new name."""

import functools
import itertools
import sys
from operator import attrgetter
from typing import Any, TypeVar

C = TypeVar("C", bound=type)

FIELDS = {"lent": "oracle_share", "lent_steps": "oracle_steps", "spares": "extra_candidates", "place": "location"}
OPTIONS = {  # command → old option → current option
    "build": {"--spares": "--extra-candidates", "--keys": "--key-dtype"},
    "train": {"--lent": "--oracle-share", "--lent-steps": "--oracle-steps"},
}


def new_names(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the current names of its fields, in the same order."""
    return {FIELDS.get(name, name): value for name, value in stored.items()}


def accept_old_names(config: C) -> C:
    """Decorate a dataclass so that its constructor, `dataclasses.replace` and its attributes accept old field names."""
    cls: Any = config
    init, renamed = cls.__init__, {old: new for old, new in FIELDS.items() if new in cls.__dataclass_fields__}

    @functools.wraps(init)
    def with_old_names(self: Any, *args: Any, **fields: Any) -> None:
        for old in renamed.keys() & fields.keys():
            _tell(f"{config.__name__}({old}=…)", f"{renamed[old]}=…")
            fields[renamed[old]] = fields.pop(old)  # `replace` passes the current value of the new name as well
        init(self, *args, **fields)

    cls.__init__ = with_old_names
    for old, new in renamed.items():
        setattr(cls, old, property(attrgetter(new)))
    return config


def replace_old_options(arguments: list[str]) -> list[str]:
    """The arguments of a command line, the command first, with old options of that command replaced."""
    options: dict[str, str] = OPTIONS.get(arguments[0], {}) if arguments else {}
    replaced = list(arguments)
    for number, argument in enumerate(itertools.takewhile("--".__ne__, arguments)):  # What follows is not an option.
        option, equals, value = argument.partition("=")
        if option in options:
            _tell(option, options[option])
            replaced[number] = options[option] + equals + value
    return replaced


def _tell(old: str, new: str) -> None:
    print(f"retro-np: {old} is now called {new}; the old name works until version 0.3", file=sys.stderr)
