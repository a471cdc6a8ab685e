"""A model, a database and a training in which retrieval helps after minutes. EXPERIMENTS.md explains the recipe."""

from dataclasses import replace

from retro_np.config import EncoderConfig, RetroConfig
from retro_np.retrieval.build import HASHED, BuildConfig
from retro_np.training.config import TrainingConfig

BUILD = BuildConfig(chunk_size=16, vocabulary_size=2048, d_key=256, neighbours=16, extra_candidates=16)
EMBEDDER = HASHED
NEIGHBOURS = 2  # k, in training and evaluation
HEADS = 4


def retro_config(vocabulary_size: int, chunk_size: int, *, d_model: int = 128, n_layers: int = 4) -> RetroConfig:
    """The recipe's RETRO: CCA in every second layer, and an encoder of one layer, as wide as the decoder."""
    sizes, cca_layers = (d_model, 4 * d_model, HEADS, d_model // HEADS), tuple(range(2, n_layers + 1, 2))
    encoder = EncoderConfig(*sizes, n_layers=1, ca_layers=(1,))
    return RetroConfig(vocabulary_size, *sizes, n_layers, cca_layers, chunk_size, encoder, copying_start=True)


def baseline_of(config: RetroConfig) -> RetroConfig:
    """The same decoder without retrieval."""
    return replace(config, cca_layers=(), encoder=None, copying_start=False)


def training_config(config: RetroConfig, steps: int, seed: int) -> TrainingConfig:
    """The recipe's training of a RETRO or a baseline, with 2,048 tokens per step."""
    training = TrainingConfig(
        steps=steps, sequence_length=256, batch_size=8, neighbours=NEIGHBOURS, learning_rate=2e-3,
        warmup=min(50, steps // 10), seed=seed, checkpoint_every=100,
    )  # fmt: skip
    if not config.retrieves:
        return training
    return replace(training, retrieval_off=0.6, oracle_share=0.5, oracle_steps=max(1, steps // 3))
