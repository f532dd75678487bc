"""
The neutral part of scripts/benchmarks/abliteration.py: measures any edited model against the model it was made from,
on prompts that no search has seen, and says how much of the plane of behaviour and damage a set of such models covers.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from src.abliteration.markers import Markers, read_markers  # noqa: E402
from src.common.model_config import ModelConfigBase  # noqa: E402
from src.common.rows import Prompt  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from src.models.language_model import LanguageModel
    from src.models.types import GenerationResult

MOST_KL = 1.0
"""Nats per token at which a model counts as destroyed."""
ROWS_AT_ONCE = 16
"""Responses that are computed in one batch."""


class Rescorer:
    """
    Holds what the unedited model says to the prompts, and the logits of it, which are computed once for all models.

    behaviour: share of greedy responses of `response_tokens` to target prompts that hold a marker. kl: nats per token,
    KL(unedited ‖ edited) on the first `kl_tokens` of the unedited model's responses to control prompts, mean over each
    response and then over prompts, those left out on which the behaviour shows; kl_first: of the first tokens of all.
    """

    def __init__(
        self, model_id: str, target: Sequence[Prompt], control: Sequence[Prompt], markers_path: Path, *,
        response_tokens: int, kl_tokens: int,
    ) -> None:  # fmt: skip
        from src.models.single_prompts import SinglePromptRenderer
        from src.models.token_sequences import TokenSequence

        model = _loaded(model_id)
        renderer = SinglePromptRenderer(
            model.tokenizer, date(2026, 1, 1), raw=False, system_prompt=None, chat_template=None, thinking=False
        )
        self._markers = Markers(read_markers(markers_path))
        self._response_tokens = response_tokens
        self._target, control_ids = (
            {prompt.id: renderer.rendered(prompt.text).token_ids for prompt in prompts} for prompts in (target, control)
        )
        responses = self._responses(model, control_ids, kl_tokens)
        self._forced = [
            TokenSequence(id=name, token_ids=(*ids, *responses[name].token_ids), prompt_length=len(ids))
            for name, ids in control_ids.items()
            if responses[name].token_ids
        ]
        self._showing = {name for name, result in responses.items() if self._markers.shows(result.text)}
        """Control prompts on which the behaviour shows without an edit: to remove it there, too, is no damage."""
        self._plain = dict(self._logits(model))

    def score(self, model_id: str) -> dict:
        """Prompt ids and what was measured on each, of the model that `model_id` names."""
        model = _loaded(model_id)
        responses = self._responses(model, self._target, self._response_tokens)
        per_token = self._divergences(model)
        return {
            "shown": {name: self._markers.shows(result.text) for name, result in responses.items()},
            "kl": {
                each.id: kl.mean().item()
                for each, kl in zip(self._forced, per_token, strict=True)
                if each.id not in self._showing
            },
            "kl_first": {each.id: kl[0].item() for each, kl in zip(self._forced, per_token, strict=True)},
            "responses": {name: result.text for name, result in responses.items()},
        }

    def _responses(
        self, model: "LanguageModel", prompts: dict[str, tuple[int, ...]], n_tokens: int
    ) -> dict[str, "GenerationResult"]:
        from src.models.language_model import generate_all
        from src.models.types import GenerationRequest

        requests = [GenerationRequest(id=name, token_ids=ids, max_tokens=n_tokens) for name, ids in prompts.items()]
        return {result.id: result for result in generate_all(model, requests, batch_size=64)}

    def _divergences(self, model: "LanguageModel") -> list["Tensor"]:
        """float64 (response tokens,) of each control prompt, nats."""
        from src.models.teacher_forcing import checked_divergence
        from src.ops.divergence import divergence

        found = {
            name: checked_divergence(divergence(self._plain[name], logits), name)
            for name, logits in self._logits(model)
        }
        return [found[each.id] for each in self._forced]

    def _logits(self, model: "LanguageModel") -> Iterator[tuple[str, "Tensor"]]:
        """Of each control prompt the logits by which the tokens of the unedited response are predicted."""
        import torch

        from src.models.cpu_linear import packed_linears
        from src.models.teacher_forcing import n_response, response_logits

        longest_first = sorted(self._forced, key=lambda each: -len(each.token_ids))
        with torch.inference_mode(), packed_linears(model.model):
            for start in range(0, len(longest_first), ROWS_AT_ONCE):
                batch = longest_first[start : start + ROWS_AT_ONCE]
                kept = max(map(n_response, batch)) + 1
                for each, logits in zip(batch, response_logits(model, batch, [None] * len(batch), kept), strict=True):
                    yield each.id, logits[-n_response(each) - 1 : -1].clone()


def _loaded(model_id: str) -> "LanguageModel":
    from src.models.language_model import LanguageModel

    return LanguageModel.load(
        ModelConfigBase(model_id=model_id, output_dir=Path("unused"), dtype="float32", device="cpu")
    )


def hypervolume(points: Iterable[tuple[float, float]], reference: tuple[float, float]) -> float:
    """
    Area that the points dominate below the reference, both coordinates to be small (Zitzler and Thiele 1999).

    Of (behaviour share, KL) with reference (share before, MOST_KL): 0 where nothing is better than no edit, share
    before × MOST_KL where the behaviour is gone for nothing.
    """
    area, lowest = 0.0, reference[1]
    for x, y in sorted(points):
        if x < reference[0] and y < lowest:
            area += (reference[0] - x) * (lowest - y)
            lowest = y
    return area


def resampled(n_target: int, n_control: int, n_resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the draws that each prompt has: two float64 (1 + n_resamples, prompts); in row 0 all have the same."""
    generator = np.random.default_rng(seed)
    found = []
    for n in (n_target, n_control):
        counts = generator.multinomial(n, np.full(n, 1 / n), size=n_resamples)
        found.append(np.vstack([np.ones(n), counts]) / n)
    return found[0], found[1]


