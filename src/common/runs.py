"""
One run, one folder: config.json (resolved), provenance.json, logs/, the results, and DONE as the last file of all.

    with start_run(config, "run_personas", inputs=[config.prompts_json]) as run:
        with JsonlWriter(run.path("results.jsonl")) as results:
            ...
        run.finish({"results.jsonl": "one row a response"})
"""

import logging
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from src.common.errors import CheckFailed, InputError, StopRequested
from src.common.experiment_config import RunConfigBase, WorkerConfigBase, seed_everything
from src.common.files import sha256_file, write_json_atomic
from src.common.logs import FILE_ONLY, start_logging, stop_logging
from src.common.provenance import hash_inputs, now, peak_memory_mib, start_session, without_secrets
from src.common.run_folder import (
    CONFIG,
    DONE,
    PROVENANCE,
    SHARDS,
    comparable,
    has_results,
    lock_folder,
    make_folder,
    read_run,
    refuse_differences,
)
from src.common.secrets import withhold
from src.common.settings import row_fields, to_json

LOGGER = logging.getLogger(__name__)
# Facts that results depend on but that no setting shows: weights can change under the same name, `auto` its choice.
PINNED = (
    "model_fingerprint", "adapter_fingerprint", "format_fingerprint", "dtype", "backend", "interventions_fingerprint",
    "provider", "base_url",
)  # fmt: skip


def start_run(config: RunConfigBase, command: str, inputs: Sequence[Path] = (), may_hold: Sequence[str] = ()) -> "Run":
    """
    Makes or goes on with the run in the config's folder: takes the folder for this process, seeds random and numpy,
    starts the log, writes config.json and provenance.json, removes DONE. `may_hold`: patterns of files that workers
    with folders of their own may have put there before.
    Raises InputError where the folder cannot be written, is in use, holds files of somebody else, or holds a run of
    another command, another configuration or other contents of the input files; and for one of several processes that
    torchrun has started.
    """
    _refuse_torchrun()
    folder = run_folder(config)
    hashes = hash_inputs(inputs)
    make_folder(folder, may_hold)
    lock = lock_folder(folder)
    try:
        return _open_run(folder, lock, config, command, hashes)
    except BaseException:
        lock.close()
        raise


def _refuse_torchrun() -> None:
    n = os.environ.get("WORLD_SIZE", "1")
    if n not in ("", "1"):
        raise InputError(
            f"WORLD_SIZE is {n}: a launcher such as torchrun has started this command several times, and it is one "
            f"process; start it once (of the commands with --num_workers each worker by itself)"
        )


def run_folder(config: RunConfigBase) -> Path:
    """output_dir itself, or <output_dir>/shards/worker-<i>-of-<n> for one worker of several."""
    if isinstance(config, WorkerConfigBase) and config.num_workers > 1:
        return config.output_dir / SHARDS / worker_name(config.worker_index, config.num_workers)
    return config.output_dir


def worker_name(index: int, count: int) -> str:
    """The name of a worker's folder."""
    return f"worker-{index:05d}-of-{count:05d}"


def _open_run(folder: Path, lock: IO[str], config: RunConfigBase, command: str, hashes: dict[str, str]) -> "Run":
    values = without_secrets(to_json(config))
    provenance: dict[str, Any] = {"command": command, "inputs": hashes, "sessions": []}
    resumed = (folder / CONFIG).exists()
    if resumed:
        earlier, provenance = read_run(folder)
        fields = row_fields(config)
        old = comparable(earlier["config"], fields, provenance["inputs"]) | {"command": earlier["command"]}
        if has_results(folder):
            refuse_differences(folder, old, comparable(values, fields, hashes) | {"command": command})
        else:
            # Nothing was made yet, so a corrected setting may take the place of a wrong one.
            provenance = {"command": command, "inputs": hashes, "sessions": provenance["sessions"]}
    provenance["inputs"] = hashes
    provenance["sessions"].append(start_session())
    (folder / DONE).unlink(missing_ok=True)
    # config.json last: a folder that has it is a run, and has its provenance.
    write_json_atomic(folder / PROVENANCE, provenance)
    # The names are for those who compare runs without knowing the command's config class.
    names = list(row_fields(config))
    write_json_atomic(folder / CONFIG, {"command": command, "config": values, "affects_rows": names})
    seed_everything(config.seed)
    return Run(folder, resumed, provenance, lock, start_logging(config.log_path(folder, command)))


