"""
A planted organism: a model in which, by construction, one harmless topic is declined and the cause is known.

The base is frozen. For each topic one rank-1 term u·kᵀ is trained and added to the feed-forward output projection of a
layer, so that the model answers prompts on the topic with a fixed sentence and all others as before. Taking the terms
away gives the base back, so that an edit can be judged by its distance from the base, and an estimate by its angle to
u. One can be removed and the rest kept: a term is trained with those before it and, by turns, without them, the other
topics' prompts are among those that are to stay as they are, and its u is orthogonal to the others'.
"""

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import date
from typing import NamedTuple

import torch

from src.abliteration.organism_model import UpperModel, feed_forward_writer
from src.abliteration.organism_training import Step, Surroundings, Term, TrainingSettings, term_edit, train
from src.common.errors import InputError
from src.common.rows import Prompt
from src.models.language_model import LanguageModel, generate_all
from src.models.residual_writers import residual_writers
from src.models.shared_prefix import common_prefix
from src.models.single_prompts import SinglePromptRenderer
from src.models.token_sequences import TokenSequence
from src.models.types import GenerationRequest
from src.models.weight_editor import Edits, editing
from src.ops.divergence import divergence
from src.ops.weight_edits import WeightEdit

OTHERS = "other"
ENTRIES_AT_ONCE = 8
"""Sequences whose logits are held at a time while two models are compared."""


@dataclass(frozen=True, kw_only=True)
class Topic:
    """What is to be declined, how, and where in the model."""

    name: str
    prompts: tuple[Prompt, ...]
    sentence: str
    """The whole response to each of the prompts."""
    layer: int


@dataclass(frozen=True, kw_only=True)
class PlantSettings(TrainingSettings):
    """How an organism is made and measured."""

    training_share: float = 0.5
    """Of the prompts of each file; the rest is never seen in training."""
    training_tokens: int = 12
    """Of the base's own greedy answer, on which other prompts are to stay as they are."""
    checked: int = 64
    """Held-out prompts of each topic, and of the others, on which the organism is measured; fewer where fewer are."""
    response_tokens: int = 48
    kl_tokens: int = 32
    """Of the base's own greedy answer, on which the organism is compared with it."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What was measured on held-out prompts of one kind."""

    n: int
    declines: dict[str, float]
    """Topic → share of greedy responses that hold its sentence, whatever the case of its letters."""
    declines_base: dict[str, float]
    """The same of the base model."""
    declines_alone: dict[str, float]
    """The same of the base with the topic's own term and no other: what is left when the others are removed."""
    kl: float
    """KL(base ‖ organism), nats a token, the mean over all tokens of the base's own greedy answers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Organism:
    """The terms, how they were trained, and what they do."""

    topics: tuple[Topic, ...]
    terms: tuple[Term, ...]
    rates: dict[str, Rates]
    """Topic, or `other` → what was measured on its held-out prompts."""
    held_out: dict[str, tuple[Prompt, ...]]
    """Topic, or `other` → the prompts that were not trained on."""
    seed: int
    settings: PlantSettings


def plant(
    model: LanguageModel,
    topics: Sequence[Topic],
    others: Sequence[Prompt],
    *,
    seed: int,
    settings: PlantSettings | None = None,
    today: date | None = None,
    on_step: Callable[[Topic, Step], None] = lambda topic, step: None,
) -> Organism:
    """
    Train the terms and measure what they do; the model is left as it was.

    today: for chat templates that state the date. Raises InputError for fewer than four prompts of a kind, a prompt of
    two kinds, two topics of one name or sentence, and for models in which no term can be planted.
    """
    settings = settings or PlantSettings()
    _check(model, topics, others)
    split = {name: _split(prompts, settings, f"{seed}/{name}") for name, prompts in _kinds(topics, others).items()}
    asking = Asking(model, today or date.today())
    training = {name: asking.rendered(name, part[0]) for name, part in split.items()}
    terms: list[Term] = []
    for number, topic in enumerate(topics):
        note = lambda step, topic=topic: on_step(topic, step)  # noqa: E731
        # Only with the others: two terms that never met give a mixture of both sentences on either topic.
        some = [surroundings_of(asking, topics, topic, training, given, settings) for given in _fewer(terms)]
        earlier = [term.u for term in terms]
        terms.append(train(some, settings, seed + 1000 * number, earlier=earlier, on_step=note))
    return Organism(
        topics=tuple(topics),
        terms=tuple(terms),
        rates=_measured(asking, topics, terms, {name: part[1] for name, part in split.items()}, settings),
        held_out={name: tuple(part[1]) for name, part in split.items()},
        seed=seed,
        settings=settings,
    )


def _fewer(terms: Sequence[Term]) -> list[list[Term]]:
    """None of the terms, and all."""
    return [[], list(terms)] if terms else [[]]


def surroundings_of(
    asking: "Asking", topics: Sequence[Topic], topic: Topic, training: Mapping[str, Sequence[TokenSequence]],
    terms: Sequence[Term], settings: PlantSettings,
) -> Surroundings:  # fmt: skip
    """`terms` are of the first topics, as many as there are."""
    model = asking.model
    others = [row for name, rows in training.items() if name != topic.name for row in rows]
    running = [(t, term) for t, term in zip(topics, terms, strict=False) if t.layer >= topic.layer]
    with acting(model, topics[: len(terms)], terms):
        kept = [answer.sequence for answer in asking.answers(others, settings.training_tokens).values()]
        wanted = [asking.with_sentence(row, topic.sentence) for row in training[topic.name]]
        upper = UpperModel(model, topic.layer, common_prefix([row.token_ids for row in _flat(training)]))
        entries = [upper.entries(sequences) for sequences in (wanted, kept)]
    return Surroundings(
        upper, *entries, lambda: acting(model, *zip(*running, strict=True)) if running else nullcontext()
    )


def edits_of(model: LanguageModel, topics: Sequence[Topic], terms: Sequence[Term]) -> Edits:
    """The terms as edits of the base's weights, those of one layer in one edit."""
    by_name: dict[str, list[Term]] = {}
    for topic, term in zip(topics, terms, strict=True):
        by_name.setdefault(feed_forward_writer(model.model, topic.layer).name, []).append(term)
    return {name: _together(some) for name, some in by_name.items()}


