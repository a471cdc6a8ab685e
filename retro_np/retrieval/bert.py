"""A frozen BERT encoder's forward pass: texts in, keys out. Devlin et al. 2019; paper §2.3.

A key is the mean over time of the last layer's hidden states. Post-norm, GELU, absolute positions, no pooler.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from retro_np.errors import UserError
from retro_np.kernels.attention import attention_forward, attention_weights
from retro_np.kernels.panels import Frozen, freeze, frozen_product
from retro_np.kernels.rowwise import add_gelu_erf, add_layer_norm, gelu_forward
from retro_np.progress import progress_bar
from retro_np.retrieval.sources import checked_texts
from retro_np.retrieval.weights import BertFiles, find_bert, read_bert

BATCH_TOKENS = 1536  # word pieces a batch: enough for the products, little enough for the cache


@dataclass(frozen=True)
class Bert:
    """A frozen encoder. `embed` makes keys; name and sha256 tell it from another."""

    files: BertFiles
    layers: list[dict[str, np.ndarray | Frozen]] = field(repr=False)

    def __reduce__(self):
        """A pickle holds where the weights are, not the weights: a worker reads them once."""
        return _read_once, (self.files.folder, self.sha256)

    @property
    def name(self) -> str:
        """The model's name, as its folder says."""
        return self.files.name

    @property
    def sha256(self) -> str:
        """A hash over weights, configuration, tokenizer, pooling and length: equal hashes, equal keys."""
        return self.files.sha256

    @property
    def d_key(self) -> int:
        """The width of a key."""
        return int(self.files.config["hidden_size"])

    @property
    def max_length(self) -> int:
        """Word pieces, [CLS] and [SEP] included, beyond which a text is cut."""
        return self.files.max_length

    def embed(self, texts: list[str], show_progress: bool = True) -> np.ndarray:
        """Keys of texts: (N, d_key) float32, the mean of the last hidden states over each text's word pieces.

        Normalised to length one where the model's folder says so. Texts are taken in order of length, so that
        little padding is computed; the same list always gives the same bits. Raises UserError for what is no text.
        """
        pieces = self.word_pieces(checked_texts(texts))
        lengths = np.array([len(p) for p in pieces], dtype=np.int64)
        keys = np.empty((len(texts), self.d_key), np.float32)
        with progress_bar("embedding", len(texts) if show_progress else 0) as advance:
            for rows in _batches(lengths):
                ids = np.zeros((len(rows), lengths[rows].max()), np.int64)
                mask = np.arange(ids.shape[1]) < lengths[rows][:, None]
                ids[mask] = np.concatenate([pieces[row] for row in rows])
                keys[rows] = self._pooled(self.encode(ids, mask), mask)
                if show_progress:
                    advance(len(rows))
        return keys

    def word_pieces(self, texts: list[str]) -> list[list[int]]:
        """[CLS] … [SEP] of each text, cut to max_length with the [SEP] kept; an empty text is [CLS][SEP]."""
        pieces = [encoding.ids for encoding in self.files.tokenizer.encode_batch(texts)]
        longest = self.max_length
        return [ids if len(ids) <= longest else [*ids[: longest - 1], ids[-1]] for ids in pieces]

    def attention_maps(self, text: str) -> tuple[list[str], np.ndarray]:
        """A text's word pieces, t of them, and the weights of each layer and head: (layers, heads, t, t)."""
        ids = np.array(self.word_pieces(checked_texts([text])))
        maps = []
        self.encode(ids, np.ones(ids.shape, bool), watch=lambda weights: maps.append(weights[0, :, 0, :, 0]))
        return [self.files.tokenizer.id_to_token(piece) for piece in ids[0]], np.array(maps)

    def encode(self, ids: np.ndarray, mask: np.ndarray, watch: Callable | None = None) -> np.ndarray:
        """Last hidden states, (B, t, d). ids: (B, t) word pieces; mask: (B, t), false at padding.

        watch: is told each layer's attention weights, as of `attention_weights`.
        """
        tensors, config = self.files.tensors, self.files.config
        eps, activation = config.get("layer_norm_eps", 1e-12), ACTIVATIONS[config.get("hidden_act", "gelu")]
        (batch, length), heads = ids.shape, config["num_attention_heads"]
        x = tensors["embeddings.word_embeddings.weight"][ids].reshape(batch * length, -1)
        places = np.tile(np.arange(length), batch)
        positions = tensors["embeddings.position_embeddings.weight"][places]
        kind = tensors["embeddings.token_type_embeddings.weight"][0]
        norm = tensors["embeddings.LayerNorm.weight"], tensors["embeddings.LayerNorm.bias"]
        add_layer_norm(x, kind, positions, *norm, eps)

        def heads_of(rows):
            return rows.reshape(batch, 1, length, heads, -1)

        for w in self.layers:
            q = frozen_product(x, w["query"])
            q += w["query_bias"]
            keys, values = frozen_product(x, w["key"]), frozen_product(x, w["value"])
            parts = heads_of(q), heads_of(keys)
            if watch is not None:
                watch(attention_weights(*parts, key_mask=mask[:, None]))
            attended, _ = attention_forward(*parts, heads_of(values), key_mask=mask[:, None])
            attended = frozen_product(attended.reshape(x.shape), w["attention_out"])
            add_layer_norm(attended, w["attention_out_bias"], x, w["attention_gain"], w["attention_shift"], eps)
            hidden = frozen_product(attended, w["in"])
            activation(hidden, w["in_bias"])
            x = frozen_product(hidden, w["out"])
            add_layer_norm(x, w["out_bias"], attended, w["gain"], w["shift"], eps)
        return x.reshape(batch, length, -1)

    def _pooled(self, states, mask):
        weights = mask[..., None].astype(np.float32)
        means = (states * weights).sum(axis=1) / weights.sum(axis=1)
        if self.files.normalise:
            means /= np.maximum(np.linalg.norm(means, axis=-1, keepdims=True), 1e-12)
        return means


