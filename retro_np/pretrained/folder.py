"""Models in the Hugging Face layout: a folder with config.json, model.safetensors and tokenizer.json.

config.json is read as transformers 4 and 5 do. A setting that changes the model's output is understood or refused; one
that is not in the tables below is refused as well, unless it asks for nothing."""

import re
from pathlib import Path
from typing import Any

from retro_np.errors import UserError
from retro_np.files.untrusted import open_safetensors, read_tensor, reporting
from retro_np.pretrained.decoder import AGAIN, HUGGING_FACE, Pretrained, Weights, check_settings, foreign_decoder
from retro_np.retrieval.folders import ANY, Known, read_settings, refusal, sizes
from retro_np.retrieval.manifest import TOKENIZER
from retro_np.retrieval.tokenizer import TOKENS_FILES, load_tokenizer
from retro_np.tree import Array

CONFIG_FILE, GENERATION_FILE, TEMPLATE_FILE = "config.json", "generation_config.json", "chat_template.jinja"
WEIGHTS_FILE, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
MAKE = "{0} is missing; make it from {1} with Python: transformers.{2}.from_pretrained({3!r}).save_pretrained({3!r})"
SHARD = re.compile(r"\w[\w.-]{0,199}")  # the name of a file beside the index
# The classes with a readout, and those without one, which need a tied readout
MODEL_TYPES = {"llama": ("LlamaForCausalLM", "LlamaModel"), "qwen2": ("Qwen2ForCausalLM", "Qwen2Model")}
MODEL_TYPES |= {"gpt2": ("GPT2LMHeadModel", "GPT2Model")}
# Our fields and the settings that give them
LLAMA_SIZES = {"vocabulary_size": "vocab_size", "max_positions": "max_position_embeddings", "d_model": "hidden_size"}
LLAMA_SIZES |= {"d_ffw": "intermediate_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}
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
ROTARY: Known = dict.fromkeys(("rope_type", "type"), (None, "default")) | {"partial_rotary_factor": (None, 1)}
ROTARY |= {"rope_theta": ANY}
ROPES = ("rope_scaling", "rope_parameters")  # Newer files put the rotary positions' settings there.
OF_LLAMA: Known = dict.fromkeys((*LLAMA_SIZES.values(), "num_key_value_heads", "head_dim", "rms_norm_eps"), ANY)
OF_LLAMA |= ROTARY | dict.fromkeys(ROPES, ANY) | {"hidden_act": ("silu", "swish")}
OF_LLAMA |= {f"{name}.{key}": values for name in ROPES for key, values in ROTARY.items()}
OF_GPT2: Known = dict.fromkeys((*GPT2_SIZES.values(), "n_inner", "layer_norm_epsilon"), ANY)
OF_GPT2 |= {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,)}
OF_TYPE = {"llama": OF_LLAMA | {"attention_bias": BOOLEAN, "mlp_bias": BOOLEAN}, "gpt2": OF_GPT2}
OF_TYPE["qwen2"] = OF_LLAMA | {"sliding_window": ANY, "max_window_layers": ANY}  # in use only with use_sliding_window


