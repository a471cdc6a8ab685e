"""Old names of configuration fields and options. They work until version 0.3, with a line that gives the new name."""

import functools
import sys
from typing import Any, TypeVar

C = TypeVar("C", bound=type)

FIELDS = {"lent": "oracle_share", "lent_steps": "oracle_steps", "spares": "extra_candidates", "place": "location"}
OPTIONS = {"--lent": "--oracle-share", "--lent-steps": "--oracle-steps", "--spares": "--extra-candidates"}


def new_names(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the current names of its fields, in the same order."""
    return {FIELDS.get(name, name): value for name, value in stored.items()}


def accept_old_names(config: C) -> C:
    """Decorate a dataclass so that its constructor also accepts the old names of its fields."""
    cls: Any = config
    init = cls.__init__

    @functools.wraps(init)
    def with_old_names(self: Any, *args: Any, **fields: Any) -> None:
        for old in FIELDS.keys() & fields.keys():
            _tell(f"{config.__name__}({old}=…)", f"{FIELDS[old]}=…")
        init(self, *args, **new_names(fields))

    cls.__init__ = with_old_names
    return config


def replace_old_options(arguments: list[str]) -> list[str]:
    """The arguments of a command line, with old names of options replaced by the current ones."""
    replaced = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option in OPTIONS:
            _tell(option, OPTIONS[option])
        replaced.append(OPTIONS.get(option, option) + equals + value)
    return replaced


def _tell(old: str, new: str) -> None:
    print(f"retro-np: {old} is now called {new}; the old name works until version 0.3", file=sys.stderr)
