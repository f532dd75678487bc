"""src.steer and run_personas --steer on vLLM: the rows of transformers, captures, kills, parity."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from src.common.capture_spec import Capture
from src.common.captures import read_captures
from src.common.interventions import parse_steer
from src.common.model_config import ModelConfigBase
from src.models.fingerprint import fingerprint
from src.models.language_model import LanguageModel, generate_all
from src.models.parity import direct
from src.models.types import GenerationRequest
from tests.conftest import ROOT, module_command
from tests.steering_specs import some_directions, write_directions

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
PROMPTS = [
    {"id": f"p{i}", "prompt": text}
    for i, text in enumerate(
        ["Who are you?", "What is rain, and why does it fall?", "Why sing?", "Where do rivers go?"]
    )
]
ARMS = ["unsteered", "+20", "+40", "+20 random", "+40 random"]
SMALL = ["--dtype", "float32", "--device", "cpu", "--max_model_len", "512"]
ON_VLLM = ["--backend", "vllm", "--kv_cache_gib", "0.25"]
KEPT = ["--capture", "12,29:generated", "--capture_hook_points", "resid_post", "mlp_out"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, bundled_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    persona = {"persona": "pirate", "category": "fiction", "article": "a"}
    (folder / "personae.json").write_text(json.dumps([persona]))
    known = {"percentiles": None, "model_fingerprint": fingerprint(bundled_folder)}
    write_directions(folder / "d.safetensors", some_directions(n_layers=30, d_model=576, **known))
    return folder


def words(inputs: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        "--prompts_json", str(inputs / "prompts.json"), "--model_id", "bundled:smollm2-135m",
        "--steer", f"{inputs / 'd.safetensors'}:12:9", "--coefficients", "20", "40", "--random_control",
        "--output_dir", str(output_dir), "--max_tokens", "10", *SMALL, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def on_vllm(inputs: Path, tmp_path_factory: pytest.TempPathFactory, run_module: Callable) -> tuple[Path, str]:
    """The folder of a whole run with captures and parity, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "vllm"
    done = run_module("steer", *words(inputs, folder, *ON_VLLM, *KEPT, "--parity", "1"))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_bytes().splitlines()]


def assert_same(rows: list[dict], expected: list[dict]) -> None:
    assert [list(row) for row in rows] == [list(row) for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for key, value in row.items():
            if not isinstance(value, float):
                assert value == other[key], key
            elif key == "mean_projection":
                assert value == pytest.approx(other[key], rel=1e-2), key
            else:
                assert value == pytest.approx(other[key], abs=1.1e-3), key


def test_rows_are_those_of_transformers(on_vllm, inputs: Path, tmp_path: Path, run_module: Callable) -> None:
    folder, said = on_vllm
    whole = run_module("steer", *words(inputs, tmp_path / "hf", "--backend", "hf"))
    assert whole.returncode == 0, whole.stderr
    rows = rows_of(folder)
    assert_same(rows, rows_of(tmp_path / "hf"))
    assert [row["arm"] for row in rows] == [arm for arm in ARMS for _ in PROMPTS]
    assert len({row["response"] for row in rows}) > 12, "the interventions should show in the answers"
    assert all(row["kl_per_token"] > 1e-3 for row in rows[4:])
    assert f"wrote {folder / 'captures'}" in said and "read_captures" in said
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["backend"] == "vllm"


def test_captures_are_the_states_of_the_answers_tokens(on_vllm, inputs: Path) -> None:
    hf = LanguageModel.load(
        ModelConfigBase(model_id="bundled:smollm2-135m", output_dir=Path("unused"), dtype="float32", device="cpu")
    )
    folder = on_vllm[0]
    captures = read_captures(folder / "captures")
    captures.verify()
    rows = {(row["arm"], row["prompt_id"]): row for row in rows_of(folder)}
    assert {row["id"] for row in captures.rows} == {row["id"] for row in rows.values()}
    from src.models.chat_format import PersonaRenderer

    renderer = PersonaRenderer(hf.tokenizer, "system")
    specs = {
        "unsteered": (), "+20": hf.resolve([parse_steer(f"{inputs / 'd.safetensors'}:12:20")]),
        "+40": hf.resolve([parse_steer(f"{inputs / 'd.safetensors'}:12:40")]),
    }  # fmt: skip
    places = tuple((layer, point) for layer in (12, 29) for point in ("resid_post", "mlp_out"))
    for arm, one in specs.items():
        for prompt in PROMPTS:
            ids = renderer.render(prompt["prompt"]).token_ids
            request = GenerationRequest(
                id="x", token_ids=ids, max_tokens=10, interventions=one, capture=Capture(places=places)
            )
            answer = generate_all(hf, [GenerationRequest(**{**vars(request), "capture": None})])[0]
            row = rows[arm, prompt["id"]]
            assert row["response"] == answer.text
            expected = direct(hf, request, answer.token_ids)
            for layer, point in places:
                states = captures.tensor(row["id"], layer, point)
                wanted = expected[f"{layer}.{point}"][len(ids) :]
                wanted = wanted[:-1] if answer.finish_reason == "length" else wanted
                assert states.shape == wanted.shape and len(states) > 2
                assert torch.cosine_similarity(states, wanted, dim=-1).min() > 0.99999


def test_parity_is_told(on_vllm) -> None:
    folder, said = on_vllm
    found = json.loads((folder / "parity.json").read_text())
    assert found["passed"] and found["n_prompts"] == 1 and found["greedy"]["rows"] == 5 == len(found["rows"])
    assert set(found["places"]) == {"12.resid_post", "12.mlp_out", "29.resid_post", "29.mlp_out"}
    assert all(each["cosine_min"] >= 0.99999 for each in found["places"].values())
    assert found["greedy"]["rows_identical"] == 5 and found["log_probability_difference"] < 1e-3
    assert "vLLM against transformers" in said and "resid_post of layer 29" in said


def test_killed_and_resumed_keeps_rows_and_captures_together(
    on_vllm, inputs: Path, tmp_path: Path, run_module: Callable
) -> None:
    folder = tmp_path / "broken"
    command = words(inputs, folder, *ON_VLLM, *KEPT)
    process = subprocess.Popen(module_command("steer", command), cwd=ROOT, stderr=subprocess.PIPE)
    path = folder / "results.jsonl"
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 5):
        time.sleep(0.005)
    process.kill()
    process.communicate()
    n_left, captured = len(rows_of(folder)), {row["id"] for row in read_captures(folder / "captures").rows}
    assert 5 <= n_left < 20 and 4 <= len(captured) < n_left
    assert captured <= {row["id"] for row in rows_of(folder)}
    resumed = run_module("steer", *command)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert f"{len(captured)} of 20 rows are there already" in resumed.stderr
    assert_same(rows_of(folder), rows_of(on_vllm[0]))
    ours, expected = read_captures(folder / "captures"), read_captures(on_vllm[0] / "captures")
    ours.verify()
    assert {row["id"] for row in ours.rows} == {row["id"] for row in expected.rows}
    for row in expected.rows:
        for key in row["keys"]:
            layer, point = key.split(".")
            a, b = ours.tensor(row["id"], int(layer), point), expected.tensor(row["id"], int(layer), point)
            assert a.shape == b.shape and torch.cosine_similarity(a, b, dim=-1).min() > 0.99999


