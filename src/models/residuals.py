"""
Hidden states of a causal language model, read by hooks and reduced where they are made.

Nothing but what was asked for is kept, and nothing above the deepest layer asked for is run, the unembedding least of
all. Rows of a batch are padded on the right, where causality keeps the padding out of every number: a token is computed
from those before it alone.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from src.common.directions_file import HOOK_POINTS
from src.common.errors import InputError
from src.models.architectures import decoder_layers
from src.models.devices import is_out_of_memory
from src.models.generation import needs_equal_lengths
from src.models.hooks import reading
from src.models.language_model import LanguageModel
from src.models.loading import context_length
from src.models.token_sequences import TokenPosition, TokenSequence, in_windows, next_batch, right_padded

LOGGER = logging.getLogger(__name__)

TOKENS_PER_BATCH = 2048
"""Padded tokens run at once: enough to keep two CPU cores or a small GPU busy, little memory beside the weights."""
BATCHES_HELD = 64
"""Sequences of about so many batches are held at a time, and sorted by length among themselves."""

OnRows = Callable[[tuple[str, ...], Tensor], None]


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
    model = model.model if isinstance(model, LanguageModel) else model
    reader = _Reader(model, layers, hook_point, TokenPosition(position))
    if tokens_per_batch < 1:
        raise InputError(f"{tokens_per_batch} tokens a batch; expected at least 1")
    checked = _checked(model, sequences, reader.n_run)
    if isinstance(sequences, Sequence):
        checked = iter(list(checked))
    equal_lengths = needs_equal_lengths(model)
    for queue in in_windows(checked, BATCHES_HELD * tokens_per_batch):
        queue.sort(key=reader.n_run, reverse=True)
        while queue:
            batch = next_batch(queue, reader.n_run, tokens_per_batch=tokens_per_batch, equal_lengths=equal_lengths)
            rows = _unless_out_of_memory(reader.rows, batch)
            if rows is None:
                tokens_per_batch = _smaller_budget(batch, reader)
                continue
            del queue[: len(batch)]
            reader.refuse_not_finite(batch, rows)
            _deliver(batch, rows, reader.row_counts(batch), on_rows, one_by_one=reader.position.is_all)
            on_tokens(sum(map(reader.n_run, batch)))


class _Reader:
    """Runs batches and reads them: some layers at one hook point and one token position."""

    def __init__(self, model: nn.Module, layers: Sequence[int], hook_point: str, position: TokenPosition) -> None:
        n_layers = len(decoder_layers(model))
        absent = [layer for layer in layers if not 0 <= layer < n_layers]
        if absent or not layers or len(set(layers)) < len(layers):
            what = f"layer {absent[0]}" if absent else f"layers {list(layers)}"
            raise InputError(f"{what}: expected each once, and of the model's layers 0 to {n_layers - 1}")
        if hook_point not in HOOK_POINTS:
            raise InputError(f"hook point {hook_point!r}: expected one of {', '.join(HOOK_POINTS)}")
        if model.training:
            raise InputError("the model is in training mode, where dropout changes its numbers; call model.eval()")
        self.model = model
        self.layers = tuple(layers)
        self.hook_point = hook_point
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
        shape = (sum(self.row_counts(batch)), len(self.layers), self.d_model)
        # NaN where nothing is written: should a layer be missed, that is refused as not finite.
        rows = torch.full(shape, torch.nan, dtype=torch.float32, device=home)

        def into(column: int) -> Callable[[Tensor], None]:
            def keep(hidden: Tensor) -> None:
                expected = (*ids.shape, self.d_model)
                assert hidden.shape == expected, f"hidden states are {tuple(hidden.shape)}, expected {expected}"
                rows[:, column] = reduce(hidden).to(home)

            return keep

        callbacks = {(layer, self.hook_point): into(column) for column, layer in enumerate(self.layers)}
        blocks = decoder_layers(self.model)
        with (
            torch.inference_mode(),
            _onednn_linears(blocks),
            reading(self.model, callbacks),
            _stop_at(blocks[max(self.layers)], self.hook_point),
        ):
            self.model(input_ids=ids, attention_mask=mask, use_cache=False)
        return rows.cpu()

    def refuse_not_finite(self, batch: Sequence[TokenSequence], rows: Tensor) -> None:
        """Raises InputError that names the first sequence and layer with NaN or infinity."""
        finite = rows.isfinite().all(dim=2)
        if finite.all():
            return
        row, column = (~finite).nonzero()[0].tolist()
        owners = [s.id for s, count in zip(batch, self.row_counts(batch), strict=True) for _ in range(count)]
        raise InputError(
            f"sequence {owners[row]!r}: its hidden states at layer {self.layers[column]} ({self.hook_point}) are not "
            f"finite (dtype {self.model.dtype}); try --dtype float32, and check the weights"
        )


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


def _checked(
    model: nn.Module, sequences: Iterable[TokenSequence], n_run: Callable[[TokenSequence], int]
) -> Iterator[TokenSequence]:
    limit, vocabulary = context_length(model.config), model.get_input_embeddings().weight.shape[0]
    seen: set[str] = set()
    for sequence in sequences:
        if sequence.id in seen:
            raise InputError(f"sequence {sequence.id!r} is there twice; expected each id once")
        seen.add(sequence.id)
        if limit and n_run(sequence) > limit:
            raise InputError(
                f"sequence {sequence.id!r} has {n_run(sequence)} tokens to run and the model's context {limit}; "
                f"cut it or take a model with a longer context"
            )
        low, high = min(sequence.token_ids), max(sequence.token_ids)
        if low < 0 or high >= vocabulary:
            raise InputError(
                f"sequence {sequence.id!r} has the token id {low if low < 0 else high}; expected 0 to "
                f"{vocabulary - 1}: take the model's own tokenizer"
            )
        yield sequence


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


@contextlib.contextmanager
def _onednn_linears(layers: nn.ModuleList) -> Iterator[None]:
    """
    Within the context, float32 `nn.Linear` modules on the CPU compute through oneDNN where PyTorch would take MKL,
    which is slow on AMD processors.

    Unlike `packed_linears`, which is for steps of few tokens, there is no packed copy of the weights: for thousands of
    tokens at once, laying them out anew each time costs nothing that can be measured.
    """
    linears = [m for m in layers.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
    linears = [m for m in linears if m.weight.device.type == "cpu" and m.weight.dtype == torch.float32]
    if not torch.backends.mkldnn.is_available():
        linears = []
    for linear in linears:
        linear.forward = _OneDnnLinear(linear)
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


class _OneDnnLinear:
    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.linear.weight, self.linear.bias, "none", [], "")


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
    if reader.device.type == "cuda":
        torch.cuda.empty_cache()
    LOGGER.warning("Out of memory with %d sequences at once; going on with %d", len(batch), len(batch) // 2)
    return longest * (len(batch) // 2)


def _deliver(
    batch: Sequence[TokenSequence], rows: Tensor, counts: Sequence[int], on_rows: OnRows, *, one_by_one: bool
) -> None:
    if not one_by_one:
        on_rows(tuple(sequence.id for sequence in batch), rows)
        return
    for sequence, part in zip(batch, rows.split(counts), strict=True):
        on_rows((sequence.id,), part)
