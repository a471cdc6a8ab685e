"""Glob patterns for relative paths, as in .gitignore; upper and lower case differ.

A pattern matches a file, or a folder with everything below it. `*`, `?` and `[…]` stand for anything but a slash.
`**` stands for any number of folders; at the end of a pattern, for everything below. A pattern without a slash matches
at any depth, other patterns from the top. A slash at the end restricts a pattern to folders and does not anchor it."""

import re
from collections.abc import Callable, Sequence

from retro_np.errors import UserError


def matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    """A function that tells whether a relative path matches one of the patterns, or is inside a folder that does.

    Raises UserError for an empty pattern and for one that is not a glob."""
    match = re.compile("|".join(map(_expression, patterns)) or "(?!)", re.DOTALL).fullmatch
    return lambda path: match(path) is not None


def _expression(pattern: str) -> str:
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    if not parts:
        raise UserError(f"the pattern {pattern!r} matches nothing: give one such as *.py or src/**")
    anywhere = [] if "/" in pattern.rstrip("/") else ["**"]
    *folders, last = [*anywhere, *parts, *(["**"] if pattern.endswith("/") else [])]
    prefix = "".join("(?:[^/]+/)*" if part == "**" else _segment(part) + "/" for part in folders)
    expression = prefix + (".+" if last == "**" else _segment(last)) + "(?:/.*)?"
    try:
        re.compile(expression)
    except re.error as error:
        raise UserError(f"the pattern {pattern!r} is not a glob ({error}): check its brackets") from error
    return expression


def _segment(part: str) -> str:
    """A regular expression for one part of a path, which may hold `*`, `?` and `[…]`."""
    return "".join(map(_wildcard, re.findall(r"\[!?\]?[^\]]*\]|.", part, re.DOTALL)))


def _wildcard(token: str) -> str:
    if token in ("*", "?"):
        return "[^/]*" if token == "*" else "[^/]"
    if len(token) == 1:
        return re.escape(token)
    negated = token.startswith("[!")
    inside = "".join("\\" + c if c in "\\[]^&~|" else c for c in token[1 + negated : -1])
    return f"(?!/)[{'^' * negated}{inside}]"
