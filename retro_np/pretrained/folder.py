"""Models in the Hugging Face layout: a folder with config.json, model.safetensors and tokenizer.json.

config.json is read as transformers 4 and 5 do. A setting that changes the model's output is understood or refused; one
that is not in the tables below is refused as well, unless it asks for nothing."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from retro_np.errors import UserError
from retro_np.files.untrusted import open_safetensors, read_json, read_tensor, reporting
from retro_np.pretrained.decoder import Pretrained, check_settings, foreign_decoder
from retro_np.pretrained.layouts import AGAIN, HUGGING_FACE, Layout, Weights
from retro_np.retrieval.folders import ANY, Known, refusal, sizes
from retro_np.retrieval.manifest import TOKENIZER
from retro_np.retrieval.tokenizer import load_tokenizer
from retro_np.tree import Array

CONFIG_FILE, GENERATION_FILE, TEMPLATE_FILE = "config.json", "generation_config.json", "chat_template.jinja"
TOKENS_FILES = ("special_tokens_map.json", "tokenizer_config.json")  # The second one has priority.
WEIGHTS_FILE, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
MAKE = "{0} is missing; make it from {1} with Python: transformers.{2}.from_pretrained({3!r}).save_pretrained({3!r})"
SHARD = re.compile(r"\w[\w.-]{0,199}")  # the name of a file beside the index
# The classes with a readout, and those without one, which need a tied readout
MODEL_TYPES = {"llama": ("LlamaForCausalLM", "LlamaModel"), "qwen2": ("Qwen2ForCausalLM", "Qwen2Model")}
MODEL_TYPES |= {"gpt2": ("GPT2LMHeadModel", "GPT2Model")}
# Our fields and the settings that give them
LLAMA_SIZES = {
    "vocabulary_size": "vocab_size", "d_model": "hidden_size", "d_ffw": "intermediate_size",
    "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "max_positions": "max_position_embeddings",
}  # fmt: skip
GPT2_SIZES = {"vocabulary_size": "vocab_size", "d_model": "n_embd", "n_layers": "n_layer", "n_heads": "n_head"}
GPT2_SIZES |= {"max_positions": "n_positions"}
# Settings of training, of generation, of other heads and of the file itself
WITHOUT_EFFECT = re.compile(
    r"_\w+|\w*(dropout|pdrop|penalty|dtype|token_ids?|2id|2label|ngram_size)|(max|min)_length|top_[kp]|typical_p|n_ctx"
    r"|(num_beam|num_return|output|return|summary|suppress|begin_suppress|unsloth|transformers)[\w.]*|initializer_range"
    r"|bad_words_ids|chunk_size_feed_forward|do_sample|early_stopping|finetuning_task|gradient_checkpointing|prefix"
    r"|is_llama_config|keys_to_ignore_at_inference|pretraining_tp|problem_type|remove_invalid_values|temperature"
    r"|task_specific_params|tf_legacy_loss|tokenizer_class|torchscript|use_bfloat16|use_cache"
)
BOOLEAN = (False, True)
ROTARY: Known = {"rope_type": (None, "default"), "type": (None, "default"), "rope_theta": ANY}
ROTARY |= {"partial_rotary_factor": (None, 1)}
OF_LLAMA: Known = dict.fromkeys((*LLAMA_SIZES.values(), "num_key_value_heads", "head_dim", "rms_norm_eps"), ANY)
OF_LLAMA |= ROTARY | {"rope_scaling": ANY, "rope_parameters": ANY, "hidden_act": ("silu", "swish")}
OF_GPT2: Known = dict.fromkeys((*GPT2_SIZES.values(), "n_inner", "layer_norm_epsilon"), ANY)
OF_GPT2 |= {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,)}
OF_TYPE: dict[str, Known] = {
    "llama": OF_LLAMA | {"attention_bias": BOOLEAN, "mlp_bias": BOOLEAN},
    "qwen2": OF_LLAMA | {"sliding_window": ANY, "max_window_layers": ANY},  # in use only with use_sliding_window
    "gpt2": OF_GPT2,
}


def open_folder(folder: Path, name: str) -> Pretrained:
    """The model in a folder. Only settings, the tokenizer and the headers of the weights are read.

    Raises a UserError that names the file that is missing or damaged, or the setting that is not supported."""
    fields, layout, ends = read_config(folder)
    files, weights = _open_weights(folder)
    if not (folder / TOKENIZER).is_file():
        raise UserError(MAKE.format(folder / TOKENIZER, "others", "AutoTokenizer", str(folder)))
    tokenizer = load_tokenizer(folder / TOKENIZER)
    says = _settings(folder / TOKENS_FILES[0]) | _settings(folder / TOKENS_FILES[1])
    special = {role: token.get("content") if isinstance(token, dict) else token for role, token in says.items()}
    template = says.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {part.get("name"): part.get("template") for part in template if isinstance(part, dict)}.get(
            "default"
        )
    if (folder / TEMPLATE_FILE).is_file():
        with reporting(f"{folder / TEMPLATE_FILE} cannot be read", AGAIN):
            template = (folder / TEMPLATE_FILE).read_text("utf-8")
    ends += _end_ids(_settings(folder / GENERATION_FILE))
    return foreign_decoder(name, files, fields, weights, layout, tokenizer, special, template, ends)


def read_config(folder: Path) -> tuple[dict[str, Any], Layout, list[Any]]:
    """By config.json: the fields of the DecoderConfig, the layout of the weights, and the ids that end a text.

    Raises UserError for an architecture or a setting that is not supported."""
    path = folder / CONFIG_FILE
    if not path.exists():
        raise UserError(f"{folder} holds no model: give a run's folder, or one with {CONFIG_FILE} of a model")
    settings = _settings(path)
    kind = settings.get("model_type")
    if kind not in list(MODEL_TYPES):
        raise refusal(path, "model_type", kind, f"only {', '.join(MODEL_TYPES)} are supported: use another model")
    fields = sizes(path, settings, GPT2_SIZES if kind == "gpt2" else LLAMA_SIZES)
    known = OF_TYPE[kind] | {"model_type": ANY, "tie_word_embeddings": BOOLEAN}
    fields["tie_readout"] = bool(settings.get("tie_word_embeddings", kind == "gpt2"))
    known |= {"architectures": (None, *([name] for name in MODEL_TYPES[kind][: 1 + fields["tie_readout"]]))}
    known |= {"layer_types": (None, ["full_attention"] * min(fields["n_layers"], 9999))}
    check_settings(path, {key: settings[key] for key in settings if not WITHOUT_EFFECT.fullmatch(key)}, known)
    width, hidden = settings.get("head_dim"), settings.get("n_inner")  # which may be null
    fields["d_head"] = fields["d_model"] // fields["n_heads"] if width is None else width
    if kind == "gpt2":
        fields |= {"architecture": "gpt2", "norm_eps": settings.get("layer_norm_epsilon", 1e-5)}
        fields |= {"d_ffw": 4 * fields["d_model"] if hidden is None else hidden}
        biases = ["w_q", "w_k", "w_v", "w_o", "w_in", "w_out"]
    else:
        fields |= {"norm_eps": settings.get("rms_norm_eps", 1e-6), "rotary_base": _rotary_base(path, settings)}
        fields |= {"n_kv_heads": settings.get("num_key_value_heads")}
        biases = ["w_q", "w_k", "w_v"] if kind == "qwen2" else []
        biases += ["w_q", "w_k", "w_v", "w_o"] if settings.get("attention_bias") else []
        biases += ["w_gate", "w_in", "w_out"] if settings.get("mlp_bias") else []
    return fields | {"biases": biases}, HUGGING_FACE[kind], _end_ids(settings)


def _rotary_base(path: Path, settings: dict[str, Any]) -> Any:
    """θ of the rotary positions, which newer files put into rope_parameters. Raises UserError for any scaling."""
    base = settings.get("rope_theta")
    for name in ("rope_scaling", "rope_parameters"):
        rope = settings.get(name) or {}
        if not isinstance(rope, dict):
            raise refusal(path, name, rope, f"it must be an object: {AGAIN}")
        known = {f"{name}.{key}": values for key, values in ROTARY.items()}
        check_settings(path, {f"{name}.{key}": value for key, value in rope.items()}, known)
        base = rope.get("rope_theta", base)
    return 10_000.0 if base is None else base


def _open_weights(folder: Path) -> tuple[Iterable[Path], Weights]:
    """The files of the weights, and the tensors in them."""
    if (folder / WEIGHTS_FILE).is_file():
        opened = {WEIGHTS_FILE: open_safetensors(folder / WEIGHTS_FILE, AGAIN)[0]}
        file_of = dict.fromkeys(opened[WEIGHTS_FILE], WEIGHTS_FILE)
    elif (folder / WEIGHTS_INDEX).is_file():
        shards = sorted(set((file_of := read_index(folder)).values()))
        for shard in shards:
            if not (folder / shard).is_file():
                raise UserError(f"{folder / shard} is missing, but {WEIGHTS_INDEX} names it: {AGAIN}")
        opened = {shard: open_safetensors(folder / shard, AGAIN)[0] for shard in shards}
    elif pickled := [*folder.glob("pytorch_model*.bin")]:
        source = f"{pickled[0].name}, which may run code and is not read,"
        raise UserError(MAKE.format(folder / WEIGHTS_FILE, source, "AutoModelForCausalLM", str(folder)))
    else:
        raise UserError(f"{folder / WEIGHTS_FILE} is missing: {AGAIN}, or give the path of a .gguf file")
    for name, file in file_of.items():
        if name not in opened[file]:
            raise UserError(f"{folder / file} lacks {name!r:.99}, which {WEIGHTS_INDEX} places there: {AGAIN}")

    def read(name: str) -> Array:
        return read_tensor(folder / file_of[name], name, opened[file_of[name]][name], AGAIN)

    shapes = {name: opened[file][name].shape for name, file in file_of.items()}
    return [folder / file for file in opened], Weights(folder, shapes, read)


def read_index(folder: Path) -> dict[str, str]:
    """The file beside the index that holds each tensor; empty without an index. Raises UserError for a damaged one."""
    file_of = _settings(folder / WEIGHTS_INDEX).get("weight_map", {})
    shards: list[Any] = list(file_of.values()) if isinstance(file_of, dict) else [None]
    if not all(isinstance(shard, str) and SHARD.fullmatch(shard) for shard in shards):
        raise UserError(f"{folder / WEIGHTS_INDEX}: weight_map does not name a file for each tensor: {AGAIN}")
    return file_of


def _settings(path: Path) -> dict[str, Any]:
    """The content of a file of settings; of one that does not exist, none."""
    return read_json(path, hint=AGAIN) if os.path.lexists(path) else {}


def _end_ids(settings: dict[str, Any]) -> list[Any]:
    """What a file names as the ids that end a text: none, one or several."""
    ids = settings.get("eos_token_id")
    return ids if isinstance(ids, list) else [ids]
