"""The loss on held-out documents during training, over the windows that `score` uses. Paper §2.6."""

import math
from collections.abc import Callable
from dataclasses import replace

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.nn.model import retro_loss
from retro_np.retrieval.database import Database
from retro_np.retrieval.sharded import Sharded
from retro_np.retrieval.tokenizer import token_byte_lengths
from retro_np.sequences import evaluation_windows, scored_windows, sequence_chunks, sequence_neighbours
from retro_np.training.config import TrainingConfig
from retro_np.tree import Tree


def validation(database: Database, config: RetroConfig, training: TrainingConfig) -> Callable[[Tree], dict[str, float]]:
    """A function that evaluates parameters on the held-out documents (split valid) and changes nothing.

    The function returns {"valid_loss": nats per token, "valid_bpb": bits per byte}. Its windows have the training's
    sequence_length and move by half of it, so valid_bpb is what `score` gives with these settings. training: gives also
    the neighbours and eval_chunks. Raises UserError if no held-out token can be scored."""
    split, limit = database.split("valid"), training.eval_chunks
    windows = evaluation_windows(split, sequence_chunks(training.sequence_length, database.chunk_size), limit=limit)
    byte_lengths, k = token_byte_lengths(database.tokenizer), training.neighbours if config.retrieves else 0
    if limit is not None:  # The first token of the next chunk is not scored either.
        split = replace(split, tokens=Sharded([split.tokens[:limit]]))
    if not any(targets.any() for _, _, targets in scored_windows(split, *windows, description="")):
        hint = "build another with --held-out-bytes 0.1, or train without --eval-every"
        raise UserError(f"{database.path} holds out no text on which training could be evaluated: {hint}")

    def evaluate(params: Tree) -> dict[str, float]:
        nats, n_tokens, n_bytes = 0.0, 0, 0
        for rows, tokens, targets in scored_windows(split, *windows, description=""):
            neighbours = sequence_neighbours(database, split, rows, k) if k else None
            loss, _ = retro_loss(params, config, tokens, targets, neighbours)
            scored = targets[targets != 0]
            nats, n_tokens = nats + float(loss) * len(scored), n_tokens + len(scored)
            n_bytes += int(byte_lengths[scored].sum())
        return {"valid_loss": nats / n_tokens, "valid_bpb": nats / (math.log(2) * n_bytes)}

    return evaluate
