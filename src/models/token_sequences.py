"""Prompts and responses as token ids: which of their tokens are read, and which sequences run together."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from src.common.errors import InputError

TOKEN_POSITIONS = "last_prompt, mean_prompt, mean_response, all, or token:-k (the k-th from the prompt's end)"


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """A prompt, with its response if there is one, as token ids."""

    id: str
    """Names the sequence; unique among those extracted together."""
    token_ids: tuple[int, ...]
    """Prompt and response, special tokens included; never retokenized."""
    prompt_length: int
    """How many of the tokens are the prompt's; the rest is the response."""
    text_span: tuple[int, int] | None = None
    """[start, end) of the prompt's tokens that are the user's own text, which `mean_prompt` is over; None is all of the
    prompt, where the first token, whose norm is a hundred times the others' in many models, makes up the mean."""

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_length <= len(self.token_ids):
            raise InputError(
                f"sequence {self.id!r}: a prompt of {self.prompt_length} tokens in a sequence of "
                f"{len(self.token_ids)}; expected at least one, and no more than the sequence has"
            )
        if self.text_span is not None and not 0 <= self.text_span[0] < self.text_span[1] <= self.prompt_length:
            raise InputError(
                f"sequence {self.id!r}: a text_span of {self.text_span} in a prompt of {self.prompt_length} tokens; "
                f"expected at least one token, and no more than the prompt has"
            )


@dataclass(frozen=True)
class TokenPosition:
    """Which tokens of a sequence are read. Raises InputError for a name that is none of TOKEN_POSITIONS."""

    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"last_prompt|mean_prompt|mean_response|all|token:-[1-9][0-9]*", self.name):
            raise InputError(f"token position {self.name!r}; expected {TOKEN_POSITIONS}")

    @property
    def is_mean(self) -> bool:
        return self.name.startswith("mean_")

    @property
    def is_all(self) -> bool:
        return self.name == "all"

    def span(self, sequence: TokenSequence) -> tuple[int, int]:
        """[start, end) of the tokens that are read. Raises InputError when the sequence has none there."""
        prompt, end = sequence.prompt_length, len(sequence.token_ids)
        match self.name:
            case "all":
                return 0, end
            case "mean_prompt":
                return sequence.text_span or (0, prompt)
            case "mean_response":
                if prompt == end:
                    raise InputError(
                        f"sequence {sequence.id!r} has no response token, so there is no mean_response; leave it out"
                    )
                return prompt, end
        k = 1 if self.name == "last_prompt" else int(self.name.removeprefix("token:-"))
        if k > prompt:
            raise InputError(
                f"sequence {sequence.id!r}: its prompt has {prompt} tokens, so there is no {self.name}; "
                f"leave it out or take a k of at most {prompt}"
            )
        return prompt - k, prompt - k + 1

    def n_run(self, sequence: TokenSequence) -> int:
        """How many tokens have to be run: what comes after the prompt changes nothing in it."""
        return max(sequence.prompt_length, self.span(sequence)[1])


def in_windows(sequences: Iterable[TokenSequence], n_tokens: int) -> Iterator[list[TokenSequence]]:
    """The sequences in lists of about `n_tokens` tokens each, in order."""
    window: list[TokenSequence] = []
    held = 0
    for sequence in sequences:
        window.append(sequence)
        held += len(sequence.token_ids)
        if held >= n_tokens:
            yield window
            window, held = [], 0
    if window:
        yield window


def next_batch(
    queue: Iterable[TokenSequence],
    n_run: Callable[[TokenSequence], int],
    *,
    tokens_per_batch: int,
    equal_lengths: bool,
) -> list[TokenSequence]:
    """
    The first sequences of a queue, longest first, that make at most `tokens_per_batch` tokens with their padding; at
    least one. equal_lengths: only those as long as the first.
    """
    batch: list[TokenSequence] = []
    for sequence in queue:
        longest = n_run(batch[0]) if batch else n_run(sequence)
        is_other = equal_lengths and n_run(sequence) != longest
        if batch and (is_other or (len(batch) + 1) * longest > tokens_per_batch):
            break
        batch.append(sequence)
    return batch


def right_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both int64 (rows, longest); the mask is 0 on the padding, which stands on the right."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, : len(prompt)] = torch.tensor(prompt)
        mask[i, : len(prompt)] = 1
    return ids.to(device), mask.to(device)
