"""`--compile`: compiled norms give the same numbers, are compiled once, and are gone when the search is over."""

import gc
import json
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from src.abliteration.edits import EditMaker
from src.abliteration.forcing import checked_lower, kept_layers
from src.abliteration.storage import open_storage
from src.abliteration.study import rows_there
from src.common.errors import InputError
from src.models import compiling
from src.models.compiling import compiled_norms
from src.models.language_model import LanguageModel, generate_all
from src.models.types import GenerationRequest
from src.models.weight_editor import editing
from tests.test_abliterate import directions_in, run_here, words
from tests.test_abliteration_forcing import found_logits, made_groups, sequences
from tests.tiny_models import tiny_model

WIDTHS = {"llama": 1, "qwen3": 2, "gemma3": 2, "qwen3_moe": 2}
"""Widths of norms: the residual stream's, and that of a head."""
GRAPHS_PER_WIDTH = 4
SHAPES = ((2, 3), (1, 1), (1, 6), (9, 1), (4, 13))
N_TRIALS = "5"


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def tokenizer(bundled_folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(bundled_folder)


def n_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def is_plain(model: torch.nn.Module) -> bool:
    return all(module._compiled_call_impl is None for module in model.modules())


def all_logits(model: LanguageModel, made: tuple[EditMaker, list[list[dict]]]) -> list[Tensor]:
    """What a search makes of a model: batches of many shapes, under trials that change, with caches, in part."""
    maker, groups = made
    draws = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 400, shape, generator=draws) for shape in SHAPES]
    kept = kept_layers(model, sequences())
    plain = found_logits(model, maker, [{}], keep=kept)
    lower = checked_lower(model, sequences(), kept, [plain[0, i].log_softmax(-1) for i in range(len(plain))])
    found = list(plain.values())
    with torch.inference_mode():
        for group in groups:
            found += found_logits(model, maker, group).values()
            found += found_logits(model, maker, group, lower=lower).values()
            with editing(model.model, maker.writers, group[:1]):
                found += [model.model(input_ids=each).logits for each in ids]
                started = model.model(input_ids=ids[-1], use_cache=True)
                step = model.model(input_ids=ids[-1][:, :1], past_key_values=started.past_key_values)
                found += [started.logits, step.logits]
    return found


def answers(model: LanguageModel) -> list[tuple[int, ...]]:
    requests = [GenerationRequest(id=f"{n}", token_ids=tuple(range(60, 60 + n)), max_tokens=n) for n in range(1, 6)]
    return [each.token_ids for each in generate_all(model, requests, batch_size=3)]


@pytest.mark.parametrize("architecture", sorted(WIDTHS))
def test_compiled_norms_give_the_same_and_are_compiled_once(architecture: str, tokenizer) -> None:
    model = LanguageModel(tiny_model(architecture), tokenizer)
    # Edits are made before anything is compiled, as the command does: what is behind writers is found by hooks.
    made = made_groups(model, architecture, reach=0.5)
    before, texts = all_logits(model, made), answers(model)
    with compiled_norms(model.model) as n_norms:
        n_at_start = n_graphs()
        assert n_norms >= 5 and 0 < n_at_start <= GRAPHS_PER_WIDTH * WIDTHS[architecture]
        for one, other in zip(all_logits(model, made), before, strict=True):
            assert torch.allclose(one, other, atol=1e-5, rtol=0)
        assert answers(model) == texts
        assert n_graphs() == n_at_start
    assert is_plain(model.model)
    for one, other in zip(all_logits(model, made), before, strict=True):
        assert torch.equal(one, other)


