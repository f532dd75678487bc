"""Prompts' common beginning is run once a trial, layers below an edit once in all, and nothing comes out otherwise."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from src.abliteration import forcing
from src.abliteration.edits import EditMaker, EditOptions
from src.abliteration.forcing import Forced, checked_lower, first_edited, force, kept_layers
from src.abliteration.kernel import Kernel, Plan
from src.models.architectures import decoder_layers
from src.models.language_model import LanguageModel
from src.models.lower_layers import entered
from src.models.shared_prefix import SharedPrefix, can_share_prefix, common_prefix
from src.models.weight_editor import editing
from tests.test_weight_editor import directions_of
from tests.tiny_layouts import layout
from tests.tiny_models import CONFIGS, tiny_model

WINDOWED_OR_RECURRENT = {"gemma2", "gemma3", "qwen3_next"}
ONE_TRIAL = {"mixtral", "qwen3_moe", "qwen3_next", "opt"}
"""Whose experts, or whose feed-forward parts, get tokens that no longer know their rows."""
PREFIX = tuple(range(40, 52))


@pytest.fixture(scope="module")
def tokenizer(bundled_folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(bundled_folder)


def sequences() -> list[Forced]:
    """Prompts of several lengths behind one beginning, one of them that beginning and a token; one without answer."""
    rows = [(n, tuple(range(60 + n, 60 + n + 3 * n)), tuple(range(200, 200 + n))) for n in range(1, 5)]
    found = [Forced(str(n), PREFIX + prompt, answer) for n, prompt, answer in rows]
    return [*found, Forced("short", (*PREFIX, 99), (7, 8, 9)), Forced("none", (*PREFIX, 98, 97), ())]


def made_groups(model: LanguageModel, architecture: str, reach: float) -> tuple[EditMaker, list[list[dict]]]:
    """Trials that can be run at once; with a reach of less than a layer all leave the first layer as it is."""
    maker = EditMaker(model.model, directions_of(model.model), EditOptions())
    kernels = [Kernel(high=high, position=1.0, low=0.5, reach=reach) for high in (0.0, 1.0, 1.5)]
    plans = [Plan(source="own", source_layer=0.0, kernels={"attn": each, "mlp": each}) for each in kernels]
    edits = [maker.edits(plan) for plan in plans]
    return maker, [[each] for each in edits] if architecture in ONE_TRIAL else [edits]


def found_logits(model: LanguageModel, maker: EditMaker, group: list[dict], **more) -> dict[tuple[int, int], Tensor]:
    found = {}
    note = lambda trial, i, logits: found.update({(trial, i): logits.clone()})  # noqa: E731
    force(model, maker.writers, group, sequences(), note, **more)
    return found


def is_as_alone(
    model: LanguageModel, maker: EditMaker, group: list[dict], found: dict[tuple[int, int], Tensor]
) -> None:
    assert len(found) == len(group) * len(sequences())
    for trial, edits in enumerate(group):
        with editing(model.model, maker.writers, [edits]), torch.inference_mode():
            for i, each in enumerate(sequences()):
                alone = model.model(input_ids=torch.tensor([each.run.token_ids])).logits[0, -each.n_places :]
                assert torch.allclose(found[trial, i], alone, atol=2e-5), (trial, each.id)


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_layers_below_an_edit_are_left_out(architecture: str, tokenizer) -> None:
    model = LanguageModel(tiny_model(architecture), tokenizer)
    maker, groups = made_groups(model, architecture, reach=0.5)
    kept = kept_layers(model, sequences())
    plain = found_logits(model, maker, [{}], keep=kept)
    lower = checked_lower(model, sequences(), kept, [plain[0, i].log_softmax(-1) for i in range(len(sequences()))])
    assert lower is kept and kept.layers == (1,)
    runs: list[int] = []
    part = next(decoder_layers(model.model)[0].children())
    handle = part.register_forward_hook(lambda *_: runs.append(1))
    for group in groups:
        assert first_edited(maker.writers, group) >= 1
        found = found_logits(model, maker, group, lower=lower)
        # The prefix of a trial alone.
        assert len(runs) == can_share_prefix(model.model)
        is_as_alone(model, maker, group, found)
        runs.clear()
    handle.remove()
    # Of an edit of the first layer nothing is left out.
    maker, groups = made_groups(model, architecture, reach=2.0)
    for group in groups:
        is_as_alone(model, maker, group, found_logits(model, maker, group, lower=lower))


def test_layers_that_hand_on_more_than_hidden_states_are_run(tokenizer) -> None:
    model = LanguageModel(tiny_model("llama"), tokenizer)
    first, second = decoder_layers(model.model)
    seen: list[Tensor] = []
    first.mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    second.register_forward_hook(lambda module, args, output: output + 100 * seen.pop() if seen else output)
    maker, _ = made_groups(model, "llama", reach=0.5)
    kept = kept_layers(model, sequences())
    plain = found_logits(model, maker, [{}], keep=kept)
    found = checked_lower(model, sequences(), kept, [plain[0, i].log_softmax(-1) for i in range(len(sequences()))])
    assert found is None


@pytest.mark.parametrize("n_shared", [0, 2])
def test_layers_that_share_keys_and_values_are_run(tokenizer, n_shared: int) -> None:
    types = ["sliding_attention", "full_attention"] * 2
    more = {"num_hidden_layers": 4, "layer_types": types, "num_kv_shared_layers": n_shared}
    sizes = {"vocab_size": 256, "vocab_size_per_layer_input": 256}
    model = LanguageModel(layout("gemma4_per_layer_inputs", **more, **sizes), tokenizer)
    maker = EditMaker(model.model, directions_of(model.model), EditOptions())
    kept = kept_layers(model, sequences())
    plain = found_logits(model, maker, [{}], keep=kept)
    lower = checked_lower(model, sequences(), kept, [plain[0, i].log_softmax(-1) for i in range(len(sequences()))])
    assert lower is (None if n_shared else kept)


def test_layers_that_were_left_out_are_as_they_were() -> None:
    model = tiny_model("llama")
    first = decoder_layers(model)[0]
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        before = model(ids).logits
        for own in (None, lambda *args, **kwargs: type(first).forward(first, *args, **kwargs)):
            if own:
                first.forward = own
            with entered(model, 1, torch.zeros(1, 3, model.config.hidden_size)):
                assert not torch.equal(model(ids).logits, before)
            assert vars(first).get("forward") is own and torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_logits_are_those_of_each_sequence_alone(architecture: str, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(tiny_model(architecture), tokenizer)
    maker, groups = made_groups(model, architecture, reach=2.0)
    made: list[int] = []

    class Counted(SharedPrefix):
        def __init__(self, model, token_ids, n_rows) -> None:
            made.append(len(token_ids))
            super().__init__(model, token_ids, n_rows)

    monkeypatch.setattr(forcing, "SharedPrefix", Counted)
    for group in groups:
        is_as_alone(model, maker, group, found_logits(model, maker, group))
    assert made == ([] if architecture in WINDOWED_OR_RECURRENT else [len(PREFIX)] * len(groups))
    assert can_share_prefix(model.model) == bool(made)


def test_rows_of_a_prefix_keep_what_hooks_made_of_each() -> None:
    model = tiny_model("llama")
    with torch.inference_mode():
        one = SharedPrefix(model, PREFIX, 2)
        cache = one.cache(torch.tensor([1, 1, 0]))
        assert [layer.keys.shape[0] for layer in cache.layers] == [3, 3]
        model(input_ids=torch.tensor([[5]] * 3), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == len(PREFIX) + 1 and one.cache(torch.tensor([0])).get_seq_length() == len(PREFIX)


def test_common_prefix_leaves_each_sequence_a_token() -> None:
    assert common_prefix([(1, 2, 3), (1, 2, 4)]) == (1, 2)
    assert common_prefix([(1, 2), (1, 2, 4)]) == (1,)
    assert common_prefix([(5, 2), (1, 2)]) == ()
