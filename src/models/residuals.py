"""
Hidden states of a causal language model, read by hooks and reduced where they are made.

Nothing but what was asked for is kept, and nothing above the deepest layer asked for is run, the unembedding least of
all. Rows of a batch are padded on the right, where causality keeps the padding out of every number: a token is computed
from those before it alone.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from src.common.errors import InputError
from src.models.architectures import decoder_layers
from src.models.cpu_linear import onednn_linears
from src.models.devices import halved, is_out_of_memory
from src.models.generation import needs_equal_lengths
from src.models.hooks import reading
from src.models.language_model import LanguageModel
from src.models.loading import context_length
from src.models.residual_checks import Bounds, OnRows, checked, refuse_not_finite, wanted_places
from src.models.token_sequences import TokenPosition, TokenSequence, in_windows, next_batch, right_padded

TOKENS_PER_BATCH = 2048
"""Padded tokens run at once: enough to keep two CPU cores or a small GPU busy, little memory beside the weights."""
BATCHES_HELD = 64
"""Sequences of about so many batches are held at a time, and sorted by length among themselves."""


def extract(
    model: nn.Module | LanguageModel,
    sequences: Iterable[TokenSequence],
    *,
    layers: Sequence[int],
    position: str,
    on_rows: OnRows,
    hook_point: str = "resid_post",
    tokens_per_batch: int = TOKENS_PER_BATCH,
    on_tokens: Callable[[int], None] = lambda n: None,
) -> None:
    """
    Stream hidden states to `on_rows(ids, rows)`: `rows` is float32 (len(ids), len(layers), d_model) on the CPU, with
    the layers in the order given. Sequences come in no fixed order. Only some batches of them are held at a time: when
    `sequences` is a generator, memory does not grow with their number but for their ids.

    layers: from 0; layer i's `resid_post` is the output of decoder block i, the last one's too (never after the final
    norm). hook_point: resid_pre, resid_post, attn_out or mlp_out, as in `hooks`. position:
    - `last_prompt`, the prompt's last token; `token:-k`, its k-th from the end (`token:-1` is `last_prompt`)
    - `mean_prompt`: the mean over the sequence's `text_span`, or over the whole prompt where it has none; the first
      token's norm then outweighs all others in many models (massive activations, Sun et al. 2024)
    - `mean_response`: the mean over the response's tokens, special ones included; both means are summed in float32
    - `all`: every token of prompt and response; `on_rows` is then called once a sequence, with one id and its rows
      (tokens, len(layers), d_model)
    tokens_per_batch: padded tokens at once, halved when memory runs out; a longer sequence goes alone. A row depends on
    it and on batch mates only by the rounding of the model's dtype (float32: below 1e-5 of the row's norm).
    on_tokens: called after each batch with the number of tokens it ran, padding not counted.

    Raises InputError for a layer, hook point or position that is not there, an id twice, an empty response, a token id
    outside the vocabulary, more tokens than the context, hidden states that are not finite, memory that does not
    suffice for one sequence, and a model in training mode. A list is checked whole before any of it is run.
    """
    limit = model.context_length if isinstance(model, LanguageModel) else context_length(model.config)
    model = model.model if isinstance(model, LanguageModel) else model
    reader = _Reader(model, layers, hook_point, TokenPosition(position))
    if tokens_per_batch < 1:
        raise InputError(f"{tokens_per_batch} tokens a batch; expected at least 1")
    stated = f"the model's context {limit}; cut it or take a model with a longer context"
    bounds = Bounds(limit, stated, model.get_input_embeddings().weight.shape[0])
    found = checked(sequences, reader.n_run, bounds)
    equal_lengths = needs_equal_lengths(model)
    for queue in in_windows(found, BATCHES_HELD * tokens_per_batch):
        queue.sort(key=reader.n_run, reverse=True)
        while queue:
            batch = next_batch(queue, reader.n_run, tokens_per_batch=tokens_per_batch, equal_lengths=equal_lengths)
            rows = _unless_out_of_memory(reader.rows, batch)
            if rows is None:
                tokens_per_batch = _smaller_budget(batch, reader)
                continue
            del queue[: len(batch)]
            counts = reader.row_counts(batch)
            refuse_not_finite([s.id for s in batch], rows, counts, reader.places, model.dtype)
            _deliver(batch, rows, counts, on_rows, one_by_one=reader.position.is_all)
            on_tokens(sum(map(reader.n_run, batch)))


class _Reader:
    """Runs batches and reads them: some layers at one hook point and one token position."""

    def __init__(self, model: nn.Module, layers: Sequence[int], hook_point: str, position: TokenPosition) -> None:
        self.places = wanted_places(layers, hook_point, len(decoder_layers(model)))
        if model.training:
            raise InputError("the model is in training mode, where dropout changes its numbers; call model.eval()")
        self.model = model
        self.position = position
        self.n_run = position.n_run
        self.device = model.get_input_embeddings().weight.device
        self.d_model = model.config.get_text_config(decoder=True).hidden_size

    def row_counts(self, batch: Sequence[TokenSequence]) -> list[int]:
        """Rows that each sequence gives."""
        return [self.n_run(sequence) if self.position.is_all else 1 for sequence in batch]

    def rows(self, batch: Sequence[TokenSequence]) -> Tensor:
        """float32 (rows, layers, d_model) on the CPU, the sequences' rows one after the other."""
        ids, mask = right_padded([s.token_ids[: self.n_run(s)] for s in batch], self.device)
        reduce = _reduction([self.position.span(s) for s in batch], self.position, ids)
        # Every token of every layer would fill the device: there these leave it layer by layer.
        home = torch.device("cpu") if self.position.is_all else self.device
        shape = (sum(self.row_counts(batch)), len(self.places), self.d_model)
        # NaN where nothing is written: should a layer be missed, that is refused as not finite.
        rows = torch.full(shape, torch.nan, dtype=torch.float32, device=home)

        def into(column: int) -> Callable[[Tensor], None]:
            def keep(hidden: Tensor) -> None:
                expected = (*ids.shape, self.d_model)
                assert hidden.shape == expected, f"hidden states are {tuple(hidden.shape)}, expected {expected}"
                rows[:, column] = reduce(hidden).to(home)

            return keep

        callbacks = {place: into(column) for column, place in enumerate(self.places)}
        blocks = decoder_layers(self.model)
        deepest = max(self.places)
        with (
            torch.inference_mode(),
            onednn_linears(blocks),
            reading(self.model, callbacks),
            _stop_at(blocks[deepest.layer], deepest.hook_point),
        ):
            self.model(input_ids=ids, attention_mask=mask, use_cache=False)
        return rows.cpu()


