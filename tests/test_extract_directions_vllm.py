"""Hidden states of vLLM against those of transformers, and the whole command on both."""

import gc
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from src.common.cli import parse_config
from src.common.directions_file import read_directions
from src.common.errors import InputError
from src.extract_directions import ExtractDirectionsConfig
from src.models import residuals
from src.models.language_model import LanguageModel
from src.models.residual_store import ResidualStore, read_manifest, read_shards
from src.models.token_sequences import TokenSequence
from tests.conftest import ROOT
from tests.vllm_parity import chunks_of

vllm = pytest.mark.vllm
slow = pytest.mark.slow
MIN_COSINE = 0.99999
MAX_RELATIVE = 2e-3
"""Of a row's norm; rounding grows from layer to layer."""
POSITIONS = ["last_prompt", "token:-1", "token:-3", "mean_prompt", "mean_response", "all"]
HOOK_POINTS = ["resid_pre", "resid_post", "attn_out", "mlp_out"]
LAYERS = (29, 0, 14)
TEXT = (
    "The baker rose before the sun did, and sang while the dough was rising, so that all the neighbours knew what "
    "bread there would be. In winter he sang of summer, and in summer of the sea, which he had never seen."
)
TOPICS = ["rain", "bread", "music", "ships", "glass", "trees", "clocks", "maps", "salt", "wool", "ink", "bells"]
Rows = dict[str, Tensor]


@pytest.fixture(scope="module")
def sequences(hf: LanguageModel) -> list[TokenSequence]:
    """12 of 6 to 120 tokens, some with a text span, the last two equal but for their ids."""
    draw = random.Random(0)
    ids = tuple(hf.tokenizer(TEXT).input_ids)
    made = []
    for i in range(11):
        prompt, response = draw.randrange(5, 100), draw.randrange(1, 20)
        start = draw.randrange(len(ids))
        tokens = (ids[start:] + ids * 4)[: prompt + response]
        span = (1, prompt - 2) if i % 2 else None
        made.append(TokenSequence(id=f"side:{i}", token_ids=tokens, prompt_length=prompt, text_span=span))
    last = made[-1]
    again = TokenSequence(
        id="side:again", token_ids=last.token_ids, prompt_length=last.prompt_length, text_span=last.text_span
    )
    return [*made, again]


def extracted(extract: Callable[..., None], model: object, sequences: object, **settings: object) -> Rows:
    """Rows by id, (rows of the sequence, layers, d_model)."""
    found: Rows = {}

    def keep(ids: tuple[str, ...], rows: Tensor) -> None:
        assert rows.dtype == torch.float32 and rows.device.type == "cpu"
        parts = [rows] if settings["position"] == "all" else rows.split(1)
        for i, part in zip(ids, parts, strict=True):
            assert i not in found
            found[i] = part

    extract(model, sequences, on_rows=keep, **settings)
    return found


def by_vllm(engine: object, sequences: object, **settings: object) -> Rows:
    from src.models import vllm_residuals

    return extracted(vllm_residuals.extract, engine, sequences, **settings)


def assert_same(found: Rows, expected: Rows) -> None:
    assert found.keys() == expected.keys()
    for i, rows in expected.items():
        assert found[i].shape == rows.shape, i
        cosine = torch.cosine_similarity(found[i], rows, dim=-1).min().item()
        relative = ((found[i] - rows).norm(dim=-1) / rows.norm(dim=-1)).max().item()
        assert cosine >= MIN_COSINE and relative <= MAX_RELATIVE, (i, cosine, relative)


def assert_nothing_held(engine) -> None:
    gc.collect()
    (counts,) = engine._engine.collective_rpc("tiller_state")
    assert counts["captures"] == 0 and engine._states.captures.budget.in_flight == 0
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"tiller-{os.getpid()}-")]


@vllm
@slow
@pytest.mark.parametrize("position", POSITIONS)
def test_rows_are_those_of_transformers(vllm_engine, hf, sequences, position: str) -> None:
    settings = {"layers": LAYERS, "position": position}
    expected = extracted(residuals.extract, hf, sequences, **settings)
    assert_same(by_vllm(vllm_engine, sequences, **settings), expected)
    # Now the prompts are in the prefix cache, and most are cut over several steps.
    with chunks_of(vllm_engine, 37):
        assert_same(by_vllm(vllm_engine, sequences, **settings), expected)
    assert_nothing_held(vllm_engine)


@vllm
@slow
@pytest.mark.parametrize("hook_point", HOOK_POINTS)
def test_every_hook_point_is_read(vllm_engine, hf, sequences, hook_point: str) -> None:
    settings = {"layers": LAYERS, "position": "mean_prompt", "hook_point": hook_point}
    assert_same(by_vllm(vllm_engine, sequences, **settings), extracted(residuals.extract, hf, sequences, **settings))


