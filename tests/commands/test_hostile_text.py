"""What a stranger wrote is shown, never obeyed, in every command. Ground truth: the bytes that a command writes."""

import contextlib
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from retro_np.cli import main

# Clear the screen, set the clipboard, a link, an 8-bit CSI, a bell, delete, a carriage return, a right-to-left override
EVIL = "\x1b[2J\x1b]52;c;aGk=\x07\x1b]8;;http://x.example\x1b\\\x9b2J\x7f\rover\u202e"
FOLDER = os.fsdecode(b"odd \xff\xfe [bold] :smile: \x1b[2J")
SIZES = "--d-model 8 --d-ffw 8 --n-heads 1 --d-head 8 --n-layers 2 --encoder-layers 1 --cca-layers 2 "
RUN = "--sequence-length 16 --steps 2"


def command(*arguments) -> tuple[int, str, str]:
    """Run a command in this process. Returns its exit status, output and errors."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["retro-np", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit:
            main()
    finally:
        sys.argv = argv
    return exit.value.code, out.getvalue(), err.getvalue()


def assert_harmless(*texts: str) -> None:
    for text in texts:
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", text), text


def write_evil(folder: Path, names: str) -> Path:
    folder.mkdir(parents=True)
    for number in range(8):
        text = f"value index {number} {EVIL} return {number} " * 8
        (folder / f"{names}{number}.py").write_text(text.replace("\r", "\r\n"), newline="")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents with hostile names and texts, their database and a model, in a folder whose name is not UTF-8."""
    folder = tmp_path_factory.mktemp("hostile") / FOLDER
    write_evil(folder / "docs", EVIL.replace("/", ""))
    (folder / "docs" / f"binary{EVIL.replace('/', '')}\n.bin").write_bytes(b"a\0b")
    outputs = [
        command("build", folder / "docs", "-o", folder / "db", "--embedder", "hashing", "--chunk-size", "8",
                "--vocabulary-size", "300", "--held-out", "0.4"),
        command("train", folder / "db", "-o", folder / "run", *(SIZES + RUN).split()),
    ]  # fmt: skip
    for status, out, err in outputs:
        assert status == 0, err
        assert_harmless(out, err)
    kinds = "binary, special, or links that lead to no file inside the folder, or databases and runs"
    skipped = f"Skipped: 1 file ({kinds}), for example binary␛[2J"
    assert skipped in " ".join(outputs[0][1].split())
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["search", "{db}", "value index"], ["search", "{db}", EVIL], ["verify", "{db}"],
        ["evaluate", "{model}", "{db}", "-o", "{new}", "--sequence-length", "16", "--stride", "8"],
        ["sample", "{model}", "{db}", "--prompt", EVIL, "--length", "12", "--page", "{new}.html"],
        ["inspect", "{model}", "{db}", "return " + EVIL, "-o", "{new}.html"],
        ["inspect", "{model}", "{db}", "--prompt", "value index", "--length", "12", "-o", "{new}.html"],
        ["build", "{folder}/docs", "-o", "{new}", "--like", "{db}"],
    ],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_a_command_works_and_prints_no_control_character(folder, arguments, request):
    names = {"db": folder / "db", "model": folder / "run/checkpoint.safetensors", "folder": folder}
    names["new"] = folder / f"new{abs(hash(request.node.name))}"
    status, out, err = command(*(a.format(**names) if "{" in a else a for a in arguments))
    assert status == 0, err
    assert_harmless(out, err)


def test_editing_a_database_prints_no_control_character(folder, tmp_path):
    copy = shutil.copytree(folder / "db", tmp_path / FOLDER)
    more = write_evil(tmp_path / "more", "more" + EVIL.replace("/", ""))
    for arguments in (["add", copy, more], ["remove", copy, "--document", "1"], ["compact", copy], ["verify", copy]):
        status, out, err = command(*arguments)
        assert status == 0, err
        assert_harmless(out, err)