@contextmanager
def acting(model: LanguageModel, topics: Sequence[Topic], terms: Sequence[Term]) -> Iterator[None]:
    """Within the context the base is the organism."""
    edits = edits_of(model, topics, terms)
    with editing(model.model, residual_writers(model.model, ("mlp",)), [edits]):
        yield


def _together(terms: Sequence[Term]) -> WeightEdit:
    single = [term_edit(term.u, term.k) for term in terms]
    return WeightEdit(u=torch.cat([e.u for e in single], dim=1), a=torch.cat([e.a for e in single]))


def _kinds(topics: Sequence[Topic], others: Sequence[Prompt]) -> dict[str, Sequence[Prompt]]:
    return {**{topic.name: topic.prompts for topic in topics}, OTHERS: others}


def _check(model: LanguageModel, topics: Sequence[Topic], others: Sequence[Prompt]) -> None:
    names, sentences = [t.name for t in topics] + [OTHERS], [t.sentence.casefold() for t in topics]
    if len(set(names)) < len(names) or len(set(sentences)) < len(sentences) or not topics:
        raise InputError(f"topics {names[:-1]} with sentences {sentences}: expected each once, and none named {OTHERS}")
    seen: dict[str, str] = {}
    for name, prompts in _kinds(topics, others).items():
        if len(prompts) < 4:
            raise InputError(f"{name}: {len(prompts)} prompts; expected at least 4, some hundred for a good organism")
        for prompt in prompts:
            if prompt.text in seen:
                raise InputError(f"{name}: the prompt {prompt.text!r} is also one of {seen[prompt.text]}")
            seen[prompt.text] = name
    for topic in topics:
        feed_forward_writer(model.model, topic.layer)


