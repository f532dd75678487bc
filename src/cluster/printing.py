"""Plans and states as tables in the terminal."""

from collections import Counter
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from src.cluster.estimating import StepEstimate
from src.cluster.matrix import PlannedRun
from src.cluster.states import FAILED, LOST, RunState, tail
from src.common.html_report import shown_value

COLORS = {"done": "green", "running": "cyan", "failed": "red", "lost": "red", "cancelled": "yellow"}
LOG_LINES = 5
MOST_TAILS = 5
"""Failed runs whose logs are shown; the table has them all."""


def plan_table(runs: Sequence[PlannedRun], estimates: Sequence[StepEstimate], disk: float) -> Group:
    """The steps: how many runs, what each is given, and what it is expected to take."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("step", "runs", "command", "factors", "given", "seconds a run", "memory a run", "from"):
        table.add_column(name, overflow="fold")
    for each in estimates:
        first = next(run for run in runs if run.step == each.step)
        given = first.resources
        words = [given["time"], f"{given['cpus']} CPU"]
        words += [f"{given['gpus']} GPU"] if given["gpus"] else []
        words += [f"{given['memory_gb']:g} GB"] if given["memory_gb"] else []
        source = f"{each.n_earlier} earlier runs" if each.n_earlier else "the model's size" if each.memory_gb else "–"
        cells = (
            each.step, str(each.n_runs), first.command[0], ", ".join(first.factors) or "–", ", ".join(words),
            "–" if each.seconds is None else f"{each.seconds:.0f}",
            "–" if each.memory_gb is None else f"{each.memory_gb:.1f} GB", source,
        )  # fmt: skip
        table.add_row(*map(Text, cells))
    return Group(table, Text(f"{len(runs)} runs; up to {disk:.1f} GB of disk"))


def status_table(states: Sequence[RunState]) -> Group:
    """Every run with its state, and the ends of the logs of those that failed."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("step", "run", "factors", "state", "tokens/s", "restarts"):
        # A name that is cut in two cannot be looked for; factors may be many.
        table.add_column(name, overflow="fold", no_wrap=name != "factors", min_width=12 if name == "factors" else None)
    table.add_column("reason or progress", overflow="ellipsis", no_wrap=True, ratio=1)
    for each in states:
        factors = " ".join(f"{name}={shown_value(value)}" for name, value in each.run.factors.items())
        rate = "" if each.tokens_per_second is None else f"{each.tokens_per_second:.0f}"
        state = Text(each.state, style=COLORS.get(each.state, ""))
        table.add_row(
            Text(each.run.step), Text(each.run.name), Text(factors), state, rate, str(each.restarts or ""),
            Text((each.reason or each.progress)[:200]),
        )  # fmt: skip
    counts = Counter(each.state for each in states)
    parts: list[Table | Text] = [table, Text(", ".join(f"{n} {state}" for state, n in counts.items()))]
    failed = [each for each in states if each.state in (FAILED, LOST) and each.log]
    for each in failed[:MOST_TAILS]:
        parts.append(Text(f"\n{each.run.step} {each.run.name}: the end of {each.log}", style="bold"))
        parts += [Text(f"  {line}") for line in tail(each.log, LOG_LINES)]
    if len(failed) > MOST_TAILS:
        parts.append(Text(f"\n… and {len(failed) - MOST_TAILS} more failed runs"))
    return Group(*parts)
