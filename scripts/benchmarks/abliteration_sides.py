"""
The two sides of scripts/benchmarks/abliteration.py. Each runs its search as a process of its own that is watched from
outside, and makes a whole model folder of any of its trials.

A search gives `trials` ({"id", "behaviour" share, "kl", "seconds", "ended" since the start of the process, "stages" in
seconds, "stage"}), `seconds`, `start_seconds` until the first trial, and `peak_bytes` of the process tree. All seconds
are CPU seconds of the process tree, user and system: other work on the machine does not change them.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
HERETIC = Path(__file__).with_name("abliteration_heretic.py")
RESULT = "RESULT "
"""Begins each answer of heretic's side."""
SECONDS_BETWEEN_LOOKS = 0.1


@dataclass(frozen=True, kw_only=True)
class Job:
    """What both sides are given."""

    organism: Path
    target_prompts: Path
    control_prompts: Path
    markers_path: Path
    n_trials: int
    n_startup_trials: int
    n_search: int
    n_report: int
    response_tokens: int
    kl_tokens: int
    seed: int
    threads: int
    ours: str = ""
    """Further flags of src.abliterate."""

    @property
    def environment(self) -> dict[str, str]:
        # Neither side is to look for anything on a hub.
        return {**os.environ, "OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Watched:
    """How a process went."""

    seconds: float
    peak_bytes: int


def watched(
    command: Sequence[str], job: Job, log: Path, look: Callable[[float], None] = lambda seconds: None
) -> Watched:
    """
    Run a command to its end; look(its CPU seconds so far) is called again and again. Its output goes to `log`.
    Raises RuntimeError when it fails.
    """
    peak, seconds = 0, 0.0
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=job.environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                peak = max(peak, tree_bytes(process.pid))
                # Of a child that has just ended nothing is known for a moment.
                seconds = max(seconds, tree_seconds(process.pid))
                look(seconds)
                time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    look(seconds)
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with {process.returncode}; see {log}")
    return Watched(seconds, peak)


def tree_bytes(pid: int) -> int:
    """Resident memory of a process and all that it has started; 0 once it has ended."""
    try:
        process = psutil.Process(pid)
        return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


def tree_seconds(pid: int) -> float:
    """CPU seconds of a process and all that it has started; 0 once it has ended."""
    try:
        process = psutil.Process(pid)
        own = process.cpu_times()
        others = [each.cpu_times() for each in process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    return own.children_user + own.children_system + sum(each.user + each.system for each in (own, *others))


class Ours:
    """src.abliterate."""

    kl = "kl"
    """Which of the neutral scorer's fields the search's KL is."""

    def __init__(self, job: Job, folder: Path) -> None:
        self._job = job
        self._run = folder / "run"
        self._log = folder / "search.log"

    def search(self) -> dict[str, Any]:
        job, ended = self._job, {}
        rows = self._run / "trials.jsonl"

        def look(seconds: float) -> None:
            for number in _ids(rows):
                ended.setdefault(number, seconds)

        command = [
            sys.executable, "-m", "src.abliterate", "--model_id", str(job.organism), "--target_prompts",
            str(job.target_prompts), "--control_prompts", str(job.control_prompts), "--markers_path",
            str(job.markers_path), "--n_trials", str(job.n_trials), "--n_startup_trials", str(job.n_startup_trials),
            "--n_search", str(job.n_search), "--n_report", str(job.n_report), "--response_tokens",
            str(job.response_tokens), "--kl_tokens", str(job.kl_tokens), "--seed", str(job.seed), "--device", "cpu",
            "--save", "none", "--output_dir", str(self._run), *shlex.split(job.ours),
        ]  # fmt: skip
        found = watched(command, job, self._log, look)
        trials = [_our_trial(row, ended) for row in _rows(rows)]
        first = trials[0]
        return {
            "trials": trials, "seconds": found.seconds, "peak_bytes": found.peak_bytes,
            "start_seconds": first["ended"] - first["seconds"],
        }  # fmt: skip

    def export(self, numbers: Sequence[int], folder: Path) -> Iterator[tuple[int, Path]]:
        """Each trial's model folder in turn; it is deleted once the next is asked for."""
        from src.abliteration.edits import EditMaker, EditOptions
        from src.abliteration.kernel import plan_of
        from src.common.directions_file import read_directions
        from src.common.model_config import ModelConfigBase
        from src.models import loading
        from src.models.saving import save_edited
        from src.models.weight_editor import bake

        if not numbers:
            return
        settings = read_json(self._run / "config.json")["config"]
        used = [name for name in ("heads", "calibrate", "induce") if settings.get(name)]
        if used:
            raise RuntimeError(f"--ours: trials with --{used[0]} cannot be made again by this script")
        config = ModelConfigBase(model_id=str(self._job.organism), output_dir=folder, dtype="float32", device="cpu")
        directions = self._run / "directions" / "directions.safetensors"
        options = EditOptions(components=tuple(settings["components"]), norm=settings["norm"])
        maker = EditMaker(loading.load(config)[0], read_directions(directions), options)
        plans = {row["id"]: plan_of(row["params"]) for row in _rows(self._run / "trials.jsonl")}
        for number in numbers:
            edits, path = maker.edits(plans[number]), folder / f"trial-{number}"
            # What a killed run has left there.
            shutil.rmtree(path, ignore_errors=True)
            with gone_after(path):
                save_edited(loading.resolve(config), config, lambda model, edits=edits: bake(model, edits), path)
                yield number, path


class Heretic:
    """heretic, run by a Python of its own."""

    kl = "kl_first"

    def __init__(self, job: Job, folder: Path, python: str, prompts: dict[str, list[str]]) -> None:
        """prompts: heretic's name of a set of prompts → their texts."""
        self._job, self._folder, self._python, self._prompts = job, folder, python, prompts

    def search(self) -> dict[str, Any]:
        path = self._write_job("search", {})
        log = self._folder / "search.log"
        found = watched([self._python, str(HERETIC), str(path)], self._job, log)
        answers = [line for line in log.read_text("utf-8").splitlines() if line.startswith(RESULT)]
        if len(answers) != 1:
            raise RuntimeError(f"heretic gave {len(answers)} answers; see {log}")
        result = json.loads(answers[0].removeprefix(RESULT))
        n_search = len(self._prompts["bad_evaluation_prompts"])
        trials = [{**each, "stage": "full", "behaviour": each.pop("n_shown") / n_search} for each in result["trials"]]
        return {**result, "trials": trials, "seconds": found.seconds, "peak_bytes": found.peak_bytes}

    def export(self, numbers: Sequence[int], folder: Path) -> Iterator[tuple[int, Path]]:
        """Each trial's model folder in turn; it is deleted once the next is asked for."""
        if not numbers:
            return
        shutil.rmtree(folder, ignore_errors=True)
        path = self._write_job("export", {"exports": list(numbers), "folder": str(folder)})
        with (self._folder / "export.log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [self._python, str(HERETIC), str(path)], cwd=ROOT, env=self._job.environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
            try:
                yield from self._exported(process, log)
            finally:
                process.stdin.close()
                process.terminate()
                process.wait()

    def _exported(self, process: subprocess.Popen, log: Any) -> Iterator[tuple[int, Path]]:
        for line in process.stdout:
            if not line.startswith(RESULT):
                log.write(line)
                continue
            result = json.loads(line.removeprefix(RESULT))
            assert Path(result["folder"], "config.json").exists(), f"heretic saved no {result['folder']}"
            with gone_after(Path(result["folder"])):
                yield result["number"], Path(result["folder"])
            process.stdin.write("next\n")
            process.stdin.flush()
        if process.wait():
            raise RuntimeError(f"heretic ended with {process.returncode}; see {log.name}")

    def _write_job(self, name: str, more: dict[str, Any]) -> Path:
        job = {"arguments": self._arguments(), "checkpoints": str(self._folder / "checkpoints"), **more}
        path = self._folder / f"{name}-job.json"
        path.write_text(json.dumps(job, indent=2), encoding="utf-8")
        return path

    def _arguments(self) -> list[str]:
        from src.abliteration.markers import read_markers

        job = self._job
        found = [
            "--model", str(job.organism), "--dtypes", '["float32"]', "--batch-size", str(job.n_search),
            "--max-response-length", str(job.response_tokens), "--response-prefix", "", "--n-trials", str(job.n_trials),
            "--n-startup-trials", str(job.n_startup_trials), "--seed", str(job.seed), "--export-strategy", "MERGE",
            "--refusal-markers", json.dumps(read_markers(job.markers_path)),
            "--system-prompt", own_system_prompt(job.organism),
        ]  # fmt: skip
        for name, texts in self._prompts.items():
            path = self._folder / f"{name}.txt"
            assert all("\n" not in text and text == text.strip() for text in texts), f"{name}: one line a prompt"
            path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
            flag = "--" + name.replace("_", "-")
            found += [f"{flag}.dataset", str(path), f"{flag}.split", "null", f"{flag}.column", "null"]
        return found


@contextmanager
def gone_after(folder: Path) -> Iterator[None]:
    """A model's folder is deleted when the context ends: whole models of all trials would fill the disk."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def own_system_prompt(folder: Path) -> str:
    """
    What a model's chat template says as the system where no one else does. Raises RuntimeError where it says nothing:
    there a prompt without a system message, which ours are, cannot be had from heretic.
    """
    from src.models.loading import load_tokenizer

    tokenizer, mark = load_tokenizer(folder), "the system"
    asked = [{"role": "user", "content": "a question"}]

    def rendered(text: str | None) -> str:
        system = [] if text is None else [{"role": "system", "content": text}]
        return tokenizer.apply_chat_template([*system, *asked], tokenize=False, add_generation_prompt=True)

    start, _, end = rendered(mark).partition(mark)
    found = rendered(None).removeprefix(start).removesuffix(end)
    if rendered(found) != rendered(None):
        raise RuntimeError(f"{folder}: its chat template has no system prompt of its own, which heretic must be given")
    return found


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _ids(path: Path) -> list[int]:
    """Of the rows that are whole by now."""
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line)["id"] for line in whole.splitlines()]


def _our_trial(row: dict[str, Any], ended: dict[int, float]) -> dict[str, Any]:
    stages = dict(row["cpu_seconds"])
    return {
        "id": row["id"], "behaviour": row["behaviour"] / row["n_behaviour"], "kl": row["kl"], "stage": row["stage"],
        "seconds": stages.pop("all"), "ended": ended[row["id"]], "stages": stages,
    }  # fmt: skip
