"""Random tiny BERT folders, as the versions of sentence-transformers write them, and mutations of their JSON files.

`write_folder` makes a folder from its files by name. `mutated` changes one value, key or type of one file. `saved` lets
sentence-transformers itself save a folder, of any architecture that is understood.
"""

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

D, LETTERS = 16, "abcdefghijklmnopqrstuvwxyzABCé文.!"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
TEXTS = ["abc Abé 文文 x.", "", "hello [MASK] world! " * 9]
STATED = {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "unk_token": "[UNK]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
}
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 17, 2**31, 2**63, 10**19, 0.5, 1e30, "", "a", "mean", "cls", "left", "[MASK]",
    "é文", "\ud800", "\x1b[2J", [], [1], ["mean"], ["cls", "mean"], {}, {"a": 1}, {"query": "q: "},
    {"content": "[SEP]"}, "sentence_transformers.models.Dense", {"type": "Lowercase"},
    {"type": "FixedLength", "length": 0},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "NFKC"}, {"type": "WhitespaceSplit"},
    "max", "weightedmean", ["lasttoken"], ["cls", "max"], "query", "document", {"document": "abc "}, 20.0, 24,
    {"query": "x ", "passage": "b"}, "RobertaTokenizer", "TokenizersBackend", "BertTokenizer", "MPNetTokenizer",
    "XLMRobertaTokenizer", "roberta", "mpnet", "bert", "</s>", "<mask>",
]  # fmt: skip
NAMES = ["pooling_mode", "truncate_dim", "default_prompt_name", "kwargs", "quantization_config", "dropout", "\ud800"]
NAMES += ["do_lower_case", "max_seq_length", "include_prompt", "pooling_mode_cls_token", "add_prefix_space", "prompts"]
NAMES += ["tokenizer_class", "model_max_length", "document", "pad_token_id"]
ARCHITECTURES = ("bert", "distilbert", "mpnet", "roberta", "xlm-roberta")
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def tensors(rng: np.random.Generator, layers: int = 1, inner: int = 24, positions: int = 32) -> dict[str, np.ndarray]:
    """An encoder's weights under the names of transformers, (d_out, d_in), float32."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(VOCABULARY), D),
        "embeddings.position_embeddings.weight": (positions, D), "embeddings.token_type_embeddings.weight": (2, D),
        "embeddings.LayerNorm.weight": (D,), "embeddings.LayerNorm.bias": (D,),
    }  # fmt: skip
    for i in range(layers):
        for part, out, into in [
            ("attention.self.query", D, D), ("attention.self.key", D, D), ("attention.self.value", D, D),
            ("attention.output.dense", D, D), ("intermediate.dense", inner, D), ("output.dense", D, inner),
        ]:  # fmt: skip
            shapes |= {f"encoder.layer.{i}.{part}.weight": (out, into), f"encoder.layer.{i}.{part}.bias": (out,)}
        for part in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"encoder.layer.{i}.{part}.weight": (D,), f"encoder.layer.{i}.{part}.bias": (D,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def plain(seed: int = 0, lowercase: bool = True, layers: int = 1) -> dict[str, Any]:
    """The files of a folder of transformers alone: JSON values and bytes by name."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    frame: list[dict[str, Any]] = [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
    ]  # fmt: skip
    return {
        "config.json": {
            "architectures": ["BertModel"], "model_type": "bert", "vocab_size": len(VOCABULARY), "hidden_size": D,
            "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 24, "hidden_act": "gelu",
            "max_position_embeddings": 32, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0,
            "position_embedding_type": "absolute", "hidden_dropout_prob": 0.1, "is_decoder": False,
            "torch_dtype": "float32", "transformers_version": "4.40.0", "use_cache": True,
        },
        "tokenizer_config.json": STATED | {
            "do_lower_case": lowercase, "tokenize_chinese_chars": True, "strip_accents": None,
            "tokenizer_class": "BertTokenizer", "model_max_length": 512, "clean_up_tokenization_spaces": True,
            "added_tokens_decoder": {str(i): {"content": token} | flags for i, token in enumerate(SPECIAL)},
        },
        "special_tokens_map.json": dict(STATED),
        "tokenizer.json": {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": token} | flags for i, token in enumerate(SPECIAL)],
            "normalizer": {
                "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
                "lowercase": lowercase,
            },
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": {
                "type": "TemplateProcessing", "single": frame,
                "pair": [*frame, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {
                    token: {"id": token, "ids": [VOCABULARY.index(token)], "tokens": [token]}
                    for token in ("[CLS]", "[SEP]")
                },
            },
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
            "model": {
                "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100, "vocab": {token: i for i, token in enumerate(VOCABULARY)},
            },
        },
        "model.safetensors": save(tensors(np.random.default_rng(seed), layers)),
    }  # fmt: skip


