"""
The full figures of src.steer: French answers by dose at several layers, with random directions beside them. About 30
minutes on two CPU cores:
uv run python scripts/acceptance/steer.py --output_dir data/experiments/acceptance_steer
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL_ID = "bundled:smollm2-135m"
GRIDS = {6: (-20, 10, 20, 30, 40), 15: (-30, 15, 22, 30, 45), 22: (-80, 40, 60, 80, 120)}
"""Layer → coefficients; the norm of the text's hidden states there is 92, 144, 268."""


def run(command: str, *words: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"src.{command}", *words], cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"src.{command} ended with {done.returncode}: {done.stderr}")


def directions(folder: Path) -> Path:
    """The French − English directions of every layer, over the tokens of the prompts' own text."""
    contrast = ROOT / "data/directions/french_english"
    run(
        "extract_directions", "--positive_path", str(contrast / "target.jsonl"), "--negative_path",
        str(contrast / "control.jsonl"), "--model_id", MODEL_ID, "--method", "mean_difference", "--token_position",
        "mean_prompt", "--output_dir", str(folder),
    )  # fmt: skip
    return folder / "directions.safetensors"


def doses(folder: Path, file: Path, layer: int, n_prompts: int) -> None:
    """One grid; the prompts are none of those that the directions came from."""
    run(
        "steer", "--prompts_json", "data/personas/prompts.json", "--num_tasks", str(n_prompts), "--model_id", MODEL_ID,
        "--steer", f"{file}:{layer}:0", "--coefficients", *map(str, GRIDS[layer]), "--random_control",
        "--function_words", "data/directions/function_words.json", "--max_tokens", "40", "--batch_size", "96",
        "--output_dir", str(folder),
    )  # fmt: skip
    arms = json.loads((folder / "summary.json").read_text())["arms"]
    print(f"layer {layer}, {n_prompts} prompts: arm | mostly French | distinct-2 | KL per token | entropy | projection")
    for name, measures in arms.items():
        print("  ", name.ljust(12), " | ".join(shown(measures[m]) for m in MEASURES), flush=True)


MEASURES = ("share_french", "distinct_2", "kl_per_token", "avg_entropy", "mean_projection")


def shown(measure: dict) -> str:
    return f"{measure['mean']:.3g} [{measure['ci_low']:.3g}, {measure['ci_high']:.3g}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--directions_path", type=Path, help="a directions file to use instead of extracting one")
    parser.add_argument("--layers", nargs="+", type=int, choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--num_prompts", type=int, default=32)
    arguments = parser.parse_args()
    file = arguments.directions_path or directions(arguments.output_dir / "directions")
    for layer in arguments.layers:
        doses(arguments.output_dir / f"layer_{layer}", file, layer, arguments.num_prompts)


if __name__ == "__main__":
    main()
