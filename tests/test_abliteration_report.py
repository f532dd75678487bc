"""The report and the card say what they were given, and nothing that a model or a user wrote acts in them."""

import io
import json
import re
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from src.abliteration import report_plots
from src.abliteration.card import Card, card, code, escaped
from src.abliteration.report import Reported, before_after_rows, interval, print_before_after, print_front, report
from tests.test_html_report import HOSTILE, parsed


def trial(number: int, stage: str, kl: float, behaviour: int, on_front: bool = False) -> dict:
    return {
        "id": number, "params": {"attn_max": 1.5 + number, "scope": "global"}, "stage": stage, "kl": kl,
        "kl_first": kl / 3, "behaviour": behaviour, "n_behaviour": 80, "log_odds": None if stage == "kl" else -1.25,
        "seconds": {"kl": 0.5, "all": 1.5}, "on_front": on_front,
    }  # fmt: skip


TRIALS = [
    trial(0, "full", 0.2, 40),
    trial(1, "kl", 9.9, 0),
    trial(2, "full", 0.05, 10, on_front=True),
    trial(3, "odds", 0.3, 25),
    trial(4, "full", 0.0, 60, on_front=True),
    trial(5, "full", 0.04, 12, on_front=True),
]
MEASURES = {
    "before": {"behaviour": {"mean": 0.5125, "ci_low": 0.4, "ci_high": 0.62, "n": 80}, "tokens_target": None},
    "after": {
        "behaviour": {"mean": 0.0, "ci_low": 0.0, "ci_high": 0.0458, "n": 80},
        "kl_control": {"mean": 0.01234, "ci_low": None, "ci_high": None, "n": 1},
        "perplexity of a_file": {"mean": 31.25, "ci_low": 30.0, "ci_high": 32.0, "n": 9},
    },
}