BROKEN = """
import sys
from dataclasses import replace
from unittest import mock
from src.common.cli import run_command
from src.models.vllm_steering import WorkerSteering
from src.steer import SteerConfig, main

plain = WorkerSteering.register

def register(self, fingerprint, spec):
    changed = [replace(o, coefficient=1.02 * o.coefficient) for o in spec.operations]
    plain(self, fingerprint, replace(spec, operations=tuple(changed)))

with mock.patch.object(WorkerSteering, "register", register):
    run_command(main, SteerConfig, sys.argv[1:])
"""


def test_a_wrong_coefficient_fails_parity_and_nothing_is_asked(inputs: Path, tmp_path: Path) -> None:
    command = words(inputs, tmp_path / "run", *ON_VLLM, "--parity", "1", "--max_tokens", "4")
    done = subprocess.run([sys.executable, "-c", BROKEN, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-3000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("check failed: vLLM and transformers differ") and "12.resid_post" in last
    found = json.loads((tmp_path / "run" / "parity.json").read_text())
    assert not found["passed"] and found["failures"] and found["places"]["12.resid_post"]["mean_absolute_error"] > 1e-4
    assert rows_of(tmp_path / "run") == [] and not (tmp_path / "run" / "DONE").exists()


def test_steered_and_projected_personas_are_those_of_transformers(inputs, tmp_path, run_module) -> None:
    file = inputs / "d.safetensors"
    for backend in ("hf", "vllm"):
        done = run_module(
            "run_personas", "--prompts_json", str(inputs / "prompts.json"), "--personae_json",
            str(inputs / "personae.json"), "--turns", str(inputs / "prompts.json"), "--num_tasks", "2",
            "--model_id", "bundled:smollm2-135m", "--steer", f"{file}:12:25", "--project_onto", f"{file}:12",
            "--max_tokens", "8", "--output_dir", str(tmp_path / backend), *SMALL, "--backend", backend,
            *(["--kv_cache_gib", "0.25"] if backend == "vllm" else []),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    rows = rows_of(tmp_path / "vllm")
    assert_same(rows, rows_of(tmp_path / "hf"))
    assert len(rows) == 2 * 5 and all(row["mean_projection"] > 10 for row in rows)


def test_personas_of_a_compiled_model_are_steered_as_in_transformers(inputs, tmp_path, run_module) -> None:
    file = inputs / "d.safetensors"
    for backend, more in (("hf", []), ("vllm", ["--compiled", "--kv_cache_gib", "0.25"])):
        done = run_module(
            "run_personas", "--prompts_json", str(inputs / "prompts.json"), "--personae_json",
            str(inputs / "personae.json"), "--num_tasks", "2", "--model_id", "bundled:smollm2-135m",
            "--steer", f"{file}:12:25", "--max_tokens", "8", "--output_dir", str(tmp_path / backend), *SMALL,
            "--backend", backend, *more,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same(rows_of(tmp_path / "vllm"), rows_of(tmp_path / "hf"))