def test_short_formats_are_rounded_where_the_plain_norms_round() -> None:
    """The edited model is saved with plain norms, and is to be what was measured."""
    for architecture in ("llama", "gemma3"):
        model = tiny_model(architecture).to(torch.bfloat16)
        x = torch.randn(50, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
        norm = model.model.norm
        with torch.inference_mode():
            norm.weight.normal_(1.0, 0.3, generator=torch.Generator().manual_seed(1))
            plain = norm(x)
            with compiled_norms(model):
                assert norm._compiled_call_impl is not None
                assert (norm(x) != plain).float().mean() < 0.01


def test_norms_are_plain_again_after_an_error_too_and_hold_no_model() -> None:
    model = tiny_model("llama")
    with pytest.raises(KeyError), compiled_norms(model):
        raise KeyError
    assert is_plain(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_more_versions_than_are_allowed_are_no_silent_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [getattr(torch._dynamo.config, name) for name in ("recompile_limit", "fail_on_recompile_limit_hit")]
    monkeypatch.setattr(compiling, "MOST_GRAPHS", 2)
    model = tiny_model("llama")
    with pytest.raises(FailOnRecompileLimitHit), compiled_norms(model):
        pass
    assert is_plain(model)
    assert limits == [
        getattr(torch._dynamo.config, name) for name in ("recompile_limit", "fail_on_recompile_limit_hit")
    ]


def test_a_model_without_composed_norms_is_refused() -> None:
    for architecture in ("gpt2", "opt", "gpt_neox"):
        with (
            pytest.raises(InputError, match=f"{architecture} models.*nothing to compile"),
            compiled_norms(tiny_model(architecture)),
        ):
            pass


@pytest.fixture(scope="module")
def uncompiled(organism, prompts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "plain"
    run_here(words(organism, prompts, folder, "--n_trials", N_TRIALS))
    return folder


def trials_of(folder: Path) -> list[dict]:
    """Not those of trials.jsonl, which are rounded."""
    return rows_there(open_storage(None, folder, 120.0, is_own=False), "abliteration")


def same_means(folder: Path, other: Path) -> None:
    """As they are written: to four digits."""
    found, expected = (json.loads((each / "evaluation.json").read_text()) for each in (folder, other))
    for when in ("before", "after"):
        assert found[when].keys() == expected[when].keys()
        for name, value in found[when].items():
            assert value["mean"] == pytest.approx(expected[when][name]["mean"], rel=1e-3, abs=1e-6), name


def test_a_compiled_search_finds_what_a_plain_one_does(organism, prompts, uncompiled, tmp_path) -> None:
    more = ("--n_trials", N_TRIALS, "--compile", "true", *directions_in(uncompiled))
    run_here(words(organism, prompts, tmp_path / "r", *more))
    assert json.loads((tmp_path / "r" / "config.json").read_text())["config"]["compile"] is True
    assert n_graphs()
    rows, plain = trials_of(tmp_path / "r"), trials_of(uncompiled)
    assert len(rows) == len(plain) == int(N_TRIALS)
    for row, other in zip(rows, plain, strict=True):
        for name in ("params", "stage", "behaviour", "n_behaviour"):
            assert row[name] == other[name], name
        for name in ("kl", "kl_first"):
            assert row[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6)
    same_means(tmp_path / "r", uncompiled)


def test_two_models_are_compared_compiled(organism, prompts, uncompiled, tmp_path) -> None:
    both = ("--evaluate_only", "--edited_model_id", str(uncompiled / "model"), "--save", "none")
    run_here(words(organism, prompts, tmp_path / "plain", *both))
    assert not n_graphs()
    run_here(words(organism, prompts, tmp_path / "compiled", *both, "--compile", "true"))
    assert n_graphs()
    same_means(tmp_path / "compiled", tmp_path / "plain")


def test_without_a_compiler_the_command_says_so(organism, prompts, uncompiled, tmp_path, run_module: Callable) -> None:
    more = ("--n_trials", N_TRIALS, "--compile", "true", *directions_in(uncompiled))
    done = run_module(
        "abliterate", *words(organism, prompts, tmp_path / "r", *more),
        CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 2
    assert re.search(r"--compile: .*install a C\+\+ compiler .*leave the flag out", done.stderr), done.stderr[-2000:]
    assert "Traceback" not in done.stderr and not (tmp_path / "r" / "trials.jsonl").exists()
