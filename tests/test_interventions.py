"""The interventions spec: what it takes, and how it says what is wrong."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.common.errors import InputError
from src.common.intervention_fields import parse_layers
from src.common.interventions import Entry, Window, entry, parse_steer, read_interventions

ADD = {"directions_path": "d.safetensors", "layers": "14", "op": "add", "coefficient": 4}
CAP = {"directions_path": "d.safetensors", "layers": "14", "op": "cap"}
WHEN = {"directions_path": "d.safetensors"}


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


GOOD = [
    ADD, {**ADD, "layers": 14}, {**ADD, "layers": "8-12"}, {**ADD, "layers": "8,12"}, {**ADD, "layers": "0-2, 7, 9-11"},
    {**ADD, "layers": "all"}, {**ADD, "layers": "best", "relative": True}, {**ADD, "source_layer": 3, "k_index": 2},
    {**ADD, "hook_point": "attn_out", "op": "ablate"}, {**WHEN, "layers": "1", "op": "ablate"},
    {**ADD, "op": "scale", "coefficient": -1}, {**WHEN, "layers": "1", "op": "set", "value": 0},
    {**CAP, "lo": "p25"}, {**CAP, "hi": 0}, {**CAP, "lo": -1, "hi": "control:p99"}, {**CAP, "lo": 2, "hi": 2},
    {**ADD, "when": {**WHEN, "layer": 3, "above": "p50"}}, {**ADD, "when": {**WHEN, "above": 0, "below": 1}},
    {**ADD, "positions": "generated"}, {**ADD, "positions": {"start": -1, "end": None}}, {**ADD, "coefficient": 0},
    {**ADD, "positions": {"start": 3, "end": -1}}, {**ADD, "positions": {"start": -4, "end": 2}}, {**ADD, "when": None},
]  # fmt: skip


def test_good_entries_are_read_in_order_and_again_from_what_they_dump(tmp_path: Path) -> None:
    entries = read_interventions(write(tmp_path / "spec.json", GOOD))
    assert [each.op for each in entries] == [each["op"] for each in GOOD]
    dumped = write(tmp_path / "again.json", [each.model_dump() for each in entries])
    assert read_interventions(dumped) == entries
    assert entries[0].positions == "all" and entries[0].coefficient == 4.0
    assert entries[1] == entries[0]


BAD = [
    ("an entry", 5, "5; expected an object"),
    ("op", {**ADD, "op": "abalte"}, "op: 'abalte', perhaps 'ablate'; expected one of add, ablate, scale, set, cap"),
    ("no op", {k: v for k, v in ADD.items() if k != "op"}, "no field 'op'"),
    ("no layers", {k: v for k, v in ADD.items() if k != "layers"}, "no field 'layers'"),
    ("no path", {k: v for k, v in ADD.items() if k != "directions_path"}, "no field 'directions_path'"),
    ("blank path", {**ADD, "directions_path": " "}, "directions_path: ' '; expected the path"),
    ("field", {**ADD, "coeficient": 3}, "unknown field 'coeficient', perhaps 'coefficient'; expected directions_path"),
    ("misspelt", {**CAP, "low": 3}, "unknown field 'low', perhaps 'lo"),
    ("text", {**ADD, "coefficient": "4"}, "coefficient: '4'; expected a finite number"),
    ("flag as number", {**ADD, "coefficient": True}, "coefficient: True; expected a finite number"),
    ("huge", {**ADD, "coefficient": 1e300}, r"coefficient: 1e\+300; expected a finite number"),
    ("whole huge", {**ADD, "coefficient": 10**400}, "coefficient: a number of over 60 digits; expected a finite"),
    ("relative", {**ADD, "relative": 1}, "relative: 1; expected true or false"),
    ("layers", {**ADD, "layers": "last"}, "layers: 'last'; expected layers such as 14, 8-12"),
    ("empty layers", {**ADD, "layers": ""}, "layers: ''; expected layers"),
    ("empty list", {**ADD, "layers": []}, r"layers: \[\]; expected layers"),
    ("negative", {**ADD, "layers": -1}, "layers: '-1'; expected layers"),
    ("falling", {**ADD, "layers": "12-8"}, "layers: '12-8' falls from 12 to 8; expected 8-12"),
    ("twice", {**ADD, "layers": "8-12,10"}, "names a layer twice"),
    ("comma", {**ADD, "layers": "8,"}, "layers: '8,'; expected layers"),
    ("k_index", {**ADD, "k_index": -1}, "k_index: -1; expected a whole number from 0"),
    ("source", {**ADD, "source_layer": "best"}, "source_layer: 'best'; expected \"same\" or a layer"),
    ("hook point", {**ADD, "hook_point": "resid"}, "hook_point: 'resid', perhaps 'resid_p"),
    ("no coefficient", {**CAP, "op": "add"}, "op add has no coefficient"),
    ("scale", {**CAP, "op": "scale"}, "op scale has no coefficient"),
    ("set", {**CAP, "op": "set"}, "op set has no value"),
    ("cap", CAP, "op cap has neither lo nor hi"),
    ("cap coefficient", {**CAP, "lo": 0, "coefficient": 1}, "coefficient is not for op cap; expected lo and hi"),
    ("set coefficient", {**CAP, "op": "set", "value": 0, "coefficient": 1}, "coefficient is not for op set"),
    ("add lo", {**ADD, "lo": 0}, "lo is not for op add; expected coefficient and relative"),
    ("ablate relative", {**CAP, "op": "ablate", "relative": True}, "relative is not for op ablate"),
    ("cap value", {**CAP, "lo": 0, "value": 0}, "value is not for op cap"),
    ("lo > hi", {**CAP, "lo": 1, "hi": 0.5}, "lo 1.0 is above hi 0.5"),
    ("percentile", {**CAP, "lo": "p26"}, "lo: 'p26'; expected a number or a percentile: p0, p1"),
    ("bound", {**CAP, "lo": [1]}, r"lo: \[1\]; expected a finite number"),
    ("positions", {**ADD, "positions": "promt"}, "positions: 'promt', perhaps 'prompt'; expected all, prompt"),
    ("pair", {**ADD, "positions": [1, 2]}, r"positions: \[1, 2\]; expected all, .* or {\"start\": a, \"end\": b}"),
    ("window", {**ADD, "positions": {"start": 3, "end": 3}}, "start 3 and end 3 hold no position"),
    ("window back", {**ADD, "positions": {"start": -1, "end": -2}}, "start -1 and end -2 hold no position"),
    ("window to 0", {**ADD, "positions": {"start": -1, "end": 0}}, "start -1 and end 0 hold no position"),
    (
        "window field",
        {**ADD, "positions": {"start": 1, "stop": 3}},
        "positions: unknown field 'stop'; expected start, end",
    ),
    ("window text", {**ADD, "positions": {"start": 1.5}}, "positions: start: 1.5; expected a whole number"),
    ("no start", {**ADD, "positions": {"end": 4}}, "positions: no field 'start'"),
    ("when", {**ADD, "when": 3}, "when: 3; expected an object with directions_path"),
    ("when empty", {**ADD, "when": WHEN}, "when: has neither above nor below"),
    ("when field", {**ADD, "when": {**WHEN, "abov": 1}}, "when: unknown field 'abov', perhaps 'above'"),
    ("when band", {**ADD, "when": {**WHEN, "above": 1, "below": 1}}, "above 1.0 and below 1.0 hold no number"),
    ("when layer", {**ADD, "when": {**WHEN, "layer": "all", "above": 1}}, "when: layer: 'all'; expected \"same\""),
]


@pytest.mark.parametrize(("value", "message"), [each[1:] for each in BAD], ids=[each[0] for each in BAD])
def test_a_bad_entry_is_named_with_file_line_number_field_and_what_was_expected(
    tmp_path: Path, value: object, message: str
) -> None:
    path = tmp_path / "spec.json"
    path.write_text(f"[\n{json.dumps(ADD)},\n{json.dumps(value)}]")
    with pytest.raises(InputError, match=rf"spec\.json:3: entry 2: .*{message}"):
        read_interventions(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"), ("{}", "expected a JSON list"), ("[]", "no entries in it"), ("[{]", "spec.json:1"),
        ('[{"op": NaN}]', "NaN"), ('[{"op": "add", "op": "cap"}]', "op"), ('[{"op": Infinity}]', "Infinity"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_list_of_entries_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "spec.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_interventions(tmp_path / "spec.json")


def test_a_missing_file_and_an_infinity_in_disguise_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_interventions(tmp_path / "spec.json")
    (tmp_path / "spec.json").write_text(json.dumps([ADD]).replace(" 4", " 1e999"))
    with pytest.raises(InputError, match="coefficient: inf; expected a finite number"):
        read_interventions(tmp_path / "spec.json")


@given(st.sets(st.integers(0, 60), min_size=1, max_size=12), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_layers_in_any_notation_are_the_layers(layers: set[int], draw) -> None:
    wanted, parts, rest = tuple(sorted(layers)), [], sorted(layers)
    while rest:
        length = next((n for n in range(len(rest), 0, -1) if rest[n - 1] - rest[0] == n - 1), 1)
        length = draw.randint(1, length)
        parts.append(f"{rest[0]}-{rest[length - 1]}" if length > 1 or draw.random() < 0.3 else str(rest[0]))
        rest = rest[length:]
    draw.shuffle(parts)
    assert parse_layers(",".join(parts)) == wanted
    assert parse_layers(", ".join(parts)) == wanted


@pytest.mark.parametrize("path", ["d.safetensors", "runs/a b/d.safetensors", "C:\\x\\d.st", "hub:a:b", "a:8-12:3:d.st"])
@pytest.mark.parametrize(
    ("layers", "coefficient"), [("14", -4.0), ("8-12", 0.5), ("8,12", 1e-3), ("all", 0), ("best", 8)]
)
def test_steer_is_an_add_at_all_positions_and_the_file_may_hold_colons(
    path: str, layers: str, coefficient: float
) -> None:
    assert parse_steer(f"{path}:{layers}:{coefficient}") == Entry(
        directions_path=path, layers=layers, op="add", coefficient=coefficient, positions="all"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("d.st", "expected FILE:LAYERS:COEFFICIENT, for example"), ("d.st:14", "expected FILE:LAYERS:COEFFICIENT"),
        ("d.st:14:", "coefficient ''"), ("d.st:14:four", "coefficient 'four'"), ("d.st:14:nan", "coefficient 'nan'"),
        ("d.st:14:-inf", "finite number"), ("d.st:1e3:4", "layers: '1e3'"), ("d.st::4", "layers: ''"),
        (":14:4", "directions_path: ''"), ("d.st:12-8:4", "falls from 12 to 8"), ("d.st:14:1e39", "finite number"),
    ],
)  # fmt: skip
def test_a_bad_steer_is_shown_whole_with_the_form_that_was_expected(text: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"--steer {text}: .*{message}"):
        parse_steer(text)


def test_entries_made_in_code_are_checked_as_well() -> None:
    with pytest.raises(ValueError, match="op add has no coefficient"):
        Entry(directions_path="d", layers="1", op="add")
    made = Entry(directions_path="d", layers="1", op="ablate", positions=Window(start=-2))
    assert entry(made.model_dump(), "here") == made