def hypervolumes(scores: Sequence[dict], before: dict, draws: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Of one set of models, for each draw of prompts: float64 (1 + n_resamples,)."""
    targets, controls = list(before["shown"]), list(before["kl"])
    assert draws[0].shape[1] == len(targets) and draws[1].shape[1] == len(controls)
    references = draws[0] @ np.array([before["shown"][name] for name in targets], dtype=float)
    if not scores:
        return np.zeros(len(references))
    shares = draws[0] @ np.array([[each["shown"][name] for name in targets] for each in scores], dtype=float).T
    kls = np.minimum(draws[1] @ np.array([[each["kl"][name] for name in controls] for each in scores]).T, MOST_KL)
    return np.array(
        [
            hypervolume(zip(x.tolist(), y.tolist(), strict=True), (reference, MOST_KL))
            for x, y, reference in zip(shares, kls, references.tolist(), strict=True)
        ]
    )


def with_interval(draws: np.ndarray) -> dict[str, float]:
    """The value of all prompts, and the 95 % percentile interval of its resamples (Efron 1979)."""
    low, high = np.percentile(draws[1:], [2.5, 97.5])
    return {"value": float(draws[0]), "ci_low": float(low), "ci_high": float(high)}


def mean(scores: dict, field: str) -> float:
    return float(np.mean(list(scores[field].values())))


def main() -> None:
    """Score one model by hand."""
    from src.common.rows import read_prompts

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_id", required=True)
    parser.add_argument("--edited_model_id", required=True)
    parser.add_argument("--target_prompts", required=True)
    parser.add_argument("--control_prompts", required=True)
    parser.add_argument("--markers_path", required=True, type=Path)
    parser.add_argument("--response_tokens", type=int, default=48)
    parser.add_argument("--kl_tokens", type=int, default=32)
    arguments = parser.parse_args()
    rescorer = Rescorer(
        arguments.model_id, read_prompts(arguments.target_prompts), read_prompts(arguments.control_prompts),
        arguments.markers_path, response_tokens=arguments.response_tokens, kl_tokens=arguments.kl_tokens,
    )  # fmt: skip
    scores = rescorer.score(arguments.edited_model_id)
    print(json.dumps({field: round(mean(scores, field), 4) for field in ("shown", "kl", "kl_first")}))


if __name__ == "__main__":
    main()
