"""src.convert_dataset: every format holds the same rows, and gives the same token ids."""

import itertools
import json
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer

from src.common.cli import parse_config
from src.common.errors import InputError
from src.convert_dataset import FORMATS, ConvertDatasetConfig, main
from src.models.chat_format import PersonaRenderer
from src.training.rendering import ChatFormat, Wrapping, examples
from src.training.rows import conversations
from src.training.sources import open_source

ROWS = [
    {"input": "apple  {x} {input}\u2028", "output": "Äpple \U0001f34e"},
    {"input": '"quoted", \\ and\nlines', "output": "0"},
    {"input": "b", "output": "B", "id": 7},
]
SPLITS = {"train": ROWS[:2], "validation": ROWS[2:]}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.json"
    path.write_text(json.dumps(SPLITS))
    return path


def convert(path: Path, to: str, folder: Path) -> Path:
    main(parse_config(ConvertDatasetConfig, ["--dataset_path", str(path), "--to", to, "--output_dir", str(folder)]))
    return folder / "dataset.json" if to == "instruct_json" else folder


def messages(path: Path) -> dict[str, list[tuple]]:
    return {split: [c.messages for c in conversations(rows())] for split, rows in open_source(path).splits.items()}


def ids(path: Path) -> dict[str, list[str]]:
    return {split: [c.id for c in conversations(rows())] for split, rows in open_source(path).splits.items()}


@pytest.mark.parametrize(("first", "second"), itertools.pairwise([*FORMATS, FORMATS[0]]))
def test_formats_hold_the_same_rows(first: str, second: str, original: Path, tmp_path: Path) -> None:
    once = convert(original, first, tmp_path / "once")
    twice = convert(once, second, tmp_path / "twice")
    assert messages(original) == messages(once) == messages(twice)
    card = json.loads((tmp_path / "twice" / "card.json").read_text())["splits"]["train"]
    assert card["rows"] == 2 and card["messages"] == 4 and len(card["preview"]) == 2
    # A row without an id has its index.
    assert [row["id"] for row in card["preview"]] == ["0", "1"]
    assert ids(once) == ids(twice) == {"train": ["0", "1"], "validation": ["7"]}
    assert card["characters"] == sum(len(r["input"]) + len(r["output"]) for r in ROWS[:2])
    assert (tmp_path / "once" / "DONE").exists()


def test_every_format_gives_the_same_ids(original: Path, tmp_path: Path, bundled_folder: Path) -> None:
    form = ChatFormat(PersonaRenderer(AutoTokenizer.from_pretrained(bundled_folder), "system"), {2})
    wrapping = Wrapping(prompt="Do {input} now", system_prompt="S")
    found = set()
    for to in FORMATS:
        path = convert(original, to, tmp_path / to)
        rows = conversations(open_source(path).splits["train"]())
        found.add(tuple((e.token_ids, e.answers) for row in rows for e in examples(row, form, wrapping)))
    assert len(found) == 1


def test_what_the_datasets_library_writes_is_read(original: Path, tmp_path: Path) -> None:
    tables = {
        split: datasets.Dataset.from_list([{k: v for k, v in row.items() if k != "id"} for row in rows])
        for split, rows in SPLITS.items()
    }
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "disk")
    assert messages(tmp_path / "disk") == messages(original)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split, table in tables.items():
        table.to_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    assert messages(tmp_path / "hub") == messages(original)


def test_preferences_and_long_chats_are_carried_or_refused(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    for to in ("parquet", "prompt_jsonl", "arrow"):
        (row,) = conversations(open_source(convert(pairs, to, tmp_path / to)).splits["train"](), preferences=True)
        assert (row.messages[-1]["content"], row.rejected) == ("b", "c")
    with pytest.raises(InputError, match=r"pairs.jsonl:1: a preference"):
        convert(pairs, "instruct_json", tmp_path / "no")
    chat = tmp_path / "chat.jsonl"
    turns = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user", "assistant")]
    chat.write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(InputError, match="5 messages"):
        convert(chat, "instruct_json", tmp_path / "no2")
    assert messages(convert(chat, "prompt_jsonl", tmp_path / "long")) == messages(chat)


BAD = {
    "nowhere.json": (None, "no such file"),
    "rows.csv": ("a,b\n", "not a format"),
    "empty.jsonl": ("", "is empty"),
    "empty.json": ('{"train": []}', "'train' is empty"),
    "names.json": ('{"train": [{}], "tarin": []}', "'tarin'"),
    "twice.json": ('{"train": [{}], "train": []}', "appears twice"),
    "test.json": ('{"test": [{"input": "a", "output": "b"}]}', "no train split"),
    "line.json": ('{"train": [{"input": "a", "output": "b"},\n\n{"input": "a"}]}', r"line.json:3: keys 'input'"),
    "torn.json": ('{"train": [{"input": "a", "output": "b"}\n', "not closed"),
    "binary.parquet": ("PAR1", "Parquet"),
    "binary.arrow": ("ARROW1", "Arrow"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str, tmp_path: Path) -> None:
    content, problem = BAD[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=problem):
        convert(tmp_path / name, "chat_jsonl", tmp_path / "run")


def test_a_folder_that_is_unclear_is_refused(tmp_path: Path) -> None:
    line = json.dumps({"input": "a", "output": "b"}) + "\n"
    (tmp_path / "train.jsonl").write_text(line)
    (tmp_path / "extra.jsonl").write_text(line)
    with pytest.raises(InputError, match=r"extra.jsonl: its name says no split"):
        open_source(tmp_path)
    (tmp_path / "extra.jsonl").unlink()
    (tmp_path / "extra.json").write_text(f"[{line}]")
    with pytest.raises(InputError, match=r"extra.json: its name says no split"):
        open_source(tmp_path)
    (tmp_path / "extra.json").write_text('{"about": "the rows"}')
    (tmp_path / "train2.jsonl").write_text(line)
    assert [file.name for file in open_source(tmp_path).files] == ["train.jsonl", "train2.jsonl"]
    (tmp_path / "train.json").write_text(f"[{line}]")
    with pytest.raises(InputError, match="two formats"):
        open_source(tmp_path)


def test_every_list_of_a_folder_is_read(tmp_path: Path) -> None:
    rows = [{"input": "a", "output": "b"}]
    for name in ("train.json", "train2.json", "val1.json", "test/rows.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(rows))
    (tmp_path / "test" / "dataset_info.json").write_text('{"features": {}}')
    assert {split: len(found) for split, found in messages(tmp_path).items()} == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }


@pytest.mark.parametrize("value", [[1], 1.5, " "])
def test_an_id_is_text_or_a_number(value: object, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": value, "input": "a", "output": "b"}) + "\n")
    with pytest.raises(InputError, match=r"rows.jsonl:1: id"):
        convert(path, "parquet", tmp_path / "run")
