"""How a check judges an answer: run it on cases, compare, and say in one message what is wrong.

A check is a generator over cases. It yields a message for each, empty if the case is right:

    @exercise("5.1", "reads", right="each token reads what the library lays out for it")
    def check_5_1(reads):
        for m in range(1, 6):
            yield compare(reads(np.arange(5 * m), m), expected, where=f"m = {m}")

`check_5_1` is then a function that takes the reader's `reads`, prints one message and returns True or False."""

import contextlib
import functools
import importlib
import inspect
import io
import json
import re
import traceback
import warnings
from collections.abc import Hashable
from pathlib import Path

import numpy as np

from retro_np import gradcheck

TUTORIALS = Path(__file__).parents[1]
STOPS = (Exception, SystemExit)  # what may come from the reader's code; Ctrl-C is not among them
CLOSE, CLOSE_32 = 1e-6, 1e-4  # relative to the largest expected entry; the second if either side is float32


def exercise(number, *names, right):
    """Make a check of a generator over cases.

    number: of the exercise, as "5.1". names: of the functions that the reader writes, the check's arguments.
    right: what was compared with what, the message when all cases are right."""

    def decorate(cases):
        @functools.wraps(cases)
        def check(*functions):
            run = Run(cases, names, functions)
            if run.unanswered:
                print(f"{number} is not answered yet: {run.unanswered}")
            elif run.message:
                hint = hint_for(check, run)
                print(f"{number} is not right yet: {run.message}." + (f"\nHint: {hint}" if hint else ""))
            else:
                print(f"{number} is right: {right}.")
            return not (run.unanswered or run.message)

        check.number, check.names, check.cases = number, names, cases
        return check

    return decorate


class Stopped(Exception):
    """A case cannot go on. The text is the message."""


class Run:
    """One run of a check's cases.

    message: of the first case that is not right, or empty. unanswered: which function was not written yet, or empty.
    results: everything that the functions returned, in order. messages: of all cases that are not right. Two answers
    with the same results, or with the same messages, make the same mistake."""

    def __init__(self, cases, names, functions):
        self.results, self.messages, self.message, self.unanswered = [], [], "", ""
        self.returned = {name: [] for name in names}
        if len(functions) != len(names):
            called_as, asked = f"{cases.__name__}({', '.join(names)})", "function" if len(names) == 1 else "functions"
            self.unanswered = f"the check asks for {len(names)} {asked}, {called_as}, not for {len(functions)}"
            return
        watched = [self.watch(name, f) for name, f in zip(names, functions, strict=True)]
        try:
            self.messages += filter(None, cases(*watched))  # All cases are run, so that they tell mistakes apart.
        except Stopped as stop:
            self.messages.append(str(stop))
        except STOPS as error:  # The check's own line fails because what came has an unexpected form.
            self.messages.append(f"what came cannot be compared ({type(error).__name__}: {error})")
        self.message = self.messages[0] if self.messages else ""
        for name, f in zip(names, functions, strict=True):
            calls = self.returned[name]
            if self.message and (not callable(f) or (calls and not any(calls))):
                self.unanswered = f"{called(name, f)} returns None" if callable(f) else f"{name} is no function"
                break

    def watch(self, name, f, of=None):
        """The function f, recorded: what it returns, whether it fails, and whether it overwrites an argument.

        of: if f is a pullback, the arguments of the function that returned it, in words."""

        @functools.wraps(f if callable(f) else compare)
        def watched(*arguments, **options):
            given, case = copied(arguments), [*(of or []), *in_words(f, arguments)]
            try:
                result = f(*given, **options)
            except NotImplementedError:
                result = None
            except STOPS as error:
                self.results.append(f"{type(error).__name__}: {error}")
                raise Stopped(failure(name, error) + place(", ".join(case))) from error
            if not same(given, arguments):
                raise Stopped(f"{name} overwrites an argument, which its caller may need: work on a copy")
            if of is None:
                self.returned[name].append(result is not None and result is not ...)
            if inspect.isgenerator(result):
                raise Stopped(f"wrong form: {name} returns a generator: return the values themselves")
            self.results.append(copied(result))
            if isinstance(result, tuple | list):  # A pullback among the results is watched, too.
                parts = [self.watch(f"the pullback of {name}", x, of=case) if callable(x) else x for x in result]
                result = type(result)(parts) if type(result) in (tuple, list) else result
            return result

        watched.original = f
        return watched


