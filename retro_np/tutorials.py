"""The tutorials as a package: their checks, and the notebooks that `retro-np tutorials` copies.

In a clone they are its folder tutorials/. An installed package has the copy that setup.py puts into the wheel."""

import re
from pathlib import Path

from retro_np.errors import UserError
from retro_np.files import check_folder, write_atomically

_CLONE = Path(__file__).parents[1] / "tutorials"
TUTORIALS = _CLONE if (_CLONE / "mini_retro.py").exists() else Path(__file__).parent / "_tutorials"
__path__ = [str(TUTORIALS)]  # `import retro_np.tutorials.checks` looks for its modules there.
PICTURE = re.compile(r"\]\(\.\./docs/landing/([\w.-]+\.(?:svg|png))\)")
OUTSIDE = re.compile(r"\[([^\][]*)\]\((?:\.\./|README)[^)]*\)")  # a link to a file that is only in a clone


def contents() -> dict[str, bytes]:
    """The notebooks with what they need beside them, by relative path: pictures, mini_retro.py.

    The pictures are found in a folder of their own, and links to other files of a clone become plain text."""
    made = {"mini_retro.py": (TUTORIALS / "mini_retro.py").read_bytes()}
    for path in sorted(TUTORIALS.glob("[0-9]*.ipynb")):
        text = path.read_text(encoding="utf-8")
        for name in PICTURE.findall(text):
            packed = TUTORIALS / "pictures" / name
            source = packed if packed.exists() else TUTORIALS.parent / "docs" / "landing" / name
            made[f"pictures/{name}"] = source.read_bytes()
        made[path.name] = OUTSIDE.sub(r"\1", PICTURE.sub(r"](pictures/\1)", text)).encode()
    return made


def copy_tutorials(folder: Path) -> int:
    """Write the tutorials into a folder, and return how many notebooks there are.

    A file that has other contents already was changed by a reader. Then nothing is written, and UserError is raised."""
    check_folder(folder)
    made = contents()
    changed = [name for name, data in made.items() if (folder / name).exists() and (folder / name).read_bytes() != data]
    if changed:
        others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(
            f"{folder / changed[0]}{others} was changed, and nothing is overwritten: go on with jupyter lab {folder}, "
            "or give another folder for fresh copies"
        )
    for name, data in made.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, data)
    return sum(name.endswith(".ipynb") for name in made)
