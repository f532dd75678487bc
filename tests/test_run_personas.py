import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from src.common.cli import parse_config
from src.common.errors import InputError
from src.common.interventions import parse_steer
from src.common.model_config import ModelConfigBase
from src.models.chat_format import PersonaRenderer
from src.models.hooks import Location
from src.models.language_model import LanguageModel, generate_all
from src.models.teacher_forcing import mean_projections
from src.models.token_sequences import TokenSequence
from src.models.types import GenerationRequest
from src.run_personas import RunPersonasConfig, main
from tests.conftest import ROOT, heeds_ctrl_c, module_command
from tests.steering_specs import write_tiny_directions

PROMPTS = [{"id": f"p{i}", "prompt": text} for i, text in enumerate(["Who are you?", "What is rain?", "Why sing?"])]
PERSONAS = [
    {"persona": "assistant", "category": "plain", "article": "an"},
    {"persona": "Hamlet", "category": "fiction", "article": ""},
    {"persona": "[red] <b>{x}</b>", "category": "odd", "article": "the"},
]
FOLLOW_UPS = ["Why?", "Are you sure?"]
KEYS = [
    *("id", "persona", "category", "article", "system_prompt", "prompt_id", "prompt", "rep_idx", "turn"),
    *("response", "thinking", "avg_entropy_thinking", "avg_entropy_output", "avg_entropy"),
    *("avg_top_k_mass_thinking", "avg_top_k_mass_output", "avg_top_k_mass", "think_end_position", "num_tokens"),
    *("num_thinking_tokens", "finish_reason", "truncated_thinking", "persona_applied", "seed", "model_id"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    for name, content in (("prompts", PROMPTS), ("personae", PERSONAS), ("turns", FOLLOW_UPS)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def arguments(inputs: Path, model: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        "--prompts_json", str(inputs / "prompts.json"), "--personae_json", str(inputs / "personae.json"),
        "--model_id", str(model), "--output_dir", str(output_dir), "--max_tokens", "6", *more,
    ]  # fmt: skip


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_bytes().splitlines()]


@pytest.fixture(scope="module")
def finished(inputs: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, run_module: Callable):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    more = ["--turns", str(inputs / "turns.json"), "--temperature", "1", "--n-repeats", "2", "--token-arrays"]
    done = run_module("run_personas", *arguments(inputs, tiny_folder, folder, *more))
    assert done.returncode == 0, done.stderr
    return folder, done, more


def test_a_run_writes_every_row_in_task_order(finished) -> None:
    folder, done, _ = finished
    rows = rows_of(folder)
    assert all(list(row) == KEYS for row in rows)
    order = [(r["persona"], r["prompt_id"], r["rep_idx"], r["turn"]) for r in rows]
    assert order == [
        (p["persona"], q["id"], rep, turn) for p in PERSONAS for q in PROMPTS for rep in (0, 1) for turn in (0, 1, 2)
    ]
    assert len({row["id"] for row in rows}) == len({row["seed"] for row in rows}) == 54
    assert (folder / "DONE").exists()
    for name in ("results.jsonl", "summary.json", "tokens.parquet"):
        assert str(folder / name) in done.stdout
    assert f"src.view {folder}" in done.stdout


def test_rows_say_what_was_asked_and_how(finished) -> None:
    for row in rows_of(finished[0]):
        assert (
            row["prompt"] == ([q["prompt"] for q in PROMPTS if q["id"] == row["prompt_id"]] + FOLLOW_UPS)[row["turn"]]
        )
        assert row["persona_applied"] == ("system" if row["persona"] == "assistant" else "header+system")
        assert row["num_thinking_tokens"] == 0 and row["thinking"] is None and row["avg_entropy_thinking"] is None
        assert row["avg_entropy"] == row["avg_entropy_output"]
        assert 0 < row["avg_entropy"] < 10.81 and 0 < row["avg_top_k_mass"] <= 1
    systems = {row["persona"]: row["system_prompt"] for row in rows_of(finished[0])}
    assert list(systems.values()) == ["You are an assistant.", "You are Hamlet.", "You are the [red] <b>{x}</b>."]


def test_the_token_arrays_average_to_the_rows(finished) -> None:
    folder = finished[0]
    table = pq.read_table(folder / "tokens.parquet").to_pylist()
    rows = rows_of(folder)
    assert [t["id"] for t in table] == [row["id"] for row in rows]
    for arrays, row in zip(table, rows, strict=True):
        assert len(arrays["token_id"]) == len(arrays["entropy"]) == len(arrays["top_k_mass"]) == row["num_tokens"]
        if row["num_tokens"]:
            assert sum(arrays["entropy"]) / row["num_tokens"] == pytest.approx(row["avg_entropy"], abs=6e-5)


def test_the_summary_is_of_the_rows(finished) -> None:
    summary = json.loads((finished[0] / "summary.json").read_text())
    rows = rows_of(finished[0])
    for group, key in (("personas", "persona"), ("categories", "category")):
        assert set(summary[group]) == {row[key] for row in rows}
        for name, measures in summary[group].items():
            values = [r["avg_entropy"] for r in rows if r[key] == name and r["avg_entropy"] is not None]
            assert measures["avg_entropy"]["n"] == len(values)
            assert measures["avg_entropy"]["mean"] == pytest.approx(sum(values) / len(values), abs=6e-5)
            assert measures["avg_entropy_thinking"] is None


def test_the_same_command_again_changes_nothing(
    finished, inputs: Path, tiny_folder: Path, run_module: Callable
) -> None:
    folder, _, more = finished
    before = {name: (folder / name).read_bytes() for name in ("results.jsonl", "summary.json", "tokens.parquet")}
    again = run_module("run_personas", *arguments(inputs, tiny_folder, folder, *more))
    assert again.returncode == 0
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_another_configuration_in_the_folder_is_refused(finished, inputs: Path, tiny_folder: Path, run_module) -> None:
    folder, _, more = finished
    before = (folder / "results.jsonl").read_bytes()
    changed = run_module("run_personas", *arguments(inputs, tiny_folder, folder, *more, "--seed", "7"))
    assert changed.returncode == 2
    assert "seed was 42, is now 7" in changed.stderr and changed.stderr.count("\n") == 1
    assert (folder / "results.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", ["1", "5"])
def test_rows_do_not_depend_on_the_batch_size(finished, inputs, tiny_folder, tmp_path, run_module, batch_size) -> None:
    folder, _, more = finished
    run_module("run_personas", *arguments(inputs, tiny_folder, tmp_path / "x", *more, "--batch_size", batch_size))
    for row, other in zip(rows_of(folder), rows_of(tmp_path / "x"), strict=True):
        assert {k: v for k, v in row.items() if "avg" not in k} == {k: v for k, v in other.items() if "avg" not in k}
        for key in ("avg_entropy", "avg_top_k_mass"):
            assert row[key] == pytest.approx(other[key], abs=1.5e-4)


def n_rows(folder: Path) -> int:
    path = folder / "results.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def killed_after(command: list[str], folder: Path, rows: int) -> None:
    """Start a command and kill it as soon as its folder holds so many rows."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and n_rows(folder) < rows:
        time.sleep(0.01)
    process.kill()
    process.wait()


@pytest.mark.slow
def test_killed_and_resumed_gives_the_rows_of_an_uninterrupted_run(
    inputs: Path, bundled_folder: Path, tmp_path: Path, run_module: Callable
) -> None:
    more = ["--turns", str(inputs / "turns.json"), "--batch_size", "3", "--token_arrays", "--max_tokens", "12"]
    whole = run_module("run_personas", *arguments(inputs, bundled_folder, tmp_path / "whole", *more))
    assert whole.returncode == 0, whole.stderr
    broken = tmp_path / "broken"
    command = module_command("run_personas", arguments(inputs, bundled_folder, broken, *more))
    for rows in (1, 7, 13):
        killed_after(command, broken, rows)
        assert rows <= n_rows(broken) < 27
    # As if the kill had fallen into a write.
    with (broken / "results.jsonl").open("ab") as file:
        file.write(b'{"id": "abc", "pers')
    assert not (broken / "DONE").exists()
    resumed = run_module("run_personas", *arguments(inputs, bundled_folder, broken, *more))
    assert resumed.returncode == 0, resumed.stderr
    expected, rows = rows_of(tmp_path / "whole"), rows_of(broken)
    assert [r["id"] for r in rows] == [r["id"] for r in expected]
    assert [r["response"] for r in rows] == [r["response"] for r in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row["avg_entropy"] == pytest.approx(other["avg_entropy"], abs=1.5e-4)
    arrays = pq.read_table(broken / "tokens.parquet").to_pylist()
    assert [len(a["token_id"]) for a in arrays] == [r["num_tokens"] for r in rows]


@pytest.mark.slow
def test_more_tasks_in_a_finished_folder_are_added(inputs: Path, tiny_folder: Path, tmp_path, run_module) -> None:
    folder = tmp_path / "grows"
    first = run_module("run_personas", *arguments(inputs, tiny_folder, folder, "--num_tasks", "1", "--token_arrays"))
    assert first.returncode == 0, first.stderr
    small = rows_of(folder)
    assert [row["prompt_id"] for row in small] == ["p0"] * 3
    run_module("run_personas", *arguments(inputs, tiny_folder, folder, "--num_tasks", "2", "--token_arrays"))
    grown = rows_of(folder)
    assert [row["prompt_id"] for row in grown] == ["p0", "p1"] * 3
    assert [row for row in grown if row["prompt_id"] == "p0"] == small
    assert pq.read_table(folder / "tokens.parquet").num_rows == 6


@pytest.mark.slow
@pytest.mark.parametrize("sign, code, words", [(signal.SIGTERM, 75, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")])
def test_a_signal_stops_and_says_that_the_command_resumes(inputs, bundled_folder, tmp_path, sign, code, words) -> None:
    folder = tmp_path / "stopped"
    command = module_command("run_personas", arguments(inputs, bundled_folder, folder, "--max_tokens", "4000"))
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeds_ctrl_c
    )
    while not (folder / "results.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(sign)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == code
    assert words in stderr and "the same command goes on from here" in stderr
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_workers_merged_give_the_run_of_one_process(finished, inputs, tiny_folder, tmp_path, run_module) -> None:
    folder, _, more = finished
    out = tmp_path / "workers"
    words = arguments(inputs, tiny_folder, out, *more)
    for index in ("0", "1"):
        assert run_module("run_personas", *words, "--num_workers", "2", "--worker_index", index).returncode == 0
    merged = run_module("merge_shards", "--shards_dir", str(out / "shards"), "--output_dir", str(out))
    assert merged.returncode == 0, merged.stderr
    done = run_module("run_personas", *words)
    assert done.returncode == 0, done.stderr
    for row, other in zip(rows_of(folder), rows_of(out), strict=True):
        assert (row["id"], row["response"]) == (other["id"], other["response"])
    assert json.loads((out / "summary.json").read_text()).keys() == {"personas", "categories", "overall"}
    ids = pq.read_table(out / "tokens.parquet")["id"].to_pylist()
    assert ids == [row["id"] for row in rows_of(out)]


@pytest.mark.slow
def test_temperature_zero_makes_one_repeat_and_says_so(inputs: Path, tiny_folder: Path, tmp_path, run_module) -> None:
    done = run_module("run_personas", *arguments(inputs, tiny_folder, tmp_path / "x", "--n_reps", "3"))
    assert {row["rep_idx"] for row in rows_of(tmp_path / "x")} == {0}
    assert "at temperature 0 all 3 repeats would be equal" in done.stderr


@pytest.mark.slow
def test_personas_are_chosen_by_category_and_number(inputs: Path, tiny_folder: Path, tmp_path, run_module) -> None:
    run_module("run_personas", *arguments(inputs, tiny_folder, tmp_path / "a", "--categories", "fiction", "odd"))
    assert {row["category"] for row in rows_of(tmp_path / "a")} == {"fiction", "odd"}
    run_module("run_personas", *arguments(inputs, tiny_folder, tmp_path / "b", "--num_personae", "1"))
    assert {row["persona"] for row in rows_of(tmp_path / "b")} == {"assistant"}


def bad_inputs(folder: Path, model: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Name → (arguments that go wrong, words that the message must hold)."""
    files = {
        "malformed.json": '[{"prompt": "a"},\n{"prompt" "b"}]',
        "empty.json": "[]",
        "key.json": '[{"prompt": "a"},\n{"promt": "b"}]',
        "blank.json": '["a",\n" "]',
        "twice.json": json.dumps([PERSONAS[0], PERSONAS[0]]),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "broken.jinja").write_text("{% for m in messages %}\n{% endif %}")
    (folder / "no_weights").mkdir()
    (folder / "no_weights" / "config.json").write_text("{}")
    (folder / "taken").mkdir()
    (folder / "taken" / "thesis.tex").write_text("mine")
    good = arguments(folder, model, folder / "out")

    def replaced(flag: str, value: str) -> list[str]:
        words = list(good)
        words[words.index(flag) + 1] = value
        return words

    prompt = lambda name: replaced("--prompts_json", str(folder / name))  # noqa: E731
    return {
        "missing file": (prompt("nowhere.json"), ["nowhere.json", "no such file"]),
        "malformed JSON": (prompt("malformed.json"), ["malformed.json:2", "malformed JSON"]),
        "empty list": (prompt("empty.json"), ["empty.json:1", "at least one"]),
        "wrong key": (prompt("key.json"), ["key.json:2", "promt", '"prompt"']),
        "empty prompt": (prompt("blank.json"), ["blank.json:2", "blank"]),
        "duplicate persona": (replaced("--personae_json", str(folder / "twice.json")), ["twice.json:1", "assistant"]),
        "no tasks": ([*good, "--num_tasks", "0"], ["--num_tasks 0", "at least 1"]),
        "unknown flag": ([*good, "--max_token", "4"], ["--max_token", "--max_tokens"]),
        "unknown category": ([*good, "--categories", "ficton"], ["ficton", "fiction"]),
        "foreign folder": (replaced("--output_dir", str(folder / "taken")), ["taken", "thesis.tex"]),
        "no weights": (replaced("--model_id", str(folder / "no_weights")), ["no_weights", "no weights"]),
        "no such model": (replaced("--model_id", "./models/nowhere"), ["./models/nowhere", "no such folder"]),
        "unknown bundled model": (replaced("--model_id", "bundled:gpt"), ["bundled:gpt", "bundled:smollm2-135m"]),
        "unknown style": ([*good, "--system_prompt_style", "foo"], ["--system_prompt_style 'foo'", "act-as"]),
        "broken template": ([*good, "--chat_template", str(folder / "broken.jinja")], ["broken.jinja:2", "Jinja"]),
        "bad number": ([*good, "--max_tokens", "many"], ["--max_tokens", "many", "whole number"]),
        "unwritable folder": (replaced("--output_dir", "/proc/nowhere/out"), ["/proc/nowhere/out", "folder"]),
        "missing flag": (good[2:], ["--prompts_json"]),
        **({} if find_spec("vllm") else {"vllm": ([*good, "--backend", "vllm"], ["--backend vllm", "--backend hf"])}),
    }


def test_bad_input_is_one_line_with_place_and_remedy(inputs: Path, tiny_folder: Path, run_module: Callable) -> None:
    for name, (words, expected) in bad_inputs(inputs, tiny_folder).items():
        done = run_module("run_personas", *words)
        assert done.returncode == 2, (name, done.stderr)
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, (name, done.stderr)
        assert all(word in done.stderr for word in expected), (name, done.stderr)
        assert not (inputs / "out" / "results.jsonl").exists(), name
    assert os.listdir(inputs / "taken") == ["thesis.tex"]


def test_a_prompt_longer_than_the_context_is_named(inputs: Path, tiny_folder: Path, tmp_path: Path, run_module) -> None:
    (tmp_path / "long.json").write_text(
        json.dumps([{"id": "short", "prompt": "Hi"}, {"id": "tome", "prompt": "word " * 600}])
    )
    words = arguments(inputs, tiny_folder, tmp_path / "out")
    words[1] = str(tmp_path / "long.json")
    done = run_module("run_personas", *words)
    assert done.returncode == 2
    last = done.stderr.strip().split("\n")[-1]
    assert "long.json" in last and "'tome'" in last and "512" in last


@pytest.mark.slow
def test_a_conversation_that_outgrows_the_context_ends_and_the_others_go_on(inputs, tiny_folder, tmp_path, run_module):
    (tmp_path / "turns.json").write_text(json.dumps(["Why? " * 60] * 3))
    words = [*arguments(inputs, tiny_folder, tmp_path / "out"), "--turns", str(tmp_path / "turns.json")]
    done = run_module("run_personas", *words, "--num_personae", "1", "--max_tokens", "90", "--temperature", "1")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 12
    reasons = {row["turn"]: row["finish_reason"] for row in rows}
    assert reasons[0] != "context" and reasons[3] == "context"
    assert all(
        row["num_tokens"] == 0 and row["avg_entropy"] is None for row in rows if row["finish_reason"] == "context"
    )


def test_help_names_every_flag_in_both_spellings(run_module: Callable) -> None:
    shown = run_module("run_personas", "--help")
    assert shown.returncode == 0
    for flag in ("--prompts_json", "--n_repeats", "--thinking_mode", "--top_k_mass_k", "--persona_mode", "--turns"):
        assert flag in shown.stdout
    for spelling in ("--no_thinking_mode", "--no-thinking-mode"):
        done = run_module(
            "run_personas", "--prompts-json", "a", "--personae_json", "b", "--model", "c", "--output-dir", "d",
            spelling, "--show_config",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert any("thinking_mode" in line and "false" in line.lower() for line in done.stdout.split("\n"))


def personas(*words: str) -> None:
    """The command in this process: what a process of its own would do, without importing everything anew."""
    main(parse_config(RunPersonasConfig, words))


@pytest.fixture(scope="module")
def directions(inputs: Path, tiny_folder: Path) -> Path:
    return write_tiny_directions(inputs / "d.safetensors", tiny_folder)


def test_a_steered_run_holds_what_the_model_gives_by_hand(inputs, tiny_folder, directions, tmp_path) -> None:
    """Every persona and prompt through the library; the projection is that of the steered response."""
    flags = ["--steer", f"{directions}:0:6", "--project_onto", f"{directions}:1", "--batch_size", "2", "--turns"]
    words = arguments(inputs, tiny_folder, tmp_path / "x", *flags, str(inputs / "turns.json"))
    personas(*words)
    rows = rows_of(tmp_path / "x")
    assert all(list(row) == [*KEYS, "mean_projection"] for row in rows) and len(rows) == 27
    model = LanguageModel.load(ModelConfigBase(model_id=str(tiny_folder), output_dir=Path("unused")))
    renderer = PersonaRenderer(model.tokenizer)
    one, direction = (
        model.resolve([parse_steer(f"{directions}:0:6")]),
        model.resolve([parse_steer(f"{directions}:1:1")]),
    )
    articles = {p["persona"]: p["article"] for p in PERSONAS}
    for row in [row for row in rows if row["turn"] == 0][:4]:
        ids = renderer.render(row["prompt"], row["persona"], articles[row["persona"]]).token_ids
        request = GenerationRequest(id="a", token_ids=ids, max_tokens=6, interventions=one)
        result = generate_all(model, [request])[0]
        assert row["response"] == result.text
        forced = TokenSequence(id="a", token_ids=(*ids, *result.token_ids), prompt_length=len(ids))
        mean = mean_projections(model, [(forced, one)], Location(1, "resid_post"), direction.operations[0].direction)
        assert row["mean_projection"] == pytest.approx(mean[0], abs=1e-4)
    provenance = json.loads((tmp_path / "x" / "provenance.json").read_text())
    assert provenance["interventions_fingerprint"] == one.fingerprint
    assert json.loads((tmp_path / "x" / "summary.json").read_text())["overall"]["mean_projection"]["n"] == 27


def test_a_coefficient_of_zero_and_a_projection_change_no_answer(inputs, tiny_folder, directions, tmp_path) -> None:
    flags = {
        "plain": [],
        "zero": ["--steer", f"{directions}:0:0"],
        "projected": ["--project_onto", f"{directions}:best"],
    }
    rows = {}
    for name, more in flags.items():
        personas(*arguments(inputs, tiny_folder, tmp_path / name, *more))
        rows[name] = rows_of(tmp_path / name)
    assert rows["plain"] == rows["zero"]
    assert [{k: v for k, v in row.items() if k != "mean_projection"} for row in rows["projected"]] == rows["plain"]
    assert all(isinstance(row["mean_projection"], float) for row in rows["projected"])


def test_a_steered_run_cut_off_ends_as_the_whole_one_and_is_refused_with_others(
    inputs, tiny_folder, directions, tmp_path
) -> None:
    flags = ["--steer", f"{directions}:0:6", "--project_onto", f"{directions}:1", "--batch_size", "4"]
    words = arguments(inputs, tiny_folder, tmp_path / "x", *flags)
    personas(*words)
    whole = rows_of(tmp_path / "x")
    path = tmp_path / "x" / "results.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[2:7]) + b'{"id": "abc", "pers')
    personas(*words)
    for row, other in zip(rows_of(tmp_path / "x"), whole, strict=True):
        assert (row["id"], row["response"]) == (other["id"], other["response"])
        assert row["mean_projection"] == pytest.approx(other["mean_projection"], abs=2e-4)
    kept = directions.read_bytes()
    write_tiny_directions(directions, tiny_folder, best_layer=0)
    try:
        with pytest.raises(InputError, match=r"d\.safetensors was"):
            personas(*words)
    finally:
        directions.write_bytes(kept)
    words[words.index("--steer") + 1] = f"{directions}:0:7"
    with pytest.raises(InputError, match="steer was"):
        personas(*words)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--steer", "nowhere.safetensors:0:1"], r"nowhere.safetensors: no such file"),
        (["--steer", "FILE:9:1"], r"--steer .*layers 9.*0 to 1"),
        (["--steer", "FILE:0"], "FILE:LAYERS:COEFFICIENT"),
        (["--interventions_path", "nowhere.json"], r"nowhere.json: no such file"),
        (["--steer", "FILE:0:1", "--interventions_path", "s.json"], "exclude each other"),
        (["--project_onto", "FILE"], "expected FILE:LAYER"),
        (["--project_onto", "FILE:9"], "--project_onto .*layers 9"),
        (["--project_onto", "FILE:0", "--backend", "vllm", "--compiled"], "--compiled: .*leave it out"),
    ],
)
def test_bad_interventions_are_refused_before_a_model_is_loaded(
    inputs, tiny_folder, directions, tmp_path, flags, expected
) -> None:
    words = [word.replace("FILE", str(directions)) for word in flags]
    with pytest.raises(InputError, match=expected):
        personas(*arguments(inputs, tiny_folder, tmp_path / "x", *words))
    assert not (tmp_path / "x").exists()
