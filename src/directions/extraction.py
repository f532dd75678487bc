"""Hidden states of all examples on disk: what is there is kept, what is missing is run."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from src.common.errors import InputError
from src.common.progress import Progress
from src.directions.settings import DirectionSettings
from src.directions.source import Source
from src.models import residuals
from src.models.devices import FREE_MEMORY_SHARE, free_memory
from src.models.engine import bounded_context
from src.models.language_model import LanguageModel
from src.models.residual_store import LayerReader, ResidualStore
from src.models.token_sequences import TokenPosition, TokenSequence

COPIES = 6
"""Of one layer's float32 rows that are held at once: float64 ones of both classes, factors, one of a shuffle."""
SEQUENCES_AT_ONCE = 256
"""Sequences in one step of vLLM, whose tokens are bounded too."""


def extract_all(
    config: DirectionSettings,
    facts: dict[str, Any],
    sequences: Sequence[TokenSequence],
    layers: Sequence[int],
    folder: Path,
    record: Callable[..., None],
) -> LayerReader:
    """
    The rows of every sequence at every layer, kept in `folder`; the model is loaded only where some are missing.

    facts: the model's, its `backend` being the one to run on. record: called with those of the engine that ran. Raises
    InputError as `residuals.extract` does, and when `folder` holds rows of another model, position or backend.
    """
    settings = {
        "model_fingerprint": facts["model_fingerprint"],
        "adapter_fingerprint": facts["adapter_fingerprint"],
        "dtype": facts["dtype"],
        "quantization": config.quantization,
        "backend": facts["backend"],
        "layers": list(layers),
        "hook_point": config.hook_point,
        "token_position": config.token_position,
    }
    with ResidualStore(folder, settings) as store:
        missing = list(store.missing(sequences))
        if missing:
            n_done = len(sequences) - len(missing)
            with _reader(config, facts["backend"], record) as extract, Progress(len(sequences), n_done) as progress:

                def keep(ids: tuple[str, ...], rows: Any) -> None:
                    store.add(ids, rows)
                    for _ in ids:
                        progress.add_row()

                extract(
                    missing, layers=layers, position=config.token_position, hook_point=config.hook_point, on_rows=keep,
                    on_tokens=progress.add_tokens,
                )  # fmt: skip
        store.finish()
    return LayerReader(folder)


@contextlib.contextmanager
def _reader(config: DirectionSettings, backend: str, record: Callable[..., None]) -> Iterator[Callable[..., None]]:
    """`residuals.extract`, or its like on vLLM, bound to the model, which is loaded; `record` gets its facts."""
    if backend == "hf":
        model = LanguageModel.load(config)
        model.context_length = bounded_context(config, model.context_length)
        record(**model.facts)
        at_once = config.tokens_per_batch or residuals.TOKENS_PER_BATCH
        yield partial(residuals.extract, model, tokens_per_batch=at_once)
        return
    from src.models import vllm_residuals
    from src.models.vllm_engine import VLLMEngine

    # Compiled, a model keeps no hidden states.
    settings: dict[str, Any] = {"enforce_eager": True, "batch_size": SEQUENCES_AT_ONCE}
    if config.tokens_per_batch:
        at_once = config.tokens_per_batch
        settings |= {"max_num_batched_tokens": at_once, "batch_size": min(at_once, SEQUENCES_AT_ONCE)}
    with VLLMEngine.load(config, **settings) as engine:
        record(**engine.facts)
        yield partial(vllm_residuals.extract, engine)


def refuse_same_tokens(sequences: Sequence[TokenSequence], position: str) -> None:
    """
    Raises InputError when a target and a control are the same to the model up to where they are read: a text cut to
    the same end, or a run's row asked in the same words.
    """
    n_run = TokenPosition(position).n_run
    sides: dict[str, list[TokenSequence]] = {}
    for sequence in sequences:
        sides.setdefault(sequence.id.split(":", 1)[0], []).append(sequence)
    seen = {sequence.token_ids[: n_run(sequence)]: sequence.id for sequence in sides["target"]}
    for sequence in sides["control"]:
        same = seen.get(sequence.token_ids[: n_run(sequence)])
        if same is not None:
            raise InputError(
                f"{sequence.id!r} and {same!r} are the same tokens to the model, one a control and one a target; leave "
                f"one out, or raise --max_prompt_tokens if they were cut"
            )


def refuse_too_many(n: int, d_model: int) -> None:
    """
    Raises InputError when the rows of one layer and what estimators make of them do not fit in memory: n examples,
    each of width d_model. One layer is held at a time, so the number of layers does not count.
    """
    needed = COPIES * n * d_model * 4 + 3 * 8 * min(n, d_model) * n
    free = FREE_MEMORY_SHARE * free_memory(_cpu())
    if needed > free:
        most = int(n * free / needed)
        raise InputError(
            f"{n} examples need about {needed / 2**30:.1f} GiB for one layer, and {free / 2**30:.1f} may be taken; "
            f"give --num_tasks so that there are at most about {most}"
        )


def refuse_too_many_directions(source: Source, d_model: int) -> None:
    """
    Raises InputError when --n_directions or --n_preserve is more than so many rows can determine, before they are made.
    """
    config, contrast = source.config, source.contrast
    n_target, n_control = (source.n_fitted(side) for side in (contrast.target, contrast.control))
    if config.method == "cones":
        most = n_target
    else:
        most = n_target if contrast.paired else n_target + n_control - 1
    _refuse_more(f"--n_directions {config.n_directions}", config.n_directions, min(most, d_model))
    if source.preserve:
        most = len(source.preserve) + len(source.against) - 1
        _refuse_more(f"--n_preserve {config.n_preserve}", config.n_preserve, min(most, d_model))


def _refuse_more(what: str, wanted: int, most: int) -> None:
    if wanted > most:
        raise InputError(f"{what}: more than the examples to fit on determine; expected at most {most}")


def _cpu() -> Any:
    import torch

    return torch.device("cpu")
