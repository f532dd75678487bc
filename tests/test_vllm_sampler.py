import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from src.models.types import GenerationRequest
from src.ops.metrics import token_uncertainty

pytestmark = pytest.mark.vllm


def test_draws_belong_to_tokens_not_to_calls() -> None:
    from src.models.vllm_sampler import Draws

    draws = Draws()
    stream = random.Random(7)
    expected = [stream.random() for _ in range(5)]
    # Token 0 twice, as after a prompt's chunk, and token 4 before 2, as never happens.
    assert [draws.at("a", 7, i) for i in (0, 0, 1, 4, 2)] == [expected[i] for i in (0, 0, 1, 4, 2)]
    assert draws.at("b", 8, 0) != draws.at("a", 7, 0)
    for i in range(200):
        draws.at(f"gone {i}", i, 0)
    draws.keep({"a": None})
    assert list(draws._streams) == [("a", 7)] and draws.at("a", 7, 3) == expected[3]


def test_a_request_carries_its_tag_and_nothing_that_vllm_would_act_on() -> None:
    from src.models.vllm_tag import Tag, sampling_params, tag_of

    request = GenerationRequest(id="a", token_ids=(1,), max_tokens=9, temperature=0.7, seed=2**32 - 1)
    params = sampling_params(request, 3, frozenset({7, 2}), "v1")
    assert tag_of(params) == Tag(3, 2**32 - 1, 0.7)
    assert params.seed is None and params.stop_token_ids == [2, 7] and params.ignore_eos and not params.detokenize
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.7, 1.0, 0, 9)
    assert sampling_params(request, 3, frozenset(), "v2").seed == 2**32 - 1
    assert tag_of(None) is None


def test_the_second_runners_sampler_writes_our_rows_only() -> None:
    """The shape of the V2 interface as vLLM 0.32 has it; the real one needs a GPU."""
    from vllm import SamplingParams
    from vllm.v1.outputs import LogprobsTensors

    from src.models.vllm_sampler import SamplerV2
    from src.models.vllm_tag import sampling_params

    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    added = []

    def plain(logits: torch.Tensor, input_batch: object) -> SimpleNamespace:
        tensors = LogprobsTensors(torch.zeros(3, 3, dtype=torch.int32), torch.full((3, 3), -1.0), torch.zeros(3))
        # As temperature is applied in place.
        logits.div_(2.0)
        return SimpleNamespace(logprobs_tensors=tensors)

    plain.add_request = lambda slot, params: added.append(slot)
    plain.compute_nans = False
    sampler = SamplerV2.around(plain)
    ours = sampling_params(GenerationRequest(id="a", token_ids=(1,), max_tokens=9), 4, frozenset(), "v2")
    for slot, params in ((5, ours), (0, SamplingParams(logprobs=2)), (9, ours)):
        sampler.add_request(slot, params)
    expected = token_uncertainty(logits, 4)
    columns = sampler(logits, SimpleNamespace(idx_mapping_np=np.array([9, 0, 5]))).logprobs_tensors.logprobs
    assert added == [5, 0, 9] and sampler.compute_nans is False
    assert torch.equal(columns[[0, 2], 1], expected.entropy[[0, 2]])
    assert torch.equal(columns[[0, 2], 2], expected.top_k_mass[[0, 2]])
    assert columns[1].tolist() == [-1.0] * 3 and columns[:, 0].tolist() == [-1.0] * 3
    # A slot that somebody else's request takes over is no longer ours.
    sampler.add_request(9, SamplingParams())
    columns = sampler(logits, SimpleNamespace(idx_mapping_np=np.array([9, 0, 0]))).logprobs_tensors.logprobs
    assert (columns == -1.0).all()
    assert SamplerV2.around(None) is None and SamplerV2.around(sampler) is sampler
