"""The exceptions: for a mistake of the user, and for a wrong gradient with its report."""

import math
from dataclasses import dataclass


class UserError(ValueError):
    """A mistake that the user can correct. Its text is one line that says what is wrong, where, and what to do.

    The command line prints that line without a traceback and exits with status 2. UserError is a ValueError, so that a
    program can catch it like NumPy's own."""


@dataclass(frozen=True)
class GradientRow:
    """What was found about one argument.

    argument: its position. name: its name in f's signature.
    verdict: "right", "wrong", "cannot tell", "frozen", "skipped" (not floating-point) or "not checked".
    error: the worst error, relative to the slope, or to what the differences resolve if that is larger.
    where: the entry or direction with that error. resolution: how closely the best slope was compared, relatively.
    steps: the smallest and the largest step. note: the reason, or the likely mistake."""

    argument: int
    name: str
    verdict: str
    error: float = 0.0
    where: str = ""
    resolution: float = 0.0
    steps: tuple[float, float] = (0.0, 0.0)
    note: str = ""


@dataclass(frozen=True)
class GradientReport:
    """The result of `gradcheck`: true if the check passed; as a float the worst error; printed, a table.

    passed: whether no gradient is wrong or undecided. rows: one GradientRow per argument.
    message: the text of the GradientError, empty if the check passed."""

    passed: bool
    rows: tuple[GradientRow, ...]
    message: str = ""

    @classmethod
    def of_failure(cls, error: "GradientError", names: list[str]) -> "GradientReport":
        """The report of an error that ended the check before the differences were compared."""
        rows = [
            GradientRow(i, names[i], "wrong" if hit else "not checked", math.inf if hit else 0.0, note=str(error) * hit)
            for i, hit in enumerate(error.position in (None, i) for i in range(len(names)))
        ]
        return cls(False, tuple(rows), str(error))

    @property
    def error(self) -> float:
        """The worst error of all arguments."""
        return max((row.error for row in self.rows), default=0.0)

    def __bool__(self) -> bool:
        return self.passed

    def __float__(self) -> float:
        return self.error

    def __str__(self) -> str:
        lines = [("argument", "verdict", "error", "resolution", "steps", "where", "note")]
        for row in self.rows:
            numbers = f"{row.error:.1e}", f"{row.resolution:.0e}", "{:.0e} to {:.0e}".format(*row.steps)
            shown = numbers if row.steps[1] else ("", "", "")
            lines.append((f"{row.argument} {row.name}", row.verdict, *shown, row.where, row.note))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


class GradientError(AssertionError):
    """A pullback is wrong or cannot be judged. The message names the argument, the entry and both values.

    report: the GradientReport. position: the argument's, or None if the mistake concerns all of them."""

    report: GradientReport | None = None

    def __init__(self, message: str, position: int | None = None) -> None:
        super().__init__(message)
        self.position = position


class GradientFormError(GradientError, ValueError, TypeError):
    """A value or a gradient has the wrong form: shape, key, dtype. This is a ValueError and a TypeError as well."""