def hint_for(check, run):
    """The hint of the known mistake that is most like a run, or an empty text.

    Like are, from the most to the least: the same results and messages; the same results, and a first message in the
    same words; the same messages; the same first message about an array, since no two mistakes agree so by chance."""
    alike = []
    for mistake in mistakes_of(check):
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            other = Run(check.cases, check.names, mistaken(check, mistake))
        results, messages = same(run.results, other.results), run.messages == other.messages
        first = run.message == other.message and "off by up to" in run.message
        words = without_numbers(run.message) == without_numbers(other.message)
        ways = results and messages, results and words, messages, first
        alike += [(ways.index(True), len(alike), mistake["hint"])] if any(ways) else []
    return min(alike)[-1] if alike else ""


# What tests use as well


def answers_of(check):
    """Our answers to a check's exercise: its functions, from answers/tutorial_NN.py."""
    module = importlib.import_module(f"retro_np.tutorials.answers.{check.__module__.rpartition('.')[2]}")
    return [getattr(module, name) for name in check.names]


def mistakes_of(check):
    """The known mistakes of a check's exercise, from mistakes/NN.json: a list of {"old", "new", "hint"}."""
    path = TUTORIALS / "mistakes" / f"{check.__module__[-2:]}.json"
    return json.loads(path.read_text("utf-8")).get(check.number, []) if path.exists() else []


def mistaken(check, mistake):
    """Our answers with a mistake in them: in their text, "old", which occurs once, is replaced by "new"."""
    path = TUTORIALS / "answers" / f"tutorial_{check.__module__[-2:]}.py"
    text = path.read_text("utf-8")
    if text.count(mistake["old"]) != 1:
        raise ValueError(f"{path.name} has {text.count(mistake['old'])} times, not once: {mistake['old']}")
    namespace = {"__name__": "mistaken"}
    exec(compile(text.replace(mistake["old"], mistake["new"]), f"{path.name} with a mistake", "exec"), namespace)
    return [namespace[name] for name in check.names]


# What checks yield


def compare(got, expected, what="what came", parts=(), where="", close=None):
    """What is wrong with `got`, or an empty text.

    expected: an array or a number; a text; None; a tuple or list of these, one for each part; a dict; a set. A list is
    as good as a tuple or an array, and float32 as good as float64.
    what: what to call it. parts: what to call the parts of a tuple. where: the case, as "m = 3". close: the relative
    tolerance, if it is not to be 1e-6, or 1e-4 where float32 is involved; integers are compared exactly."""
    message = difference(got, expected, what, parts, close)
    return f"{message} ({where})" if message and where else message


def holds(condition, message, where=""):
    """The message unless the condition is true; for what has more than one right answer."""
    return "" if condition else f"{message} ({where})" if where else message


