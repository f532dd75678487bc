"""Parts of steering on vLLM that need no engine."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from src.common.capture_spec import OUTPUT, Capture
from src.common.errors import InputError
from src.common.interventions import Window
from src.common.resolved_interventions import ResolvedCondition, ResolvedSpec
from src.models.hooks import Location
from src.models.types import GenerationRequest
from src.models.vllm_capture import CaptureStore
from src.models.vllm_compiled import Declared, declare
from src.models.vllm_hidden import Hidden
from src.models.vllm_plan import Asked, Kept
from src.models.vllm_specs import Specs
from src.models.vllm_states import check_states
from tests.steering_specs import spec, unit


def condition(layer: int = 0, above: float = 0.0, d_model: int = 32) -> ResolvedCondition:
    return ResolvedCondition(layer=layer, hook_point="resid_post", direction=unit(9, d_model), above=above, below=None)


def conditional(above: float, **fields: object) -> ResolvedSpec:
    return spec({"op": "add", "coefficient": 1.0, "layer": 1, "condition": condition(above=above), **fields})


def adds(number: int) -> ResolvedSpec:
    return spec({"op": "add", "coefficient": 1.0 + number})


class Calls(list):
    """What was called; answers as workers do that are through with everything."""

    def __call__(self, method: str, args: tuple = ()) -> list:
        self.append((method, args))
        return [args[0]]


def specs_of(declared: Declared) -> Specs:
    return Specs(Calls(), declared)


def test_a_compiled_engines_slots_are_for_what_runs_and_not_for_what_ran() -> None:
    specs = specs_of(declare([adds(0)], slots=2))
    for number in range(10):
        specs.take(f"r{number}", adds(number), 3, 5)
        specs.leave(f"r{number}")
    specs.take("a", adds(0), 3, 5)
    specs.take("b", adds(1), 3, 5)
    specs.take("same", adds(1), 3, 5)
    assert "3 interventions at once: compiled for 2" in specs.lack(adds(2), 3, 5)
    with pytest.raises(InputError, match="fewer requests at once"):
        specs.take("c", adds(2), 3, 5)
    specs.leave("b")
    assert specs.lack(adds(2), 3, 5)
    specs.leave("same")
    specs.take("c", adds(2), 3, 5)


def test_every_set_of_active_windows_counts_as_one() -> None:
    each = [{"op": "add", "coefficient": 1.0, "positions": p} for p in ("prompt", Window(start=2))]
    several = spec(*each)
    specs = specs_of(declare([several], slots=2))
    with pytest.raises(InputError, match="3 interventions at once"):
        specs.refuse(several, 5, 9)
    specs.refuse(several, 5, 5)


def test_conditions_are_counted_where_they_are_read() -> None:
    specs = specs_of(declare([conditional(0.0)]))
    specs.take("a", conditional(0.0), 3, 5)
    specs.take("b", conditional(0.0, coefficient=2.0), 3, 5)
    assert "2 conditions at resid_post of layer 0: compiled for 1" in specs.lack(conditional(1.0), 3, 5)
    specs.leave("a")
    specs.leave("b")
    assert specs.lack(conditional(1.0), 3, 5) is None


def test_an_eager_engine_has_room_for_any_number() -> None:
    specs = Specs(Calls())
    for number in range(100):
        specs.take(f"r{number}", conditional(float(number)), 3, 5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"interventions": conditional(0.0, layer=0, hook_point="resid_pre")}, "after resid_pre of layer 0"),
        ({"interventions": conditional(0.0, condition=condition(layer=2))}, "layer 2; the model's layers are 0 to 1"),
        ({"interventions": conditional(0.0, condition=condition(d_model=16))}, "width 16"),
        ({"capture": Capture(places=((0, OUTPUT),))}, "it is that of layer 1"),
        ({"capture": Capture(places=((1, "attn_out"),))}, "attn_out of layer 1: no attention"),
        ({"interventions": spec({"op": "add", "layer": 1, "hook_point": "attn_out"})}, "no attention"),
        ({"interventions": conditional(0.0)}, None),
        ({"capture": Capture(places=((1, OUTPUT), (0, "attn_out")))}, None),
    ],
)
def test_what_would_break_a_step_is_refused_before(fields, words) -> None:
    request = GenerationRequest(id="r", token_ids=(1, 2), max_tokens=2, **fields)
    lacking = {(1, "attn_out"): "no attention in this layer"}
    if words is None:
        check_states(request, 2, 32, lacking)
    else:
        with pytest.raises(InputError, match=words):
            check_states(request, 2, 32, lacking)


def step_of(*asked: tuple[str, int, int, int]) -> list[Kept]:
    """(request, start and end among the step's tokens, position of the first)."""
    capture = Capture(places=((0, "resid_post"),), mean=True)
    return [Kept(name, capture, start, end, position) for name, start, end, position in asked]


def test_means_are_those_of_the_rows_whatever_the_steps() -> None:
    """Chunks of several requests in one step, rows out of order, positions again after a preemption."""
    store, place = CaptureStore(), Location(0, "resid_post")
    a, b = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0))
    steps = [
        ([("a", 0, 30, 0), ("b", 30, 31, 0)], [a[:30], b[:1]]),
        ([("b", 0, 9, 1), ("a", 9, 28, 30)], [b[1:10], a[30:49]]),
        ([("a", 0, 49, 0), ("b", 49, 50, 10)], [a[:49], b[10:11]]),
        ([("b", 0, 1, 11), ("a", 1, 2, 49)], [b[11:12], a[49:50]]),
    ]
    for asked, rows in steps:
        store.keep(place, step_of(*asked), Hidden(torch.cat(rows), None))
    for name, rows, n in (("a", a, 50), ("a", a, 49), ("b", b, 12), ("b", b, 11)):
        found = store.look(name, n, mean=True)["0.resid_post"]
        assert torch.allclose(found, rows[:n].double().mean(0, keepdim=True).float(), atol=1e-6)
    with pytest.raises(RuntimeError, match="has 50 positions; expected 48"):
        store.look("a", 48, mean=True)
    with pytest.raises(RuntimeError, match="lacks positions 12 to 13"):
        store.keep(place, step_of(("b", 0, 1, 13)), Hidden(b[13:14], None))
    store.drop("a")
    store.keep(place, step_of(("c", 0, 2, 0)), Hidden(a[:2], None))
    assert torch.allclose(store.take("c", 2, mean=True)["0.resid_post"], a[:2].mean(0, keepdim=True))
    assert store.request_ids == ["b"]


