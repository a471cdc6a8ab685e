"""Random small decoders of other people's architectures, and the same models as classes of transformers.

Names and layouts of transformers' weights are written down here once more, so that a mistake in the package's own table
cannot hide. PyTorch and transformers are imported in `Transformers`, so that tests without oracles do not need them."""

import importlib
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from strategies import some_layers

from retro_np.config import EncoderConfig
from retro_np.nn.checks import perturbed_params
from retro_np.nn.decoders import MATRICES, DecoderConfig
from retro_np.tree import map_tree, named_leaves

FEW = settings(max_examples=25, deadline=None)  # A model of transformers takes some milliseconds to build.
FAMILIES = ("Llama", "Qwen2", "GPT-2")
GPT2_BIASES = tuple(name for name in MATRICES if name != "w_gate")
SMOLLM2 = DecoderConfig(
    vocabulary_size=49_152, d_model=576, d_ffw=1536, n_heads=9, d_head=64, n_layers=30, n_kv_heads=3,
    rotary_base=100_000.0, max_positions=8192, tie_readout=True,
)  # fmt: skip


@dataclass
class DecoderCase:
    """A decoder with float64 parameters, and a batch for it."""

    config: DecoderConfig
    params: dict
    tokens: np.ndarray  # (B, n)
    targets: np.ndarray  # (B, n), −1 where there is nothing to predict; at least one is a token
    rng: np.random.Generator  # further random numbers for a test
    neighbours: np.ndarray | None = None  # (B, floor(n / m), k, r); None: retrieval off

    @property
    def arguments(self):
        """The arguments of `retro` and of its oracles."""
        return self.params, self.config, self.tokens, self.neighbours

    @property
    def loss_arguments(self):
        """The arguments of `retro_loss`."""
        return self.params, self.config, self.tokens, self.targets, self.neighbours


@st.composite
def decoder_configs(draw, families=FAMILIES, any_biases: bool = False) -> DecoderConfig:
    """Configurations that transformers has too, or with any_biases also others: biases beside any of the matrices."""
    family = draw(st.sampled_from(families))
    is_gpt2 = family == "GPT-2"
    heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    width = draw(st.sampled_from([1, 2, 3] if heads % 2 == 0 else [2, 4])) * heads  # transformers wants h to divide d
    some = st.sets(st.sampled_from(GPT2_BIASES if is_gpt2 else MATRICES)).map(lambda names: tuple(sorted(names)))
    own = {"Qwen2": ("w_q", "w_k", "w_v"), "GPT-2": GPT2_BIASES}
    bias_of_attention, bias_of_ffw = draw(st.booleans()), draw(st.booleans())
    llama = (MATRICES[:4] if bias_of_attention else ()) + (MATRICES[4:] if bias_of_ffw else ())
    divisors = [number for number in range(1, heads + 1) if heads % number == 0]
    return DecoderConfig(
        vocabulary_size=draw(st.integers(2, 11)),
        d_model=width,
        d_ffw=draw(st.integers(1, 9)),
        n_heads=heads,
        d_head=width // heads if is_gpt2 else draw(st.sampled_from([2, 4, 6])),
        n_layers=draw(st.integers(1, 3)),
        tie_readout=is_gpt2 or draw(st.booleans()),
        architecture="gpt2" if is_gpt2 else "llama",
        n_kv_heads=heads if is_gpt2 else draw(st.sampled_from(divisors)),
        norm_eps=draw(st.sampled_from([1e-6, 1e-5, 0.1])),
        rotary_base=draw(st.sampled_from([2, 10_000.0, 1e6])),
        max_positions=draw(st.integers(12, 20)),
        biases=draw(some) if any_biases else own.get(family, llama),
    )


@st.composite
def decoder_cases(draw, families=FAMILIES, any_biases: bool = False, at_least: int = 1) -> DecoderCase:
    """A model and a batch whose rows have at least `at_least` tokens."""
    config = draw(decoder_configs(families, any_biases))
    batch, n, seed = draw(st.integers(1, 3)), draw(st.integers(at_least, 12)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocabulary_size, (batch, n))
    targets = rng.integers(-1, config.vocabulary_size, (batch, n))
    targets[0, rng.integers(n)] = 0
    return DecoderCase(config, perturbed_params(config, seed), tokens, targets, rng)


