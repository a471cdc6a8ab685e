"""The tutorials. Ground truth: what a run of a source printed; our answers, and mistakes that checks must notice.

RETRO_NP_NOTEBOOKS names a folder of freshly executed notebooks, which are tested in addition to the committed ones.
"""

import ast
import importlib
import inspect
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from figures import facts_of, figures_in, has, numbers_in

from retro_np.tutorials.checks import judge

TUTORIALS = Path(__file__).parents[2] / "tutorials"
sys.path.append(str(TUTORIALS))
jupytext = pytest.importorskip("jupytext") if not os.environ.get("CI") else __import__("jupytext")
execute = pytest.importorskip("execute") if not os.environ.get("CI") else __import__("execute")

SOURCES = execute.sources()
FRESH = os.environ.get("RETRO_NP_NOTEBOOKS")
FOLDERS = {"committed": TUTORIALS, **({"fresh": Path(FRESH)} if FRESH else {})}
FIRST_CODE = """# This notebook runs anywhere once retro_np is installed:
# pip install ".[tutorials]" in a clone, or pip install a wheel of it.
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # Set before NumPy is imported: the times below are those of one thread."""
each_tutorial = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def cells_of(source):
    return execute.notebook(source).cells


def printed(cell):
    """What a cell of an executed notebook printed."""
    outputs = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"]  # progress, which is not committed
    return "".join("".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in outputs)


def printed_near(cells, index):
    """What was printed near a cell: by the last two printing cells before it, and by the next printing cell."""
    earlier, later = ([text for text in map(printed, part) if text] for part in (cells[:index], cells[index:]))
    return " \n ".join(earlier[-2:] + later[:1])


def code_of(cells):
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@each_tutorial
def test_a_notebook_has_the_cells_of_its_source(source):
    cells, made = jupytext.read(source.with_suffix(".ipynb")).cells, cells_of(source)
    assert [cell.source for cell in cells] == [cell.source for cell in made]
    assert [cell.cell_type for cell in cells] == [cell.cell_type for cell in made]


@pytest.mark.parametrize("folder", FOLDERS.values(), ids=FOLDERS)
@each_tutorial
def test_each_figure_in_a_text_was_printed_nearby_or_is_in_the_code_or_among_the_facts(source, folder):
    cells = json.loads((folder / f"{source.stem}.ipynb").read_text(encoding="utf-8"))["cells"]
    known, missing = numbers_in(code_of(cells)) | facts_of(source.stem[:2]), []
    for index, cell in enumerate(cells):
        if cell["cell_type"] == "markdown":
            numbers = numbers_in(printed_near(cells, index)) | known
            missing += [f"cell {index}: {x.text}" for x in figures_in("".join(cell["source"])) if not has(numbers, x)]
    assert not missing, ", ".join(missing)


@each_tutorial
def test_no_line_of_prose_is_rendered_as_a_list_item_or_left_out_by_mistake(source):
    prose = [cell.source for cell in cells_of(source) if cell.cell_type == "markdown"]
    assert [line for text in prose for line in text.splitlines() if re.match(r"[+*] |%", line)] == []


@each_tutorial
def test_each_tutorial_says_what_it_takes_settles_the_threads_first_and_ends_with_what_was_gained(source):
    cells = cells_of(source)
    first_code = next(cell.source for cell in cells if cell.cell_type == "code")
    assert re.search(r"^\*Reading: about \d+ minutes · runs in [^*]+\*", cells[0].source, re.MULTILINE)
    assert first_code.startswith(FIRST_CODE)
    assert "What you have gained" in "".join(cell.source for cell in cells[-3:])


@each_tutorial
def test_every_relative_link_of_a_notebook_leads_to_a_file(source):
    text = "\n".join(cell.source for cell in cells_of(source) if cell.cell_type == "markdown")
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in target]
    assert [target for target in targets if not (TUTORIALS / target).exists()] == []


# Exercises


def tags_of(cell):
    return cell.metadata.get("tags", [])


