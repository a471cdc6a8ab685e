"""What the JSON files of an embedder's folder ask for: how keys are made of texts, or something that is refused.

Read by sentence-transformers 0.3 to 6: modules.json and the files of its modules. By transformers 4 and 5: config.json,
tokenizer_config.json and special_tokens_map.json. What the tables do not list is refused: it might change the keys."""

import base64
import json
import os
import re
from collections.abc import Container
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers

from retro_np.errors import UserError
from retro_np.files.untrusted import read_json
from retro_np.progress import one_line, say

Known = dict[str, Container[Any]]  # the values of each setting with which the keys are right
ANY = type("Any", (), {"__contains__": lambda self, value: True})()  # checked elsewhere, or never changes a key
OFF: tuple[Any, ...] = (None, False, {}, [])  # asks for nothing
SUPPORTED = "it is not understood (docs/database.md lists what is); use another model"
AGAIN = "download the whole model again"
# A module's class. Up to 5.3 the file gave it its name. Code that comes with a model has any other name.
LIBRARY = r"sentence_transformers\.(?:models|(?:base|sentence_transformer)\.modules)\."
MODULE = re.compile(LIBRARY + r"(?:\w+\.)?(Transformer|Pooling|Normalize)")
PLACE = re.compile(r"(\w[\w. -]{0,99})?")  # a module's folder
# The last: a folder of transformers alone, with nothing but the normalisation added.
ORDERS = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"], ["Normalize"])
# The modes of pooling with their names in older files, in the order in which older files join their keys.
MODES = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "mean_sqrt_len_tokens": "mean_sqrt_len_tokens"}
MODES |= {"weightedmean": "weightedmean_tokens", "lasttoken": "lasttoken"}
WIDTHS: Known = {"word_embedding_dimension": ANY, "embedding_dimension": ANY}
POOLING: Known = {"pooling_mode": ANY, "include_prompt": [True, False]} | WIDTHS  # pooling_mode is checked apart
POOLING |= {f"pooling_mode_{name}": [True, False] for name in MODES.values()}
NORMALIZE: Known = {"module_input_name": ["sentence_embedding"], "module_output_name": ["sentence_embedding", None]}
SENTENCE_BERT: Known = {"max_seq_length": ANY} | dict.fromkeys(("do_lower_case", "unpad_inputs"), (None, False, True))
SENTENCE_BERT |= {"transformer_task": ["feature-extraction"], "module_output_name": ["token_embeddings"]}
SENTENCE_BERT |= {"modality_config": [{"text": {"method": "forward", "method_output_name": "last_hidden_state"}}]}
SENTENCE_TRANSFORMERS: Known = dict.fromkeys(("__version__", "prompts", "default_prompt_name"), ANY)
SENTENCE_TRANSFORMERS |= {"model_type": ["SentenceTransformer"]}
SENTENCE_TRANSFORMERS |= {"similarity_fn_name": [None, "cosine", "dot", "euclidean", "manhattan"]}  # compares keys
MODEL_CONFIG: Known = dict.fromkeys(("is_decoder", "add_cross_attention", "is_encoder_decoder", "auto_map"), OFF)
MODEL_CONFIG |= dict.fromkeys(("quantization_config", "pruned_heads", "transformers_weights", "is_causal"), OFF)
# The classes of tokenizers that build these parts themselves. Other classes obey tokenizer.json.
CLASSES = dict.fromkeys(("BertTokenizer", "DistilBertTokenizer", "MPNetTokenizer"), "WordPiece")
CLASSES |= {"RobertaTokenizer": "BPE", "XLMRobertaTokenizer": "Unigram"}
DEFAULT_CLASS = {"bert": "BertTokenizer", "distilbert": "BertTokenizer", "mpnet": "MPNetTokenizer"}
DEFAULT_CLASS |= {"roberta": "RobertaTokenizer", "xlm-roberta": "XLMRobertaTokenizer"}
OBEDIENT = ("PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# The special tokens of these classes, unless a file names others.
BERT_TOKENS = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "unk", "pad", "mask")}
ROBERTA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
ROBERTA_TOKENS |= {f"{name}_token": f"<{name}>" for name in ("unk", "pad", "mask")}
TOKENS = dict.fromkeys(CLASSES, BERT_TOKENS) | {"MPNetTokenizer": ROBERTA_TOKENS | {"unk_token": "[UNK]"}}
TOKENS |= dict.fromkeys(("RobertaTokenizer", "XLMRobertaTokenizer"), ROBERTA_TOKENS)
TOKENIZER_CONFIG: Known = {
    "tokenizer_class": [None, *CLASSES, *(f"{name}Fast" for name in CLASSES), *OBEDIENT],
    "do_basic_tokenize": [None, True], "add_prefix_space": [None, False, True],
    "truncation_side": [None, "right"], "padding_side": [None, "right"], "auto_map": OFF, "chat_template": OFF,
    "never_split": OFF, "split_special_tokens": OFF, "add_bos_token": OFF, "add_eos_token": OFF,
    "model_input_names": [None, ["input_ids", "attention_mask"], ["input_ids", "token_type_ids", "attention_mask"]],
}  # fmt: skip
MODEL_CONFIG["tokenizer_class"] = TOKENIZER_CONFIG["tokenizer_class"]
PROBE = "a B Bé 文 ก ☃ 😀 ﬁ"  # words that many vocabularies lack