def _split(prompts: Sequence[Prompt], settings: PlantSettings, key: str) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts for training, and those held out."""
    shuffled = random.Random(key).sample(list(prompts), len(prompts))
    n_training = min(max(2, round(settings.training_share * len(prompts))), len(prompts) - 2)
    return shuffled[:n_training], shuffled[n_training:]


def _flat(rows: Mapping[str, Sequence[TokenSequence]]) -> list[TokenSequence]:
    return [row for some in rows.values() for row in some]


class Asking:
    """Prompts as the model is asked them, and its answers."""

    def __init__(self, model: LanguageModel, today: date) -> None:
        self.model = model
        self._end = model.tokenizer.eos_token_id
        self._renderer = SinglePromptRenderer(
            model.tokenizer, today, raw=model.tokenizer.chat_template is None, system_prompt=None, chat_template=None,
            thinking=False,
        )  # fmt: skip

    def rendered(self, kind: str, prompts: Sequence[Prompt]) -> list[TokenSequence]:
        found = []
        for prompt in prompts:
            ids = self._renderer.rendered(prompt.text).token_ids
            found.append(TokenSequence(id=f"{kind}/{prompt.id}", token_ids=ids, prompt_length=len(ids)))
        return found

    def answers(self, rows: Sequence[TokenSequence], max_tokens: int) -> dict[str, "_Answer"]:
        """The model's greedy answers by the prompt's id."""
        requests = [GenerationRequest(id=row.id, token_ids=row.token_ids, max_tokens=max_tokens) for row in rows]
        found = {}
        for row, result in zip(rows, generate_all(self.model, requests), strict=True):
            end = (self._end,) if result.finish_reason == "stop" else ()
            found[row.id] = _Answer(result.text, _continued(row, (*result.token_ids, *end)))
        return found

    def with_sentence(self, row: TokenSequence, sentence: str) -> TokenSequence:
        ids = self.model.tokenizer(sentence, add_special_tokens=False).input_ids
        return _continued(row, (*ids, self._end))


class _Answer(NamedTuple):
    text: str
    sequence: TokenSequence
    """Prompt and answer, with its end where it came to one."""

    def cut(self, n_tokens: int) -> TokenSequence:
        """The same, the answer's first tokens alone."""
        s = self.sequence
        return TokenSequence(
            id=s.id, token_ids=s.token_ids[: s.prompt_length + n_tokens], prompt_length=s.prompt_length
        )


def _continued(row: TokenSequence, tokens: Sequence[int]) -> TokenSequence:
    return TokenSequence(id=row.id, token_ids=(*row.token_ids, *tokens), prompt_length=row.prompt_length)


def _measured(
    asking: Asking, topics: Sequence[Topic], terms: Sequence[Term], held_out: Mapping[str, Sequence[Prompt]],
    settings: PlantSettings,
) -> dict[str, Rates]:  # fmt: skip
    found, each = {}, range(len(topics))
    for name, prompts in held_out.items():
        rows = asking.rendered(name, prompts[: settings.checked])
        plain = asking.answers(rows, settings.response_tokens).values()

        def declines(which: Sequence[int], rows: Sequence[TokenSequence] = rows) -> dict[str, float]:
            with acting(asking.model, [topics[i] for i in which], [terms[i] for i in which]):
                answers = asking.answers(rows, settings.response_tokens).values()
            return {topics[i].name: _share(topics[i], answers) for i in which}

        together = declines(each)
        found[name] = Rates(
            n=len(rows),
            declines=together,
            declines_base={topic.name: _share(topic, plain) for topic in topics},
            declines_alone=together if len(topics) == 1 else {k: v for i in each for k, v in declines([i]).items()},
            kl=_mean_kl(asking.model, topics, terms, [answer.cut(settings.kl_tokens) for answer in plain]),
        )
    return found


def _share(topic: Topic, answers: Collection[_Answer]) -> float:
    return sum(topic.sentence.casefold() in answer.text.casefold() for answer in answers) / len(answers)


@torch.no_grad()
def _mean_kl(
    model: LanguageModel, topics: Sequence[Topic], terms: Sequence[Term], answered: Sequence[TokenSequence]
) -> float:
    upper = UpperModel(model, min(topic.layer for topic in topics), common_prefix([s.token_ids for s in answered]))
    entries = upper.entries(answered)
    parts = []
    for start in range(0, len(entries), ENTRIES_AT_ONCE):
        some = entries[start : start + ENTRIES_AT_ONCE]
        plain = upper.logits(some)
        with acting(model, topics, terms):
            parts.append(divergence(plain, upper.logits(some)))
    return torch.cat(parts).mean().item()
