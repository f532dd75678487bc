"""src.steer as a user runs it."""

import io
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from src.common.cli import parse_config
from src.common.errors import InputError
from src.common.interventions import parse_steer
from src.common.model_config import ModelConfigBase
from src.models.chat_format import PersonaRenderer
from src.models.hooks import Location
from src.models.language_model import LanguageModel, generate_all
from src.models.teacher_forcing import kl_per_token, mean_projections
from src.models.token_sequences import TokenSequence
from src.models.types import GenerationRequest
from src.steer import SteerConfig, main
from tests.conftest import ROOT, module_command
from tests.steering_specs import some_directions, write_directions, write_tiny_directions

PROMPTS = [{"id": f"p{i}", "prompt": text} for i, text in enumerate(["Who are you?", "<b>Rain</b>?", "Why sing?"])]
WORDS = {"french": ["le", "la", "et"], "english": ["the", "and", "of"]}
GRID = ["--coefficients", "-4", "0", "2.5", "--random_control"]
ARMS = ["-4", "unsteered", "+2.5", "-4 random", "+2.5 random"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    (folder / "words.json").write_text(json.dumps(WORDS))
    write_tiny_directions(folder / "d.safetensors", tiny_folder)
    spec = [{"directions_path": str(folder / "d.safetensors"), "layers": "0", "op": "cap", "lo": "p25"}]
    (folder / "spec.json").write_text(json.dumps(spec))
    return folder


def arguments(inputs: Path, model: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        "--prompts_json", str(inputs / "prompts.json"), "--model_id", str(model), "--output_dir", str(output_dir),
        "--max_tokens", "6", *more,
    ]  # fmt: skip


def grid(inputs: Path) -> list[str]:
    return ["--steer", f"{inputs / 'd.safetensors'}:0-1:9", *GRID, "--function_words", str(inputs / "words.json")]


def steer(*words: str) -> str:
    """The command in this process, without importing everything anew; returns what it prints and logs."""
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(said):
        main(parse_config(SteerConfig, words))
    return said.getvalue()


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_bytes().splitlines()]


