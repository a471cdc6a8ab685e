"""Render a chat template, which is a program by a stranger, with jinja2's sandbox and limits. `chat.py` runs this file.

The request comes as JSON on standard input; {"text": …} or {"fault": …} goes to standard output."""

import json
import sys
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, MAX_MEMORY, MAX_CHARACTERS = 2, 1 << 30, 1 << 20


class Generation(Extension):
    """{% generation %}…{% endgeneration %}, which marks what a model wrote, renders what is inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's body, whose variables are its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def render(template: str, context: dict[str, Any]) -> str:
    """The text of a template, as transformers renders it. Raises an exception of any kind if that is impossible."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    extensions = ["jinja2.ext.loopcontrols", Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    # Unlike jinja2's own filter, transformers' escapes no HTML and keeps the order of the keys.
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    text = environment.from_string(template).render(**context)
    if len(text) > MAX_CHARACTERS:
        refuse(f"its text has more than {MAX_CHARACTERS:,} characters")
    return text


if __name__ == "__main__":
    with suppress(ImportError):  # Windows has no such limits. There only `chat.py` limits the time.
        import resource

        for kind, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MAX_MEMORY)):
            hard = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    try:
        answer = {"text": render(**json.load(sys.stdin))}
    except Exception as error:  # A stranger's program may raise anything.
        answer = {"fault": f"{type(error).__name__}: {error}"[:300]}
    json.dump(answer, sys.stdout)