@pytest.mark.parametrize(
    "arguments",
    [
        [EVIL], ["search", EVIL, "x"], ["search", "{db}"], ["search", "{db}", "x", f"--{EVIL}"], ["verify", EVIL],
        ["search", "{db}", "x", "-k", EVIL], ["remove", "{db}", "--document", EVIL], ["build", EVIL, "-o", "{new}"],
        ["build", "{folder}/docs", "-o", "{new}", "--embedder", EVIL],
        ["build", "{folder}/docs", "-o", "{folder}"], ["build", "--source", f"{EVIL}=x:y", "-o", "{new}"],
        ["train", "{db}", "-o", "{new}", "--preset", EVIL], ["train", "{db}", "-o", "{new}", "--cca-layers", EVIL],
        ["sample", EVIL, "{db}"], ["inspect", "{db}/manifest.json", "{db}", "x", "-o", "{new}"],
        ["gradcheck", EVIL], ["gradcheck", f"{EVIL}.py:f"], ["experiment", EVIL],
        ["evaluate", "{folder}/docs", "{db}", "-o", "{new}"],
        ["build", "{folder}/docs", "-o", "{new}", "--tokenizer", EVIL],
    ],
)  # fmt: skip
def test_an_error_is_one_line_without_control_characters(folder, arguments):
    names = {"db": folder / "db", "folder": folder, "new": folder / "never"}
    status, out, err = command(*(a.format(**names) if "{" in a else a for a in arguments))
    assert status == 2, out
    assert_harmless(out, err)
    assert err.count("\n") == 1
    assert err.startswith("retro-np: ")


def test_a_file_name_cannot_add_a_line_to_a_verification(folder, tmp_path):
    copy = shutil.copytree(folder / "db", tmp_path / "db")
    (copy / f"other {EVIL.replace('/', '')}\nok: everything matches").write_text("")
    status, out, err = command("verify", copy)
    assert status == 0, err
    assert_harmless(out, err)
    assert "ok: everything matches" in " ".join(out.split())
    assert not re.search("^ok: everything", out, re.MULTILINE)


def test_json_output_is_printable_ascii_and_holds_the_text_unchanged(folder):
    status, out, err = command("search", folder / "db", "value", "-k", "3", "--json")
    assert status == 0, err
    assert re.fullmatch(r"([ -~]+\n){3}", out)
    results = [json.loads(line) for line in out.splitlines()]
    assert any("\x1b" in result["chunk"] + result["continuation"] for result in results)
    assert all(EVIL.replace("/", "") in result["name"] for result in results)


@pytest.mark.parametrize("arguments", [["sample", "--length", "4", "--page"], ["inspect", "value index return", "-o"]])
def test_a_page_replaces_a_page_but_no_other_file(folder, tmp_path, arguments):
    page, models = tmp_path / "page.html", (folder / "run/checkpoint.safetensors", folder / "db")
    line = [arguments[0], *models, *arguments[1:]]
    page.write_text("")
    for _ in range(2):  # an empty file, then a page
        status, _, err = command(*line, page)
        assert status == 0, err
        assert page.read_text().startswith("<!doctype html>")
    (tmp_path / "circle").symlink_to("circle")
    page.write_text("<!doctype html>\n<title>My notes</title>")
    for path, problem in ((page, "did not write it"), (tmp_path / "circle", "is not an ordinary file")):
        status, out, err = command(*line, path)
        assert (status, out) == (2, "")
        assert problem in err
    assert page.read_text() == "<!doctype html>\n<title>My notes</title>"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["circle", "page.html"]


@pytest.mark.slow
def test_a_terminal_gets_no_sequence_of_a_text(folder):
    code = "import retro_np.progress as p; p.DELAY = -1; from retro_np.cli import main; main()"
    arguments = ["build", folder / "docs", "-o", folder / "terminal", "--like", folder / "db"]
    for number, line in enumerate((arguments, ["search", folder / "db", "value"], ["search", folder / EVIL, "x"])):
        reader, terminal = pty.openpty()
        child = subprocess.Popen(
            [sys.executable, "-c", code, *line], stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal,
            env=os.environ | {"TERM": "xterm-256color", "FORCE_COLOR": "1"},
        )  # fmt: skip
        os.close(terminal)
        data = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while block := os.read(reader, 1 << 16):
                data += block
        os.close(reader)
        assert child.wait() == (2 if number == 2 else 0), data
        text = data.decode()
        assert "␛" in text
        for sequence in ("\x1b[2J", "\x1b]", "\x9b", "\x07", "\u202e", "\rover"):
            assert sequence not in text