@st.composite
def memory_configs(draw, form: str = "own", adapted: bool = False) -> DecoderConfig:
    """Decoders that read neighbours: with a memory of their own form, or in the paper's ("paper", with an encoder).

    adapted: whether some layers' own attention has changes of low rank."""
    base = draw(decoder_configs(any_biases=True))
    shared = form == "paper" and draw(st.booleans())
    sizes = st.integers(1, 2)
    encoder = EncoderConfig(
        d_model=base.d_model if shared else draw(st.sampled_from([2, 4])), d_ffw=draw(st.integers(1, 5)),
        n_heads=draw(sizes), d_head=draw(sizes), n_layers=draw(sizes), ca_layers=draw(st.sampled_from([(), (1,)])),
    )  # fmt: skip
    return replace(
        base,
        max_positions=draw(st.integers(14, 20)),
        chunk_size=draw(st.integers(1, 4)),
        cca_layers=draw(some_layers(base.n_layers, at_least_one=True)),
        encoder=encoder if form == "paper" else None,
        share_embeddings=shared,
        retrieved_part=draw(st.sampled_from(["NF", "NF", "N", "F"])),
        adapted_layers=draw(some_layers(base.n_layers, at_least_one=True)) if adapted else (),
        rank=draw(st.sampled_from([1, 2] if adapted else [1, 2, None])),
        changed=tuple(draw(st.sets(st.sampled_from(MATRICES[:4]), min_size=int(adapted)))),
        begin_id=draw(st.one_of(st.none(), st.integers(0, base.vocabulary_size - 1))),
        padding_id=draw(st.one_of(st.none(), st.integers(0, base.vocabulary_size - 1))),
    )


