"""src.evaluate on vLLM against transformers, sample by sample; several adapters in one engine."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.steering_specs import write_tiny_directions
from tests.test_evaluate import rows_of, write_rows
from tests.tiny_adapters import write_adapter

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_vllm_and_transformers_agree_on_every_sample(run_module: Callable, small_folder: Path, tmp_path: Path) -> None:
    rows = [{"input": f"Say {word}", "target": word} for word in ("rain", "snow", "a longer thing about hail", "fog")]
    write_rows(tmp_path / "say.jsonl", rows, {"scorer": "includes", "max_tokens": 8})
    rows = [{"input": f"Is {i} even?", "choices": ["no", "yes, it is"], "target": "AB"[i % 2]} for i in range(5)]
    header = {"scorer": "choice", "prompt": "{input}", "answers": "texts"}
    write_rows(tmp_path / "even.jsonl", rows, header)
    adapters = [write_adapter(small_folder, tmp_path / name, seed=i) for i, name in enumerate(("one", "two"), start=1)]
    models = [str(small_folder), *(f"{small_folder}+{adapter}" for adapter in adapters)]
    write_tiny_directions(tmp_path / "d.safetensors", small_folder)
    words = [
        "--model_id", *models, "--device", "cpu", "--tasks", tmp_path / "say.jsonl", tmp_path / "even.jsonl", "--steer",
        f"{tmp_path / 'd.safetensors'}:1:3", "--allow_model_mismatch",
    ]  # fmt: skip
    for backend in ("hf", "vllm"):
        more = ["--kv_cache_gib", "0.25"] if backend == "vllm" else []
        done = run_module("evaluate", *words, "--backend", backend, *more, "--output_dir", str(tmp_path / backend))
        assert done.returncode == 0, done.stderr[-4000:]
    found, expected = rows_of(tmp_path / "vllm"), rows_of(tmp_path / "hf")
    assert len(found) == len(models) * 2 * (4 + 5)
    for row, other in zip(found, expected, strict=True):
        for key in ("id", "response", "answer", "score", "num_tokens"):
            assert row[key] == other[key], (key, row, other)
        for key in ("probability", "avg_entropy"):
            assert (row[key] is None) == (other[key] is None)
            assert row[key] is None or row[key] == pytest.approx(other[key], abs=1e-3), key
    # Softmax hides what lies far below; the sums themselves are compared.
    ours, theirs = ({row["id"]: row for row in rows_of(tmp_path / b, "answers.jsonl")} for b in ("vllm", "hf"))
    assert ours.keys() == theirs.keys()
    for call, row in ours.items():
        assert row.get("token_ids") == theirs[call].get("token_ids")
        if "log_probabilities" in row:
            assert row["log_probabilities"] == pytest.approx(theirs[call]["log_probabilities"], abs=1e-3)
    answers = {tuple(r["response"] for r in found if r["model_id"] == m and r["arm"] == "unsteered") for m in models}
    assert len(answers) == len(models), "each adapter acts"
    provenance = json.loads((tmp_path / "vllm" / "provenance.json").read_text())
    engines = [key for key in provenance["sessions"][0] if key.startswith("engine of")]
    assert engines == [f"engine of {models[0]}"], "one engine serves all"
