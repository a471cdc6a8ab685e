"""What the JSON files of an embedder's folder ask for: the mean over BERT's last states, or something that is refused.

Read by sentence-transformers 0.3 to 6: modules.json and the files of its modules. By transformers 4 and 5: config.json,
tokenizer_config.json and special_tokens_map.json. A value is refused if it changes what a version embeds."""

import json
import os
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from retro_np.errors import UserError
from retro_np.files.untrusted import read_json

Known = dict[str, Container[Any]]  # the values of each setting with which the keys are right
ANY = type("Any", (), {"__contains__": lambda self, value: True})()  # checked elsewhere, or never changes a key
OFF: tuple[Any, ...] = (None, False, {}, [])  # asks for nothing
SUPPORTED = "only mean pooling is supported, over the last states of a BERT encoder; use another model"
AGAIN = "download the whole model again"
# A module's class. Up to 5.3 the file gave it its name. Code that comes with a model has any other name.
LIBRARY = r"sentence_transformers\.(?:models|(?:base|sentence_transformer)\.modules)\."
MODULE = re.compile(LIBRARY + r"(?:\w+\.)?(Transformer|Pooling|Normalize)")
PLACE = re.compile(r"(\w[\w. -]{0,99})?")  # a module's folder
# The last: a folder of transformers alone, with nothing but the normalisation added.
ORDERS = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"], ["Normalize"])
POOLING: Known = {"pooling_mode": ["mean", ["mean"]], "pooling_mode_mean_tokens": [True], "include_prompt": [True]}
WIDTHS: Known = {"word_embedding_dimension": ANY, "embedding_dimension": ANY}
NORMALIZE: Known = {"module_input_name": ["sentence_embedding"], "module_output_name": ["sentence_embedding", None]}
SENTENCE_BERT: Known = {
    "max_seq_length": ANY, "do_lower_case": [None, False, True], "unpad_inputs": [None, False, True],
    "transformer_task": ["feature-extraction"], "module_output_name": ["token_embeddings"],
    "modality_config": [{"text": {"method": "forward", "method_output_name": "last_hidden_state"}}],
}  # fmt: skip
SENTENCE_TRANSFORMERS: Known = {"__version__": ANY, "model_type": ["SentenceTransformer"], "prompts": ANY}
SENTENCE_TRANSFORMERS["similarity_fn_name"] = [None, "cosine", "dot", "euclidean", "manhattan"]  # compares keys
MODEL_CONFIG: Known = dict.fromkeys(("is_decoder", "add_cross_attention", "is_encoder_decoder", "auto_map"), OFF)
MODEL_CONFIG |= dict.fromkeys(("quantization_config", "pruned_heads", "transformers_weights", "is_causal"), OFF)
# Classes that put their own normalizer in the place of tokenizer.json's, and classes that obey tokenizer.json.
BERT_TOKENIZERS = (None, "BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "DistilBertTokenizerFast")
OBEDIENT = ("PreTrainedTokenizerFast", "TokenizersBackend", "XLMRobertaTokenizer", "XLMRobertaTokenizerFast")
TOKENIZER_CONFIG: Known = {
    "tokenizer_class": [*BERT_TOKENIZERS, *OBEDIENT, "PreTrainedTokenizer"], "do_basic_tokenize": [None, True],
    "truncation_side": [None, "right"], "padding_side": [None, "right"], "auto_map": OFF, "chat_template": OFF,
    "never_split": OFF, "split_special_tokens": OFF, "add_bos_token": OFF, "add_eos_token": OFF,
    "model_input_names": [None, ["input_ids", "attention_mask"], ["input_ids", "token_type_ids", "attention_mask"]],
}  # fmt: skip
# The special tokens of BERT's tokenizer, which it marks as special even if tokenizer.json does not.
NAMED = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "unk", "pad", "mask")}
PROBE = "a B Bé 文 ก ☃ 😀 ﬁ"  # words that many vocabularies lack


def read_settings(path: Path, known: Known, others: Container[Any] = OFF) -> dict[str, Any]:
    """A JSON file's settings, if it exists. Raises UserError for values not in `known` or, for other keys, `others`."""
    settings: dict[str, Any] = read_json(path, hint=AGAIN) if os.path.exists(path) else {}
    _check(path, settings, known, others)
    return settings


def refusal(path: Path, key: str, value: Any, hint: str = SUPPORTED) -> UserError:
    """The error for a setting that is not understood. At most 80 characters of the value are shown."""
    return UserError(f"{path}: {key} is {value!r:.80}; {hint}")


