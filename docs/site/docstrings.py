"""Docstrings are plain text. This Sphinx extension turns them into reST: paragraphs, lists, code and formulas."""

import inspect
import itertools
import re

# What the docstrings write as code: (B, n, d), [N, F], vjp(dy), n_heads, retro_np.nn
AXIS = r"(?:…|\.\.\.|[≤≥]?\w[\w'′]{0,12}(?: [·×+−-] \w+)*|floor\(n / m\))"
SHAPE = rf"\({AXIS}(?:, {AXIS})+,?\)|\({AXIS},\)|\[\w, \w\]"
CALL = r"\b[A-Za-z_][\w.]*\((?:[\w, =*.\[\]]|\([\w, ]*\))*\)"
NAME = r"\b(?:\w+/)*\w+\.(?:py|md|json)\b|\b[A-Za-z]{2,}(?:[._]\w+)+\b|\b__\w+__\b"
SYMBOL = r"\b(?P<letter>[ac-vx-zA-Z])_(?P<index>\w\b|\{[^}]*\})(?P<plus>\^[+⁺]|⁺)?"  # C_u and H_u^+ become formulas
CODE = re.compile("|".join(["`[^`]+`", SYMBOL, CALL, SHAPE, NAME]))
HEAD = re.compile(r"(`[^`]+`|[\w, ]+)(?= \([^()]*\): |: )")  # "h: (B, n, d)", "k, stride: as in …"


def markup(text, parameters=()):
    """A line of a docstring as reST: code and symbols are marked, and what means something to reST is escaped."""
    heads = "|".join(rf"(?<![\w.]){re.escape(name)}(?=: )" for name in parameters)
    pattern = re.compile(f"{CODE.pattern}|{heads}") if heads else CODE
    parts, end = [], 0
    for match in pattern.finditer(text):
        formula = match["letter"] and f":math:`{match['letter']}_{match['index']}{'^+' if match['plus'] else ''}`"
        parts += [escaped(text[end : match.start()]), "\\ " + (formula or f"``{match[0].strip('`')}``") + "\\ "]
        end = match.end()
    return "".join([*parts, escaped(text[end:])])


def escaped(text):
    return re.sub(r"([\\*`|_])", r"\\\1", text)


def blocks(lines, parameters):
    """The parts of a docstring as pairs of kind and text: paragraphs, items of a list, and literal lines."""
    hanging = any(before.strip() and line[:1] == " " for before, line in itertools.pairwise(lines))
    kind, found = "blank", []
    for line in lines:
        head = HEAD.match(line)
        names = {name.strip() for name in head[1].split(",")} if head else set()
        if not line.strip():
            kind = "blank"
        elif line[0] in " >" and kind in ("blank", "literal"):
            kind = "literal"
            found.append((kind, line))
        elif names & set(parameters) or (head and head[1][0] == "`"):
            kind = "item"
            found.append((kind, line))
        elif kind == "blank" or (
            kind == "item" and ((hanging and line[0] != " ") or line.startswith(("Returns", "Raises")))
        ):
            kind = "text"
            found.append((kind, line))
        else:  # a line that goes on with the thought above
            found[-1] = (kind, f"{found[-1][1]} {line.strip()}")
    return found


def as_rest(lines, parameters):
    """The lines of a docstring as lines of reST."""
    result, before = [], None
    for kind, text in blocks(lines, parameters):
        if kind != before or kind == "text":
            result += ["", "::", ""] if kind == "literal" else [""]
        result.append(
            {"text": "", "item": "- ", "literal": "   "}[kind]
            + (text if kind == "literal" else markup(text, parameters))
        )
        before = kind
    return [*result, ""]


def parameters_of(thing):
    try:
        return [name for name in inspect.signature(thing).parameters if name != "self"]
    except (TypeError, ValueError):
        return []


def process(app, what, name, thing, options, lines):
    lines[:] = as_rest(lines, parameters_of(thing))


def foreign(app, what, name, thing, skip, options):
    """Whether a member is left out: its docstring is not ours, as that of operator.attrgetter."""
    return skip or (isinstance(thing, property) and not inspect.isfunction(thing.fget)) or None


def readable(app, what, name, thing, options, signature, returns):
    """Aliases of types by their names."""

    def alias(text):
        return text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text)

    return alias(signature), alias(returns)


def setup(app):
    app.connect("autodoc-process-docstring", process)
    app.connect("autodoc-process-signature", readable)
    app.connect("autodoc-skip-member", foreign)
    return {"parallel_read_safe": True}
