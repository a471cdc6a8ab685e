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
from retro_np.pretrained.decoder import Pretrained, check_settings, foreign_decoder, sizes
from retro_np.pretrained.layouts import AGAIN, HUGGING_FACE, Layout, Weights
from retro_np.retrieval.folders import ANY, Known, refusal
from retro_np.retrieval.tokenizer import load_tokenizer
from retro_np.tree import Array

CONFIG, SINGLE, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"
TOKENS = ("special_tokens_map.json", "tokenizer_config.json")  # The second one has priority.
CONVERT = "{0} is missing; make it from {1} with Python: transformers.{2}.from_pretrained({3!r}).save_pretrained({3!r})"
SHARD = re.compile(r"\w[\w.-]{0,199}")  # the name of a file beside the index
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "gpt2": "GPT2LMHeadModel"}
# Our fields and the settings that give them
FIELDS = {
    "vocabulary_size": "vocab_size", "d_model": "hidden_size", "d_ffw": "intermediate_size",
    "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "max_positions": "max_position_embeddings",
}  # fmt: skip
GPT2_FIELDS = {"vocabulary_size": "vocab_size", "d_model": "n_embd", "n_layers": "n_layer", "n_heads": "n_head"}
GPT2_FIELDS |= {"max_positions": "n_positions"}
# Settings of training, of generation, of other heads and of the file itself
WITHOUT_EFFECT = (
    "_name_or_path", "_num_labels", "attention_dropout", "attn_pdrop", "bad_words_ids", "begin_suppress_tokens",
    "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "embd_pdrop", "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label",
    "initializer_range", "is_llama_config", "keys_to_ignore_at_inference", "label2id", "length_penalty", "max_length",
    "min_length", "n_ctx", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix", "pretraining_tp",
    "problem_type", "remove_invalid_values", "repetition_penalty", "resid_pdrop", "return_dict",
    "return_dict_in_generate", "sep_token_id", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers.js_config",
    "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
)  # fmt: skip
TRUTH = (False, True)
COMMON: Known = dict.fromkeys((*WITHOUT_EFFECT, "model_type"), ANY) | {"tie_word_embeddings": TRUTH}
ROPE: Known = {"rope_type": (None, "default"), "type": (None, "default"), "rope_theta": ANY}
ROPE |= {"partial_rotary_factor": (None, 1)}
ROTARY: Known = ROPE | dict.fromkeys(("rope_scaling", "rope_parameters", "rms_norm_eps", "head_dim"), ANY)
ROTARY |= dict.fromkeys((*FIELDS.values(), "num_key_value_heads"), ANY) | {"hidden_act": ("silu", "swish")}
KNOWN: dict[str, Known] = {
    "llama": ROTARY | {"attention_bias": TRUTH, "mlp_bias": TRUTH},
    "qwen2": ROTARY | {"sliding_window": ANY, "max_window_layers": ANY},  # in use only with use_sliding_window
    "gpt2": dict.fromkeys((*GPT2_FIELDS.values(), "n_inner", "layer_norm_epsilon"), ANY)
    | {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,)},
}


def open_folder(folder: Path, name: str) -> Pretrained:
    """The model in a folder. Only settings, the tokenizer and the headers of the weights are read.

    Raises a UserError that names the file that is missing or damaged, or the setting that is not supported."""
    fields, layout, ends = read_config(folder)
    files, weights = _open_weights(folder)
    if not (folder / TOKENIZER).is_file():
        raise UserError(CONVERT.format(folder / TOKENIZER, "others", "AutoTokenizer", str(folder)))
    tokenizer = load_tokenizer(folder / TOKENIZER)
    says = _settings(folder / TOKENS[0]) | _settings(folder / TOKENS[1])
    special = {role: token.get("content") if isinstance(token, dict) else token for role, token in says.items()}
    template = says.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {part.get("name"): part.get("template") for part in template if isinstance(part, dict)}.get(
            "default"
        )
    if (folder / TEMPLATE).is_file():
        with reporting(f"{folder / TEMPLATE} cannot be read", AGAIN):
            template = (folder / TEMPLATE).read_text("utf-8")
    ends += _ids(_settings(folder / GENERATION))
    return foreign_decoder(name, files, fields, weights, layout, tokenizer, special, template, ends)


