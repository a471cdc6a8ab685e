"""The shape of a model, and the eight shapes of the paper's table 2."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral, Real

from retro_np.errors import UserError

RETRIEVED_PARTS = ("NF", "N", "F")


@dataclass(frozen=True)
class EncoderConfig:
    """The neighbour encoder (algorithm 1, ENCODER). The defaults are the paper's, for all decoders."""

    d_model: int = 896
    d_ffw: int = 3584
    n_heads: int = 16
    d_head: int = 64
    n_layers: int = 2
    ca_layers: tuple[int, ...] = (1,)  # 1-based; empty: no query conditioning (table 13)

    def __post_init__(self):
        _check_sizes(self, "encoder.", ("d_model", "d_ffw", "n_heads", "d_head", "n_layers"))
        object.__setattr__(self, "ca_layers", _layer_tuple(self.ca_layers, self.n_layers, "encoder.ca_layers"))


@dataclass(frozen=True)
class RetroConfig:
    """A decoder, and how it retrieves. With `cca_layers` empty it is the baseline, whatever `encoder` says.

    The paper's ablations (table 13) are fields: `encoder.ca_layers=()` (no query conditioning), `cca_positions=False`,
    `share_embeddings`, `encoder.n_layers`, `retrieved_part` ("N": the neighbour alone, "F": its continuation alone)
    and `cca_layers`. `copying_start` is ours, for small scale. Raises UserError (a ValueError) for a shape that no
    model can have.
    """

    vocabulary_size: int
    d_model: int
    d_ffw: int
    n_heads: int
    d_head: int
    n_layers: int
    cca_layers: tuple[int, ...] = ()  # 1-based
    chunk_size: int = 64
    encoder: EncoderConfig | None = None
    dropout: float = 0.0  # of every residual update and of the embeddings, in training only
    share_embeddings: bool = False  # the encoder reads the decoder's table
    tie_readout: bool = False  # the readout is the embedding's transpose
    cca_positions: bool = True
    retrieved_part: str = field(default="NF")
    copying_start: bool = False  # not the paper's: encoder and CCA begin by copying, see `init_params`

    def __post_init__(self):
        sizes = ("vocabulary_size", "d_model", "d_ffw", "n_heads", "d_head", "n_layers", "chunk_size")
        _check_sizes(self, "", sizes)
        object.__setattr__(self, "cca_layers", _layer_tuple(self.cca_layers, self.n_layers, "cca_layers"))
        if isinstance(self.encoder, dict):  # as it comes back from JSON
            object.__setattr__(self, "encoder", EncoderConfig(**self.encoder))
        if not isinstance(self.encoder, EncoderConfig | None):
            raise UserError(f"encoder is an EncoderConfig or None, not {self.encoder!r}")
        if not isinstance(self.dropout, Real) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout is a share of at least 0 and below 1, not {self.dropout}")
        if self.retrieved_part not in RETRIEVED_PARTS:
            raise UserError(f"retrieved_part is one of {', '.join(RETRIEVED_PARTS)}, not {self.retrieved_part!r}")
        if self.cca_layers and self.encoder is None:
            raise UserError(
                "cca_layers needs an encoder: pass encoder=EncoderConfig(...), or cca_layers=() for a baseline"
            )
        if self.retrieves and self.share_embeddings and self.encoder.d_model != self.d_model:
            raise UserError(
                f"shared embeddings need encoder.d_model ({self.encoder.d_model}) equal to d_model ({self.d_model})"
            )
        if self.retrieves and self.copying_start and self.encoder.d_model != self.d_model:
            raise UserError(
                f"copying_start needs encoder.d_model ({self.encoder.d_model}) equal to d_model ({self.d_model})"
            )

    @property
    def retrieves(self) -> bool:
        """Whether the model has chunked cross-attention, and so an encoder."""
        return bool(self.cca_layers)

    @classmethod
    def preset(cls, name: str, vocabulary_size: int = 128_000) -> "RetroConfig":
        """One of table 2's models, by name: see PRESETS. Raises UserError for another name."""
        if name not in PRESETS:
            raise UserError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        d_model, d_ffw, n_heads, d_head, n_layers = PRESETS[name]
        config = cls(vocabulary_size, d_model, d_ffw, n_heads, d_head, n_layers)
        if name.startswith("baseline"):
            return config
        return replace(config, cca_layers=tuple(range(6, n_layers + 1, 3)), encoder=EncoderConfig())

    def to_dict(self) -> dict:
        """Plain values for JSON; `RetroConfig(**d)` is the way back."""
        return asdict(self)


# d, d_ffw, heads, head size, layers (table 2)
_SIZES = {
    ("baseline-132m", "retro-172m"): (896, 3584, 16, 64, 12),
    ("baseline-368m", "retro-425m"): (1536, 6144, 12, 128, 12),
    ("baseline-1.3b", "retro-1.5b"): (2048, 8192, 16, 128, 24),
    ("baseline-7b", "retro-7.5b"): (4096, 16384, 32, 128, 32),
}
PRESETS = {name: sizes for names, sizes in _SIZES.items() for name in names}


def _check_sizes(config, prefix: str, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise UserError(f"{prefix}{name} is a whole number of at least 1, not {value!r}")
        object.__setattr__(config, name, int(value))  # NumPy's integers too, which JSON does not know
    if config.d_model % 2:
        raise UserError(f"{prefix}d_model must be even (positions are pairs of sine and cosine), not {config.d_model}")


def _layer_tuple(layers, n_layers: int, name: str) -> tuple[int, ...]:
    if isinstance(layers, str) or not isinstance(layers, Iterable) or not all(isinstance(p, Integral) for p in layers):
        raise UserError(f"{name} is a tuple of whole numbers, not {layers!r}")
    layers = tuple(sorted(int(p) for p in layers))
    if len(set(layers)) < len(layers) or any(not 1 <= p <= n_layers for p in layers):
        raise UserError(f"{name} names different layers from 1 to {n_layers}, not {layers}")
    return layers
