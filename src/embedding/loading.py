"""From a dataset to shards that are ready to embed: read, choose, extract, find equal texts, tokenize."""

from collections.abc import Callable, Iterator, Sequence

from src.common.errors import InputError
from src.embedding.reading import Source
from src.embedding.records import Piece, Shard
from src.embedding.settings import EmbedSettings
from src.embedding.texts import read_texts, text_field

Pieces = Callable[[Sequence[str]], list[Piece]]


def first_text_field(source: Source, settings: EmbedSettings) -> str:
    """The field that holds the text, by the first row. Raises InputError for an empty dataset or a missing field."""
    first = source.open().take(1)
    if not first:
        raise InputError(f"--dataset_path {settings.dataset_path}: no rows in it; expected at least one")
    return text_field(first[0], settings)


def rows_of_shard(settings: EmbedSettings, start: int) -> int:
    """How many rows of the dataset the shard from row `start` on holds at most."""
    left = settings.rows_per_shard if settings.num_rows is None else settings.num_rows - start
    return min(settings.rows_per_shard, left)


def load_shards(
    source: Source, settings: EmbedSettings, pieces_of: Pieces, is_wanted: Callable[[int], bool]
) -> Iterator[Shard]:
    """The wanted shards in order, tokenized; the rows of the others are passed over. Raises InputError for bad rows."""
    stream = source.open()
    index = start = 0
    while (count := rows_of_shard(settings, start)) > 0 and not stream.is_at_end():
        if not is_wanted(index):
            start += stream.skip(count)
        else:
            rows = stream.take(count)
            texts, bad, sampled_out = read_texts(rows, start, settings)
            stop = start + len(rows)
            is_last = rows_of_shard(settings, stop) <= 0 or stream.is_at_end()
            shard = Shard(
                index=index, row_start=start, row_stop=stop, is_last=is_last, rows=texts, bad_rows=bad,
                sampled_out=sampled_out,
            )  # fmt: skip
            start = stop
            _add_pieces(shard, settings.dedup, pieces_of)
            yield shard
        index += 1


def _add_pieces(shard: Shard, dedup: bool, pieces_of: Pieces) -> None:
    numbers: dict[str, int] = {}
    for row in shard.rows:
        number = numbers.setdefault(row.text, len(shard.texts)) if dedup else len(shard.texts)
        if number == len(shard.texts):
            shard.texts.append(row.text)
        shard.text_of_row.append(number)
    shard.pieces = pieces_of(shard.texts)
