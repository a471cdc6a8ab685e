"""The commands of `retro-np`, grouped by subject. Each command imports what it needs when it runs."""

from typing import Annotated

import typer
from typer import Option

from retro_np import __version__
from retro_np.commands import databases, evaluation, experiments, gradcheck, models, options, tutorials

app = typer.Typer(
    name="retro-np", pretty_exceptions_enable=False, rich_markup_mode="markdown",
    help="RETRO, the retrieval-enhanced transformer, in NumPy. Start with `retro-np demo`: it goes through all steps.",
)  # fmt: skip
for command in (
    databases.build, databases.search, databases.add, databases.remove, databases.compact, databases.verify,
    models.train, evaluation.evaluate, models.sample, evaluation.inspect, experiments.experiment, experiments.pretrain,
    gradcheck.gradcheck, experiments.info, experiments.demo, tutorials.tutorials,
):  # fmt: skip
    app.command()(options.with_checked_paths(command))


def _show_version(wanted: bool) -> None:
    if wanted:
        options.console.print(f"retro-np {__version__}")
        raise typer.Exit


SHOW_VERSION = Option("--version", "-V", is_eager=True, callback=_show_version, help="Show the version.")


@app.callback(help=app.info.help)
def _options(version: Annotated[bool, SHOW_VERSION] = False) -> None:
    pass
