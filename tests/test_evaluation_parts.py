"""Task files, scorers, measures, the desk between inspect-ai and the engine, and the report."""

import asyncio
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageSystem, ChatMessageTool, ChatMessageUser, ModelOutput
from inspect_ai.scorer import Target
from inspect_ai.solver import TaskState

from src.common.errors import InputError
from src.evaluation.calls import Answers, Call
from src.evaluation.desk import Desk, Stopped
from src.evaluation.inspect_model import as_messages
from src.evaluation.report import report
from src.evaluation.rows import as_number
from src.evaluation.scorers import SCORERS, softmax
from src.evaluation.sources import read_sources
from src.evaluation.summary import compare_cells, sign_test, summarize_cells
from src.evaluation.task_files import read_task_file
from src.evaluation.task_header import Header
from src.ops.calibration import brier, calibration_error
from src.ops.statistics import paired_difference_interval, share_interval
from tests.conftest import ROOT

GOOD = {"id": "a", "input": "x", "target": "y"}
CHOICE = {"input": "x", "choices": ["p", "q"], "target": "A"}
SHOWN = {"scorer": "choice", "prompt": "{input} {choices}"}


def write(folder: Path, rows: list | str, header: dict | None = None) -> Path:
    path = folder / "task.jsonl"
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    if header is not None:
        (folder / "task.task.json").write_text(json.dumps(header))
    return path


def test_every_format_of_a_row_asks_the_same(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "x {input}"}, {"role": "assistant", "content": "y"}]
    rows = [
        {"input": "x {input}", "target": "y"},
        {"input": "x {input}", "output": "y"},
        {"messages": chat},
        {"messages": chat[:1], "target": ["y"]},
    ]
    header = {"scorer": "exact", "prompt": "<{input}>", "system_prompt": "Be brief."}
    samples = read_task_file(write(tmp_path, rows, header)).samples
    assert {(json.dumps(s.messages), s.targets, s.text) for s in samples} == {
        (json.dumps(samples[0].messages), ("y",), "x {input}")
    }
    assert [m["content"] for m in samples[0].messages] == ["Be brief.", "<x {input}>"]
    assert [s.id for s in samples] == ["0", "1", "2", "3"]
    (tmp_path / "task.json").write_text(json.dumps(rows))
    assert read_task_file(tmp_path / "task.json").samples == samples