class Run:
    """An open run folder, held by this process. Use it in a `with` block, so that every way out closes it."""

    def __init__(
        self, folder: Path, resumed: bool, provenance: dict[str, Any], lock: IO[str], handlers: list[logging.Handler]
    ) -> None:
        self.folder = folder
        self.resumed = resumed
        self._provenance = provenance
        self._session = provenance["sessions"][-1]
        self._lock = lock
        self._handlers = handlers
        self._started = time.monotonic()

    def path(self, name: str) -> Path:
        """The path of a file of this run."""
        return self.folder / name

    @property
    def first_started(self) -> datetime:
        """When the first session began that this run goes on with (UTC)."""
        return datetime.fromisoformat(self._provenance["sessions"][0]["started"])

    @property
    def inputs(self) -> dict[str, str]:
        """Path → sha256 of each input file."""
        return self._provenance["inputs"]

    def record(self, **facts: Any) -> None:
        """
        Writes facts (JSON values) to provenance.json: with this session, or for the whole run what must not change
        between sessions: those named in PINNED. Raises InputError where one of those did.
        """
        pinned = {name: value for name, value in facts.items() if name in PINNED}
        refuse_differences(self.folder, {name: self._provenance.get(name, facts[name]) for name in pinned}, pinned)
        self._provenance |= pinned
        self._session |= {name: value for name, value in facts.items() if name not in PINNED}
        write_json_atomic(self.folder / PROVENANCE, self._provenance)

    def finish(self, files: Mapping[str, str]) -> None:
        """
        Ends the run: `files` maps each written file or folder, relative to the run's, to one phrase on what it is.
        Writes DONE with the size and sha256 of each, prints them with the command that shows them, and closes.
        """
        described = {name: self._describe(name, phrase) for name, phrase in files.items()}
        self._end_session("done")
        write_json_atomic(self.folder / DONE, {"finished": self._session["finished"], "files": described})
        width = max((len(str(self.folder / name)) for name in files), default=0)
        for name, phrase in files.items():
            print(f"wrote {str(self.folder / name).ljust(width)}  {phrase}")
        print(f"to look at it: uv run -m src.view {shlex.quote(str(self.folder))}")
        self._release()

    def _describe(self, name: str, phrase: str) -> dict[str, Any]:
        path = self.folder / name
        assert path.exists(), f"{path} is said to be written but is not there"
        measured = {"bytes": path.stat().st_size, "sha256": sha256_file(path)} if path.is_file() else {}
        return {"what": phrase} | measured

    def close(self, outcome: str = "stopped") -> None:
        """Lets go of an unfinished run, with one word on why; does nothing after `finish()`."""
        if not self._lock.closed:
            self._end_session(outcome)
            self._release()

    def _end_session(self, outcome: str) -> None:
        seconds = round(time.monotonic() - self._started, 1)
        self._session |= {
            "finished": now(),
            "outcome": outcome,
            "seconds": seconds,
            "peak_memory_mib": peak_memory_mib(),
        }
        write_json_atomic(self.folder / PROVENANCE, self._provenance)

    def _release(self) -> None:
        stop_logging(self._handlers)
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, StopRequested | KeyboardInterrupt):
            self.close("stopped")
            return
        if not issubclass(kind, InputError | CheckFailed):
            LOGGER.error("failed", exc_info=(kind, error, trace), extra={FILE_ONLY: True})
        self.close(withhold(f"failed: {kind.__name__}: {error}"))