def read_config(folder: Path) -> tuple[dict[str, Any], Layout, list[Any]]:
    """By config.json: the fields of the DecoderConfig, the layout of the weights, and the ids that end a text.

    Raises UserError for an architecture or a setting that is not supported."""
    path = folder / CONFIG
    if not path.exists():
        raise UserError(f"{path} is missing: {AGAIN}, or give the folder of a model")
    settings = _settings(path)
    kind = settings.get("model_type")
    if kind not in list(ARCHITECTURES):
        raise refusal(path, "model_type", kind, f"only {', '.join(ARCHITECTURES)} are supported: use another model")
    fields = sizes(path, settings, GPT2_FIELDS if kind == "gpt2" else FIELDS)
    known = COMMON | KNOWN[kind] | {"architectures": (None, [ARCHITECTURES[kind]])}
    check_settings(path, settings, known | {"layer_types": (None, ["full_attention"] * min(fields["n_layers"], 9999))})
    fields |= {"tie_readout": bool(settings.get("tie_word_embeddings", kind == "gpt2"))}
    if kind == "gpt2":
        fields |= {"architecture": "gpt2", "norm_eps": settings.get("layer_norm_epsilon", 1e-5)}
        fields |= {"d_ffw": settings.get("n_inner") or 4 * fields["d_model"]}
        biases = ["w_q", "w_k", "w_v", "w_o", "w_in", "w_out"]
    else:
        fields |= {"norm_eps": settings.get("rms_norm_eps", 1e-6), "rotary_base": _rotary_base(path, settings)}
        fields |= {"n_kv_heads": settings.get("num_key_value_heads")}
        biases = ["w_q", "w_k", "w_v"] if kind == "qwen2" else []
        biases += ["w_q", "w_k", "w_v", "w_o"] if settings.get("attention_bias") else []
        biases += ["w_gate", "w_in", "w_out"] if settings.get("mlp_bias") else []
    d_head = settings.get("head_dim") or fields["d_model"] // fields["n_heads"]
    return fields | {"d_head": d_head, "biases": biases}, HUGGING_FACE[kind], _ids(settings)


def _rotary_base(path: Path, settings: dict[str, Any]) -> Any:
    """θ of the rotary positions, which newer files put into rope_parameters. Raises UserError for any scaling."""
    base = settings.get("rope_theta")
    for name in ("rope_scaling", "rope_parameters"):
        rope = settings.get(name) or {}
        if not isinstance(rope, dict):
            raise refusal(path, name, rope, f"it must be an object: {AGAIN}")
        known = {f"{name}.{key}": values for key, values in ROPE.items()}
        check_settings(path, {f"{name}.{key}": value for key, value in rope.items()}, known)
        base = rope.get("rope_theta", base)
    return 10_000.0 if base is None else base


def _open_weights(folder: Path) -> tuple[Iterable[Path], Weights]:
    """The files of the weights, and the tensors in them."""
    if (folder / SINGLE).is_file():
        files = {SINGLE: folder / SINGLE}
        opened = {SINGLE: open_safetensors(folder / SINGLE, AGAIN)[0]}
        file_of = dict.fromkeys(opened[SINGLE], SINGLE)
    elif (folder / INDEX).is_file():
        file_of = _settings(folder / INDEX).get("weight_map", {})
        if not isinstance(file_of, dict) or not all(
            isinstance(f, str) and SHARD.fullmatch(f) for f in file_of.values()
        ):
            raise UserError(f"{folder / INDEX}: weight_map does not name a file for each tensor: {AGAIN}")
        files = {name: folder / name for name in sorted(set(file_of.values()))}
        for path in files.values():
            if not path.is_file():
                raise UserError(f"{path} is missing, but {INDEX} names it: {AGAIN}")
        opened = {name: open_safetensors(path, AGAIN)[0] for name, path in files.items()}
    elif pickled := [*folder.glob("pytorch_model*.bin")]:
        source = f"{pickled[0].name}, which may run code and is not read,"
        raise UserError(CONVERT.format(folder / SINGLE, source, "AutoModelForCausalLM", str(folder)))
    else:
        raise UserError(f"{folder / SINGLE} is missing: {AGAIN}, or give the path of a .gguf file")
    for name, file in file_of.items():
        if name not in opened[file]:
            raise UserError(f"{folder / file} lacks {name!r:.99}, which {INDEX} places there: {AGAIN}")

    def read(name: str) -> Array:
        return read_tensor(files[file_of[name]], name, opened[file_of[name]][name], AGAIN)

    return files.values(), Weights(folder, {name: opened[f][name].shape for name, f in file_of.items()}, read)


def _settings(path: Path) -> dict[str, Any]:
    """The content of a file of settings; of one that does not exist, none."""
    return read_json(path, hint=AGAIN) if os.path.lexists(path) else {}


def _ids(settings: dict[str, Any]) -> list[Any]:
    """What a file names as the ids that end a text: none, one or several."""
    ids = settings.get("eos_token_id")
    return ids if isinstance(ids, list) else [ids]