def pullback(f, *arguments, expected=None, parts=(), where="", close=None, **options):
    """What is wrong with a function of the reader's that returns its value and its pullback, or an empty text.

    expected: value and pullback of the library, of a reference or of our answer at the same arguments. Then value and
    gradients are compared with them, part by part. In any case finite differences are: see `gradcheck`.
    parts: what to call the arguments that have a gradient; if none are given, all that are not integers.
    options: arguments of f by name, which have no gradient."""
    result = value_and_pullback(f(*arguments, **options))
    if result is None:
        came = description(f.__wrapped__(*copied(arguments), **options))
        return f"wrong form: what came is {came}; asked for are the value and its pullback, y, vjp{place(where)}"
    value, vjp = result
    parts = parts or differentiated(f, arguments)
    if expected is not None:
        message = compare(value, expected[0], "the value", where=where, close=close)
        if message:
            return message
        dy = cotangent(expected[0])
        gradients, theirs = vjp(dy), expected[1](copied(dy))
        theirs = theirs if isinstance(theirs, tuple | list) else (theirs,)
        labels = [f"the gradient of {part}" for part in parts]
        message = compare(gradients, tuple(theirs), "the pullback's answer", labels, where, close)
        if message:
            return f"the value is right, but {message}"
    single = any(np.asarray(y).dtype == np.float32 for y in (value if isinstance(value, tuple | list) else [value]))
    for seed in range(3):  # A wrong pullback fails with each; a right one whose gradient nearly cancels, with one.
        settings = {"raise_exception": False, "tolerance": 1e-3 if single else None, "seed": seed}
        try:
            report = gradcheck(plain(functools.partial(f.original, **options)), *arguments, **settings)
        except STOPS as error:
            return failure(f.__name__, error) + place(where)
        if report or (expected is not None and not any(row.verdict == "wrong" for row in report.rows)):
            break  # Where the differences cannot tell, the comparison above has told.
    else:
        rows = [row for row in report.rows if row.verdict in ("wrong", "cannot tell")]
        text = report.message.splitlines()[0]
        for row in rows:
            text = text.replace(f"argument {row.argument}", f"the gradient of {row.name}")
        return f"finite differences disagree with the pullback: {text}{place(where)}"
    return ""


# Parts of the above


def difference(got, expected, what, parts=(), close=None):
    """What is wrong with `got`, without the case."""
    if callable(got) or (got is None) != (expected is None):
        return form(got, expected, what, parts)
    if expected is None:
        return ""
    if isinstance(expected, str):
        return "" if isinstance(got, str) and got == expected else text_difference(got, expected, what)
    if isinstance(expected, set | frozenset):
        if isinstance(got, str | dict) or not is_sized(got) or not all(isinstance(x, Hashable) for x in got):
            return form(got, expected, what)
        lost, more = expected - set(got), set(got) - expected
        lacking = f"{what} lacks {some(lost)}" if lost else ""
        return lacking or (f"{what} has {some(more)}, which should not be there" if more else "")
    if isinstance(expected, dict):
        if not isinstance(got, dict):
            return form(got, expected, what)
        lost, more = [x for x in expected if x not in got], [x for x in got if x not in expected]
        if lost or more:
            wrong = (f"lacks {some(lost)}" if lost else ""), (f"has {some(more)}, not asked for" if more else "")
            return f"{what} {' and '.join(filter(None, wrong))}"
        gradient = what.startswith("the gradient of")
        for key in expected:
            message = difference(got[key], expected[key], f"the gradient of {key}" if gradient else f"{key}", (), close)
            if message:
                return message
        return ""
    if isinstance(expected, tuple) or (isinstance(expected, list) and not is_array(expected)):
        if isinstance(expected, tuple) and len(expected) == 1 and not isinstance(got, tuple | list):
            got = (got,)  # A single part needs no tuple.
        if isinstance(got, str | dict) or not is_sized(got) or len(got) != len(expected):
            return form(got, expected, what, parts)
        names = parts or [f"part {number} of {what}" for number in range(len(expected))]
        messages = (difference(*three, (), close) for three in zip(got, expected, names, strict=True))
        message = next(filter(None, messages), "")
        return (message and another_order(got, expected, what, names, close)) or message
    return array_difference(got, np.asarray(expected), what, close)


def another_order(got, expected, what, names, close):
    """That a tuple has the right parts in a wrong order, or an empty text."""
    equal = [[number for number, x in enumerate(expected) if not difference(part, x, "", (), close)] for part in got]
    if sorted(equal) != [[number] for number in range(len(expected))]:
        return ""
    place, number = next((place, number) for place, (number,) in enumerate(equal) if number != place)
    return f"{what} has the right parts in a wrong order: {names[number]} stands where {names[place]} is asked for"


