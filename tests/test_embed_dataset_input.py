"""`src.embed_dataset` on what it is given: bad rows, settings, folders, models, and a hub's datasets."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from src.common.errors import CheckFailed, InputError
from tests.embed_runs import make_rows, read, vectors, write_jsonl
from tests.hub_server import COMMIT, hub_server


def test_rows_without_a_text_are_named_and_counted_or_left_out(embed: Callable, tmp_path: Path) -> None:
    rows: list = make_rows(30)
    rows[4]["text"], rows[5]["text"], rows[6]["text"], rows[7]["text"] = 7, None, "  ", "half \ud800"
    del rows[8]["text"]
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(InputError, match=r"bad.jsonl:5: text is the int 7; expected text \(and 4 more bad rows"):
        embed(dataset_path=str(path))
    assert not list((tmp_path / "out").glob("shard-*"))
    folder = embed(dataset_path=str(path), skip_bad_rows=True)
    assert read(folder)["row_index"].to_pylist() == [n for n in range(30) if not 4 <= n <= 8]
    assert json.loads((folder / "manifest.json").read_text())["bad_rows"] == 5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_id": "/no/such/model"}, "/no/such/model: no such folder"),
        ({"model_id": "bundled:smollm2-135m"}, "no modules.json"),
        ({"dataset_path": "/nowhere/rows.jsonl"}, "no such file"),
        ({"dataset_path": "rows.xlsx"}, "rows.xlsx"),
        ({"text_field": "body"}, "no field body; its fields are id, text, n"),
        ({"extract": "last_user"}, "no field messages or conversation or conversations"),
        ({"prompt_name": "nonsense"}, "it has query"),
        ({"max_length": 4000}, "positions for 128 tokens"),
        ({"max_length": 4, "prompt": "find this "}, "leave no room for text"),
        ({"chunk_tokens": 100}, "takes 64 tokens at most"),
        ({"chunk_tokens": 8, "chunk_overlap": 6}, "no room for text"),
        ({"device": "cuda:9"}, "cuda:9"),
        ({"push_to_hub": "me/vectors"}, "no token"),
        ({"push_to_hub": "vectors"}, "owner/name"),
        ({"subset": "x"}, "only hub datasets have subsets"),
        ({"dataset_revision": "v1"}, "only hub datasets have revisions"),
        ({"truncate_dim": 33}, "the model's vectors have 32 dimensions"),
        ({"devices": "cpu,cpu", "backend": "vllm"}, "give --num_workers instead"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(
    embed: Callable, settings: dict, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(InputError) as caught:
        embed(**settings)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out/shard-*"))


def test_an_empty_dataset_and_one_without_texts_are_refused(embed: Callable, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(InputError, match="no rows in it"):
        embed(dataset_path=str(empty))
    with pytest.raises(InputError, match="no row with a text"):
        embed("b", dataset_path=str(write_jsonl(tmp_path / "b.jsonl", [{"text": ""}])), skip_bad_rows=True)


def test_shards_never_land_among_the_data(embed: Callable, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "rows.jsonl", make_rows(3))
    for name in ("data", "data/out"):
        with pytest.raises(InputError, match="lies in the dataset's folder"):
            embed(name, dataset_path=str(tmp_path / "data"), num_workers=2)


def test_files_of_another_split_are_not_taken_for_this_one(embed: Callable, tmp_path: Path) -> None:
    (tmp_path / "data" / "test").mkdir(parents=True)
    write_jsonl(tmp_path / "data" / "training.jsonl", make_rows(3))
    assert read(embed(dataset_path=str(tmp_path / "data"), split="train"))["split"].to_pylist() == ["train"] * 3
    write_jsonl(tmp_path / "data" / "test" / "part.jsonl", make_rows(3))
    with pytest.raises(InputError, match=r"--split train: .*test/part.jsonl is named by the split test"):
        embed("other", dataset_path=str(tmp_path / "data"), split="train")
    assert len(read(embed("all", dataset_path=str(tmp_path / "data")))) == 6


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """The folder of a hub's dataset someone/poems of 5 rows, and the environment that finds it."""
    root = tmp_path_factory.mktemp("hub")
    (root / "someone" / "poems").mkdir(parents=True)
    write_jsonl(root / "someone" / "poems" / "train.jsonl", make_rows(5))
    (root / "someone" / "poems" / "README.md").write_text("---\nlicense: mit\n---\n")
    with hub_server(root) as address:
        cache = {"TILLER_CACHE_DIR": str(root / "cache"), "HF_DATASETS_CACHE": str(root / "cache")}
        yield root / "someone" / "poems", {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", **cache}


def test_a_hub_dataset_is_that_of_a_commit(
    hub: tuple[Path, dict[str, str]], tiny_embedder: Path, tmp_path: Path, run_module: Callable
) -> None:
    words = ["--dataset_path", "hub:someone/poems", "--model_id", str(tiny_embedder), "--backend", "st",
             "--verify", "2", "--output_dir", str(tmp_path / "out")]  # fmt: skip
    done = run_module("embed_dataset", *words, "--dataset_revision", COMMIT, **hub[1])
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out")["id"].to_pylist() == [row["id"] for row in make_rows(5)]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["content"] == {"hub": "hub:someone/poems", "commit": COMMIT}
    # The hub has a newer commit now: its rows do not go beside those of the older one.
    sidecar = next((tmp_path / "out").glob("shard-*.json"))
    sidecar.write_text(sidecar.read_text().replace(COMMIT, "f" * 40))
    done = run_module("embed_dataset", *words, **hub[1])
    assert done.returncode == 2 and "content was" in done.stderr
    assert "f" * 40 in done.stderr and COMMIT in done.stderr


def test_a_model_that_gives_nan_writes_no_shard(embed: Callable, tiny_embedder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_embedder, broken)
    weights = load_file(broken / "model.safetensors")
    weights["embeddings.LayerNorm.bias"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckFailed, match=r"hold NaN or infinity, first that of row 0 \(id 'row-0'\)"):
        embed(model_id=str(broken))
    assert not list((tmp_path / "out").glob("shard-*"))


def test_vectors_too_large_for_float16_are_not_stored_as_infinity(
    embed: Callable, tiny_embedder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    large = tmp_path / "large"
    shutil.copytree(tiny_embedder, large)
    modules = json.loads((large / "modules.json").read_text())
    (large / "modules.json").write_text(json.dumps([each for each in modules if "ormalize" not in each["type"]]))
    weights = load_file(large / "model.safetensors")
    weights["encoder.layer.1.output.LayerNorm.weight"] *= 1e6
    save_file(weights, large / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckFailed, match=r"float16 vectors .* infinity, .* try --precision float32 or --normalize"):
        embed(model_id=str(large), precision="float16")
    assert np.isfinite(vectors(read(embed("scaled", model_id=str(large), precision="float16", normalize=True)))).all()
