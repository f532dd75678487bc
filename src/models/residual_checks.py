"""What is refused wherever hidden states are read: places, sequences and numbers that cannot be."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from src.common.directions_file import HOOK_POINTS
from src.common.errors import InputError
from src.models.hooks import Location
from src.models.token_sequences import TokenSequence

OnRows = Callable[[tuple[str, ...], Tensor], None]


class Bounds(NamedTuple):
    """What a model can run."""

    n_tokens: int | None
    """Of one sequence at most; None for no bound."""
    stated: str
    """The bound and its remedy, for who exceeds it."""
    vocabulary: int


def wanted_places(layers: Sequence[int], hook_point: str, n_layers: int) -> tuple[Location, ...]:
    """The layers' places in the order given. Raises InputError for one that is not there, or there twice."""
    absent = [layer for layer in layers if not 0 <= layer < n_layers]
    if absent or not layers or len(set(layers)) < len(layers):
        what = f"layer {absent[0]}" if absent else f"layers {list(layers)}"
        raise InputError(f"{what}: expected each once, and of the model's layers 0 to {n_layers - 1}")
    if hook_point not in HOOK_POINTS:
        raise InputError(f"hook point {hook_point!r}: expected one of {', '.join(HOOK_POINTS)}")
    return tuple(Location(layer, hook_point) for layer in layers)


def checked(
    sequences: Iterable[TokenSequence], n_run: Callable[[TokenSequence], int], bounds: Bounds
) -> Iterator[TokenSequence]:
    """
    The sequences, a list checked whole at once. n_run: how many tokens of each are run. Raises InputError for an id
    twice, more tokens than the bound and a token id outside the vocabulary.
    """
    found = _one_by_one(sequences, n_run, bounds)
    return iter(list(found)) if isinstance(sequences, Sequence) else found


def _one_by_one(
    sequences: Iterable[TokenSequence], n_run: Callable[[TokenSequence], int], bounds: Bounds
) -> Iterator[TokenSequence]:
    seen: set[str] = set()
    for sequence in sequences:
        if sequence.id in seen:
            raise InputError(f"sequence {sequence.id!r} is there twice; expected each id once")
        seen.add(sequence.id)
        if bounds.n_tokens and n_run(sequence) > bounds.n_tokens:
            raise InputError(f"sequence {sequence.id!r} has {n_run(sequence)} tokens to run and {bounds.stated}")
        low, high = min(sequence.token_ids), max(sequence.token_ids)
        if low < 0 or high >= bounds.vocabulary:
            raise InputError(
                f"sequence {sequence.id!r} has the token id {low if low < 0 else high}; expected 0 to "
                f"{bounds.vocabulary - 1}: take the model's own tokenizer"
            )
        yield sequence


def refuse_not_finite(
    ids: Sequence[str], rows: Tensor, counts: Sequence[int], places: Sequence[Location], dtype: object
) -> None:
    """
    Raises InputError that names the first sequence and layer with NaN or infinity. rows: (rows, places, d_model), of
    which each of the ids has `counts`. dtype: the model's.
    """
    finite = rows.isfinite().all(dim=2)
    if finite.all():
        return
    row, column = (~finite).nonzero()[0].tolist()
    owners = [i for i, count in zip(ids, counts, strict=True) for _ in range(count)]
    raise InputError(
        f"sequence {owners[row]!r}: its hidden states at layer {places[column].layer} ({places[column].hook_point}) "
        f"are not finite (dtype {dtype}); try --dtype float32, and check the weights"
    )