@st.composite
def memory_cases(draw, form: str = "own", adapted: bool = False, retrieving: bool = False) -> DecoderCase:
    """A model that reads neighbours, and a batch with padding inside neighbours, missing and repeated ones.

    retrieving: each row has at least one whole chunk, and no neighbour has padding."""
    config = draw(memory_configs(form, adapted))
    m, vocabulary, pad = config.chunk_size, config.vocabulary_size, config.padding_id
    n = draw(st.integers(m if retrieving else 1, 3 * m + 2))
    batch, k, seed = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (batch, n))
    targets = rng.integers(-1, vocabulary, (batch, n))
    targets[0, rng.integers(n)] = rng.choice(real_ids(config))
    neighbours = rng.choice(real_ids(config), (batch, n // m, k, 2 * m))
    if not retrieving:
        repeated = rng.random(neighbours.shape[:3]) < 0.3
        neighbours[repeated] = rng.choice(real_ids(config), 2 * m)
        ends = rng.choice([0, 1, m, 2 * m, 2 * m], neighbours.shape[:3])  # 0: a value of padding only
        neighbours[np.arange(2 * m) >= ends[..., None]] = -1 if pad is None else pad
        neighbours[rng.random(neighbours.shape[:2]) < 0.2] = -1 if pad is None else pad  # chunks without neighbours
    return DecoderCase(config, perturbed_params(config, seed), tokens, targets, rng, neighbours)


def real_ids(config: DecoderConfig) -> np.ndarray:
    """The ids of a vocabulary without padding."""
    return np.delete(np.arange(config.vocabulary_size), [] if config.padding_id is None else config.padding_id)


def small_case(family: str, n: int = 9, **change) -> DecoderCase:
    """One model of a family, and a batch of two rows."""
    config = DecoderConfig(13, 12, 10, 6, 4, 2, n_kv_heads=2, max_positions=24, tie_readout=True)
    if family == "Qwen2":
        config = replace(config, biases=("w_q", "w_k", "w_v"), tie_readout=False)
    if family == "GPT-2":
        config = replace(config, architecture="gpt2", n_kv_heads=6, d_head=2, biases=GPT2_BIASES)
    config, rng = replace(config, **change), np.random.default_rng(len(family))
    tokens, targets = (rng.integers(least, config.vocabulary_size, (2, n)) for least in (0, -1))
    return DecoderCase(config, perturbed_params(config), tokens, targets, rng)


class Transformers:
    """transformers' classes, whose norms, rotary angles and softmax compute in float64 instead of float32.

    The modules say `torch.float32` where they compute these. Within `with Transformers() as port:`, their `torch` says
    float64 by that name and is PyTorch in all else."""

    MODULES = ("llama.modeling_llama", "qwen2.modeling_qwen2", "gpt2.modeling_gpt2")

    def __init__(self):
        import torch
        import transformers

        class InDouble:
            float32 = float = torch.float64

            def __getattr__(self, name):
                return getattr(torch, name)

        self.torch, self.transformers, self.in_double = torch, transformers, InDouble()
        self.modules = [importlib.import_module(f"transformers.models.{name}") for name in self.MODULES]

    def __enter__(self):
        for module in self.modules:
            module.torch = self.in_double
        return self

    def __exit__(self, *error):
        for module in self.modules:
            module.torch = self.torch

    def model(self, config: DecoderConfig, params: dict):
        """The model of transformers with these parameters, in float64."""
        model, used = self.empty(config).double().eval(), set()
        tensors = dict(model.named_parameters())
        with self.torch.no_grad():
            for name, array in named_leaves(params):
                theirs, view = placed(name, config)
                view(tensors[theirs])[...] = self.torch.tensor(np.asarray(array, np.float64))
                used.add(theirs)
        assert used == tensors.keys()  # Every parameter of theirs has a value from ours.
        return model

    def empty(self, config: DecoderConfig):
        """The model of transformers for a configuration, with parameters of its own."""
        shared = {"tie_word_embeddings": config.tie_readout, "attn_implementation": "eager"}
        shared |= {"vocab_size": config.vocabulary_size, "bos_token_id": None, "eos_token_id": None}
        if config.architecture == "gpt2":
            sizes = {"n_embd": config.d_model, "n_inner": config.d_ffw, "n_head": config.n_heads}
            sizes |= {"n_layer": config.n_layers, "n_positions": config.max_positions}
            made = self.transformers.GPT2Config(**shared, **sizes, layer_norm_epsilon=config.norm_eps)
            return self.transformers.GPT2LMHeadModel(made)
        sizes = {
            "hidden_size": config.d_model, "intermediate_size": config.d_ffw, "head_dim": config.d_head,
            "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
            "num_key_value_heads": config.kv_heads, "rms_norm_eps": config.norm_eps,
            "max_position_embeddings": config.max_positions,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
        }  # fmt: skip
        if config.biases == ("w_q", "w_k", "w_v"):
            return self.transformers.Qwen2ForCausalLM(self.transformers.Qwen2Config(**shared, **sizes))
        biases = {"attention_bias": "w_o" in config.biases, "mlp_bias": "w_in" in config.biases}
        return self.transformers.LlamaForCausalLM(self.transformers.LlamaConfig(**shared, **sizes, **biases))

    def logits(self, model, tokens):
        """(B, n, V) as a NumPy array."""
        with self.torch.no_grad():
            return model(self.torch.tensor(tokens), use_cache=False).logits.numpy()

    def attentions(self, model, tokens):
        """The weights of each layer's attention, (B, h, n, n)."""
        with self.torch.no_grad():
            return [w.numpy() for w in model(self.torch.tensor(tokens), output_attentions=True).attentions]

    def loss(self, model, config, params, tokens, targets):
        """(mean nats over targets that are not −1, a tree of gradients like params) by PyTorch's autograd."""
        logits = model(self.torch.tensor(tokens), use_cache=False).logits.flatten(0, 1)
        wanted = self.torch.tensor(targets).flatten()
        loss = self.torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-1)
        model.zero_grad()
        loss.backward()
        tensors = dict(model.named_parameters())

        def gradient(name, _):
            theirs, view = placed(name, config)
            return view(tensors[theirs].grad).numpy()

        return loss.item(), map_tree(gradient, params)


def placed(name: str, config: DecoderConfig):
    """Where a parameter of ours is in transformers: the tensor's name, and a view of it with our shape."""
    return _placed_in_gpt2(name, config.d_model) if config.architecture == "gpt2" else _placed_in_llama(name)


def _placed_in_llama(name: str):
    outside = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "readout": "lm_head.weight"}
    if name in outside:
        return outside[name], (lambda tensor: tensor.T) if name == "readout" else lambda tensor: tensor
    _, number, block, leaf = name.split(".")
    where = f"model.layers.{number}"
    if leaf == "norm":
        norms = {"attention": "input_layernorm", "ffw": "post_attention_layernorm"}
        return f"{where}.{norms[block]}.weight", lambda tensor: tensor
    parts = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
    parts |= {"gate": "mlp.gate_proj", "in": "mlp.up_proj", "out": "mlp.down_proj"}
    kind, part = leaf.split("_")
    if kind == "b":
        return f"{where}.{parts[part]}.bias", lambda tensor: tensor
    return f"{where}.{parts[part]}.weight", lambda tensor: tensor.T  # torch.nn.Linear holds (d_out, d_in).


def _placed_in_gpt2(name: str, d: int):
    outside = {"embedding": "wte.weight", "positions": "wpe.weight", "norm": "ln_f.weight", "norm_bias": "ln_f.bias"}
    if name in outside:
        return f"transformer.{outside[name]}", lambda tensor: tensor
    _, number, block, leaf = name.split(".")
    where = f"transformer.h.{number}"
    if leaf in ("norm", "norm_bias"):
        return f"{where}.ln_{1 if block == 'attention' else 2}.{'weight' if leaf == 'norm' else 'bias'}", lambda x: x
    kind, part = leaf.split("_")
    ending = "weight" if kind == "w" else "bias"  # Conv1D holds (d_in, d_out).
    if part in ("q", "k", "v"):
        first = "qkv".index(part) * d
        return f"{where}.attn.c_attn.{ending}", lambda tensor: tensor[..., first : first + d]
    rest = {"o": "attn.c_proj", "in": "mlp.c_fc", "out": "mlp.c_proj"}
    return f"{where}.{rest[part]}.{ending}", lambda tensor: tensor
