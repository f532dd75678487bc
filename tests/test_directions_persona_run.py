"""Directions from the stored responses of a persona run: the same tokens as the run's, chosen rows, what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from src.common.cli import parse_config
from src.common.directions_file import read_directions
from src.common.errors import InputError
from src.common.model_config import ModelConfigBase
from src.directions.examples import held_out_ids
from src.directions.persona_run import PersonaRun
from src.directions.settings import DirectionSettings
from src.extract_directions import ExtractDirectionsConfig
from src.extract_directions import main as extract_directions
from src.models.language_model import LanguageModel, generate_all
from src.models.loading import resolve
from src.models.residuals import extract
from src.models.types import GenerationRequest
from src.run_personas import RunPersonasConfig
from src.run_personas import main as run_personas
from tests.tiny_models import tiny_model

QUESTIONS = ["Who are you?", "What is rain?", "Why sing?", "How old is the sea?", "What do you like?", "Where to?",
             "Is it late?", "What is a name?"]  # fmt: skip
PERSONAS = [
    {"persona": "assistant", "category": "plain", "article": "an"},
    {"persona": "Hamlet", "category": "fiction", "article": ""},
    {"persona": "pirate", "category": "fiction", "article": "a"},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Two turns of three personas, greedy, with the tokens kept."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "prompts.json").write_text(json.dumps(QUESTIONS))
    (folder / "personae.json").write_text(json.dumps(PERSONAS))
    (folder / "turns.json").write_text(json.dumps(["Why?"]))
    arguments = [
        "--prompts_json", folder / "prompts.json", "--personae_json", folder / "personae.json", "--model_id",
        tiny_folder, "--output_dir", folder / "out", "--max_tokens", "7", "--turns", folder / "turns.json",
        "--token_arrays", "--backend", "hf",
    ]  # fmt: skip
    run_personas(parse_config(RunPersonasConfig, list(map(str, arguments))))
    return folder / "out"


def config(run: Path, *more: object, where: str = "persona=Hamlet") -> DirectionSettings:
    given = ["--positive_run", run, "--where", where, "--model_id", "m", "--output_dir", "o", *more]
    return parse_config(ExtractDirectionsConfig, list(map(str, given)))


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> LanguageModel:
    return LanguageModel.load(
        ModelConfigBase(model_id=str(tiny_folder), output_dir=Path("unused"), dtype="float32", device="cpu")
    )


def test_sequences_are_what_the_run_asked_and_was_answered(run: Path, model: LanguageModel) -> None:
    settings = config(run)
    source = PersonaRun(run)
    contrast = source.contrast(settings)
    assert len(contrast.target) == 16 and len(contrast.control) == 32
    sequences = source.sequences(contrast, model.tokenizer, "mean_response")
    stored = {row["id"]: tuple(row["token_id"]) for row in pq.read_table(run / "tokens.parquet").to_pylist()}
    requests = []
    for sequence in sequences:
        prompt, response = sequence.token_ids[: sequence.prompt_length], sequence.token_ids[sequence.prompt_length :]
        assert response == stored[sequence.id.split(":")[1]]
        requests.append(GenerationRequest(id=sequence.id, token_ids=prompt, max_tokens=7))
    # The proof that the prompt is the one that was asked: greedily continued it gives the same tokens again.
    for sequence, result in zip(sequences, generate_all(model, requests), strict=True):
        assert result.token_ids == sequence.token_ids[sequence.prompt_length :], sequence.id


def test_directions_are_of_the_mean_over_the_response(run: Path, model: LanguageModel, tmp_path: Path) -> None:
    arguments = ["--positive_run", run, "--where", "persona=Hamlet", "--negative_where", "persona=assistant",
                 "--model_id", model.model.name_or_path, "--output_dir", tmp_path / "out"]  # fmt: skip
    extract_directions(parse_config(ExtractDirectionsConfig, list(map(str, arguments))))
    directions = read_directions(tmp_path / "out" / "directions.safetensors")
    known = directions.metadata
    assert known.token_position == "mean_response" and known.details["where"] == ["persona=Hamlet"]
    assert (known.details["n_target_fitted"], known.details["n_target_held_out"]) == (12, 4)
    source, settings = PersonaRun(run), config(run, "--negative_where", "persona=assistant")
    contrast = source.contrast(settings)
    assert {example.row["persona"] for example in contrast.control} == {"assistant"}
    held = held_out_ids(contrast, settings.val_fraction, settings.seed)
    for prompt in range(len(QUESTIONS)):
        of_prompt = [e.id in held for e in contrast.examples if e.row["prompt_id"] == str(prompt)]
        assert len(of_prompt) == 4 and len(set(of_prompt)) == 1
    every: dict[str, torch.Tensor] = {}
    sequences = source.sequences(contrast, model.tokenizer, "mean_response")
    extract(model, sequences, layers=[0, 1], position="all", on_rows=lambda ids, rows: every.update({ids[0]: rows}))
    means = {s.id: every[s.id][s.prompt_length :].double().mean(0) for s in sequences}
    sides = [
        torch.stack([means[e.id] for e in side if e.id not in held]).mean(0)
        for side in (contrast.target, contrast.control)
    ]
    expected = torch.nn.functional.normalize(sides[0] - sides[1], dim=-1).numpy()
    assert np.abs(directions.directions[:, 0] - expected).max() < 1e-5


def test_positions_in_the_prompt_need_no_answer_and_count_a_prompt_once(run: Path, model: LanguageModel) -> None:
    source = PersonaRun(run)
    source.rows += [row | {"rep_idx": 1, "id": f"again-{row['id']}"} for row in source.rows if row["turn"] == 0]
    contrast = source.contrast(config(run, "--token_position", "mean_prompt"))
    assert len(contrast.target) == 16
    for sequence, example in zip(
        source.sequences(contrast, model.tokenizer, "mean_prompt"), contrast.examples, strict=True
    ):
        assert sequence.prompt_length == len(sequence.token_ids)
        assert model.tokenizer.decode(sequence.token_ids[slice(*sequence.text_span)]) == example.text


def test_one_question_under_two_ids_is_not_fitted_on_and_held_out(run: Path, tmp_path: Path) -> None:
    again = lambda row: row | ({"prompt": QUESTIONS[0]} if row["turn"] == 0 and row["prompt_id"] in "4567" else {})  # noqa: E731
    source = PersonaRun(changed(run, tmp_path / "a", again))
    for where in ("persona=Hamlet", "turn=1"):
        contrast = source.contrast(
            config(run, *(["--negative_where", "turn=0"] if "turn" in where else []), where=where)
        )
        for seed in range(20):
            held = held_out_ids(contrast, 0.5, seed)
            of_question = [e.id in held for e in contrast.examples if e.row["prompt_id"] in "04567"]
            assert len(set(of_question)) == 1, (where, seed)


def changed(run: Path, folder: Path, change) -> Path:
    """A copy of the run whose rows are changed and whose tokens are gone."""
    shutil.copytree(run, folder)
    (folder / "tokens.parquet").unlink()
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    (folder / "results.jsonl").write_text("".join(json.dumps(change(row)) + "\n" for row in rows))
    return folder


def test_without_stored_tokens_the_response_is_tokenized_and_the_difference_told(
    run: Path, tmp_path: Path, bundled_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder)
    text = "I am the prince <|im_end|> of Denmark"
    source = PersonaRun(changed(run, tmp_path / "a", lambda row: row | {"response": text, "num_tokens": 5}))
    contrast = source.contrast(config(run))
    # Turn 0 only: the later turns hold the changed answers.
    sequences = source.sequences(contrast, tokenizer, "mean_response")
    response = sequences[0].token_ids[sequences[0].prompt_length :]
    assert tokenizer.decode(response) == text and 2 not in response and len(response) > 5
    assert f"{len(sequences)} of {len(sequences)} responses have another number of tokens" in caplog.text


def test_rows_without_an_answer_are_left_out_and_thinking_needs_its_tokens(run: Path, tmp_path: Path) -> None:
    silent = PersonaRun(
        changed(run, tmp_path / "a", lambda row: row | ({"response": "", "num_tokens": 0} if row["turn"] else {}))
    )
    assert len(silent.contrast(config(run)).target) == 8
    thinking = PersonaRun(
        changed(run, tmp_path / "b", lambda row: row | {"thinking": "hm", "num_thinking_tokens": 2, "turn": 0})
    )
    thinking.rows = [row for row in thinking.rows if row["response"].strip()]
    tokenizer = AutoTokenizer.from_pretrained(json.loads((run / "config.json").read_text())["config"]["model_id"])
    with pytest.raises(InputError, match="--token_arrays"):
        thinking.sequences(thinking.contrast(config(run)), tokenizer, "mean_response")


def test_thinking_counts_as_prompt(run: Path, model: LanguageModel) -> None:
    source = PersonaRun(run)
    plain = source.sequences(source.contrast(config(run)), model.tokenizer, "mean_response")
    source.rows = [row | {"num_thinking_tokens": 2} for row in source.rows]
    thought = source.sequences(source.contrast(config(run)), model.tokenizer, "mean_response")
    assert [s.token_ids for s in thought] == [s.token_ids for s in plain]
    assert [s.prompt_length for s in thought] == [s.prompt_length + 2 for s in plain]


@pytest.mark.parametrize(
    ("more", "where", "expected"),
    [
        ([], "persna=Hamlet", ["persna", "'persona'"]),
        ([], "persona=Hamlett", ["Hamlett", "'Hamlet'"]),
        (["--where", "category=plain"], "persona=Hamlet", ["no row", "plain"]),
        (["--negative_where", "category=fiction"], "persona=Hamlet", ["is a target too"]),
        (["--num_tasks", "4"], "persona=assistant", ["every row of the run is a target"]),
        (["--num_tasks", "4"], "turn=1", ["--val_fraction", "in 2 groups"]),
    ],
)
def test_rows_that_cannot_be_chosen_are_named(run: Path, more: list, where: str, expected: list[str]) -> None:
    settings = config(run, *more, where=where)
    with pytest.raises(InputError) as caught:
        held_out_ids(PersonaRun(run).contrast(settings), settings.val_fraction, settings.seed)
    assert all(word in str(caught.value) for word in expected), caught.value


def test_a_run_of_another_model_or_another_command_is_refused(run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    tiny_model("llama", seed=1).save_pretrained(other)
    source = PersonaRun(run)
    facts = resolve(ModelConfigBase(model_id=str(tiny_folder), output_dir=Path("o"))).facts
    source.refuse_other_model(facts)
    with pytest.raises(InputError, match="another model made its responses"):
        source.refuse_other_model(resolve(ModelConfigBase(model_id=str(other), output_dir=Path("o"))).facts)
    with pytest.raises(InputError, match="another format"):
        source.refuse_other_model(facts | {"format_fingerprint": "0"})

    for name, change, expected in [
        ("unfinished", lambda folder: (folder / "DONE").unlink(), "has not finished"),
        ("foreign", lambda folder: rewrite(folder, command="steer"), "a run of steer"),
        ("empty", lambda folder: (folder / "results.jsonl").write_text(""), "no rows in it"),
        ("steered", lambda folder: rewrite(folder, steer=["a:1:2"]), "--steer"),
    ]:
        folder = tmp_path / name
        shutil.copytree(run, folder)
        change(folder)
        with pytest.raises(InputError, match=expected):
            PersonaRun(folder)
    with pytest.raises(InputError, match="no such file"):
        PersonaRun(tmp_path / "nowhere.jsonl")


def rewrite(folder: Path, command: str = "run_personas", **settings: object) -> None:
    written = json.loads((folder / "config.json").read_text())
    written |= {"command": command, "config": written["config"] | settings}
    (folder / "config.json").write_text(json.dumps(written))


def test_rows_that_do_not_fit_the_runs_settings_are_refused(run: Path, tmp_path: Path, model: LanguageModel) -> None:
    folder = tmp_path / "other"
    shutil.copytree(run, folder)
    rewrite(folder, system_prompt_style="act-as")
    source = PersonaRun(folder)
    with pytest.raises(InputError, match=r"You are Hamlet.*Act as Hamlet"):
        source.sequences(source.contrast(config(run)), model.tokenizer, "mean_response")