def calls_of(source):
    """(check, texts of its arguments, number of its cell) of each check cell of a tutorial."""
    checks = importlib.import_module(f"retro_np.tutorials.checks.tutorial_{source.stem[:2]}")
    found = []
    for number, cell in enumerate(cells_of(source)):
        if "check" in tags_of(cell):
            (statement,) = ast.parse(cell.source).body
            call = statement.value
            found.append((getattr(checks, call.func.id), list(map(ast.unparse, call.args)), number))
    return found


CHECKS = [check for source in SOURCES for check, *_ in calls_of(source)]
each_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.number)
HOSTILE = [None, ..., 1.5, "text", (None, None), {"a": 1}, [], lambda *_: None, float("nan"), [[1], [2, 3]]]


def stub(*_): ...


def breaks(*_):
    raise ZeroDivisionError("of the reader")


@each_check
def test_a_check_accepts_our_answer(check, capsys):
    assert check(*judge.answers_of(check)) is True, capsys.readouterr().out
    assert capsys.readouterr().out.startswith(f"{check.number} is right: ")


@each_check
def test_a_check_says_of_a_stub_that_it_is_not_answered_yet(check, capsys):
    assert check(*[stub] * len(check.names)) is False
    assert capsys.readouterr().out.startswith(f"{check.number} is not answered yet: ")


@pytest.mark.slow
@each_check
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from the mistakes
def test_a_check_refuses_each_known_mistake_with_its_hint(check, capsys):
    mistakes = judge.mistakes_of(check)
    assert mistakes, f"no known mistake of {check.number}"
    for mistake in mistakes:
        assert check(*judge.mistaken(check, mistake)) is False, mistake
        first, *rest = capsys.readouterr().out.splitlines()
        assert first.startswith(f"{check.number} is not right yet: ")
        assert "\n".join(rest).startswith("Hint: "), f"{mistake}: {first}"
        assert mistake["hint"] in rest[0], f"{mistake['new']} gives the results of another mistake: {rest[0]}"


@pytest.mark.slow
@each_check
def test_a_check_never_raises(check, capsys):
    for returned in HOSTILE:
        assert check(*[lambda *_, returned=returned: returned] * len(check.names)) is False, returned
        assert check(*[returned] * len(check.names)) is False, returned
    assert check(*[breaks] * len(check.names)) is False
    assert "ZeroDivisionError: of the reader" in capsys.readouterr().out


@each_tutorial
def test_each_exercise_is_a_stub_with_its_check_behind_it_and_every_check_has_its_cell(source):
    cells = cells_of(source)
    assert all(not ({"answer", "solution"} & {*tags_of(cell)}) and "jupyter" not in cell.metadata for cell in cells)
    exercises = [number for number, cell in enumerate(cells) if "exercise" in tags_of(cell)]
    calls = calls_of(source)
    assert [number for *_, number in calls] == [number + 1 for number in exercises]
    module = importlib.import_module(f"retro_np.tutorials.checks.tutorial_{source.stem[:2]}")
    checks = [value for name, value in vars(module).items() if name.startswith("check_")]
    assert len(checks) >= 2
    assert [check.number for check in checks] == [check.number for check, *_ in calls]
    for check, arguments, number in calls:
        assert arguments == list(check.names)
        stubs = {node.name: node for node in ast.parse(cells[number - 1].source).body}
        assert list(stubs) == list(check.names)
        for (name, node), answer in zip(stubs.items(), judge.answers_of(check), strict=True):
            assert ast.unparse(node.args) == str(inspect.signature(answer))[1:-1], name
            assert ast.unparse(node.body[-1]) == "...", f"{name} is no stub"


@each_tutorial
def test_no_answer_stands_in_a_notebook(source):
    def bodies(text):
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        return {node.name: "\n".join(ast.unparse(part) for part in node.body) for node in functions}

    path = TUTORIALS / "answers" / f"tutorial_{source.stem[:2]}.py"
    names = {name for check, *_ in calls_of(source) for name in check.names}
    answers = {body for name, body in bodies(path.read_text(encoding="utf-8")).items() if name in names}
    made = bodies(code_of(cells_of(source)))
    assert [name for name, body in made.items() if body in answers] == []


# The judge and the reader of figures themselves


