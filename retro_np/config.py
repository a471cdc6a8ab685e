"""The configuration of a model, and the eight models of the paper's table 2."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from reprlib import repr as shortened
from typing import Any

import numpy as np

from retro_np.errors import UserError

RETRIEVED_PARTS = ("NF", "N", "F")
MAX_MODEL_SIZE, MAX_LAYERS = 2**31 - 1, 10_000  # Larger sizes fit no array, and a deeper tree takes seconds to build.


@dataclass(frozen=True)
class EncoderConfig:
    """The neighbour encoder (algorithm 1, ENCODER). The defaults are the paper's, for decoders of every size.

    Raises UserError (a ValueError) for values that no encoder can have.

    d_model: width of the hidden states (d'), even.
    d_ffw: hidden units of each feed-forward block, at least 1.
    n_heads: attention heads (h), at least 1.
    d_head: width of each head (c), at least 1.
    n_layers: layers (L'), at least 1; 2 in the paper, other numbers in table 13.
    ca_layers: layers with cross-attention to the retrieving chunk (P_enc), from 1 to n_layers; () removes the
        conditioning on the query (table 13)."""

    d_model: int = 896
    d_ffw: int = 3584
    n_heads: int = 16
    d_head: int = 64
    n_layers: int = 2
    ca_layers: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        check_numbers(self, "encoder.", "ca_layers")


@dataclass(frozen=True)
class RetroConfig:
    """A decoder and how it retrieves. If `cca_layers` is empty, it is a baseline and `encoder` is ignored.

    Raises UserError (a ValueError) for values that no model can have.

    vocabulary_size: number of token ids (V), at least 1; 128,000 in the paper.
    d_model: width of the hidden states (d), even; table 2.
    d_ffw: hidden units of each feed-forward block, at least 1; table 2.
    n_heads: attention heads (h), at least 1; table 2.
    d_head: width of each head (c), at least 1; table 2.
    n_layers: decoder layers (L), at least 1; table 2.
    cca_layers: layers with chunked cross-attention (P), from 1 to n_layers; () for a baseline; §2.4.
    chunk_size: tokens per chunk (m), at least 1; 64 in the paper, §2.2.
    encoder: the neighbour encoder, required if cca_layers is not empty; algorithm 1.
    dropout: share of each residual update and of the embeddings that is dropped in training, in [0, 1).
    share_embeddings: whether the encoder uses the decoder's embedding; needs encoder.d_model = d_model (table 13).
    tie_readout: whether the readout is the transposed embedding, instead of a matrix of its own.
    cca_positions: whether chunked cross-attention has relative positions; False in an ablation of table 13.
    retrieved_part: part of each value [N, F] that the encoder reads: "NF" both, "N" the neighbour alone, "F" its
        continuation alone (table 13).
    copying_start: whether `init_params` makes the encoder and CCA copy tokens; needs encoder.d_model = d_model.
        Not in the paper; it helps small models.
    padding_id: the token id of padding; None if no id is, and then −1 stands for padding in neighbours."""

    vocabulary_size: int
    d_model: int
    d_ffw: int
    n_heads: int
    d_head: int
    n_layers: int
    cca_layers: tuple[int, ...] = ()
    chunk_size: int = 64
    encoder: EncoderConfig | None = None
    dropout: float = 0.0
    share_embeddings: bool = False
    tie_readout: bool = False
    cca_positions: bool = True
    retrieved_part: str = "NF"
    copying_start: bool = False
    padding_id: int | None = 0
    architecture = "retro"  # the paper's blocks; not a field here, but one of `nn.decoders.DecoderConfig`
    reads_itself = False  # Whether the decoder encodes its neighbours itself, as that of a DecoderConfig may

    def __post_init__(self) -> None:
        check_numbers(self, "", "cca_layers")
        if isinstance(self.encoder, dict) and self.encoder.keys() <= EncoderConfig.__dataclass_fields__.keys():
            object.__setattr__(self, "encoder", EncoderConfig(**self.encoder))  # from JSON
        if not isinstance(self.encoder, EncoderConfig | None):
            raise UserError(f"encoder must be an EncoderConfig or None, not {shown(self.encoder)}")
        if not isinstance(self.dropout, Real) or isinstance(self.dropout, bool) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be in [0, 1), not {shown(self.dropout)}")
        object.__setattr__(self, "dropout", float(self.dropout))
        for name in ("share_embeddings", "tie_readout", "cca_positions", "copying_start"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise UserError(f"{name} must be true or false, not {shown(getattr(self, name))}")
            object.__setattr__(self, name, bool(getattr(self, name)))
        if self.retrieved_part not in RETRIEVED_PARTS:
            raise UserError(f"retrieved_part must be one of NF, N and F, not {shown(self.retrieved_part)}")
        if not self.retrieves:
            return
        if self.encoder is None and self.is_retro:
            raise UserError("cca_layers needs an encoder: pass encoder=EncoderConfig(...), or leave cca_layers out")
        for name in ("share_embeddings", "copying_start"):
            if getattr(self, name) and (width := getattr(self.encoder, "d_model", None)) != self.d_model:
                raise UserError(f"{name} needs encoder.d_model ({width}) equal to d_model ({self.d_model})")

    @property
    def retrieves(self) -> bool:
        """Whether the model has chunked cross-attention, and so an encoder."""
        return bool(self.cca_layers)

    @property
    def is_retro(self) -> bool:
        """Whether the decoder has the paper's blocks, not those of a decoder that others trained."""
        return self.architecture == "retro"

    @classmethod
    def preset(cls, name: str, vocabulary_size: int = 128_000) -> "RetroConfig":
        """A model of table 2 by its name, a key of PRESETS. Raises UserError for any other name."""
        if name not in PRESETS:
            raise UserError(f"no preset {name!r}; choose one of {', '.join(PRESETS)}")
        config = cls(vocabulary_size, *PRESETS[name])
        if name.startswith("baseline"):
            return config
        return replace(config, cca_layers=tuple(range(6, config.n_layers + 1, 3)), encoder=EncoderConfig())

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON. `RetroConfig(**d)` is the inverse."""
        return asdict(self)


# d_model, d_ffw, n_heads, d_head and n_layers of table 2
_SIZES = {
    ("baseline-132m", "retro-172m"): (896, 3584, 16, 64, 12),
    ("baseline-368m", "retro-425m"): (1536, 6144, 12, 128, 12),
    ("baseline-1.3b", "retro-1.5b"): (2048, 8192, 16, 128, 24),
    ("baseline-7b", "retro-7.5b"): (4096, 16384, 32, 128, 32),
}
PRESETS = {name: sizes for names, sizes in _SIZES.items() for name in names}


def check_numbers(config: Any, prefix: str, layers_name: str) -> None:
    """Check a configuration's sizes, which are its int fields, and its tuple of layers. All become Python integers."""
    limits = {field.name: (1, MAX_MODEL_SIZE) for field in fields(config) if field.type is int}
    limits["n_layers"] = 1, MAX_LAYERS
    if getattr(config, "padding_id", None) is not None:
        limits["padding_id"] = 0, MAX_MODEL_SIZE
    for name, (least, largest) in limits.items():
        value = getattr(config, name)
        largest = config.vocabulary_size - 1 if name == "padding_id" else largest  # vocabulary_size has been checked
        if not isinstance(value, Integral) or isinstance(value, bool) or not least <= int(value) <= largest:
            raise UserError(f"{prefix}{name} must be a whole number from {least} to {largest}, not {shown(value)}")
        object.__setattr__(config, name, int(value))  # JSON cannot store NumPy's integers.
    if config.d_model % 2 and getattr(config, "architecture", "retro") == "retro":
        raise UserError(f"{prefix}d_model must be even (positions are pairs of sine and cosine), not {config.d_model}")
    name, layers = f"{prefix}{layers_name}", getattr(config, layers_name)
    layers = tuple(layers) if isinstance(layers, Iterable) and not isinstance(layers, str | dict) else layers
    if not isinstance(layers, tuple) or not all(isinstance(p, Integral) and not isinstance(p, bool) for p in layers):
        raise UserError(f"{name} must be a tuple of whole numbers, not {shown(layers)}")
    checked = tuple(sorted(int(p) for p in layers))
    if len(set(checked)) < len(checked) or any(not 1 <= p <= config.n_layers for p in checked):
        raise UserError(f"{name} must be distinct layers from 1 to {config.n_layers}, not {shown(checked)}")
    object.__setattr__(config, layers_name, checked)


def shown(value: Any) -> str:
    """A value of any kind and size as a short part of a line."""
    try:
        return " ".join(shortened(value).split())
    except ValueError:  # Python prints no integer of more than 4,300 digits.
        return "a number of thousands of digits"
