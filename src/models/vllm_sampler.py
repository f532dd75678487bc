"""
The exact uncertainty of every sampled token, carried out of a vLLM worker in the log-probability tensors that vLLM
moves anyway, and draws that depend on the request alone.

A request asks for it by its tag: columns 1 and 2 then hold entropy and top-k mass in place of two log-probabilities.
Requests of others in the same batch get what vLLM gives them.
"""

import random
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.outputs import LogprobsTensors, SamplerOutput

from src.models.vllm_tag import COLUMNS, Tag, tag_of
from src.ops.metrics import token_uncertainty
from src.ops.sampling import next_tokens


def install_v1(runner: Any) -> None:
    """Wraps the `forward` of a V1 runner's sampler."""
    sampler = runner.sampler
    plain = sampler.forward
    draws = Draws()

    def forward(logits: Tensor, sampling_metadata: Any, *args: Any, **settings: Any) -> SamplerOutput:
        requests = [runner.requests[request_id] for request_id in runner.input_batch.req_ids[: len(logits)]]
        tags = [tag_of(request.sampling_params) for request in requests]
        ours = [i for i, tag in enumerate(tags) if tag]
        if not ours:
            return plain(logits, sampling_metadata, *args, **settings)
        assert len(tags) == len(logits), f"{len(tags)} requests for {len(logits)} rows of logits"
        whole = len(ours) == len(logits)
        mine = logits if whole else logits[ours]
        tokens = _next_tokens(mine, [requests[i] for i in ours], [tags[i] for i in ours], draws)
        columns = _columns(mine, tokens, [tags[i].k for i in ours])
        draws.keep(runner.requests)
        if whole:
            return _output(tokens, columns)
        # Ours are read before vLLM's own sampler may change the logits in place.
        output = plain(logits, sampling_metadata, *args, **settings)
        output.sampled_token_ids[ours, 0] = tokens.int()
        output.logprobs_tensors.logprob_token_ids[ours, 0] = tokens.int()
        output.logprobs_tensors.logprobs[ours, : COLUMNS + 1] = columns
        return output

    sampler.forward = forward


def _next_tokens(logits: Tensor, requests: list[Any], tags: list[Tag], draws: "Draws") -> Tensor:
    temperatures = [tag.temperature for tag in tags]
    uniforms = [
        draws.at(request.req_id, tag.seed, len(request.output_token_ids)) if tag.temperature > 0 else 0.0
        for request, tag in zip(requests, tags, strict=True)
    ]
    return next_tokens(
        logits,
        torch.tensor(temperatures, dtype=torch.float32, device=logits.device),
        torch.tensor(uniforms, dtype=torch.float64, device=logits.device),
    )


def _columns(logits: Tensor, tokens: Tensor, ks: list[int]) -> Tensor:
    """float32 (rows, 3): the token's log-probability, entropy (nats), top-k mass."""
    entropy, mass, log_normalizer = _uncertainty(logits, ks)
    return torch.stack([logits.gather(1, tokens[:, None])[:, 0].float() - log_normalizer, entropy, mass], dim=1)


def _uncertainty(logits: Tensor, ks: list[int]) -> Tensor:
    """float32 (3, rows): entropy, top-k mass and log-normalizer, each row with its own k."""
    if len(set(ks)) == 1:
        return torch.stack(token_uncertainty(logits, ks[0]))
    measured = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device)
    for k in set(ks):
        rows = [i for i, other in enumerate(ks) if other == k]
        measured[:, rows] = torch.stack(token_uncertainty(logits[rows], k))
    return measured


def _output(tokens: Tensor, columns: Tensor) -> SamplerOutput:
    ids = torch.zeros(columns.shape, dtype=torch.int32, device=columns.device)
    ids[:, 0] = tokens
    ranks = torch.zeros(len(tokens), dtype=torch.int64, device=columns.device)
    return SamplerOutput(
        sampled_token_ids=tokens.int()[:, None],
        logprobs_tensors=LogprobsTensors(logprob_token_ids=ids, logprobs=columns, selected_token_ranks=ranks),
    )


class Draws:
    """
    The uniform draws of each request: number t belongs to generated token t, whatever was computed twice or thrown away
    on the way (chunks of a prompt, preemption). The same numbers as on transformers.
    """

    def __init__(self) -> None:
        self._streams: dict[tuple[str, int], tuple[random.Random, list[float]]] = {}

    def at(self, request_id: str, seed: int, index: int) -> float:
        """Draw number `index` of a request."""
        stream, drawn = self._streams.setdefault((request_id, seed), (random.Random(seed), []))
        while len(drawn) <= index:
            drawn.append(stream.random())
        return drawn[index]

    def keep(self, request_ids: dict[str, Any]) -> None:
        """Forgets the requests that have ended, once they are many."""
        if len(self._streams) > 2 * len(request_ids) + 64:
            self._streams = {key: stream for key, stream in self._streams.items() if key[0] in request_ids}


class SamplerV2:
    """A V2 runner's sampler with our columns. Tokens are drawn by vLLM's own, seeded per request and position."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self._tags: dict[int, Tag | None] = {}

    @classmethod
    def around(cls, sampler: Any) -> "SamplerV2 | None":
        """None on a pipeline rank that does not sample."""
        return sampler if sampler is None or isinstance(sampler, cls) else cls(sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        self._tags[req_idx] = tag_of(sampling_params)
        self._sampler.add_request(req_idx, sampling_params)

    def __call__(self, logits: Tensor, input_batch: Any) -> Any:
        tags = [self._tags.get(int(slot)) for slot in input_batch.idx_mapping_np]
        ours = [i for i, tag in enumerate(tags) if tag]
        if not ours:
            return self._sampler(logits, input_batch)
        assert len(tags) == len(logits), f"{len(tags)} requests for {len(logits)} rows of logits"
        rows = torch.tensor(ours, device=logits.device)
        measured = _uncertainty(logits[rows], [tags[i].k for i in ours])
        output = self._sampler(logits, input_batch)
        output.logprobs_tensors.logprobs[rows, 1 : COLUMNS + 1] = measured[:COLUMNS].T
        return output
