"""What retro_np.gradcheck and four other gradient checkers say of planted bugs and of correct functions.

python benchmarks/gradcheck.py [--seeds 20] [--peers torch,torch-fast,jax,autograd] [--peer-seeds 1] [--only KIND]
                               [-o results.json]      measure
python benchmarks/gradcheck.py --write    rewrite the tables in docs/gradcheck.md from benchmarks/results/gradcheck.json
python benchmarks/gradcheck.py --check    exit with status 1 if the page does not show these results

The bugs and their correct twins are in tests/planted_bugs.py, the pairs of a correct function and a scale in
tests/scaled_functions.py. Every checker runs at its defaults. A seed draws the arguments. A checker catches a bug if it
raises or returns False with every seed. An alarm at a twin or at a pair, with any seed, is a false alarm.

The peers take float64 arrays and return one array or a tuple of arrays, so `Flat` splits trees into their arrays,
converts float32 data to float64 and binds integer and boolean data. What a peer cannot take is counted as not run.
"""

import argparse
import importlib
import importlib.util
import sys
import time
import warnings
from collections import Counter
from importlib import metadata

import retro_np  # noqa: F401  imported first, so that BLAS threads sleep as they do in the commands

# isort: split
import numpy as np
from report import ROOT, results, table, write_sections
from turns import machine, save

from retro_np import GradientError, gradcheck
from retro_np.tree import LeafFunction, children, flatten, kind_of, unflatten

OURS = "retro_np"
COLUMNS = {
    OURS: "retro_np",
    "torch": "PyTorch",
    "torch-fast": "PyTorch, fast_mode",
    "jax": "JAX",
    "autograd": "autograd",
}
PACKAGES = {"torch": "torch", "torch-fast": "torch", "jax": "jax", "autograd": "autograd"}
VERDICTS = {None: "right", True: "right", False: "wrong"}  # of peers, which return nothing or a bool
# The verdict over several seeds is the first of these that occurred; the last one is the correct verdict.
GROUPS = {
    "bugs": ("not run", "right", "cannot tell", "wrong"),
    "twins": ("not run", "wrong", "cannot tell", "right"),
    "pairs": ("not run", "wrong", "cannot tell", "right"),
}
MAX_JACOBIAN = 2**26  # torch.autograd.gradcheck stores two dense Jacobians of this many entries in 1 GiB


class NotRun(Exception):
    """A checker cannot take this function."""


class Flat:
    """A function of trees as a function of its floating-point arrays.

    flat(*arrays) -> (tuple of value arrays, pullback), where pullback(*cotangents) returns one gradient per array: an
    array, or None if the function returned None. `flat.arrays` are the arguments' floating-point leaves in float64.
    Raises ValueError if the gradients do not have the form of the arguments.
    """

    def __init__(self, f, arguments):
        self.function = LeafFunction(f, arguments)
        self.arrays = tuple(self.function.copies(np.float64))

    def __call__(self, *arrays):
        value, vjp = self.function.call(list(arrays), watched=False)  # what peers do not watch is not reported for them
        outputs = [leaf for _, leaf in flatten(value)]
        if any(np.iscomplexobj(output) for output in outputs):
            raise NotRun  # The peers differentiate complex functions, so to them this is not a bug.

        def pullback(*cotangents):
            single = children(value) is None and np.ndim(value) == 0
            grads = vjp(float(cotangents[0]) if single else unflatten(value, iter(cotangents)))
            arguments = self.function.arguments
            by_leaf = matched(arguments, one_per_argument(grads, arguments))
            return tuple(None if by_leaf[n] is None else contiguous(by_leaf[n]) for n in self.function.numbers)

        return tuple(contiguous(output) for output in outputs), pullback


