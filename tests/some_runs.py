"""Run folders for what shows them, without a model: rows of every shape, hostile texts among them."""

import json
import random
from pathlib import Path

from src.common.jsonl import JsonlWriter
from src.common.model_config import ModelConfigBase
from src.common.runs import start_run

HOSTILE = "<script>document.title = 'owned'</script> **bold** [a](http://example.com) $x$ :red[r] " + "long " * 2000


def persona_rows(n_prompts: int = 4, shift: float = 0.0, seed: int = 0) -> list[dict]:
    """Rows as `src.run_personas` writes them, of 4 personas in 2 categories; no thinking; the first answer hostile."""
    draw = random.Random(seed)
    rows = []
    for persona, category in (("Hamlet", "fiction"), ("<b>Owl</b>", "animal"), ("cat", "animal"), ("Faust", "fiction")):
        for number in range(n_prompts):
            entropy = round(1.0 + shift + 0.1 * number + draw.random(), 4)
            rows.append(
                {
                    "id": f"{len(rows):016x}", "persona": persona, "category": category, "article": "",
                    "system_prompt": f"You are {persona}.", "prompt_id": str(number), "prompt": f"Question {number}?",
                    "rep_idx": 0, "turn": 0, "response": HOSTILE if not rows else f"Answer {number} of {persona}",
                    "thinking": None, "avg_entropy_thinking": None, "avg_entropy_output": entropy,
                    "avg_entropy": entropy, "avg_top_k_mass_thinking": None, "avg_top_k_mass_output": 0.5,
                    "avg_top_k_mass": round(1 / (1 + entropy), 4), "think_end_position": None, "num_tokens": 5 + number,
                    "num_thinking_tokens": 0, "finish_reason": "stop", "truncated_thinking": False,
                    "persona_applied": "header+system", "seed": number, "model_id": "m",
                }
            )  # fmt: skip
    return rows


def dose_rows() -> list[dict]:
    """Rows as `src.steer` writes them: three doses, two of them with a random control."""
    rows = []
    for coefficient, control in ((0.0, False), (4.0, False), (8.0, False), (4.0, True), (8.0, True)):
        for number in range(3):
            rows.append(
                {
                    "id": f"{len(rows):016x}", "arm": f"+{coefficient:g}{' random' if control else ''}",
                    "coefficient": coefficient, "control": control, "prompt_id": str(number),
                    "prompt": f"Question {number}?", "rep_idx": 0, "response": f"Dose {coefficient}",
                    "avg_entropy": 1 + number / 10 + (0 if control else coefficient / 10),
                    "mean_projection": coefficient * (0.1 if control else 1) + number, "num_tokens": 9,
                }
            )  # fmt: skip
    return rows


def score_rows() -> list[dict]:
    """Rows as `src.extract_directions` writes them."""
    names = ("auc", "d_prime", "random_auc", "random_auc_low", "random_auc_high", "shuffled_auc", "shuffled_auc_low",
             "shuffled_auc_high")  # fmt: skip
    return [{"id": f"{i}", "layer": i, "k": 0} | dict.fromkeys(names, 0.5 + i / 10) for i in range(4)]


def make_run(folder: Path, command: str, rows: list[dict], name: str = "results.jsonl") -> Path:
    """A finished run folder with these rows."""
    config = ModelConfigBase(output_dir=folder, model_id="some/model")
    with start_run(config, command) as run:
        with JsonlWriter(run.path(name)) as writer:
            for row in rows:
                writer.write(row)
        run.finish({name: "rows"})
    return folder


def make_runs(root: Path) -> Path:
    """A run of each kind that the app tells apart, and one of an older tool, below `root`."""
    make_run(root / "cool", "run_personas", persona_rows())
    make_run(root / "warm", "run_personas", persona_rows(shift=0.5, seed=1))
    make_run(root / "doses", "steer", dose_rows())
    make_run(root / "french", "extract_directions", score_rows(), "scores.jsonl")
    older = root / "older"
    older.mkdir()
    older_names = ("num_thinking_tokens", "finish_reason", "truncated_thinking", "id", "turn", "seed", "model_id")
    rows = [{k: v for k, v in row.items() if k not in older_names} for row in persona_rows(seed=2)]
    rows = [row | {"think_end_position": 10 + i, "avg_entropy_thinking": 1.5} for i, row in enumerate(rows)]
    (older / "results.json").write_text(json.dumps(rows))
    return root
