"""Rows and captures of a run stay together, whatever a kill took; parity's summary against numbers made by hand."""

from pathlib import Path

import pytest
import torch

from src.common.capture_spec import Capture
from src.common.captures import read_captures
from src.common.errors import InputError
from src.common.results import Results
from src.models.parity import Reference, compare, summary
from src.models.types import GenerationRequest, GenerationResult
from src.steering.kept import Kept
from src.steering.settings import SteerSettings

KEY = "0.resid_post"


def settings(folder: Path, capture: str) -> SteerSettings:
    return SteerSettings(
        prompts_json="p", model_id="m", output_dir=folder, steer=["d:0:1"], capture=capture, backend="vllm"
    )


def result(name: str, tokens: tuple[int, ...], states: torch.Tensor, **fields: object) -> GenerationResult:
    known = {"text": "", "entropy": (0.0,) * len(tokens), "top_k_mass": (0.5,) * len(tokens), "finish_reason": "length"}
    return GenerationResult(id=name, token_ids=tokens, captures={KEY: states}, **(known | fields))


def test_rows_whose_captures_a_kill_took_are_asked_again(tmp_path: Path) -> None:
    config = settings(tmp_path, "0:mean")
    results = Results(tmp_path)
    kept = Kept(config, tmp_path, results)
    request = GenerationRequest(id="a", token_ids=(1, 2, 3), max_tokens=2, capture=kept.of(3, 2))
    for name in ("a", "b"):
        results.add({"id": name})
        kept.add(request, result(name, (4, 5), torch.ones(1, 8)))
        if name == "a":
            kept.flush()
    # Killed here: b is written, and its capture is in no shard yet.
    again = Results(tmp_path)
    assert set(again.rows) == {"a", "b"}
    resumed = Kept(config, tmp_path, again)
    assert set(again.rows) == {"a"} == set(Results(tmp_path).rows)
    again.add({"id": "b"})
    resumed.add(request, result("b", (4, 5), torch.zeros(1, 8)))
    resumed.finish(["a", "b"])
    captures = read_captures(tmp_path / "captures")
    captures.verify()
    # Of the two tokens of the answer the last was not run.
    assert [(row["id"], row["start"], row["n_positions"], row["reduce"]) for row in captures.rows] == [
        ("a", 0, 4, "mean"), ("b", 0, 4, "mean"),
    ]  # fmt: skip
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(InputError, match=r"row 'a' is captured and results.jsonl lacks it"):
        Kept(config, tmp_path, Results(tmp_path))


def test_an_ended_answer_was_run_whole_and_an_empty_one_keeps_nothing_generated(tmp_path: Path) -> None:
    results = Results(tmp_path)
    kept = Kept(settings(tmp_path, "0:generated"), tmp_path, results)
    request = GenerationRequest(id="a", token_ids=(1, 2, 3), max_tokens=9, capture=kept.of(3, 2))
    for name, tokens in (("two", (4, 5)), ("none", ())):
        results.add({"id": name})
        kept.add(request, result(name, tokens, torch.ones(len(tokens), 8), finish_reason="stop"))
    kept.finish(["two", "none"])
    captures = read_captures(tmp_path / "captures")
    assert [row["n_positions"] for row in captures.rows] == [2, 0]
    assert captures.tensor("two", 0).shape == (2, 8) and captures.tensor("none", 0).shape == (0, 8)


def test_parity_counts_up_to_the_first_difference_and_fails_below_its_bars() -> None:
    capture = Capture(places=((0, "resid_post"),))
    request = GenerationRequest(id="a", token_ids=(1, 2), max_tokens=3, capture=capture)
    states = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    reference = Reference(request, result("a", (7, 8, 9), torch.empty(0)), {KEY: states})
    same = compare(reference, result("a", (7, 8, 9), states[:4].clone()))
    assert (same.n_agreed, same.identical, same.log_probability) == (3, True, 0)
    assert summary([same], "float32")["passed"] and summary([same], "bfloat16")["passed"]
    # What comes after the first difference has other tokens before it: it does not count.
    other = states[:4].clone()
    other[3] = 99
    parted = compare(reference, result("a", (7, 6, 9), other, top_k_mass=(0.25, 0.5, 0.5)))
    assert parted.n_agreed == 1 and not parted.identical
    assert parted.log_probability == pytest.approx(0.6931, abs=1e-4) and parted.cosine[KEY] > 0.999999
    found = summary([same, parted], "bfloat16")
    assert found["greedy"]["top_1_agreement"] == 4 / 5 and not found["passed"] and "0.8" in found["failures"][0]
    assert summary([same, parted], "float32")["passed"], "float32 has no bar on tokens"
    wrong = compare(reference, result("a", (7, 8, 9), states[:4] + 2e-4))
    assert "mean absolute error 2.00e-04" in summary([wrong], "float32")["failures"][0]
    broken = compare(reference, result("a", (7, 8, 9), states[:4] * torch.nan))
    assert not summary([same, broken], "float32")["passed"]
    with pytest.raises(RuntimeError, match="3 positions; expected 4"):
        compare(reference, result("a", (7, 8, 9), states[:3]))