@pytest.mark.parametrize(
    ("rows", "header", "problem"),
    [
        ([GOOD], None, r"no task.task.json beside it.*@SCORER"),
        ([GOOD], {}, "no key 'scorer'"),
        ([GOOD], {"scorer": "exakt"}, "nearest is exact"),
        ([GOOD], {"scorer": "exact", "promt": "{input}"}, "'promt'; the nearest is 'prompt'"),
        ([GOOD], {"scorer": "exact", "prompt": "hm"}, "holds {input}"),
        ([GOOD], {"scorer": "exact", "max_tokens": 0}, "whole number from 1"),
        ([GOOD], {"scorer": "exact", "ignore_case": 1}, "true or false"),
        ([GOOD], {"scorer": "choice", "prompt": "{input}"}, "put {choices} in prompt"),
        ([], {"scorer": "exact"}, "no rows"),
        ("{", {"scorer": "exact"}, r"task.jsonl:1"),
        ([GOOD, GOOD], {"scorer": "exact"}, r"task.jsonl:2: id 'a' is already at .*task.jsonl:1"),
        ([{"input": "x"}], {"scorer": "exact"}, r"task.jsonl:1: no key \"target\""),
        ([{"input": " ", "target": "y"}], {"scorer": "exact"}, "blank"),
        ([{"input": "x", "target": ""}], {"scorer": "exact"}, "target is empty"),
        ([{"input": "x", "target": []}], {"scorer": "exact"}, "empty list"),
        ([{"input": "x", "target": "y", "output": "y"}], {"scorer": "exact"}, "both"),
        ([{"target": "y"}], {"scorer": "exact"}, "either \"input\" or \"messages\""),
        ([{"messages": [{"role": "user", "content": "x"}]}], {"scorer": "exact"}, "no right answer"),
        ([GOOD], SHOWN, "needs them"),
        ([CHOICE | {"target": "C"}], SHOWN, "expected the letter of a choice, A, B"),
        ([CHOICE | {"target": "AB"}], SHOWN, "expected the letter"),
        ([CHOICE | {"choices": ["p", "p"]}], SHOWN, "twice"),
        ([CHOICE | {"choices": ["p"]}], SHOWN, "list of 2 to 26"),
        ([CHOICE | {"choices": ["p", "q", "r"]}], {"scorer": "risk"}, "one of two"),
        ([CHOICE | {"target": 2}], {"scorer": "risk"}, "expected 0, 1, or one of p, q"),
        ([CHOICE | {"target": 1}], {"scorer": "risk", "positive": "z"}, "none of the choices"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, rows, header, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        read_task_file(write(tmp_path, rows, header))


def test_sources_are_found_or_named(tmp_path: Path) -> None:
    path = write(tmp_path, [CHOICE])
    (source,) = read_sources([f"{path}@choice"])
    assert source.name == "task" and source.weighs and "A. p\nB. q" in source.file.samples[0].messages[0]["content"]
    code = tmp_path / "mine.py"
    code.write_text("from inspect_ai import task\n@task\ndef one(): ...\ndef two(): ...\n")
    assert read_sources([f"{code}@one"])[0].inputs == [code]
    for words, problem in (
        ([f"{path}@exat"], "no scorer 'exat'"),
        ([f"{path}@exact", f"{path}@choice"], "both are called task"),
        ([str(code)], "which task; expected .*NAME one of one"),
        ([f"{code}@two"], "no task 'two' in it"),
        (["no_such_package_here/arc"], "not installed"),
        (["arc"], "no task; expected FILE.jsonl"),
        ([str(tmp_path / "gone.py") + "@x"], "no such file"),
    ):
        with pytest.raises(InputError, match=problem):
            read_sources(words)


def scored(header: Header, output: ModelOutput, target: str | list[str]):
    state = TaskState("m", Sample(input="x").id or 0, 1, "x", [], Target(target), output=output)
    return asyncio.run(SCORERS[header.scorer](header)(state, Target(target)))


def test_exact_and_includes_mind_case_unless_told() -> None:
    said = lambda text: ModelOutput.from_content("m", text)  # noqa: E731
    exact, folded = Header(scorer="exact"), Header(scorer="exact", ignore_case=True)
    assert scored(exact, said(" Apple\n"), "Apple").value == 1 and scored(exact, said("apple"), "Apple").value == 0
    # What inspect-ai's own scorer of this name lets pass.
    assert scored(exact, said("The apple."), "apple").value == 0
    assert scored(folded, said("APPLE"), ["pear", "Apple"]).value == 1
    assert scored(Header(scorer="includes"), said("An Apple a day"), "Apple").value == 1
    assert scored(Header(scorer="includes"), said("An apple a day"), "Apple").value == 0


def test_choices_are_weighed_by_letter_or_by_byte() -> None:
    output = ModelOutput.from_content("m", "x")
    output.metadata = {"options": ["no", "a long answer"], "log_probabilities": [-4.0, -6.0]}
    letters = scored(Header(scorer="choice"), output, "A")
    assert (letters.value, letters.answer) == (1, "A")
    assert letters.metadata["probability"] == pytest.approx(1 / (1 + math.exp(-2)))
    texts = scored(Header(scorer="choice", answers="texts"), output, "A")
    assert (texts.value, texts.answer) == (0, "B") and texts.metadata == letters.metadata
    risk = scored(Header(scorer="risk"), output, "a long answer")
    assert risk.metadata == {"probability": pytest.approx(1 / (1 + math.exp(2))), "label": 1} and risk.value == 0
    assert scored(Header(scorer="risk", positive="no"), output, "a long answer").metadata["label"] == 0
    assert softmax([-1e4, -1e4 - 1]) == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e)])


