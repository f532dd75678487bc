"""The references run one sequence at a time, with no padding, no early end and hooks of their own."""

import gc
import math
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from src.common.errors import InputError
from src.common.model_config import ModelConfigBase
from src.models.architectures import attention, decoder_layers, final_norm, mlp
from src.models.generation import needs_equal_lengths
from src.models.language_model import LanguageModel
from src.models.residuals import extract
from src.models.token_sequences import TokenSequence
from src.ops.moments import Moments
from tests.tiny_models import CONFIGS, tiny_model, tiny_multimodal

NAMES = [*CONFIGS, "multimodal"]
POSITIONS = ["last_prompt", "token:-3", "mean_prompt", "mean_response", "all"]
HOOK_POINTS = ["resid_pre", "resid_post", "attn_out", "mlp_out"]


def build(name: str) -> nn.Module:
    return tiny_multimodal() if name == "multimodal" else tiny_model(name)


def some_sequences(n: int = 9, seed: int = 0) -> list[TokenSequence]:
    draw = random.Random(seed)
    sequences = []
    for i in range(n):
        prompt, response = draw.randrange(3, 30), draw.randrange(1, 9)
        ids = tuple(draw.randrange(5, 49000) for _ in range(prompt + response))
        sequences.append(TokenSequence(id=str(i), token_ids=ids, prompt_length=prompt))
    return sequences


def extracted(
    model: nn.Module | LanguageModel, sequences: list[TokenSequence], **settings: object
) -> dict[str, Tensor]:
    """Rows by id, (rows of the sequence, layers, d_model)."""
    given: dict[str, Tensor] = {}

    def keep(ids: tuple[str, ...], rows: Tensor) -> None:
        assert rows.dtype == torch.float32 and rows.device.type == "cpu" and not rows.is_inference()
        parts = [rows] if settings.get("position") == "all" else rows.split(1)
        for i, part in zip(ids, parts, strict=True):
            assert i not in given
            given[i] = part

    settings = {"layers": range(2), "position": "last_prompt"} | settings
    extract(model, sequences, on_rows=keep, **settings)
    assert given.keys() == {s.id for s in sequences}
    return given


def alone(model: nn.Module, ids: tuple[int, ...], hook_point: str = "resid_post") -> Tensor:
    """Hidden states of one unpadded sequence by a whole forward pass, (tokens, layers, d_model)."""
    seen: list[Tensor] = []

    def keep(hidden: Tensor | tuple) -> None:
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        seen.append(hidden.detach().clone().reshape(len(ids), -1))

    handles = []
    for layer in decoder_layers(model):
        if hook_point == "resid_pre":
            hook = lambda _, args, kwargs: keep(args or kwargs["hidden_states"])  # noqa: E731
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            continue
        module = {"resid_post": lambda x: x, "attn_out": attention, "mlp_out": mlp}[hook_point](layer)
        handles.append(module.register_forward_hook(lambda _, __, output: keep(output)))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.stack(seen, dim=1)


def expected(hidden: Tensor, sequence: TokenSequence, position: str) -> Tensor:
    p = sequence.prompt_length
    parts = {
        "last_prompt": hidden[p - 1 : p],
        "token:-3": hidden[p - 3 : p - 2],
        "mean_prompt": hidden[:p].double().mean(0, keepdim=True),
        "mean_response": hidden[p:].double().mean(0, keepdim=True),
        "all": hidden,
    }
    return parts[position].float()


def assert_close(rows: Tensor, reference: Tensor) -> None:
    """To 1e-5 of the row's norm."""
    assert rows.shape == reference.shape
    error = (rows - reference).norm(dim=-1) / reference.norm(dim=-1)
    assert error.max() <= 1e-5, f"relative error {error.max():.1e}"


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_each_sequence_run_alone(name: str, position: str) -> None:
    model = build(name)
    given = extracted(model, some_sequences(), position=position, tokens_per_batch=120)
    for sequence in some_sequences():
        assert_close(given[sequence.id], expected(alone(model, sequence.token_ids), sequence, position))


@pytest.mark.parametrize("hook_point", HOOK_POINTS)
@pytest.mark.parametrize("name", NAMES)
def test_hook_points_are_the_modules_own_inputs_and_outputs(name: str, hook_point: str) -> None:
    model = build(name)
    given = extracted(model, some_sequences(4), position="all", hook_point=hook_point)
    for sequence in some_sequences(4):
        assert_close(given[sequence.id], alone(model, sequence.token_ids, hook_point))


