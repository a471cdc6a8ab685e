"""A frozen BERT encoder's forward pass: texts in, keys out. Devlin et al. 2019; paper §2.3.

A key is the mean over time of the last layer's hidden states. Post-norm, GELU, absolute positions, no pooler.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from retro_np.errors import UserError
from retro_np.progress import progress_bar
from retro_np.retrieval.corpus import LONE_SURROGATE
from retro_np.retrieval.weights import BertFiles, find_bert, read_bert

GELU_ROWS = 32
BATCH_TOKENS = 4096  # word pieces a batch: enough for the products, little enough for the cache


@dataclass(frozen=True)
class Bert:
    """A frozen encoder. `embed` makes keys; name and sha256 tell it from another."""

    files: BertFiles
    layers: list[dict[str, np.ndarray]] = field(repr=False)

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
        if isinstance(texts, str):
            raise UserError("embed takes a list of texts, not one text: put it in brackets")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"text {i} is {type(text).__name__}, not a string")
        pieces = self.word_pieces([LONE_SURROGATE.sub("\ufffd", text) for text in texts])
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

    def encode(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Last hidden states, (B, t, d). ids: (B, t) word pieces; mask: (B, t), false at padding."""
        tensors, config = self.files.tensors, self.files.config
        x = tensors["embeddings.word_embeddings.weight"][ids]
        x += tensors["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x += tensors["embeddings.token_type_embeddings.weight"][0]
        eps, activation = config.get("layer_norm_eps", 1e-12), ACTIVATIONS[config.get("hidden_act", "gelu")]
        x = layer_norm(x, tensors["embeddings.LayerNorm.weight"], tensors["embeddings.LayerNorm.bias"], eps)
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        bias = np.where(mask, 0, -np.inf).astype(np.float32)[:, None, None, :]
        for w in self.layers:
            attended = _attention(x @ w["qkv"] + w["qkv_bias"], bias, shape, config["num_attention_heads"])
            attended = attended @ w["attention_out"]
            attended += w["attention_out_bias"]
            attended += x
            x = layer_norm(attended, w["attention_gain"], w["attention_shift"], eps)
            hidden = x @ w["in"]
            hidden += w["in_bias"]
            out = activation(hidden) @ w["out"]
            out += w["out_bias"]
            out += x
            x = layer_norm(out, w["gain"], w["shift"], eps)
        return x.reshape(shape)

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


def _arranged(files: BertFiles, folder: Path) -> list[dict[str, np.ndarray]]:
    """Each layer's tensors as products want them: (d_in, d_out), query, key and value side by side."""
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
        parts = [f"{at}attention.self.{part}." for part in ("query", "key", "value")]
        layers.append(
            {
                "qkv": np.concatenate([get(part + "weight", d, d).T for part in parts], axis=1),
                "qkv_bias": np.concatenate([get(part + "bias", d) for part in parts]),
                "attention_out": np.ascontiguousarray(get(at + "attention.output.dense.weight", d, d).T),
                "attention_out_bias": get(at + "attention.output.dense.bias", d),
                "attention_gain": get(at + "attention.output.LayerNorm.weight", d),
                "attention_shift": get(at + "attention.output.LayerNorm.bias", d),
                "in": np.ascontiguousarray(get(at + "intermediate.dense.weight", inner, d).T),
                "in_bias": get(at + "intermediate.dense.bias", inner),
                "out": np.ascontiguousarray(get(at + "output.dense.weight", d, inner).T),
                "out_bias": get(at + "output.dense.bias", d),
                "gain": get(at + "output.LayerNorm.weight", d),
                "shift": get(at + "output.LayerNorm.bias", d),
            }
        )
    return layers


def _attention(qkv, bias, shape, n_heads):
    """Softmax attention with a bias of −∞ at padding. qkv: (B·t, 3 d); returns (B·t, d)."""
    batch, length, d = shape
    heads = qkv.reshape(batch, length, 3, n_heads, d // n_heads).transpose(2, 0, 3, 1, 4)
    q, k, v = np.ascontiguousarray(heads)
    q *= (d // n_heads) ** -0.5
    logits = q @ k.swapaxes(-1, -2)
    logits += bias
    logits -= logits.max(axis=-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=-1, keepdims=True)
    return (logits @ v).transpose(0, 2, 1, 3).reshape(batch * length, d)


def layer_norm(x, gain, shift, eps):
    """(x − mean) / √(variance + eps) · gain + shift, over the last axis; x is overwritten. Ba et al. 2016."""
    x -= x.mean(axis=-1, keepdims=True)
    variance = np.einsum("...i,...i->...", x, x)[..., None] / x.shape[-1]
    x *= 1 / np.sqrt(variance + eps)
    x *= gain
    x += shift
    return x


# erf(x) ≈ x P(x²) / Q(x²) on [−4, 4], constant beyond: the rational approximation of the Eigen library, highest power
# first. A test holds it to math.erf within 5e-7.
ERF_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


def erf(x):
    """The error function, elementwise, in float32 throughout (NumPy has none)."""
    x = np.clip(x, -4, 4)
    square = x * x
    above = _polynomial(ERF_P, square)
    above *= x
    above /= _polynomial(ERF_Q, square)
    return above


def _polynomial(coefficients, x):
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value *= x
        value += x.dtype.type(coefficient)
    return value


def _gelu(x):
    """x/2 · (1 + erf(x / √2)), in place, a few rows at a time so that all steps find them in the cache."""
    for start in range(0, len(x), GELU_ROWS):
        rows = x[start : start + GELU_ROWS]
        gate = erf(rows * np.float32(2**-0.5))
        gate += 1
        gate *= 0.5
        rows *= gate
    return x


def _gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x**3)))


ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
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
