"""Rows mean the same in every format, and every wrong one is named by file and line."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.common.errors import InputError
from src.common.rows import Chat, Persona, Prompt, read_chats, read_personas, read_prompts

DATA = Path(__file__).parent.parent / "data" / "personas"
ROWS = [("a", "Who are you?"), ("b", 'Say "{hello}", then\u2028stop.'), ("c", "¿Qué tal? 🙂")]


def write_json(path: Path, rows: list[tuple[str, str]]) -> None:
    path.write_text(json.dumps([{"id": i, "prompt": text} for i, text in rows], indent=1), encoding="utf-8")


def write_jsonl(path: Path, rows: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"id": i, "prompt": text}, ensure_ascii=False) + "\n" for i, text in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="")


def write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "prompt"), *rows])


def write_parquet(path: Path, rows: list[tuple[str, str]]) -> None:
    ids, texts = zip(*rows, strict=True)
    pyarrow.parquet.write_table(pyarrow.table({"id": list(ids), "prompt": list(texts)}), path)


WRITERS: dict[str, Callable[[Path, list[tuple[str, str]]], None]] = {
    "json": write_json,
    "jsonl": write_jsonl,
    "csv": write_csv,
    "parquet": write_parquet,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_formats_agree(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"prompts.{kind}"
    WRITERS[kind](path, ROWS)
    assert read_prompts(path) == [Prompt(i, text) for i, text in ROWS]
    assert read_prompts(str(path), limit=2) == [Prompt(i, text) for i, text in ROWS[:2]]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_hub_form_agrees(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "set"
    folder.mkdir()
    WRITERS[kind](folder / f"train.{kind}", ROWS)
    expected = [Prompt(i, text) for i, text in ROWS]
    assert read_prompts(f"hub:{folder}") == expected
    assert read_prompts(f"hub:{folder}::train:prompt", limit=2) == expected[:2]
    assert [prompt.text for prompt in read_prompts(f"hub:{folder}:::id")] == ["a", "b", "c"]
    with pytest.raises(InputError, match="no split 'dev'; expected one of: train"):
        read_prompts(f"hub:{folder}::dev")
    with pytest.raises(InputError, match="no column 'promt'; expected one of: id, prompt"):
        read_prompts(f"hub:{folder}:::promt")
    with pytest.raises(InputError, match="'nope' not found"):
        read_prompts(f"hub:{folder}:nope")


def test_hub_form_errors(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "fine"}\n{"prompt": ""}\n')
    with pytest.raises(InputError, match=re.escape(f"hub:{tmp_path}:2: prompt is empty; expected text")):
        read_prompts(f"hub:{tmp_path}")
    (tmp_path / "train.jsonl").write_text('{"prompt": "fine"}\n{"prompt"\n')
    with pytest.raises(InputError, match=re.escape(f"hub:{tmp_path}:")):
        read_prompts(f"hub:{tmp_path}")
    for source in ("hub:", "hub:a:b:c:d:e"):
        with pytest.raises(InputError, match="expected hub:NAME"):
            read_prompts(source)


def test_missing_ids_are_the_index(tmp_path: Path) -> None:
    expected = [Prompt("0", "one"), Prompt("1", "two, or so")]
    for name, text in {
        "list.json": '["one", "two, or so"]',
        "objects.json": '[{"question": "one"}, {"text": "two, or so"}]',
        "lines.jsonl": '{"prompt": "one"}\n\n{"prompt": "two, or so"}',
        "table.csv": 'text,label\none,1\n\n"two, or so",2\n',
        "plain.txt": "\ufeffone\r\n \r\ntwo, or so",
    }.items():
        (tmp_path / name).write_bytes(text.encode())
        assert read_prompts(tmp_path / name) == expected, name


def test_the_first_text_key_wins_and_number_ids_are_text(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "no", "prompt": "yes", "id": 7}\n{"prompt": "b", "id": null}')
    assert read_prompts(path) == [Prompt("7", "yes"), Prompt("1", "b")]


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


# The first example imports pyarrow, which is not the time that a deadline is about.
@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=8, unique_by=lambda row: row[0]))
def test_any_text_survives_every_format(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    for kind, write in WRITERS.items():
        write(folder / f"p.{kind}", rows)
        assert read_prompts(folder / f"p.{kind}") == [Prompt(i, text) for i, text in rows], kind


PROMPT_ERRORS = [
    ("p.json", '[\n "ok",\n {"promt": "a"}\n]', 3, 'no key.* in "promt", is "promt" meant to be "prompt"; expected'),
    ("p.json", '[\n "ok",\n\n ""]', 4, "prompt is empty; expected text"),
    ("p.json", '["ok",\n {"prompt": " \\n "}]', 2, "prompt is blank; expected text"),
    ("p.json", '[{"prompt": 5}]', 1, "prompt is the number 5; expected text"),
    ("p.json", "[null]", 1, "the prompt is null; expected text"),
    ("p.json", '["a",\n "b" "c"]', 2, "the list is not closed here"),
    ("p.json", '["a",\n', 2, "malformed JSON"),
    ("p.json", '["a",\n]', 2, "malformed JSON"),
    ("p.json", '["a",\n"b\nc"]', 2, "malformed JSON .Invalid control character"),
    ("p.json", '["a"]\n\n["b"]', 3, "text after the list"),
    ("p.json", '\n{"prompt": "a"}', 2, "the top level is an object .*name it .jsonl.*; expected a JSON list"),
    ("p.json", "", 1, "the top level is empty; expected a JSON list"),
    ("p.json", "\n3", 2, "the top level is not a list"),
    ("p.json", "[ ]", 1, "no prompts in it"),
    ("p.json", '["a",\n{"prompt": NaN}]', 2, "NaN is not JSON"),
    ("p.json", '["a",\n{"prompt": "a", "prompt": "b"}]', 2, "'prompt' appears twice"),
    ("p.json", '["a",\n"\\ud800"]', 2, "surrogate"),
    ("p.json", '["a",\n' + "[" * 100_000, 2, "recursion"),
    ("p.json", '[{"prompt": "a", "id": "x"},\n\n{"prompt": "b", "id": "x"}]', 3, "id 'x' is already at .*p.json:1"),
    ("p.json", '[{"prompt": "a", "id": ""}]', 1, "id is empty"),
    ("p.json", '[{"prompt": "a", "id": 1.5}]', 1, "id is the number 1.5"),
    ("p.json", '[{"prompt": "a", "id": true}]', 1, "id is the value True"),
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": }', 2, "Expecting value at column 12"),
    ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"} 3', 3, "Extra data at column 17"),
    ("p.jsonl", '"a"', 1, "a JSON str; expected one JSON object a line"),
    ("p.jsonl", '{"prompt": "a"}\n{}', 2, "no key .* in {}"),
    ("p.jsonl", "\n\n", 1, "no prompts in it"),
    ("p.csv", "", 1, "no prompts in it"),
    ("p.csv", "id,promt\n1,a", 1, 'is "promt" meant to be "prompt"'),
    ("p.csv", "prompt\n", 1, "no prompts in it"),
    ("p.csv", 'id,prompt\n1,"a\nb"\n2', 4, "1 cells; expected 2, as in the header"),
    ("p.csv", 'prompt\n"a\nb"\n" "\n', 4, "prompt is blank"),
    ("p.csv", 'prompt\na\n"b', 3, "malformed CSV"),
    ("p.csv", "prompt,prompt\na,b", 1, "'prompt' appears twice"),
    ("p.txt", "\n \n", 1, "no prompts in it"),
    ("p.parquet", "not parquet", 1, "not readable as Parquet"),
]


@pytest.mark.parametrize(("name", "text", "line", "problem"), PROMPT_ERRORS)
def test_a_wrong_prompt_is_named(name: str, text: str, line: int, problem: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode())
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}:{line}: .*{problem}") as caught:
        read_prompts(path)
    assert "; expected" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    for read in (read_prompts, read_personas, read_chats):
        with pytest.raises(InputError, match=r"none\.json: no such file; expected"):
            read(tmp_path / "none.json")
        with pytest.raises(InputError, match="is a folder; expected a file"):
            read(tmp_path)
        (tmp_path / "p.yaml").write_text("- a")
        with pytest.raises(InputError, match=r"not a format for .*; expected \.json"):
            read(tmp_path / "p.yaml")
        (tmp_path / "latin.json").write_bytes('["a",\n"é"]'.encode("latin-1"))
        with pytest.raises(InputError, match=r"latin\.json:2: byte 0xe9 is not UTF-8; expected"):
            read(tmp_path / "latin.json")
    with pytest.raises(InputError, match="a limit of 0 prompts; expected at least 1"):
        read_prompts(DATA / "prompts.json", limit=0)


def test_a_wrong_parquet_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", None]}), path)
    with pytest.raises(InputError, match=r"p\.parquet:2: prompt is null"):
        read_prompts(path)
    pyarrow.parquet.write_table(pyarrow.table({"promt": ["a"]}), path)
    with pytest.raises(InputError, match=r'p\.parquet: no key.*"promt" meant to be "prompt"'):
        read_prompts(path)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [float("nan")]}), path)
    with pytest.raises(InputError, match=r"p\.parquet:1: prompt is the number nan"):
        read_prompts(path)


HAMLET = '{"persona": "Hamlet", "category": "play", "article": "none"}'
PERSONA_ERRORS = [
    (f"[{HAMLET},\n\n{HAMLET}]", 3, "persona 'Hamlet' is already at .*:1; expected each once"),
    (
        '[{"persona": "a", "category": "b", "artcle": "c"}]',
        1,
        'no key "article" in .*, is "artcle" meant to be "article"',
    ),
    ('[{"persona": "a", "category": "b", "article": "", "note": "c"}]', 1, 'unknown "note"'),
    ('[{"persona": "a", "category": "b"}]', 1, 'no key "article"'),
    ('[{"persona": "a", "category": "b", "article": null}]', 1, "article is null; expected text"),
    ('[{"persona": "a", "category": "b", "article": 1}]', 1, "article is the number 1; expected text"),
    ('[{"persona": "", "category": "b", "article": "a"}]', 1, "persona is empty"),
    ('[{"persona": "a", "category": " ", "article": "a"}]', 1, "category is blank; expected text"),
    (
        '[{"persona": "a", "category": "b ", "article": "a"}]',
        1,
        "category 'b ' has white space around it; expected 'b'",
    ),
    ('[\n"Hamlet"]', 2, "the text 'Hamlet'; expected an object"),
    ("[]", 1, "no personas in it"),
]


@pytest.mark.parametrize(("text", "line", "problem"), PERSONA_ERRORS)
def test_a_wrong_persona_is_named(text: str, line: int, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "personae.json"
    path.write_text(text)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}:{line}: .*{problem}"):
        read_personas(path)


def test_personas_from_json_and_jsonl_agree(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(f"[{HAMLET}]")
    (tmp_path / "p.jsonl").write_text(HAMLET)
    expected = [Persona("Hamlet", "play", "none")]
    assert read_personas(tmp_path / "p.json") == read_personas(tmp_path / "p.jsonl") == expected


CHAT = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "id": "x"}'
CHAT_ERRORS = [
    ('{"message": []}', 'no key "messages" in "message", is "message" meant to be "messages"'),
    ('{"messages": []}', "messages is the list .*expected a list of at least one message"),
    ('{"messages": [{"role": "user"}]}', 'message 1: no key "content"'),
    ('{"messages": [{"role": "user", "content": "a", "weight": 1}]}', 'message 1: unknown "weight"'),
    (
        '{"messages": [{"role": "asistant", "content": "a"}]}',
        'role is "asistant", perhaps "assistant"; expected system',
    ),
    ('{"messages": [{"role": "user", "content": ""}]}', "message 1: content is empty"),
    ('{"messages": ["Hi"]}', "message 1: the text 'Hi'; expected an object"),
    (CHAT, r"id 'x' is already at .*c\.jsonl:1"),
]


def test_chats_from_json_and_jsonl_agree(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(f"[{CHAT}]")
    (tmp_path / "c.jsonl").write_text(CHAT)
    assert read_chats(tmp_path / "c.json") == read_chats(tmp_path / "c.jsonl")
    assert read_chats(tmp_path / "c.json")[0] == Chat("x", tuple(json.loads(CHAT)["messages"]))


@pytest.mark.parametrize(("text", "problem"), CHAT_ERRORS)
def test_a_wrong_chat_is_named(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(f"{CHAT}\n{text}")
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}:2: .*{problem}"):
        read_chats(path)


def test_the_shipped_prompts() -> None:
    prompts = read_prompts(DATA / "prompts.json")
    assert len(prompts) >= 72
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    assert all(re.fullmatch(r"[a-z0-9-]+", prompt.id) for prompt in prompts)
    # One object a line, so that a line number is useful.
    assert len((DATA / "prompts.json").read_text().splitlines()) == len(prompts) + 2
    assert len({row["category"] for row in json.loads((DATA / "prompts.json").read_text())}) >= 10
    assert len(read_prompts(DATA / "follow_ups.json")) >= 4


def test_the_shipped_personas() -> None:
    personas = read_personas(DATA / "personae.json")
    assert len(personas) >= 56
    assert len({persona.category for persona in personas}) >= 9
    assert personas[0] == Persona("assistant", "assistant", "an")
    assert {persona.article for persona in personas} <= {"a", "an", "the", "none"}
    wrong = [p for p in personas if p.article in {"a", "an"} and (p.article == "an") != (p.persona[0] in "AEIOUaeiou")]
    assert {p.persona for p in wrong} <= set()
