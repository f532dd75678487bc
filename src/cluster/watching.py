"""A table that goes on until every run has ended."""

import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.live import Live

from src.cluster.printing import status_table
from src.cluster.states import RUNNING, UNKNOWN, WAITING, RunState

LIVE = (RUNNING, WAITING, UNKNOWN)


def watch(look: Callable[[], Sequence[RunState]], seconds: float, console: Console) -> None:
    """Look every `seconds` and show it, until nothing waits or runs. Ctrl-C ends the watching and nothing else."""
    states = look()
    try:
        with Live(status_table(states), console=console, auto_refresh=False) as live:
            while any(each.state in LIVE for each in states):
                time.sleep(seconds)
                states = look()
                live.update(status_table(states), refresh=True)
    except KeyboardInterrupt:
        console.print("the runs go on; the same command shows them again")
