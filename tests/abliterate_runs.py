"""Runs of `src.abliterate` on the tiny organism, in this process: a start of torch less than as a user would."""

import contextlib
import io
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from src.common.errors import CheckFailed
from src.common.jsonl import read_jsonl

QUICK = (
    "--response_tokens", "4", "--kl_tokens", "3", "--n_search", "12", "--n_report", "12", "--n_startup_trials", "3"
)  # fmt: skip


def words(organism: Path, prompts: tuple[Path, Path, Path], output: Path, *more: str) -> list[str]:
    """The arguments of a quick search on the organism."""
    target, control, markers = map(str, prompts)
    return [
        "--model_id", str(organism), "--target_prompts", target, "--control_prompts", control,
        "--markers_path", markers, "--output_dir", str(output), *QUICK, *more,
    ]  # fmt: skip


def run_here(arguments: Sequence[str]) -> None:
    """As the command does it."""
    from src.abliterate import AbliterateConfig, main
    from src.common.cli import parse_config

    main(parse_config(AbliterateConfig, arguments))


def search_here(arguments: Sequence[str]) -> None:
    """`run_here` of a search that may find nothing better than no edit."""
    try:
        run_here(arguments)
    except CheckFailed as error:
        assert "is better than no edit" in str(error)


@contextlib.contextmanager
def extracting_here() -> Iterator[None]:
    """What the command runs as a process to extract directions is run in this one, of the same words."""
    from src.common.cli import parse_config
    from src.extract_directions import ExtractDirectionsConfig, main

    start = subprocess.run

    def run(command: Sequence[str], **settings: Any) -> subprocess.CompletedProcess:
        if "src.extract_directions" not in command:
            return start(command, **settings)
        with contextlib.redirect_stdout(io.StringIO()):
            main(parse_config(ExtractDirectionsConfig, command[command.index("src.extract_directions") + 1 :]))
        return subprocess.CompletedProcess(command, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        yield


def directions_of(folder: Path) -> Path:
    """The directions file of a run that extracted its own."""
    return folder / "directions" / "directions.safetensors"


def directions_in(folder: Path) -> tuple[str, str]:
    """The arguments that have another run use them."""
    return "--directions_path", str(directions_of(folder))


def trials_of(folder: Path) -> list[dict]:
    """The rows of trials.jsonl."""
    return [row for _, row in read_jsonl(folder / "trials.jsonl")]


def evaluation_of(folder: Path) -> dict:
    """evaluation.json."""
    return json.loads((folder / "evaluation.json").read_text())


def recorded_in(folder: Path) -> dict:
    """What the last session wrote to provenance.json."""
    return json.loads((folder / "provenance.json").read_text())["sessions"][-1]
