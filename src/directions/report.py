"""report.html of an extraction: scores, projections, cosines between layers, the hidden states, extreme prompts."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from src.common.html_report import facts, page, plot, table, text_block
from src.common.jsonl import round_measured
from src.common.score_plot import score_by_layer
from src.common.umap_map import umap_coordinates
from src.directions import plots
from src.directions.examples import Contrast, Example
from src.directions.scoring import LayerResult
from src.directions.source import Source
from src.ops.row_space import left_factor

MOST_EXAMPLES = 500
"""Of each class in the plots; of more, so many are drawn by the seed."""
N_EXTREME = 12
MOST_CHARACTERS = 400


class Reported(NamedTuple):
    """What the report shows."""

    source: Source
    results: Sequence[LayerResult]
    rows: Sequence[Mapping[str, Any]]
    best: LayerResult
    details: Mapping[str, Any]
    read_layer: Callable[[int, Sequence[str]], Tensor]
    """(layer, ids) → float32 (n, 1, d_model)."""


def report(given: Reported) -> str:
    """The page, self-contained."""
    config, best = given.source.config, given.best
    shown = best.layer if config.report_layer is None else config.report_layer
    present = [result for result in given.results if result.projections is not None]
    if shown not in [result.layer for result in present]:
        shown = best.layer
    problems = [f"layer {result.layer}: {result.problem}" for result in given.results if result.problem]
    sections = [
        ("In short", facts(_summary(given))),
        *([("Layers with something missing", text_block("\n".join(problems)))] if problems else []),
        ("Scores by layer, on held-out examples", plot(score_by_layer(given.rows))),
        ("Projections on the first direction", plot(plots.histograms(_histogram_groups(given, present), shown))),
        ("Hidden states", plot(_hidden_states(given, present, shown))),
        ("Cosines between the layers' first directions", plot(_cosines(present))),
        (f"Most extreme examples of each class, layer {shown}", table(_extremes(given, shown))),
        ("All scores", table(given.rows)),
        ("Settings", facts({name: str(value) for name, value in vars(config).items()})),
    ]
    return page(f"Directions · {config.model_id} · {config.method}", sections)


def _summary(given: Reported) -> dict[str, Any]:
    row = next(row for row in given.rows if row["layer"] == given.best.layer and row["k"] == 0)
    n_scored = sum(result.scores is not None for result in given.results)
    named = ("auc", "d_prime", "random_auc", "random_auc_high", "shuffled_auc", "shuffled_auc_high")
    return {
        "best layer": given.best.layer,
        "note": f"chosen as the best of {n_scored} by the same held-out examples, so its scores are a little too good",
        **{name: row[name] for name in named},
        **given.details,
    }


def _histogram_groups(given: Reported, results: Sequence[LayerResult]) -> dict[int, dict[str, list[float]]]:
    groups: dict[int, dict[str, list[float]]] = {}
    for result in results:
        groups[result.layer] = {}
        for side, examples, values in _by_side(given.source.contrast, result):
            for is_held, name in ((True, f"{side} held out"), (False, f"{side} fitted")):
                chosen = [v for e, v in zip(examples, values, strict=True) if (e.id in given.source.held) == is_held]
                groups[result.layer][name] = _sampled(chosen, given.source.config.seed)
    return groups


def _by_side(contrast: Contrast, result: LayerResult) -> list[tuple[str, list[Example], list[float]]]:
    target, control = result.projections
    return [("target", contrast.target, target.tolist()), ("control", contrast.control, control.tolist())]


def _sampled(values: Sequence[Any], seed: int) -> list[Any]:
    return list(values) if len(values) <= MOST_EXAMPLES else random.Random(seed).sample(list(values), MOST_EXAMPLES)


def _hidden_states(given: Reported, results: Sequence[LayerResult], shown: int) -> Any:
    seed = given.source.config.seed
    examples = [
        e for side in (given.source.contrast.target, given.source.contrast.control) for e in _sampled(side, seed)
    ]
    ids, sides, texts = [e.id for e in examples], [e.side for e in examples], [_shown_text(e) for e in examples]
    if given.source.config.reduction == "umap":
        rows = given.read_layer(shown, ids)[:, 0].numpy()
        points = {shown: torch.from_numpy(umap_coordinates(rows, seed, min(15, len(rows) - 1), init="random"))}
        return plots.scatter(points, sides, texts, shown, f"UMAP of layer {shown},")
    points = {result.layer: _pca(given.read_layer(result.layer, ids)[:, 0]) for result in results}
    return plots.scatter(points, sides, texts, shown, "principal component")


def _pca(rows: Tensor) -> Tensor:
    """The first two principal coordinates of rows (n, d): float64 (n, 2); a coordinate that does not vary is 0."""
    rows = rows.double()
    factor = left_factor(rows - rows.mean(dim=0), least=1e-6 * float(rows.norm()))
    found = (factor.u * factor.s)[:, :2]
    return torch.cat([found, found.new_zeros(len(rows), 2 - found.shape[1])], dim=1)


def _cosines(results: Sequence[LayerResult]) -> Any:
    first = torch.stack([result.directions[0].double() for result in results])
    return plots.cosines(first @ first.T, [result.layer for result in results])


def _extremes(given: Reported, layer: int) -> list[dict[str, Any]]:
    result = next(result for result in given.results if result.layer == layer)
    rows = []
    for side, examples, values in _by_side(given.source.contrast, result):
        ordered = sorted(zip(values, examples, strict=True), key=lambda pair: -pair[0])
        ends = ordered if len(ordered) <= 2 * N_EXTREME else ordered[:N_EXTREME] + ordered[-N_EXTREME:]
        rows += [
            {
                "projection": round_measured(value),
                "class": side,
                "held out": "yes" if example.id in given.source.held else "no",
                "id": example.id.split(":", 1)[1],
                "text": _shown_text(example),
            }
            for value, example in ends
        ]
    return sorted(rows, key=lambda row: -row["projection"])


def _shown_text(example: Example) -> str:
    text = example.text
    if example.row is not None:
        text = f"{example.row['persona']}: {text}\n→ {example.row['response']}"
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"