def array_difference(got, expected, what, close):
    """What is wrong with an array or a number."""
    if isinstance(got, str | dict | set) or not is_array(got):
        return form(got, expected, what)
    got = np.asarray(got)
    if not (got.size or expected.size):
        return ""  # An empty list does not have all axes.
    if got.shape != expected.shape and got.ndim == expected.ndim == 1 and max(got.size, expected.size) <= 8:
        return f"{what} is {got.tolist()}, not {expected.tolist()}"
    if got.shape != expected.shape:
        return f"the shape of {what} is {got.shape}, not {expected.shape}"
    mine, theirs = got.astype(np.float64), expected.astype(np.float64)
    if expected.dtype.kind == "f":
        single = (got.dtype.itemsize < 8 and got.dtype.kind == "f") or expected.dtype.itemsize < 8
        close = close or (CLOSE_32 if single else CLOSE)
        allowed = close * np.max(np.abs(theirs), where=np.isfinite(theirs), initial=0)
    else:
        allowed = 0
    with np.errstate(invalid="ignore"):
        wrong = ~((np.abs(mine - theirs) <= allowed) | (mine == theirs) | (np.isnan(mine) & np.isnan(theirs)))
        size = np.max(np.abs(mine - theirs)[wrong], initial=0)
    if not wrong.any():
        return ""
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    came, asked = both(got[first], expected[first])
    if not got.ndim:
        return f"{what} is {came}, not {asked}"
    if not np.isfinite(size):
        infinite = np.sum(~np.isfinite(mine))
        return f"{what} is not finite in {infinite} entries; first wrong at {list(first)}: {came}, not {asked}"
    if expected.dtype.kind != "f":
        return f"{what} is wrong in {wrong.sum()} of {wrong.size} entries; first at {list(first)}: {came}, not {asked}"
    return f"{what} is off by up to {size:.2g}; first at {list(first)}: {came}, not {asked}"


def both(got, expected):
    """Two numbers in as many digits as tell them apart."""
    if np.asarray(expected).dtype.kind != "f" and np.asarray(got).dtype.kind != "f":
        return str(got), str(expected)
    for digits in range(4, 17):
        texts = f"{got:.{digits}g}", f"{expected:.{digits}g}"
        if texts[0] != texts[1]:
            break
    return texts


def text_difference(got, expected, what):
    """Where a text departs from another first."""
    if not isinstance(got, str):
        return form(got, expected, what)
    same_until = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), None)
    at = min(len(got), len(expected)) if same_until is None else same_until
    begin = max(at - 10, 0)
    return f"{what} differs at character {at}: {got[begin : at + 20]!r}, not {expected[begin : at + 20]!r}"


def form(got, expected, what, parts=()):
    """That a result has another form than was asked for."""
    return f"wrong form: {what} is {description(got)}; asked for is {description(expected, parts)}"


def description(x, parts=()):
    """What a result is, in words."""
    if x is None or x is ...:
        return str(x)
    if callable(x):
        return "a function"
    if isinstance(x, str):
        return f"the text {x[:30]!r}"
    if isinstance(x, dict):
        return f"a dict with {some(x)}"
    if isinstance(x, set | frozenset):
        return f"a set of {len(x)}"
    if isinstance(x, tuple) or (isinstance(x, list) and not is_array(x)):
        listed = [part.removeprefix("the ") for part in parts]
        listed = listed or [kind_of(y) if isinstance(y, tuple | list) else description(y) for y in x[:4]]
        names = ", ".join(listed)
        return f"{kind_of(x)} of {len(x)} ({names}{', …' if len(x) > 4 and not parts else ''})"
    if not is_array(x):
        return kind_of(x)
    shape = np.shape(x)
    return f"an array of shape {shape}" if shape else f"the number {x}"


def kind_of(x):
    """The type of a result with its article: "a list", "an int"."""
    name = type(x).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def some(names):
    """A few names, in order."""
    names = [str(name) for name in (sorted(names, key=str) if isinstance(names, set | frozenset) else names)]
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def is_array(x):
    """Whether a result can be read as an array of real numbers."""
    try:
        return np.asarray(x).dtype.kind in "fiub"
    except Exception:  # rows of different lengths, or an object of the reader's that cannot be read
        return False


def is_sized(x):
    """Whether a result has parts that can be counted, unlike a generator."""
    return np.iterable(x) and hasattr(x, "__len__")


def place(where):
    return f" ({where})" if where else ""