@pytest.fixture(scope="module")
def finished(inputs: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a whole run, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, steer(*arguments(inputs, tiny_folder, folder, *grid(inputs), "--batch_size", "4"))


def test_a_run_writes_every_row_arm_by_arm(finished) -> None:
    folder, said = finished
    rows = rows_of(folder)
    assert [(row["arm"], row["prompt_id"]) for row in rows] == [(a, p["id"]) for a in ARMS for p in PROMPTS]
    assert list(rows[0])[:9] == [
        "id", "arm", "coefficient", "control", "prompt_id", "prompt", "rep_idx", "response", "thinking",
    ]  # fmt: skip
    assert {row["arm"]: (row["coefficient"], row["control"]) for row in rows} == {
        "-4": (-4, False), "unsteered": (0, False), "+2.5": (2.5, False), "-4 random": (-4, True),
        "+2.5 random": (2.5, True),
    }  # fmt: skip
    assert len({row["id"] for row in rows}) == 15 and all(list(row) == list(rows[0]) for row in rows)
    for name in ("results.jsonl", "references.jsonl", "summary.json", "report.html"):
        assert str(folder / name) in said
    assert "Dose and response" in said and "Generating on transformers" in said
    assert (folder / "DONE").exists()


def test_rows_hold_what_the_model_gives_by_hand(finished, inputs: Path, tiny_folder: Path) -> None:
    """Prompt by prompt through the library: tokens, divergence on the unsteered response, projection of the own."""
    rows = {(row["arm"], row["prompt_id"]): row for row in rows_of(finished[0])}
    model = LanguageModel.load(ModelConfigBase(model_id=str(tiny_folder), output_dir=Path("unused")))
    renderer = PersonaRenderer(model.tokenizer, "system")
    spec = model.resolve([parse_steer(f"{inputs / 'd.safetensors'}:0-1:2.5")])
    for prompt in PROMPTS:
        ids = renderer.render(prompt["prompt"]).token_ids
        make = lambda name, one, ids=ids: GenerationRequest(id=name, token_ids=ids, max_tokens=6, interventions=one)  # noqa: E731
        plain, steered = generate_all(model, [make("plain", ()), make("steered", spec)])
        for arm, result, one in (("unsteered", plain, None), ("+2.5", steered, spec)):
            row = rows[arm, prompt["id"]]
            assert row["response"] == result.text and row["num_tokens"] == len(result.token_ids)
            assert row["avg_entropy"] == pytest.approx(sum(result.entropy) / len(result.entropy), abs=1e-4)
            own = TokenSequence(id="own", token_ids=(*ids, *result.token_ids), prompt_length=len(ids))
            direction = spec.operations[1].direction
            mean = mean_projections(model, [(own, one)], Location(1, "resid_post"), direction)[0]
            assert row["mean_projection"] == pytest.approx(mean, abs=1e-4)
        reference = TokenSequence(id="r", token_ids=(*ids, *plain.token_ids), prompt_length=len(ids))
        kl = kl_per_token(model, [(reference, spec)])[0].mean().item()
        assert rows["+2.5", prompt["id"]]["kl_per_token"] == pytest.approx(kl, rel=2e-3)
        assert rows["unsteered", prompt["id"]]["kl_per_token"] == 0


def test_the_summary_is_of_the_rows(finished) -> None:
    summary = json.loads((finished[0] / "summary.json").read_text())["arms"]
    assert list(summary) == ARMS
    for arm, measures in summary.items():
        rows = [row for row in rows_of(finished[0]) if row["arm"] == arm]
        for name in ("kl_per_token", "mean_projection", "distinct_2", "avg_entropy"):
            values = [row[name] for row in rows]
            assert measures[name]["n"] == 3
            assert measures[name]["mean"] == pytest.approx(sum(values) / 3, rel=1e-3, abs=1e-4)
        share = sum(row["most_words"] == "french" for row in rows) / 3
        assert measures["share_french"]["mean"] == pytest.approx(share, abs=1e-4)


def test_the_report_is_escaped_and_plots_the_doses(finished) -> None:
    page = (finished[0] / "report.html").read_text()
    assert "&lt;b&gt;Rain&lt;/b&gt;?" in page and "<b>Rain" not in page
    assert page.count('<div class="plot">') == 7 and "random control" in page
    assert 'placeholder="filter rows"' in page


def test_the_same_command_again_changes_nothing(finished, inputs: Path, tiny_folder: Path) -> None:
    folder = finished[0]
    names = ("results.jsonl", "references.jsonl", "summary.json", "report.html")
    before = {name: (folder / name).read_bytes() for name in names}
    said = steer(*arguments(inputs, tiny_folder, folder, *grid(inputs), "--batch_size", "4"))
    assert "15 of 15 rows are there already" in said and "Computing in" not in said
    assert {name: (folder / name).read_bytes() for name in names} == before


def test_other_directions_or_another_grid_in_the_folder_are_refused(finished, inputs: Path, tiny_folder: Path) -> None:
    words = arguments(inputs, tiny_folder, finished[0], *grid(inputs))
    kept = (inputs / "d.safetensors").read_bytes()
    write_tiny_directions(inputs / "d.safetensors", tiny_folder, best_layer=0)
    try:
        with pytest.raises(InputError, match=r"d\.safetensors was"):
            steer(*words)
    finally:
        (inputs / "d.safetensors").write_bytes(kept)
    with pytest.raises(InputError, match="coefficients was"):
        steer(*words, "--coefficients", "7")
    with pytest.raises(InputError, match="random_control was true, is now false"):
        steer(*words, "--no_random_control")


@pytest.mark.parametrize("n_kept", [1, 4, 11])
def test_a_run_cut_off_after_some_rows_ends_as_the_whole_one(
    finished, inputs: Path, tiny_folder: Path, tmp_path: Path, n_kept: int
) -> None:
    """As a kill leaves it: rows in the order of asking, a torn last line, references whose rows are missing."""
    folder = shutil.copytree(finished[0], tmp_path / "cut")
    asked = sorted(rows_of(folder), key=lambda row: row["arm"] != "unsteered")
    lines = [json.dumps(row).encode() + b"\n" for row in asked[:n_kept]]
    (folder / "results.jsonl").write_bytes(b"".join(lines) + b'{"id": "abc", "ar')
    (folder / "DONE").unlink()
    steer(*arguments(inputs, tiny_folder, folder, *grid(inputs)))
    assert (folder / "DONE").exists()
    for row, other in zip(rows_of(folder), rows_of(finished[0]), strict=True):
        assert (row["id"], row["response"]) == (other["id"], other["response"])
        for name in ("kl_per_token", "mean_projection", "avg_entropy"):
            assert row[name] == pytest.approx(other[name], rel=5e-3, abs=2e-4)


def test_unsteered_rows_without_their_tokens_are_refused(finished, inputs, tiny_folder, tmp_path) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "cut")
    (folder / "references.jsonl").write_text("")
    with pytest.raises(InputError, match=r"references\.jsonl: has no token ids of row"):
        steer(*arguments(inputs, tiny_folder, folder, *grid(inputs)))


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_gives_the_same_rows(
    finished, inputs: Path, bundled_folder: Path, tmp_path: Path, run_module: Callable
) -> None:
    from src.models.fingerprint import fingerprint

    metadata = {"model_fingerprint": fingerprint(bundled_folder)}
    write_directions(
        tmp_path / "d.safetensors", some_directions(n_layers=30, d_model=576, percentiles=None, **metadata)
    )
    more = ["--steer", f"{tmp_path / 'd.safetensors'}:12:9", *GRID, "--batch_size", "3", "--max_tokens", "10"]
    whole = run_module("steer", *arguments(inputs, bundled_folder, tmp_path / "whole", *more))
    assert whole.returncode == 0, whole.stderr
    broken = tmp_path / "broken"
    for n_rows in (1, 4, 10):
        command = module_command("steer", arguments(inputs, bundled_folder, broken, *more))
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        path = broken / "results.jsonl"
        while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < n_rows):
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert not (broken / "DONE").exists()
    resumed = run_module("steer", *arguments(inputs, bundled_folder, broken, *more))
    assert resumed.returncode == 0, resumed.stderr
    for row, other in zip(rows_of(broken), rows_of(tmp_path / "whole"), strict=True):
        assert (row["id"], row["response"]) == (other["id"], other["response"])
        assert row["kl_per_token"] == pytest.approx(other["kl_per_token"], rel=1e-2, abs=1e-5)


