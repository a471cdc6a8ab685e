"""Draw the whole of RETRO as one SVG: `python docs/landing/drawing.py` writes retro.svg beside this file.

It also writes retro-1.svg, retro-5.svg and retro-6.svg. In these, a frame with "you are here" stands around the part
that tutorial 1, 5 or 6 explains. The colours follow the reader's light or dark theme. Within a page, they follow the
page's own switch: data-theme="dark" or "light", or the class dark or light, on any element around the drawing. A part
of the model is a group whose opacity is the CSS variable --p-PART, so that a page can dim the other parts."""

import argparse
from pathlib import Path

WIDTH, HEIGHT = 720, 640
SIZE = 16  # the side of a token's square, in pixels
COLOURS = {  # name: (light, dark)
    "paper": ("#ffffff", "#14181d"), "ink": ("#1f2933", "#e4e8ec"), "soft": ("#52606d", "#a3b0bd"),
    "decoder": ("#dbe9fb", "#1d3554"), "encoder": ("#e2f2df", "#1f4328"), "stored": ("#fdeccb", "#4b3a14"),
    "asks": ("#2f6fc4", "#6aa9f0"), "found": ("#f0b93a", "#c8922a"), "edge": ("#8593a1", "#65727f"),
    "back": ("#b42318", "#ff8a7a"), "here": ("#7a3db8", "#c79bff"), "leak": ("#b93c09", "#ff9248"),
    "on": ("#ffffff", "#10151a"), "on-found": ("#1f2933", "#10151a"),
}  # fmt: skip
PLACES = {  # of "you are here": x, y, width and height of each frame
    "1": [(8, 34, 704, 100)], "5": [(16, 424, 262, 66), (398, 501, 314, 131)], "6": [(394, 271, 318, 222)],
}  # fmt: skip
TITLE = "RETRO, drawn whole"
DESCRIPTION = (
    "Once, before training: text is cut into chunks of m tokens, a frozen BERT turns each chunk N into a key, and the "
    "database stores the key with the value [N, F], where F is the chunk that came after N. For each sequence: the "
    "key of chunk C_1 finds its k nearest neighbours. The neighbour encoder reads them by self-attention, by cross- "
    "attention to H_1, the activations of the chunk that asked, and by a feed-forward layer. Its output is E_1. In "
    "the decoder, H_1^+ reads E_1 by chunked cross-attention. H_1^+ begins with the last token of C_1 and ends one "
    "token before the end of C_2. The decoder predicts the next token. On the way back, the gradient dE goes to the "
    "encoder, and dH_1 from the encoder to the decoder."
)


def colours(theme: int, scope: str) -> str:
    """The variables of one theme's colours, 0 for light or 1 for dark."""
    values = ";".join(f"--c-{name}:{pair[theme]}" for name, pair in COLOURS.items())
    return f"{scope}{{{values}}}"


def style() -> str:
    """The rules for both themes and for the fonts. Of a colour, NAME fills and s-NAME strokes.

    The colours are inherited variables, because a copy made by <use> matches no selector outside the copied group."""
    themes = [
        colours(0, ".retro"), f"@media (prefers-color-scheme:dark){{{colours(1, '.retro')}}}",
        colours(0, ":is([data-theme=light],.light) .retro"), colours(1, ":is([data-theme=dark],.dark) .retro"),
    ]  # fmt: skip
    paints = [
        f".drawn .{prefix}{name}{{{paint}:{pair[0]};{paint}:var(--c-{name})}}"
        for name, pair in COLOURS.items() for prefix, paint in (("", "fill"), ("s-", "stroke"))
    ]  # fmt: skip
    fonts = (
        ".drawn text{font-family:system-ui,sans-serif;font-size:13.5px}.drawn .t{font-weight:600}"
        ".drawn .n{font-size:12.5px}.drawn .x{font-size:11.5px}"
        ".drawn .m{font-family:serif;font-style:italic;font-size:15px}"
    )
    return f"<style>{''.join([*themes, *paints, fonts])}</style>"


def symbol(words: str) -> tuple[str, int]:
    """The spans of a symbol such as H, C_1 or H_1+, and by how much the next span must be lowered."""
    name, _, index = words.partition("_")
    plus = index.endswith("+")
    index = index.removesuffix("+")
    spans = f'<tspan class="m">{name}</tspan>'
    if index:
        spans += f'<tspan class="x" dy="4">{index}</tspan>'
    if plus:
        spans += '<tspan class="x" dy="-10" dx="-7">+</tspan>'
    return spans, 6 if plus else -4 if index else 0