@dataclass(frozen=True)
class Recipe:
    """How keys are made of texts. The defaults are those of a folder of transformers alone.

    document, query: put before a text that is stored, and before one that is searched with. modes: of pooling; their
    keys are joined. include_prompt: whether a prompt's states are pooled too. changes: to what tokenizer.json says."""

    normalise: bool = False
    modes: tuple[str, ...] = ("mean",)
    document: str = ""
    query: str = ""
    include_prompt: bool = True
    changes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What is hashed. Settings with their default are left out, so that a new one changes no hash."""
        others = asdict(replace(self, normalise=False))
        stated = {key: value for key, value in others.items() if value != getattr(Recipe(), key)}
        return f"{self.normalise}{json.dumps(stated) if stated else ''}"


def read_settings(path: Path, known: Known | None = None, others: Container[Any] = OFF) -> dict[str, Any]:
    """A JSON file's settings, if it exists. known, others: what they are checked with, as in `check_settings`."""
    settings: dict[str, Any] = read_json(path, hint=AGAIN) if os.path.exists(path) else {}
    if known is not None:
        check_settings(path, settings, known, others)
    return settings


def check_settings(
    path: Path, settings: dict[str, Any], known: Known, others: Container[Any] = OFF, hint: str = SUPPORTED
) -> None:
    """Raise UserError for a value that is not in `known` or, for other keys, in `others`. hint: the error's end."""
    for key, value in settings.items():
        if value not in known.get(key, others):
            raise refusal(path, key, value, hint)


