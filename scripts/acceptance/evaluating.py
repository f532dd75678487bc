"""
The figures that src.evaluate must show. From the repository root:
uv run python scripts/acceptance/evaluating.py --output_dir data/experiments/acceptance_evaluating [--vllm]
Trains an adapter of the capitalization rule with src.finetune (or takes --adapter), on words that are in no evaluation,
then evaluates the base model against it, steers at several doses, and with --vllm compares both engines sample by
sample. Ends with exit code 1 where a figure is not what it must be.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MODEL = "bundled:smollm2-135m"
TRAINING = (
    "--dataset_path", "data/finetuning/capitalization.json", "--prompt", "Capitalize the word: {input}", "--epochs",
    "2", "--batch_size", "16", "--lr", "5e-4", "--save_last_epoch_only",
)  # fmt: skip
DOSES = ("-30", "-10", "10", "30")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--vllm", action="store_true")
    parser.add_argument("--num_tasks", type=int, default=100)
    parser.add_argument("--num_dose_tasks", type=int, default=100)
    options = parser.parse_args()
    folder, n = options.output_dir, str(options.num_tasks)

    # 1. An adapter that knows the rule.
    refuse_trained_words()
    adapter = options.adapter or trained(folder / "finetuned")
    models = ["--model_id", MODEL, f"{MODEL}+{adapter}"]
    tasks = ["--tasks", "data/evals/capitalization.jsonl", "data/evals/general_knowledge.jsonl", "--num_tasks"]
    task = [*tasks, n]

    # 2. The base model against it.
    evaluate(*models, *task, "--backend", "hf", "--output_dir", folder / "hf")
    figures = {"scores": scores(folder / "hf"), "capitalization by length of the word": by_length(folder / "hf")}
    base, adapted = (figures["scores"][name]["capitalization"] for name in (MODEL, f"{MODEL}+{adapter}"))
    checks = {"the adapter follows its rule more often than the base model": adapted[0] > base[0]}

    # 3. Doses, and the unsteered arm against an evaluation without steering.
    directions = folder / "directions.safetensors"
    write_direction(directions)
    evaluate(
        "--model_id", MODEL, *tasks, options.num_dose_tasks, "--backend", "hf", "--steer", f"{directions}:15:1",
        "--coefficients", *DOSES, "--output_dir", folder / "doses",
    )  # fmt: skip
    doses = rows_of(folder / "doses")
    asked = {(row["task"], row["sample_id"]) for row in doses}
    plain = [r for r in rows_of(folder / "hf") if r["model_id"] == MODEL and (r["task"], r["sample_id"]) in asked]
    arms = {arm: [r for r in doses if r["arm"] == arm] for arm in ("unsteered", *(f"{int(d):+d}" for d in DOSES))}
    checks["the unsteered arm is the evaluation without steering"] = gist(arms["unsteered"]) == gist(plain)
    moved = {arm: distance(some, plain) for arm, some in arms.items()}
    figures["mean change of the right answer's probability, by dose"] = moved
    checks["it changes as the dose does"] = moved["+30"] > moved["+10"] > 0 and moved["-30"] > moved["-10"] > 0

    # 4. Both engines, sample by sample.
    if options.vllm:
        evaluate(*models, *task, "--backend", "vllm", "--kv_cache_gib", "1", "--output_dir", folder / "vllm")
        pairs = list(zip(gist(rows_of(folder / "hf")), gist(rows_of(folder / "vllm")), strict=True))
        agreeing = sum(a == b for a, b in pairs)
        figures["samples on which vLLM and transformers agree"] = f"{agreeing} of {len(pairs)}"
        checks["vLLM and transformers agree per sample in greedy decoding"] = agreeing == len(pairs)
    print(json.dumps({"figures": figures, "checks": checks}, indent=2))
    sys.exit(0 if all(checks.values()) else 1)


def trained(folder: Path) -> Path:
    """The adapter of the README's command of src.finetune; about six minutes of one core."""
    command("finetune", "--model_id", MODEL, *TRAINING, "--output_dir", folder)
    return folder / "epoch_1"


def write_direction(path: Path) -> None:
    """A fixed random direction of the bundled model."""
    from src.common.directions_file import write_directions
    from src.models.bundled import bundled_folder
    from src.models.fingerprint import fingerprint
    from tests.steering_specs import some_directions

    known = {"model_fingerprint": fingerprint(bundled_folder(MODEL)), "model_id": MODEL}
    write_directions(path, some_directions(n_layers=30, d_model=576, **known))


def evaluate(*words: object) -> None:
    command("evaluate", *words)


def command(name: str, *words: object) -> None:
    subprocess.run([sys.executable, "-m", f"src.{name}", *map(str, words)], cwd=ROOT, check=True, stdout=sys.stderr)


def refuse_trained_words() -> None:
    """No word that is evaluated is among those that are trained on, or that chose the epoch."""
    splits = json.loads((ROOT / "data/finetuning/capitalization.json").read_text())
    seen = {row["input"] for name in ("train", "validation") for row in splits[name]}
    lines = (ROOT / "data/evals/capitalization.jsonl").read_text().splitlines()
    shared = seen & {json.loads(line)["input"] for line in lines}
    assert not shared, f"evaluated and trained on: {', '.join(sorted(shared))}"


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def by_length(folder: Path) -> dict[str, dict[str, str]]:
    """model → five letters, as was trained, and other lengths → right of all."""
    found: dict[str, dict[str, str]] = {}
    rows = [row for row in rows_of(folder) if row["task"] == "capitalization"]
    for model in dict.fromkeys(row["model_id"] for row in rows):
        for name, is_five in (("five letters", True), ("other lengths", False)):
            some = [r["score"] for r in rows if r["model_id"] == model and (len(r["prompt"]) == 5) == is_five]
            found.setdefault(model, {})[name] = f"{sum(some):.0f} of {len(some)}"
    return found


def gist(rows: list[dict]) -> list[tuple]:
    return [(row["task"], row["sample_id"], row["response"], row["answer"], row["score"]) for row in rows]


def distance(rows: list[dict], plain: list[dict]) -> float:
    both = zip(rows, plain, strict=True)
    changes = [abs(a["probability"] - b["probability"]) for a, b in both if a["probability"] is not None]
    return round(sum(changes) / len(changes), 4)


def scores(folder: Path) -> dict[str, dict[str, tuple]]:
    """model → task → (score, low, high, n)."""
    import csv

    found: dict[str, dict[str, tuple]] = {}
    with (folder / "summary.csv").open() as file:
        for row in csv.DictReader(file):
            numbers = tuple(float(row[name]) for name in ("score", "ci_low", "ci_high", "n"))
            found.setdefault(row["model_id"], {})[row["task"]] = numbers
    return found


if __name__ == "__main__":
    main()