def test_each_other_form_of_a_right_answer_passes(capsys):
    from retro_np.tutorials.answers import tutorial_05 as answers
    from retro_np.tutorials.checks import tutorial_05 as checks

    assert checks.check_5_1(lambda t, m: answers.reads(t, m).tolist())
    assert checks.check_5_1(lambda t, m: answers.reads(t, m).astype(float))
    assert checks.check_5_2(lambda *x: answers.cut(*x).tolist(), lambda *x: answers.lay_back(*x).copy("F"))
    assert checks.check_5_3(lambda *x: [part.astype("float32") for part in answers.attention_value(*x)])

    def in_lists_and_the_other_way_round(q, keys, values, table, b_c, b_p, key_mask):
        out, vjp = answers.attention(q, keys, values, table, b_c, b_p, key_mask)
        return [lambda dout: list(vjp(dout)), out.tolist()]

    assert checks.check_5_4(in_lists_and_the_other_way_round)
    assert "not" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("got", "expected", "message"),
    [
        ([1, 2, 3], (1, 2), "wrong form: it is an array of shape (3,); asked for is a tuple of 2 (a, b)"),
        ("yes", 1.0, "wrong form: it is the text 'yes'; asked for is the number 1.0"),
        ([[1.0, 2.0]], [1.0, 2.0], "the shape of it is (1, 2), not (2,)"),
        ([0.0, 1.2], [0.0, 1.5], "it is off by up to 0.3; first at [1]: 1.2, not 1.5"),
        ([1, 2, 4], [1, 2, 3], "it is wrong in 1 of 3 entries; first at [2]: 4, not 3"),
        (3, 4, "it is 3, not 4"),
        ([0.5, float("nan")], [0.5, 1.0], "it is not finite in 1 entries; first wrong at [1]: nan, not 1"),
        ("abcd", "abcx", "it differs at character 3: 'abcd', not 'abcx'"),
        ({"a": 1}, {"b": 1}, "it lacks b and has a, not asked for"),
        ({"a": 1.0}, {"a": 2.0}, "a is 1, not 2"),
        ({1, 2}, {1, 3}, "it lacks 3"),
        (([1.0], [2.0]), ([1.0], [2.5]), "b is off by up to 0.5; first at [0]: 2, not 2.5"),
        (([1.0], [2.0]), ([2.0], [1.0]), "it has the right parts in a wrong order: b stands where a is asked for"),
        (None, 1.0, "wrong form: it is None; asked for is the number 1.0"),
    ],
)
def test_a_message_says_what_is_wrong_where_and_by_how_much(got, expected, message):
    assert judge.compare(got, expected, "it", ("a", "b")) == message


def test_a_message_names_the_function_and_the_line_that_failed(capsys):
    @judge.exercise("0.0", "f", right="")
    def check(f):
        yield judge.compare(f(1), 1)

    assert check(breaks) is False
    said = capsys.readouterr().out
    assert said.startswith("0.0 is not right yet: f stops with ZeroDivisionError: of the reader, at line ")
    assert 'raise ZeroDivisionError("of the reader")' in said


def test_a_message_about_a_failure_says_for_which_arguments_also_of_a_pullback(capsys):
    @judge.exercise("0.0", "f", right="")
    def check(f):
        yield judge.pullback(f, np.ones((2, 3)), 4, expected=(np.ones((2, 3)), lambda dy: dy))

    def f(x, m):
        return x, lambda dx: breaks()

    assert check(f) is False
    assert capsys.readouterr().out.endswith(" (x of shape (2, 3), m = 4, dx of shape (2, 3)).\n")


def test_a_hint_is_found_whatever_the_order_of_a_dict_and_for_equal_messages(capsys, monkeypatch):
    @judge.exercise("0.0", "f", right="")
    def check(f):
        yield judge.holds(f() == {"a": 1}, "not so")

    for known, given in (({"a": 2, "b": 1}, {"b": 1, "a": 2}), ({"a": 3}, {"a": 2})):
        monkeypatch.setattr(judge, "mistakes_of", lambda check: [{"hint": "well known"}])
        monkeypatch.setattr(judge, "mistaken", lambda check, mistake, known=known: [lambda: known])
        assert check(lambda given=given: given) is False
        assert capsys.readouterr().out.endswith("Hint: well known\n")