def sizes(path: Path, settings: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The settings that must be whole numbers of at least 1, by our names. Raises UserError for other values."""
    for name in names.values():
        if type(value := settings.get(name)) is not int or value < 1:
            raise refusal(path, name, value, f"it must be a whole number, at least 1: {AGAIN}")
    return {ours: settings[name] for ours, name in names.items()}


def refusal(path: Path, key: str, value: Any, hint: str = SUPPORTED) -> UserError:
    """The error for a setting that is not understood. At most 80 characters of the value are shown."""
    return UserError(f"{path}: {one_line(f'{key:.80}')} is {value!r:.80}; {hint}")


def check_modules(folder: Path, config: dict[str, Any]) -> Recipe:
    """How keys are made, by the files of sentence-transformers. config: the content of config.json.

    Raises a UserError that names the file and the setting if something is not understood."""
    check_settings(folder / "config.json", config, MODEL_CONFIG, others=ANY)
    if "ForCausalLM" in str(config.get("architectures")):
        raise refusal(folder / "config.json", "architectures", config["architectures"])
    patterns = "adapter_config.json", "chat_template.*", "sentence_*_config.json"
    foreign = {path for pattern in patterns for path in folder.glob(pattern)} - {folder / "sentence_bert_config.json"}
    for path in sorted(foreign):
        raise UserError(f"{path} is not a file of a BERT encoder: {SUPPORTED}")
    read_settings(folder / "sentence_bert_config.json", SENTENCE_BERT)
    recipe, path = _prompts(folder / "config_sentence_transformers.json"), folder / "modules.json"
    if not path.exists():  # a folder of transformers alone
        for found in folder.glob("[0-9]_*"):
            raise UserError(f"{path} is missing, but there is {found.name}: {AGAIN}")
        if recipe != Recipe():
            raise UserError(f"{path} is missing, but config_sentence_transformers.json has prompts: {AGAIN}")
        return recipe
    modules, kinds = read_json(path, list, AGAIN), []
    for i, module in enumerate(modules):
        module = module if isinstance(module, dict) else {"type": module}
        match = MODULE.fullmatch(str(module.get("type")))
        if not match or module.get("idx", i) != i:
            hint = "only Transformer, Pooling, Normalize, in this order, are known"
            raise refusal(path, f"module {i}", module.get("type"), hint)
        check_settings(path, module, dict.fromkeys(("idx", "name", "path", "type"), ANY))
        kinds.append(match[1])
        place = module.get("path", "" if i == 0 else f"{i}_{match[1]}")
        if not isinstance(place, str) or not PLACE.fullmatch(place):
            raise refusal(path, "path", place, f"it must name a folder in {folder}: {AGAIN}")
        if match[1] == "Transformer" and place:
            raise refusal(path, "path", place, f"move the files of that folder to {folder} and set it to ''")
        if match[1] == "Pooling":
            recipe = _pooling(folder / place / "config.json", config["hidden_size"], recipe)
        elif place:
            read_settings(folder / place / "config.json", NORMALIZE)
    if kinds not in ORDERS or len({str(module.get("name", i)) for i, module in enumerate(modules)}) != len(kinds):
        raise refusal(path, "the list of modules", kinds)
    return replace(recipe, normalise="Normalize" in kinds)


def _prompts(path: Path) -> Recipe:
    """The prompts of sentence-transformers 6, whose encode_document and encode_query use no others."""
    library = read_settings(path, SENTENCE_TRANSFORMERS)
    prompts, default = library.get("prompts") or {}, library.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str | None) for prompt in prompts.values()):
        raise refusal(path, "prompts", prompts, "it must give a text for each name")
    if default is not None and default not in ["document", "query", *prompts]:
        raise refusal(path, "default_prompt_name", default, f"it is not one of the prompts: {AGAIN}")
    recipe = Recipe(document=prompts.get("document") or "", query=prompts.get("query") or "")
    for name in dict.fromkeys(("passage", "corpus", default)):
        if prompts.get(name) and not recipe.document:
            say(f"{path}: the prompt {name!r} is not used; sentence-transformers only uses 'document' for documents")
    return recipe


def _pooling(path: Path, width: int, recipe: Recipe) -> Recipe:
    """A recipe with the settings of the pooling. width: of the last states."""
    if not path.is_file():
        raise UserError(f"{path} is missing, so the pooling is unknown: {AGAIN}")
    pooling = read_settings(path, POOLING)
    stated = pooling.get("pooling_mode", [])
    modes: list[Any] = stated if isinstance(stated, list) else [stated]
    older = [mode for mode, name in MODES.items() if pooling.get(f"pooling_mode_{name}")]
    if any(mode not in list(MODES) for mode in modes) or (modes and older and modes != older) or not modes + older:
        raise refusal(path, "pooling_mode", pooling.get("pooling_mode"), f"it must be of {', '.join(MODES)}")
    for key in pooling.keys() & WIDTHS:
        if pooling[key] != width:
            raise refusal(path, key, pooling[key], f"hidden_size in config.json is {width}: {AGAIN}")
    included = pooling.get("include_prompt", True) or not (recipe.document or recipe.query)
    return replace(recipe, modes=tuple(modes or older), include_prompt=included)


def check_tokenizer(folder: Path, tokenizer: Tokenizer, config: dict[str, Any], recipe: Recipe) -> tuple[str, ...]:
    """Raise UserError if a token has no embedding, or if a file asks for other tokens than tokenizer.json makes.

    tokenizer: from tokenizer.json; its truncation and padding are removed. config: the content of config.json.
    Returns what else was changed (see `_match_class`)."""
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
    settings = read_settings(folder / "tokenizer_config.json", TOKENIZER_CONFIG, others=ANY)
    given = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if given is None and (config["model_type"] != "bert" or "BertNormalizer" in str(_parts(tokenizer.normalizer))):
        given = DEFAULT_CLASS[config["model_type"]]
    class_name = str(given).removesuffix("Fast")
    changes = _match_class(folder, tokenizer, class_name, settings)
    empty, probe = tokenizer.encode("").ids, tokenizer.encode(PROBE)
    largest = max([*tokenizer.get_vocab(with_added_tokens=True).values(), *empty], default=0)
    if largest >= (rows := config["vocab_size"]):
        raise refusal(path, "a token's id", largest, f"but vocab_size in config.json is {rows}: {AGAIN}")
    inner, starts = tokenizer.encode(PROBE, add_special_tokens=False).ids, [start for start, _ in probe.offsets[1:-1]]
    is_framed = len(empty) == 2 and probe.ids == [empty[0], *inner, empty[1]] and not any(probe.type_ids)
    if not is_framed or not inner or starts != sorted(starts):  # The last: the text comes twice.
        raise refusal(path, "post_processor", probe.tokens, f"it must make [CLS] … [SEP], all of type 0: {AGAIN}")
    roles = {"cls_token": tokenizer.id_to_token(empty[0]), "sep_token": tokenizer.id_to_token(empty[1])}
    roles |= {"unk_token": unknown} if unknown is not None else {}
    if class_name == "XLMRobertaTokenizer":
        roles |= {"bos_token": roles["cls_token"], "eos_token": roles["sep_token"]}
    added = {str(i): token for i, token in tokenizer.get_added_tokens_decoder().items()}
    named = read_settings(folder / "special_tokens_map.json")
    defaults = {key: token for key, token in TOKENS.get(class_name, {}).items() if key not in named}
    special = _check_special_tokens(folder / "special_tokens_map.json", named, added, roles)
    special += _check_special_tokens(folder / "tokenizer_config.json", defaults | settings, added, roles)
    if not recipe.include_prompt and roles["sep_token"] not in special:  # It would count as a part of the prompt.
        path = folder / "tokenizer_config.json"
        raise refusal(path, "sep_token", None, f"it must be {roles['sep_token']!r}: {AGAIN}")
    read_settings(folder / "added_tokens.json", {token.content: [int(i)] for i, token in added.items()}, others=())
    return changes


def _match_class(folder: Path, tokenizer: Tokenizer, name: str, settings: dict[str, Any]) -> tuple[str, ...]:
    """Refuse a part of tokenizer.json if the tokenizer's class in transformers would make another one.

    Returns what was changed instead: XLM-R's class splits at white space, and do_lower_case adds a normalizer."""
    kind, model, changes = CLASSES.get(name), tokenizer.model, []
    parts, splitter = _parts(tokenizer.normalizer), _parts(tokenizer.pre_tokenizer)
    types, splits = ([part.get("type") for part in each] for each in (parts, splitter))
    bert = next((part for part in parts if part.get("type") == "BertNormalizer"), {})
    lowers, strips = bool(bert.get("lowercase")) or "Lowercase" in types, bert.get("strip_accents")
    does: dict[str, Any] = {
        "do_lower_case": lowers, "tokenize_chinese_chars": bool(bert.get("handle_chinese_chars")),
        "strip_accents": bool(bert.get("lowercase") if strips is None else strips) or "StripAccents" in types,
    }  # fmt: skip
    says = {key: settings[key] for key in does if settings.get(key) is not None and name not in OBEDIENT}
    does |= {"model": type(model).__name__, "pre_tokenizer": splits, "normalizer": types}
    if kind == "WordPiece":
        does |= {"clean_text": bert.get("clean_text"), "normalizer": [each for each in types if each != "Lowercase"]}
        says = {"do_lower_case": True, "tokenize_chinese_chars": True} | says
        says = {"strip_accents": says["do_lower_case"]} | says
        says |= {"clean_text": True, "normalizer": ["BertNormalizer"], "pre_tokenizer": ["BertPreTokenizer"]}
        says |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    elif kind == "BPE":
        does["pre_tokenizer"] = splitter
        bytes_of = BYTE_LEVEL | {"add_prefix_space": bool(settings.get("add_prefix_space"))}
        says = {"normalizer": [], "pre_tokenizer": [bytes_of]}
        says |= dict.fromkeys(("unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
        says |= dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"))
    elif kind == "Unigram":
        does |= {key: _state(model).get(key) for key in ("unk_id", "byte_fallback")}
        says = {"unk_id": 3, "byte_fallback": False, "normalizer": ["Precompiled", "Replace"][: len(types)]}
        says["pre_tokenizer"] = ["WhitespaceSplit", "Metaspace"][-max(1, len(splits)) :]
    says |= {"model": kind} if kind else {}
    for key, value in sorted(says.items()):
        other = does[key] if key in does else getattr(model, key, value) or None
        if other != value:
            path = folder / "tokenizer_config.json"
            fault = f"but in tokenizer.json it is {other!r:.80}, which sentence-transformers ignores"
            hint = "for the keys that tokenizer.json asks for, unlike those of the folder as it is"
            raise refusal(path, key, value, f"{fault}: set tokenizer_class to TokenizersBackend {hint}, or {AGAIN}")
    if kind == "Unigram":
        marks = pre_tokenizers.Metaspace(prepend_scheme="always" if settings.get("add_prefix_space", True) else "never")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), marks])
        if types == ["Precompiled", "Replace"]:
            tokenizer.normalizer = normalizers.Precompiled(base64.b64decode(parts[0]["precompiled_charsmap"]))
        if (parts, splitter) != (_parts(tokenizer.normalizer), _parts(tokenizer.pre_tokenizer)):
            changes.append(name)
    if read_settings(folder / "sentence_bert_config.json").get("do_lower_case") and not lowers:
        before = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *before])
        changes.append("do_lower_case")
    return tuple(changes)


