"""The tutorials as a package: their checks, and the notebooks that `retro-np tutorials` copies.

In a clone they are its folder tutorials/. An installed package has the copy that setup.py puts into the wheel."""

import os
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


def copy_tutorials(folder: Path) -> tuple[int, list[str]]:
    """Write the tutorials into a folder. Returns how many notebooks there are, and which files were left as they are.

    An existing file is never overwritten, whatever is in it. Raises UserError, before the first copy, if something else
    stands where a file or a folder must be."""
    check_folder(folder)
    made = contents()
    paths = {name: folder / name for name in made}
    blocked = [path.parent for path in paths.values() if os.path.lexists(path.parent) and not path.parent.is_dir()]
    blocked += [path for path in paths.values() if os.path.lexists(path) and not path.is_file()]
    if blocked:
        raise UserError(f"{blocked[0]} is in the way, so nothing was copied: rename it, or give another folder")
    for parent in {path.parent for path in paths.values()}:
        check_folder(parent)
    kept = [name for name, data in made.items() if paths[name].exists() and paths[name].read_bytes() != data]
    for name, data in made.items():
        if not paths[name].exists():
            paths[name].parent.mkdir(parents=True, exist_ok=True)
            write_atomically(paths[name], data)
    return sum(name.endswith(".ipynb") for name in made), kept
