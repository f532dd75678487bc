"""Several adapters of one base model in one engine, and log-probabilities of given answers."""

import warnings
from pathlib import Path

import pytest
import torch

from src.common.engine_config import EngineConfigBase
from src.common.errors import InputError
from src.models.adapter_switching import is_plain_lora, shared_engines
from src.models.language_model import LanguageModel, generate_all
from src.models.token_sequences import TokenSequence
from src.models.types import GenerationRequest
from tests.steering_specs import spec
from tests.tiny_adapters import write_adapter

DORA = {"use_dora": True, "target_modules": ["q_proj"]}
HEAD = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
BIAS = {"target_modules": ["q_proj"], "bias": "all"}


@pytest.fixture(scope="module")
def adapters(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    kinds = {"a": {}, "b": {"r": 8, "seed": 2}, "dora": DORA, "head": HEAD, "bias": BIAS}
    return {name: write_adapter(tiny_folder, folder / name, **some) for name, some in kinds.items()}


def load(reference: str) -> LanguageModel:
    return LanguageModel.load(EngineConfigBase(model_id=reference, output_dir=Path("unused"), device="cpu"))


def requests() -> list[GenerationRequest]:
    return [GenerationRequest(id=str(i), token_ids=tuple(range(50, 58 + i)), max_tokens=6) for i in range(3)]


def test_adapters_taken_on_and_off_give_what_each_gives_alone(tiny_folder: Path, adapters: dict[str, Path]) -> None:
    expected = {None: generate_all(load(str(tiny_folder)), requests())}
    for name in ("a", "b"):
        expected[name] = generate_all(load(f"{tiny_folder}+{adapters[name]}"), requests())
    assert len({str(each) for each in expected.values()}) == 3
    model = load(str(tiny_folder))
    before = [(name, weight.clone()) for name, weight in model.model.named_parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("a", None, "b", "a", "a", "b", None):
            model.use_adapter(adapters[name] if name else None)
            assert generate_all(model, requests()) == expected[name]
            assert (model.facts["adapter_fingerprint"] is None) == (name is None)
    after = list(model.model.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(after, before, strict=True))


def test_only_what_can_be_taken_off_again_shares_an_engine(tiny_folder: Path, adapters: dict[str, Path]) -> None:
    assert {name: is_plain_lora(path) for name, path in adapters.items()} == {
        "a": True, "b": True, "dora": False, "head": False, "bias": False,
    }  # fmt: skip
    base = str(tiny_folder)
    names = [base, f"{base}+{adapters['dora']}", f"{base}+{adapters['a']}", "other", f"{base}+{adapters['b']}"]
    config = EngineConfigBase(model_id=base, output_dir=Path("unused"))
    shared = shared_engines(config, names, "hf")
    assert [each.references for each in shared] == [(names[0], names[2], names[4]), (names[1],), ("other",)]
    assert shared[0].adapters == (adapters["a"], adapters["b"]) and shared[1].adapters == shared[2].adapters == ()
    # One adapter alone is loaded the way every command does.
    assert shared_engines(config, names[2:3], "hf")[0].adapters == ()
    with pytest.raises(AssertionError, match="cannot be taken off"):
        load(base).use_adapter(adapters["head"])
    with pytest.raises(InputError, match="nowhere"):
        shared_engines(config, [f"{base}+./nowhere"], "hf")


def test_log_probabilities_are_those_of_a_plain_pass(tiny_folder: Path) -> None:
    model = load(str(tiny_folder))
    prompt = tuple(range(50, 60))
    acting = spec({"op": "add", "layer": 0, "coefficient": 4.0, "positions": "generated"})
    answers = [(7,), (9,), (7, 8, 9), (7, 8, 4)]
    rows = [
        (TokenSequence(id=f"{a}", token_ids=prompt + a, prompt_length=10), one)
        for a in answers
        for one in (None, acting)
    ]
    found = model.log_probabilities(rows)
    for (sequence, one), values in zip(rows, found, strict=True):
        assert values.dtype == torch.float64 and len(values) == len(sequence.token_ids) - 10
        if one is None:
            with torch.no_grad():
                logits = model.model(torch.tensor([sequence.token_ids])).logits[0, 9:-1].log_softmax(-1)
            expected = logits[range(len(values)), list(sequence.token_ids[10:])]
            assert values.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    # Where nothing generated precedes it a token is not moved by what acts on generated ones.
    assert found[0].tolist() == pytest.approx(found[1].tolist(), abs=1e-6)
    assert (found[4] - found[5]).abs().max() > 1e-4
    alone = model.log_probabilities(rows[5:6])[0]
    assert alone.tolist() == pytest.approx(found[5].tolist(), abs=1e-6)
    with pytest.raises(InputError, match="no response token"):
        model.log_probabilities([(TokenSequence(id="x", token_ids=prompt, prompt_length=10), None)])