def _reduction(spans: Sequence[tuple[int, int]], position: TokenPosition, ids: Tensor) -> Callable[[Tensor], Tensor]:
    """What turns hidden states (sequences, positions, d_model) into rows (rows, d_model)."""
    starts, ends = torch.tensor(spans, device=ids.device).T
    if not position.is_mean and not position.is_all:
        index = torch.arange(len(spans), device=ids.device)
        return lambda hidden: hidden[index, starts]
    columns = torch.arange(ids.shape[1], device=ids.device)
    inside = (columns >= starts[:, None]) & (columns < ends[:, None])
    if position.is_all:
        return lambda hidden: hidden[inside]

    def mean(hidden: Tensor) -> Tensor:
        # `where` and not a product: a padding token's NaN or infinity must not reach the sum.
        total = torch.where(inside[:, :, None], hidden, 0).sum(dim=1, dtype=torch.float32)
        return total / (ends - starts)[:, None]

    return mean


class _Stop(Exception):
    """The deepest layer asked for has been read."""


@contextlib.contextmanager
def _stop_at(layer: nn.Module, hook_point: str) -> Iterator[None]:
    """Within the context a forward pass ends at `layer`, after the hooks that were there before."""

    def stop(*_: object) -> None:
        raise _Stop

    before = hook_point == "resid_pre"
    handle = layer.register_forward_pre_hook(stop) if before else layer.register_forward_hook(stop)
    try:
        with contextlib.suppress(_Stop):
            yield
    finally:
        handle.remove()


def _unless_out_of_memory(run: Callable[[list[TokenSequence]], Tensor], batch: list[TokenSequence]) -> Tensor | None:
    """None when memory ran out; outside the handler, so that no traceback holds the batch's tensors any more."""
    try:
        return run(batch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None


def _smaller_budget(batch: list[TokenSequence], reader: _Reader) -> int:
    longest = reader.n_run(batch[0])
    if len(batch) == 1:
        raise InputError(
            f"out of memory with sequence {batch[0].id!r} alone, of {longest} tokens; cut it, ask for fewer layers, or "
            f"take a smaller model, dtype or another device"
        )
    return longest * halved(len(batch), "sequences", reader.device)


def _deliver(
    batch: Sequence[TokenSequence], rows: Tensor, counts: Sequence[int], on_rows: OnRows, *, one_by_one: bool
) -> None:
    if not one_by_one:
        on_rows(tuple(sequence.id for sequence in batch), rows)
        return
    for sequence, part in zip(batch, rows.split(counts), strict=True):
        on_rows((sequence.id,), part)
