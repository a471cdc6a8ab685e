"""The loss on held-out documents during training, over the windows that `score` uses. Paper §2.6."""

from collections.abc import Callable

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import nats_of, scored_tokens
from retro_np.nn.model import retro
from retro_np.retrieval.database import Database
from retro_np.sequences import evaluation_windows, scored_windows, sequence_chunks, sequence_neighbours
from retro_np.training.config import TrainingConfig
from retro_np.tree import Tree


def validation(database: Database, config: RetroConfig, training: TrainingConfig) -> Callable[[Tree], dict[str, float]]:
    """A function that evaluates parameters on the held-out documents (split valid) and changes nothing.

    The function returns {"valid_loss": nats per token, "valid_bpb": bits per byte}. Its windows have the training's
    sequence_length and move by half of it, so valid_bpb is what `score` gives with these settings. training: gives also
    the neighbours and eval_chunks. Raises UserError if no held-out token can be scored."""
    split, limit, k = database.split("valid"), training.eval_chunks, training.neighbours if config.retrieves else 0
    windows = evaluation_windows(split, sequence_chunks(training.sequence_length, database.chunk_size), limit=limit)
    if not any(targets.any() for _, _, targets in scored_windows(split, *windows, description="")):
        hint = "build another with --held-out-bytes 0.1, or train without --eval-every"
        raise UserError(f"{database.path} holds out no text on which training could be evaluated: {hint}")

    def evaluate(params: Tree) -> dict[str, float]:
        def predict(rows, tokens, targets):
            neighbours = sequence_neighbours(database, split, rows, k) if k else None
            return (nats_of(retro(params, config, tokens, neighbours)[0], targets),)

        scored, _ = scored_tokens(split, windows, predict, "", limit)
        losses = scored.losses(database, split, limit)
        return {"valid_loss": float(scored.nats.mean()), "valid_bpb": losses.bits_per_byte()}

    return evaluate
