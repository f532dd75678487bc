"""`src.embed_dataset` end to end: right vectors, the same from every format, stored as the settings say."""

import csv
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.common.errors import InputError
from src.common.files import sha256_file
from src.embedding.precisions import agreement, to_precision
from tests.embed_runs import cosines, make_rows, read, shard_bytes, vectors, write_jsonl
from tests.tiny_embedder import WORDS


def test_the_bundled_model_gives_what_sentence_transformers_gives(
    embed: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sentence_transformers import SentenceTransformer

    from src.models.bundled import bundled_folder

    rows = make_rows(40)
    rows[3]["text"] = " ".join(WORDS * 40)
    path = write_jsonl(tmp_path / "some.jsonl", rows)
    table = read(embed(dataset_path=str(path), model_id="bundled:minilm", rows_per_shard=16, verify=8))
    model = SentenceTransformer(str(bundled_folder("bundled:minilm")), device="cpu")
    wanted = model.encode([row["text"] for row in rows])
    assert table["id"].to_pylist() == [row["id"] for row in rows]
    assert table["row_index"].to_pylist() == list(range(40))
    assert table["text"].to_pylist() == [row["text"] for row in rows]
    assert cosines(vectors(table), wanted).min() >= 0.99999
    assert np.abs(vectors(table) - wanted).max() < 1e-5
    counts = [len(model.tokenizer(row["text"], truncation=True, max_length=256).input_ids) for row in rows]
    assert table["n_tokens"].to_pylist() == counts
    assert [n for n, cut in enumerate(table["truncated"].to_pylist()) if cut] == [3]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["truncated"] == 1
    assert "1 texts are longer than 256 tokens" in capsys.readouterr().err
    in_half = read(embed("half", dataset_path=str(path), model_id="bundled:minilm", dtype="bfloat16"))
    assert cosines(vectors(in_half), wanted).min() >= 0.999


def test_the_manifest_and_the_sidecars_say_what_there_is(embed: Callable, embed_rows: Path) -> None:
    folder = embed(verify=4)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["complete"] and manifest["rows"] == 300 and manifest["dim"] == 32
    assert [each["row_start"] for each in manifest["shards"]] == [0, 64, 128, 192, 256]
    assert manifest["settings"]["content"] == {"rows.jsonl": sha256_file(embed_rows)}
    assert manifest["verification"]["worker-00000-of-00001"]["rows"] == 4
    for each in manifest["shards"]:
        assert each["sha256"] == sha256_file(folder / each["shard"])
        assert abs(each["norm_min"] - 1) < 1e-3 and abs(each["norm_max"] - 1) < 1e-3
    table = read(folder)
    assert table["metadata"].to_pylist()[7] == '{"n": 7}' and set(table["model"].to_pylist()) != {None}
    assert manifest["tokens"] <= sum(table["n_tokens"].to_pylist())  # equal texts are embedded once
    assert "created_at" not in table.schema.names and "run_id" not in table.schema.names
    before = shard_bytes(folder)
    (folder / "manifest.json").unlink()
    seen = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    assert shard_bytes(embed()) == before
    assert {path: path.stat().st_mtime_ns for path in folder.glob("shard-*")} == seen
    again = json.loads((folder / "manifest.json").read_text())
    assert again["shards"] == manifest["shards"] and again["stages"] == manifest["stages"]


def test_every_format_gives_the_same_vectors(embed: Callable, tmp_path: Path) -> None:
    rows = make_rows(130)
    write_jsonl(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet", row_group_size=50)
    with (tmp_path / "c.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "d").mkdir()
    write_jsonl(tmp_path / "d" / "1.jsonl", rows[:70])
    write_jsonl(tmp_path / "d" / "2.jsonl", rows[70:])
    (tmp_path / "e.json").write_text(json.dumps(rows))
    names = {"a.jsonl": "a", "b.parquet": "b", "c.csv": "c", "d": "d", "e.json": "e"}
    tables = {}
    for path, name in names.items():
        for index in (1, 0):
            folder = embed(f"from_{name}", dataset_path=str(tmp_path / path), num_workers=2, worker_index=index)
        tables[name] = read(folder)
    hub = embed("hub", dataset_path=f"hub:{tmp_path / 'd'}", split="train")
    tables["hub"] = read(hub)
    for table in tables.values():
        assert table["id"].to_pylist() == [row["id"] for row in rows]
        assert np.array_equal(vectors(table), vectors(tables["a"]))
    assert set(tables["d"]["source"].to_pylist()) == {"1.jsonl", "2.jsonl"}


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8", "binary"])
def test_precisions_are_stored_as_they_say(embed: Callable, precision: str) -> None:
    exact, folder = vectors(read(embed())), embed("other", precision=precision, verify=20)
    table = read(folder)
    stored = vectors(table)
    types = {"float16": pa.float16(), "bfloat16": pa.float32(), "int8": pa.int8(), "binary": pa.uint8()}
    assert table.schema.field("embedding").type == pa.list_(types[precision], 4 if precision == "binary" else 32)
    if precision == "binary":
        assert np.array_equal(np.unpackbits(stored, axis=1), exact > 0)
        return
    sidecars = [json.loads(path.read_text()) for path in sorted(folder.glob("shard-*.json"))]
    factors = np.concatenate([[each["coefficient"] or 1.0] * each["rows"] for each in sidecars])
    decoded = stored.astype(np.float32) * factors[:, None]
    assert cosines(decoded, exact).min() > (0.9999 if precision != "int8" else 0.999)
    if precision == "bfloat16":
        assert not (stored.view(np.uint32) & 0xFFFF).any()


def test_bfloat16_rounds_as_torch_does() -> None:
    import torch

    values = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    wanted = torch.from_numpy(values).bfloat16().float().numpy()
    assert np.array_equal(to_precision(values, "bfloat16")[0], wanted)


def test_bits_of_numbers_near_zero_are_no_disagreement() -> None:
    wanted = np.random.default_rng(0).normal(size=32).astype(np.float32)
    wanted[3], noisy = 0.001, wanted.copy()
    noisy[3] = -0.001
    assert agreement(to_precision(noisy[None], "binary")[0][0], wanted, "binary") == 1
    noisy[7] *= -1
    assert agreement(to_precision(noisy[None], "binary")[0][0], wanted, "binary") < 0.98


def test_vectors_can_be_cut_and_scaled(embed: Callable) -> None:
    whole = vectors(read(embed()))
    cut = vectors(read(embed("cut", truncate_dim=8, normalize=True)))
    assert cut.shape == (300, 8) and np.allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)
    assert cosines(cut, whole[:, :8]).min() > 0.99999


def test_long_texts_are_cut_up_and_nothing_of_them_is_lost(embed: Callable, tmp_path: Path) -> None:
    rows = make_rows(30)
    rows[2]["text"] = " ".join(str(n) for n in range(1000, 1100))
    path = str(write_jsonl(tmp_path / "long.jsonl", rows))
    table = read(embed(dataset_path=path, chunk_tokens=20, chunk_overlap=4, verify=60))
    chunks = [row for row in table.to_pylist() if row["row_index"] == 2]
    assert [row["chunk_index"] for row in chunks] == list(range(len(chunks))) and len(chunks) > 5
    assert not any(table["truncated"].to_pylist()) and max(table["n_tokens"].to_pylist()) <= 20
    for first, second in itertools.pairwise(chunks):
        start, following = rows[2]["text"].index(first["text"]), rows[2]["text"].index(second["text"], 1)
        assert start < following < start + len(first["text"])
    assert rows[2]["text"].startswith(chunks[0]["text"]) and rows[2]["text"].endswith(chunks[-1]["text"])
    folder = embed("pooled", dataset_path=path, chunk_tokens=20, chunk_overlap=4, pool_chunks=True, verify=30)
    pooled = read(folder)
    assert pooled["text"].to_pylist() == [row["text"] for row in rows]
    of_row = [n for n, index in enumerate(table["row_index"].to_pylist()) if index == 2]
    mean = np.average(vectors(table)[of_row], axis=0, weights=[chunks[n]["n_tokens"] for n in range(len(of_row))])
    assert np.allclose(vectors(pooled)[2], mean, atol=1e-5)


def test_prompts_sampling_and_equal_texts(embed: Callable, tiny_embedder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    plain = read(embed())
    texts = plain["text"].to_pylist()
    prompted = vectors(read(embed("prompted", prompt_name="query", verify=10)))
    wanted = SentenceTransformer(str(tiny_embedder), device="cpu").encode(texts[:50], prompt_name="query")
    assert cosines(prompted[:50], wanted).min() > 0.99999 and cosines(prompted, vectors(plain)).min() < 0.999
    some = read(embed("some", fraction=0.3, num_rows=200, store_text=False))
    other = read(embed("other", fraction=0.3, num_rows=200, store_text=False, rows_per_shard=50))
    assert some["row_index"].to_pylist() == other["row_index"].to_pylist() and 30 < len(some) < 90
    assert "text" not in some.schema.names
    thin = embed("thin", fraction=0.1, num_rows=60, rows_per_shard=4, precision="int8", verify=5)
    assert 0 in [json.loads(path.read_text())["rows"] for path in thin.glob("shard-*.json")]
    once = json.loads((embed("once") / "manifest.json").read_text())
    each = json.loads((embed("each", dedup=False) / "manifest.json").read_text())
    assert once["rows"] == each["rows"] == 300 and once["tokens"] < each["tokens"]


def test_an_id_that_is_no_name_is_kept_beside_the_row_number(embed: Callable, tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "river"}, {"id": 1.5, "text": "stone"}, {"text": "window"}]
    table = read(embed(dataset_path=str(write_jsonl(tmp_path / "ids.jsonl", rows))))
    assert table["id"].to_pylist() == ["a", "1", "2"]
    assert table["metadata"].to_pylist() == ["{}", '{"id": 1.5}', "{}"]


def test_turns_of_conversations(embed: Callable, tmp_path: Path) -> None:
    turns = [("system", "be brief"), ("user", "first question"), ("assistant", "first answer"),
             ("user", "second question"), ("assistant", "second answer")]  # fmt: skip
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in turns]},
        {"messages": [{"from": {"user": "human", "assistant": "gpt"}.get(r, r), "value": t} for r, t in turns]},
    ]
    path = str(write_jsonl(tmp_path / "chats.jsonl", rows))
    wanted = {"first_assistant": "first answer", "last_user": "second question",
              "all_turns": "\n\n".join(f"{role}: {text}" for role, text in turns)}  # fmt: skip
    for extract, text in wanted.items():
        assert read(embed(extract, dataset_path=path, extract=extract))["text"].to_pylist() == [text, text]
    silent = write_jsonl(tmp_path / "silent.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(InputError, match=r"silent.jsonl:1: the conversation has no turn of the assistant"):
        embed("silent", dataset_path=str(silent), extract="first_assistant")


def test_compiled_batches_give_the_same_vectors(embed: Callable) -> None:
    settings = {"num_rows": 40, "max_length": 16, "tokens_per_batch": 256}
    compiled = vectors(read(embed("compiled", compile=True, **settings)))
    assert cosines(compiled, vectors(read(embed(**settings)))).min() > 0.99999


def test_openvino_gives_the_same_vectors(embed: Callable) -> None:
    pytest.importorskip("openvino", reason="uv run --extra openvino -m pytest tests/")
    exact = vectors(read(embed()))
    for dtype, bar in (("float32", 0.99999), ("bfloat16", 0.999)):
        folder = embed(dtype, backend="openvino", dtype=dtype, verify=20)
        assert cosines(vectors(read(folder)), exact).min() > bar
        assert json.loads((folder / "manifest.json").read_text())["settings"]["backend"] == "openvino"
