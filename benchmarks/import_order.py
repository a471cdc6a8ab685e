"""A training step with retro_np imported first, after NumPy, after PyTorch, and before PyTorch, timed in turns.

    python benchmarks/import_order.py [--rounds 15] [-o results.json]

The step is that of train_step.py. Each order of imports has its own process, and all of them must end in the same bits.
retro_np lets BLAS's threads sleep in any order (`retro_np/runtime.py`), but not in the last row, which keeps OpenBLAS's
default. The smallest time of the rounds is given beside the median, because a busy machine only ever adds to a time.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time

IMPORTS = {
    "retro_np first": "import retro_np",
    "NumPy first": "import numpy, retro_np",
    "PyTorch first": "import torch, numpy, retro_np",
    "PyTorch last": "import retro_np, torch",
    "NumPy first, spinning": "import numpy, retro_np",
}
SPINNING = ("NumPy first, spinning",)
DEFAULT_TIMEOUT = "26"  # of OpenBLAS's idle threads, log₂ of the processor's cycles; retro_np keeps what a user has set
CODE = "{imports}\nimport sys\nsys.path.insert(0, {folder!r})\nimport import_order\nimport_order.serve()"
PAUSE_SECONDS = 0.2  # before a turn, so that the threads of the previous process fall asleep


def serve():
    """Take two steps for each line of input, and print the second's seconds and a hash of the parameters."""
    import train_step

    import retro_np
    from retro_np.tree import named_leaves

    config, params, *batch = train_step.setting()
    state = retro_np.adamw_init(params)

    def step():
        _, vjp = retro_np.retro_loss(params, config, *batch)
        retro_np.adamw_update(params, vjp(1.0), state, lr=1e-4)

    for _ in sys.stdin:
        step()
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        parameters = hashlib.sha256(b"".join(leaf.tobytes() for _, leaf in named_leaves(params)))
        print(json.dumps([seconds, parameters.hexdigest()]), flush=True)


def turn(process):
    """The seconds of a step in this process, and the hash of the parameters after it."""
    time.sleep(PAUSE_SECONDS)
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def main():
    """Print one row per order of imports, and save them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("-o", "--out", help="write the figures as JSON")
    options = parser.parse_args()
    processes, folder = {}, os.path.dirname(os.path.abspath(__file__))
    for name, imports in IMPORTS.items():
        environment = {key: value for key, value in os.environ.items() if key != "OPENBLAS_THREAD_TIMEOUT"}
        environment |= {"OPENBLAS_THREAD_TIMEOUT": DEFAULT_TIMEOUT} if name in SPINNING else {}
        command = [sys.executable, "-c", CODE.format(imports=imports, folder=folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes[name] = subprocess.Popen(command, env=environment, **pipes)
    turns = [{name: turn(process) for name, process in processes.items()} for _ in range(1 + options.rounds)][1:]
    for process in processes.values():
        process.stdin.close()
    if any(len({parameters for _, parameters in row.values()}) > 1 for row in turns):
        raise SystemExit("the orders of imports end in different parameters")
    rows, first = {}, next(iter(IMPORTS))
    for name in IMPORTS:
        ratios = sorted(row[name][0] / row[first][0] for row in turns)
        seconds = [row[name][0] for row in turns]
        rows[name] = {"seconds": statistics.median(seconds), "least": min(seconds)}
        rows[name] |= {"times_ours": statistics.median(ratios), "from": ratios[0], "to": ratios[-1]}
        rows[name] |= {"least_ratio": min(seconds) / rows[first]["least"]}
        print(f"{name:22} {rows[name]['seconds']:6.2f} s   {rows[name]['times_ours']:5.2f} × retro_np first "
              f"({ratios[0]:.2f} … {ratios[-1]:.2f})   least {min(seconds):.2f} s, "
              f"{rows[name]['least_ratio']:.2f} ×")  # fmt: skip
    import retro_np  # noqa: F401 — after the measurement, for the machine's versions

    # isort: split
    from turns import machine, save

    save(options.out, {"rows": rows, "machine": machine()})


if __name__ == "__main__":
    main()