def one_per_argument(grads, arguments):
    """The tuple of gradients that a pullback returned, with None for integer arguments that it left out."""
    if len(arguments) == 1 and not (type(grads) is tuple and len(grads) == 1):
        return (grads,)
    if len(grads) != len(arguments):
        remaining = iter(grads)
        floating = [any(kind_of(leaf) == "f" for _, leaf in flatten(argument)) for argument in arguments]
        if sum(floating) != len(grads):
            raise ValueError(f"{len(grads)} gradients for {len(arguments)} arguments")
        return tuple(next(remaining) if moves else None for moves in floating)
    return tuple(grads)


def matched(tree, grads):
    """The gradient of each leaf of a tree, None for a whole tree of None.

    Unlike the library, it does not look at shapes, because that is for the peers to notice.
    """
    named = children(tree)
    if named is None or grads is None:
        return [grads for _ in flatten(tree)]
    given = dict(children(grads) or ())
    if set(given) != {name for name, _ in named}:
        raise ValueError("the gradients do not have the form of the arguments")
    return [leaf for name, part in named for leaf in matched(part, given[name])]


def contiguous(array):
    """The array itself if it is contiguous, or a copy: PyTorch does not take negative strides."""
    return np.asarray(array, order="C")


def tuple_or_bare(values):
    """A tuple of several values, or the only value itself."""
    return values if len(values) > 1 else values[0]


def check_ours(f, arguments, seed):
    """The verdict of retro_np.gradcheck. The functions need no wrapper."""
    try:
        gradcheck(f, *arguments)
    except GradientError as error:
        undecided = {row.verdict for row in error.report.rows} & {"wrong", "cannot tell"} == {"cannot tell"}
        return "cannot tell" if undecided else "wrong"
    return "right"


def check_torch(f, arguments, seed, **options):
    """torch.autograd.gradcheck of a torch.autograd.Function whose backward calls the pullback.

    Tensors and arrays share their memory, as in x.detach().numpy().
    """
    import torch

    flat = Flat(f, arguments)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            values, ctx.pullback = flat(*(tensor.detach().numpy() for tensor in tensors))
            if not options and sum(x.size for x in flat.arrays) * sum(y.size for y in values) > MAX_JACOBIAN:
                raise NotRun
            return tuple_or_bare(tuple(torch.from_numpy(value) for value in values))

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, *cotangents):
            grads = ctx.pullback(*(cotangent.numpy() for cotangent in cotangents))
            return tuple(None if grad is None else torch.from_numpy(grad) for grad in grads)

    torch.manual_seed(seed)
    tensors = tuple(torch.tensor(array, requires_grad=True) for array in flat.arrays)
    return torch.autograd.gradcheck(Function.apply, tensors, **options)


def check_jax(f, arguments, seed):
    """jax.test_util.check_vjp of the NumPy function and its pullback, in float64."""
    import jax

    jax.config.update("jax_enable_x64", True)
    flat = Flat(f, arguments)

    def value_and_vjp(*arrays):
        values, pullback = flat(*arrays)
        return tuple_or_bare(values), lambda dy: pullback(*(dy if isinstance(dy, tuple) else (dy,)))

    importlib.import_module("jax.test_util").check_vjp(
        lambda *arrays: value_and_vjp(*arrays)[0], value_and_vjp, flat.arrays
    )


def check_autograd(f, arguments, seed):
    """autograd.test_util.check_vjp of a primitive, whose vjp is the pullback of the call that computed the value."""
    import autograd.numpy  # noqa: F401  registers NumPy's types
    from autograd import extend, test_util

    flat, pullbacks = Flat(f, arguments), []

    @extend.primitive
    def function(*arrays):
        values, pullback = flat(*arrays)
        pullbacks[:] = [pullback]
        return tuple_or_bare(values)

    def vjp_of(argnums, answer, arrays, kwargs):
        (pullback,) = pullbacks
        return lambda dy: [pullback(*(dy if isinstance(dy, tuple) else (dy,)))[i] for i in argnums]

    extend.defvjp_argnums(function, vjp_of)
    np.random.seed(seed)  # noqa: NPY002  check_vjp draws from the global generator
    test_util.check_vjp(lambda arrays: function(*arrays), flat.arrays)