def old(seed: int = 0, normalise: bool = True, **options: Any) -> dict[str, Any]:
    """The files as sentence-transformers 0.3 to 5.3 writes them."""
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    return plain(seed, **options) | {
        "modules.json": _modules("models.{0}", normalise),
        "1_Pooling/config.json": {
            "word_embedding_dimension": D, **{f"pooling_mode_{mode}": mode == "mean_tokens" for mode in modes},
            "include_prompt": True,
        },
        "sentence_bert_config.json": {"max_seq_length": 24, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "__version__": {"sentence_transformers": "5.1.2"}, "prompts": {}, "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }  # fmt: skip


def current(seed: int = 0, normalise: bool = True, **options: Any) -> dict[str, Any]:
    """The files as sentence-transformers 6.2 writes them."""
    files = plain(seed, **options)
    files["tokenizer_config.json"]["model_max_length"] = 24
    places = {"Pooling": "sentence_transformer"}
    modules = _modules("{1}.modules.{2}.{0}", normalise, places)
    return files | {
        "modules.json": modules,
        "1_Pooling/config.json": {"embedding_dimension": D, "pooling_mode": "mean", "include_prompt": True},
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction", "module_output_name": "token_embeddings",
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        },
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer", "__version__": {"sentence_transformers": "6.2.0"},
            "prompts": {"query": "", "document": ""}, "default_prompt_name": None, "similarity_fn_name": "cosine",
        },
    } | ({"2_Normalize/config.json": {
        "module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding",
    }} if normalise else {})  # fmt: skip


def _modules(form: str, normalise: bool, places: dict[str, str] | None = None) -> list[dict[str, Any]]:
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalise else [])]
    return [
        {
            "idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "",
            "type": "sentence_transformers." + form.format(kind, (places or {}).get(kind, "base"), kind.lower()),
        }
        for i, kind in enumerate(kinds)
    ]  # fmt: skip


def tokenizer_of(architecture: str, lowercase: bool) -> Any:
    """A tokenizer of the architecture's own class in transformers."""
    import transformers
    from tokenizers import pre_tokenizers

    framed, pieces = ["<s>", "<pad>", "</s>", "<unk>"], [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
    if architecture == "roberta":
        merges = [("a", "b"), ("ab", "c"), ("Ġ", "x"), ("h", "e"), ("l", "l")]
        words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
        vocabulary = {word: i for i, word in enumerate([*framed, *words, "<mask>"])}
        return transformers.RobertaTokenizer(vocab=vocabulary, merges=merges)
    if architecture == "xlm-roberta":
        scores = dict.fromkeys(framed, 0.0) | {"▁": -2.0, "▁a": -1.5, "abc": -2.5} | dict.fromkeys(LETTERS, -3.0)
        return transformers.XLMRobertaTokenizer(vocab=list((scores | {"<mask>": 0.0}).items()))
    words = [*framed, "[UNK]", *pieces, "<mask>"] if architecture == "mpnet" else [*SPECIAL, *pieces]
    kind = transformers.MPNetTokenizer if architecture == "mpnet" else transformers.BertTokenizer
    return kind(vocab={word: i for i, word in enumerate(words)}, do_lower_case=lowercase)


def encoder(folder: Path, architecture: str, lowercase: bool = True) -> Path:
    """A random encoder, as transformers saves it. Its maximum length is 40 word pieces."""
    import torch
    import transformers

    tokenizer = tokenizer_of(architecture, lowercase)
    tokenizer.model_max_length = 40
    sizes = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    if architecture == "distilbert":
        sizes = {"dim": D, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    config = transformers.AutoConfig.for_model(
        architecture, vocab_size=len(tokenizer), max_position_embeddings=60, initializer_range=0.5, **sizes
    )
    torch.manual_seed(5)
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # The biases are zero otherwise.
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def saved(
    folder: Path, base: Path, modes: Any = "mean", normalise: bool = False, include_prompt: bool = True,
    prompts: dict[str, str] | None = None, default: str | None = None, length: int | None = None,
) -> Any:  # fmt: skip
    """Let sentence-transformers save a model with the encoder in `base`. Returns what it reads again."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    modules = [Transformer(str(base), max_seq_length=length), Pooling(D, modes, include_prompt=include_prompt)]
    modules += [Normalize()] if normalise else []
    model = SentenceTransformer(modules=modules, prompts=prompts, default_prompt_name=default, device="cpu")
    model.save(str(folder), create_model_card=False)
    return SentenceTransformer(str(folder), device="cpu")


def files_of(folder: Path) -> dict[str, Any]:
    """The files of a folder by name, JSON files as their values."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: json.loads(path.read_text()) if name.endswith(".json") else path.read_bytes()
        for name, path in paths.items()
    }


def write_folder(folder: Path, files: dict[str, Any]) -> Path:
    """Write each file: bytes as they are, anything else as JSON."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def mutated(rng: random.Random, files: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The files after one mutation of a JSON file, and that file's name."""
    files = dict(files)
    name = rng.choice([name for name in files if name.endswith(".json")])
    if rng.random() < 0.05:
        del files[name]
        return files, name
    if rng.random() < 0.05:
        text = json.dumps(files[name]).encode()
        forms = [text[: rng.randrange(len(text))], b"[" * 100_000, b"NaN", text + b"{}", text.decode().encode("utf-16")]
        files[name] = rng.choice(forms)
        return files, name
    content = files[name] = copy.deepcopy(files[name])
    paths = [path for path in _paths(content) if path[:2] != ("model", "vocab") or rng.random() < 0.05]
    path = rng.choice(paths)
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    key, chance = path[-1], rng.random()
    if chance < 0.15:
        del parent[key]
    elif chance < 0.3 and isinstance(parent, dict):
        name_after = rng.choice([*NAMES, *parent])
        parent[name_after] = parent.pop(key)
    elif chance < 0.45:
        if isinstance(parent, dict):
            parent[rng.choice(NAMES)] = rng.choice(VALUES)
        else:
            parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
    elif chance < 0.5 and isinstance(parent, list):
        rng.shuffle(parent)
    else:
        parent[key] = copy.deepcopy(rng.choice(VALUES))
    return files, name


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [inner for key in keys for inner in [(*path, key), *_paths(value[key], (*path, key))]]
