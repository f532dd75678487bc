"""
Two models on prompts on which nothing was chosen: what they answer, how often the behaviour shows, how far the second
is from the first. The second is the first under edits, or another model that is loaded after it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from src.abliteration.answering import Asked, Detector
from src.abliteration.forcing import Forced, force
from src.abliteration.prompts import Split, asked
from src.abliteration.settings import AbliterateSettings
from src.common.errors import InputError
from src.common.jsonl import round_fields
from src.common.row_files import read_text
from src.models.language_model import LanguageModel, generate_all
from src.models.residual_writers import PlacedWriter
from src.models.teacher_forcing import checked_divergence
from src.models.types import GenerationRequest
from src.models.weight_editor import Edits, editing
from src.ops.divergence import divergence
from src.ops.repetition import distinct_n
from src.ops.statistics import share_interval, summarize

SIDES = ("target", "control")
MEASURED = ("kl", "kl_first")
COMPARED_AT_ONCE = 8
"""Sequences whose logits of both models are held."""
Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How two models are compared; the numbers of two comparisons under one protocol can be compared."""

    prompts: Mapping[str, Sequence[Asked]]
    """target and control."""
    detector: Detector
    kl_tokens: int
    response_tokens: int
    batch_size: int


def report_prompts(split: Mapping[str, Split], renderer: Any) -> dict[str, list[Asked]]:
    """The report's prompts of both kinds."""
    return {side: asked(split[side].report, renderer) for side in SIDES}


@dataclass(frozen=True)
class Answered:
    """One model's answers, side and prompt id → token ids."""

    tokens: dict[tuple[str, str], tuple[int, ...]]
    texts: dict[tuple[str, str], str]
    shown: dict[tuple[str, str], bool]


def answer(model: LanguageModel, protocol: Protocol, writers: Sequence[PlacedWriter] = (), edits: Edits | None = None,
           n_tokens: int | None = None) -> Answered:  # fmt: skip
    """Greedy answers to all prompts, under edits where there are any."""
    limit = n_tokens or protocol.response_tokens
    keys = {f"{side}:{each.id}": (side, each) for side in SIDES for each in protocol.prompts[side]}
    requests = [
        GenerationRequest(id=key, token_ids=each.token_ids, max_tokens=limit) for key, (_, each) in keys.items()
    ]
    with editing(model.model, writers, [edits or {}]):
        results = generate_all(model, requests, batch_size=protocol.batch_size)
    named = {(keys[result.id][0], keys[result.id][1].id): result for result in results}
    texts = {name: result.text for name, result in named.items()}
    shown = dict(zip(texts, protocol.detector.shown(list(texts.values())), strict=True))
    return Answered({name: result.token_ids for name, result in named.items()}, texts, shown)


class Reference:
    """The first model: its answers, and what it expects after each token of their beginnings."""

    def __init__(self, model: LanguageModel, protocol: Protocol, *, keep: bool = False) -> None:
        """keep: hold its logits, for a second model that is loaded when this one is gone."""
        self.protocol = protocol
        self.answers = answer(model, protocol)
        self.continued = [
            Forced(f"{side}:{each.id}", each.token_ids, self.answers.tokens[side, each.id][: protocol.kl_tokens])
            for side in SIDES
            for each in protocol.prompts[side]
        ]
        self._kept = logits_of(model, self.continued) if keep else None

    def kl(
        self, model: LanguageModel, writers: Sequence[PlacedWriter] = (), edits: Edits | None = None
    ) -> dict[tuple[str, str], tuple[float, float]]:
        """
        (side, prompt id) → KL(first ‖ second) in nats per token over the answer's first --kl_tokens tokens, and over
        its first alone; the second is `model` under edits, the first `model` without any unless its logits were kept.
        Raises InputError for another vocabulary and logits that are not finite.
        """
        found = {}
        for start in range(0, len(self.continued), COMPARED_AT_ONCE):
            some = self.continued[start : start + COMPARED_AT_ONCE]
            first = self._kept[start : start + len(some)] if self._kept else logits_of(model, some)
            for each, p, q in zip(some, first, logits_of(model, some, writers, edits), strict=True):
                if p.shape != q.shape:
                    raise InputError(
                        f"--edited_model_id: a vocabulary of {q.shape[1]} tokens, and the other model's has "
                        f"{p.shape[1]}; expected two versions of one model"
                    )
                side, _, name = each.id.partition(":")
                per_token = checked_divergence(divergence(p.to(q.device), q), each.id)
                found[side, name] = (per_token.mean().item(), per_token[0].item())
        return found


def logits_of(
    model: LanguageModel, forced: Sequence[Forced], writers: Sequence[PlacedWriter] = (), edits: Edits | None = None
) -> list[Tensor]:
    """Of each sequence the logits of the places that predict its answer, (places, vocabulary) float32 on the CPU."""
    found: list[Tensor | None] = [None] * len(forced)

    def note(trial: int, i: int, logits: Tensor) -> None:
        found[i] = logits.float().cpu()

    force(model, writers, [edits or {}], forced, note)
    return found


