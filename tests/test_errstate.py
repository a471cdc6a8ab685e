"""np.errstate(all="raise"), set by the user: underflow that is meant passes, and other errors are raised.

Ground truth: the same calls without it, bit for bit.
"""

import tempfile
from dataclasses import replace

import numpy as np
import pytest
from support import TRAINING, small_config

from retro_np import (
    adamw_init,
    adamw_update,
    attention_maps,
    evaluate,
    generate,
    init_params,
    kernels,
    load_bert,
    load_params,
    reference,
    retro,
    score,
    train,
)  # fmt: skip
from retro_np.evaluation.knn_lm import continuous_cache, datastore, frozen_model, knn_lm
from retro_np.generation import sample_token
from retro_np.kernels import bert, rowwise, search, threads
from retro_np.nn.checks import CONFIG, checks, perturbed_params
from retro_np.nn.model import retro_loss
from retro_np.optim import clip_by_global_norm
from retro_np.retrieval.bert import _arranged
from retro_np.training.loop import read_log
from retro_np.tree import flatten, map_tree, unflatten

RNG = np.random.default_rng(0)
TOKENS, TARGETS = RNG.integers(1, CONFIG.vocabulary_size, (2, 2, 11))
NEIGHBOURS = RNG.integers(0, CONFIG.vocabulary_size, (2, 3, 2, 6))
# The factors of the parameters and of the cotangent. Logits of thousands make all probabilities but one underflow;
# tiny cotangents make products and squares denormal or 0.
REGIMES = [(1, 1), (30, 1), (1, 1e-38), (1, 1e-300), (100, 1e-30), (1e-4, 1e-20)]
KINDS = ["numpy", "numba", "c"]
OPERATORS = {check.name: check for check in checks() if not check.long}


def assert_same_bits_under_errstate(call):
    """The call must give the same bits if every floating-point error that is not meant raises."""
    expected = call()
    with np.errstate(all="raise"):
        actual = call()
    for (name, right), (_, leaf) in zip(flatten(expected), flatten(actual), strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(right).tobytes(), name


def scaled(tree, scale, dtype):
    return map_tree(lambda _, array: (array * scale).astype(dtype), tree)


@pytest.fixture(params=KINDS)
def kind(request):
    if request.param == "c" and kernels.c_extension() is None:
        pytest.skip("the extension was not built")
    kernels.use(request.param)


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("scale", "cotangent"), REGIMES)
def test_a_training_step_has_the_same_bits(scale, cotangent, dtype):
    params = scaled(perturbed_params(CONFIG), scale, dtype)

    def step():
        loss, vjp = retro_loss(params, CONFIG, TOKENS, TARGETS, NEIGHBOURS, dropout_key=(1, 2))
        grads, trained = vjp(cotangent), map_tree(lambda _, array: array.copy(), params)
        state = adamw_init(trained)
        norm = clip_by_global_norm(grads, 1.0)
        for _ in range(2):
            adamw_update(trained, grads, state, lr=1e-3)
        return loss, norm, grads, trained, state

    assert_same_bits_under_errstate(step)


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_and_its_pullback_have_the_same_bits(name):
    for dtype in (np.float32, np.float64):
        for scale, cotangent in REGIMES[1:4]:
            arguments = [scaled(argument, scale, dtype) for argument in OPERATORS[name].arrays]

            number = np.array(cotangent, dtype)

            def call(arguments=arguments, number=number):
                value, vjp = OPERATORS[name].f(*arguments)
                return value, vjp(unflatten(value, (np.full(np.shape(y), number)[()] for _, y in flatten(value))))

            assert_same_bits_under_errstate(call)


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("scale", [1, 30, 1e-30])
def test_logits_of_any_cotangent_attention_maps_and_generation_have_the_same_bits(scale):
    params = scaled(perturbed_params(CONFIG), scale, np.float32)

    def call():
        logits, vjp = retro(params, CONFIG, TOKENS, NEIGHBOURS)
        samples = [generate(params, CONFIG, [1, 2, 3], 6, temperature=t)[0] for t in (0, 1, 1e-3, 1e-300, 5e-324)]
        return logits, vjp(np.full(logits.shape, 1e-300)), attention_maps(params, CONFIG, TOKENS, NEIGHBOURS), samples

    assert_same_bits_under_errstate(call)


@pytest.mark.parametrize("scale", [1, 100, 1e-30])
def test_the_reference_has_the_same_bits(scale):
    params = scaled(perturbed_params(CONFIG), scale, np.float64)
    assert_same_bits_under_errstate(lambda: reference.retro(params, CONFIG, TOKENS[:1, :7], NEIGHBOURS[:1, :2]))


def test_evaluation_and_generation_with_a_database_have_the_same_bits(database):
    config = small_config(database)
    params = scaled(init_params(config, np.random.default_rng(0)), 20, np.float32)

    def call():
        losses = score(params, config, database, sequence_length=32, stride=16)
        tokens, retrieved = generate(params, config, np.arange(3, 20), 10, database=database, temperature=0.01)
        return losses.nats, losses.bytes, tokens, [item.distances for item in retrieved]

    assert_same_bits_under_errstate(call)


