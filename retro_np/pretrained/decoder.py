"""A model that others trained: its tokenizer, and its tensors as our parameters, which are read when they are used.

Hugging Face stores the matrices of Llama's family as (d_out, d_in), and those of GPT-2's layers, its Conv1D, as
(d_in, d_out). GGUF stores all matrices as (d_out, d_in). GPT-2's matrices of queries, keys and values are one matrix,
side by side. In GGUF, a head of Llama's queries and keys is interleaved: its outputs i and i + c/2, which rotary
positions turn together, are neighbours."""

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.files import sha256_of
from retro_np.nn.decoders import DecoderConfig
from retro_np.parameters import parameter_shapes
from retro_np.retrieval import folders
from retro_np.tree import Array, Tree, map_tree, named_leaves

AGAIN = "download the whole model again"
UNSUPPORTED = "it is not supported (docs/models.md lists what is); use another model"
check_settings = partial(folders.check_settings, hint=UNSUPPORTED)
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
# What old files hold besides the parameters: causal masks and the frequencies of rotary positions
BUFFERS = re.compile(r"(.*\.)?(attn\.(masked_)?bias|rotary_emb\.inv_freq)")
# Our names of parts, and theirs without the ending .weight or .bias: Llama's and Qwen2's, GPT-2's, and GGUF's
TABLE = """
    embedding       model.embed_tokens        transformer.wte   token_embd
    positions       -                         transformer.wpe   position_embd
    norm            model.norm                transformer.ln_f  output_norm
    readout         lm_head                   lm_head           output
    layers          model.layers              transformer.h     blk
    attention.norm  input_layernorm           ln_1              attn_norm
    attention.w_q   self_attn.q_proj          attn.c_attn       attn_q
    attention.w_k   self_attn.k_proj          attn.c_attn       attn_k
    attention.w_v   self_attn.v_proj          attn.c_attn       attn_v
    attention.w_o   self_attn.o_proj          attn.c_proj       attn_output
    ffw.norm        post_attention_layernorm  ln_2              ffn_norm
    ffw.w_gate      mlp.gate_proj             -                 ffn_gate
    ffw.w_in        mlp.up_proj               mlp.c_fc          ffn_up
    ffw.w_out       mlp.down_proj             mlp.c_proj        ffn_down"""
ROWS = [line.split() for line in TABLE.split("\n")[1:]]
LLAMA_NAMES, GPT2_NAMES, GGUF_NAMES = ({row[0]: row[column] for row in ROWS} for column in (1, 2, 3))
FUSED = {f"attention.w_{part}": "attn_qkv" for part in "qkv"}


class Weights(NamedTuple):
    """The tensors that a file holds.

    path: the file or the folder, for errors. files: what to hash. shapes: of each tensor. read: a function of a
    tensor's name, which reads the tensor as floating-point numbers of at least 32 bits and raises UserError for a type
    that is not supported."""

    path: Path
    files: list[Path]
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Array]


