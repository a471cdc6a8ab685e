"""Render a chat template, which is a program by a stranger, with jinja2's sandbox and limits. `chat.py` runs this file.

The request comes as JSON on standard input; {"text": …} or {"fault": …} goes to standard output."""

import json
import sys
from datetime import datetime
from typing import Any

SECONDS, MEMORY, MAX_CHARACTERS = 2, 1 << 30, 1 << 20


def limit() -> None:
    """Limit this process's time and memory. On Windows only `chat.py` limits its time."""
    import resource

    for kind, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MEMORY)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def render(template: str, context: dict[str, Any]) -> str:
    """The text of a template, as transformers renders it. Raises an exception of any kind if that is impossible."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    loops = ["jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    parts, characters = [], 0
    for part in environment.from_string(template).generate(**context):
        parts.append(part)
        characters += len(part)
        if characters > MAX_CHARACTERS:
            refuse(f"its text has more than {MAX_CHARACTERS:,} characters")
    return "".join(parts)


if __name__ == "__main__":
    if sys.platform != "win32":
        limit()
    try:
        answer = {"text": render(**json.load(sys.stdin))}
    except Exception as error:
        answer = {"fault": f"{type(error).__name__}: {error}"[:300]}
    json.dump(answer, sys.stdout)