def test_of_two_stubs_the_first_is_named(capsys):
    @judge.exercise("0.0", "f", "g", right="")
    def check(f, g):
        yield judge.compare(f(), 1)
        yield judge.compare(g(), 1)

    assert check(stub, stub) is False
    assert capsys.readouterr().out.startswith("0.0 is not answered yet: f")


def test_an_answer_that_overwrites_its_argument_is_refused(capsys):
    @judge.exercise("0.0", "f", right="")
    def check(f):
        x = [[1.0, 2.0]]
        yield judge.compare(f(np.array(x)), 2)

    def doubles(x):
        x *= 2
        return 2

    assert check(doubles) is False
    assert "overwrites an argument" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It falls from 2.71 to 1.5 nats, by 12 %.", ["2.71", "1.5", "12 %"]),
        (
            "Of 34,967 chunks **8.3 %** are copies; $10{,}000$ and $2\\,048$ too.",
            ["34,967", "8.3 %", "10,000", "2,048"],
        ),
        ("Figure 5.2 and table 10, §2.4, eq. 3, sections 2.4 and 2.5, exercise 5.1, [x](a/1.25) in 2022", []),
        ("**5.1** Write `reads(t, 128)`, with `0.31` in three places; SmolLM2-135M", ["0.31"]),
        (
            "1.75 trillion tokens, $3.2 \\cdot 10^{-9}$, 4.5e-7, 20 chunks, 10⁻⁹",
            ["1.75 trillion", "3.2 \\cdot 10^{-9}", "4.5e-7"],
        ),
        ("```\n0.123\n```\n# 5 · Title\n\n## 1.5 bits", ["1.5"]),
    ],
)
def test_the_figures_of_a_text_are_found(text, found):
    assert [figure.text for figure in figures_in(text)] == found


@pytest.mark.parametrize(
    ("text", "output", "stands"),
    [
        ("3.0 nats", "it is 3.0, or 14", True),
        ("3.0 nats", "13.0 3.05 3.0,5 1,3.0", False),
        ("1,500 steps", "1500 steps", True),
        ("12.5 %", "0.125", True),
        ("12.5 %", "12.5 %", True),
        ("1.75 trillion", "1750000000000", True),
        ("2.7 nats", "2.71", False),
        ("$3.2 \\cdot 10^{-9}$", "3.2e-09", True),
    ],
)
def test_a_figure_is_found_in_an_output_and_not_inside_another_number(text, output, stands):
    (figure,) = figures_in(text)
    assert has(numbers_in(output), figure) is stands


# Badges


@each_tutorial
def test_with_the_repositorys_address_a_notebook_has_badges_under_its_title(source):
    plain, made = (execute.notebook(source, address).cells for address in ("", "https://github.com/ada/retro"))
    title, colab, binder, install = (line for line in made[0].source.splitlines()[:6] if line)
    file = f"tutorials/{source.stem}.ipynb"
    assert title == plain[0].source.splitlines()[0]
    assert f"](https://colab.research.google.com/github/ada/retro/blob/main/{file})" in colab
    assert f"](https://mybinder.org/v2/gh/ada/retro/main?labpath={file.replace('/', '%2F')})" in binder
    assert "git+https://github.com/ada/retro" in install
    assert made[0].source.endswith(plain[0].source.partition("\n")[2])
    assert [cell.source for cell in made[1:]] == [cell.source for cell in plain[1:]]


def test_an_address_that_is_none_of_github_is_refused():
    with pytest.raises(ValueError, match=r'write "https://github\.com/OWNER/NAME"'):
        execute.badges("https://example.org/retro", "05.ipynb")


@pytest.mark.parametrize(
    "arguments", [["--to", ""], ["--to", "file"], ["05", "--to", "edited"], [""], ["99"]], ids=" ".join
)
def test_execute_refuses_in_one_line_and_keeps_what_is_there(arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("edited").mkdir()
    notebook = Path("edited", next(source.stem for source in SOURCES if source.stem[:2] == "05") + ".ipynb")
    notebook.write_text("mine")
    monkeypatch.setattr("sys.argv", ["execute.py", *arguments])
    with pytest.raises(SystemExit) as refusal:
        execute.main()
    assert refusal.value.code == 2
    assert "execute.py: error: " in capsys.readouterr().err
    assert Path("file").read_text() == notebook.read_text() == "mine"
