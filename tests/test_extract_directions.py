"""The command on a tiny random model: what it writes, resuming, exports, and bad input."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from src.common.cli import parse_config
from src.common.directions_file import read_directions
from src.common.errors import InputError
from src.common.model_config import ModelConfigBase
from src.directions.outcome import next_command
from src.directions.outputs import import_file
from src.extract_directions import ExtractDirectionsConfig, main
from src.models.fingerprint import fingerprint
from src.models.language_model import LanguageModel
from src.steer import SteerConfig
from tests.conftest import ROOT
from tests.planted_model import plant, save
from tests.tiny_models import copy_model

SCRIPT = "<script>alert('x')</script>"
TOPICS = ["rain", "bread", "music", "ships", "glass", "trees", "clocks", "maps", "salt", "wool", "ink", "bells"]
COOKING = {
    "positive_path": ROOT / "data/directions/cooking_other/target.jsonl",
    "negative_path": ROOT / "data/directions/cooking_other/control.jsonl",
}
ROW_KEYS = [
    "id", "layer", "k", "auc", "d_prime", "target_mean", "control_mean", "cosine_held_out", "cosine_fitted",
    "difference_norm", "activation_norm", "logistic_c", "random_auc", "random_auc_low", "random_auc_high",
    "shuffled_auc", "shuffled_auc_low", "shuffled_auc_high", "problem",
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write(folder / "target.jsonl", [{"id": t, "prompt": f"Please tell me all about {t}. {SCRIPT}"} for t in TOPICS])
    write(folder / "control.jsonl", [{"id": t, "prompt": f"{t}: what is it?"} for t in TOPICS])
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def words(inputs: Path, model: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        "--positive_path", f"{inputs}/target.jsonl", "--negative_path", f"{inputs}/control.jsonl",
        "--model_id", str(model), "--output_dir", str(output_dir), *more,
    ]  # fmt: skip


def extract(*arguments: object) -> None:
    main(parse_config(ExtractDirectionsConfig, [str(each) for each in arguments]))


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "scores.jsonl").read_bytes().splitlines()]


@pytest.fixture(scope="module")
def finished(inputs: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, run_module: Callable):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    more = ["--paired", "--token_position", "mean_prompt", "--export", "gguf", "npz", "pt"]
    done = run_module("extract_directions", *words(inputs, tiny_folder, folder, *more))
    assert done.returncode == 0, done.stderr
    return folder, done, more


def test_a_run_writes_directions_scores_and_a_report(finished, tiny_folder: Path) -> None:
    folder, done, _ = finished
    directions = read_directions(folder / "directions.safetensors")
    assert directions.directions.shape == (2, 1, 32) and directions.layers_present == (0, 1)
    known = directions.metadata
    assert known.model_fingerprint == fingerprint(tiny_folder) and known.method == "mean_difference"
    assert (known.hook_point, known.token_position) == ("resid_post", "mean_prompt")
    assert known.details["mean_prompt_over"].startswith("the user's own text")
    assert (known.details["n_target_fitted"], known.details["n_control_held_out"]) == (10, 2)
    rows = rows_of(folder)
    assert [list(row) for row in rows] == [ROW_KEYS] * 2 and [row["layer"] for row in rows] == [0, 1]
    assert known.scores["auc"] == [[row["auc"]] for row in rows]
    assert all(0 <= row["auc"] <= 1 and row["random_auc_low"] <= row["random_auc_high"] for row in rows)
    assert directions.percentile(0, 0, "p100") >= directions.percentile(0, 0, "p50")
    best = known.best_layer
    assert f"best layer {best} of 2: AUC {rows[best]['auc']}" in done.stdout
    for name in ("directions.safetensors", "scores.jsonl", "report.html", "residuals", "directions.gguf"):
        assert f"wrote {folder / name}" in done.stdout


def test_the_next_command_names_the_best_layer_and_the_distance_of_the_classes(finished) -> None:
    folder, done, _ = finished
    line = next(line for line in done.stdout.split("\n") if line.startswith("next: uv run -m src.steer "))
    steer = shlex.split(line)[shlex.split(line).index("--steer") + 1]
    path, layer, coefficient = steer.rsplit(":", 2)
    row = rows_of(folder)[int(layer)]
    assert path == str(folder / "directions.safetensors")
    assert float(coefficient) == pytest.approx(row["target_mean"] - row["control_mean"], rel=0.01)


def test_the_direction_is_the_difference_of_the_fitted_rows(finished, tiny_folder: Path) -> None:
    from src.directions.examples import held_out_ids, read_contrast
    from src.models.residual_store import read_rows

    folder, _, more = finished
    config = parse_config(ExtractDirectionsConfig, words(Path("x"), tiny_folder, folder, *more))
    config.positive_path, config.negative_path = (
        json.loads((folder / "config.json").read_text())["config"][name] for name in ("positive_path", "negative_path")
    )
    contrast = read_contrast(config)
    held = held_out_ids(contrast, config.val_fraction, config.seed)
    means = []
    for examples in (contrast.target, contrast.control):
        means.append(read_rows(folder / "residuals", [e.id for e in examples if e.id not in held]).double().mean(0))
    expected = torch.nn.functional.normalize(means[0] - means[1], dim=-1).numpy()
    found = read_directions(folder / "directions.safetensors").directions[:, 0]
    assert np.abs(found - expected).max() < 1e-6


def test_the_report_is_self_contained_and_what_prompts_say_is_escaped(finished) -> None:
    page = (finished[0] / "report.html").read_text()
    assert SCRIPT not in page and "&lt;script&gt;alert(" in page
    # plotly's own code, which names its makers' pages, is not looked at; the page's policy forbids all loading.
    assert not re.findall(r"https?:", re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL))
    assert "default-src 'none'" in page
    figures = [json.loads(each) for each in re.findall(r'<script type="application/json">(.*?)</script>', page)]
    assert len(figures) == 4
    bands = {trace.get("name") for trace in figures[0]["data"]}
    assert {"random directions, 95 %", "shuffled labels, 95 %"} <= bands
    for chosen in figures[1:3]:
        assert [button["label"] for button in chosen["layout"]["updatemenus"][0]["buttons"]] == ["layer 0", "layer 1"]
    n_shown = sum(len(trace["x"]) for trace in figures[1]["data"] if trace["visible"] is not False)
    assert n_shown == 24 and all("<" not in text for trace in figures[2]["data"] for text in trace["hovertext"])


def test_the_same_command_again_makes_the_same_without_the_model(
    finished, inputs: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _, more = finished
    folder = tmp_path / "again"
    shutil.copytree(whole, folder)
    for name in ("DONE", "directions.safetensors", "scores.jsonl", "report.html"):
        (folder / name).unlink()

    def refuse(config: object) -> None:
        raise AssertionError("the model was loaded though all hidden states are there")

    monkeypatch.setattr(LanguageModel, "load", refuse)
    extract(*words(inputs, tiny_folder, folder, *more))
    for name in ("directions.safetensors", "scores.jsonl", "directions.npz"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    with pytest.raises(InputError, match=r"method was .*mean_difference.* is now .*pca"):
        extract(*words(inputs, tiny_folder, folder, *more, "--method", "pca"))


def test_what_an_interrupted_run_extracted_is_kept(
    finished, inputs: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _, more = finished
    from src.models import residuals

    class Interrupted(Exception):
        pass

    calls = []
    deliver = residuals._deliver

    def once(batch: list, *rest: object, **settings: object) -> None:
        calls.append([sequence.id for sequence in batch])
        deliver(batch, *rest, **settings)
        if len(calls) == 1:
            raise Interrupted

    monkeypatch.setattr(residuals, "_deliver", once)
    arguments = words(inputs, tiny_folder, tmp_path / "cut", *more, "--tokens_per_batch", "200")
    with pytest.raises(Interrupted):
        extract(*arguments)
    extract(*arguments)
    ids = [each for batch in calls for each in batch]
    assert len(ids) == len(set(ids)) == 24 and len(calls) > 2
    # Batches of another size round differently.
    found, expected = (read_directions(f / "directions.safetensors").directions for f in (tmp_path / "cut", whole))
    assert np.abs(found - expected).max() < 1e-4


def test_exports_are_imported_as_they_were(finished, tiny_folder: Path, tmp_path: Path) -> None:
    whole = finished[0]
    expected = read_directions(whole / "directions.safetensors")
    for name in ("npz", "pt", "gguf"):
        folder = tmp_path / name
        extract("--import_path", whole / f"directions.{name}", "--model_id", tiny_folder, "--output_dir", folder)
        found = read_directions(folder / "directions.safetensors")
        layers = (1,) if name == "gguf" else (0, 1)
        assert found.layers_present == layers and found.metadata.model_fingerprint == fingerprint(tiny_folder)
        assert np.abs(found.directions[list(layers)] - expected.directions[list(layers)]).max() < 1e-6
    config = ExtractDirectionsConfig(
        model_id="m", output_dir=tmp_path, import_path=whole / "directions.npz", adapter_path=tmp_path
    )
    # A direction of a model with its adapter is one of another model than the bare one.
    facts = {"model_fingerprint": "m", "adapter_fingerprint": "a"}
    assert import_file(config, facts, 2, 32).metadata.adapter_fingerprint == "a"
    np.savez(tmp_path / "wide.npz", layer_1=np.ones(7, dtype=np.float32))
    with pytest.raises(InputError, match=r"7 coordinates.* 32"):
        extract("--import_path", tmp_path / "wide.npz", "--model_id", tiny_folder, "--output_dir", tmp_path / "w")


@pytest.mark.parametrize(
    "more",
    [
        ["--method", "pca", "--n_directions", "3", "--paired", "--report_layer", "0"],
        ["--method", "cones", "--n_directions", "2", "--project_out", "control_mean"],
        ["--method", "ensemble", "--winsorize_quantile", "0.99", "--layers", "1", "--hook_point", "mlp_out"],
        ["--method", "logistic", "--logistic_c", "none", "--raw_prompts", "--token_position", "token:-2"],
        ["--preserve_path", "target.jsonl", "--preserve_against_path", "control.jsonl", "--n_preserve", "2",
         "--positive_path", "control.jsonl", "--negative_path", "other.jsonl", "--system_prompt", "Be brief."],
    ],
    ids=lambda more: more[1],
)  # fmt: skip
def test_methods_and_positions_end_to_end(inputs: Path, tiny_folder: Path, tmp_path: Path, more: list[str]) -> None:
    write(inputs / "other.jsonl", [{"id": t, "prompt": f"Sell me {t}!"} for t in TOPICS])
    more = [str(inputs / word) if word.endswith(".jsonl") else word for word in more]
    extract(*words(inputs, tiny_folder, tmp_path / "out", *more))
    directions = read_directions(tmp_path / "out" / "directions.safetensors")
    k = int(more[more.index("--n_directions") + 1]) if "--n_directions" in more else 1
    assert directions.k == k and len(rows_of(tmp_path / "out")) == k * len(directions.layers_present)
    details = directions.metadata.details
    assert details["bos_added"] == ("--raw_prompts" in more)
    assert details.get("n_preserve") == (2 if "--preserve_path" in more else None)


def test_a_layer_without_a_direction_is_left_out_and_said(
    inputs: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    # What enters the first block at the prompt's last token is that token's embedding, whatever stands before it.
    extract(*words(inputs, tiny_folder, tmp_path / "out", "--hook_point", "resid_pre"))
    printed = capsys.readouterr().out
    assert "layer 0: no direction: the means of target and control are equal at layer 0" in printed
    directions = read_directions(tmp_path / "out" / "directions.safetensors")
    assert directions.layers_present == (1,) and directions.metadata.scores["auc"][0] == [None]
    with pytest.raises(InputError, match="no layer has a direction"):
        extract(*words(inputs, tiny_folder, tmp_path / "none", "--hook_point", "resid_pre", "--layers", "0"))


def test_long_prompts_are_cut_counted_and_said(
    inputs: Path, tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extract(*words(inputs, tiny_folder, tmp_path / "out", "--max_prompt_tokens", "40"))
    cut = read_directions(tmp_path / "out" / "directions.safetensors").metadata.details["n_prompts_cut"]
    assert 0 < cut <= 12 and f"{cut} of 24 prompts have more than 40 tokens" in caplog.text
    # Cut to their last two tokens all targets are the same; then nothing but the side is left.
    write(inputs / "ends.jsonl", [{"id": t, "prompt": f"{t} and so on, and so on: what is it?"} for t in TOPICS])
    more = ["--positive_path", f"{inputs}/ends.jsonl", "--max_prompt_tokens", "34"]
    with pytest.raises(InputError, match="same tokens to the model"):
        extract(*words(inputs, tiny_folder, tmp_path / "same", *more))


def test_hidden_states_that_are_not_finite_are_refused(inputs: Path, tiny_folder: Path, tmp_path: Path) -> None:
    broken = copy_model(tiny_folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"layer 1 \(resid_post\) are not finite"):
        extract(*words(inputs, broken, tmp_path / "out"))


def test_bad_input_is_one_line_with_place_and_remedy(inputs: Path, tiny_folder: Path, tmp_path: Path) -> None:
    write(inputs / "one.jsonl", [{"prompt": "only one"}])
    (inputs / "empty.json").write_text("[]")
    (inputs / "notes.bin").write_bytes(b"\x00")
    for change, expected in [
        (["--positive_path", "nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
        (["--positive_path", f"{inputs}/empty.json"], ["empty.json:1", "at least one"]),
        (["--positive_path", f"{inputs}/one.jsonl"], ["--val_fraction", "at least 2"]),
        (["--positive_path", f"{inputs}/control.jsonl"], ["same text"]),
        (["--positive_path", f"{inputs}/one.jsonl", "--paired"], ["1 prompts", "--paired"]),
        (["--num_tasks", "3"], ["leaves 1 held-out", "give more prompts"]),
        (["--layers", "0-5"], ["layer 5", "0 to 1"]),
        (["--report_layer", "9"], ["--report_layer 9"]),
        (["--token_position", "token:-500"], ["token:-500", "leave it out"]),
        (["--method", "pca", "--n_directions", "20"], ["--n_directions 20", "at most 19"]),
        (["--method", "pca", "--n_directions", "11", "--paired"], ["--n_directions 11", "at most 10"]),
        (["--method", "cones", "--n_directions", "11"], ["--n_directions 11", "at most 10"]),
        (
            [
                "--preserve_path",
                f"{inputs}/one.jsonl",
                "--preserve_against_path",
                f"{inputs}/target.jsonl",
                "--n_preserve",
                "13",
            ],
            ["--n_preserve 13", "at most 12"],
        ),
        (["--preserve_path", "nowhere.txt", "--preserve_against_path", "x"], ["nowhere.txt"]),
        (["--chat_template", "nowhere.jinja"], ["nowhere.jinja"]),
        (["--model_id", "./models/nowhere"], ["./models/nowhere", "no such folder"]),
    ]:
        with pytest.raises(InputError) as caught:
            extract(*words(inputs, tiny_folder, tmp_path / "out", *change))
        message = str(caught.value)
        assert "\n" not in message and all(word in message for word in expected), (change, message)
    assert not (tmp_path / "out" / "directions.safetensors").exists()
    # Hours of extraction, for a model that is not tiny: what cannot be made of them is known before.
    assert not (tmp_path / "out" / "residuals").exists()


def test_a_wrong_path_answers_before_torch_is_imported(inputs: Path, run_module: Callable) -> None:
    done = run_module(
        "extract_directions", "--pairs_path", "nowhere.jsonl", "--model_id", "m", "--output_dir", "x",
        PYTHONPROFILEIMPORTTIME="1",
    )  # fmt: skip
    assert done.returncode == 2 and "nowhere.jsonl: no such file" in done.stderr
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


def test_prompts_that_cannot_be_are_refused_before_torch_is_imported(
    inputs: Path, tiny_folder: Path, tmp_path: Path, run_module: Callable
) -> None:
    same = ["--negative_path", f"{inputs}/target.jsonl"]
    done = run_module(
        "extract_directions", *words(inputs, tiny_folder, tmp_path / "out", *same), PYTHONPROFILEIMPORTTIME="1"
    )
    assert done.returncode == 2 and "is the same text" in done.stderr
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


def test_the_next_command_asks_the_model_in_the_same_way() -> None:
    config = ExtractDirectionsConfig(
        model_id="base", output_dir=Path("o"), pairs_path=Path("p"), adapter_path=Path("a b"), raw_prompts=True,
        thinking_mode=False, dtype="bfloat16",
    )  # fmt: skip
    line = next_command(config, Path("d.safetensors"), {"layer": 3, "target_mean": 2000.0, "control_mean": -500.0})
    steered = parse_config(SteerConfig, shlex.split(line)[4:])
    for name in ("model_id", "adapter_path", "raw_prompts", "thinking_mode", "dtype"):
        assert getattr(steered, name) == getattr(config, name), name
    assert steered.steer == ["d.safetensors:3:2.5e+03"] and steered.coefficients == [-2500, 2500]


@pytest.mark.slow
def test_the_report_draws_one_layer_by_umap(inputs: Path, tiny_folder: Path, tmp_path: Path) -> None:
    n_threads = torch.get_num_threads()
    extract(*words(inputs, tiny_folder, tmp_path / "out", "--reduction", "umap", "--report_layer", "0"))
    assert torch.get_num_threads() == n_threads, "what is computed behind it would have other last bits"
    page = (tmp_path / "out" / "report.html").read_text()
    figure = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', page)[2])
    assert figure["layout"]["xaxis"]["title"]["text"] == "UMAP of layer 0, 1"
    assert sum(len(trace["x"]) for trace in figure["data"]) == 24


@pytest.mark.slow
def test_a_planted_direction_is_found_at_its_layer_on_prompts_it_was_not_made_from(tmp_path: Path) -> None:
    from datetime import date

    from src.directions.examples import read_contrast
    from src.directions.rendering import PromptRenderer

    layer = 14
    config = ModelConfigBase(model_id="bundled:smollm2-135m", output_dir=Path("unused"), dtype="float32", device="cpu")
    model = LanguageModel.load(config)
    settings = parse_config(
        ExtractDirectionsConfig,
        [word for name, path in COOKING.items() for word in (f"--{name}", str(path))]
        + ["--model_id", "m", "--output_dir", "o"],
    )
    contrast = read_contrast(settings)
    renderer = PromptRenderer(settings, model.tokenizer, date.today())
    made_from = [renderer.sequences(side[::2]) for side in (contrast.target, contrast.control)]
    planted = plant(model, *made_from, layer=layer, strength=4.0)
    folder = save(model, tmp_path / "planted")
    for side, name in ((contrast.target, "target"), (contrast.control, "control")):
        write(tmp_path / f"{name}.jsonl", [{"id": e.id, "prompt": e.text} for e in side[1::2]])
    for method in ("mean_difference", "logistic"):
        more = ["--method", method, "--token_position", "mean_prompt", "--layers", "10-18"]
        extract(*words(tmp_path, folder, tmp_path / method, *more))
        found = read_directions(tmp_path / method / "directions.safetensors").directions[:, 0]
        cosines = np.abs(found @ planted.u.numpy())
        assert cosines[layer] > 0.9 and cosines.argmax() == layer, cosines
        assert cosines[:layer].max() < 0.2