CHECKERS = {
    OURS: check_ours,
    "torch": check_torch,
    "torch-fast": lambda *case: check_torch(*case, fast_mode=True),
    "jax": check_jax,
    "autograd": check_autograd,
}


def verdict(checker, f, draw, seed):
    """("right", "wrong", "cannot tell" or "not run", CPU seconds). draw(rng) -> the arguments."""
    arguments = draw(np.random.default_rng(seed))
    start = time.process_time()
    try:
        answer = CHECKERS[checker](f, arguments, seed)
    except NotRun:
        answer = "not run"
    except Exception:  # Peers raise all kinds of exceptions to say no.
        if checker == OURS:
            raise
        answer = "wrong"
    return VERDICTS.get(answer, answer), time.process_time() - start


def measured(checker, seeds, bugs, pairs):
    """What a checker gets wrong, {group: {verdict: names}}, and its CPU seconds for one seed.

    The names of cases with the correct verdict are left out.
    """
    cases = [("bugs", f"{bug.kind}: {bug.name}", bug.wrong, bug.arguments) for bug in bugs]
    cases += [("twins", f"{bug.kind}: {bug.operator}", bug.correct, bug.arguments) for bug in with_own_twin(bugs)]
    cases += [("pairs", pair.name, pair.f, pair.arguments) for pair in pairs]
    verdict(checker, lambda x: (x * x, lambda dy: 2 * x * dy), lambda rng: (rng.standard_normal(3),), 0)  # imports
    row = {"seeds": seeds, "cpu_seconds": 0.0, **{group: {} for group in GROUPS}}
    for group, name, f, draw in cases:
        answers, seconds = zip(*(verdict(checker, f, draw, seed) for seed in range(seeds)), strict=True)
        row["cpu_seconds"] += sum(seconds) / seeds
        answer = min(answers, key=GROUPS[group].index)
        if answer != GROUPS[group][-1]:
            row[group].setdefault(answer, []).append(name)
    return row


def with_own_twin(bugs):
    """One bug for each correct twin, which the bugs of an operator have in common."""
    return list({(bug.kind, bug.operator): bug for bug in bugs}.values())


def count(names, kind=None):
    """How many names there are, or how many of a kind of bug."""
    return sum(kind is None or name.startswith(f"{kind}: ") for name in names)


def of_run(row, total, kind=None):
    """(bugs caught, bugs run), of all kinds or of one."""
    run = total - count(row["bugs"].get("not run", ()), kind)
    return run - count(row["bugs"].get("right", ()), kind), run


def print_row(checker, row, figures):
    """Print one line about a checker."""
    hits, run = of_run(row, sum(figures["kinds"].values()))
    alarms = [f"{len(row[group].get('wrong', ()))} at {group}" for group in ("twins", "pairs")]
    undecided = sum(len(row[group].get("cannot tell", ())) for group in GROUPS)
    print(
        f"{checker:11}{hits:4} of {run} bugs caught, false alarms {' and '.join(alarms)}, "
        f"{undecided} times cannot tell, {row['cpu_seconds']:.2f} s of CPU",
        flush=True,
    )


def summary():
    """The totals of each checker, and where they were measured."""
    figures = results("gradcheck")
    checkers, bugs = figures["checkers"], sum(figures["kinds"].values())
    rows = {
        f"bugs caught, of {bugs}": lambda row: of_run(row, bugs)[0],
        "bugs not run": lambda row: len(row["bugs"].get("not run", ())),
        f"false alarms at {figures['twins']} correct twins": lambda row: len(row["twins"].get("wrong", ())),
        f"false alarms at {figures['pairs']} pairs of a function and a scale": lambda row: len(
            row["pairs"].get("wrong", ())
        ),
        "“cannot tell” at a bug, a twin, a pair": lambda row: ", ".join(
            str(len(row[group].get("cannot tell", ()))) for group in GROUPS
        ),
        "CPU seconds for one seed": lambda row: f"{row['cpu_seconds']:.2f}",
    }
    facts = figures["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    seeds = " and ".join(
        dict.fromkeys(f"{row['seeds']} for {OURS if name == OURS else 'the others'}" for name, row in checkers.items())
    )
    return [
        table(
            ["", *(COLUMNS[name] for name in checkers)],
            [[title, *(cell(row) for row in checkers.values())] for title, cell in rows.items()],
        ),
        f"`{figures['command']}` on {facts['cores']} cores of an {facts['processor']} with {versions}. Seeds: {seeds}.",
    ]