def text(x: float, y: float, words: str, kind: str = "ink", anchor: str = "middle") -> str:
    """A line of text. What stands between asterisks is a symbol."""
    spans, lower = [], 0
    for number, part in enumerate(words.split("*")):
        if part:
            inner, after = symbol(part) if number % 2 else (part, 0)
            spans.append(f'<tspan dy="{lower}">{inner}</tspan>' if lower else inner)
            lower = after
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" class="{kind}">{"".join(spans)}</text>'


def box(x: float, y: float, width: float, height: float, colour: str, *lines: str) -> str:
    """A box with centred lines of text, the first of them bold."""
    frame = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" class="{colour} s-edge"/>'
    first = y + height / 2 + 5 - 8.5 * (len(lines) - 1)
    kinds = ["ink t", *["soft n"] * len(lines)]
    rows = enumerate(zip(lines, kinds, strict=False))
    return frame + "".join(text(x + width / 2, first + 17 * row, line, kind) for row, (line, kind) in rows)


def arrow(path: str, kind: str = "ink", name: str = "retro") -> str:
    """A path with a head at its end. A gradient's is dashed. name: the drawing's, which the heads' ids begin with."""
    dash = ' stroke-dasharray="5 4"' if kind == "back" else ""
    return f'<path d="{path}" fill="none" stroke-width="1.6" class="s-{kind}"{dash} marker-end="url(#{name}-{kind})"/>'


def heads(name: str = "retro") -> str:
    """The heads of arrows, one for each colour."""
    shape = 'viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"'
    kinds = ("ink", "soft", "back", "leak")
    marks = (f'<marker id="{name}-{k}" {shape}><path d="M0 0L8 4L0 8z" class="{k}"/></marker>' for k in kinds)
    return f"<defs>{''.join(marks)}</defs>"


def tokens(x: float, y: float, count: int, colour: str, size: int = SIZE) -> str:
    """A row of tokens as squares."""
    squares = (f'<rect x="{x + size * i}" y="{y}" width="{size}" height="{size}"/>' for i in range(count))
    return f'<g class="{colour} s-edge">{"".join(squares)}</g>'


def bracket(x: float, y: float, width: float, label: str, below: bool = False) -> str:
    """A bracket over or below a row of tokens, with a label."""
    tick, high = (-5, 16) if below else (5, -6)
    line = f"M{x + 2} {y + tick}V{y}H{x + width - 2}V{y + tick}"
    return f'<path d="{line}" fill="none" class="s-ink" stroke-width="1.4"/>' + text(x + width / 2, y + high, label)


def once() -> dict[str, list[str]]:
    """The database, which is built once: part → its elements."""
    return {
        "text": [
            text(16, 26, "Once, before training", "soft t", "start"),
            box(16, 44, 166, 80, "stored"), text(99, 63, "text", "ink t"),
            tokens(35, 72, 4, "found"), tokens(99, 72, 4, "stored"),
            text(67, 104, "*N*"), text(131, 104, "*F*"), text(99, 119, "chunks of *m* tokens", "soft n"),
        ],
        "key": [
            arrow("M182 84H216"),
            box(218, 44, 172, 80, "stored", "frozen BERT", "turns a chunk *N* into", "its key: one vector"),
        ],
        "database": [
            arrow("M390 84H424"),
            box(426, 44, 278, 80, "stored", "database", "key  →  value [*N*, *F*]", "*F*: what came after *N*"),
        ],
    }  # fmt: skip


