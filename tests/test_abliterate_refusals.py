"""What would act on nothing, or on something else than it says, is refused before a model has answered."""

import re
from pathlib import Path

import pytest

from src.common.errors import InputError
from src.common.jsonl import read_jsonl, write_jsonl_atomic
from src.models.language_model import LanguageModel
from tests.abliterate_runs import run_here, words
from tests.steering_specs import write_tiny_directions


@pytest.fixture
def own(organism: Path, tmp_path: Path) -> Path:
    """Directions that pass for the organism's."""
    return write_tiny_directions(tmp_path / "own.safetensors", organism)


@pytest.mark.parametrize(
    "flags",
    [("--method", "pca"), ("--n_directions", "2"), ("--token_position", "mean_prompt"),
     ("--project_out", "control_mean"), ("--preserve_prompts", "kept.jsonl")],
    ids=" ".join,
)  # fmt: skip
def test_what_makes_directions_has_no_place_beside_a_file_of_them(flags, own, organism, prompts, tmp_path) -> None:
    with pytest.raises(InputError, match=rf"^{' '.join(flags)}: nothing is extracted where --directions_path .*leave"):
        run_here(words(organism, prompts, tmp_path / "r", "--directions_path", str(own), *flags))
    assert not (tmp_path / "r").exists()


def test_numbers_that_are_none_are_refused_before_anything_runs(own, organism, prompts, tmp_path) -> None:
    for flags, message in (
        (("--check_tokens", "0"), "--check_tokens 0: expected at least 1"),
        (("--check_tokens", "-5"), "--check_tokens -5: expected at least 1"),
        (("--induce", f"{own}:1:nan"), "a coefficient of nan; expected a finite number"),
        (("--induce", f"{own}:1:-inf"), "a coefficient of -inf; expected a finite number"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            run_here(words(organism, prompts, tmp_path / "r", *flags))
    assert not (tmp_path / "r").exists()


def test_what_is_induced_is_of_this_model(own, organism, tiny_folder, prompts, tmp_path) -> None:
    """The other model's file has the same shape."""
    other = write_tiny_directions(tmp_path / "other.safetensors", tiny_folder)
    arguments = words(organism, prompts, tmp_path / "r", "--directions_path", str(own), "--induce", f"{other}:1:1")
    with pytest.raises(InputError, match=rf"^--induce {re.escape(str(other))}: extracted from .* model_fingerprint"):
        run_here(arguments)


@pytest.mark.parametrize("side", [0, 1])
def test_prompts_to_preserve_are_none_of_the_others(side, organism, prompts, tmp_path) -> None:
    shared = next(row["prompt"] for _, row in read_jsonl(prompts[side]))
    kept = tmp_path / "kept.jsonl"
    write_jsonl_atomic(kept, [{"prompt": "plant a tree"}, {"prompt": f" {shared.upper()}"}])
    with pytest.raises(InputError, match=rf"kept.jsonl: prompt '1' is the same text as '0' of {prompts[side]}"):
        run_here(words(organism, prompts, tmp_path / "r", "--preserve_prompts", str(kept)))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("kind", ["nowhere", "nowhere+adapter", "no adapter"])
def test_an_edited_model_that_is_not_there_is_missed_at_once(kind, organism, prompts, tmp_path) -> None:
    """By the name of its own flag."""
    (tmp_path / "empty").mkdir()
    reference = {
        "nowhere": str(tmp_path / "nowhere"),
        "nowhere+adapter": f"{tmp_path / 'nowhere'}+{tmp_path / 'empty'}",
        "no adapter": f"{organism}+{tmp_path / 'empty'}",
    }[kind]
    with pytest.raises(InputError, match=r"^--edited_model_id ") as told:
        run_here(words(organism, prompts, tmp_path / "r", "--evaluate_only", "--edited_model_id", reference))
    assert "--model_id " not in str(told.value).replace("--edited_model_id ", "")
    assert not (tmp_path / "r").exists()


def test_two_models_that_cannot_be_compared_are_refused_before_either_is_loaded(
    organism, tiny_folder, prompts, tmp_path, monkeypatch
) -> None:
    from tests.tiny_models import copy_model

    template = copy_model(tiny_folder, tmp_path / "template")
    (template / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}!{% endfor %}")
    vocabulary = copy_model(tiny_folder, tmp_path / "vocabulary")
    config = vocabulary / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 49152', '"vocab_size": 50000'))
    loaded: list[str] = []
    load = LanguageModel.load
    monkeypatch.setattr(LanguageModel, "load", lambda config: loaded.append(config.model_id) or load(config))
    for other, message in ((template, "makes other tokens of prompt"), (vocabulary, "a vocabulary of 50000 tokens")):
        folder = tmp_path / f"r-{other.name}"
        with pytest.raises(InputError, match=rf"^--edited_model_id .*{message}"):
            run_here(words(organism, prompts, folder, "--evaluate_only", "--edited_model_id", str(other)))
    assert not loaded
