"""Answers that are shown while they are made and can be stopped at any moment, on transformers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

import torch
from torch import nn

from src.common.errors import InputError
from src.models.architectures import decoder_layers
from src.models.cpu_linear import packed_linears
from src.models.devices import is_out_of_memory
from src.models.engine import fitted, refuse_unsupported
from src.models.generation import Row, decode_steps
from src.models.language_model import LanguageModel
from src.models.types import GenerationRequest, GenerationResult

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class _Stopped(Exception):
    """Somebody stopped the answer; never leaves this module."""


def stream(
    model: LanguageModel,
    requests: Sequence[GenerationRequest],
    *,
    on_token: Callable[[str, int, float], None],
    should_stop: Callable[[], bool] = lambda: False,
    top_k: int = 5,
) -> list[GenerationResult]:
    """
    Continue the requests together in this thread; returns their results in order, those of rows that were stopped with
    the tokens they had and the finish reason `interrupted`.

    on_token: request id, token id and entropy (nats) of each token as it is made, end-of-sequence tokens left out.
    should_stop: asked before every decoder layer, so that reading a long prompt can be stopped too; nothing is computed
    after it was true, since there is no other thread. Raises what `LanguageModel.generate` raises.
    """
    refuse_unsupported(requests, model.context_length, no_captures="answers that are streamed keep none")
    rows: dict[str, Row] = {}
    reasons: dict[str, str] = {}
    requests = [fitted(request, model.context_length) for request in requests]
    with closing(stoppable_steps(model, requests, should_stop=should_stop, top_k=top_k)) as steps:
        for taking_part, ended in steps:
            rows |= {row.request.id: row for row in taking_part}
            reasons |= {row.request.id: reason for row, reason in ended}
            for row in taking_part:
                if reasons.get(row.request.id) != "stop":
                    on_token(row.request.id, row.tokens[-1], row.entropy[-1])
    return [_result(model, request, rows, reasons) for request in requests]


def stoppable_steps(
    model: LanguageModel,
    requests: Sequence[GenerationRequest],
    *,
    should_stop: Callable[[], bool],
    is_wanted: Callable[[str], bool] = lambda request_id: True,
    top_k: int = 5,
) -> Iterator[tuple[list[Row], list[tuple[Row, str]]]]:
    """
    `decode_steps` of requests that fit the context, up to where `should_stop` says yes, which is asked before every
    decoder layer. Raises InputError where memory runs out, and what `decode_steps` raises.
    """
    with torch.inference_mode(), packed_linears(model.model), _asking(model.model, should_stop):
        steps = decode_steps(
            model.model, requests, eos_ids=model.eos_ids, pad_id=model.pad_id, k=top_k, is_wanted=is_wanted
        )
        with closing(steps):
            yield from _until_stopped(steps)


def _until_stopped(steps: Iterator) -> Iterator:
    try:
        yield from steps
    except _Stopped:
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise InputError("out of memory; a shorter conversation or answer, another dtype or device") from error


@contextmanager
def _asking(model: nn.Module, should_stop: Callable[[], bool]) -> Iterator[None]:
    """Within the context every decoder layer first asks, and the forward pass ends where the answer is yes."""

    def ask(*_: object) -> None:
        if should_stop():
            raise _Stopped

    handles = [layer.register_forward_pre_hook(ask) for layer in decoder_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _result(
    model: LanguageModel, request: GenerationRequest, rows: dict[str, Row], reasons: dict[str, str]
) -> GenerationResult:
    reason = reasons.get(request.id, "interrupted")
    if request.id in rows:
        return model.result(rows[request.id], reason)
    return GenerationResult(id=request.id, token_ids=(), text="", entropy=(), top_k_mass=(), finish_reason=reason)


class TextStream:
    """
    The text of tokens as they come: pieces that together are what `LanguageModel.decode` makes of all tokens.

    Text is held back while its last character is unfinished. Only a window of tokens is decoded anew at each step: the
    tokens of the last piece, since a tokenizer may write a token otherwise at the beginning than behind another.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._begin = 0
        self._told = 0

    def add(self, token: int) -> str:
        """The text that is new with this token; empty when its last character is still unfinished."""
        self._tokens.append(token)
        known, now = self._window()
        if len(now) <= len(known) or now.endswith(UNFINISHED):
            return ""
        self._begin, self._told = self._told, len(self._tokens)
        return now[len(known) :]

    def rest(self) -> str:
        """What is held back, unfinished characters as U+FFFD."""
        known, now = self._window()
        self._begin = self._told = len(self._tokens)
        return now[len(known) :]

    def _window(self) -> tuple[str, str]:
        return self._decode(self._tokens[self._begin : self._told]), self._decode(self._tokens[self._begin :])