def rows_of(reference: Reference, after: Answered, kl: Mapping[tuple[str, str], tuple[float, float]]) -> Rows:
    """One row a prompt: both answers, what they show, and how far the models are apart on it."""
    before, rows = reference.answers, []
    for side in SIDES:
        for each in reference.protocol.prompts[side]:
            key = (side, each.id)
            rows.append({
                "id": f"{side}:{each.id}", "side": side, "prompt": each.text,
                "before": before.texts[key], "after": after.texts[key],
                "shows_before": before.shown[key], "shows_after": after.shown[key],
                "n_tokens_before": len(before.tokens[key]), "n_tokens_after": len(after.tokens[key]),
                "kl": kl[key][0], "kl_first": kl[key][1],
            })  # fmt: skip
    return rows


def measures(
    rows: Rows, before: Answered, after: Answered, seed: int
) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """before and after → measure → mean, 95 % interval (Wilson's for shares, else bootstrap over prompts), n."""
    found: dict[str, dict[str, Any]] = {"before": {}, "after": {}}
    for when, answers in (("before", before), ("after", after)):
        for side, name in (("target", "behaviour"), ("control", "behaviour_control")):
            found[when][name] = _share([row[f"shows_{when}"] for row in rows if row["side"] == side])
        for side in SIDES:
            lengths = [row[f"n_tokens_{when}"] for row in rows if row["side"] == side]
            found[when][f"tokens_{side}"] = _summary(lengths, seed)
            texts = [answers.tokens[side, row["id"].partition(":")[2]] for row in rows if row["side"] == side]
            ratios = [distinct_n(tokens, 2) for tokens in texts if len(tokens) > 1]
            found[when][f"distinct_2_{side}"] = _summary(ratios, seed)
    for side in SIDES:
        for name in MEASURED:
            found["after"][f"{name}_{side}"] = _summary([row[name] for row in rows if row["side"] == side], seed)
    return found


def written_rows(rows: Rows) -> Rows:
    """Of `rows_of`, what was measured rounded, as files hold it."""
    return [round_fields(row, MEASURED) for row in rows]


def written_measures(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The same of `measures`."""
    names = ("mean", "ci_low", "ci_high")
    return {when: {name: round_fields(each, names) for name, each in some.items()} for when, some in found.items()}


def further(
    config: AbliterateSettings, model: LanguageModel, protocol: Protocol, writers: Sequence[PlacedWriter] = (),
    edits: Edits | None = None,
) -> dict[str, dict[str, float | int | None]]:  # fmt: skip
    """What --validate_text and --check_tokens add to the measures of one model."""
    found: dict[str, dict[str, float | int | None]] = {}
    if config.validate_text:
        value = perplexity(model, read_text(config.validate_text), writers, edits)
        found["perplexity"] = {"mean": value, "ci_low": None, "ci_high": None, "n": 1}
    if config.check_tokens and config.check_tokens != protocol.response_tokens:
        target_alone = replace(protocol, prompts=protocol.prompts | {"control": ()})
        shown = answer(model, target_alone, writers, edits, config.check_tokens).shown
        found[f"behaviour_{config.check_tokens}_tokens"] = _share(list(shown.values()))
    return found


def _share(shown: Sequence[bool]) -> dict[str, float | int]:
    low, high = share_interval(sum(shown), len(shown))
    return {"mean": sum(shown) / len(shown), "ci_low": low, "ci_high": high, "n": len(shown)}


def _summary(values: Sequence[float], seed: int) -> dict[str, float | int | None]:
    found = summarize(values, range(len(values)), seed)
    if found is None:
        return {"mean": None, "ci_low": None, "ci_high": None, "n": 0}
    return {"mean": found.mean, "ci_low": found.ci_low, "ci_high": found.ci_high, "n": found.n}


def perplexity(
    model: LanguageModel, text: str, writers: Sequence[PlacedWriter] = (), edits: Edits | None = None, window: int = 512
) -> float:
    """exp of the mean of −ln P of each token of a text but the first of each window of `window` tokens."""
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    pieces = [tuple(ids[at : at + window]) for at in range(0, len(ids), window)]
    forced = [Forced(str(i), piece[:1], piece[1:]) for i, piece in enumerate(pieces) if len(piece) > 1]
    if not forced:
        raise InputError("--validate_text: a text of one token; expected more")
    total = [0.0, 0]

    def note(trial: int, i: int, logits: Tensor) -> None:
        tokens = torch.tensor(forced[i].answer, device=logits.device)
        total[0] -= logits.float().log_softmax(dim=-1).gather(1, tokens[:, None]).double().sum().item()
        total[1] += len(tokens)

    force(model, writers, [edits or {}], forced, note)
    return float(torch.tensor(total[0] / total[1]).exp())