def test_calibration_is_what_it_says() -> None:
    assert brier([0.0, 1.0, 0.5], [0, 1, 1]) == pytest.approx(0.25 / 3)
    assert calibration_error([0.25, 0.25, 0.25, 0.25], [0, 0, 0, 1]) == pytest.approx(0)
    # By hand: two bins, |0.1 − 1|·1/3 and |0.95 − 0.5|·2/3.
    assert calibration_error([0.1, 0.9, 1.0], [1, 0, 1]) == pytest.approx((0.9 + abs(1.9 - 1)) / 3)
    for p, y in (([1.1], [1]), ([0.5], [2]), ([], []), ([math.nan], [0]), ([0.5], [0, 1])):
        with pytest.raises(ValueError):
            brier(p, y)


def test_intervals_of_paired_shares() -> None:
    # Newcombe 1998, table II, (e = 36, f = 12, g = 2, h = 0) by method 10: 0.0569 to 0.3404.
    assert paired_difference_interval(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=1e-4)
    low, high = paired_difference_interval(20, 0, 0, 0)
    assert low < 0 < high and low == pytest.approx(-high)
    for counts in ((3, 5, 2, 7), (0, 9, 1, 0), (10, 0, 4, 1)):
        low, high = paired_difference_interval(*counts)
        turned = paired_difference_interval(counts[0], counts[2], counts[1], counts[3])
        assert turned == pytest.approx((-high, -low)) and -1 <= low < (counts[1] - counts[2]) / sum(counts) < high <= 1
    # Coverage where the two are correlated, against a nominal 0.95.
    generator = np.random.default_rng(0)
    shares = np.array([0.5, 0.2, 0.1, 0.2])
    drawn = generator.multinomial(60, shares, size=2000)
    inside = [low <= 0.1 <= high for low, high in (paired_difference_interval(*map(int, each)) for each in drawn)]
    assert 0.93 <= np.mean(inside) <= 0.985