def value_and_pullback(result):
    """(value, pullback) of what a function returned, in either order; None if it is not these two."""
    if not isinstance(result, tuple | list) or len(result) != 2 or callable(result[0]) == callable(result[1]):
        return None
    return (result[1], result[0]) if callable(result[0]) else (result[0], result[1])


def plain(f):
    """f for `gradcheck`, where lists are as good as tuples."""

    @functools.wraps(f)
    def wrapped(*arguments):
        value, vjp = value_and_pullback(f(*arguments))
        value = tuple(value) if isinstance(value, list) and not is_array(value) else value
        value = np.asarray(value) if isinstance(value, list) else value

        def pull(dy):
            answer = vjp(dy)
            return tuple(answer) if isinstance(answer, list) else answer

        return value, pull

    return wrapped


def differentiated(f, arguments):
    """The names of the parameters whose arguments have a gradient: all but integers and booleans."""

    def has_floats(x):
        if isinstance(x, dict):
            return any(map(has_floats, x.values()))
        return any(map(has_floats, x)) if isinstance(x, tuple | list) else np.asarray(x).dtype.kind == "f"

    names = list(inspect.signature(f.original).parameters)[: len(arguments)]
    return [name for name, argument in zip(names, arguments, strict=True) if has_floats(argument)]


def cotangent(value):
    """dy of the form of a value, the same in each run."""
    rng = np.random.default_rng(7)
    if isinstance(value, tuple | list):
        return tuple(rng.standard_normal(np.shape(part)) for part in value)
    return rng.standard_normal(np.shape(value))


def copied(x):
    """A copy of the arrays in a tuple, list or dict; anything else as it is."""
    if type(x) in (tuple, list):
        return type(x)(copied(part) for part in x)
    if type(x) is dict:
        return {key: copied(part) for key, part in x.items()}
    return x.copy("K") if type(x) is np.ndarray else x


def same(x, y):
    """Whether two results are the same, up to rounding; functions are not compared."""
    if callable(x) or callable(y):
        return callable(x) and callable(y)
    if isinstance(x, dict) and isinstance(y, dict):
        return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)  # in whatever order
    if is_array(x) and is_array(y):
        x, y = np.asarray(x), np.asarray(y)
        if y.dtype.kind != "f" or x.shape != y.shape:
            return np.array_equal(x, y)
        return np.allclose(x, y, rtol=1e-5, atol=1e-6 * np.max(np.abs(y[np.isfinite(y)]), initial=0), equal_nan=True)
    if isinstance(x, tuple | list) and isinstance(y, tuple | list):
        return len(x) == len(y) and all(map(same, x, y))
    try:
        return bool(x is y or x == y)
    except Exception:  # an object of the reader's that cannot be compared
        return False


def without_numbers(message):
    return re.sub(r"[-\d.]+", "", message)


def called(name, f):
    """A function and its parameters: "reads(t, m)"."""
    with contextlib.suppress(TypeError, ValueError):
        return f"{name}{inspect.signature(f)}"
    return name


def in_words(f, arguments):
    """The arguments of a call that can be said in few words: ["h of shape (2, 12, 3)", "m = 4"]."""
    names = []
    with contextlib.suppress(TypeError, ValueError):
        names = inspect.signature(f).parameters
    pairs = [(name, x) for name, x in zip(names, arguments, strict=False) if is_array(x)]
    return [f"{name} of shape {np.shape(x)}" if np.ndim(x) else f"{name} = {x}" for name, x in pairs]


def failure(name, error):
    """An exception in the reader's code, with its last line there."""
    ours = str(Path(__file__).parent), str(Path(inspect.getfile(gradcheck)).parent)
    frames = [x for x in traceback.extract_tb(error.__traceback__) if not x.filename.startswith(ours)]
    frames = [x for x in frames if "site-packages" not in x.filename and not x.filename.startswith("<__array")]
    code = f', "{frames[-1].line}"' if frames and frames[-1].line else ""
    line = f", at line {frames[-1].lineno}{code}" if frames else ""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{name} stops with {type(error).__name__}{': ' if text else ''}{text}{line}"
