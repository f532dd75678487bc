"""Other commands that an abliteration runs, each as a process with a run folder of its own."""

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from src.abliteration.prompts import Split
from src.abliteration.settings import AbliterateSettings
from src.common.errors import CheckFailed, InputError
from src.common.jsonl import write_jsonl_atomic

FOLDER, PROMPTS, FILE_NAME, VALIDATION = "directions", "prompts", "directions.safetensors", "validation"
SAME = ("revision", "dtype", "device", "seed", "chat_template")
OF_DIRECTIONS = ("method", "n_directions", "token_position", "project_out", "system_prompt")


def extract_directions(config: AbliterateSettings, folder: Path, split: Mapping[str, Split]) -> Path:
    """
    The directions file of the prompts kept for it, in `folder`/directions; a finished one is not made again. Raises
    InputError or CheckFailed when the command ends with that.
    """
    found = folder / FOLDER / FILE_NAME
    if found.exists():
        return found
    paths = {side: folder / PROMPTS / f"{side}.jsonl" for side in split}
    for side, path in paths.items():
        path.parent.mkdir(exist_ok=True)
        write_jsonl_atomic(path, [{"id": each.id, "prompt": each.text} for each in split[side].directions])
    words = ["extract_directions", "--output_dir", str(folder / FOLDER)]
    words += ["--positive_path", str(paths["target"]), "--negative_path", str(paths["control"])]
    if config.preserve_prompts:
        words += ["--preserve_path", config.preserve_prompts, "--preserve_against_path", str(paths["control"])]
    words += _same(config, ("model_id", "adapter_path", "quantization", *SAME, *OF_DIRECTIONS))
    _run([*words, *(["--raw_prompts"] if config.raw_prompts else [])], "no directions were extracted")
    return found


def validate(config: AbliterateSettings, folder: Path) -> Path:
    """
    `src.evaluate` on --validate_tasks of the model before and of `folder`/model after the edit, in `folder`/validation.
    Raises InputError or CheckFailed when the command ends with that.
    """
    found = folder / VALIDATION
    base = f"{config.model_id}+{config.adapter_path}" if config.adapter_path else config.model_id
    words = ["evaluate", "--model_id", base, str(folder / "model"), "--tasks", *config.validate_tasks]
    _run([*words, "--output_dir", str(found), *_same(config, SAME)], "the tasks were not evaluated")
    return found


def _same(config: AbliterateSettings, names: Sequence[str]) -> list[str]:
    words = [word for name in names if getattr(config, name) is not None
             for word in (f"--{name}", str(getattr(config, name)))]  # fmt: skip
    words += ["--thinking_mode", str(config.thinking_mode).lower()]
    return [*words, *(["--trust_remote_code"] if config.trust_remote_code else [])]


def _run(words: Sequence[str], told: str) -> None:
    command = [sys.executable, "-m", f"src.{words[0]}", "--backend", "hf", *words[1:]]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        kind = {1: CheckFailed, 2: InputError}.get(done.returncode, RuntimeError)
        raise kind(f"{told} (exit code {done.returncode}, see above); {shlex.join(command[1:])}")
