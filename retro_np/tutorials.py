"""The tutorials as a package: their checks, and the notebooks that `retro-np tutorials` copies.

In a clone they are its folder tutorials/, in an installed package the copy of it that setup.py puts into the wheel."""

from pathlib import Path

_CLONE = Path(__file__).parents[1] / "tutorials"
FOLDER = _CLONE if (_CLONE / "mini_retro.py").exists() else Path(__file__).parent / "_tutorials"
__path__ = [str(FOLDER)]  # `import retro_np.tutorials.checks` looks for its modules there.