def rows(cell: tuple, scores: list[float | None], reps: int = 1) -> list[dict]:
    task, model, persona, arm = cell
    common = {"task": task, "model_id": model, "persona": persona, "arm": arm, "avg_entropy": 1.0, "num_tokens": 2,
              "finish_reason": "length", "probability": None, "label": None, "answer": "<i>x</i>", "response": "x",
              "prompt": "<script>alert(1)</script>", "target": ["y"]}  # fmt: skip
    return [
        common | {"id": f"{cell}{i}", "sample_id": str(i // reps), "rep_idx": i % reps, "score": s}
        for i, s in enumerate(scores)
    ]


def test_cells_are_compared_with_the_first_of_their_kind() -> None:
    keys = [("t", m, p, a) for m in ("m1", "m2") for p in (None, "Hamlet") for a in ("-1", "unsteered")]
    generator = random.Random(0)
    cells = {str(key): rows(key, [float(generator.random() < 0.5) for _ in range(12)]) for key in keys}
    found = compare_cells(cells, seed=0)
    assert {(r["differs"], r["first"], r["second"], r["model_id"], r["persona"], r["arm"]) for r in found} == {
        *(("model_id", "m1", "m2", None, p, a) for p in (None, "Hamlet") for a in ("-1", "unsteered")),
        *(("persona", None, "Hamlet", m, None, a) for m in ("m1", "m2") for a in ("-1", "unsteered")),
        *(("arm", "unsteered", "-1", m, p, None) for m in ("m1", "m2") for p in (None, "Hamlet")),
    }
    for row in found:
        assert row["n_samples"] == 12 and row["ci_low"] < row["difference"] < row["ci_high"]
        assert row["difference"] == pytest.approx((row["second_better"] - row["second_worse"]) / 12, abs=1e-4)
    assert sign_test(0, 0) == 1 and sign_test(6, 0) == pytest.approx(2 / 64) and sign_test(3, 3) == 1


def test_scores_have_the_interval_that_suits_them() -> None:
    (once,) = summarize_cells({"c": rows(("t", "m", None, "unsteered"), [1.0, 0.0, 1.0, 1.0])}, seed=0)
    assert (once["ci_low"], once["ci_high"]) == pytest.approx(share_interval(3, 4), abs=1e-4)
    assert once["n"] == once["n_samples"] == 4 and once["truncated"] == 1 and once["auc"] is None
    (twice,) = summarize_cells({"c": rows(("t", "m", None, "unsteered"), [1.0, 1.0, 0.0, 0.0, 1.0, 1.0], 2)}, seed=0)
    # Three samples, each repeated: as uncertain as three.
    assert twice["n_samples"] == 3 and (twice["ci_low"], twice["ci_high"]) == (0, 1)
    (none,) = summarize_cells({"c": rows(("t", "m", None, "unsteered"), [None, None])}, seed=0)
    assert none["score"] is none["ci_low"] is None
    assert [as_number(v) for v in ("C", "I", "P", "N", True, 2, "else", {"a": 1}, math.nan)] == [
        1, 0, 0.5, 0, 1, 2, None, None, None,
    ]  # fmt: skip


def test_the_report_escapes_and_shows_disagreements() -> None:
    cells = {m: rows(("t<b>", m, None, "unsteered"), scores) for m, scores in (("m1", [1.0, 0.0]), ("m2", [1.0, 1.0]))}
    page = report("Evil <title>", summarize_cells(cells, 0), compare_cells(cells, 0), cells, {"a": "<u>"})
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page
    assert "<i>x" not in page and "t<b>" not in page and "<u>" not in page
    assert page.count("alert(1)") == 1, "one of the two samples is scored alike"


def call(number: int, **settings) -> Call:
    return Call(reference="m", arm="unsteered", token_ids=(number,), header="", **settings)


class Echo:
    """Answers as an engine would, in batches."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.batches, self.prepared, self._fails_at = [], 0, fails_at

    def prepare(self) -> None:
        self.prepared += 1

    def answer(self, calls, on_row) -> None:
        self.batches.append(len(calls))
        for each in calls:
            if self._fails_at == each.token_ids[0]:
                raise InputError("no more")
            on_row({"id": each.id, "token_ids": list(each.token_ids)})


def test_calls_are_gathered_answered_once_and_kept(tmp_path: Path) -> None:
    async def ask_all(desk: Desk, n: int) -> list[dict]:
        first = await asyncio.gather(*(desk.ask(call(i % n)) for i in range(3 * n)))
        return [*first, await desk.ask(call(n))]

    server, desk = Echo(), Desk(Answers(tmp_path))
    found = desk.run(lambda: asyncio.run(ask_all(desk, 100)), server)
    assert [row["token_ids"][0] for row in found] == [*range(100)] * 3 + [100]
    assert sum(server.batches) == 101 and len(server.batches) <= 10
    again = Echo()
    kept = Desk(Answers(tmp_path))
    assert kept.run(lambda: asyncio.run(ask_all(kept, 100)), again) == found
    assert again.batches == [] and again.prepared == 0


def test_errors_on_either_side_end_both(tmp_path: Path) -> None:
    ended = []

    async def ask(desk: Desk, n: int) -> None:
        try:
            await asyncio.gather(*(desk.ask(call(i)) for i in range(n)))
        except Stopped:
            ended.append("stopped")
            raise

    desk = Desk(Answers(tmp_path))
    with pytest.raises(InputError, match="no more"):
        desk.run(lambda: asyncio.run(ask(desk, 5)), Echo(fails_at=3))
    assert ended == ["stopped"] and set(Answers(tmp_path).rows) == {call(i).id for i in range(3)}

    def refuse() -> None:
        desk.refuse(InputError("cannot"))
        asyncio.run(ask(desk, 50))

    with pytest.raises(InputError, match="cannot"):
        desk.run(refuse, Echo())

    async def gives_up() -> str:
        # As inspect-ai does when another sample fails.
        waiting = asyncio.create_task(desk.ask(call(7)))
        await asyncio.sleep(0.01)
        waiting.cancel()
        return "given up"

    assert desk.run(lambda: asyncio.run(gives_up()), Echo()) == "given up"
    with pytest.raises(KeyError, match="job"):
        desk.run(lambda: {}["job"], Echo())


def test_calls_differ_in_what_changes_their_answer() -> None:
    some = [
        call(1), call(2), call(1, max_tokens=2), call(1, temperature=0.5), call(1, temperature=0.5, seed=1),
        call(1, options=((1,),)), call(1, options=((1,), (2,))),
        Call(reference="m", arm="+1", token_ids=(1,), header=""),
        Call(reference="n", arm="unsteered", token_ids=(1,), header=""),
    ]  # fmt: skip
    assert len({each.id for each in some}) == len(some)
    assert call(1, seed=1).id == call(1).id, "greedy answers depend on no seed"


def test_messages_that_are_more_than_text_are_refused() -> None:
    given = [ChatMessageSystem(content="a"), ChatMessageSystem(content="b"), ChatMessageUser(content="c")]
    assert as_messages(given) == [{"role": "system", "content": "a\n\nb"}, {"role": "user", "content": "c"}]
    with pytest.raises(InputError, match="tool"):
        as_messages([ChatMessageTool(content="x")])


def test_a_choice_that_begins_with_another_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    from tests.test_evaluate import evaluate

    path = write(tmp_path, [{"input": "x", "choices": ["red", "red wine"], "target": 1}], {"scorer": "risk"})
    model = ["--model_id", tiny_folder, "--device", "cpu", "--backend", "hf", "--tasks"]
    with pytest.raises(InputError, match="'red wine' begins with the tokens of 'red'"):
        evaluate(*model, path, "--output_dir", tmp_path / "r")


def test_no_choice_is_weighed_inside_of_thinking(tiny_folder: Path, tmp_path: Path) -> None:
    from tests.test_evaluate import evaluate

    path = write(tmp_path, [{"input": "x", "choices": ["red", "blue"], "target": 1}], {"scorer": "risk"})
    (tmp_path / "thinks.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% if enable_thinking %}<think>{% else %}<think></think>{% endif %}"
        "{% endif %}"
    )
    more = ["--chat_template", tmp_path / "thinks.jinja", "--output_dir"]
    model = ["--model_id", tiny_folder, "--device", "cpu", "--backend", "hf", "--tasks"]
    with pytest.raises(InputError, match="opens the thinking before the answer"):
        evaluate(*model, path, *more, tmp_path / "a")
    evaluate(*model, path, "--nothinking_mode", *more, tmp_path / "b")


def test_the_tasks_that_come_along_are_sound() -> None:
    words = read_task_file(ROOT / "data/evals/capitalization.jsonl")
    assert len(words.samples) == 100 and all(s.targets == (s.text.capitalize(),) for s in words.samples)
    assert sum(len(sample.text) == 5 for sample in words.samples) == 60
    quiz = read_task_file(ROOT / "data/evals/general_knowledge.jsonl")
    letters = [sample.targets[0] for sample in quiz.samples]
    assert len(letters) == 100 and {letter: letters.count(letter) for letter in "ABCD"} == dict.fromkeys("ABCD", 25)
    judged = read_task_file(ROOT / "data/evals/explanations.jsonl")
    assert len(judged.samples) == 12 and judged.rubric.name == "coherence" and len(judged.files) == 3
    assert all(len(sample.choices) == 4 for sample in quiz.samples) and len({s.text for s in quiz.samples}) == 100
