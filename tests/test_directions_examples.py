"""Reading contrasts and splitting them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.common.errors import InputError
from src.directions.examples import Contrast, Example, held_out_ids, read_contrast, read_preserved
from src.directions.settings import DirectionSettings

ROOT = Path(__file__).resolve().parents[1]


def config(**settings) -> DirectionSettings:
    return DirectionSettings(model_id="bundled:smollm2-135m", output_dir=Path("unused"), **settings)


def write(folder: Path, name: str, rows: list) -> str:
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def of_class(side: str, n: int, key: str = "id") -> list[Example]:
    return [Example(id=f"{side}:{i}", side=side, text=f"{side} {i}", keys=(f"{key}:{i}",)) for i in range(n)]


@given(st.integers(4, 40), st.integers(4, 40), st.floats(0.1, 0.9), st.integers(0, 5))
def test_the_split_keeps_groups_together_and_its_share(n: int, m: int, fraction: float, seed: int) -> None:
    contrast = Contrast(target=of_class("target", n), control=of_class("control", m), paired=False)
    try:
        held = held_out_ids(contrast, fraction, seed)
    except InputError:
        # Refused only where a part is too small: at these sizes rounding alone can leave fewer than two.
        assert min(n, m) * min(fraction, 1 - fraction) < 3
        return
    # Target i and control i share the key of i.
    for i in range(min(n, m)):
        assert (f"target:{i}" in held) == (f"control:{i}" in held)
    assert held == held_out_ids(contrast, fraction, seed)
    for side, size in (("target", n), ("control", m)):
        n_held = sum(each.startswith(side) for each in held)
        assert abs(n_held - fraction * size) <= 1.01


def test_another_seed_is_another_split() -> None:
    contrast = Contrast(target=of_class("target", 40), control=of_class("control", 40, "other"), paired=False)
    assert held_out_ids(contrast, 0.2, 0) != held_out_ids(contrast, 0.2, 1)
    assert len(held_out_ids(contrast, 0.2, 0)) == 16


def test_the_same_text_twice_in_a_class_is_on_one_side(tmp_path: Path) -> None:
    positive = write(tmp_path, "p.jsonl", [{"id": f"p{i}", "prompt": f"yes {i // 2}"} for i in range(20)])
    negative = write(tmp_path, "n.jsonl", [{"id": f"n{i}", "prompt": f"no {i}"} for i in range(20)])
    contrast = read_contrast(config(positive_path=positive, negative_path=negative))
    for seed in range(5):
        held = held_out_ids(contrast, 0.3, seed)
        for i in range(0, 20, 2):
            assert (f"target:p{i}" in held) == (f"target:p{i + 1}" in held)


def test_pairs_of_one_file_and_of_two_are_the_same_contrast(tmp_path: Path) -> None:
    pairs = [{"id": f"x{i}", "positive": f"yes {i}", "negative": f"no {i}"} for i in range(12)]
    both = read_contrast(config(pairs_path=Path(write(tmp_path, "pairs.jsonl", pairs))))
    positive = write(tmp_path, "p.jsonl", [{"id": row["id"], "prompt": row["positive"]} for row in pairs])
    negative = write(tmp_path, "n.jsonl", [{"id": row["id"], "prompt": row["negative"]} for row in pairs])
    apart = read_contrast(config(positive_path=positive, negative_path=negative, paired=True))
    assert both == apart and both.paired
    (tmp_path / "pairs.csv").write_text("id,positive,negative\n" + "".join(f"x{i},yes {i},no {i}\n" for i in range(12)))
    assert read_contrast(config(pairs_path=tmp_path / "pairs.csv")) == both
    assert len(read_contrast(config(pairs_path=tmp_path / "pairs.csv", num_tasks=5)).target) == 5


@pytest.mark.parametrize("name", ["french_english", "formal_casual", "hedging_direct", "cooking_other"])
def test_the_shipped_sets_are_contrasts(name: str) -> None:
    paths = {
        f"{flag}_path": f"{ROOT}/data/directions/{name}/{side}.jsonl"
        for flag, side in (("positive", "target"), ("negative", "control"))
    }
    contrast = read_contrast(config(**paths, paired=name != "cooking_other"))
    assert len(held_out_ids(contrast, 0.2, 42)) >= 26


BAD_ROWS = {
    "other sizes": ([{"prompt": "a"}] * 1, [{"prompt": "b"}, {"prompt": "c"}], ["1 prompts", "2", "--paired"]),
    "other order": (
        [{"id": "1", "prompt": "a"}, {"id": "2", "prompt": "b"}],
        [{"id": "2", "prompt": "c"}, {"id": "1", "prompt": "d"}],
        ["one order", "'2'"],
    ),
    "same text": ([{"prompt": "a"}, {"prompt": "b"}], [{"prompt": "c"}, {"prompt": "a"}], ["'1'", "'0'", "same text"]),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_pairs_are_named(tmp_path: Path, name: str) -> None:
    positive, negative, expected = BAD_ROWS[name]
    paths = {
        "positive_path": write(tmp_path, "p.jsonl", positive),
        "negative_path": write(tmp_path, "n.jsonl", negative),
    }
    with pytest.raises(InputError) as caught:
        read_contrast(config(**paths, paired=True))
    assert all(word in str(caught.value) for word in ["n.jsonl", *expected])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"positive": "a"}], ["pairs.jsonl:1", '"negative"']),
        ([{"positive": "a", "negative": "b"}, {"positive": " ", "negative": "b"}], ["pairs.jsonl:2", "positive"]),
        ([{"id": 1, "positive": "a", "negative": "b"}, {"id": 1, "positive": "c", "negative": "d"}], ["twice"]),
        ([], ["no pairs"]),
    ],
)
def test_bad_pair_rows_are_named(tmp_path: Path, rows: list, expected: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        read_contrast(config(pairs_path=Path(write(tmp_path, "pairs.jsonl", rows))))
    assert all(word in str(caught.value) for word in expected)


def test_too_few_for_a_split_are_refused_with_the_numbers() -> None:
    contrast = Contrast(target=of_class("target", 30), control=of_class("control", 3, "other"), paired=False)
    with pytest.raises(InputError, match=r"3 control examples.*leaves 1 held-out ones.*at least 2"):
        held_out_ids(contrast, 0.2, 0)


def test_preserved_prompts_must_differ_from_what_they_are_contrasted_with(tmp_path: Path) -> None:
    path = write(tmp_path, "p.jsonl", [{"prompt": "a"}])
    base = {"positive_path": path, "negative_path": path}
    with pytest.raises(InputError, match="same text"):
        read_preserved(config(**base, preserve_path=path, preserve_against_path=path))
    assert read_preserved(config(**base)) == ([], [])


BAD_SETTINGS = {
    "no source": ({}, "no prompts"),
    "two sources": ({"pairs_path": Path("a"), "import_path": Path("b")}, "--pairs_path and --import_path"),
    "one side": ({"positive_path": "a"}, "--negative_path"),
    "run without where": ({"positive_run": Path("a")}, "--where"),
    "where without run": ({"pairs_path": Path("a"), "negative_where": ["x=1"]}, "--positive_run"),
    "where without value": ({"positive_run": Path("a"), "where": ["persona"]}, "FIELD=VALUE"),
    "paired pairs": ({"pairs_path": Path("a"), "paired": True}, "--paired"),
    "one of the mean difference": ({"pairs_path": Path("a"), "n_directions": 2}, "mean_difference makes one"),
    "cones of one": ({"pairs_path": Path("a"), "method": "cones"}, "at least 2"),
    "fraction": ({"pairs_path": Path("a"), "val_fraction": 1.0}, "--val_fraction"),
    "quantile": ({"pairs_path": Path("a"), "winsorize_quantile": 0.0}, "--winsorize_quantile"),
    "layers": ({"pairs_path": Path("a"), "layers": "9-3"}, "9 to 3"),
    "best layer": ({"pairs_path": Path("a"), "layers": "best"}, "--layers best"),
    "position": ({"pairs_path": Path("a"), "token_position": "token:3"}, "token:-k"),
    "response of prompts": ({"pairs_path": Path("a"), "token_position": "mean_response"}, "--positive_run"),
    "preserve alone": ({"pairs_path": Path("a"), "preserve_path": "b"}, "--preserve_against_path"),
    "run with system prompt": ({"positive_run": Path("a"), "where": ["x=1"], "system_prompt": "b"}, "as the run did"),
    "raw with system prompt": ({"pairs_path": Path("a"), "raw_prompts": True, "system_prompt": "b"}, "--raw_prompts"),
    "weights": ({"pairs_path": Path("a"), "ensemble_weights": [1.0]}, "expected one each"),
    "penalty": ({"pairs_path": Path("a"), "logistic_c": -1.0}, "--logistic_c"),
    "gguf of mlp": ({"pairs_path": Path("a"), "export": ["gguf"], "hook_point": "mlp_out"}, "resid_post"),
    "none of it": ({"pairs_path": Path("a"), "num_tasks": 0}, "--num_tasks 0"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_settings_that_cannot_be_are_refused(name: str) -> None:
    settings, expected = BAD_SETTINGS[name]
    with pytest.raises(InputError) as caught:
        config(**settings)
    assert expected in str(caught.value)


def test_layers_are_those_of_the_model() -> None:
    assert config(pairs_path=Path("a")).wanted_layers(3) == (0, 1, 2)
    assert config(pairs_path=Path("a"), layers="1,4-5").wanted_layers(6) == (1, 4, 5)
    with pytest.raises(InputError, match="layer 5; the model's layers are 0 to 4"):
        config(pairs_path=Path("a"), layers="1,4-5").wanted_layers(5)
    with pytest.raises(InputError, match=r"--export gguf.*layer 0"):
        config(pairs_path=Path("a"), layers="0", export=["gguf"]).wanted_layers(5)
    with pytest.raises(InputError, match="--report_layer 2"):
        config(pairs_path=Path("a"), layers="1", report_layer=2).wanted_layers(5)
