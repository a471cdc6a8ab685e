"""The essay's other figures, drawn as drawing.py draws: the staircase, the learning curve, and where a gain comes from.

Each is 400 units wide, so that a phone shows it at about its own size."""

from collections.abc import Sequence
from typing import Any

from drawing import arrow, text

M, ROW, TOP = 4, 32, 66  # tokens of a chunk in the staircase, height of a row, where the rows begin
COLUMNS = {1: 254, 2: 328}  # x of E_1 and of E_2
WIDE = 64  # the width of a column, in pixels


def svg(name: str, height: float, title: str, description: str, drawn: Sequence[str]) -> str:
    """A figure of the page. name: begins its ids."""
    head = f'<svg viewBox="0 0 400 {height}" class="retro drawn" role="img" aria-labelledby="{name}-title {name}-desc">'
    labels = f'<title id="{name}-title">{title}</title><desc id="{name}-desc">{description}</desc>'
    return "\n".join([head, labels, f'<rect width="400" height="{height}" class="paper"/>', *drawn, "</svg>"])


def staircase(shift: int, words: Sequence[str]) -> str:
    """Who reads E_1 and E_2 if H_u+ begins `shift` tokens after C_u does. words: the tokens of two chunks and more."""
    at = {M: "m", M - 1: "m − 1", M - 2: "m − 2"}[shift]
    drawn = [
        text(82, 56, "token", "soft n"), text(186, 56, "must predict", "soft n"),
        *(text(x + WIDE / 2, 18, f"*E_{u}*", "ink t") + text(x + WIDE / 2, 38, "found", "soft n")
          + text(x + WIDE / 2, 54, f"with *C_{u}*", "soft n") for u, x in COLUMNS.items()),
    ]  # fmt: skip
    for row, word in enumerate(words[:-1]):
        y, kind = TOP + row * ROW, "asks" if row < M else "decoder" if row < 2 * M else "paper"
        if row % M == 0:
            end = min(row + M, len(words) - 1)
            drawn.append(text(14, (y + TOP + end * ROW) / 2 + 2, f"*C_{row // M + 1}*"))
            drawn.append(f'<path d="M32 {y + 4}H27V{TOP + end * ROW - 6}H32" fill="none" class="s-edge"/>')
        drawn.append(f'<rect x="36" y="{y + 2}" width="92" height="{ROW - 6}" rx="5" class="{kind} s-edge"/>')
        drawn.append(
            f'<text x="82" y="{y + 19}" text-anchor="middle" class="w {"on" if row < M else "ink"}">{word}</text>'
        )
        drawn.append(predicted(row, words[row + 1], shift))
    last = TOP + (len(words) - 1) * ROW
    bars = [bar(u, x, TOP + (shift + (u - 1) * M) * ROW, last) for u, x in COLUMNS.items()]
    drawn.append(f'<g class="bars">{"".join(bars)}</g>')
    description = {
        M: "The first token that reads E_1 is the first token of C_2. The last token of C_1 reads nothing.",
        M - 1: "The first token that reads E_1 is the last token of C_1.",
        M - 2: "The token before the last one of C_1 reads E_1, which was found with the token that it must predict.",
    }[shift]
    return svg(f"shift-{shift}", last + 8, f"Who reads what with a shift of {at}", description, drawn)