def load_bert(path: str | Path | None = None) -> Bert:
    """A frozen BERT from a folder in the Hugging Face layout; None finds all-MiniLM-L6-v2 (see `weights.find_bert`).

    Raises UserError, one line that names the file, where anything is missing, broken or of another architecture.
    """
    folder = Path(path) if path is not None else find_bert()
    files = read_bert(folder)
    if files.config.get("hidden_act", "gelu") not in ACTIVATIONS:
        raise UserError(f"{folder / 'config.json'}: hidden_act is one of {', '.join(ACTIVATIONS)}")
    return Bert(files, _arranged(files, folder))


@functools.lru_cache(maxsize=2)
def _read_once(folder: Path, sha256: str) -> Bert:
    bert = load_bert(folder)
    if bert.sha256 != sha256:
        raise UserError(f"{folder} holds another BERT ({bert.sha256[:6]}…) here than where it is used ({sha256[:6]}…)")
    return bert


def _arranged(files: BertFiles, folder: Path) -> list[dict[str, np.ndarray | Frozen]]:
    """Each layer's tensors as products want them: (d_in, d_out), and the biases that matter."""
    config = files.config
    d, inner = config["hidden_size"], config["intermediate_size"]

    def get(name, *shape):
        tensor = files.tensors.get(name)
        if tensor is None or tensor.shape != shape:
            found = "missing" if tensor is None else f"of shape {tensor.shape}"
            raise UserError(f"{folder / 'model.safetensors'}: {name} is {found}, and config.json wants {shape}")
        return tensor

    get("embeddings.word_embeddings.weight", config["vocab_size"], d)
    get("embeddings.position_embeddings.weight", config["max_position_embeddings"], d)
    get("embeddings.token_type_embeddings.weight", config.get("type_vocab_size", 2), d)
    get("embeddings.LayerNorm.weight", d), get("embeddings.LayerNorm.bias", d)
    layers = []
    for i in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{i}."
        query, key, value = (f"{at}attention.self.{part}." for part in ("query", "key", "value"))
        out, out_bias = get(at + "attention.output.dense.weight", d, d), get(at + "attention.output.dense.bias", d)
        get(key + "bias", d)  # adds the same to all logits of a query: the softmax takes it away again
        layers.append(
            {
                "query": freeze(get(query + "weight", d, d).T),
                "query_bias": get(query + "bias", d),
                "key": freeze(get(key + "weight", d, d).T),
                "value": freeze(get(value + "weight", d, d).T),
                "attention_out": freeze(out.T),
                # a value's bias passes through the mean over keys unchanged, and so is added once, behind W_o
                "attention_out_bias": out_bias + out @ get(value + "bias", d),
                "attention_gain": get(at + "attention.output.LayerNorm.weight", d),
                "attention_shift": get(at + "attention.output.LayerNorm.bias", d),
                "in": freeze(get(at + "intermediate.dense.weight", inner, d).T),
                "in_bias": get(at + "intermediate.dense.bias", inner),
                "out": freeze(get(at + "output.dense.weight", d, inner).T),
                "out_bias": get(at + "output.dense.bias", d),
                "gain": get(at + "output.LayerNorm.weight", d),
                "shift": get(at + "output.LayerNorm.bias", d),
            }
        )
    return layers


def _add_gelu_tanh(x, bias):
    x += bias
    x[...] = gelu_forward(x.reshape(-1)).reshape(x.shape)


def _add_relu(x, bias):
    x += bias
    np.maximum(x, 0, out=x)


ACTIVATIONS = {
    "gelu": add_gelu_erf,
    "gelu_new": _add_gelu_tanh,
    "gelu_pytorch_tanh": _add_gelu_tanh,
    "relu": _add_relu,
}


def _batches(lengths):
    """Row numbers in order of length, cut so that a padded batch holds about BATCH_TOKENS word pieces."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * lengths[order[end]] <= BATCH_TOKENS:
            end += 1
        yield order[start:end]
        start = end
