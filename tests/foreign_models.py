"""Tiny models in the formats of others: folders as transformers writes them, and .gguf files as llama.cpp does.

The files are made from arrays, without transformers. The .gguf files are written by the library gguf."""

import json
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END = "<|endoftext|>"
PAD = "<|pad|>"
VOCABULARY = 262  # 256 bytes, 3 merges, 2 special tokens, and an embedding that no token has
WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS, POSITIONS = 32, 64, 2, 4, 2, 40
SETTINGS = {
    "llama": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH,
        "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "max_position_embeddings": POSITIONS, "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0, "hidden_act": "silu", "tie_word_embeddings": True, "bos_token_id": 259,
        "eos_token_id": 259, "torch_dtype": "float32", "rope_scaling": None,
    },
}  # fmt: skip
SETTINGS["qwen2"] = SETTINGS["llama"] | {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 16,
    "max_window_layers": 1, "tie_word_embeddings": False,
}  # fmt: skip
SETTINGS["gpt2"] = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": WIDTH,
    "n_inner": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS, "n_ctx": POSITIONS,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "eos_token_id": 259, "resid_pdrop": 0.1,
}  # fmt: skip
TOKENIZER_CONFIG = {"eos_token": END, "bos_token": {"content": END}, "pad_token": PAD, "chat_template": "{{ x }}"}


def tokenizer() -> Tokenizer:
    """Byte-level BPE of GPT-2's kind, with 261 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("t", "h"), ("th", "e")]
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (END, PAD)])
    return made


def tensors(kind: str, seed: int = 0, tied: bool | None = None) -> dict[str, np.ndarray]:
    """Random float32 weights under the names of transformers."""
    rng = np.random.default_rng(seed)
    kv = WIDTH // HEADS * KV_HEADS

    def array(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    if kind == "gpt2":
        made = {"transformer.wte.weight": array(VOCABULARY, WIDTH), "transformer.wpe.weight": array(POSITIONS, WIDTH)}
        for i in range(LAYERS):
            shapes = {"attn.c_attn": (WIDTH, 3 * WIDTH), "attn.c_proj": (WIDTH, WIDTH), "mlp.c_fc": (WIDTH, HIDDEN)}
            shapes |= {"mlp.c_proj": (HIDDEN, WIDTH), "ln_1": (WIDTH,), "ln_2": (WIDTH,)}
            for name, shape in shapes.items():
                made[f"transformer.h.{i}.{name}.weight"] = array(*shape)
                made[f"transformer.h.{i}.{name}.bias"] = array(shape[-1])
        made |= {f"transformer.ln_f.{name}": array(WIDTH) for name in ("weight", "bias")}
        return made
    made = {"model.embed_tokens.weight": array(VOCABULARY, WIDTH), "model.norm.weight": array(WIDTH)}
    shapes = {"self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (kv, WIDTH), "self_attn.v_proj": (kv, WIDTH)}
    shapes |= {"self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH)}
    shapes |= {"mlp.down_proj": (WIDTH, HIDDEN), "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)}
    for i in range(LAYERS):
        made |= {f"model.layers.{i}.{name}.weight": array(*shape) for name, shape in shapes.items()}
        if kind == "qwen2":
            made |= {
                f"model.layers.{i}.self_attn.{x}_proj.bias": array(n)
                for x, n in zip("qkv", (WIDTH, kv, kv), strict=True)
            }
    if not (SETTINGS[kind]["tie_word_embeddings"] if tied is None else tied):
        made["lm_head.weight"] = array(VOCABULARY, WIDTH)
    return made


def write_folder(folder: Path, kind: str, weights=None, **settings) -> Path:
    """A model's folder. settings: what config.json has otherwise; the value ... leaves a setting out."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in (SETTINGS[kind] | settings).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    tokenizer().save(str(folder / "tokenizer.json"))
    save_file(tensors(kind) if weights is None else weights, folder / "model.safetensors")
    return folder


# transformers' names and GGUF's, as in llama.cpp's gguf-py/gguf/tensor_mapping.py
GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "transformer.h": "blk", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_1": "attn_norm",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows in GGUF's order: `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def gguf_tensors(kind: str, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights with transformers' names as llama.cpp's converter stores them."""
    converted = {}
    for name, array in weights.items():
        if kind == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            array = array.T
        if kind == "llama" and ".q_proj." in name:
            array = permuted(array, HEADS)
        if kind == "llama" and ".k_proj." in name:
            array = permuted(array, KV_HEADS)
        converted[gguf_name(name)] = np.ascontiguousarray(array)
    return converted


def write_gguf(path: Path, kind: str, weights=None, quantised="F32", add=lambda writer: None, leave_out=()) -> Path:
    """A model's .gguf file. quantised: the type of matrices. add: writes further metadata. leave_out: metadata keys."""
    writer = gguf.GGUFWriter(path, kind)
    made = tokenizer()
    vocabulary = sorted(made.get_vocab(), key=made.get_vocab().get)
    sizes = {
        "block_count": LAYERS, "context_length": POSITIONS, "embedding_length": WIDTH, "feed_forward_length": HIDDEN,
        "head_count": HEADS,
    }  # fmt: skip
    if kind != "gpt2":
        sizes |= {"head_count_kv": KV_HEADS, "rope_freq_base": 5000.0, "vocab_size": VOCABULARY}
        sizes |= {"rope_dimension_count": WIDTH // HEADS}
    for name, value in sizes.items():
        if name not in leave_out:
            getattr(writer, f"add_{name}")(value)
    (writer.add_layer_norm_eps if kind == "gpt2" else writer.add_layer_norm_rms_eps)(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in (END, PAD) else 1 for token in vocabulary])
    writer.add_token_merges(["Ġ a", "t h", "th e"])
    writer.add_eos_token_id(259)
    writer.add_pad_token_id(260)
    writer.add_chat_template("{{ x }}")
    add(writer)
    for name, array in gguf_tensors(kind, tensors(kind) if weights is None else weights).items():
        if array.ndim == 2 and quantised != "F32":
            qtype = GGMLQuantizationType[quantised]
            writer.add_tensor(name, quantize(array, qtype), raw_dtype=qtype)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rounded(array: np.ndarray, quantised: str) -> np.ndarray:
    """What the library makes of a matrix that it quantised."""
    qtype = GGMLQuantizationType[quantised]
    return dequantize(quantize(np.ascontiguousarray(array), qtype), qtype).reshape(array.shape)


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor of transformers."""
    stem, _, ending = name.rpartition(".")
    for theirs, ours in GGUF_NAMES.items():
        if stem.endswith(theirs) or stem.startswith(theirs + "."):
            stem = stem.replace(theirs, ours)
    return f"{stem}.{ending}"


def unpermuted(kind: str, name: str, array: np.ndarray) -> np.ndarray:
    """A tensor of GGUF as transformers stores it. name: transformers'."""
    if kind == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return np.ascontiguousarray(array.T)
    heads = {".q_proj.": HEADS, ".k_proj.": KV_HEADS}
    for part, number in heads.items():
        if kind == "llama" and part in name:  # as transformers does it in modeling_gguf_pytorch_utils.py
            pairs = array.reshape(number, array.shape[0] // number // 2, 2, *array.shape[1:])
            return np.ascontiguousarray(pairs.swapaxes(2, 1).reshape(array.shape))
    return array
