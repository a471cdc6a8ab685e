"""Plot the time of a training step against k·r, the keys that a chunk reads, and against n, the sequence length.

    python benchmarks/scaling.py [--rounds 5] [-o results.json] [--plot scaling.png]

Paper §2.4: cross-attention costs n · k · r, linear in all three. A batch has one sequence; k goes from 1 to 16 at r 128
and n 512, and n from 512 to 4096 at k 2. Causal self-attention grows with n² and is timed separately. Each figure is
the median time of a forward and a backward pass. A least-squares line is fitted to each series; R² measures the fit.
"""

import argparse
import statistics
import time

import retro_np

# isort: split
import numpy as np
from train_step import setting
from turns import machine, save

import retro_np.nn.attention as blocks

NEIGHBOURS, LENGTHS = (1, 2, 4, 8, 12, 16), (512, 1024, 2048, 3072, 4096)
_causal = [0.0]  # seconds in causal self-attention


def counted(kernel):
    """The kernel, with its time added to _causal if it is causal self-attention."""

    def call(*args, causal_offset=None, **masks):
        start = time.perf_counter()
        out = kernel(*args, causal_offset=causal_offset, **masks)
        if causal_offset is not None:
            _causal[0] += time.perf_counter() - start
        return out

    return call


def step_seconds(config, params, n, k, rounds):
    """Median seconds of a forward and a backward pass of one sequence: (without causal self-attention, in it)."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(1, config.vocabulary_size, (2, 1, n))
    m = config.chunk_size
    neighbours = rng.integers(1, config.vocabulary_size, (1, n // m, k, 2 * m))
    steps = []
    for number in range(rounds + 1):
        _causal[0], start = 0.0, time.perf_counter()
        _, vjp = retro_np.retro_loss(params, config, tokens, targets, neighbours)
        vjp(1.0)
        total = time.perf_counter() - start
        if number:  # the first step warms up
            steps.append((total - _causal[0], _causal[0]))
    return tuple(statistics.median(column) for column in zip(*steps, strict=True))


def line(x, y):
    """(slope, intercept, R²) of the least-squares line."""
    slope, intercept = np.polyfit(x, y, 1)
    residuals = np.asarray(y) - (slope * np.asarray(x) + intercept)
    return float(slope), float(intercept), float(1 - residuals.var() / np.var(y))


def draw(series, path):
    """Plot both series as points, with their lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    for panel, (name, (x, y, causal)) in zip(panels, series.items(), strict=True):
        slope, intercept, r_squared = line(x, y)
        panel.plot(x, 1e3 * np.array(y), "o", label=f"without self-attention (R² of the line {r_squared:.3f})")
        panel.plot(x, 1e3 * (slope * np.array(x) + intercept), "-", color="C0", alpha=0.5)
        panel.plot(x, 1e3 * np.array(causal), "s--", color="C1", label="causal self-attention")
        panel.set(xlabel=name, ylabel="ms, forward and backward", ylim=(0, None), xlim=(0, None))
        panel.legend(frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    """Print, plot and save the two series."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", help="write the plot")
    parser.add_argument("-o", "--out", help="write the figures as JSON")
    options = parser.parse_args()
    blocks.attention_forward, blocks.attention_backward = map(
        counted, (blocks.attention_forward, blocks.attention_backward)
    )
    config, params, *_ = setting()
    by_keys = [step_seconds(config, params, 512, k, options.rounds) for k in NEIGHBOURS]
    by_length = [step_seconds(config, params, n, 2, options.rounds) for n in LENGTHS]
    series = {
        "k · r, keys of a chunk (n 512)": (
            [2 * config.chunk_size * k for k in NEIGHBOURS],
            *zip(*by_keys, strict=True),
        ),
        "n, tokens (k 2, r 128)": (list(LENGTHS), *zip(*by_length, strict=True)),
    }
    for name, (x, y, causal) in series.items():
        print(name)
        for size, seconds, causal_seconds in zip(x, y, causal, strict=True):
            print(f"  {size:5} {1e3 * seconds:8.0f} ms, and {1e3 * causal_seconds:.0f} in causal self-attention")
        print(f"  least-squares line: R² {line(x, y)[2]:.4f}")
    if options.plot:
        draw(series, options.plot)
    save(options.out, {"series": series, "machine": machine()})


if __name__ == "__main__":
    main()
