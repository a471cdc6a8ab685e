"""Models in .gguf files, whose metadata holds configuration and tokenizer."""

from pathlib import Path
from typing import Any

from retro_np.nn.decoders import MATRICES
from retro_np.pretrained.decoder import ROLES, Pretrained, check_settings, foreign_decoder, size
from retro_np.pretrained.gguf_file import read_gguf
from retro_np.pretrained.layouts import GGUF
from retro_np.retrieval.folders import ANY, Known, refusal
from retro_np.retrieval.gguf_tokenizer import tokenizer_from_gguf

# Our fields and the entries that give them, after the name of the architecture and a dot
FIELDS = {
    "d_model": "embedding_length", "d_ffw": "feed_forward_length", "n_layers": "block_count",
    "n_heads": "attention.head_count", "max_positions": "context_length",
}  # fmt: skip
WIDTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")  # all must be that of a head
EPS = {"llama": "attention.layer_norm_rms_epsilon", "qwen2": "attention.layer_norm_rms_epsilon"}
EPS |= {"gpt2": "attention.layer_norm_epsilon"}
KNOWN: Known = dict.fromkeys((*FIELDS.values(), *EPS.values(), "attention.head_count_kv", "rope.freq_base"), ANY)
KNOWN |= {"vocab_size": ANY, "attention.causal": (True,), "rope.scaling.type": ("none",)}
FILE: Known = {"general.type": ("model",), "split.count": (0, 1)}
TOKEN = "tokenizer.ggml.{}_id"
NAMES = {"bos_token": "bos_token", "eos_token": "eos_token", "pad_token": "padding_token", "unk_token": "unknown_token"}


def open_gguf(path: Path, name: str) -> Pretrained:
    """The model in a .gguf file. Only the header is read.

    Raises a UserError that says what is damaged or missing, or which part of the model is not supported."""
    metadata, weights = read_gguf(path)
    check_settings(path, {key: metadata[key] for key in FILE & metadata.keys()}, FILE)
    kind = metadata.get("general.architecture")
    if kind not in list(GGUF):
        fault = f"only {', '.join(GGUF)} are supported: use another model"
        raise refusal(path, "general.architecture", kind, fault)
    settings = {key: value for key, value in metadata.items() if key.startswith(f"{kind}.")}
    fields: dict[str, Any] = {ours: size(path, settings, f"{kind}.{theirs}") for ours, theirs in FIELDS.items()}
    width = settings.get(f"{kind}.attention.key_length", fields["d_model"] // fields["n_heads"])
    known = {f"{kind}.{key}": values for key, values in KNOWN.items()}
    check_settings(path, settings, known | dict.fromkeys((f"{kind}.{key}" for key in WIDTHS), (width,)))
    layout, shapes = GGUF[kind], weights.shapes

    def is_stored(leaf: str) -> bool:
        return layout.name(leaf) in shapes

    blocks = {w: "attention" if w[2:] in "qkvo" else "ffw" for w in MATRICES}
    fields |= {
        "architecture": "gpt2" if kind == "gpt2" else "llama", "d_head": width,
        "vocabulary_size": shapes.get(layout.name("embedding"), (1,))[0],
        "n_kv_heads": settings.get(f"{kind}.attention.head_count_kv"),
        "norm_eps": settings.get(f"{kind}.{EPS[kind]}"),
        "rotary_base": settings.get(f"{kind}.rope.freq_base", 10_000.0),
        "biases": tuple(w for w, block in blocks.items() if is_stored(f"layers.0.{block}.b_{w[2:]}")),
        "tie_readout": not is_stored("readout"),
    }  # fmt: skip
    tokenizer = tokenizer_from_gguf(metadata, str(path))
    ids = {role: metadata.get(TOKEN.format(NAMES[role])) for role in ROLES}
    texts = {role: tokenizer.id_to_token(i) for role, i in ids.items() if type(i) is int and 0 <= i < 2**32}
    special = {role: text for role, text in texts.items() if text is not None}
    template, stop = metadata.get("tokenizer.chat_template"), [ids["eos_token"]]
    return foreign_decoder(name, (path,), fields, weights, layout, tokenizer, special, template, stop)
