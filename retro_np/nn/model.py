"""RETRO, whole: algorithm 1 of the paper, forward and backward."""

import numpy as np

from retro_np.config import RetroConfig
from retro_np.errors import UserError
from retro_np.nn.attention import self_attention
from retro_np.nn.cca import cca
from retro_np.nn.encoder import encode
from retro_np.nn.ffw import ffw
from retro_np.nn.operators import cross_entropy, embedding, linear, rms_norm
from retro_np.nn.scope import ROOT, Scope, every
from retro_np.parameters import check_tree
from retro_np.tree import leaves, map_tree


def retro(params, config: RetroConfig, tokens, neighbours, *, dropout_key=None):
    """Logits of every next token, and the pullback. Paper §2.4, algorithm 1.

    tokens: (B, n) integers. neighbours: (B, floor(n / m), k, r) integers, 0 padding; None: retrieval off.
    dropout_key: None, or an integer or tuple of integers that settles what dropout drops.
    Returns logits (B, n, V) in the parameters' dtype, and vjp(dlogits) -> a tree of gradients like params.
    Raises UserError (a ValueError) for tokens outside the vocabulary and for shapes that do not fit.
    """
    return _decode(params, config, tokens, neighbours, Scope(rate=config.dropout, key=dropout_key))


def retro_loss(params, config: RetroConfig, tokens, targets, neighbours, *, dropout_key=None, trainable=None):
    """Mean nats per target that is not padding (0), and the pullback. Paper eq. 1.

    targets: (B, n) integers; the rest as in `retro`. trainable: a predicate of a parameter's dotted name; where it is
    false the gradient is None and its product is never made. With no target the loss is 0 and so is every gradient.
    """
    targets = _checked_tokens(targets, config.vocabulary_size, "targets")
    if targets.shape != np.shape(tokens):
        raise UserError(f"targets are {targets.shape} where tokens are {np.shape(tokens)}: they must be of one shape")
    scope = Scope(rate=config.dropout, key=dropout_key, trainable=trainable or every)
    logits, logits_vjp = _decode(params, config, tokens, neighbours, scope)
    loss, loss_vjp = cross_entropy(logits, targets)

    def vjp(dloss=1.0):
        (dlogits,) = loss_vjp(dloss)
        return logits_vjp(dlogits)

    return loss, vjp


def hidden_states(params, config: RetroConfig, tokens, neighbours) -> np.ndarray:
    """What the readout reads at every position: the last layer's output, normed. Logits are this times `readout`.

    Arguments as in `retro`, without dropout. Returns (B, n, d) in the parameters' dtype.
    """
    return _hidden(params, config, tokens, neighbours, ROOT)[0]


def attention_maps(params, config: RetroConfig, tokens, neighbours) -> dict[str, np.ndarray]:
    """The weights of every attention, by the block's dotted name, to be looked at. Arguments as in `retro`.

    Layers P count from 0, as in a checkpoint's names.
    `layers.P.attention` (B, h, n, n): of query and key.
    `layers.P.cca` (B, l, h, m, k, r): of query i, from 0, of the attending chunk H_u^+ and the j-th neighbour's token;
    it is the sequence's token u·m − 1 + i, from 0, for u from 1.
    `encoder.layers.P.attention` (B, l, k, h, r, r), `encoder.layers.P.cross_attention` (B, l, h, k, r, m).
    Each query's weights sum to 1, or are 0 where no key is left.
    """
    seen: dict[str, np.ndarray] = {}
    _hidden(params, config, tokens, neighbours, Scope(watch=seen.__setitem__))
    batch, k = len(tokens), 0 if neighbours is None else np.shape(neighbours)[2]

    def shaped(name, weights):  # (B', h, g, n, k', r'), B' the sequences, their chunks, or their chunks' neighbours
        if name.endswith("cca"):
            return weights[:, :, 0].reshape(batch, -1, *weights.shape[1:2], *weights.shape[3:])
        if name.endswith("cross_attention"):
            return weights[..., 0, :].reshape(batch, -1, *weights.shape[1:4], weights.shape[-1])
        square = weights[:, :, 0, :, 0]
        return square.reshape(batch, -1, k, *square.shape[1:]) if name.startswith("encoder") else square

    return {name: shaped(name, weights) for name, weights in seen.items()}


def readout(params, config: RetroConfig) -> np.ndarray:
    """The matrix (d, V) that makes logits of hidden states."""
    return params["embedding"].T if config.tie_readout else params["readout"]


def _decode(params, config, tokens, neighbours, scope):
    """Logits, and vjp(dlogits) -> a tree like params."""
    hidden, hidden_vjp = _hidden(params, config, tokens, neighbours, scope)
    tied = config.tie_readout
    logits, readout_vjp = linear(hidden, readout(params, config), scope.trains("embedding" if tied else "readout"))

    def vjp(dlogits):
        dlogits = np.asarray(dlogits, logits.dtype)
        if dlogits.shape != logits.shape:
            raise UserError(f"the logits' gradient is {dlogits.shape}, and the logits are {logits.shape}")
        dhidden, dreadout = readout_vjp(dlogits)
        grads = hidden_vjp(dhidden)
        if tied:
            grads["embedding"] = _sum([grads["embedding"], None if dreadout is None else dreadout.T])
        else:
            grads["readout"] = dreadout
        return _like(params, grads, scope.trainable)

    return logits, vjp