def _check(path: Path, settings: dict[str, Any], known: Known, others: Container[Any] = OFF) -> None:
    for key, value in settings.items():
        if value not in known.get(key, others):
            raise refusal(path, key, value)


def check_modules(folder: Path, config: dict[str, Any]) -> bool:
    """Whether keys are normalised. config: the content of config.json.

    Raises a UserError that names the file and the setting if keys are anything but the mean of the last states."""
    _check(folder / "config.json", config, MODEL_CONFIG, others=ANY)
    if "ForCausalLM" in str(config.get("architectures")):
        raise refusal(folder / "config.json", "architectures", config["architectures"])
    for pattern in ("adapter_config.json", "chat_template.*", "sentence_*_config.json"):
        for path in folder.glob(pattern):
            if path.name != "sentence_bert_config.json":
                raise UserError(f"{path} is not a file of a BERT encoder: {SUPPORTED}")
    read_settings(folder / "sentence_bert_config.json", SENTENCE_BERT)
    path = folder / "config_sentence_transformers.json"
    prompts = read_settings(path, SENTENCE_TRANSFORMERS).get("prompts") or {}
    if not isinstance(prompts, dict) or any(prompts.values()):
        raise refusal(path, "prompts", prompts)
    path = folder / "modules.json"
    if not path.exists():  # a folder of transformers alone
        for module in folder.glob("[0-9]_*"):
            raise UserError(f"{path} is missing, but there is {module.name}: {AGAIN}")
        return False
    modules, kinds = read_json(path, list, AGAIN), []
    for i, module in enumerate(modules):
        match = MODULE.fullmatch(str(module.get("type"))) if isinstance(module, dict) else None
        if not match or module.get("idx", i) != i:
            raise refusal(path, f"module {i}", module)
        _check(path, module, dict.fromkeys(("idx", "name", "path", "type"), ANY))
        kinds.append(match[1])
        place = module.get("path", "" if i == 0 else f"{i}_{match[1]}")
        if not isinstance(place, str) or not PLACE.fullmatch(place):
            raise refusal(path, "path", place, f"it must name a folder in {folder}: {AGAIN}")
        if match[1] == "Transformer" and place:
            raise refusal(path, "path", place, f"move the files of that folder to {folder} and set it to ''")
        if match[1] == "Pooling":
            _check_pooling(folder / place / "config.json", config["hidden_size"])
        elif place:
            read_settings(folder / place / "config.json", NORMALIZE)
    if kinds not in ORDERS or len({str(module.get("name", i)) for i, module in enumerate(modules)}) != len(kinds):
        raise refusal(path, "the list of modules", kinds)
    return "Normalize" in kinds


def _check_pooling(path: Path, d_key: int) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing, so the pooling is unknown: {AGAIN}")
    pooling = read_settings(path, POOLING | WIDTHS)
    if not pooling.keys() & {"pooling_mode", "pooling_mode_mean_tokens"}:
        raise refusal(path, "pooling_mode", None)
    for key in pooling.keys() & WIDTHS:
        if pooling[key] != d_key:
            raise refusal(path, key, pooling[key], f"hidden_size in config.json is {d_key}: {AGAIN}")


def check_tokenizer(folder: Path, tokenizer: Tokenizer, n_rows: int) -> None:
    """Raise UserError if a token has no embedding, or if a file asks for other tokens than tokenizer.json makes.

    tokenizer: from tokenizer.json; its truncation and padding are removed. n_rows: the number of embeddings."""
    path, unknown = folder / "tokenizer.json", getattr(tokenizer.model, "unk_token", None)
    if unknown is not None and tokenizer.token_to_id(unknown) is None:
        raise refusal(path, "unk_token", unknown, f"the vocabulary lacks it: {AGAIN}")
    if dropout := getattr(tokenizer.model, "dropout", None):
        raise refusal(path, "dropout", dropout, "a text would have another key each time: set it to null")
    for name, part in (("truncation", tokenizer.truncation), ("padding", tokenizer.padding)):
        if part and part["direction"] != "right":
            raise refusal(path, f"direction of {name}", part["direction"], "only right is supported; use another model")
    tokenizer.no_truncation()  # word_pieces truncates; the file's own length often differs
    tokenizer.no_padding()
    empty, probe = tokenizer.encode("").ids, tokenizer.encode(PROBE)
    largest = max([*tokenizer.get_vocab(with_added_tokens=True).values(), *empty], default=0)
    if largest >= n_rows:
        raise refusal(path, "a token's id", largest, f"but vocab_size in config.json is {n_rows}: {AGAIN}")
    inner = tokenizer.encode(PROBE, add_special_tokens=False).ids
    if len(empty) != 2 or probe.ids != [empty[0], *inner, empty[1]] or any(probe.type_ids):
        raise refusal(path, "post_processor", probe.tokens, f"it must make [CLS] … [SEP], all of type 0: {AGAIN}")
    _check_letters(folder, tokenizer)
    roles = {"cls_token": tokenizer.id_to_token(empty[0]), "sep_token": tokenizer.id_to_token(empty[1])}
    roles |= {"unk_token": unknown} if unknown is not None else {}
    added = tokenizer.get_added_tokens_decoder()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        _check_special_tokens(folder / name, {str(i): token for i, token in added.items()}, roles)
    read_settings(folder / "added_tokens.json", {token.content: [i] for i, token in added.items()}, others=())


