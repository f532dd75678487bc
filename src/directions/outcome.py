"""What an extraction prints: what is missing, the best layer, and the command that steers with it."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from src.directions.settings import DirectionSettings

ASKED_ALIKE = (
    "adapter_path", "revision", "dtype", "device", "quantization", "backend", "trust_remote_code", "system_prompt",
    "chat_template", "thinking_mode", "raw_prompts",
)  # fmt: skip
"""Settings by which the model is the same and asked in the same way."""


def print_outcome(rows: Sequence[Mapping[str, Any]], best: int, details: Mapping[str, Any]) -> None:
    """Layers with a problem, then the best layer's scores beside those of the controls. rows: of scores.jsonl."""
    for row in rows:
        if row["problem"] and row["k"] == 0:
            print(f"layer {row['layer']}: {row['problem']}")
    n_layers = sum(row["k"] == 0 for row in rows)
    n_held = f"{details['n_target_held_out']} + {details['n_control_held_out']}"
    for row in (row for row in rows if row["layer"] == best):
        what = f"best layer {best} of {n_layers}" if row["k"] == 0 else f"  direction {row['k']} of it"
        print(f"{what}: AUC {row['auc']}, d′ {row['d_prime']} on {n_held} held-out examples")
        for name, label in (("random", "random directions"), ("shuffled", "shuffled labels")):
            low, high = row[f"{name}_auc_low"], row[f"{name}_auc_high"]
            print(f"  {label}: AUC {row[f'{name}_auc']}, 95 % within [{low}, {high}]")


def next_command(config: DirectionSettings, path: Path, row: Mapping[str, Any]) -> str:
    """
    The command that steers with the row's layer. Its coefficient is the distance between the classes' mean projections
    there, which moves one class' mean to the other's.
    """
    step = f"{abs(row['target_mean'] - row['control_mean']):.3g}"
    words = [
        "--prompts_json", "data/personas/prompts.json", "--num_tasks", "8", "--model_id", config.model_id,
        *_changed(config), "--steer", f"{path}:{row['layer']}:{step}", "--coefficients", f"-{step}", step,
        "--random_control", "--output_dir", f"{config.output_dir}_steered",
    ]  # fmt: skip
    return f"uv run -m src.steer {shlex.join(words)}"


def _changed(config: DirectionSettings) -> list[str]:
    """The flags of ASKED_ALIKE that are not at their defaults."""
    words: list[str] = []
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in ASKED_ALIKE or value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{field.name}" if value else f"--no_{field.name}")
        else:
            words += [f"--{field.name}", str(value)]
    return words
