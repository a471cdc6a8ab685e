"""The commands of `retro-np`, grouped by subject. Each command imports what it needs when it runs."""

import typer

from retro_np.commands import checks, databases, experiments, inspection, models

app = typer.Typer(
    name="retro-np", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
    help="RETRO, the retrieval-enhanced transformer, in NumPy. Start with `retro-np demo`: it goes through all steps.",
)  # fmt: skip
for command in (
    databases.build, databases.search, databases.add, databases.remove, databases.compact, databases.verify,
    models.train, models.evaluate, models.sample, inspection.inspect, experiments.experiment, experiments.pretrain,
    checks.gradcheck, checks.info, checks.demo,
):  # fmt: skip
    app.command()(command)