def given_with(text: str = "harmless", trials: list[dict] = TRIALS) -> Reported:
    trials = deepcopy(trials)
    trials[0]["params"][f"p{text}"] = text
    return Reported(
        title=f"Abliteration {text}",
        trials=trials,
        chosen_id=2,
        rule=f"the least KL {text}",
        weights={"attn": [0.0, 1.5, 0.75], f"mlp{text}": [0.5, -0.25, 0.0]},
        measures=MEASURES | {"after": MEASURES["after"] | {f"m{text}": MEASURES["after"]["behaviour"]}},
        responses=[
            {"id": f"control:{text}", "side": "control", "prompt": text, "before": text, "after": text, "kl": 0.1},
            {"id": f"target:{text}", "side": "target", "prompt": text, "before": text, "after": text, "kl": 0.2},
        ],
        settings={"model_id": text, "n": 3},
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_changes_no_tag(text: str) -> None:
    assert parsed(report(given_with(text))).tags == parsed(report(given_with())).tags


def test_the_page_has_every_section_and_the_numbers() -> None:
    page = parsed(report(given_with()))
    text = " ".join(page.text)
    for heading in (
        "In short", "Behaviour and damage", "Before and after, on the report split", "Best so far",
        "Edit weight by layer and component", "Responses side by side", "Trials", "Settings",
    ):  # fmt: skip
        assert heading in text, heading
    assert "6, of which 4 with full-length responses" in text and "the least KL harmless" in text
    assert "behaviour, target (share)" in text and "0.5125" in text and "perplexity of a_file" in text
    assert text.index("target:harmless") < text.index("control:harmless")
    assert [tag for tag, _ in page.tags].count("table") == 5


def test_a_trial_that_was_stopped_has_no_measured_behaviour() -> None:
    cells = re.findall(r"<tr>(.*?)</tr>", report(given_with()).split("<h2>Trials</h2>")[1].split("</section>")[0])
    shown = {row[0]: row for row in (re.findall(r"<td.*?>(?:<div>)?(.*?)(?:</div>)?</td>", each) for each in cells[1:])}
    behaviour, at_least = 3, 4
    assert (shown["2"][behaviour], shown["2"][at_least]) == ("10", "–")
    assert (shown["3"][behaviour], shown["3"][at_least]) == ("–", "25")
    assert (shown["1"][behaviour], shown["1"][at_least]) == ("–", "–")


def traces(figure) -> dict[str, dict]:
    return {each["name"]: each for each in json.loads(figure.to_json())["data"]}


def test_the_front_is_a_staircase_over_what_was_measured() -> None:
    found = traces(report_plots.front_figure(TRIALS, 2, 0.5))
    assert found["front"]["x"] == [1e-4, 0.04, 0.05] and found["front"]["y"] == [0.75, 0.15, 0.125]
    assert found["full length"]["y"] == [0.5, 0.125, 0.75, 0.15]
    assert (found["stopped by a gate, at least"]["x"], found["stopped by a gate, at least"]["y"]) == ([0.3], [25 / 80])
    assert found["chosen"]["x"] == [0.05]
    assert "KL 0.0," in found["full length"]["hovertext"][2]
    assert "front" not in traces(report_plots.front_figure(TRIALS[:2], None, None))


def test_the_history_falls_to_the_chosen_trial() -> None:
    behaviour, kl = report_plots.history_figure(TRIALS, 2).data
    assert (list(behaviour.x), list(behaviour.y)) == ([3, 5, 6], [0.125, 0.125, 0.125])
    assert (list(kl.x), list(kl.y)) == ([3], [0.05])
    behaviour, kl = report_plots.history_figure(TRIALS, None).data
    assert list(behaviour.y) == [0.5, 0.125, 0.125, 0.125] and list(kl.y) == [0.2, 0.05, 0.0, 0.0]


@pytest.mark.parametrize("wrong", [0.5, 81, -1, None, "3"])
def test_what_is_no_count_is_never_drawn(wrong: object) -> None:
    with pytest.raises(AssertionError, match="trial 0: behaviour"):
        report_plots.front_figure([trial(0, "full", 0.1, 0) | {"behaviour": wrong}], None, None)


def test_an_unknown_side_is_not_left_out_in_silence() -> None:
    odd = given_with()._replace(responses=[{"id": "a", "side": "other", "prompt": "", "before": "", "after": ""}])
    with pytest.raises(AssertionError, match="other"):
        report(odd)


def printed(write, *arguments: object) -> str:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    write(*arguments[:1], console, *arguments[1:])
    return console.file.getvalue()


def test_the_tables_fit_the_terminal_whole() -> None:
    front = printed(print_front, TRIALS, 2)
    assert [line.split()[0] for line in front.splitlines() if "/80" in line] == ["4", "5", "2"]
    assert re.search(r"2 \* +10/80 +0\.125 +0\.05 +0\.0167 +1\.5", front)
    table = printed(print_before_after, MEASURES)
    assert re.search(r"behaviour, target \(share\) +0\.512 +0 +80\s+0\.4…0\.62 +0…0\.0458", table)
    assert re.search(r"perplexity of a_file +– +31\.2 +9\s+30…32", table) and "tokens, target" in table
    wide = {"mean": 0.001234, "ci_low": 0.001111, "ci_high": 0.001999, "n": 1000}
    both = printed(print_before_after, {"before": {"kl_control": wide}, "after": {"kl_control": wide}})
    for text in (front, table, both):
        assert not re.search(r"\D…|…\D", text) and max(map(len, text.splitlines())) <= 80, text
    assert printed(print_front, [trial(1, "full", 0.1, 3, on_front=True) | {"id": "[red]x"}]).count("[red]x") == 1


def test_measures_keep_an_order_and_what_is_missing_stays_missing() -> None:
    rows = before_after_rows(MEASURES)
    assert [row["measure"] for row in rows][1:] == [
        "KL per token, control (nats)",
        "tokens, target",
        "perplexity of a_file",
    ]
    assert rows[1]["before"] is None and rows[1]["before n"] is None and rows[1]["after"] == 0.01234
    assert interval(0.5, None, None) == "0.5" and interval(None, None, None) == "–"


def filled(text: str = "harmless", base_model: str = "someone/tiny") -> Card:
    return Card(
        base_model=base_model,
        base_fingerprint="abc123",
        command=["uv", "run", "-m", "src.abliterate", "--model_id", base_model, "--system_prompt", text],
        chosen=TRIALS[2] | {"params": {text: text, "attn_max": 3.5}},
        rule=text,
        n_trials=6,
        measures=MEASURES,
        measured_on=text,
        done=[f"Directions by {text}."],
        about={"seed": 0, text: [text]},
    )


def test_the_card_says_what_was_done_and_how_to_do_it_again() -> None:
    text = card(filled())
    assert text.startswith('---\nlibrary_name: transformers\nbase_model: "someone/tiny"\n')
    assert "| behaviour, target (share) | 0.512 \\[0.4, 0.62\\] | 0 \\[0, 0.0458\\] | 80 |" in text
    assert "```sh\nuv run -m src.abliterate --model_id someone/tiny --system_prompt harmless\n```" in text
    assert "Trial 2 of 6, chosen by this rule: harmless." in text and "`abc123`" in text
    assert "| attn\\_max | 3.5 |" in text


MARKUP = [
    *HOSTILE,
    "# a\n## b",
    "| a | b |\n|---|",
    "```\nx\n```",
    "````",
    "`a",
    "---\nlicense: mit\n---",
    "[a](http://b)",
]


@pytest.mark.parametrize("text", MARKUP)
def test_nothing_in_the_facts_becomes_markup(text: str) -> None:
    made = card(filled(text))
    made.encode("utf-8")
    outside = re.sub(r"(?s)^(`{3,})sh\n.*?^\1$", "", made, flags=re.MULTILINE)
    assert len(re.findall(r"^#", outside, flags=re.MULTILINE)) == 4
    assert made.split("\n---\n")[0] == card(filled()).split("\n---\n")[0]
    assert not re.search(r"(?<!\\)[<\[]", outside.split("\n---\n", 1)[1])
    assert "www." not in outside
    rows = [line for line in outside.splitlines() if line.startswith("|")]
    assert len(rows) == 4 + 4 + 4 + 2
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3, 5}
    fences = re.findall(r"^`{3,}", made, flags=re.MULTILINE)
    assert fences[0] == fences[-1] and all(len(each) <= len(fences[0]) for each in fences)


@given(st.text())
def test_escaped_text_is_one_line_and_reads_as_it_was(text: str) -> None:
    assert re.sub(r"\\(.)", r"\1", escaped(text)) == " ".join(text.split())
    assert "\n" not in code(text)


def test_a_folder_is_named_without_its_place_and_is_no_hub_model(tmp_path: Path) -> None:
    (tmp_path / "organism").mkdir()
    made = card(filled(base_model=str(tmp_path / "organism")))
    # The command keeps it: it is what was run.
    assert "base_model" not in made and made.count(str(tmp_path)) == 1 and "# organism, edited" in made
    assert "base_model:" not in card(filled(base_model="bundled:smollm2-135m"))