@pytest.mark.parametrize("name", NAMES)
def test_the_last_layer_is_its_block_s_output_before_the_final_norm(name: str) -> None:
    """What transformers calls the last hidden state is that row after the final norm, and only then."""
    model = build(name)
    norm = final_norm(model)
    with torch.no_grad():
        # A random norm scales by about 1, which would hide its being applied.
        norm.weight.normal_(mean=2.0)
    sequence = some_sequences(1)[0]
    rows = extracted(model, [sequence], position="all")[sequence.id]
    with torch.no_grad():
        states = model(input_ids=torch.tensor([sequence.token_ids]), output_hidden_states=True).hidden_states
        assert_close(rows[:, 0], states[1][0])
        assert_close(norm(rows[:, -1]), states[-1][0])
    assert not torch.allclose(rows[:, -1], states[-1][0], atol=0.1)


@pytest.mark.parametrize("position", ["last_prompt", "mean_response"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_depend_on_neither_batch_mates_nor_order(name: str, position: str) -> None:
    model, sequences = build(name), some_sequences(12)
    reference = extracted(model, sequences, position=position)
    for order, tokens_per_batch in ((sequences[::-1], 1), (sequences[::3], 90), (sequences[5:], 10**6)):
        given = extracted(model, order, position=position, tokens_per_batch=tokens_per_batch)
        for i, rows in given.items():
            assert_close(rows, reference[i])


def test_layers_come_in_the_order_asked_for() -> None:
    model, sequences = tiny_model("llama"), some_sequences(3)
    both, swapped, last = (extracted(model, sequences, layers=layers) for layers in ([0, 1], [1, 0], [1]))
    for i in both:
        assert torch.equal(both[i].flip(1), swapped[i])
        assert torch.equal(both[i][:, 1:], last[i])


@pytest.mark.parametrize("hook_point", HOOK_POINTS)
def test_nothing_above_the_deepest_layer_is_run(hook_point: str) -> None:
    model, runs = tiny_model("llama"), []
    model.lm_head.register_forward_hook(lambda *_: runs.append("unembedding"))
    for i, layer in enumerate(decoder_layers(model)):
        layer.register_forward_pre_hook(lambda *_, i=i: runs.append(i))
    extracted(model, some_sequences(3), layers=[0], hook_point=hook_point)
    assert runs == [0]
    extracted(model, some_sequences(3), layers=[1], hook_point=hook_point)
    assert runs == [0, 0, 1]


def test_a_response_is_run_only_where_it_is_read() -> None:
    model, sequences = tiny_model("llama"), some_sequences(5)
    prompts, whole = sum(s.prompt_length for s in sequences), sum(len(s.token_ids) for s in sequences)
    for position, n_tokens in {
        "mean_prompt": prompts,
        "token:-2": prompts,
        "mean_response": whole,
        "all": whole,
    }.items():
        steps: list[int] = []
        extracted(model, sequences, position=position, on_tokens=steps.append, tokens_per_batch=60)
        assert sum(steps) == n_tokens and len(steps) > 1


def test_batches_keep_to_the_budget_and_recurrent_models_to_one_length() -> None:
    for name, most_rows in (("llama", 2), ("qwen3_next", 1)):
        model, shapes = build(name), []
        lengths = [10, 11, 12, 13]
        sequences = [TokenSequence(id=str(n), token_ids=(7,) * n, prompt_length=n) for n in lengths]
        model.model.register_forward_pre_hook(
            lambda _, __, kwargs, shapes=shapes: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        extracted(model, sequences, tokens_per_batch=26)
        assert max(rows for rows, _ in shapes) == most_rows and all(rows * n <= 26 for rows, n in shapes)
        assert needs_equal_lengths(model) == (most_rows == 1)


def test_half_precision_means_are_summed_in_float32() -> None:
    """In bfloat16 a sum of 400 tokens would lose two of the three digits that it has."""
    model = tiny_model("llama").bfloat16()
    sequence = TokenSequence(id="a", token_ids=tuple(range(5, 405)), prompt_length=400)
    tokens = extracted(model, [sequence], position="all")["a"]
    mean = extracted(model, [sequence], position="mean_prompt")["a"]
    assert torch.allclose(mean[0], tokens.double().mean(0).float(), rtol=1e-4, atol=1e-6)


def test_the_sums_of_a_store_or_of_moments_take_rows_as_they_come() -> None:
    model, sequences = tiny_model("llama"), some_sequences(20)
    moments = Moments(2, 32)
    extract(
        model, sequences, layers=range(2), position="all", on_rows=lambda ids, rows: moments.add(rows),
        tokens_per_batch=100,
    )  # fmt: skip
    hidden = torch.cat([alone(model, s.token_ids) for s in sequences]).double()
    assert moments.count == len(hidden)
    assert torch.allclose(moments.mean, hidden.mean(0), rtol=1e-5, atol=1e-7)


def test_memory_does_not_grow_with_the_number_of_prompts() -> None:
    model = tiny_model("llama")

    def held(n: int) -> tuple[int, int]:
        """Most bytes that Python objects took on the way, and what all tensors take at the end of it."""
        moments, measured = Moments(2, 32), []

        def many() -> Iterator[TokenSequence]:
            draw = random.Random(0)
            for i in range(n):
                # Python keeps up to 2,000 tuples of less than 20 elements for reuse.
                ids = tuple(draw.randrange(300, 49000) for _ in range(24))
                yield TokenSequence(id=str(i), token_ids=ids, prompt_length=24)

        def add(ids: tuple[str, ...], rows: Tensor) -> None:
            moments.add(rows)
            if moments.count == n:
                measured.append(tracemalloc.get_traced_memory()[1])
                measured.append(sum(o.nbytes for o in gc.get_objects() if type(o) is Tensor and not o.is_sparse))

        tracemalloc.start()
        extract(model, many(), layers=range(2), position="last_prompt", tokens_per_batch=240, on_rows=add)
        tracemalloc.stop()
        objects, tensors = measured
        return objects, tensors

    # Both fill the sequences held at a time, 640 of these.
    few, many = held(800), held(2_400)
    # The prompts would be 1,100 bytes each; their ids are kept, to refuse one that comes twice.
    assert many[0] - few[0] < 1_600 * 200
    # The rows would be 256 bytes each.
    assert many[1] - few[1] < 1_600 * 20


def test_hooks_and_forwards_are_gone_afterwards_also_after_an_exception() -> None:
    model = tiny_model("llama")

    def fails(ids: tuple[str, ...], rows: Tensor) -> None:
        # Where the user's code runs, the model is as it was.
        assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        extract(model, some_sequences(2), layers=[0], position="all", on_rows=fails)
    with torch.no_grad():
        decoder_layers(model)[1].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="not finite"):
        extracted(model, some_sequences(2))
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert model(torch.tensor([[5, 6]])).logits.shape == (1, 2, 49152)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_hidden_states_that_are_not_finite_are_refused_by_layer_and_sequence(value: float) -> None:
    model, sequences = tiny_model("llama"), some_sequences(4)
    token = sequences[2].token_ids[sequences[2].prompt_length - 1]

    def spoil(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return torch.where((module.ids == token)[:, :, None], value, output)

    layer = decoder_layers(model)[1]
    model.register_forward_pre_hook(lambda _, __, kwargs: setattr(layer, "ids", kwargs["input_ids"]), with_kwargs=True)
    layer.register_forward_hook(spoil)
    assert extracted(model, sequences, layers=[0]).keys() == {"0", "1", "2", "3"}
    for position in ("last_prompt", "mean_prompt", "all"):
        with pytest.raises(InputError, match=r"sequence '2'.*layer 1 \(resid_post\).*--dtype float32"):
            extracted(model, sequences, position=position)


def test_what_stands_on_the_padding_reaches_no_row() -> None:
    model, sequences = tiny_model("llama"), some_sequences(6)
    reference = {p: extracted(model, sequences, position=p) for p in POSITIONS}

    def spoil(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        return torch.where((module.mask == 0)[:, :, None], torch.nan, output)

    layer = decoder_layers(model)[1]
    model.register_forward_pre_hook(
        lambda _, __, kwargs: setattr(layer, "mask", kwargs["attention_mask"]), with_kwargs=True
    )
    layer.register_forward_hook(spoil, with_kwargs=True)
    for position in POSITIONS:
        given = extracted(model, sequences, position=position)
        assert layer.mask.min() == 0
        assert all(torch.equal(given[i], rows) for i, rows in reference[position].items())


def test_out_of_memory_halves_the_batch_and_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    sequences = [TokenSequence(id=str(i), token_ids=(5 + i,) * 10, prompt_length=10) for i in range(9)]
    reference = extracted(model, sequences)

    def runs_out_of_memory(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.register_forward_pre_hook(runs_out_of_memory, with_kwargs=True)
    given = extracted(model, sequences)
    for i, rows in reference.items():
        assert_close(given[i], rows)
    assert "Out of memory with 9 sequences at once; going on with 4" in caplog.text
    assert "Out of memory with 4 sequences at once; going on with 2" in caplog.text
    assert caplog.text.count("Out of memory") == 2


def test_out_of_memory_with_one_sequence_is_an_error_and_other_errors_pass() -> None:
    for error, match in (
        (torch.OutOfMemoryError("CUDA out of memory"), "sequence '0' alone"),
        (RuntimeError("x"), "x"),
    ):
        model = tiny_model("llama")

        def fails(*_: object, error: RuntimeError = error) -> None:
            raise error

        model.model.register_forward_pre_hook(fails)
        with pytest.raises(InputError if match != "x" else RuntimeError, match=match):
            extracted(model, some_sequences(1))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"layers": [2]}, r"layer 2: .*layers 0 to 1"),
        ({"layers": [-1]}, r"layer -1: .*layers 0 to 1"),
        ({"layers": []}, r"layers \[\]: .*0 to 1"),
        ({"layers": [1, 1]}, r"layers \[1, 1\]: expected each once"),
        ({"hook_point": "resid"}, r"hook point 'resid': expected one of resid_pre, "),
        ({"position": "token:3"}, r"'token:3'.*token:-k"),
        ({"position": "token:-0"}, r"'token:-0'.*token:-k"),
        ({"position": "last"}, r"'last'.*last_prompt"),
        ({"tokens_per_batch": 0}, r"0 tokens a batch"),
        ({"position": "token:-31"}, r"sequence '\d'.*no token:-31"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        extracted(tiny_model("llama"), some_sequences(), **settings)


@pytest.mark.parametrize(
    ("bad", "position", "match"),
    [
        (TokenSequence(id="x", token_ids=(5, 6), prompt_length=2), "token:-3", r"'x': its prompt has 2 tokens"),
        (TokenSequence(id="x", token_ids=(5, 6), prompt_length=2), "mean_response", r"'x' has no response token"),
        (TokenSequence(id="x", token_ids=(5,) * 513, prompt_length=513), "all", r"'x' has 513 tokens.*context 512"),
        (TokenSequence(id="x", token_ids=(5, 49152), prompt_length=2), "all", r"'x'.*49152; expected 0 to 49151"),
        (TokenSequence(id="x", token_ids=(5, -1), prompt_length=2), "all", r"'x'.*-1; expected 0 to 49151"),
        (TokenSequence(id="0", token_ids=(5, 6), prompt_length=1), "all", r"'0' is there twice"),
    ],
)
def test_a_list_with_a_bad_sequence_is_refused_before_anything_is_run(
    bad: TokenSequence, position: str, match: str
) -> None:
    model, runs = tiny_model("llama"), []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(InputError, match=match):
        extracted(model, [*some_sequences(), bad], position=position, tokens_per_batch=1)
    assert not runs


def test_the_context_may_be_filled_and_a_response_not_read_does_not_count() -> None:
    model = tiny_model("llama")
    full = TokenSequence(id="full", token_ids=(5,) * 512, prompt_length=512)
    longer = TokenSequence(id="longer", token_ids=(5,) * 600, prompt_length=512)
    given = extracted(model, [full, longer])
    assert_close(given["full"], given["longer"])


@pytest.mark.parametrize("prompt_length", [0, 3])
def test_a_prompt_must_be_in_its_sequence(prompt_length: int) -> None:
    with pytest.raises(InputError, match=f"'a': a prompt of {prompt_length} tokens in a sequence of 2"):
        TokenSequence(id="a", token_ids=(5, 6), prompt_length=prompt_length)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(InputError, match="training mode"):
        extracted(tiny_model("gpt2").train(), some_sequences(1))


def test_the_bundled_model_at_every_layer(bundled_folder: Path) -> None:
    """Real weights, whose first token has a norm some hundred times that of the others."""
    model = LanguageModel.load(
        ModelConfigBase(model_id=str(bundled_folder), output_dir=Path("unused"), dtype="float32", device="cpu")
    )
    texts = ["Where do birds go in winter?", "The sea", "Tell me how bread is baked, step by step, please."]
    sequences = []
    for text in texts:
        ids = tuple(model.tokenizer(text).input_ids)
        sequences.append(TokenSequence(id=text, token_ids=ids, prompt_length=len(ids)))
    for position in ("last_prompt", "mean_prompt"):
        given = extracted(model, sequences, layers=range(30), position=position)
        for sequence in sequences:
            reference = expected(alone(model.model, sequence.token_ids), sequence, position)
            assert reference.shape == (1, 30, 576) and math.isfinite(reference.norm())
            assert_close(given[sequence.id], reference)
