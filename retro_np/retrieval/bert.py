"""The forward pass of a frozen BERT encoder, which turns texts into keys. Devlin et al. 2019; paper §2.3.

A key is the mean over time of the last layer's hidden states, or what else the folder's pooling says. Post-norm, GELU,
absolute positions, no pooler. RoBERTa, XLM-R, DistilBERT and MPNet have these layers too (`weights.ARCHITECTURES`)."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from retro_np.errors import UserError
from retro_np.files.untrusted import checked_tensor, reporting
from retro_np.kernels import ignore_underflow
from retro_np.kernels.attention import attention_forward, attention_weights
from retro_np.kernels.bert import add_gelu_erf, add_layer_norm
from retro_np.kernels.panels import Prepacked, prepack, prepacked_matmul
from retro_np.kernels.rowwise import gelu_forward
from retro_np.retrieval.batches import checked_texts, embed_in_batches
from retro_np.retrieval.folders import AGAIN
from retro_np.retrieval.weights import BertFiles, find_bert, read_bert

BIAS, DISTANCE_BUCKETS = "encoder.relative_attention_bias.weight", 32  # MPNet's, a row for each bucket of distances
MAX_BATCH_PIECES = 1536  # word pieces: enough for fast matrix products, few enough for the cache
PRODUCTS = {name: f"attention.self.{name}" for name in ("query", "key", "value")}  # our names and the stored ones
PRODUCTS |= {"attention_out": "attention.output.dense", "in": "intermediate.dense", "out": "output.dense"}


@dataclass(frozen=True)
class Bert:
    """A frozen encoder, as `load_bert` returns it; an Embedder (see `embedders.py`).

    name: the model's, from its folder. sha256: a hash of weights, configuration, tokenizer, normalisation and maximum
    length: equal hashes, equal keys. d_key: the width of a key."""

    files: BertFiles
    layers: list[dict[str, np.ndarray | Prepacked]] = field(repr=False)
    name: str
    sha256: str
    d_key: int

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds the folder of the weights, not the weights; a worker process reads them once."""
        return _read_once, (self.files.folder, self.sha256)

    def embed(self, texts: list[str], show_progress: bool = True) -> np.ndarray:
        """The keys of N texts to store, (N, d_key) float32: the last hidden states of a text's word pieces, pooled.

        Of length one if the model's folder says so. Equal lists give equal bits. Raises UserError for non-strings."""
        return self._embed(texts, self.files.recipe.document, show_progress)

    def embed_queries(self, texts: list[str], show_progress: bool = True) -> np.ndarray:
        """Like `embed`, for texts to search with: they have another prompt in some folders."""
        return self._embed(texts, self.files.recipe.query, show_progress)

    def _embed(self, texts, prompt, show_progress):
        pieces = self.word_pieces([prompt + text for text in checked_texts(texts)])
        left_out = len(self.word_pieces([prompt])[0]) - 1 if prompt and not self.files.recipe.include_prompt else 0
        embed_batch = functools.partial(self._keys, left_out=left_out)
        return embed_in_batches(pieces, MAX_BATCH_PIECES, embed_batch, self.d_key, show_progress)

    def word_pieces(self, texts: list[str]) -> list[list[int]]:
        """The ids [CLS] … [SEP] of each text, at most `files.max_length` of them. An empty text is [CLS] [SEP]."""
        with reporting(f"{self.files.folder / 'tokenizer.json'} is not a tokenizer", AGAIN):
            pieces = [encoding.ids for encoding in self.files.tokenizer.encode_batch(texts)]
        limit = self.files.max_length
        return [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in pieces]

    def attention_maps(self, text: str) -> tuple[list[str], np.ndarray]:
        """A text's t word pieces, and the attention weights of each layer and head, (layers, heads, t, t)."""
        ids = np.array(self.word_pieces(checked_texts([text])))
        maps = []
        self.encode(ids, np.ones(ids.shape, bool), watch=lambda weights: maps.append(weights[0, :, 0, :, 0]))
        return [self.files.tokenizer.id_to_token(piece) or "" for piece in ids[0]], np.array(maps)

    @ignore_underflow
    def encode(self, ids: np.ndarray, mask: np.ndarray, watch: Callable[[np.ndarray], Any] | None = None) -> np.ndarray:
        """The last hidden states, (B, t, d) float32. ids: (B, t) word pieces. mask: (B, t), false at padding.

        watch: called with each layer's attention weights, as `attention_weights` returns them."""
        tensors, config = self.files.tensors, self.files.config
        eps, activation, bias = config["layer_norm_eps"], ACTIVATIONS[config["hidden_act"]], tensors.get(BIAS)
        (batch, length), heads = ids.shape, config["num_attention_heads"]
        x = tensors["embeddings.word_embeddings.weight"][ids].reshape(batch * length, -1)
        positions = tensors["embeddings.position_embeddings.weight"][self._positions(ids, mask).reshape(-1)]
        kind = tensors["embeddings.token_type_embeddings.weight"][0]
        norm = tensors["embeddings.LayerNorm.weight"], tensors["embeddings.LayerNorm.bias"]
        add_layer_norm(x, kind, positions, *norm, eps)

        def heads_of(rows):
            return rows.reshape(batch, 1, length, heads, -1)

        distances = () if bias is None else _distances(bias, length, x.shape[1] // heads)
        for w in self.layers:
            q = prepacked_matmul(x, w["query"])
            q += w["query_bias"]
            keys, values = prepacked_matmul(x, w["key"]), prepacked_matmul(x, w["value"])
            parts = [heads_of(q), heads_of(keys), heads_of(values)]
            if bias is not None:  # One more channel; the kernel divides logits by the root of their number.
                parts[0] *= np.float32((1 + heads / x.shape[1]) ** 0.5)
                parts = [np.concatenate([part, np.zeros_like(part[..., :1])], axis=-1) for part in parts]
            if watch is not None:
                watch(attention_weights(*parts[:2], *distances, key_mask=mask[:, None]))
            attended, _ = attention_forward(*parts, *distances, key_mask=mask[:, None])
            attended = np.ascontiguousarray(attended[..., : x.shape[1] // heads]).reshape(x.shape)
            attended = prepacked_matmul(attended, w["attention_out"])
            add_layer_norm(attended, w["attention_out_bias"], x, w["attention_gain"], w["attention_shift"], eps)
            hidden = prepacked_matmul(attended, w["in"])
            activation(hidden, w["in_bias"])
            x = prepacked_matmul(hidden, w["out"])
            add_layer_norm(x, w["out_bias"], attended, w["gain"], w["shift"], eps)
        return x.reshape(batch, length, -1)

    def _positions(self, ids, mask):
        """The positions of word pieces, (B, t). RoBERTa, XLM-R and MPNet do not count padding, even within a text."""
        padding = self.files.padding
        if padding is None:
            return np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        counted = mask & (ids != padding)
        return padding + counted.cumsum(axis=1) * counted

    @ignore_underflow
    def _keys(self, ids, mask, left_out=0):
        """The keys of a batch, (B, d_key). left_out: how many word pieces at the start of each text are not pooled."""
        states, pooled = self.encode(ids, mask), mask & (np.arange(ids.shape[1]) >= left_out)
        keys = np.concatenate([POOLED[mode](states, pooled[..., None]) for mode in self.files.recipe.modes], axis=-1)
        if self.files.recipe.normalise:
            keys /= np.maximum(np.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
        return keys


def load_bert(path: str | Path | None = None) -> Bert:
    """Load a frozen BERT from a folder in the Hugging Face layout.

    path: None finds all-MiniLM-L6-v2 (see `weights.find_bert`), whose keys have width 384. Keys of a folder without
    modules.json are not normalised. Raises UserError if a file is missing or broken, or asks for what docs/database.md
    does not list; the error names the file and the setting."""
    folder = Path(path) if path is not None else find_bert()
    files = read_bert(folder)
    if files.config["hidden_act"] not in list(ACTIVATIONS):
        raise UserError(f"{folder / 'config.json'}: hidden_act must be one of {', '.join(ACTIVATIONS)}")
    width = files.config["hidden_size"] * len(files.recipe.modes)
    return Bert(files, _arranged(files, folder), files.name, files.sha256, width)


@functools.lru_cache(maxsize=2)
def _read_once(folder: Path, sha256: str) -> Bert:
    bert = load_bert(folder)
    if bert.sha256 != sha256:
        raise UserError(f"{folder} is BERT {bert.sha256[:6]}… on this worker, not {sha256[:6]}…: copy the folder")
    return bert


@ignore_underflow
def _arranged(files: BertFiles, folder: Path) -> list[dict[str, np.ndarray | Prepacked]]:
    """Each layer's weights in the layout of the matrix products, (d_in, d_out), and the biases that have an effect."""
    config = files.config
    d, inner = config["hidden_size"], config["intermediate_size"]

    def get(name, *shape):
        return checked_tensor(files.tensors, folder / "model.safetensors", name, shape, AGAIN)

    get("embeddings.word_embeddings.weight", config["vocab_size"], d)
    get("embeddings.position_embeddings.weight", config["max_position_embeddings"], d)
    get("embeddings.token_type_embeddings.weight", config["type_vocab_size"], d)
    get("embeddings.LayerNorm.weight", d), get("embeddings.LayerNorm.bias", d)
    if config["model_type"] == "mpnet":
        get(BIAS, DISTANCE_BUCKETS, config["num_attention_heads"])
    else:
        files.tensors.pop(BIAS, None)

    def layer(prefix):
        weights = {}
        for name, stored in PRODUCTS.items():
            shape = {"in": (inner, d), "out": (d, inner)}.get(name, (d, d))
            weights[name] = prepack(get(f"{prefix}{stored}.weight", *shape).T)
            weights[f"{name}_bias"] = get(f"{prefix}{stored}.bias", shape[0])
        # The softmax cancels the key's bias, because it adds the same to all logits of a query.
        # Attention weights sum to 1, so a value's bias passes through and can be added once, after W_o.
        passed = get(prefix + "attention.output.dense.weight", d, d) @ weights["value_bias"]
        weights["attention_out_bias"] = weights["attention_out_bias"] + passed
        for name, stored in (("attention_", "attention.output"), ("", "output")):
            weights[f"{name}gain"] = get(f"{prefix}{stored}.LayerNorm.weight", d)
            weights[f"{name}shift"] = get(f"{prefix}{stored}.LayerNorm.bias", d)
        return weights

    return [layer(f"encoder.layer.{i}.") for i in range(config["num_hidden_layers"])]


def _distances(bias, length, width):
    """MPNet's relative bias as the table, u and v of the attention kernel, whose logits are then q·k / √c + bias.

    bias: (DISTANCE_BUCKETS, h), by bucket of the distance. width: c. Only the last of c + 1 channels is used."""
    distance = np.arange(1 - length, length)
    size = np.abs(distance)
    far = 8 + np.floor(2 * np.log2(np.maximum(size, 8) / 8)).astype(int)
    bucket = np.where(size < 8, size, np.minimum(far, 15)) + 16 * (distance > 0)
    table, u, v = np.zeros((3, len(distance), bias.shape[1], width + 1), np.float32)
    table[..., -1], v[..., -1] = bias[bucket] * np.float32((width + 1) ** 0.5), 1
    return table, u[0], v[0]


def _average(states, weights, power=1):
    """The weighted sum over time over its weight, which is 0 if a cut text is nothing but its prompt."""
    weights = weights.astype(np.float32)
    return (states * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), np.float32(1e-9)) ** np.float32(power)


def _at(states, rows):
    return np.take_along_axis(states, rows[..., None], axis=1)[:, 0]


# Each mode of pooling: from states (B, t, d), and which of them are pooled (B, t, 1), to (B, d).
POOLED: dict[str, Callable[..., Any]] = {
    "cls": lambda states, pooled: _at(states, pooled.argmax(axis=1)),
    "max": lambda states, pooled: np.where(pooled, states, -np.inf).max(axis=1),
    "mean": _average,
    "mean_sqrt_len_tokens": functools.partial(_average, power=0.5),
    "weightedmean": lambda states, pooled: _average(states, pooled * np.arange(1, pooled.shape[1] + 1)[:, None]),
    "lasttoken": lambda states, pooled: _at(states * pooled, pooled.shape[1] - 1 - pooled[:, ::-1].argmax(axis=1)),
}


def _add_gelu_tanh(x, bias):
    x += bias
    x[...] = gelu_forward(x.reshape(-1)).reshape(x.shape)


# Each activation, which adds the bias to x and replaces x.
ACTIVATIONS: dict[str, Callable[..., Any]] = dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), _add_gelu_tanh)
ACTIVATIONS |= {"gelu": add_gelu_erf, "relu": lambda x, bias: np.maximum(np.add(x, bias, out=x), 0, out=x)}
