"""The globs of --include and --exclude. Ground truth: what git itself ignores."""

import os
import shutil
import subprocess

import numpy as np
import pytest

from retro_np.errors import UserError
from retro_np.retrieval.corpus import find_corpus

FILES = [
    "a.py", "a.txt", "b.py", "doc/a.md", "doc/b/a.py", "doc/b/c/x.md", "out/a.py", "out/keep/a.py", "out/log/a.txt",
    "src/a.py", "src/out/a.py", "src/test_a.py", "src/tests/a.py", "src/tests/deep/b.py", "tests/a.py", "x y.md", "#c",
    "new\nline/a.py",
]  # fmt: skip
PARTS = [
    "*",
    "**",
    "a",
    "a.py",
    "*.py",
    "out",
    "keep",
    "tests",
    "src",
    "doc",
    "b",
    "[ab].*",
    "[!a]*",
    "?",
    "test_*",
    "x*y*",
]
LISTS = [
    ["*.py", "!test_*.py"], ["src/", "!src/tests/"], ["out/*", "!out/keep"], ["out", "!out/keep/a.py"], ["/*.py"],
    ["/out/"], ["**/a.py"], ["doc/**"], ["doc/**/x.md"], ["*", "!*/", "!*.md"], ["\\#c"], ["x\\ y.md"], ["a.*  "],
    ["tests"], ["b/"], ["src/**/b.py", "!b.py"], ["*.p[xyz]"], ["[^a].py"], ["!a.py", "*.py"], ["doc/b"], ["/doc/b/c/"],
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if shutil.which("git") is None and not os.environ.get("CI"):
        pytest.skip("git is the ground truth")
    folder = tmp_path_factory.mktemp("files")
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    subprocess.run(["git", "init", "-q", folder], check=True)
    return folder


def kept_by_git(folder, patterns):
    """The files that git does not ignore."""
    (folder / ".git" / "patterns").write_text("".join(f"{pattern}\n" for pattern in patterns))
    command = ["git", "-C", folder, "ls-files", "--others", "-z", "--exclude-from=.git/patterns"]
    output = subprocess.run(command, check=True, capture_output=True).stdout
    return {name.decode() for name in output.split(b"\0") if name}


def taken(folder, **patterns):
    """The files of a corpus; none if the patterns leave none."""
    try:
        return set(find_corpus(folder, **patterns).names())
    except UserError as error:
        if "holds no text that matches the patterns" not in str(error):
            raise
        return set()


def drawn(rng):
    pattern = "/".join(rng.choice(PARTS, rng.integers(1, 4)))
    # pathspec takes `a/**/` for `a/`; git takes it for the folders in a.
    is_folder = rng.random() < 0.2 and not pattern.endswith("**")
    return "!" * (rng.random() < 0.3) + "/" * (rng.random() < 0.2) + pattern + "/" * is_folder


@pytest.mark.parametrize("patterns", LISTS, ids=" ".join)
def test_exclude_leaves_out_what_git_ignores(folder, patterns):
    assert taken(folder, exclude=patterns) == kept_by_git(folder, patterns)


@pytest.mark.parametrize("seed", range(150))
def test_exclude_leaves_out_what_git_ignores_with_patterns_of_any_form(folder, seed):
    rng = np.random.default_rng(seed)
    patterns = [drawn(rng) for _ in range(rng.integers(1, 4))]
    assert taken(folder, exclude=patterns) == kept_by_git(folder, patterns), patterns


@pytest.mark.parametrize(
    "patterns", [["*.py"], ["src"], ["/a.py", "*.md"], ["doc/**", "tests/"], ["*.py", "!test_*.py"]]
)
def test_include_takes_what_git_ignores(folder, patterns):
    assert taken(folder, include=patterns) == set(FILES) - kept_by_git(folder, patterns)


def test_the_last_matching_pattern_of_include_decides(folder):
    names = {name for name in FILES if name.startswith("src/") and not name.startswith("src/tests/")}
    assert taken(folder, include=["src", "!src/tests/"]) == names


@pytest.mark.parametrize("pattern", ["", "/", "./", " ", "# comment", "a["])
def test_a_pattern_that_can_match_nothing_is_refused(folder, pattern):
    with pytest.raises(UserError, match="matches nothing"):
        find_corpus(folder, exclude=["*.md", pattern])


@pytest.mark.parametrize("pattern", ["[z-a]", "!", "a\\", "[[:alpha:]]*"])
@pytest.mark.filterwarnings("error")
def test_a_pattern_that_the_library_cannot_read_is_refused_in_one_line(folder, pattern):
    with pytest.raises(UserError, match="is not a glob") as caught:
        find_corpus(folder, include=[pattern])
    assert "\n" not in str(caught.value)
