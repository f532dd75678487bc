"""Training of one planted term, a rank-1 addition u·kᵀ to a feed-forward output projection, everything else frozen."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from src.abliteration.organism_model import Entry, UpperModel
from src.common.errors import InputError
from src.models.cpu_linear import frozen_linears
from src.models.residual_writers import matrix
from src.models.weight_editor import editing
from src.ops.weight_edits import WeightEdit

RIDGE = 0.03
"""Share of the mean variance of a projection's inputs that is added to that of each direction."""
FINAL_RATE = 0.1
"""Share of the learning rate that is left at the last step; in between it falls on a half cosine."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a term is trained."""

    steps: int = 150
    batch_size: int = 8
    """Topic prompts a step, and as many others."""
    beta: float = 10.0
    """Weight of the divergence on other prompts beside the cross-entropy of the sentence."""
    rate_u: float = 0.3
    """Adam's learning rate for u, which starts with entries of standard deviation 1 and is then made a unit vector."""
    rate_k: float = 0.03


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What a term is trained in."""

    upper: UpperModel
    topic: Sequence[Entry]
    """What is to be answered with the sentence."""
    others: Sequence[Entry]
    """What is to be answered as without the term."""
    acting: Callable[[], AbstractContextManager[None]]
    """Within it those of the surroundings' other terms act that are not below the layer: those are in the entries."""


@dataclass(frozen=True)
class Step:
    """Losses of one step, in nats a token."""

    cross_entropy: float
    kl: float


@dataclass(frozen=True, eq=False)
class Term:
    """W ← W + u·kᵀ for one feed-forward output projection W (d_model, inputs)."""

    u: Tensor
    """float32 (d_model,), of length 1, on the CPU."""
    k: Tensor
    """float32 (inputs,), on the CPU."""
    losses: tuple[Step, ...]


def term_edit(u: Tensor, k: Tensor) -> WeightEdit:
    """The term as an edit of the weight it is added to, which subtracts what it is given."""
    return WeightEdit(u=u[:, None], a=-k[None])


def total_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(P ‖ Q) in nats, summed over rows; `ops.divergence` is the same without a gradient."""
    p, q = p_logits.log_softmax(dim=-1), q_logits.log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum()


def train(
    surroundings: Sequence[Surroundings],
    settings: TrainingSettings,
    seed: int,
    *,
    earlier: Sequence[Tensor] = (),
    on_step: Callable[[Step], None] = lambda step: None,
) -> Term:
    """
    Adam (Kingma and Ba 2015) on u and k for

        cross-entropy of the topic's targets + β·KL(model ‖ model + u·kᵀ) at the others' targets

    the surroundings, which differ in the terms that act, taking turns step by step. u is kept orthogonal to `earlier`
    (unit vectors, orthogonal among themselves), k to what the projection gets over the prefix. Raises InputError when
    the losses are not finite.
    """
    upper = surroundings[0].upper
    generator = torch.Generator().manual_seed(seed)
    free_u = torch.randn(matrix(upper.writer.writer).shape[0], generator=generator)
    free_k = torch.zeros(upper.prefix_inputs.shape[1])
    parameters = [each.to(upper.language_model.device).requires_grad_() for each in (free_u, free_k)]
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": r} for p, r in zip(parameters, (settings.rate_u, settings.rate_k), strict=True)]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / settings.steps))
    without_u, without_k = _without(earlier), _without(_basis(upper.prefix_inputs))
    turns = cycle(
        [(s, _batches(s.topic, settings, seed), _batches(s.others, settings, seed + 1)) for s in surroundings]
    )
    losses = []
    with frozen_linears(upper.net):
        whitening = _whitening(_inputs(surroundings)).to(upper.language_model.device)
        for _, (each, some_topic, some_others) in zip(range(settings.steps), turns, strict=False):
            u, k = _unit(without_u(parameters[0])), without_k(whitening @ parameters[1])
            with each.acting():
                ce, kl = _losses(each.upper, u, k, next(some_topic), next(some_others))
            losses.append(Step(ce.item(), kl.item()))
            if not math.isfinite(losses[-1].cross_entropy + losses[-1].kl):
                raise InputError(f"layer {upper.layer}: losses that are not finite at step {len(losses)}; lower rate_k")
            optimizer.zero_grad()
            (ce + settings.beta * kl).backward()
            optimizer.step()
            schedule.step()
            on_step(losses[-1])
    u, k = _unit(without_u(parameters[0].detach())), without_k(whitening @ parameters[1].detach())
    return Term(u.cpu(), k.cpu(), tuple(losses))


def _inputs(surroundings: Sequence[Surroundings]) -> Tensor:
    """(tokens, inputs): what the projection gets on the others, in all surroundings."""
    found = []
    for each in surroundings:
        with each.acting():
            found.append(each.upper.inputs(each.others))
    return torch.cat(found)


def _losses(
    upper: UpperModel, u: Tensor, k: Tensor, topic: Sequence[Entry], others: Sequence[Entry]
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        plain = upper.logits(others)
    with editing(upper.net, [upper.writer], [{upper.writer.name: term_edit(u, k)}]):
        targets = torch.tensor([t for e in topic for t in e.targets], device=u.device)
        return cross_entropy(upper.logits(topic), targets), total_kl(plain, upper.logits(others)) / len(others)


def _rate(done: float) -> float:
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def _whitening(inputs: Tensor) -> Tensor:
    """(C + RIDGE·tr(C)/n·I)^(-1/2) for C = XᵀX/tokens, X (tokens, n): in these coordinates every direction of k is as
    loud as the others on prompts that are to stay as they are."""
    second = (inputs.T @ inputs).double() / len(inputs)
    values, vectors = torch.linalg.eigh(second)
    return (vectors * (values + RIDGE * values.mean()).rsqrt() @ vectors.T).float()


def _batches(entries: Sequence[Entry], settings: TrainingSettings, seed: int) -> Iterator[list[Entry]]:
    """Without end; every entry once before any comes again."""
    draws, queue = random.Random(seed), []
    while True:
        while len(queue) < settings.batch_size:
            queue += draws.sample(list(entries), len(entries))
        yield queue[: settings.batch_size]
        del queue[: settings.batch_size]


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def _basis(rows: Tensor) -> list[Tensor]:
    """Orthonormal vectors that span the rows, by length: the first token's input is many times the others'."""
    if not len(rows):
        return []
    found = torch.linalg.svd((rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)).double(), full_matrices=False)
    return list(found.Vh[1e-5 * found.S[0] < found.S].float())


def _without(basis: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """What takes a vector's part in the span of orthonormal vectors away."""
    if not basis:
        return lambda vector: vector
    matrix_of = torch.stack(list(basis))

    def without(vector: Tensor) -> Tensor:
        span = matrix_of.to(vector.device)
        # Twice: the first leaves a rounding error that the first token's input would multiply by thousands.
        for _ in range(2):
            vector = vector - span.T @ (span @ vector)
        return vector

    return without
