"""Where in the model a block stands: which of its weights train, what drops its activations, and who looks on."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from retro_np.nn.operators import dropout


def every(name: str) -> bool:
    """The default `trainable`: all parameters train."""
    return True


@dataclass(frozen=True)
class Scope:
    """A place in the parameter tree. Blocks are pure functions; what they need to know of their place is here."""

    path: str = ""
    trainable: Callable[[str], bool] = every  # of a parameter's dotted name
    rate: float = 0.0
    key: int | tuple[int, ...] | None = None  # of dropout; None: nothing is dropped
    watch: Callable[[str, np.ndarray], None] | None = None  # is told the path and the weights of every attention

    def at(self, name: str) -> "Scope":
        """The place called `name` below this one."""
        return replace(self, path=f"{self.path}.{name}" if self.path else name)

    def trains(self, leaf: str) -> bool:
        """Whether the parameter `leaf` of this block is to get a gradient."""
        return self.trainable(f"{self.path}.{leaf}" if self.path else leaf)

    def drop(self, x):
        """Dropout with this place's own random numbers: value and pullback."""
        return dropout(x, self.rate, self.key, self.path)


ROOT = Scope()  # of a block called on its own: everything trains, nothing is dropped
