"""A block's scope (its parameter path, which weights train, its dropout key, a hook), and the blocks of a decoder."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from retro_np.nn.operators import DropoutKey, dropout
from retro_np.tree import Array, Pullback


def every(name: str) -> bool:
    """The default for `trainable`: every parameter is trained."""
    return True


@dataclass(frozen=True)
class Scope:
    """What a block, which is a pure function, needs to know about its position in the parameter tree.

    path: dotted path of the block, "" for the model.
    trainable: tells from a parameter's dotted name whether it gets a gradient.
    rate: dropout rate.
    key: dropout key; None: no dropout.
    watch: called with the path and the attention weights of each attention block.
    gradients: whether the model keeps its blocks' pullbacks, which hold all activations."""

    path: str = ""
    trainable: Callable[[str], bool] = every
    rate: float = 0.0
    key: DropoutKey = None
    watch: Callable[[str, Array], None] | None = None
    gradients: bool = True

    def at(self, name: str) -> "Scope":
        """The scope of the block called `name` within this one."""
        return replace(self, path=f"{self.path}.{name}" if self.path else name)

    def trains(self, leaf: str) -> bool:
        """Whether this block's parameter `leaf` gets a gradient."""
        return self.trainable(f"{self.path}.{leaf}" if self.path else leaf)

    def drop(self, x: Array) -> tuple[Array, Pullback]:
        """Dropout with random numbers that depend on this block's path. Returns the value and vjp(dy) -> (dx,)."""
        return dropout(x, self.rate, self.key, self.path)


ROOT = Scope()  # the scope of a block that is called on its own: everything is trained, nothing is dropped


class Blocks(NamedTuple):
    """The functions of which a decoder consists. Their pullbacks return gradients of params as a dict, then dh.

    embed(params, tokens, scope) -> h (B, n, d), without dh in the pullback; attention(params["attention"], h, scope=…);
    ffw(params["ffw"], h, scope=…); norm(params, h)."""

    embed: Callable[..., tuple[Array, Pullback]]
    attention: Callable[..., tuple[Array, Pullback]]
    ffw: Callable[..., tuple[Array, Pullback]]
    norm: Callable[..., tuple[Array, Pullback]]
