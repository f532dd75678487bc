"""
A planted organism as a folder: a whole model with the terms in its weights, `organism.json`, which says what was
planted and measured, `truth/organism_directions.safetensors`, and `held_out/`, the prompts of each kind
that were not trained on, for whatever is to be measured on the organism.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.abliteration.organism import Organism, Topic, acting, edits_of
from src.abliteration.organism_model import feed_forward_writer
from src.common.directions_file import Directions, DirectionsMetadata, write_directions
from src.common.errors import CheckFailed, InputError
from src.common.files import safe_name, write_json_atomic
from src.common.jsonl import round_measured, write_jsonl_atomic
from src.common.model_config import ModelConfigBase
from src.models.fingerprint import fingerprint
from src.models.language_model import LanguageModel
from src.models.weight_editor import bake

JSON_NAME = "organism.json"
DIRECTIONS_PATH = "truth/organism_directions.safetensors"
"""Not beside the weights: there it would count among them, for the fingerprint and for vLLM."""
HELD_OUT = "held_out"
TOLERANCE = 1e-3
"""Largest difference of a log-probability (nats) between the saved organism and the base with the terms in hooks."""


def write_organism(folder: Path, model: LanguageModel, organism: Organism, model_id: str) -> None:
    """
    Write the organism; the folder appears whole. `model` is the base it was planted in, and stays as it is; model_id:
    what the base was loaded by, for the record.

    Raises InputError as `refuse_unwritable` does, CheckFailed when the saved model answers otherwise than the base
    with the terms.
    """
    refuse_unwritable(folder, organism.topics)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch) / "model"
        with _baked(model, organism):
            model.model.save_pretrained(made)
            model.tokenizer.save_pretrained(made)
        _check(model, organism, made)
        (made / DIRECTIONS_PATH).parent.mkdir()
        write_directions(made / DIRECTIONS_PATH, _directions(model, organism, made))
        (made / HELD_OUT).mkdir()
        for name, prompts in organism.held_out.items():
            rows = ({"id": prompt.id, "prompt": prompt.text} for prompt in prompts)
            write_jsonl_atomic(made / HELD_OUT / f"{safe_name(name)}.jsonl", rows)
        write_json_atomic(made / JSON_NAME, _description(model, organism, model_id))
        made.rename(folder)


def refuse_unwritable(folder: Path, topics: Sequence[Topic]) -> None:
    """
    Raises InputError when the folder exists, and unless each layer that holds topics holds as many as the others: a
    directions file has one k.
    """
    if folder.exists():
        raise InputError(f"{folder}: is there already; remove it or name another folder")
    counts = Counter(topic.layer for topic in topics)
    if len(set(counts.values())) > 1:
        raise InputError(f"topics by layer are {dict(counts)}; expected as many on each layer as on the others")


@contextmanager
def _baked(model: LanguageModel, organism: Organism) -> Iterator[None]:
    """Within the context the terms are in the model's weights; afterwards every bit is as before."""
    writers = [feed_forward_writer(model.model, layer).writer for layer in {t.layer for t in organism.topics}]
    before = [writer.weight.detach().clone() for writer in writers]
    try:
        bake(model.model, edits_of(model, organism.topics, organism.terms), ("mlp",))
        yield
    finally:
        with torch.no_grad():
            for writer, weight in zip(writers, before, strict=True):
                writer.weight.copy_(weight)


@torch.no_grad()
def _check(model: LanguageModel, organism: Organism, made: Path) -> None:
    dtype = str(model.model.dtype).removeprefix("torch.")
    config = ModelConfigBase(model_id=str(made), output_dir=made, dtype=dtype, device="cpu")
    saved = LanguageModel.load(config)
    text = " ".join(topic.prompts[0].text for topic in organism.topics)
    ids = torch.tensor([model.tokenizer(text, add_special_tokens=False).input_ids])
    with acting(model, organism.topics, organism.terms):
        expected = model.model(ids.to(model.device)).logits.cpu().float().log_softmax(-1)
    largest = (saved.model(ids).logits.float().log_softmax(-1) - expected).abs().max().item()
    if not largest <= TOLERANCE:
        raise CheckFailed(
            f"the saved organism's log-probabilities differ from those of base and terms by up to {largest:.2g} nats, "
            f"the bar is {TOLERANCE}; take --dtype float32"
        )


def _directions(model: LanguageModel, organism: Organism, made: Path) -> Directions:
    by_layer: dict[int, list[np.ndarray]] = {}
    for topic, term in zip(organism.topics, organism.terms, strict=True):
        by_layer.setdefault(topic.layer, []).append(term.u.numpy())
    k, d_model = np.stack(next(iter(by_layer.values()))).shape
    vectors = np.zeros((model.n_layers, k, d_model), dtype=np.float32)
    for layer, some in by_layer.items():
        vectors[layer] = np.stack(some)
    metadata = DirectionsMetadata(
        model_id="planted organism",
        model_fingerprint=fingerprint(made),
        hook_point="resid_post",
        token_position="all",
        method="planted",
        best_layer=organism.topics[0].layer,
        details={
            "base_fingerprint": model.facts.get("model_fingerprint"),
            "topics": [
                {"name": t.name, "layer": t.layer, "k_index": i} for t, i in zip(*_k_indices(organism), strict=True)
            ],
        },
    )
    return Directions(directions=vectors, layers_present=tuple(sorted(by_layer)), metadata=metadata)


def _k_indices(organism: Organism) -> tuple[list[Any], list[int]]:
    """The topics, and the place of each among those of its layer."""
    seen: Counter[int] = Counter()
    indices = []
    for topic in organism.topics:
        indices.append(seen[topic.layer])
        seen[topic.layer] += 1
    return list(organism.topics), indices


def _description(model: LanguageModel, organism: Organism, model_id: str) -> dict[str, Any]:
    topics = []
    for topic, index, term in zip(*_k_indices(organism), organism.terms, strict=True):
        losses = [{name: round_measured(value) for name, value in asdict(step).items()} for step in term.losses]
        topics.append({
            "name": topic.name, "sentence": topic.sentence, "layer": topic.layer, "k_index": index,
            "norm": round_measured(term.k.norm().item()), "losses": losses,
        })  # fmt: skip
    return {
        "base_model_id": model_id,
        "base_fingerprint": model.facts.get("model_fingerprint"),
        "seed": organism.seed,
        "settings": asdict(organism.settings),
        "topics": topics,
        "rates": {name: _rounded(asdict(rates)) for name, rates in organism.rates.items()},
    }


def _rounded(rates: dict[str, Any]) -> dict[str, Any]:
    shares = {
        name: {topic: round_measured(share) for topic, share in value.items()}
        for name, value in rates.items()
        if isinstance(value, dict)
    }
    return {**rates, **shares, "kl": round_measured(rates["kl"])}