@pytest.mark.slow
def test_training_and_its_evaluation_have_the_same_bits(database, tmp_path):
    config, windows = small_config(database), {"sequence_length": 32, "stride": 16}

    def call():
        folder = tempfile.mkdtemp(dir=tmp_path)
        params = train(database, config, TRAINING, f"{folder}/run")
        off, _ = load_params(f"{folder}/run/checkpoint.safetensors")
        baseline = init_params(replace(config, cca_layers=()), np.random.default_rng(0))
        models = {
            "RETRO": (scaled(params, 20, np.float32), config),
            "baseline": (baseline, replace(config, cca_layers=())),
        }
        results = evaluate(models, database, f"{folder}/evaluation", **windows)
        lines = [(line["loss"], line["gradient_norm"]) for line in read_log(f"{folder}/run")]
        return params, off, lines, [results["models"][name]["bpb"] for name in sorted(results["models"])]

    assert_same_bits_under_errstate(call)


@pytest.mark.slow
def test_knn_lm_and_the_continuous_cache_have_the_same_bits(database):
    config = small_config(database)
    params = scaled(init_params(config, np.random.default_rng(0)), 30, np.float32)

    def call():
        scored, hidden, documents = frozen_model(params, config, database, sequence_length=32)
        keys, values = datastore(params, config, database, 400, sequence_length=32)
        mixtures = knn_lm(scored, hidden, documents, keys, values), continuous_cache(scored, hidden, documents, 100)
        surprised = replace(scored, nats=scored.nats + 800)  # probabilities that float64 cannot hold
        surprising = continuous_cache(surprised, hidden, documents, 100)
        return scored.nats, [(tokens.nats, settings) for tokens, settings in (*mixtures, surprising)]

    assert_same_bits_under_errstate(call)


@pytest.fixture(scope="module")
def minilm():
    with np.errstate(all="raise"):
        return load_bert()


@pytest.mark.usefixtures("kind")
def test_the_keys_and_attention_maps_of_bert_have_the_same_bits(minilm):
    texts = ["", "chunked cross-attention", "a " * 30]
    assert_same_bits_under_errstate(lambda: (minilm.embed(texts, show_progress=False), minilm.attention_maps("a b")))


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("scale", [1e-22, 30])
def test_a_bert_of_any_scale_and_activation_has_the_same_bits(minilm, activation, scale):
    tensors = {name: array * np.float32(scale) for name, array in minilm.files.tensors.items()}
    config = minilm.files.config | {"hidden_act": activation, "num_hidden_layers": 2}
    files = replace(minilm.files, tensors=tensors, config=config)

    def call():
        bert = replace(minilm, files=files, layers=_arranged(files, files.folder))
        return bert.embed(["", "chunked cross-attention"], show_progress=False)

    assert_same_bits_under_errstate(call)


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("scale", [1e-30, 1, 1e30])
def test_search_has_the_same_bits_for_keys_whose_squares_leave_float32(scale):
    queries, keys = (np.random.default_rng(1).standard_normal((n, 20)).astype(np.float32) for n in (40, 2000))
    queries, keys = queries * np.float32(scale), keys * np.float32(scale)
    ids = np.zeros((40, 1), int)

    def call():
        return search.exact_search(queries, keys, 3), search.listed_distances(queries, keys, ids)

    assert_same_bits_under_errstate(call)


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("scale", [1e-30, 1, 1e15])
def test_the_steps_of_bert_have_the_same_bits(scale):
    x, residual = (np.random.default_rng(2).standard_normal((2, 30, 16)) * scale).astype(np.float32)
    bias, gain, shift = (np.random.default_rng(3).standard_normal((3, 16)) * scale).astype(np.float32)

    def call():
        normed, active = x.copy(), x.copy()
        bert.add_layer_norm(normed, bias, residual, gain, shift, 1e-12)
        bert.add_gelu_erf(active, bias)
        return normed, active, rowwise.gelu_forward(x.reshape(-1))

    assert_same_bits_under_errstate(call)


@pytest.mark.usefixtures("kind")
def test_gelu_of_the_largest_numbers_is_the_identity_or_zero_and_its_slope_is_1_or_0():
    for dtype in (np.float32, np.float64):
        largest = np.finfo(dtype).max
        x = np.array([largest, -largest, 1e20, -1e20], dtype)
        with np.errstate(all="raise"):
            y, dx = rowwise.gelu_forward(x), rowwise.gelu_backward(np.ones_like(x), x)
        np.testing.assert_array_equal(y, np.maximum(x, 0))
        np.testing.assert_array_equal(dx, [1, 0, 1, 0])


def test_overflow_and_invalid_operations_still_raise():
    kernels.use("numpy")
    with np.errstate(all="raise"):
        with pytest.raises(FloatingPointError, match="overflow"):
            rowwise.rms_norm_forward(np.full((1, 4), 1e30, np.float32), np.ones(4, np.float32))
        with pytest.raises(FloatingPointError, match="invalid"):
            OPERATORS["cross_entropy"].f(np.full((2, 11, 11), np.inf))


def test_an_error_raises_whichever_thread_meets_it():
    logits = np.zeros((2, 11, 11))
    logits[1, -1] = np.inf
    for count in (1, 2, 3):
        threads.use_threads(count)
        with np.errstate(all="raise"), pytest.raises(FloatingPointError, match="invalid"):
            OPERATORS["cross_entropy"].f(logits)


def test_the_user_s_setting_is_as_before_after_each_call():
    setting = np.geterr() | {"under": "raise", "over": "warn"}
    with np.errstate(**setting):
        _, vjp = retro_loss(perturbed_params(CONFIG), CONFIG, TOKENS, TARGETS, NEIGHBOURS)
        vjp(1.0)
        sample_token(np.arange(5.0), np.random.default_rng(0), temperature=1e-300)
        assert np.geterr() == setting
        with pytest.raises(FloatingPointError):
            np.exp(np.float64(-800))
