"""Nothing that the report is on was used before it: by directions of a file, nor unsaid by another study's points."""

from pathlib import Path

import pytest

from src.abliteration.kernel import Kernel, Plan
from src.abliteration.space import Space
from src.abliteration.storage import open_storage
from src.abliteration.study import Study
from src.common.directions_file import prompt_sha256, read_directions, write_directions
from src.common.errors import InputError
from src.common.jsonl import read_jsonl, write_jsonl_atomic
from tests.abliterate_runs import directions_in, directions_of, extracting_here, recorded_in, run_here, trials_of, words
from tests.tiny_organism import TOPIC
from tests.tiny_organism import prompts as topic_prompts

REPORT, SEARCH = "46 39 11 16 51 45 4 31 27 5 1 55", "35 17 32 56 34 58 40 20 19 0 2 7"
"""Ids of the target prompts, as they were drawn before there was a second way to draw them."""
SPACE = Space(n_layers=2, components=("attn", "mlp"), min_weight=0.0, max_weight=1.5)


@pytest.fixture(scope="module")
def searched(organism: Path, prompts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that extracted its directions."""
    folder = tmp_path_factory.mktemp("runs") / "searched"
    with extracting_here():
        run_here(words(organism, prompts, folder, "--n_trials", "3", "--save", "none"))
    return folder


def texts_of(path: Path) -> dict[str, str]:
    return {row["id"]: row["prompt"] for _, row in read_jsonl(path)}


def test_prompts_that_directions_were_made_of_are_in_no_part(searched: Path, organism, prompts, tmp_path) -> None:
    made_of = set(read_directions(directions_of(searched)).metadata.prompts_sha256)
    for _ in range(2):
        # A second start, as after a stop: the study would refuse other prompts.
        run_here(
            words(organism, prompts, tmp_path / "r", "--n_trials", "2", "--save", "none", *directions_in(searched))
        )
        found, before = (recorded_in(folder)["split"] for folder in (tmp_path / "r", searched))
        for side, path in zip(("target", "control"), prompts[:2], strict=True):
            texts = texts_of(path)
            assert {prompt_sha256(texts[name]) for name in before[side]["directions"]} <= made_of
            parts = [*found[side]["search"], *found[side]["report"]]
            assert not made_of & {prompt_sha256(texts[name]) for name in parts}
            # What the run that extracted them left for its search and its report is all that there is.
            assert found[side] == before[side] | {"directions": []}
        assert recorded_in(tmp_path / "r")["left_out"] == {"target": 36, "control": 36}
        assert "36 target and 36 control prompts" in next((tmp_path / "r" / "logs").iterdir()).read_text()


def test_all_others_are_for_the_search_and_the_report(searched, organism, prompts, tmp_path) -> None:
    """Of 96 that the directions were not made of none is kept for directions."""
    more = topic_prompts(TOPIC, 72, seed=5)
    rows = [row for _, row in read_jsonl(prompts[0])]
    write_jsonl_atomic(tmp_path / "t.jsonl", rows + [{"id": f"n{i}", "prompt": text} for i, text in enumerate(more)])
    flags = ("--n_search", "99", "--n_report", "99", *directions_in(searched))
    split = split_of(words(organism, (tmp_path / "t.jsonl", *prompts[1:]), tmp_path / "r", *flags))
    assert len(split["target"].search) == len(split["target"].report) == 48
    assert split["target"].n_left_out == 36 and split["target"].directions == []


def split_of(arguments: list[str]) -> dict:
    from src.abliterate import AbliterateConfig
    from src.abliteration.prompts import read_split
    from src.common.cli import parse_config

    return read_split(parse_config(AbliterateConfig, arguments))


def test_without_a_directions_file_the_split_is_what_it_was(organism, prompts, tmp_path) -> None:
    target = split_of(words(organism, prompts, tmp_path / "r"))["target"]
    assert [" ".join(each.id for each in part) for part in (target.report, target.search)] == [REPORT, SEARCH]
    assert len(target.directions) == 36 and target.n_left_out == 0


def test_too_few_others_are_refused_and_a_file_that_does_not_say_is_told_of(
    searched, organism, prompts, tmp_path, caplog
) -> None:
    with pytest.raises(InputError, match=r"14 different prompts, of which \d+ are left out since --directions_path"):
        split_of(words(organism, prompts, tmp_path / "few", "--num_tasks", "14", *directions_in(searched)))
    path = tmp_path / "unsaid.safetensors"
    known = read_directions(directions_of(searched))
    metadata = known.metadata.model_copy(update={"prompts_sha256": None})
    write_directions(path, type(known)(directions=known.directions, layers_present=(0, 1), metadata=metadata))
    more = ("--n_trials", "1", "--directions_path", str(path))
    run_here(words(organism, prompts, tmp_path / "r", *more))
    assert "file does not say of which it was made" in (tmp_path / "r" / "model" / "README.md").read_text()
    assert recorded_in(tmp_path / "r")["left_out"] is None
    assert "does not say of which prompts it was made" in caplog.text


def study_with(folder: Path, plans: list[Plan]) -> Path:
    """A folder with a study of trials that removed all, the first for the least KL."""
    folder.mkdir()
    study = Study(open_storage(None, folder, 120.0), "abliteration", n_startup=1, seed=0)
    study.enqueue(plans)
    for number, trial in enumerate(study.ask(len(plans), len(plans))):
        params = SPACE.draw(trial).as_params()
        scores = {"stage": "full", "kl": 0.01 * (1 + number), "behaviour": 3 - number, "n_behaviour": 12,
                  "expected": None, "params": params, "n_layers": 2}  # fmt: skip
        study.tell(trial, scores, (scores["kl"], scores["behaviour"] / 12))
    return folder


def test_a_search_begins_with_the_best_points_of_another(searched, organism, prompts, tmp_path) -> None:
    """Points that it would not have begun with by itself, the front's order, and what that makes of the report."""
    kernel = lambda high: Kernel(high=high, position=0.75, low=0.25, reach=0.625)  # noqa: E731
    plans = [Plan(source="own", source_layer=0.5, kernels={"attn": kernel(high), "mlp": kernel(1.0)})
             for high in (0.3125, 0.875)]  # fmt: skip
    other = study_with(tmp_path / "other", plans)
    more = ("--n_trials", "3", *directions_in(searched))
    run_here(words(organism, prompts, tmp_path / "r", *more, "--warm_start", str(other)))
    assert "the one that it began at may have seen some" in (tmp_path / "r" / "model" / "README.md").read_text()
    tried = [row["params"] for row in trials_of(tmp_path / "r")]
    assert tried[:2] == [pytest.approx(plan.as_params()) for plan in plans]
    # Then it goes on as it would have begun.
    assert tried[2] == trials_of(searched)[0]["params"]
    assert recorded_in(tmp_path / "r")["warm_start"] == {"from": str(other), "same_search_prompts": False}


@pytest.mark.parametrize("is_same", [True, False])
def test_points_of_a_study_on_other_prompts_are_told_of(is_same, searched, organism, prompts, tmp_path, caplog) -> None:
    seed = () if is_same else ("--seed", "7", "--n_search", "6")
    more = (*seed, "--n_trials", "1", "--save", "none", *directions_in(searched))
    for source, name in ((searched, "second"), (tmp_path / "second", "third")):
        run_here(words(organism, prompts, tmp_path / name, *more, "--warm_start", str(source)))
        told = {"from": str(source), "same_search_prompts": is_same}
        assert recorded_in(tmp_path / name)["warm_start"] == told
    assert ("prompts of its report may be" in caplog.text) != is_same
    # A start that goes on begins with nothing, and tells it too.
    run_here(words(organism, prompts, tmp_path / name, *more, "--warm_start", str(source), "--n_trials", "2"))
    assert recorded_in(tmp_path / name)["warm_start"] == told