def kinds():
    """The bugs caught of each kind."""
    figures = results("gradcheck")
    rows = []
    for kind, total in figures["kinds"].items():
        cells = (of_run(row, total, kind) for row in figures["checkers"].values())
        rows.append([kind, total, *(str(hits) if run == total else f"{hits} of {run}" for hits, run in cells)])
    return [table(["kind of bug", "bugs", *(COLUMNS[name] for name in figures["checkers"])], rows)]


SECTIONS = {"summary": summary, "kinds": kinds}


def collections(only):
    """The planted bugs and the pairs whose kind or name contains `only`."""
    sys.path.insert(0, str(ROOT / "tests"))
    from planted_bugs import BUGS
    from scaled_functions import PAIRS

    return [bug for bug in BUGS if only in bug.kind], [pair for pair in PAIRS if only in pair.name]


def chosen(options):
    """{checker: number of seeds}, without the peers that are not installed, which one line names."""
    peers = [name for name in options.peers.split(",") if name]
    if unknown := set(peers) - {*PACKAGES}:
        raise SystemExit(f"{', '.join(sorted(unknown))}: not a peer; choose from {', '.join(PACKAGES)}")
    missing = {PACKAGES[name]: None for name in peers if importlib.util.find_spec(PACKAGES[name]) is None}
    if missing:
        print(f"Left out, because not installed: pip install {' '.join(missing)}", file=sys.stderr)
    return {OURS: options.seeds} | {name: options.peer_seeds for name in peers if PACKAGES[name] not in missing}


def main():
    """Measure and save, or rewrite or check the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="seeds of the arguments for retro_np")
    parser.add_argument("--peer-seeds", type=int, default=1, help="seeds of the arguments for its peers")
    parser.add_argument("--peers", default=",".join(PACKAGES), help="separated by commas; may be empty")
    parser.add_argument("--only", default="", help="only kinds of bugs and functions whose name contains this")
    parser.add_argument("-o", "--out", help="write the figures as JSON")
    parser.add_argument("--write", action="store_true", help="rewrite the tables in docs/gradcheck.md")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if the page does not show the results")
    options = parser.parse_args()
    if options.write or options.check:
        sections = {name: "\n\n".join(make()) for name, make in SECTIONS.items()}
        return write_sections(ROOT / "docs" / "gradcheck.md", "gradcheck.py --write", sections, options.check)
    bugs, pairs = collections(options.only)
    if not bugs and not pairs:
        raise SystemExit(f"no kind of bug and no function has {options.only!r} in its name")
    facts = machine()
    facts["versions"] = {name: metadata.version(name) for name in ("retro-np", "numpy")}
    figures = {
        "command": " ".join(["python benchmarks/gradcheck.py", *sys.argv[1:]]),
        "kinds": Counter(bug.kind for bug in bugs),
        "twins": len(with_own_twin(bugs)),
        "pairs": len(pairs),
        "checkers": {},
        "machine": facts,
    }
    for checker, seeds in chosen(options).items():
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # Functions overflow at extreme scales; peers warn of read-only arrays.
            figures["checkers"][checker] = row = measured(checker, seeds, bugs, pairs)
        if checker != OURS:
            facts["versions"][PACKAGES[checker]] = metadata.version(PACKAGES[checker])
        print_row(checker, row, figures)
    save(options.out, figures)


if __name__ == "__main__":
    main()
