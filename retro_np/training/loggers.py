"""The log of a run, and callbacks of `train` that write it for TensorBoard, as CSV, or for Weights & Biases.

log.jsonl is their source. With the first step that a process takes, a logger replaces its earlier files by the whole
log. So each step is there once, however often a run was killed, resumed or prolonged."""

import csv
import importlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from retro_np.errors import UserError
from retro_np.files import check_output, outputs, write_atomically
from retro_np.files.untrusted import has_types, parse_json

LOG = "log.jsonl"
CSV_HEADER = "step,loss,learning_rate,gradient_norm,tokens_per_s,valid_loss,valid_bpb\n"  # of log.csv
# What the kinds of logs leave in a run's folder. A user's own callback may write other events.
LOG_FILES = {"csv": "log.csv", "tensorboard": "tensorboard/events.out.tfevents.*.retro_np", "wandb": "wandb"}
Writer = Callable[[int, dict[str, float]], object]  # writes the values of a step


def read_log(out: Path | str) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl, one per step. An empty list if there is no log."""
    return [line for _, line in _logged(Path(out) / LOG)]


def _logged(log: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a log, as they are and as parsed."""
    for number, line in enumerate(log.read_bytes().splitlines() if log.exists() else (), start=1):
        yield line, parse_json(line, f"{log}:{number}")


def cut_log(log: Path, step: int) -> None:
    """Remove the log's lines from `step` on, because these steps will run again."""
    lines = []
    with suppress(UserError):  # A killed run may leave half a line. Nothing depends on the log.
        for line, logged in _logged(log):
            if has_types(logged, {"step": int}) and logged["step"] < step:
                lines.append(line + b"\n")
    write_atomically(log, b"".join(lines))


def logger(kind: str, folder: Path | str) -> Callable[[dict[str, Any]], None]:
    """A callback for `train(…, callbacks=[…])`, which receives each line of the log.

    kind: "tensorboard" writes one file of events into the subfolder tensorboard; "csv" writes log.csv; "wandb" begins a
    run of Weights & Biases, which is offline unless WANDB_MODE says otherwise. folder: the run's folder.
    Raises UserError for another kind, for a package that is not installed, and for a file or link of others in place of
    its own."""
    if kind not in WRITERS:
        raise UserError(f"there is no log of kind {kind!r}: choose {', '.join(WRITERS)}")
    folder = Path(folder)
    try:
        importlib.import_module(kind)
    except ModuleNotFoundError as error:
        raise UserError(f"a log for {kind} needs a package that is not installed: pip install {kind}") from error
    outputs.check_subfolders(folder, ["tensorboard"])
    if kind == "csv":
        check_output(folder / "log.csv", "the run's folder", ours=lambda start: start.startswith(CSV_HEADER.encode()))
    writers: list[Writer] = []

    def log(line: dict[str, Any]) -> None:
        lines = [line]
        if not writers:
            lines = [earlier for earlier in read_log(folder) if earlier["step"] < line["step"]] + lines
            writers.append(WRITERS[kind](folder))
        for values in lines:
            writers[0](values["step"], {name: value for name, value in values.items() if isinstance(value, float)})

    return log


def _tensorboard(folder: Path) -> Writer:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    for path in folder.glob(LOG_FILES["tensorboard"]):
        path.unlink()
    writer = EventFileWriter(str(folder / "tensorboard"), filename_suffix=".retro_np")

    def write(step: int, values: dict[str, float]) -> None:
        scalars = [{"tag": name, "simple_value": value} for name, value in values.items()]
        writer.add_event(Event(wall_time=time.time(), step=step, summary={"value": scalars}))
        writer.flush()

    return write


def _csv(folder: Path) -> Writer:
    write_atomically(folder / "log.csv", CSV_HEADER.encode())
    file = (folder / "log.csv").open("a", buffering=1, newline="", encoding="utf-8")
    writer = csv.DictWriter(file, CSV_HEADER.strip().split(","), extrasaction="ignore", lineterminator="\n")
    return lambda step, values: writer.writerow({"step": step, **values})


def _wandb(folder: Path) -> Writer:
    import wandb

    run = wandb.init(dir=str(folder), name=folder.resolve().name, mode=os.environ.get("WANDB_MODE", "offline"))
    return lambda step, values: run.log(values, step=step)


WRITERS = {"tensorboard": _tensorboard, "csv": _csv, "wandb": _wandb}  # by the package that each needs