def test_a_coefficient_of_zero_is_the_unsteered_arm_to_the_token(inputs, tiny_folder, tmp_path) -> None:
    """Prompts of several lengths drawn at temperature 0; its spec is empty, and its divergence exactly 0."""
    words = ["--steer", f"{inputs / 'd.safetensors'}:1:0", "--project_onto", f"{inputs / 'd.safetensors'}:0"]
    steer(*arguments(inputs, tiny_folder, tmp_path / "x", *words))
    rows = rows_of(tmp_path / "x")
    plain, zero = rows[:3], rows[3:]
    assert {row["arm"] for row in plain} == {"unsteered"} and {row["arm"] for row in zero} == {"steered"}
    assert [row["response"] for row in plain] == [row["response"] for row in zero]
    assert [row["kl_per_token"] for row in zero] == [0, 0, 0]
    assert [row["mean_projection"] for row in plain] == [row["mean_projection"] for row in zero]
    sessions = json.loads((tmp_path / "x" / "provenance.json").read_text())["sessions"]
    assert sessions[0]["projected_onto"] == "resid_post of layer 0"


def test_a_spec_raw_prompts_and_repeats(inputs: Path, tiny_folder: Path, tmp_path: Path) -> None:
    words = ["--interventions_path", str(inputs / "spec.json"), "--raw_prompts", "--temperature", "1", "--n_reps", "2"]
    steer(*arguments(inputs, tiny_folder, tmp_path / "x", *words, "--num_tasks", "2"))
    rows = rows_of(tmp_path / "x")
    assert [(r["arm"], r["prompt_id"], r["rep_idx"]) for r in rows] == [
        (arm, prompt, rep) for arm in ("unsteered", "steered") for prompt in ("p0", "p1") for rep in (0, 1)
    ]
    assert {row["coefficient"] for row in rows[4:]} == {None} and len({row["seed"] for row in rows}) == 8
    references = [json.loads(line) for line in (tmp_path / "x" / "references.jsonl").read_text().splitlines()]
    assert {row["id"] for row in references} == {row["id"] for row in rows[:4]}
    assert torch.tensor([row["num_tokens"] for row in rows]).max() == 6