def _check_special_tokens(path: Path, settings: dict[str, Any], added: Any, roles: dict[str, Any]) -> list[Any]:
    """The special tokens that are named. Raises UserError for one that tokenizer.json lacks or has otherwise."""
    names, decoder = [token.content for token in added.values()], settings.get("added_tokens_decoder") or {}
    stated = [(key, settings[key]) for key in ROBERTA_TOKENS if settings.get(key) is not None]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        stated += [(key, token) for _, token in _items(settings.get(key) or [])]
    texts = [token.get("content") if isinstance(token, dict) else token for _, token in stated]
    for (key, token), text in zip(stated, texts, strict=True):
        if text not in names or text != roles.get(key, text):
            raise refusal(path, key, token, f"tokenizer.json has it otherwise: {AGAIN}")
    for i, token in _items(decoder):
        if any(getattr(added.get(i), key, None) != value for key, value in _items(token) if key != "__type"):
            raise refusal(path, f"added_tokens_decoder {i}", token, f"tokenizer.json has it otherwise: {AGAIN}")
    if decoder and added.keys() - decoder.keys():
        raise refusal(path, "added_tokens_decoder", decoder, f"tokenizer.json has more tokens: {AGAIN}")
    return texts


def _state(part: Any) -> dict[str, Any]:
    """What tokenizer.json says of a part."""
    return json.loads(part.__getstate__()) if part is not None else {}


def _parts(part: Any) -> list[dict[str, Any]]:
    """The members of a sequence of normalizers or pre-tokenizers; of anything else, a list of itself."""
    state = _state(part)
    return state.get("normalizers", state.get("pretokenizers", [state] if state else []))


def _items(value: Any) -> list[tuple[str, Any]]:
    """The entries of a JSON object or list by key; anything else is one entry."""
    if not isinstance(value, dict):
        value = {str(i): part for i, part in enumerate(value if isinstance(value, list) else [value])}
    return list(value.items())
