"""Clipping, schedules and betas. Ground truth: norms in exact or extended arithmetic, formulas written out, PyTorch."""

import math
from fractions import Fraction

import numpy as np
import pytest
from support import small_config

from retro_np import TrainingConfig, adamw_init, init_params
from retro_np.optim import clip_by_global_norm
from retro_np.training.batches import training_batch
from retro_np.training.config import learning_rate
from retro_np.training.loop import loss_and_gradients, train_step
from retro_np.tree import map_tree, named_leaves

TYPES = [np.float32, np.float64]
SIZES = {
    "near the largest": lambda info: float(info.max) / 8,
    "with squares above the largest": lambda info: 3 * math.sqrt(info.max),
    "with squares below the smallest": lambda info: math.sqrt(info.tiny) / 9,
    "near the smallest": lambda info: 5 * float(info.tiny),
}


def exact_norm(arrays, unit):
    """The norm of all entries, as a multiple of `unit`."""
    return math.sqrt(sum((Fraction(float(x)) / Fraction(unit)) ** 2 for array in arrays for x in array.flat))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.5, 1e-3, 2.0])
def test_gradients_of_any_size_are_scaled_to_the_limit_in_their_direction(dtype, size, share):
    unit = SIZES[size](np.finfo(dtype))
    directions = [np.array([[3.0, -2.0], [1.0, 0.5]]), np.array([1.0, -4.0, 0.0])]
    grads = [(direction * unit).astype(dtype) for direction in directions]
    before, limit = exact_norm(grads, unit), share * 5.0 * unit
    tree = {"a": grads[0].copy(), "b": [grads[1].copy(), None]}
    with np.errstate(all="raise"):
        norm = clip_by_global_norm(tree, limit)
    assert norm == pytest.approx(before * unit, rel=1e-6, abs=0)
    scale = min(1.0, limit / norm)
    for grad, clipped in zip(grads, (tree["a"], tree["b"][0]), strict=True):
        np.testing.assert_allclose(clipped.astype(np.float64), grad.astype(np.float64) * scale, rtol=1e-6, atol=3e-45)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_largest_gradients_are_scaled_to_a_norm_of_1(dtype):
    grads = {"a": np.full(7, np.finfo(dtype).max), "b": np.zeros(3, dtype)}
    clip_by_global_norm(grads, 1.0)
    assert np.linalg.norm(grads["a"]) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("other", [1.0, 1e30])
def test_with_an_entry_that_is_not_finite_the_norm_is_not_and_nothing_is_scaled(odd, other):
    grads = {"a": np.array([odd, other], np.float32), "b": np.full(3, other, np.float32)}
    before = {name: grad.copy() for name, grad in grads.items()}
    assert not math.isfinite(clip_by_global_norm(grads, 0.5))
    for name, grad in grads.items():
        np.testing.assert_array_equal(grad, before[name])


def test_no_gradient_at_all_and_only_zeros_have_norm_0():
    zeros = {"a": np.zeros((2, 2), np.float32), "b": np.zeros((0, 3)), "c": None}
    assert clip_by_global_norm({"a": None}, 1.0) == clip_by_global_norm(zeros, 1.0) == 0
    assert not zeros["a"].any()


def rates(**settings):
    return [learning_rate(step, peak=2e-3, warmup=7, steps=100, **settings) for step in range(100)]


def test_the_default_schedule_has_the_bits_of_earlier_versions():
    """Their formula, written out: a cosine from the peak down to a tenth of it."""
    for step, rate in enumerate(rates()):
        cosine = 2e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * ((step - 7) / 92))))
        assert rate == (1e-7 + (2e-3 - 1e-7) * step / 7 if step < 7 else cosine), step


@pytest.mark.oracle
def test_cosine_and_linear_are_the_schedules_of_pytorch():
    import torch

    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    for name, end, scheduler in (
        ("cosine", 0.25, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 92, eta_min=0.25 * 2e-3)),
        ("linear", 0.25, lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.25, 92)),
        ("linear", 0.0, lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, 92)),
    ):
        optimiser.param_groups[0].update(lr=2e-3, initial_lr=2e-3)
        schedule, expected = scheduler(optimiser), []
        for _ in range(93):
            expected.append(optimiser.param_groups[0]["lr"])
            optimiser.step()
            schedule.step()
        assert rates(schedule=name, end=end)[7:] == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("end", [0.0, 0.1, 0.3, 1.0])
def test_the_constant_schedule_stays_at_the_peak_after_the_warm_up(end):
    assert set(rates(schedule="constant", end=end)[7:]) == {2e-3}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_every_schedule_warms_up_in_the_same_way(schedule):
    assert rates(schedule=schedule, end=0.5)[:7] == rates()[:7]


@pytest.mark.oracle
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.8, 0.999), (0.0, 0.5), (0.5, 0.0)])
def test_a_training_step_uses_the_configured_betas_as_pytorch_does(betas, database):
    import torch

    config, training = small_config(database), TrainingConfig(2, 32, 2, beta1=betas[0], beta2=betas[1], clip=0.5)
    params = map_tree(lambda _, array: array.astype(np.float64), init_params(config, np.random.default_rng(0)))
    reference = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in named_leaves(params)}
    decayed = [p for p in reference.values() if p.ndim >= 2], [p for p in reference.values() if p.ndim < 2]
    groups = [{"params": decayed[0], "weight_decay": 0.1}, {"params": decayed[1], "weight_decay": 0.0}]
    optimiser, state = torch.optim.AdamW(groups, betas=betas, eps=1e-8), adamw_init(params)
    for step in range(3):
        batch = training_batch(
            database, database.split("train"), 2, sequence_length=32, batch_size=2, seed=0, step=step
        )
        _, grads = loss_and_gradients(params, config, batch)
        norm = math.sqrt(sum((grad**2).sum() for _, grad in named_leaves(grads)))
        for name, grad in named_leaves(grads):
            reference[name].grad = torch.tensor(grad * min(1.0, 0.5 / norm))
        line = train_step(params, state, config, batch, training, step)
        for group in optimiser.param_groups:
            group["lr"] = line["learning_rate"]
        optimiser.step()
        assert line["gradient_norm"] == pytest.approx(norm)
    for name, array in named_leaves(params):
        np.testing.assert_allclose(array, reference[name].detach().numpy(), rtol=1e-9, atol=1e-12, err_msg=name)