def each_sequence(m: int = 4) -> dict[str, list[str]]:
    """What happens to each sequence: part → its elements."""
    chunk, wide = m * SIZE, m * 22
    sequence = [text(16, 168, "For each sequence", "soft t", "start")]
    for u in range(3):
        left = 41 + u * (chunk + 8)
        sequence += [tokens(left, 226, m, "decoder" if u else "asks"), text(left + chunk / 2, 217, f"*C_{u + 1}*")]
    return {
        "sequence": sequence,
        "search": [
            arrow("M73 198V186H304V126", "soft"), text(314, 178, "the key of *C_1*: which", "soft n", "start"),
            text(314, 194, "keys are nearest?", "soft n", "start"),
            arrow("M574 126V200"), text(584, 168, "the *k* nearest", "soft n", "start"),
            *(tokens(510, y, m, "found") + tokens(510 + chunk, y, m, "stored") for y in (208, 234)),
            text(500, 221, "*N*, *F*", anchor="end"), text(500, 247, "*N*, *F*", anchor="end"),
            text(648, 234, "RET(*C_1*)", anchor="start"),
        ],
        "encoder": [
            text(404, 288, "neighbour encoder", "soft t", "start"),
            '<rect x="402" y="298" width="302" height="188" rx="9" fill="none" class="s-edge" stroke-dasharray="2 3"/>',
            arrow("M574 252V310"),
            box(452, 312, 244, 36, "encoder", "self-attention, both ways"), arrow("M574 348V364"),
            box(452, 366, 244, 42, "encoder", "cross-attention to *H_1*"), arrow("M574 408V424"),
            box(452, 426, 244, 52, "encoder", "feed-forward", "*E_1*: *k* × 2*m* vectors"),
            '<circle cx="145" cy="380" r="3.5" class="ink"/>', arrow("M145 380H450"),
            text(286, 373, "*H_1*: the chunk that asked", "soft n"),
        ],
        "decoder": [
            text(41, 288, "decoder", "soft t", "start"),
            arrow("M145 246V310"),
            box(41, 312, 208, 44, "decoder", "self-attention, causal"),
            arrow("M145 356V430"), text(157, 372, "*H*", anchor="start"),
            arrow("M145 482V510"),
            box(41, 512, 208, 36, "decoder", "feed-forward"),
            arrow("M145 548V582"), text(145, 600, "the next token", "ink t"),
            text(145, 618, "after all layers", "soft n"),
        ],
        "cca": [
            box(24, 432, 246, 50, "decoder", "chunked cross-attention", "*H_1+* reads *E_1*"),
            arrow("M452 444H274"), text(336, 437, "*E_1*"),
        ],
        "shift": [
            *(tokens(410 + u * wide, 532, m, "decoder" if u else "asks", 22) for u in range(3)),
            *(bracket(410 + u * wide, 527, wide, f"*C_{u + 1}*") for u in range(3)),
            *(bracket(410 + u * wide - 22, 559, wide, f"*H_{u}+*", below=True) for u in (1, 2)),
            text(410, 601, "*E_1* was found with all of *C_1*. So its first reader", "soft n", "start"),
            text(410, 619, "is the last token of *C_1*: *H_1+* starts there.", "soft n", "start"),
        ],
        "back": [
            arrow("M274 462H448", "back"), text(336, 480, "*dE*", "back"),
            arrow("M450 396H153", "back"), text(286, 412, "*dH_1*", "back"),
            *(arrow(path, "back") for path in ("M113 582V552", "M113 512V486", "M113 432V360", "M113 312V250")),
            text(336, 536, "dashed:", "back n"), text(336, 552, "gradients", "back n"),
        ],
    }  # fmt: skip


def drawing(place: str = "") -> str:
    """The SVG. place: a tutorial of PLACES, or nothing. One group, named as the file is, holds all that is drawn."""
    name = f"retro{'-' + place if place else ''}"
    parts = {**once(), **each_sequence()}
    drawn = [f'<g style="opacity:var(--p-{part},1)">{"".join(lines)}</g>' for part, lines in parts.items()]
    for number, (x, y, width, height) in enumerate(PLACES.get(place, ())):
        frame = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="none" stroke-width="3"'
        drawn.append(f'<rect {frame} class="s-here"/>')
        if not number:
            drawn.append(text(x + width - 8, y - 7, "you are here", "here t", "end"))
    body = "\n".join(drawn).replace("url(#retro-", f"url(#{name}-")
    where = f" You are here: tutorial {place}." if place else ""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" class="retro" role="img"'
        f' aria-labelledby="{name}-title {name}-desc">',
        f'<title id="{name}-title">{TITLE}</title>', f'<desc id="{name}-desc">{DESCRIPTION}{where}</desc>',
        style(), f'<g id="{name}" class="drawn">', heads(name),
        f'<rect width="{WIDTH}" height="{HEIGHT}" class="paper"/>', body, "</g>", "</svg>\n",
    ])  # fmt: skip


def files() -> dict[str, str]:
    """The drawing and the copies for tutorials: file name → its text."""
    return {f"retro{'-' + place if place else ''}.svg": drawing(place) for place in ("", *PLACES)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the whole of RETRO.")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="folder of the drawings")
    folder = parser.parse_args().to
    if not folder.is_dir():
        parser.error(f"--to {folder}: there is no such folder; make it first")
    for name, content in files().items():
        (folder / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
