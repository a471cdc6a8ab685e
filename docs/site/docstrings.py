"""Docstrings are plain text. This Sphinx extension turns them into reST: paragraphs, with shapes and names as code."""

import inspect
import re

# (B, n, d), n_heads, vjp(dy), retro_np.nn, [N, F] and -1: what the docstrings write as code
AXIS = r"(?:…|\.\.\.|\w[\w'′]{0,12}(?: [·×+−-] \w+)*)"
SHAPE = rf"\({AXIS}(?:, {AXIS})*,?\)(?<!\w{{2}}\))|\({AXIS}(?:, {AXIS})+\)|\[\w, \w\]"
CALL = r"\b[A-Za-z_][\w.]*\([\w, =*]*\)"
NAME = r"\b[A-Za-z]+(?:[._]\w+)+\b|\b__?\w+__\b"


def markup(text, parameters):
    """A line of a docstring as reST: what means something to reST is escaped, and code is marked as code."""
    heads = "|".join(rf"(?<![\w.]){re.escape(name)}(?=:|, )" for name in parameters)
    code = re.compile("|".join(filter(None, ["`[^`]+`", CALL, SHAPE, NAME, heads])))
    parts, end = [], 0
    for match in code.finditer(text):
        parts += [escaped(text[end : match.start()]), rf"\ ``{match[0].strip('`')}``\ "]
        end = match.end()
    return "".join([*parts, escaped(text[end:])])


def escaped(text):
    return re.sub(r"([\\*`|_])", r"\\\1", text)


def reworded(lines, parameters):
    """The lines of a docstring as reST. A line that begins with a parameter's name and a colon begins a paragraph."""
    result, literal = [], False
    for line in lines:
        if not line.strip():
            result.append("")
        elif line.startswith((" ", "\t", ">>>")):
            if not literal:
                result += ["", "::", ""]
            result.append("   " + line)
            literal = True
            continue
        else:
            first = re.match(r"[\w, ]+(?=: )", line)
            names = {name.strip() for name in first[0].split(",")} if first else set()
            if literal or (names & set(parameters)) or line.startswith(("Returns ", "Raises ")):
                result.append("")
            result.append(markup(line, parameters))
        literal = literal and not line.strip()
    return result


def parameters_of(thing):
    try:
        return list(inspect.signature(thing).parameters)
    except (TypeError, ValueError):
        return []


def process(app, what, name, thing, options, lines):
    lines[:] = [*reworded(lines, [p for p in parameters_of(thing) if p != "self"]), ""]


def setup(app):
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True}
