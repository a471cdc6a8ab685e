"""RETRO, the whole model: algorithm 1 of the paper, forward and backward."""

from __future__ import annotations  # without it, each call evaluates the annotations of its pullback

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.kernels import ignore_underflow
from retro_np.nn.attention import self_attention
from retro_np.nn.cca import cca, read_part
from retro_np.nn.encoder import encode
from retro_np.nn.ffw import ffw
from retro_np.nn.operators import DropoutKey, cross_entropy, embedding, linear, present, rms_norm
from retro_np.nn.scope import Blocks, Scope, every
from retro_np.parameters import check_tree, is_retrieval
from retro_np.tree import Array, Pullback, Tree, map_tree, named_leaves


def retro(
    params: Tree, config: RetroConfig, tokens: Array, neighbours: Array | None, *, dropout_key: DropoutKey = None
) -> tuple[Array, Pullback]:
    """The logits of the next token at every position, and the pullback. Paper §2.4, algorithm 1.

    tokens: (B, n), integers; n need not be a multiple of m.
    config: a RetroConfig, or a DecoderConfig for a decoder that others trained.
    neighbours: (B, floor(n / m), k, r), integers, padding at config.padding_id, or −1 without one; None: retrieval
        off.
    dropout_key: an integer, or a tuple of integers, that determines what is dropped; None: no dropout.
    Returns the logits, (B, n, V) in the dtype of the parameters, and vjp(dlogits), which takes an array of that shape
    and returns a tree of gradients with the form, shapes and dtypes of params.
    Raises UserError (a ValueError) for tokens outside the vocabulary, for shapes that do not match, and for parameters
    that do not belong to config."""
    return _decode(params, config, tokens, neighbours, Scope(rate=config.dropout, key=dropout_key))


def retro_loss(
    params: Tree, config: RetroConfig, tokens: Array, targets: Array, neighbours: Array | None, *,
    dropout_key: DropoutKey = None, trainable: Callable[[str], bool] | None = None,
) -> tuple[np.floating[Any], Pullback]:  # fmt: skip
    """The mean loss in nats per target that is not padding, and the pullback. Paper eq. 1.

    targets: (B, n), integers, config.padding_id or −1 where there is nothing to predict.
    trainable: tells from a parameter's dotted name whether it gets a gradient; None: every parameter does.
    Returns a scalar in the dtype of the parameters, and vjp(dloss=1.0), which returns a tree of gradients like params.
    A frozen parameter costs no work, and its gradient is None. Without any target, loss and gradients are 0.
    Raises UserError as `retro` does, and if the shapes of targets and tokens differ."""
    targets = _checked_tokens(targets, config.vocabulary_size, "targets", least=-1)
    if targets.shape != np.shape(tokens):
        raise UserError(f"targets have shape {targets.shape} and tokens {np.shape(tokens)}: the shapes must be equal")
    scope = Scope(rate=config.dropout, key=dropout_key, trainable=trainable or every)
    logits, logits_vjp = _decode(params, config, tokens, neighbours, scope)
    loss, loss_vjp = cross_entropy(logits, targets, config.padding_id)

    def vjp(dloss: float = 1.0) -> Tree:
        (dlogits,) = loss_vjp(dloss)
        return logits_vjp(dlogits)

    return loss, vjp


def hidden_states(params: Tree, config: RetroConfig, tokens: Array, neighbours: Array | None) -> Array:
    """The last layer's normalised output, which the readout turns into logits.

    The arguments are those of `retro`; nothing is dropped. Returns (B, n, d) in the dtype of the parameters. Raises
    UserError as `retro` does."""
    return hidden_and_vjp(params, config, tokens, neighbours, Scope(gradients=False))[0]


def blocks_of(config: RetroConfig) -> Blocks:
    """The paper's blocks, or those of a decoder that others trained, which load on demand."""
    if not config.is_retro:
        from retro_np.nn.decoders import decoder_blocks

        return decoder_blocks(config)  # type: ignore[arg-type]
    return Blocks(_embed, partial(self_attention, n_heads=config.n_heads, causal=True), ffw, _norm)


def readout(params: Tree, config: RetroConfig) -> Array:
    """The matrix (d, V) that maps hidden states to logits."""
    return np.asarray(params["embedding"].T if config.tie_readout else params["readout"])


def encoder_table(params: Tree, config: RetroConfig) -> Array:
    """The encoder's embedding table (V, d'), which is the decoder's if they are shared."""
    return np.asarray(params["embedding"] if config.share_embeddings else params["encoder"]["embedding"])


