"""Running cells through inspect-ai: one call a task for all models, personas and arms of an engine."""

import errno
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.common.errors import CheckFailed, InputError
from src.common.files import sync_folder
from src.common.results import Results, make_id
from src.common.runs import Run
from src.evaluation.cells import LOGS, Cell, DoneCells
from src.evaluation.desk import Desk, Server
from src.evaluation.rows import rows_of
from src.evaluation.seats import Format, Seat
from src.evaluation.settings import EvaluateSettings
from src.evaluation.sources import Source

if TYPE_CHECKING:
    from src.evaluation.judge import Judge

LOGGER = logging.getLogger(__name__)
RUNNING = ".running"
"""Where inspect-ai writes logs, within LOGS; a log takes its name when its cell is done."""


class Runner:
    """What is needed to run cells, and where their rows go."""

    def __init__(
        self, config: EvaluateSettings, run: Run, formats: dict[str, Format], desk: Desk, results: Results,
        done: DoneCells, judge: "Judge | None" = None,
    ) -> None:  # fmt: skip
        self._config, self._run, self._formats = config, run, formats
        self._desk, self._results, self._done, self._judge = desk, results, done, judge
        # A task of a Python file is loaded in the folder of that file.
        self._logs = run.path(LOGS).absolute()
        shutil.rmtree(self._logs / RUNNING, ignore_errors=True)

    def run(self, source: Source, cells: Sequence[Cell], server: Server) -> None:
        """
        Evaluate some cells of one task; the rows of each are written when it is whole.

        Raises what the engine raises, InputError for what cannot be asked or found, and CheckFailed where the task's
        own code failed.
        """
        seats = {self._seat(cell).name: cell for cell in cells}
        assert len(seats) == len(cells), f"{len(cells)} cells, {len(seats)} names"
        with _undisturbed_logging():
            logs = self._desk.run(lambda: self._evaluate(source, cells), server)
        for log in logs:
            self._keep(log, seats[log.eval.model.removeprefix("tiller/")])
        shutil.rmtree(self._logs / RUNNING, ignore_errors=True)

    def _seat(self, cell: Cell) -> Seat:
        return Seat(reference=cell.reference, arm=cell.arm, persona=cell.persona, format=self._formats[cell.reference])

    def _evaluate(self, source: Source, cells: Sequence[Cell]) -> list[Any]:
        """In inspect-ai's thread."""
        # The desk speaks asyncio.
        os.environ["INSPECT_ASYNC_BACKEND"] = "asyncio"
        from inspect_ai import eval as inspect_eval
        from inspect_ai._util.error import PrerequisiteError
        from inspect_ai.model import GenerateConfig, Model

        from src.evaluation.inspect_model import TillerAPI
        from src.evaluation.judge import ROLE, GraderAPI

        config = self._config
        models = [
            Model(
                TillerAPI(seat, self._desk, config.seed, self._facts(seat)), GenerateConfig(),
                {"persona": seat.persona.persona if seat.persona else None, "arm": seat.arm.name},
            )
            for seat in map(self._seat, cells)
        ]  # fmt: skip
        asked = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        at_once = config.batch_size * 16
        try:
            return inspect_eval(
                source.task(self._judge), model=models,
                model_roles={ROLE: Model(GraderAPI(self._judge, self._desk), GenerateConfig())},
                log_dir=str(self._logs / RUNNING), log_format="eval", display="none", log_level="error",
                log_realtime=False, ctl_server=False, acp_server=False, score_display=False,
                limit=config.num_tasks, epochs=config.n_reps, fail_on_error=True, max_samples=at_once,
                max_connections=at_once, max_tasks=len(models), **{k: v for k, v in asked.items() if v is not None},
            )  # fmt: skip
        except PrerequisiteError as error:
            raise InputError(f"--tasks {source.word}: {_first_line(error)}") from error
        except ModuleNotFoundError as error:
            raise InputError(
                f"--tasks {source.word}: it needs the package {error.name}, which is not installed "
                f"(`uv run --with {error.name} …` brings it along)"
            ) from error
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise InputError(
                f"--tasks {source.word}: what it reads cannot be reached: {type(error).__name__}: "
                f"{_first_line(error)}; run it once where it can, or bring its data here"
            ) from error

    def _facts(self, seat: Seat) -> str:
        facts = self._formats[seat.reference].facts
        names = ("model_fingerprint", "adapter_fingerprint", "format_fingerprint", "dtype")
        return make_id(*(str(facts[name]) for name in names), self._config.chat_template or "")

    def _keep(self, log: Any, cell: Cell) -> None:
        from inspect_ai.log import read_eval_log

        source = cell.source
        if log.status != "success":
            told = _first_line(log.error.message) if log.error else log.status
            raise CheckFailed(
                f"--tasks {source.word} on {cell.reference}: the task ended with an error: {told}; {log.location} "
                f"(`inspect view`) shows where"
            )
        whole = log if log.samples else read_eval_log(log.location)
        rows = rows_of(whole, cell)
        if not rows:
            raise InputError(f"--tasks {source.word}: no samples in it; expected at least one")
        self._results.drop([row_id for row_id, row in self._results.rows.items() if row["cell"] == cell.id])
        for row in rows:
            self._results.add(row)
        os.replace(Path(str(log.location).removeprefix("file://")), self._logs / cell.log_name)
        sync_folder(self._logs)
        # Last, so that a cell that is said to be done has its rows and its log.
        self._results.sync()
        self._done.note(cell, len(rows), ", ".join(each.name for each in whole.eval.scorers or []))
        self._done.sync()


@contextmanager
def _undisturbed_logging() -> Iterator[None]:
    """inspect-ai puts a handler of its own on the root logger and changes its level; ours is to stay as it is."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.setLevel(level)
        for handler in [each for each in root.handlers if each not in handlers]:
            root.removeHandler(handler)


def _first_line(error: object) -> str:
    lines = [line.strip() for line in str(getattr(error, "message", error)).strip().split("\n") if line.strip()]
    return lines[0] if lines else type(error).__name__