class Runner(SimpleNamespace):
    """A vLLM runner of a model of two layers, as far as the steering asks."""

    def __init__(self) -> None:
        decoder = nn.Module()
        decoder.model = nn.Module()
        decoder.model.layers = nn.ModuleList([Layer(), Layer()])
        super().__init__(
            get_model=lambda: decoder, model_config=SimpleNamespace(get_hidden_size=lambda: 32), max_num_tokens=8,
            device=torch.device("cpu"),
        )  # fmt: skip


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.mlp(self.self_attn(hidden_states))


@pytest.mark.vllm
def test_the_tables_of_a_compiled_model_are_used_again(monkeypatch) -> None:
    from vllm.distributed import parallel_state

    from src.models.vllm_steering import CompiledSteering

    monkeypatch.setattr(parallel_state, "get_pp_group", lambda: SimpleNamespace(world_size=1))
    runner = Runner()
    several = [conditional(float(i), coefficient=1.0 + i) for i in range(5)]
    steering = CompiledSteering(runner, declare(several[:1], slots=1))
    layers = runner.get_model().model.layers
    h = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    for i, each in enumerate(several):
        steering.end([f"r{i - 1}"])
        steering.register(each.fingerprint, each)
        steering.begin(f"r{i}", Asked(2, each.fingerprint))
        steering.plan_step([f"r{i}"], [2], [0])
        before = layers[0](h)
        after = layers[1](before)
        held = before @ torch.from_numpy(unit(9)) > i
        plain = before + layers[1].mlp(layers[1].self_attn(before))
        expected = plain + held[:, None] * (1.0 + i) * torch.from_numpy(unit(0))
        assert torch.allclose(after, expected, atol=1e-5)
        steering.check_step()
        steering.clear_step()
        assert torch.allclose(layers[1](before), plain)


@pytest.mark.vllm
def test_places_without_a_module_or_with_a_part_of_a_sum_are_known() -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    from src.models.vllm_hidden import lacking

    row = RowParallelLinear.__new__(RowParallelLinear)
    nn.Module.__init__(row)
    row.tp_size, row.reduce_results = 2, False
    layers = {0: Layer(), 1: Layer(), 2: Layer()}
    layers[1].mlp = nn.Sequential(row)
    del layers[2].self_attn
    found = lacking(layers)
    assert set(found) == {(1, "mlp_out"), (2, "attn_out")}
    assert "each device has a part" in found[1, "mlp_out"]
    row.reduce_results = True
    assert set(lacking(layers)) == {(2, "attn_out")}


@pytest.mark.vllm
def test_several_streams_in_one_tensor_are_not_taken_for_rows() -> None:
    from src.models.vllm_hidden import Hidden, rewriting

    with pytest.raises(RuntimeError, match="one row a token"):
        Hidden(torch.zeros(4, 7, 32), None)
    assert len(Hidden(torch.zeros(1, 7, 32), None)) == 7
    ran: list[int] = []
    for output in (torch.zeros(4, 7, 32), (torch.zeros(7, 32), torch.zeros(7, 2)), {"hidden": 1}):
        rewriting("sum", lambda: ran.append(1))(nn.Identity(), (), output)
    assert not ran