def _hidden(params, config, tokens, neighbours, scope):
    """All but the readout. Returns (B, n, d), and vjp(dhidden) -> a tree of all other gradients, None where frozen."""
    tokens = _checked_tokens(tokens, config.vocabulary_size, "tokens")
    neighbours = _checked_neighbours(neighbours, tokens.shape, config)
    retrieving = config.cca_layers if neighbours is not None else ()
    check_tree(params, config, retrieving=bool(retrieving))

    h, embedding_vjp = embedding(params["embedding"], tokens, scope.trains("embedding"))
    h, drop_vjp = scope.at("embedding").drop(h)
    encoded, encoder_vjp, pullbacks = None, None, []
    for p, layer in enumerate(params["layers"], start=1):
        place = scope.at(f"layers.{p - 1}")
        h, attention_vjp = self_attention(
            layer["attention"], h, config.n_heads, causal=True, scope=place.at("attention")
        )
        cca_vjp = None
        if p in retrieving:
            if encoded is None:
                encoded, key_mask, encoder_vjp = _encode_neighbours(params, config, neighbours, h, scope)
            h, cca_vjp = cca(layer["cca"], h, encoded, key_mask, config.n_heads, config.chunk_size, place.at("cca"))
        h, ffw_vjp = ffw(layer["ffw"], h, place.at("ffw"))
        pullbacks.append((attention_vjp, cca_vjp, ffw_vjp))
    normed, norm_vjp = rms_norm(h, params["norm"])

    def vjp(dnormed):
        dh, dgain = norm_vjp(dnormed)
        dencoded, encoder_grads, dshared = 0, None, None
        layers = []
        for p, (attention_vjp, cca_vjp, ffw_vjp) in reversed(list(enumerate(pullbacks, start=1))):
            grads = {}
            grads["ffw"], dh = ffw_vjp(dh)
            if cca_vjp is not None:
                grads["cca"], dh, de = cca_vjp(dh)
                dencoded = dencoded + de
                if p == min(retrieving):  # the encoder read h as it was between ATTN and CCA of this layer
                    encoder_grads, dshared, dcondition = encoder_vjp(dencoded)
                    dh = dh + dcondition
            grads["attention"], dh = attention_vjp(dh)
            layers.insert(0, grads)
        (dh,) = drop_vjp(dh)
        (dembedding,) = embedding_vjp(dh)
        return {
            "embedding": _sum([dembedding, dshared]), "layers": layers, "norm": dgain, "encoder": encoder_grads,
        }  # fmt: skip

    return normed, vjp


def _encode_neighbours(params, config, neighbours, h, scope):
    """E (B, l, k, r, d'), its key mask (B, l, k, r), and vjp(dE) -> (encoder's gradients, dshared embedding, dh)."""
    batch, n_chunks, k, r = neighbours.shape
    covered = n_chunks * config.chunk_size
    h_chunks = h[:, :covered].reshape(batch * n_chunks, config.chunk_size, -1)
    shared = config.share_embeddings
    table = params["embedding"] if shared else params["encoder"]["embedding"]
    tokens = neighbours.reshape(batch * n_chunks, k, r)
    place = scope.at("encoder")
    table_trains = (scope if shared else place).trains("embedding")
    encoded, encode_vjp = encode(params["encoder"], table, tokens, h_chunks, config.encoder, place, table_trains)

    def vjp(dencoded):
        grads, dtable, dh_chunks = encode_vjp(dencoded.reshape(encoded.shape))
        dh = np.zeros_like(h)
        dh[:, :covered] = dh_chunks.reshape(batch, covered, -1)
        if shared:
            return grads, dtable, dh
        return grads | {"embedding": dtable}, None, dh

    return encoded.reshape(batch, n_chunks, k, r, -1), neighbours != 0, vjp


def _sum(parts):
    present = [part for part in parts if part is not None]
    return sum(present[1:], start=present[0]) if present else None


def _like(params, grads, trainable):
    """Gradients in the form of params: None where frozen, zero where the loss did not depend on the parameter."""
    found = dict(leaves(grads))

    def leaf(name, array):
        if not trainable(name):
            return None
        grad = found.get(name)
        return np.zeros_like(array) if grad is None else grad

    return map_tree(leaf, params)


def _checked_tokens(tokens, vocabulary_size, name):
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or tokens.size == 0:
        raise UserError(
            f"{name} must be integers of shape (B, n) with B and n ≥ 1, not {tokens.dtype} of {tokens.shape}"
        )
    return _in_vocabulary(tokens, vocabulary_size, name)


def _in_vocabulary(tokens, vocabulary_size, name):
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocabulary_size):
        worst = tokens.min() if tokens.min() < 0 else tokens.max()
        raise UserError(f"{name} hold {worst}, outside the vocabulary of {vocabulary_size} (0 … {vocabulary_size - 1})")
    return tokens


def _checked_neighbours(neighbours, tokens_shape, config):
    """Neighbours as the encoder reads them, (B, l, k, r); None where there is nothing to read."""
    if neighbours is None or not config.retrieves:
        return None
    neighbours = np.asarray(neighbours)
    batch, n = tokens_shape
    wanted = (batch, n // config.chunk_size)
    if neighbours.ndim != 4 or neighbours.shape[:2] != wanted or not np.issubdtype(neighbours.dtype, np.integer):
        raise UserError(
            f"neighbours must be integers of shape (B, n // m, k, r) = ({wanted[0]}, {wanted[1]}, k, r) "
            f"for tokens {tokens_shape} and m = {config.chunk_size}, not {neighbours.dtype} of {neighbours.shape}"
        )
    neighbours = _in_vocabulary(neighbours, config.vocabulary_size, "neighbours")
    neighbours = read_part(neighbours, config)
    return neighbours if neighbours.size else None


def read_part(neighbours, config):
    """The part of each value (..., r) that the encoder reads: all of [N, F], or N or F alone (table 13)."""
    m = config.chunk_size
    return neighbours[..., {"NF": slice(None), "N": slice(m), "F": slice(m, None)}[config.retrieved_part]]
