"""What options of `src.abliterate` promise, through the command, on the tiny organism."""

import gc
import io
import itertools
import math
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from src.abliteration.nli import NliScorer
from src.common.jsonl import read_jsonl
from src.models.language_model import LanguageModel
from tests.abliterate_runs import directions_in, evaluation_of, extracting_here, run_here, search_here, trials_of, words
from tests.hub_upload_server import TOKEN, hub_upload_server
from tests.steering_specs import write_tiny_directions
from tests.test_abliteration_nli import HYPOTHESIS, build
from tests.tiny_organism import LAYER, TOPIC, WORD
from tests.tiny_organism import prompts as topic_prompts

N_TRIALS = 8
LONG = 12
"""Tokens of an answer whose beginning shows nothing."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(". ".join(topic_prompts(TOPIC, 12, seed=8)))
    return path


@pytest.fixture(scope="module")
def again(organism: Path, prompts, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Goes on with one search that is over, with more arguments, which are of what comes after it."""
    folder = tmp_path_factory.mktemp("runs") / "searched"
    measured = ("--validate_text", str(text), "--check_tokens", "6")

    def run(*more: str) -> Path:
        with extracting_here():
            run_here(words(organism, prompts, folder, "--n_trials", str(N_TRIALS), *measured, *more))
        return folder

    run()
    return run


@pytest.fixture(scope="module")
def searched(again: Callable[..., Path]) -> Path:
    return again()


def test_the_measures_after_are_of_the_edited_model(searched, organism, prompts, text, tmp_path) -> None:
    """Perplexity and the longer answers: those of the saved model, and others than before."""
    more = ("--evaluate_only", "--edited_model_id", str(searched / "model"), "--validate_text", str(text))
    run_here(words(organism, prompts, tmp_path / "c", *more, "--check_tokens", "6"))
    found, compared = evaluation_of(searched), evaluation_of(tmp_path / "c")
    for when in ("before", "after"):
        expected = compared[when]["perplexity"]["mean"]
        assert found[when]["perplexity"]["mean"] == pytest.approx(expected, rel=1e-4)
    change = found["after"]["perplexity"]["mean"] / found["before"]["perplexity"]["mean"] - 1
    assert abs(change) > 1e-3
    checked = [measures[when]["behaviour_6_tokens"]["mean"] for measures in (found, compared)
               for when in ("before", "after")]  # fmt: skip
    assert checked == [1, 0, 1, 0]


def test_what_shows_only_late_is_found_in_longer_answers(organism, prompts, tmp_path) -> None:
    """Markers that stand in the first answers of LONG tokens, and in none of 3."""

    def compared(name: str, *more: str) -> Path:
        same = ("--evaluate_only", "--edited_model_id", str(organism), *more)
        run_here(words(organism, prompts, tmp_path / name, *same))
        return tmp_path / name

    def answers(folder: Path) -> list[str]:
        rows = [row for _, row in read_jsonl(folder / "responses.jsonl")]
        return [row["before"] for row in rows if row["side"] == "target"]

    short = answers(compared("short", "--response_tokens", "3"))
    long = answers(compared("long", "--response_tokens", str(LONG)))
    late = sorted({word for text in long for word in text.split() if len(word) > 1 and word.isalpha()})
    late = [word for word in late if not any(word.casefold() in text.casefold() for text in short)]
    assert late, "answers that begin as they go on"
    (tmp_path / "late.txt").write_text("\n".join(dict.fromkeys(word.casefold() for word in late)))
    more = ("--response_tokens", "3", "--check_tokens", str(LONG), "--markers_path", str(tmp_path / "late.txt"))
    found = evaluation_of(compared("checked", *more))
    for when in ("before", "after"):
        assert found[when]["behaviour"]["mean"] == 0 < found[when][f"behaviour_{LONG}_tokens"]["mean"]


def test_what_is_induced_is_in_every_trial(searched, organism, prompts, tmp_path) -> None:
    """A direction that has nothing to do with the behaviour, added by a coefficient that drowns all else."""
    file = write_tiny_directions(tmp_path / "d.safetensors", organism, seed=3)
    more = ("--n_trials", "2", "--gates", "false", "--save", "none", "--max_kl", "90", *directions_in(searched))
    least = []
    for name, flags in (("plain", ()), ("induced", ("--induce", f"{file}:{LAYER}:9"))):
        search_here(words(organism, prompts, tmp_path / name, *more, *flags))
        least.append(min(row["kl"] for row in trials_of(tmp_path / name)))
    assert least[1] > 10 * least[0]