def bad_inputs(folder: Path, model: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Name → (arguments that go wrong, words that the message must hold)."""
    file = folder / "d.safetensors"
    files = {
        "malformed.json": '[{"directions_path": "d", "layers": "0", "op": "ad", "coefficient": 1}]',
        "layer.json": json.dumps([{"directions_path": str(file), "layers": "7", "op": "ablate"}]),
        "one.json": '{"french": ["le"]}',
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    good = arguments(folder, model, folder / "out")
    steer = lambda *more: [*good, "--steer", *more]  # noqa: E731
    spec = lambda name: [*good, "--interventions_path", str(folder / name)]  # noqa: E731
    return {
        "nothing": (good, ["--steer FILE:LAYERS:COEFFICIENT"]),
        "both": ([*steer(f"{file}:0:1"), *spec("spec.json")[len(good) :]], ["--steer", "--interventions_path"]),
        "missing file": (steer("nowhere.safetensors:0:1"), ["nowhere.safetensors", "no such file"]),
        "no file": (steer(f"{folder / 'words.json'}:0:1"), ["words.json", "not a safetensors file"]),
        "form": (steer(f"{file}:0"), ["FILE:LAYERS:COEFFICIENT"]),
        "layer": (steer(f"{file}:5:1"), ["--steer", "layers 5", "0 to 1"]),
        "not finite": (steer(f"{file}:0:nan"), ["'nan'", "finite"]),
        "no spec": (spec("nowhere.json"), ["nowhere.json", "no such file"]),
        "malformed spec": (spec("malformed.json"), ["malformed.json:1", "entry 1", "'ad'", "'add'"]),
        "layer of a spec": (spec("layer.json"), ["layer.json", "entry 1", "layers 7"]),
        "grid without steer": ([*spec("spec.json"), "--coefficients", "1"], ["--coefficients", "--steer"]),
        "relative without steer": ([*spec("spec.json"), "--relative"], ["--relative", "--steer"]),
        "twice": ([*steer(f"{file}:0:1"), "--coefficients", "1", "1.0"], ["--coefficients", "once"]),
        "only zero": ([*steer(f"{file}:0:1"), "--coefficients", "0"], ["--coefficients", "other"]),
        "infinite": ([*steer(f"{file}:0:1"), "--coefficients", "inf"], ["--coefficients inf", "finite"]),
        "project": ([*steer(f"{file}:0:1"), "--project_onto", str(file)], ["--project_onto", "FILE:LAYER"]),
        "project layer": ([*steer(f"{file}:0:1"), "--project_onto", f"{file}:9"], ["--project_onto", "layers 9"]),
        "words": ([*steer(f"{file}:0:1"), "--function_words", str(folder / "one.json")], ["one.json", "two lists"]),
        "capture": (
            [*steer(f"{file}:0:1"), "--capture", "x:all", "--backend", "vllm"],
            ["--capture x:all", "8-12:mean"],
        ),
        "kept": (
            [*steer(f"{file}:0:1"), "--capture", "0:some", "--backend", "vllm"],
            ["--capture 0:some", "generated"],
        ),
        "capture on hf": (
            [*steer(f"{file}:0:1"), "--capture", "0", "--backend", "hf"],
            ["--capture", "--backend vllm"],
        ),
        "hook point": (
            [*steer(f"{file}:0:1"), "--capture", "0", "--capture_hook_points", "resid", "--backend", "vllm"],
            ["--capture_hook_points resid", "resid_pre"],
        ),
        "hook points alone": ([*steer(f"{file}:0:1"), "--capture_hook_points", "mlp_out"], ["goes with --capture"]),
        "parity on hf": ([*steer(f"{file}:0:1"), "--parity", "2", "--backend", "hf"], ["--parity", "--backend vllm"]),
        "parity where hf is chosen": (
            [*steer(f"{file}:0:1"), "--parity", "2", "--device", "cpu"],
            ["--parity", "device is cpu"],
        ),
        "no parity": ([*steer(f"{file}:0:1"), "--parity", "0", "--backend", "vllm"], ["--parity 0", "at least 1"]),
        "compiled": ([*steer(f"{file}:0:1"), "--backend", "vllm", "--compiled"], ["--compiled", "leave it out"]),
        "raw": ([*steer(f"{file}:0:1"), "--raw_prompts", "--system_prompt", "x"], ["--raw_prompts", "--system_prompt"]),
        "no tasks": ([*steer(f"{file}:0:1"), "--num_tasks", "0"], ["--num_tasks 0", "at least 1"]),
    }


def test_bad_input_is_refused_with_place_and_remedy_before_a_model_is_loaded(inputs: Path, tiny_folder: Path) -> None:
    for name, (words, expected) in bad_inputs(inputs, tiny_folder).items():
        with pytest.raises(InputError) as error:
            steer(*words)
        assert all(word in str(error.value) for word in expected), (name, str(error.value))
        assert "\n" not in str(error.value), name
        assert not (inputs / "out").exists(), name


def test_bad_input_is_one_line_and_exit_code_two(inputs: Path, tiny_folder: Path, run_module: Callable) -> None:
    done = run_module("steer", *bad_inputs(inputs, tiny_folder)["layer"][0], PYTHONPROFILEIMPORTTIME="1")
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time")]
    assert done.returncode == 2 and len(said) == 1 and said[0].startswith("error: --steer")
    assert not any(line.split("|")[-1].strip() in ("torch", "transformers") for line in done.stderr.splitlines())


def test_directions_of_another_model_are_refused_until_allowed(inputs, tiny_folder, tmp_path) -> None:
    write_directions(tmp_path / "other.safetensors", some_directions())
    words = ["--steer", f"{tmp_path / 'other.safetensors'}:0:2", "--num_tasks", "1"]
    with pytest.raises(InputError, match="--allow_model_mismatch"):
        steer(*arguments(inputs, tiny_folder, tmp_path / "x", *words))
    steer(*arguments(inputs, tiny_folder, tmp_path / "x", *words, "--allow_model_mismatch"))
    assert len(rows_of(tmp_path / "x")) == 2
    write_directions(tmp_path / "wide.safetensors", some_directions(d_model=48))
    words = ["--steer", f"{tmp_path / 'wide.safetensors'}:0:2", "--allow_model_mismatch"]
    with pytest.raises(InputError, match=r"width 48.*cannot be used"):
        steer(*arguments(inputs, tiny_folder, tmp_path / "y", *words))


def test_a_prompt_longer_than_the_context_is_named_before_anything_is_asked(inputs, tiny_folder, tmp_path) -> None:
    (tmp_path / "long.json").write_text(json.dumps(["Hi", {"id": "tome", "prompt": "word " * 600}]))
    words = arguments(inputs, tiny_folder, tmp_path / "x", "--steer", f"{inputs / 'd.safetensors'}:0:2")
    words[1] = str(tmp_path / "long.json")
    with pytest.raises(InputError, match=r"long\.json: prompt 'tome'.*512"):
        steer(*words)
    assert rows_of(tmp_path / "x") == []