def predicted(row: int, word: str, shift: int) -> str:
    """The token that a row must predict, and how: from what it reads, without reading, or having seen it."""
    y = TOP + row * ROW
    position = row % M
    leaks = position in range(shift, M - 1)
    first = row >= shift and (row - shift) % M == 0
    lost = position == M - 1 and shift == M
    kind = "leak t" if leaks else "soft" if lost else "ink"
    drawn = [f'<text x="139" y="{y + 19}" class="w {kind}">→ {word}</text>']
    if leaks or lost:
        stroke = 's-leak" stroke-width="2"' if leaks else 's-soft" stroke-dasharray="3 3"'
        drawn.append(f'<rect x="134" y="{y + 2}" width="104" height="{ROW - 6}" rx="5" fill="none" class="{stroke}/>')
    if first and (reads := 1 + (row - shift) // M) in COLUMNS:
        drawn.append(arrow(f"M{COLUMNS[reads]} {y + 15}H242", "leak" if leaks else "ink"))
    return "".join(drawn)


def bar(u: int, x: float, y: float, last: float) -> str:
    """The tokens that read E_u, as a bar which is cut off at the last row."""
    height = min(M * ROW, last - y) - 4
    dots = (
        f'<circle cx="{x + 24}" cy="{y + 15 + ROW * i}" r="3" class="on-found"/>' for i in range(int(height // ROW) + 1)
    )
    label = text(x + WIDE - 14, y + 21, f"*H_{u}+*", "on-found")
    return f'<rect x="{x}" y="{y}" width="{WIDE}" height="{height}" rx="7" class="found s-edge"/>{"".join(dots)}{label}'


def learning_curve(record: dict[str, Any]) -> str:
    """The share of right codes against steps: every run with retrieval on, and the two flat lines."""
    steps, left, right, top, bottom = record["steps"], 44, 388, 22, 236

    def point(step: float, share: float) -> str:
        return f"{left + (right - left) * step / steps:.1f} {bottom - (bottom - top) * share:.1f}"

    def line(curve: list[dict[str, Any]], name: str, kind: str, width: float) -> str:
        path = "M" + "L".join(point(row["step"], row[name]["right"]) for row in curve)
        return f'<path d="{path}" fill="none" stroke-width="{width}" stroke-linejoin="round" class="s-{kind}"/>'

    drawn = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        _, y = map(float, point(0, share).split())
        drawn.append(f'<path d="M{left} {y}H{right}" stroke-width="1" class="s-edge" opacity="0.45"/>')
        drawn.append(text(left - 7, y + 4, f"{100 * share:.0f}", "soft n", "end"))
    for step in range(0, steps + 1, 500):
        x = float(point(step, 0).split()[0])
        drawn.append(text(min(x, right - 8), bottom + 18, f"{step:,}", "soft n"))
    drawn += [line(run["curve"], "on", "asks", 1.8) for run in record["runs"]]
    for name, kind, width in (("off", "soft", 5), ("others", "leak", 1.8)):
        drawn += [line(run["curve"], name, kind, width) for run in record["runs"]]
    drawn += [
        text(8, 12, f"right answers out of {record['asked']}", "soft n", "start"),
        text(right, bottom + 36, "training steps", "soft n", "end"),
        text(right - 4, point_y(record, point) + 34, "retrieval on", "asks t", "end"),
        text(right - 4, bottom - 24, "neighbours of others,", "leak t", "end"),
        text(right - 4, bottom - 8, "and retrieval off", "soft t", "end"),
    ]  # fmt: skip
    title, n = "The learning curve", len(record["runs"])
    return svg("curve", bottom + 44, title, f"{n} runs: with retrieval on, the share of right codes rises.", drawn)


def point_y(record: dict[str, Any], point: Any) -> float:
    """Where the lowest curve is in the last third, below which its label stands."""
    late = (row["on"]["right"] for run in record["runs"] for row in run["curve"] if row["step"] > record["steps"] / 2)
    return float(point(0, min(late)).split()[1])


def gains(rows: Sequence[tuple[str, str, dict[str, Any]]]) -> str:
    """Bars of how many bits retrieval saves, with intervals. rows: a label, a line below it, and a comparison."""
    left, right = 172, 388
    low = min(row["interval_percent"][0] for _, _, row in rows)

    def x(percent: float) -> float:
        return round(left + (right - left) * percent / low, 1)

    drawn = []
    for number, (label, below, row) in enumerate(rows):
        y = 16 + 62 * number
        saved, (lower, upper) = row["difference_percent"], row["interval_percent"]
        drawn += [
            text(left - 10, y + 14, label, "ink t", "end"), text(left - 10, y + 31, below, "soft n", "end"),
            f'<rect x="{left}" y="{y}" width="{x(saved) - left}" height="20" class="asks"/>',
            f'<path d="M{x(upper)} {y + 10}H{x(lower)}M{x(upper)} {y + 5}v10M{x(lower)} {y + 5}v10" class="s-ink"'
            ' stroke-width="1.6" fill="none"/>',
            text(left + 4, y + 38, f"{saved:+.2f} %".replace("-", "−"), "ink t", "start"),
        ]  # fmt: skip
    bottom = 16 + 62 * len(rows)
    drawn.append(f'<path d="M{left} 8V{bottom}" class="s-ink" stroke-width="1.4"/>')
    words = "; ".join(f"{label}: {row['difference_percent']:+.2f} %" for label, _, row in rows)
    return svg("gains", bottom + 6, "Where the saving comes from", words, drawn)
