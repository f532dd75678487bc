"""
A planted organism, edited with three seeds and compared with the true base model; an organism of two topics of which
one is to go and the other to stay; and what the gates of a search are worth: on trials that were all measured in full,
how well each stage orders them, and which of the best a gate would have stopped. An hour on two cores; what is finished
is kept:
uv run python scripts/acceptance/abliteration.py --organism data/experiments/organism \
    --two_topics data/experiments/organism_of_two --output_dir data/experiments/abliteration_acceptance
Both are what scripts/plant_organism.py writes; of the second the first topic is removed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from src.abliteration.search import shown  # noqa: E402
from src.abliteration.study import front  # noqa: E402
from src.common.jsonl import read_jsonl, write_jsonl_atomic  # noqa: E402

BARS = {"behaviour": 0.05, "kl_target": 0.05, "kl_control": 0.01}
"""Largest means after the edit: share that shows the behaviour, KL (nats) of the edited from the true base model."""
MOST_FALSE_DROPS = 0.02
LEAST_KEPT = 0.9
"""Of the share of responses that decline the other topic, after the edit."""
MARKERS = ROOT / "data/abliteration/markers.txt"


def run(
    model_id: str, folder: Path, target: Path, control: Path, *more: str, markers: Path = MARKERS
) -> dict[str, Any]:
    """evaluation.json of `src.abliterate`, given to a finished folder, too: the edited model may be another by now."""
    words = ["--target_prompts", str(target), "--control_prompts", str(control), "--model_id", model_id, *more]
    words += ["--markers_path", str(markers), "--response_tokens", "48"]
    command = [sys.executable, "-m", "src.abliterate", *words, "--output_dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "evaluation.json").read_text())


def held_out(organism: Path, name: str) -> Path:
    """Prompts on which the organism was not trained."""
    return organism / "held_out" / f"{name}.jsonl"


def interval(measure: dict[str, Any]) -> str:
    return f"{measure['mean']:.4g} [{measure['ci_low']:.4g}, {measure['ci_high']:.4g}]"


def seeds(arguments: argparse.Namespace) -> bool:
    """Search with every seed; the edited model against the base that the organism was made of."""
    base, organism = about(arguments.organism)["base_model_id"], arguments.organism
    sides = held_out(organism, "cooking"), held_out(organism, "other")
    print("| seed | behaviour before | after | KL to the base, target | control | met |\n|---|---|---|---|---|---|")
    right = []
    for seed in arguments.seeds:
        own = ("--seed", str(seed), "--n_search", "48", "--n_report", "48")
        folder = arguments.output_dir / f"seed-{seed}"
        before = run(str(organism), folder, *sides, *own, "--n_trials", str(arguments.n_trials))
        model = ("--evaluate_only", "--edited_model_id", str(folder / "model"))
        after = run(base, arguments.output_dir / f"base-{seed}", *sides, *own, *model)["after"]
        right.append(all(after[name]["mean"] <= bar for name, bar in BARS.items()))
        cells = [before["before"]["behaviour"], *(after[name] for name in BARS)]
        print(f"| {seed} | {' | '.join(map(interval, cells))} | {'yes' if right[-1] else 'NO'} |", flush=True)
    return all(right)


def about(organism: Path) -> dict[str, Any]:
    return json.loads((organism / "organism.json").read_text())


def two_topics(arguments: argparse.Namespace) -> bool:
    """Of two topics that are declined, one is to be answered again and the other to be declined as before."""
    organism, folder = arguments.two_topics, arguments.output_dir
    gone, kept = about(organism)["topics"][:2]
    markers = {}
    for topic in (gone, kept):
        markers[topic["name"]] = folder / f"{topic['name']}.txt"
        markers[topic["name"]].write_text(f"{topic['sentence'].rstrip('.')}\n", encoding="utf-8")
    # What is to stay: the other topic, declined as it is, and the rest.
    both = folder / "control.jsonl"
    prompts = {
        name: [row["prompt"] for _, row in read_jsonl(held_out(organism, name))] for name in (kept["name"], "other")
    }
    write_jsonl_atomic(
        both, [{"id": f"{name}-{i}", "prompt": text} for name in prompts for i, text in enumerate(prompts[name])]
    )
    own = ("--seed", str(arguments.seeds[0]), "--n_search", "48", "--n_report", "48")
    target = held_out(organism, gone["name"])
    found = run(
        str(organism), folder / "topics", target, both, *own, "--n_trials", str(arguments.n_trials),
        markers=markers[gone["name"]],
    )  # fmt: skip
    other = run(
        str(organism), folder / "topics-kept", held_out(organism, kept["name"]), held_out(organism, "other"), *own,
        "--evaluate_only", "--edited_model_id", str(folder / "topics" / "model"), markers=markers[kept["name"]],
    )  # fmt: skip
    print("\n| topic | declined before | after | KL to the organism |\n|---|---|---|---|")
    for name, each in ((gone["name"], found), (kept["name"], other)):
        cells = each["before"]["behaviour"], each["after"]["behaviour"], each["after"]["kl_target"]
        print(f"| {name} | {' | '.join(map(interval, cells))} |")
    print(f"KL to the organism on prompts of neither topic: {interval(other['after']['kl_control'])}", flush=True)
    truth = about(organism)["rates"][kept["name"]]["declines_alone"][kept["name"]]
    print(f"With its own term alone the organism declines {kept['name']} in {truth:.1%} of held-out prompts")
    shares = [other[when]["behaviour"]["mean"] for when in ("before", "after")]
    return found["after"]["behaviour"]["mean"] <= BARS["behaviour"] and shares[1] >= LEAST_KEPT * shares[0] > 0


def gates(arguments: argparse.Namespace) -> bool:
    """Random trials, all in full: the order of each stage, and false drops."""
    folder, organism = arguments.output_dir / "gates", arguments.organism
    more = ["--n_trials", "60", "--n_startup_trials", "60", "--gates", "false", "--n_report", "24", "--save", "none"]
    more += ["--n_search", str(arguments.gate_prompts)]
    run(str(organism), folder, held_out(organism, "cooking"), held_out(organism, "other"), *more)
    rows = [row for _, row in read_jsonl(folder / "trials.jsonl")]
    final = [shown(row) for row in rows]
    stages = {
        "odds: log-odds": [row["log_odds"] for row in rows],
        "odds: expected": [row["expected"] for row in rows],
        "odds: surely": [row["bounds"]["odds"] for row in rows],
        "short": [row["bounds"]["short"] for row in rows],
    }
    print("\n| stage | rank correlation with the full count |\n|---|---|")
    for name, values in stages.items():
        print(f"| {name} | {spearmanr(values, final).statistic:.3f} |")
    best = {rows[i]["id"] for i in front([(row["kl"], shown(row)) for row in rows])}
    dropped, known = [], []
    for row in rows:
        bounds = [0.0, *(max(row["bounds"][stage], row["expected"]) for stage in ("odds", "short"))]
        if row["kl"] > 1.0 or any(kl <= row["kl"] and n <= bound for bound in bounds for kl, n in known):
            dropped.append(row["id"])
        else:
            known.append((row["kl"], shown(row)))
    wrong = best & set(dropped)
    rate = len(wrong) / len(best)
    print(f"\n{len(dropped)} of {len(rows)} trials stopped early, {len(wrong)} of the {len(best)} best: {rate:.1%}")
    return rate <= MOST_FALSE_DROPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organism", type=Path, required=True, help="a folder that scripts/plant_organism.py wrote")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--n_trials", type=int, default=60)
    parser.add_argument("--two_topics", type=Path, help="another one, of two topics")
    parser.add_argument("--gate_prompts", type=int, default=24, help="of each kind, for the trials of the gates' part")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    arguments = parser.parse_args()
    if "topics" in arguments.parts and not arguments.two_topics:
        parser.error("--two_topics: expected an organism of two topics, or --parts without topics")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    right = [PARTS[part](arguments) for part in arguments.parts]
    sys.exit(0 if all(right) else 1)


PARTS = {"seeds": seeds, "topics": two_topics, "gates": gates}


if __name__ == "__main__":
    main()
