"""Progress on standard error. Ground truth: what a terminal and a file show, with rich and without it."""

import os
import pty
import subprocess
import sys

import pytest

from retro_np import progress
from retro_np.progress import progress_bar

SHOW = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if {block!r} and name.partition(".")[0] == {block!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Block())
from retro_np import progress
progress.DELAY = -1.0
with progress.progress_bar("working", 3, unit="chunks") as advance:
    advance(note="first")
"""


def on_a_terminal(block: str) -> str:
    """What a process writes if its standard error is a terminal."""
    master, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    subprocess.run([sys.executable, "-c", SHOW.format(block=block)], stderr=terminal, env=environment, check=True)
    os.close(terminal)
    written = b""
    try:
        while part := os.read(master, 4096):
            written += part
    except OSError:  # Linux reports the closed terminal as an input/output error.
        pass
    os.close(master)
    return written.decode()


def test_short_work_is_silent(capsys):
    with progress_bar("working", 3) as advance:
        advance()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("total", "line"),
    [(3, "working: 2 of 3 chunks, about 0 s left "), (None, "working: 2 chunks ")],
)
def test_a_line_is_printed_if_standard_error_is_not_a_terminal(total, line, capsys, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", -1.0)
    with progress_bar("working", total, unit="chunks") as advance:
        advance(2, note="loss 1.0")
        advance(1)
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith(line)
    assert printed.endswith(" chunks/s loss 1.0")


def test_a_terminal_shows_a_bar():
    written = on_a_terminal("")
    assert "working" in written
    assert "1 of 3 chunks" in written
    assert "━" in written


def test_without_rich_a_terminal_shows_lines():
    written = on_a_terminal("rich")
    assert written.startswith("working: 1 of 3 chunks")
    assert "━" not in written