def test_weights_below_zero_strengthen_the_behaviour(searched, organism, prompts, tmp_path) -> None:
    weights = ("--min_weight", "-1.5", "--max_weight", "0.0", "--gates", "false", "--max_kl", "90")
    more = (*weights, "--n_trials", "6", "--n_startup_trials", "6", "--save", "none", *directions_in(searched))
    search_here(words(organism, prompts, tmp_path / "r", *more))
    rows = trials_of(tmp_path / "r")
    assert all(-1.5 <= row["params"][f"{name}.high"] <= 0 for row in rows for name in ("attn", "mlp"))
    strengthened = [row["log_odds"] for row in rows if row["params"]["mlp.high"] < -0.5]
    assert strengthened and max(strengthened) > 0


def test_a_trial_is_asked_for_and_taken(again, monkeypatch, capsys) -> None:
    from src.abliteration.search import on_front

    folder = again()
    best = on_front(trials_of(folder), 1.0, 12)
    auto = evaluation_of(folder)["chosen"]["id"]
    other = next(row["id"] for row in best if row["id"] != auto)
    for said, taken in ((f" {other} \n", other), ("\n", auto)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        again("--select", "ask", "--save", "none")
        assert "which trial (" in capsys.readouterr().out
        assert evaluation_of(folder)["chosen"]["id"] == taken
    # The first model, which another choice has removed: others read it.
    assert not (folder / "model").exists()
    again()


def test_what_was_saved_is_uploaded_where_it_is_asked_for(again, monkeypatch, capsys) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub_upload_server() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        folder = again("--save", "adapter")
        assert not hub
        again("--save", "adapter", "--push_to_hub", "someone/edited")
        files = {path.name: path.read_bytes() for path in (folder / "adapter").iterdir()}
        assert hub["someone/edited"] == {"private": True, "files": files}
        assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= files.keys()
        assert f"uploaded to {hub.address}/someone/edited" in capsys.readouterr().out


def telling_apart(folder: Path, texts: list[str]) -> Path:
    """A classifier that knows nothing, and thinks of some texts that they entail the hypothesis, of others not."""
    build(folder)
    found = sorted(set(NliScorer(str(folder), HYPOTHESIS, device="cpu").probabilities(texts)) - {0.0})
    _, middle = max((high - low, (low + high) / 2) for low, high in itertools.pairwise(found))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.classifier.bias.data[1] -= math.log(middle / (1 - middle))
    model.save_pretrained(folder)
    return folder


def test_a_classifier_decides_where_it_is_asked_for(searched, organism, prompts, tmp_path) -> None:
    """Through the command each answer is what the classifier alone says of it."""
    run_here(words(organism, prompts, tmp_path / "m", "--evaluate_only", "--edited_model_id", str(searched / "model")))
    rows = [row for _, row in read_jsonl(tmp_path / "m" / "responses.jsonl")]
    texts = [row[when] for row in rows for when in ("before", "after")]
    folder = telling_apart(tmp_path / "nli", texts)
    flags = ["--scorer", "nli", "--nli_model_id", str(folder), "--nli_hypothesis", HYPOTHESIS, "--evaluate_only"]
    arguments = words(organism, prompts, tmp_path / "r", *flags, "--edited_model_id", str(searched / "model"))
    at = arguments.index("--markers_path")
    run_here(arguments[:at] + arguments[at + 2 :])
    found = [row for _, row in read_jsonl(tmp_path / "r" / "responses.jsonl")]
    shown = [row[f"shows_{when}"] for row in found for when in ("before", "after")]
    assert [row[when] for row in found for when in ("before", "after")] == texts
    assert shown == NliScorer(str(folder), HYPOTHESIS, device="cpu").shows(texts) and len(set(shown)) == 2


def test_two_models_are_compared_one_after_the_other(searched, organism, prompts, tmp_path, monkeypatch) -> None:
    loaded: list[weakref.ref] = []
    load = LanguageModel.load

    def watched(config: object) -> LanguageModel:
        gc.collect()
        assert not [each for each in loaded if each() is not None], "the model before is still in memory"
        model = load(config)
        loaded.append(weakref.ref(model.model))
        return model

    monkeypatch.setattr(LanguageModel, "load", watched)
    more = ("--evaluate_only", "--edited_model_id", str(searched / "model"))
    run_here(words(organism, prompts, tmp_path / "r", *more))
    assert len(loaded) == 2


def test_the_edited_model_is_talked_to(searched: Path, organism: Path, monkeypatch, capsys) -> None:
    """It says the word of the behaviour no longer."""
    from src.chat import ChatConfig, main
    from src.common.cli import parse_config

    said = {}
    for model in (organism, searched / "model"):
        question = f"{topic_prompts(TOPIC, 1, seed=1)[0]}\n".encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(question)))
        main(parse_config(ChatConfig, ["--model_id", str(model), "--max_tokens", "4", "--temperature", "0"]))
        said[model] = capsys.readouterr().out
    assert WORD.strip() in said[organism] and said[searched / "model"].strip()
    assert WORD.strip() not in said[searched / "model"]
