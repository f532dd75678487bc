"""Every writer of every layout is found, edits reach the stream exactly, and what is not known is refused."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from src.abliterate import AbliterateConfig
from src.abliteration.edits import EditMaker, EditOptions
from src.abliteration.kernel import Kernel, Plan
from src.abliteration.preparation import refuse_inexact
from src.common.cli import parse_config
from src.common.errors import InputError
from src.models.added_biases import refuse_bias
from src.models.hooks import reading, replacing
from src.models.post_norms import gains_behind
from src.models.residual_writers import residual_writers
from src.models.weight_editor import bake, editing
from src.models.writer_check import refuse_changed_additions, refuse_partial
from src.ops.weight_edits import NORMS
from tests.test_weight_editor import directions_of
from tests.tiny_layouts import REFUSED, WRITABLE, layout

IDS = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))
POST_NORMED = ("gemma2", "gemma3", "gemma4", "gemma4_per_layer_inputs", "gemma4_experts", "olmo2", "olmo3", "glm4",
               "exaone4")  # fmt: skip
WITH_BIASES = ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "phi", "starcoder2", "gpt_oss")
WHOLE = {name: Kernel(high=1.0, position=0.0, low=1.0, reach=9) for name in ("attn", "mlp")}


def written(model: nn.Module, v: Tensor) -> list[float]:
    """Of each layer the largest |v·Δ| / |Δ| of what it adds to the stream; v (d_model, k)."""
    before, after = {}, {}
    layers = range(model.config.num_hidden_layers)
    keep = lambda of, layer: lambda hidden: of.__setitem__(layer, hidden.clone())  # noqa: E731
    with (
        torch.inference_mode(),
        reading(model, {(i, "resid_pre"): keep(before, i) for i in layers}),
        reading(model, {(i, "resid_post"): keep(after, i) for i in layers}),
    ):
        model(IDS, use_cache=False)
    added = [after[i] - before[i] for i in layers]
    return [((each @ v).norm(dim=-1) / each.norm(dim=-1)).max().item() for each in added]


@pytest.mark.parametrize("name", sorted(WRITABLE))
def test_an_edit_of_weight_1_takes_the_directions_from_what_every_layer_adds(name: str) -> None:
    """By hooks and in the weights alike, whatever the gains of norms between a writer and the stream."""
    model = layout(name)
    with torch.no_grad():
        # No edit changes what a writer adds whatever its input.
        for each in residual_writers(model):
            for part in ("bias", "down_proj_bias"):
                if isinstance(getattr(each.writer.module, part, None), nn.Parameter):
                    getattr(each.writer.module, part).zero_()
    directions = directions_of(model, k=2)
    maker = EditMaker(model, directions, EditOptions())
    edits = maker.edits(Plan(source="one", source_layer=0.0, kernels=WHOLE))
    v = torch.from_numpy(directions.directions[0]).mT
    assert min(written(model, v)) > 0.05
    with editing(model, maker.writers, [edits]):
        assert max(written(model, v)) < 1e-5
    baked = copy.deepcopy(model)
    bake(baked, edits)
    assert max(written(baked, v)) < 1e-5
    refuse_partial(model, maker.writers, maker.gains)


@pytest.mark.parametrize("name", ["gemma3", "gemma4_experts", "glm4"])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_behind_writers_and_lengths_that_are_kept(name: str, norm: str) -> None:
    """Columns are turned out of the direction, and hooks do what the weights do."""
    model = layout(name)
    directions = directions_of(model)
    maker = EditMaker(model, directions, EditOptions(norm=norm))
    edits = maker.edits(Plan(source="one", source_layer=0.0, kernels=WHOLE))
    with editing(model, maker.writers, [edits]), torch.inference_mode():
        hooked = model(IDS, use_cache=False).logits
    bake(model, edits)
    with torch.inference_mode():
        assert (model(IDS, use_cache=False).logits - hooked).abs().max() < 1e-4
    if norm != "row":
        assert max(written(model, torch.from_numpy(directions.directions[0]).mT)) < 1e-5


@pytest.mark.parametrize("name", WITH_BIASES)
def test_biases_of_writers_are_no_reason_to_refuse_and_stay(name: str) -> None:
    model = layout(name)
    before = copy.deepcopy(model.state_dict())
    writers = residual_writers(model)
    refuse_partial(model, writers, gains_behind(model, writers))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# What the mixer of a new Falcon-H1 adds is too little to be seen beside bfloat16's rounding.
@pytest.mark.parametrize(
    "name, dtype",
    [
        *((name, dtype) for name in ("llama", "gemma4_experts", "granite_moe_shared")
          for dtype in (torch.float32, torch.bfloat16)),
        ("falcon_h1", torch.float32),
    ],
)  # fmt: skip
def test_a_writer_that_is_not_known_is_refused(name: str, dtype: torch.dtype) -> None:
    model = layout(name).to(dtype)
    writers = residual_writers(model)
    gains = gains_behind(model, writers)
    refuse_partial(model, writers, gains)
    for left_out in (each for each in writers if each.layer == 1):
        known = [each for each in writers if each is not left_out]
        with pytest.raises(InputError, match=r"layer 1: .* not known writes there"):
            refuse_partial(model, known, gains)


@pytest.mark.parametrize("name", sorted(WRITABLE))
def test_norms_behind_writers_are_found_where_they_are(name: str) -> None:
    model = layout(name)
    writers = residual_writers(model)
    gains = gains_behind(model, writers)
    assert set(gains) == ({each.name for each in writers} if name in POST_NORMED else set())
    if gains:
        with pytest.raises(InputError, match=r"layer 0: .* changes what is written"):
            refuse_partial(model, writers, {})


def test_a_norm_that_is_no_rms_norm_is_refused() -> None:
    model = layout("olmo2")
    model.model.layers[1].post_attention_layernorm = nn.LayerNorm(32)
    with pytest.raises(InputError, match=r"layer 1: post_attention_layernorm \(LayerNorm\).* no RMS norm"):
        gains_behind(model, residual_writers(model))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_models_that_cannot_be_edited_whole_are_refused_in_words(name: str) -> None:
    model = layout(name)
    with pytest.raises(InputError):
        maker = EditMaker(model, directions_of(model), EditOptions())
        refuse_partial(model, maker.writers, maker.gains)


def adding(name: str, **more: object) -> tuple[nn.Module, EditMaker, Tensor]:
    """A model, and what adds a vector to layer 1."""
    model = layout(name, **more)
    vector = 3 * normalize(torch.randn(32, generator=torch.Generator().manual_seed(1)), dim=0)
    return model, EditMaker(model, directions_of(model), EditOptions(added={1: vector})), vector


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "lfm2_moe"])
def test_what_is_induced_reaches_the_stream_once_and_as_it_is(name: str) -> None:
    """Also of fused experts, and of a shared expert behind a gate, whose outputs are weighted."""
    model, maker, vector = adding(name)
    refuse_changed_additions(model, maker.writers, maker.additions())
    edits = maker.edits(Plan(source="one", source_layer=0.0, kernels={}))
    found = []
    enters = []
    with torch.inference_mode():
        with reading(model, {(1, "resid_pre"): enters.append, (1, "resid_post"): found.append}):
            model(IDS, use_cache=False)
        with (
            editing(model, maker.writers, [edits]),
            replacing(model, {(1, "resid_pre"): lambda _: enters[0]}),
            reading(model, {(1, "resid_post"): found.append}),
        ):
            model(IDS, use_cache=False)
    assert (found[1] - found[0] - vector).abs().max() < 1e-5


def test_what_is_induced_in_a_mixture_is_each_rows_own() -> None:
    model, maker, _ = adding("qwen2_moe")
    edits = maker.additions()
    with torch.inference_mode():
        plain = model(IDS, use_cache=False).logits
        with editing(model, maker.writers, [edits]):
            alone = model(IDS, use_cache=False).logits
        with editing(model, maker.writers, [{}, edits]) as rows:
            rows.rows = [1, 0, 1]
            together = model(IDS, use_cache=False).logits
    expected = torch.stack([alone[0], plain[1], alone[2]])
    assert (together - expected).abs().max() < 1e-5 < (alone - plain).abs().max()


@pytest.mark.parametrize("name", ["granite", "gemma3", "olmo2"])
def test_what_would_arrive_changed_is_refused(name: str) -> None:
    model, maker, _ = adding(name)
    with pytest.raises(InputError, match=r"--induce: .* does not reach the residual stream of layer 1 as it is"):
        refuse_changed_additions(model, maker.writers, maker.additions())


@pytest.mark.parametrize("name, words", [("mixtral", "outputs are weighted"), ("phi3", "phi3 models have no bias")])
def test_what_no_weight_can_hold_is_refused_before_it_is_searched_for(name: str, words: str) -> None:
    model, maker, _ = adding(name)
    with pytest.raises(InputError, match=words):
        refuse_bias(model, maker.adding(1))
    with pytest.raises(InputError, match=words):
        bake(model, maker.additions())


def test_an_edit_that_is_not_what_it_is_said_to_be_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    induced = ["--induce", "file:1:2"]
    words = ["--model_id", "m", "--target_prompts", "t", "--control_prompts", "c", "--markers_path", "m"]
    config = lambda *more: parse_config(AbliterateConfig, [*words, "--output_dir", str(tmp_path), *more])  # noqa: E731

    def refuse(name: str, *more: str) -> None:
        model, maker, _ = adding(name)
        refuse_inexact(config(*induced, *more), model, maker)

    refuse("llama", "--save", "model")
    refuse("mixtral", "--save", "none")
    for name, save, problem in (
        ("mixtral", "model", "--save model"), ("granite", "none", "as it is"), ("minimax", "none", "not known")
    ):  # fmt: skip
        with pytest.raises(InputError, match=problem):
            refuse(name, "--save", save)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_a_weight_can_hold_is_not(name: str) -> None:
    model, maker, _ = adding(name)
    refuse_bias(model, maker.adding(1))
