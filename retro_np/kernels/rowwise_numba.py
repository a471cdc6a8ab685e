"""The loops of rows.py, for Numba: each does a block of rows."""

import math

import numba
import numpy as np

from retro_np.kernels import rowwise as in_numpy
from retro_np.kernels.jit import jit

SLOPE, CUBIC = in_numpy.SLOPE, in_numpy.CUBIC


@jit
def rms_norm_forward(x, gain, eps, y, scale):
    rows, d = x.shape
    for i in range(rows):
        square = np.float64(0)  # whatever the type: rows near zero are scaled up a thousandfold, roundings with them
        for t in range(d):
            square += np.float64(x[i, t]) * x[i, t]
        factor = 1 / np.sqrt(square / d + eps)
        scale[i] = factor
        for t in range(d):
            y[i, t] = gain[t] * (x[i, t] * factor)


@jit
def rms_norm_backward(dy, x, gain, scale, dx, dgain):
    rows, d = x.shape
    width = x.dtype.type(d)
    for i in range(rows):
        factor = scale[i]
        along = x.dtype.type(0)
        for t in range(d):
            along += dy[i, t] * gain[t] * x[i, t]
        along *= factor * factor / width
        for t in range(d):
            dx[i, t] = factor * (dy[i, t] * gain[t] - x[i, t] * along)
            dgain[t] += dy[i, t] * (x[i, t] * factor)


# tanh(x) ≈ x P(x²) / Q(x²) for |x| ≤ 7.9, where a float32 reaches 1: the rational approximation of the Eigen library,
# highest power first. It has no branch and no table, so that a vector of numbers goes through it at once.
TANH_P = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
TANH_END = np.float32(7.90531110763549805)

TANH_P, TANH_Q, ERF_P, ERF_Q = (
    tuple(np.float32(coefficient) for coefficient in part) for part in (TANH_P, TANH_Q, in_numpy.ERF_P, in_numpy.ERF_Q)
)


@jit
def polynomial(coefficients, x):
    value = coefficients[0]
    for k in range(1, len(coefficients)):
        value = value * x + coefficients[k]
    return value


def tanh(x):
    """The hyperbolic tangent; in float32 within 5e-7."""
    return math.tanh(x)


@numba.extending.overload(tanh, inline="never")
def _tanh(x):
    if x is not numba.float32:
        return lambda x: math.tanh(x)

    def rational(x):
        square = min(x * x, TANH_END * TANH_END)
        if x >= TANH_END:  # exactly: the pullback takes 1 − tanh² there
            return np.float32(1)
        return np.float32(-1) if x <= -TANH_END else x * polynomial(TANH_P, square) / polynomial(TANH_Q, square)

    return rational


@jit
def tanh_of(x):
    """The tanh of each entry: for the test of it."""
    y = np.empty_like(x)
    for i in range(len(x)):
        y[i] = tanh(x[i])
    return y


@jit
def gelu_forward(x, y):
    kind = x.dtype.type
    half, one, slope, cubic = kind(0.5), kind(1), kind(SLOPE), kind(CUBIC)
    for i in range(len(x)):
        y[i] = half * x[i] * (one + tanh(slope * (x[i] + cubic * x[i] * x[i] * x[i])))


@jit
def gelu_backward(dy, x, dx):
    kind = x.dtype.type
    half, one, slope, cubic = kind(0.5), kind(1), kind(SLOPE), kind(CUBIC)
    for i in range(len(x)):
        t = tanh(slope * (x[i] + cubic * x[i] * x[i] * x[i]))
        inner = slope * (one + kind(3) * cubic * x[i] * x[i])
        dx[i] = dy[i] * (half * (one + t) + half * x[i] * (one - t * t) * inner)


@jit
def add_gelu_erf(x, bias):
    half, one, root = np.float32(0.5), np.float32(1), np.float32(0.7071067811865476)
    for i in range(x.shape[0]):
        for t in range(x.shape[1]):
            value = x[i, t] + bias[t]
            clipped = min(max(value * root, np.float32(-4)), np.float32(4))
            square = clipped * clipped
            erf = clipped * polynomial(ERF_P, square) / polynomial(ERF_Q, square)
            x[i, t] = half * value * (one + erf)


@jit
def add_layer_norm(x, bias, residual, gain, shift, eps):
    rows, d = x.shape
    one, width = x.dtype.type(1), x.dtype.type(d)
    for i in range(rows):
        mean = x.dtype.type(0)
        for t in range(d):
            x[i, t] += bias[t] + residual[i, t]
            mean += x[i, t]
        mean /= width
        square = x.dtype.type(0)
        for t in range(d):
            x[i, t] -= mean
            square += x[i, t] * x[i, t]
        factor = one / np.sqrt(square / width + eps)
        for t in range(d):
            x[i, t] = x[i, t] * factor * gain[t] + shift[t]


@jit
def scatter_add(rows, places, out):
    for i in range(len(rows)):
        place = places[i]
        for t in range(rows.shape[1]):
            out[place, t] += rows[i, t]


@jit
def adamw(p, g, m, v, first, second, rate, correction, decay, eps):
    one = p.dtype.type(1)
    for i in range(len(p)):
        m[i] = first * m[i] + (one - first) * g[i]
        v[i] = second * v[i] + (one - second) * g[i] * g[i]
        p[i] = p[i] * decay - rate * m[i] / (np.sqrt(v[i]) * correction + eps)