class Layout(NamedTuple):
    """names: a column of the table. transposed: whether the matrices of layers are (d_out, d_in). interleaved: whether
    the heads of queries and keys are."""

    names: dict[str, str]
    transposed: bool = True
    interleaved: bool = False

    def name(self, leaf: str) -> str:
        """Their name of one of our parameters: blk.0.attn_q.bias for layers.0.attention.b_q, for example."""
        stem = leaf.replace(".b_", ".w_").removesuffix("_bias")
        *layer, part = stem.split(".", 2)
        place = [self.names["layers"], layer[1]] if layer else []
        return ".".join([*place, self.names[part], "weight" if stem == leaf else "bias"])

    def is_turned(self, leaf: str) -> bool:
        """Whether their tensor is (d_out, d_in)."""
        return leaf == "readout" or (".w_" in leaf and self.transposed)

    def shape(self, leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of their tensor, which holds one of our parameters of a shape."""
        if self.names["attention.w_q"] == self.names["attention.w_k"] and leaf.endswith(tuple(QKV)):
            shape = (*shape[:-1], 3 * shape[-1])
        return shape[::-1] if self.is_turned(leaf) else shape


QKV = [f".{kind}_{part}" for kind in "wb" for part in "qkv"]
HUGGING_FACE = {"llama": Layout(LLAMA_NAMES), "gpt2": Layout(GPT2_NAMES, transposed=False)}  # by architecture
GGUF = {"llama": Layout(GGUF_NAMES, interleaved=True), "qwen2": Layout(GGUF_NAMES), "gpt2": Layout(GGUF_NAMES | FUSED)}


def params_reader(weights: Weights, config: DecoderConfig, layout: Layout) -> Callable[[], Tree]:
    """A function that reads a model's parameters, float32, one tensor at a time.

    Before it is returned, names and shapes are compared with the configuration. Raises UserError for a tensor that is
    missing, has another shape or belongs to no part of the model; the function also for numbers that are not finite."""
    if config.n_layers > len(weights.shapes):  # The tree of millions of layers is not built.
        fault = f"has only {len(weights.shapes)} tensors for {config.n_layers:,} layers"
        raise UserError(f"{weights.path} {fault}: {AGAIN}")
    if layout.name("embedding") not in weights.shapes:  # Base models are stored without the prefix.
        prefix = layout.names["embedding"].rpartition(".")[0] + "."
        layout = layout._replace(names={ours: name.removeprefix(prefix) for ours, name in layout.names.items()})
    unknown = {name for name in weights.shapes if not BUFFERS.fullmatch(name)}
    for leaf, shape in named_leaves(shapes := parameter_shapes(config)):
        name, needed = layout.name(leaf), layout.shape(leaf, shape)
        if (actual := weights.shapes.get(name)) != needed:
            fault = "is missing" if actual is None else f"has shape {actual}, but its configuration needs {needed}"
            raise UserError(f"{weights.path}: the tensor {name} {fault}: {AGAIN}")
        unknown.discard(name)
    tied = layout.name("readout") if config.tie_readout else ""
    for name in sorted(unknown - {tied}):
        raise UserError(f"{weights.path}: {name!r:.99} is not a tensor of this architecture; {UNSUPPORTED}")

    def parameter(leaf: str, shape: tuple[int, ...]) -> Array:
        with np.errstate(all="ignore"):  # A float64 beyond float32 becomes an infinity.
            array = weights.read(layout.name(leaf)).astype(np.float32, copy=False)
        if not np.isfinite([array.min(), array.max()]).all():  # without an array of truth values
            raise UserError(f"{weights.path}: {layout.name(leaf)} is not finite everywhere, so it is damaged: {AGAIN}")
        array = array.T if layout.is_turned(leaf) else array
        if array.shape != shape:  # queries, keys and values side by side
            array = np.split(array, 3, axis=-1)["qkv".index(leaf[-1])]
        if layout.interleaved and leaf.endswith(tuple(QKV)) and leaf[-1] != "v":
            array = array.reshape(*shape[:-1], -1, config.d_head // 2, 2).swapaxes(-1, -2).reshape(shape)
        return array

    def read() -> Tree:
        # NumPy asks for huge pages for arrays of at least 4 MB. In one array, products read the layers faster.
        in_layers = [math.prod(shape) for leaf, shape in named_leaves(shapes) if leaf.startswith("layers.")]
        places = iter(np.split(np.empty(sum(in_layers), np.float32), np.cumsum(in_layers)))

        def placed(leaf: str, shape: tuple[int, ...]) -> Array:
            array = parameter(leaf, shape)
            if not leaf.startswith("layers."):
                return np.ascontiguousarray(array)
            place = next(places).reshape(shape)
            place[...] = array
            return place

        params = map_tree(placed, shapes)
        if tied in weights.shapes and not np.array_equal(weights.read(tied), params["embedding"]):
            fault = f"{tied} differs from the embedding, to which the configuration ties it"
            raise UserError(f"{weights.path}: {fault}: set tie_word_embeddings to false, or {AGAIN}")
        return params

    return read


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A trained model, as `read_pretrained` returns it.

    name: what it was asked for by. files: of the weights. chat_template: a Jinja template of conversations, or None.
    special: the texts of the tokens bos_token, eos_token, pad_token and unk_token, as far as the model has them, which
    a template may use. stop: the ids that end an answer. read: reads the parameters; see `params`."""

    name: str
    files: list[Path]
    config: RetroConfig
    tokenizer: Tokenizer = field(repr=False)
    read: Callable[[], Tree] = field(repr=False)
    chat_template: str | None = field(default=None, repr=False)
    special: dict[str, str] = field(default_factory=dict)
    stop: frozenset[int] = frozenset()

    @cached_property
    def params(self) -> Tree:
        """The parameters, float32. Raises UserError if the files hold numbers that are not finite, or were changed."""
        return self.read()

    @property
    def start(self) -> int | None:
        """The id that an empty prompt stands for: begin-of-text, else one that ends a text. None: it has neither."""
        ids = (self.tokenizer.token_to_id(self.special.get(role, "")) for role in ("bos_token", "eos_token"))
        return next((i for i in (*ids, *sorted(self.stop)) if i is not None), None)

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the weights' file; of several, the SHA-256 of their SHA-256, one after the other."""
        hashes = [sha256_of(path) for path in self.files]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def max_spare(size: int) -> int:
    """How many embeddings a model may have beyond the `size` ids of its tokenizer.

    Trainers round vocabularies up, to a multiple of 64 to 4,096: DeepSeek LLM has 102,400 embeddings for 100,015 ids,
    Qwen2.5 152,064 for 151,665."""
    return min(4096, max(512, size // 8))


def foreign_decoder(
    name: str, fields: dict[str, Any], weights: Weights, layout: Layout, tokenizer: Tokenizer,
    special: dict[str, str | None], chat_template: Any, stop: list[Any],
) -> Pretrained:  # fmt: skip
    """A model that another library stored, whose parts are checked against each other.

    fields: of the DecoderConfig, without padding_id. stop: ids that end an answer, or lists of them, besides the
    special eos_token. Raises UserError for sizes that no model has, for weights of other sizes, and for a tokenizer
    with more ids than the weights have embeddings, or with far fewer."""
    texts = {role: text for role, text in special.items() if role in ROLES and isinstance(text, str)}
    ids = {role: tokenizer.token_to_id(text) for role, text in texts.items()}
    padding = ids.pop("pad_token", None)
    rows, size = fields["vocabulary_size"], 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if not 0 <= rows - size <= max_spare(size):
        fault = f"its tokenizer has {size:,} ids, but the weights have {rows:,} embeddings"
        raise UserError(f"{weights.path}: {fault}, so they belong to different models: {AGAIN}")
    try:
        config = DecoderConfig(**fields, padding_id=None if padding in ids.values() else padding)
    except UserError as error:
        raise UserError(f"{weights.path}: {error}") from error
    read = params_reader(weights, config, layout)
    if not isinstance(chat_template, str | None):
        raise folders.refusal(weights.path, "chat_template", chat_template, f"it must be a text: {AGAIN}")
    named = [i for each in (*stop, ids.get("eos_token")) for i in (each if isinstance(each, list) else [each])]
    ends = frozenset(i for i in named if type(i) is int and 0 <= i < rows)
    return Pretrained(name, weights.files, config, tokenizer, read, chat_template, texts, ends)