def open_folder(folder: Path, name: str) -> Pretrained:
    """The model in a folder. Only settings, the tokenizer and the headers of the weights are read.

    Raises a UserError that names the file that is missing or damaged, or the setting that is not supported."""
    fields = read_config(folder)
    weights = _open_weights(folder)
    if not (folder / TOKENIZER).is_file():
        raise UserError(MAKE.format(folder / TOKENIZER, "others", "AutoTokenizer", str(folder)))
    tokenizer = load_tokenizer(folder / TOKENIZER)
    says = read_settings(folder / TOKENS_FILES[0]) | read_settings(folder / TOKENS_FILES[1])
    special = {role: token.get("content") if isinstance(token, dict) else token for role, token in says.items()}
    template = says.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {part.get("name"): part.get("template") for part in template if isinstance(part, dict)}
        template = named.get("default")
    if (folder / TEMPLATE_FILE).is_file():
        with reporting(f"{folder / TEMPLATE_FILE} cannot be read", AGAIN):
            template = (folder / TEMPLATE_FILE).read_text("utf-8")
    ends = [read_settings(folder / file).get("eos_token_id") for file in (CONFIG_FILE, GENERATION_FILE)]
    layout = HUGGING_FACE[fields["architecture"]]
    return foreign_decoder(name, fields, weights, layout, tokenizer, special, template, ends)


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of the DecoderConfig, by config.json.

    Raises UserError for an architecture or a setting that is not supported."""
    path = folder / CONFIG_FILE
    if not path.exists():
        raise UserError(f"{folder} holds no model: give a run's folder, or one with {CONFIG_FILE} of a model")
    settings = read_settings(path)
    kind = settings.get("model_type")
    if kind not in list(MODEL_TYPES):
        raise refusal(path, "model_type", kind, f"only {', '.join(MODEL_TYPES)} are supported: use another model")
    fields = sizes(path, settings, GPT2_SIZES if kind == "gpt2" else LLAMA_SIZES)
    known = OF_TYPE[kind] | {"model_type": ANY, "tie_word_embeddings": BOOLEAN}
    fields["tie_readout"] = bool(settings.get("tie_word_embeddings", kind == "gpt2"))
    known |= {"architectures": (None, *([name] for name in MODEL_TYPES[kind][: 1 + fields["tie_readout"]]))}
    known |= {"layer_types": (None, ["full_attention"] * min(fields["n_layers"], 9999))}
    base = settings.get("rope_theta")
    for name in ROPES if kind != "gpt2" else ():
        if not isinstance(rope := settings.get(name) or {}, dict):
            raise refusal(path, name, rope, f"it must be an object: {AGAIN}")
        base = rope.get("rope_theta", base)
        settings |= {f"{name}.{key}": value for key, value in rope.items()}
    check_settings(path, {key: settings[key] for key in settings if not WITHOUT_EFFECT.fullmatch(key)}, known)
    width, hidden = settings.get("head_dim"), settings.get("n_inner")  # which may be null
    fields["d_head"] = fields["d_model"] // fields["n_heads"] if width is None else width
    if kind == "gpt2":
        fields["d_ffw"] = 4 * fields["d_model"] if hidden is None else hidden
        fields |= {"architecture": "gpt2", "norm_eps": settings.get("layer_norm_epsilon", 1e-5)}
        biases = ["w_q", "w_k", "w_v", "w_o", "w_in", "w_out"]
    else:
        fields |= {"architecture": "llama", "norm_eps": settings.get("rms_norm_eps", 1e-6)}
        fields |= {"n_kv_heads": settings.get("num_key_value_heads"), "rotary_base": 10_000.0 if base is None else base}
        biases = ["w_q", "w_k", "w_v"] if kind == "qwen2" else []
        biases += ["w_q", "w_k", "w_v", "w_o"] if settings.get("attention_bias") else []
        biases += ["w_gate", "w_in", "w_out"] if settings.get("mlp_bias") else []
    return fields | {"biases": biases}


def _open_weights(folder: Path) -> Weights:
    """The tensors in one file, or in several with an index."""
    if (folder / WEIGHTS_FILE).is_file():
        opened = {WEIGHTS_FILE: open_safetensors(folder / WEIGHTS_FILE, AGAIN)[0]}
        file_of = dict.fromkeys(opened[WEIGHTS_FILE], WEIGHTS_FILE)
    elif (folder / WEIGHTS_INDEX).is_file():
        shards = sorted(set((file_of := read_index(folder)).values()))
        for missing in (shard for shard in shards if not (folder / shard).is_file()):
            raise UserError(f"{folder / missing} is missing, but {WEIGHTS_INDEX} names it: {AGAIN}")
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
    return Weights(folder, [folder / file for file in opened], shapes, read)


def read_index(folder: Path) -> dict[str, str]:
    """The file beside the index that holds each tensor; empty without an index. Raises UserError for a damaged one."""
    file_of = read_settings(folder / WEIGHTS_INDEX).get("weight_map", {})
    shards: list[Any] = list(file_of.values()) if isinstance(file_of, dict) else [None]
    if not all(isinstance(shard, str) and SHARD.fullmatch(shard) for shard in shards):
        raise UserError(f"{folder / WEIGHTS_INDEX}: weight_map does not name a file for each tensor: {AGAIN}")
    return file_of
