"""One edit as a hook, in the weights, and as a LoRA, on every kind of writer."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from src.abliteration.edits import EditMaker, EditOptions
from src.abliteration.kernel import Kernel, Plan, plan_of
from src.common.directions_file import Directions, DirectionsMetadata
from src.common.errors import InputError
from src.models.edit_adapter import write_adapter
from src.models.loading import attach_adapter, with_adapter
from src.models.residual_writers import matrix, residual_writers
from src.models.weight_editor import bake, editing
from src.ops.weight_edits import NORMS, edited
from tests.tiny_adapters import write_adapter as random_adapter
from tests.tiny_layouts import layout
from tests.tiny_models import tiny_model

NAMES = ("llama", "qwen3", "gemma3", "mixtral", "qwen3_moe", "gpt2")
IDS = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(0))


def directions_of(model: nn.Module, k: int = 1, seed: int = 0) -> Directions:
    config = model.config.get_text_config(decoder=True)
    shape = (config.num_hidden_layers, config.hidden_size, k)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    vectors = torch.linalg.qr(drawn).Q.mT.contiguous()
    about = {"model_id": "m", "model_fingerprint": "f", "hook_point": "resid_post", "token_position": "last_prompt"}
    return Directions(
        directions=vectors.numpy(), layers_present=tuple(range(shape[0])),
        metadata=DirectionsMetadata(**about, method="mean_difference"),
    )  # fmt: skip


def plan(source: str = "one", **fields: float) -> Plan:
    kernels = {
        name: Kernel(**{"high": 0.8, "position": 0.5, "low": 0.5, "reach": 3.0} | fields) for name in ("attn", "mlp")
    }
    return Plan(source=source, source_layer=0.4, kernels=kernels)


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NAMES)
def test_hooks_do_what_the_edited_weights_do_and_leave_nothing(name: str, norm: str) -> None:
    model = tiny_model(name)
    before = logits(model)
    maker = EditMaker(model, directions_of(model, k=2), EditOptions(norm=norm))
    edits = maker.edits(plan())
    with editing(model, maker.writers, [edits]):
        hooked = logits(model)
    assert torch.equal(logits(model), before)
    baked = copy.deepcopy(model)
    bake(baked, edits)
    assert (logits(baked) - hooked).abs().max() < 1e-5 < (hooked - before).abs().max()
    for placed in residual_writers(baked):
        weight = next(each for each in maker.writers if each.name == placed.name).writer
        assert torch.allclose(matrix(placed.writer), edited(matrix(weight), edits[placed.name]), atol=1e-6)


def test_the_bundled_model_is_edited_alike_in_every_form(bundled_folder: Path, tmp_path: Path) -> None:
    """Hook, weights and LoRA over thirty layers: rounding adds up, and no more."""
    model = AutoModelForCausalLM.from_pretrained(bundled_folder, dtype=torch.float32).eval()
    ids = torch.randint(0, 1000, (2, 12), generator=torch.Generator().manual_seed(0))
    run = lambda net: torch.inference_mode()(net)(ids).logits  # noqa: E731
    directions, wide = directions_of(model), {"position": 0.5, "reach": 20.0}
    before = run(model)
    for norm in NORMS:
        maker = EditMaker(model, directions, EditOptions(norm=norm))
        edits = maker.edits(plan(**wide))
        assert len(edits) > 40
        with editing(model, maker.writers, [edits]):
            hooked = run(model)
        baked = copy.deepcopy(model)
        bake(baked, edits)
        assert (run(baked) - hooked).abs().max() < 2e-4 < (hooked - before).abs().max()
    edits = EditMaker(model, directions, EditOptions()).edits(plan(**wide))
    write_adapter(tmp_path, model, "base", edits)
    with editing(model, residual_writers(model), [edits]):
        hooked = run(model)
    assert torch.equal(run(model), before)
    assert (run(with_adapter(copy.deepcopy(model), tmp_path)) - hooked).abs().max() < 2e-4


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
def test_an_edit_that_keeps_no_lengths_is_a_lora(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    maker = EditMaker(model, directions_of(model), EditOptions())
    edits = maker.edits(plan())
    with editing(model, maker.writers, [edits]):
        hooked = logits(model)
    write_adapter(tmp_path, model, "base", edits)
    adapted = with_adapter(tiny_model(name), tmp_path)
    with torch.inference_mode():
        assert (adapted(IDS).logits - hooked).abs().max() < 1e-5


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_an_adapter_adds_is_edited_along(name: str, norm: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "base")
    random_adapter(tmp_path / "base", tmp_path / "adapter")
    adapted = attach_adapter(tiny_model(name), tmp_path / "adapter")
    merged = with_adapter(tiny_model(name), tmp_path / "adapter").merge_and_unload()
    found = []
    for each in (adapted, merged):
        maker = EditMaker(each, directions_of(each), EditOptions(norm=norm))
        edits = maker.edits(plan())
        with editing(each, maker.writers, [edits]):
            found.append(logits(each))
    assert (logits(adapted) - logits(model)).abs().max() > 1e-2, "the adapter does nothing"
    assert (found[0] - found[1]).abs().max() < 1e-5 < (found[0] - logits(adapted)).abs().max()


def test_an_adapter_that_does_more_than_add_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    random_adapter(tmp_path / "base", tmp_path / "adapter", use_dora=True)
    maker = EditMaker(attach_adapter(model, tmp_path / "adapter"), directions_of(model), EditOptions())
    with pytest.raises(InputError, match="merge it into the model first"):
        maker.edits(plan())


def test_a_lora_is_refused_where_the_edit_is_none(tmp_path: Path) -> None:
    for name, options in (("llama", EditOptions(norm="column")), ("mixtral", EditOptions())):
        model = tiny_model(name)
        edits = EditMaker(model, directions_of(model), options).edits(plan())
        with pytest.raises(InputError, match="take --save model"):
            write_adapter(tmp_path, model, "base", edits)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_rows_of_several_trials_are_each_under_their_own(name: str, norm: str) -> None:
    model = tiny_model(name)
    maker = EditMaker(model, directions_of(model), EditOptions(norm=norm))
    trials = [maker.edits(plan()), {}, maker.edits(plan("own", position=0.0, reach=0.5))]
    alone = []
    for trial in trials:
        with editing(model, maker.writers, [trial]):
            alone.append(logits(model))
    with editing(model, maker.writers, trials) as rows:
        rows.rows = [2, 0, 1]
        together = logits(model)
        rows.rows = [1, 1]
        with pytest.raises(RuntimeError, match="3 rows"):
            logits(model)
    for row, trial in enumerate([2, 0, 1]):
        assert (together[row] - alone[trial][row]).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "opt"])
def test_several_trials_are_refused_where_rows_are_not_apart(name: str) -> None:
    model = tiny_model(name)
    maker = EditMaker(model, directions_of(model), EditOptions())
    with (
        pytest.raises(InputError, match="--trials_per_batch 1"),
        editing(model, maker.writers, [{}, maker.edits(plan())]) as rows,
    ):
        rows.rows = [0, 1, 0]
        logits(model)
    before = logits(tiny_model(name))
    assert torch.equal(logits(model), before)


def test_an_edit_that_does_not_run_raises() -> None:
    model = tiny_model("llama")
    maker = EditMaker(model, directions_of(model), EditOptions())
    with pytest.raises(RuntimeError, match="did not act"), editing(model, maker.writers, [maker.edits(plan())]):
        model.model.layers = model.model.layers[:1]
        logits(model)


def test_only_the_heads_asked_for_are_edited() -> None:
    model = tiny_model("qwen3")
    n_heads = model.config.num_attention_heads
    maker = EditMaker(model, directions_of(model), EditOptions(heads={1: (0, 2)}))
    edits = maker.edits(plan())
    assert {each.name for each in maker.writers if each.component == "attn"} & edits.keys() == {"1.self_attn.o_proj"}
    weight = model.model.layers[1].self_attn.o_proj.weight
    changed = (edited(weight.detach(), edits["1.self_attn.o_proj"]) != weight).any(dim=0).view(n_heads, -1)
    assert changed.all(dim=1).nonzero().flatten().tolist() == [0, 2] and changed.sum() == 2 * changed.shape[1]
    with pytest.raises(InputError, match=r"--heads: layer 1 has heads 0 to 3, and \[9\]"):
        EditMaker(model, directions_of(model), EditOptions(heads={1: (9,)}))


def test_linear_attention_has_heads_of_its_own() -> None:
    model = layout("qwen3_next")
    maker = EditMaker(model, directions_of(model), EditOptions(heads={0: (1, 7), 1: (3,)}))
    edits = maker.edits(plan())
    for name, n_heads, heads in (("0.linear_attn.out_proj", 8, [1, 7]), ("1.self_attn.o_proj", 4, [3])):
        masked = (edits[name].a != 0).any(dim=0).view(n_heads, 8)
        assert masked.all(dim=1).nonzero().flatten().tolist() == heads and masked.sum() == 8 * len(heads)


@pytest.mark.parametrize(
    "name, heads, words",
    [
        ("llama", {17: (0,)}, "layer 17: the model's layers are 0 to 1"),
        ("qwen3_next", {0: (8,)}, r"layer 0 has heads 0 to 7, and \[8\]"),
        ("falcon_h1", {1: (0,)}, "layer 1 has 2 parts that mix tokens"),
        ("lfm2", {0: (0,)}, "layer 0 has Lfm2ShortConv, whose 32 outputs are of no heads"),
        ("mamba", {0: (0,)}, "layer 0 has MambaMixer"),
    ],
)
def test_heads_that_are_not_there_are_refused(name: str, heads: dict, words: str) -> None:
    model = layout(name)
    with pytest.raises(InputError, match=f"--heads: {words}"):
        EditMaker(model, directions_of(model), EditOptions(heads=heads))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "bloom", "falcon", "deepseek_v3", "gemma4", "mamba2"])
def test_heads_are_known_by_many_names(name: str) -> None:
    model = layout(name)
    maker = EditMaker(model, directions_of(model), EditOptions(components=("attn",), heads={1: (3,)}))
    masked = next(iter(maker.edits(plan()).values())).a != 0
    assert masked.any(dim=0).sum() * (8 if name == "mamba2" else 4) == masked.shape[1]


def test_what_is_added_is_a_bias_in_the_weights() -> None:
    model = tiny_model("llama")
    vector = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    maker = EditMaker(model, directions_of(model), EditOptions(added={1: vector}))
    edits = maker.edits(plan(high=0.0))
    assert set(edits) == {"1.mlp.down_proj"}
    before = logits(model)
    with editing(model, maker.writers, [edits]):
        hooked = logits(model)
    bake(model, edits)
    assert model.config.mlp_bias and (logits(model) - hooked).abs().max() < 1e-5 < (hooked - before).abs().max()
    other = tiny_model("qwen3")
    with pytest.raises(InputError, match="no bias there"):
        bake(other, EditMaker(other, directions_of(other), EditOptions(added={0: vector})).edits(plan(high=0.0)))


def test_the_sign_of_a_direction_makes_no_difference() -> None:
    model = tiny_model("llama")
    found = directions_of(model, k=2)
    turned = replace(found, directions=found.directions * np.array([1, -1], dtype=np.float32)[:, None, None])
    between = Plan(source="one", source_layer=0.4, kernels=plan().kernels)
    one, other = (EditMaker(model, each, EditOptions()).edits(between) for each in (found, turned))
    for name, edit in one.items():
        assert torch.allclose(edit.u @ edit.a, other[name].u @ other[name].a, atol=1e-6)


def test_calibration_multiplies_each_layers_weight() -> None:
    model = tiny_model("llama")
    maker = EditMaker(model, directions_of(model), EditOptions(calibration=[0.5, 0.0]))
    plain = EditMaker(model, directions_of(model), EditOptions())
    half = plan(high=0.4)
    assert {name.split(".")[0] for name in maker.edits(plan())} == {"0"}
    expected = plain.edits(half)
    for name, edit in maker.edits(plan()).items():
        assert torch.allclose(edit.u, expected[name].u, atol=1e-7)


def test_weights_that_two_layers_share_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    with pytest.raises(InputError, match="are one weight"):
        residual_writers(model)


def test_integers_are_refused_and_missing_directions_too() -> None:
    model = tiny_model("llama")
    found = directions_of(model)
    placed = residual_writers(model)[0]
    placed.writer.module.weight = nn.Parameter(placed.writer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"stored as torch\.int8"):
        matrix(placed.writer)
    vectors = found.directions.copy()
    vectors[1] = 0
    lacking = Directions(directions=vectors, layers_present=(0,), metadata=found.metadata)
    with pytest.raises(InputError, match="no directions of layer 1; extract them with --layers all"):
        EditMaker(tiny_model("llama"), lacking, EditOptions())


def test_a_plan_is_what_its_parameters_make() -> None:
    one = plan()
    assert plan_of(one.as_params()) == one
    assert one.weight("attn", 0) == pytest.approx(0.8 * (1 - 0.5 / 3 * 0.5)) and one.weight("attn", 4) == 0
    assert one.sources(7) == pytest.approx({0: 0.6, 1: 0.4}) and plan("own").sources(7) == {7: 1.0}