@vllm
@slow
def test_sequences_of_a_generator_are_run_window_by_window_and_only_as_far_as_they_are_read(
    vllm_engine, hf, sequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    from src.models import vllm_residuals

    scheduler = vllm_engine._engine.vllm_config.scheduler_config
    monkeypatch.setattr(vllm_residuals, "BATCHES_HELD", 150 / scheduler.max_num_batched_tokens)
    pulled, given, n_tokens = [], [], []

    def some() -> Iterator[TokenSequence]:
        for sequence in sequences:
            pulled.append((sequence.id, len(given)))
            yield sequence

    vllm_residuals.extract(
        vllm_engine, some(), layers=[3], position="last_prompt", on_rows=lambda ids, rows: given.extend(ids),
        on_tokens=n_tokens.append,
    )  # fmt: skip
    assert sorted(given) == sorted(s.id for s in sequences) and pulled[-1][1] > 0
    assert sum(n_tokens) == sum(s.prompt_length for s in sequences)


@vllm
@slow
def test_what_was_read_is_freed_before_more_is_kept(vllm_engine, sequences) -> None:
    budget, d_model = vllm_engine._states.captures.budget, vllm_engine.d_model
    longest = max(len(s.token_ids) for s in sequences)
    most, plain = 0, budget.limit_bytes
    kept: list[Tensor] = []

    def note(ids: tuple[str, ...], rows: Tensor) -> None:
        nonlocal most
        most = max(most, budget.in_flight)
        kept.append(rows)

    from src.models import vllm_residuals

    try:
        # Room for one sequence, and the token that is generated, which is reckoned with.
        budget.limit_bytes = 2 * (longest + 1) * d_model * 4
        vllm_residuals.extract(vllm_engine, sequences, layers=[0, 29], position="all", on_rows=note)
        assert len(kept) == len(sequences) and 0 < most <= budget.limit_bytes
    finally:
        budget.limit_bytes = plain
    assert_nothing_held(vllm_engine)


@vllm
@slow
def test_a_client_that_fails_leaves_nothing(vllm_engine, sequences) -> None:
    from src.models import vllm_residuals

    def fail(ids: tuple[str, ...], rows: Tensor) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        vllm_residuals.extract(vllm_engine, sequences, layers=LAYERS, position="all", on_rows=fail)
    assert_nothing_held(vllm_engine)
    assert by_vllm(vllm_engine, sequences, layers=[0], position="last_prompt").keys() == {s.id for s in sequences}


@vllm
@slow
def test_hidden_states_that_are_not_finite_are_refused(vllm_engine, sequences) -> None:
    from src.models.architectures import decoder_layers

    net = vllm_engine._engine.model_executor.driver_worker.worker.model_runner.get_model()
    handle = decoder_layers(net)[5].mlp.register_forward_hook(lambda module, args, output: output.fill_(torch.inf))
    try:
        with pytest.raises(InputError, match=r"'side:\d+'.* float32"):
            by_vllm(vllm_engine, sequences, layers=[7], position="mean_prompt")
    finally:
        handle.remove()
        vllm_engine._engine.reset_prefix_cache()
    assert_nothing_held(vllm_engine)


@vllm
@slow
def test_what_cannot_be_read_is_refused_before_anything_runs(
    vllm_engine, sequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad(n: int, response: int = 0, **fields: object) -> TokenSequence:
        return TokenSequence(**({"id": "x", "token_ids": (5,) * (n + response), "prompt_length": n} | fields))

    ran = []
    with monkeypatch.context() as patch:
        patch.setattr(vllm_engine, "add", lambda *_: ran.append(1))
        for extra, settings, words in [
            (bad(3), {"layers": [30]}, "layer 30: .*layers 0 to 29"),
            (bad(3), {"layers": []}, r"layers \[\]: .*0 to 29"),
            (bad(3), {"hook_point": "resid"}, "hook point 'resid'"),
            (bad(3), {"position": "last"}, "token position 'last'"),
            (bad(3), {"position": "token:-4"}, "'x': its prompt has 3 tokens"),
            (bad(3), {"position": "mean_response"}, "'x' has no response token"),
            (bad(3, token_ids=(5, 6, 49152)), {}, "'x'.*49152; expected 0 to 49151"),
            (bad(3, id=sequences[0].id), {}, f"'{sequences[0].id}' is there twice"),
            (bad(1024), {}, "'x' has 1024 tokens to run and vLLM.*takes 1023 in a context of 1024; take --backend hf"),
        ]:
            with pytest.raises(InputError, match=words):
                by_vllm(vllm_engine, [*sequences, extra], **({"layers": [0], "position": "last_prompt"} | settings))
        patch.setattr(vllm_engine, "no_steering", "of some reason")
        with pytest.raises(InputError, match="keeps no hidden states: of some reason"):
            by_vllm(vllm_engine, sequences, layers=[0], position="last_prompt")
    assert not ran
    # A response that is not read does not count.
    rows = by_vllm(vllm_engine, [bad(1023, response=50)], layers=[0], position="last_prompt")
    assert rows["x"].shape == (1, 1, 576)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, small_folder: Path) -> Callable[..., list[str]]:
    """Arguments of the command: 12 prompts a side."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, text in (("target", "Please tell me all about {}."), ("control", "{}: what is it?")):
        rows = [json.dumps({"id": t, "prompt": text.format(t)}) for t in TOPICS]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))

    def arguments(output_dir: Path, backend: str, *more: str) -> list[str]:
        return [
            "--positive_path", f"{folder}/target.jsonl", "--negative_path", f"{folder}/control.jsonl",
            "--model_id", str(small_folder), "--dtype", "float32", "--device", "cpu", "--backend", backend,
            "--token_position", "mean_prompt", "--output_dir", str(output_dir), *more,
        ]  # fmt: skip

    return arguments


def directions_of(folder: Path) -> np.ndarray:
    """(layers, d_model)."""
    return read_directions(folder / "directions.safetensors").directions[:, 0]


@pytest.fixture(scope="module")
def by_transformers(words: Callable, tmp_path_factory: pytest.TempPathFactory, run_module: Callable) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "hf"
    done = run_module("extract_directions", *words(folder, "hf"))
    assert done.returncode == 0 and "Hidden states of transformers (asked for)" in done.stderr, done.stderr
    return folder


@vllm
@slow
def test_the_command_makes_the_same_directions_on_both(
    words: Callable, by_transformers: Path, tmp_path: Path, run_module: Callable
) -> None:
    folder = tmp_path / "vllm"
    # A start that fails leaves the folder free for other settings.
    failed = run_module("extract_directions", *words(folder, "vllm", "--kv_cache_gib", "100000"))
    assert failed.returncode == 2 and "--kv_cache_gib" in failed.stderr and not (folder / "residuals").exists()
    done = run_module(
        "extract_directions", *words(folder, "vllm", "--kv_cache_gib", "0.25", "--tokens_per_batch", "100")
    )
    assert done.returncode == 0, done.stderr
    assert "Hidden states of vLLM (asked for)" in done.stderr and "WARNING" not in done.stderr
    cosines = np.abs((directions_of(folder) * directions_of(by_transformers)).sum(axis=1))
    assert cosines.min() >= 0.9999, cosines
    assert read_manifest(folder / "residuals")["settings"]["backend"] == "vllm"
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["backend"] == "vllm" and provenance["sessions"][-1]["runner"] == "v1"
    assert "--backend vllm" in next(line for line in done.stdout.split("\n") if line.startswith("next: "))
    other = run_module("extract_directions", *words(folder, "hf"))
    assert other.returncode == 2 and 'backend was "vllm", is now "hf"' in other.stderr
    again = run_module("extract_directions", *words(folder, "vllm"))
    assert again.returncode == 0 and "Starting vLLM" not in again.stderr, "all rows are there"


def main_that_is_killed(arguments: list[str]) -> None:
    """The command in this process, killed when the second of its small shards is written."""
    from src import extract_directions
    from src.directions import extraction

    class Store(ResidualStore):
        def __init__(self, folder: Path, settings: dict) -> None:
            super().__init__(folder, settings, bytes_per_shard=5 * 2 * 32 * 4)

        def flush(self) -> None:
            super().flush()
            if len(list(self.folder.glob("shard-*"))) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    extraction.ResidualStore = Store
    extract_directions.main(parse_config(ExtractDirectionsConfig, arguments))


@vllm
@slow
def test_what_was_read_before_a_kill_is_kept(
    words: Callable, by_transformers: Path, tmp_path: Path, run_module: Callable
) -> None:
    arguments = words(tmp_path / "run", "vllm", "--kv_cache_gib", "0.25")
    script = (
        "import sys; from tests.test_extract_directions_vllm import main_that_is_killed; "
        "main_that_is_killed(sys.argv[1:])"
    )
    killed = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    store = tmp_path / "run" / "residuals"
    before = {path.name: path.read_bytes() for path in store.glob("shard-*")}
    assert len(before) == 2 and not (store / "manifest.json").exists()
    resumed = run_module("extract_directions", *arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert {name: (store / name).read_bytes() for name in before} == before
    ids = [i for shard in read_shards(store) for i in shard.ids]
    assert len(ids) == len(set(ids)) == 24 and [s["n_rows"] for s in read_manifest(store)["shards"]] == [5, 5, 14]
    cosines = np.abs((directions_of(tmp_path / "run") * directions_of(by_transformers)).sum(axis=1))
    assert cosines.min() >= 0.9999, cosines


def test_flags_that_do_not_go_together_are_refused_without_a_model(
    words: Callable, tmp_path: Path, run_module: Callable
) -> None:
    for more, expected in [
        (["--backend", "vllm", "--compiled"], "--compiled: a compiled model keeps no hidden states"),
        (["--backend", "hf", "--enforce_eager"], "--enforce_eager: only vLLM has that"),
        (["--backend", "vlm"], "vllm"),
        (["--tokens_per_batch", "0"], "--tokens_per_batch 0: expected at least 1"),
        (["--max_model_len", "9999", "--backend", "hf"], "--max_model_len 9999: the model's context is 512"),
    ]:
        done = run_module("extract_directions", *words(tmp_path / "out", "auto", *more))
        assert done.returncode == 2 and expected in done.stderr, (more, done.stderr)
        assert not (tmp_path / "out" / "residuals").exists()