def _decode(params: Tree, config: RetroConfig, tokens: Any, neighbours: Any, scope: Scope) -> tuple[Array, Pullback]:
    """Logits, and vjp(dlogits) -> a tree like params."""
    if config.reads_itself and neighbours is not None:  # What encodes the neighbours is frozen, and so is the decoder.
        scope = replace(scope, trainable=lambda name, chosen=scope.trainable: is_retrieval(name) and chosen(name))  # type: ignore[misc]
    hidden, hidden_vjp = hidden_and_vjp(params, config, tokens, neighbours, scope)
    tied = config.tie_readout
    logits, readout_vjp = linear(hidden, readout(params, config), scope.trains("embedding" if tied else "readout"))

    @ignore_underflow
    def vjp(dlogits: Array) -> Tree:
        dlogits = np.asarray(dlogits, logits.dtype)
        if dlogits.shape != logits.shape:
            raise UserError(f"the gradient of the logits has shape {dlogits.shape}, but the logits have {logits.shape}")
        dhidden, dreadout = readout_vjp(dlogits)
        grads = hidden_vjp(dhidden)
        if not tied:
            grads["readout"] = dreadout
        elif dreadout is not None:
            grads["embedding"] = grads["embedding"] + dreadout.T
        return _like(params, grads, scope.trainable)

    return logits, vjp


def hidden_and_vjp(
    params: Tree, config: RetroConfig, tokens: Any, neighbours: Any, scope: Scope
) -> tuple[Array, Pullback]:
    """The model without its readout. Returns (B, n, d), and vjp(dhidden) -> a tree of gradients, None where frozen."""
    tokens = _checked_tokens(tokens, config.vocabulary_size, "tokens")
    neighbours = _checked_neighbours(neighbours, tokens.shape, config)
    retrieving = config.cca_layers if neighbours is not None else ()
    check_tree(params, config, retrieving=bool(retrieving))

    blocks, first, reading = blocks_of(config), 0, config.reads_itself
    if not config.is_retro:
        from retro_np.nn import decoders, memory

        first = decoders.first_trained(params, config, scope)  # type: ignore[arg-type]
    h, embed_vjp = blocks.embed(params, tokens, scope)
    pullbacks: list[Any] = []
    for p, layer in enumerate(params["layers"], start=1):
        block = scope.at(f"layers.{p - 1}")
        if reading and p in retrieving:
            if p == min(retrieving):
                neighbours = memory.encode_neighbours(params, config, neighbours)  # type: ignore[arg-type]
            h, self_vjp = memory.chunked_reading(layer, h, neighbours, p, config, block)  # type: ignore[arg-type]
        else:
            h, self_vjp = blocks.attention(layer["attention"], h, scope=block.at("attention"))
        cca_vjp = None
        if p in retrieving and not reading:
            if p == min(retrieving):
                encoded, key_mask, encoder_vjp = _encode_neighbours(params, config, neighbours, h, scope)
            h, cca_vjp = cca(layer["cca"], h, encoded, key_mask, config.n_heads, config.chunk_size, block.at("cca"))
        h, ffw_vjp = blocks.ffw(layer["ffw"], h, scope=block.at("ffw"))
        if scope.gradients and p >= first:
            pullbacks.append((self_vjp, cca_vjp, ffw_vjp))
    normed, norm_vjp = blocks.norm(params, h)

    def vjp(dnormed: Array) -> dict[str, Tree]:
        norm_grads, dh = norm_vjp(dnormed)
        dencoded, encoder_grads, dshared = 0, None, None
        layers: list[Tree] = [{}] * (first - 1)
        for p, (self_vjp, cca_vjp, ffw_vjp) in reversed(list(enumerate(pullbacks, start=max(1, first)))):
            grads: Tree = {}
            grads["ffw"], dh = ffw_vjp(dh)
            if cca_vjp is not None:
                grads["cca"], dh, de = cca_vjp(dh)
                dencoded = dencoded + de
                if p == min(retrieving):  # The encoder is conditioned on h between ATTN and CCA of this layer.
                    encoder_grads, dshared, dcondition = encoder_vjp(dencoded)
                    dh = dh + dcondition
            grads["cca" if reading and p in retrieving else "attention"], dh = self_vjp(dh)
            layers.insert(max(0, first - 1), grads)
        grads = {} if first else embed_vjp(dh)
        if dshared is not None:
            grads["embedding"] = grads["embedding"] + dshared
        return {**grads, **norm_grads, "layers": layers, "encoder": encoder_grads}

    return normed, vjp


