"""Models in .gguf files, whose metadata holds configuration and tokenizer."""

from pathlib import Path
from typing import Any

from retro_np.nn.decoders import MATRICES
from retro_np.pretrained.decoder import Pretrained, check_settings, foreign_decoder
from retro_np.pretrained.gguf_file import read_gguf
from retro_np.pretrained.layouts import GGUF
from retro_np.retrieval.folders import ANY, Known, refusal, sizes
from retro_np.retrieval.gguf_tokenizer import tokenizer_from_gguf

# Our fields and the entries that give them, after the name of the architecture and a dot
ENTRIES = {
    "d_model": "embedding_length", "d_ffw": "feed_forward_length", "n_layers": "block_count",
    "n_heads": "attention.head_count", "max_positions": "context_length",
}  # fmt: skip
OPTIONAL_ENTRIES = {"n_kv_heads": "attention.head_count_kv", "rotary_base": "rope.freq_base"}
EPS = ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon")
WIDTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")  # all must be that of a head
KNOWN_ENTRIES: Known = dict.fromkeys((*ENTRIES.values(), *OPTIONAL_ENTRIES.values(), *EPS, "vocab_size"), ANY)
KNOWN_ENTRIES |= {"attention.causal": (True,), "rope.scaling.type": ("none",)}
OF_THIS_FILE: Known = {"general.type": ("model",), "split.count": (0, 1)}
TOKEN_ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def open_gguf(path: Path, name: str) -> Pretrained:
    """The model in a .gguf file. Only the header is read.

    Raises a UserError that says what is damaged or missing, or which part of the model is not supported."""
    metadata, weights = read_gguf(path)
    check_settings(path, {key: metadata[key] for key in OF_THIS_FILE.keys() & metadata.keys()}, OF_THIS_FILE)
    kind = metadata.get("general.architecture")
    if kind not in list(GGUF):
        hint = f"only {', '.join(GGUF)} are supported: use another model"
        raise refusal(path, "general.architecture", kind, hint)
    layout, settings = GGUF[kind], {key: value for key, value in metadata.items() if key.startswith(f"{kind}.")}
    fields = sizes(path, settings, {ours: f"{kind}.{theirs}" for ours, theirs in ENTRIES.items()})
    width = settings.get(f"{kind}.attention.key_length", fields["d_model"] // fields["n_heads"])
    known = KNOWN_ENTRIES | dict.fromkeys(WIDTHS, (width,))
    check_settings(path, settings, {f"{kind}.{key}": values for key, values in known.items()})
    fields |= {ours: settings[f"{kind}.{key}"] for ours, key in OPTIONAL_ENTRIES.items() if f"{kind}.{key}" in settings}
    biased = ((w, "attention" if w[-1] in "qkvo" else "ffw") for w in MATRICES)
    fields |= {
        "architecture": "gpt2" if kind == "gpt2" else "llama",
        "d_head": width,
        "vocabulary_size": weights.shapes.get(layout.name("embedding"), (1,))[0],
        "norm_eps": settings.get(f"{kind}.{EPS[kind != 'gpt2']}"),
        "biases": tuple(w for w, block in biased if layout.name(f"layers.0.{block}.b{w[1:]}") in weights.shapes),
        "tie_readout": layout.name("readout") not in weights.shapes,
    }
    tokenizer = tokenizer_from_gguf(metadata, str(path))
    ids = {role: metadata.get(f"tokenizer.ggml.{theirs}_token_id") for role, theirs in TOKEN_ROLES.items()}
    special = {role: tokenizer.id_to_token(i) for role, i in ids.items() if type(i) is int and 0 <= i < 2**32}
    template: Any = metadata.get("tokenizer.chat_template")
    return foreign_decoder(name, [path], fields, weights, layout, tokenizer, special, template, [ids["eos_token"]])