def _check_letters(folder: Path, tokenizer: Tokenizer) -> None:
    """Compare how tokenizer.json splits a text with the settings of BERT's own tokenizer, which prevail."""
    normalizer = json.loads(tokenizer.normalizer.__getstate__()) if tokenizer.normalizer else {}
    parts = {part.get("type"): part for part in normalizer.get("normalizers", [normalizer])}
    bert = parts.get("BertNormalizer", {})
    lowers, strips = bool(bert.get("lowercase")) or "Lowercase" in parts, bert.get("strip_accents")
    does: dict[str, Any] = {
        "do_lower_case": lowers, "tokenize_chinese_chars": bool(bert.get("handle_chinese_chars")),
        "strip_accents": bool(bert.get("lowercase") if strips is None else strips) or "StripAccents" in parts,
    }  # fmt: skip
    path = folder / "sentence_bert_config.json"
    if read_settings(path, {}, ANY).get("do_lower_case") and not lowers:
        raise refusal(path, "do_lower_case", True, "but tokenizer.json keeps upper case; use another model")
    path = folder / "tokenizer_config.json"
    settings = read_settings(path, TOKENIZER_CONFIG, others=ANY)
    if not path.exists() or settings.get("tokenizer_class") not in BERT_TOKENIZERS:
        return
    says = {key: settings[key] for key in does if settings.get(key) is not None}
    if bert:  # the class's own parts and defaults
        does |= {"clean_text": bert.get("clean_text"), "model": type(tokenizer.model).__name__}
        splitter = json.loads(tokenizer.pre_tokenizer.__getstate__()) if tokenizer.pre_tokenizer else {}
        does["pre_tokenizer"] = splitter.get("type")
        does["added_tokens"] = set(tokenizer.encode("").ids) <= tokenizer.get_added_tokens_decoder().keys()
        says |= {"clean_text": True, "model": "WordPiece", "pre_tokenizer": "BertPreTokenizer", "added_tokens": True}
        says = {"do_lower_case": True, "tokenize_chinese_chars": True} | says
        says = {"strip_accents": says["do_lower_case"]} | says
        says |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    for key, value in sorted(says.items()):
        other = does[key] if key in does else getattr(tokenizer.model, key, value)
        if other != value:
            raise refusal(path, key, value, f"but in tokenizer.json it is {other}: {AGAIN}")


def _check_special_tokens(path: Path, added: dict[str, Any], roles: dict[str, Any]) -> None:
    """Raise UserError for a special token that tokenizer.json lacks, describes otherwise or uses otherwise."""
    settings, names = read_settings(path, {}, ANY), {token.content for token in added.values()}
    stated = [(key, settings[key]) for key in (*NAMED, "bos_token", "eos_token") if settings.get(key) is not None]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        stated += [(key, token) for _, token in _items(settings.get(key) or [])]
    for key, token in stated:
        text = token.get("content") if isinstance(token, dict) else token
        if text not in [*names, NAMED.get(key)] or text != roles.get(key, text):
            raise refusal(path, key, token, f"tokenizer.json has it otherwise: {AGAIN}")
    for i, token in _items(settings.get("added_tokens_decoder") or {}):
        if any(getattr(added.get(i), key, None) != value for key, value in _items(token) if key != "__type"):
            raise refusal(path, f"added_tokens_decoder {i}", token, f"tokenizer.json has it otherwise: {AGAIN}")


def _items(value: Any) -> list[tuple[str, Any]]:
    """The entries of a JSON object or list by key; anything else is one entry."""
    if not isinstance(value, dict):
        value = {str(i): part for i, part in enumerate(value if isinstance(value, list) else [value])}
    return list(value.items())