def _embed(params: Tree, tokens: Array, scope: Scope) -> tuple[Array, Pullback]:
    h, embedding_vjp = embedding(params["embedding"], tokens, scope.trains("embedding"))
    h, drop_vjp = scope.at("embedding").drop(h)
    return h, lambda dh: {"embedding": embedding_vjp(*drop_vjp(dh))[0]}


def _norm(params: Tree, h: Array) -> tuple[Array, Pullback]:
    normed, norm_vjp = rms_norm(h, params["norm"])

    def vjp(dy: Array) -> tuple[Tree, Array]:
        dh, dgain = norm_vjp(dy)
        return {"norm": dgain}, dh

    return normed, vjp


def _encode_neighbours(
    params: Tree, config: Any, neighbours: Array, h: Array, scope: Scope
) -> tuple[Array, Array, Pullback]:
    """E (B, l, k, r, d'), its key mask (B, l, k, r), and vjp(dE) -> (encoder gradients, dtable if shared, dh)."""
    batch, n_chunks, k, r = neighbours.shape
    covered = n_chunks * config.chunk_size
    h_chunks = h[:, :covered].reshape(batch * n_chunks, config.chunk_size, -1)
    shared, block = config.share_embeddings, scope.at("encoder")
    table, table_trains = encoder_table(params, config), (scope if shared else block).trains("embedding")
    tokens = neighbours.reshape(batch * n_chunks, k, r)
    settings = config.encoder, block, table_trains, config.padding_id
    encoded, encode_vjp = encode(params["encoder"], table, tokens, h_chunks, *settings)

    def vjp(dencoded: Array) -> tuple[Tree, Array | None, Array]:
        grads, dtable, dh_chunks = encode_vjp(dencoded.reshape(encoded.shape))
        dh = np.zeros_like(h)
        dh[:, :covered] = dh_chunks.reshape(batch, covered, -1)
        return (grads, dtable, dh) if shared else (grads | {"embedding": dtable}, None, dh)

    return encoded.reshape(batch, n_chunks, k, r, -1), present(neighbours, config.padding_id), vjp


def _like(params: Tree, grads: Tree, trainable: Callable[[str], bool]) -> Tree:
    """Gradients as a tree like params: None for a frozen parameter, zero for one on which the value does not depend."""
    by_name = {name: grad for name, grad in named_leaves(grads) if grad is not None}

    def leaf(name: str, array: Array) -> Any:
        if not trainable(name):
            return None
        return by_name[name] if name in by_name else np.zeros_like(array)

    return map_tree(leaf, params)


def _checked_tokens(tokens: Any, vocabulary_size: int, name: str, least: int = 0) -> Array:
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or tokens.size == 0:
        actual = f"{tokens.dtype} of shape {tokens.shape}"
        raise UserError(f"{name} must be integers of shape (B, n) with B and n ≥ 1, not {actual}")
    return _in_vocabulary(tokens, vocabulary_size, name, least)


def _in_vocabulary(tokens: Array, vocabulary_size: int, name: str, least: int) -> Array:
    if tokens.size and (tokens.min() < least or tokens.max() >= vocabulary_size):
        worst = tokens.min() if tokens.min() < least else tokens.max()
        raise UserError(f"{name} contain {worst}, which is not in the vocabulary (0 … {vocabulary_size - 1})")
    return tokens


def _checked_neighbours(neighbours: Any, tokens_shape: tuple[int, ...], config: RetroConfig) -> Any:
    """The part of the neighbours that the encoder reads, (B, l, k, r), or None if there is nothing to read."""
    if neighbours is None or not config.retrieves or hasattr(neighbours, "states"):  # memory.Neighbours are encoded.
        return neighbours if config.retrieves else None
    neighbours = np.asarray(neighbours)
    batch, n = tokens_shape
    expected = (batch, n // config.chunk_size)
    if neighbours.ndim != 4 or neighbours.shape[:2] != expected or not np.issubdtype(neighbours.dtype, np.integer):
        wanted = f"({expected[0]}, {expected[1]}, k, r) for tokens {tokens_shape} and m = {config.chunk_size}"
        actual = f"{neighbours.dtype} of shape {neighbours.shape}"
        raise UserError(f"neighbours must be integers of shape (B, n // m, k, r) = {wanted}, not {actual}")
    least = 0 if config.padding_id is not None else -1
    neighbours = read_part(_in_vocabulary(neighbours, config.vocabulary_size, "neighbours", least), config)
    return neighbours if neighbours.size else None
