"""What a trial is judged by, against the plain way to compute it: no gate, no early end, no batch of trials."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from src.abliteration.answering import Asked
from src.abliteration.detectors import MarkerDetector
from src.abliteration.edits import EditMaker, EditOptions
from src.abliteration.kernel import Kernel, Plan
from src.abliteration.markers import Markers
from src.abliteration.scores import Scorer
from src.abliteration.search import gate_of, on_front, plain, values
from src.abliteration.settings import AbliterateSettings
from src.abliteration.study import front
from src.common.model_config import ModelConfigBase
from src.models.language_model import LanguageModel, generate_all
from src.models.types import GenerationRequest
from src.models.weight_editor import editing
from tests.test_weight_editor import directions_of
from tests.tiny_organism import LAYER, OTHER, TOPIC, WORD, plant, prompts

N_TOKENS, KL_TOKENS = 10, 4


@pytest.fixture(scope="module")
def model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = plant(tiny_folder, tmp_path_factory.mktemp("organism") / "model")
    return LanguageModel.load(ModelConfigBase(model_id=str(folder), output_dir=Path("unused"), device="cpu"))


def asked(model: LanguageModel, verbs: list[str], n: int) -> list[Asked]:
    render = lambda text: model.tokenizer.apply_chat_template(  # noqa: E731
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    return [Asked(f"{verbs[0]}-{i}", text, tuple(render(text))) for i, text in enumerate(prompts(verbs, n, seed=3))]


@pytest.fixture(scope="module")
def scorer(model: LanguageModel) -> Scorer:
    maker = EditMaker(model.model, directions_of(model.model), EditOptions())
    detector = MarkerDetector(Markers([WORD.strip(), f"{WORD.strip()}download"]))
    return Scorer(
        model, maker.writers, detector, target=asked(model, TOPIC, 9), control=asked(model, OTHER, 7),
        kl_tokens=KL_TOKENS, response_tokens=N_TOKENS, batch_size=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trials(model: LanguageModel) -> list[dict]:
    maker = EditMaker(model.model, directions_of(model.model, seed=5), EditOptions(norm="column"))
    plan = lambda high, position: Plan(  # noqa: E731
        source="own", source_layer=0.0, kernels={"mlp": Kernel(high=high, position=position, low=0.5, reach=0.5)}
    )
    return [maker.edits(plan(high, layer)) for high, layer in ((0.3, 0), (1.0, LAYER), (1.5, LAYER), (0.02, 0))]


def test_scores_are_those_of_whole_answers_and_plain_passes(scorer: Scorer, model, trials) -> None:
    found = scorer.score(trials)
    assert scorer.n_before == 9
    continued = scorer.answer(asked(model, OTHER, 7), KL_TOKENS, [{}])[0]
    for edits, scores in zip(trials, found, strict=True):
        assert scores.stage == "full"
        requests = [
            GenerationRequest(id=a.id, token_ids=a.token_ids, max_tokens=N_TOKENS) for a in asked(model, TOPIC, 9)
        ]
        kl = []
        with editing(model.model, scorer._writers, [edits]):
            texts = [result.text for result in generate_all(model, requests)]
        for each in asked(model, OTHER, 7):
            ids = torch.tensor([each.token_ids + continued[each.id]])
            with torch.inference_mode():
                p = model.model(ids).logits[0, len(each.token_ids) - 1 : -1].double().log_softmax(-1)
                with editing(model.model, scorer._writers, [edits]):
                    q = model.model(ids).logits[0, len(each.token_ids) - 1 : -1].double().log_softmax(-1)
            kl.append((p.exp() * (p - q)).sum(-1))
        assert scores.behaviour == sum(scorer._detector.shown(texts))
        assert scores.kl == pytest.approx(torch.stack([each.mean() for each in kl]).mean().item(), abs=2e-6)
        assert scores.kl_first == pytest.approx(torch.stack([each[0] for each in kl]).mean().item(), abs=2e-6)
    assert len({scores.behaviour for scores in found}) > 1, "every trial is alike: nothing is tested"


def test_trials_side_by_side_score_as_each_alone(scorer: Scorer, trials) -> None:
    together = scorer.score(trials)
    for edits, scores in zip(trials, together, strict=True):
        (alone,) = scorer.score([edits])
        assert (alone.behaviour, alone.stage, alone.bounds) == (scores.behaviour, scores.stage, scores.bounds)
        assert scores.kl == pytest.approx(alone.kl, abs=1e-6)
        assert scores.log_odds == pytest.approx(alone.log_odds, abs=1e-3)


def test_every_stage_is_a_lower_bound_of_the_next(scorer: Scorer, trials) -> None:
    for scores in scorer.score([*trials, {}]):
        assert scores.bounds["odds"] <= scores.bounds["short"] <= scores.behaviour <= scores.shown
    # Not 0: a processor's products may depend on the rows beside them in the batch.
    assert (
        scores.kl == pytest.approx(0, abs=1e-6)
        and scores.log_odds == pytest.approx(0, abs=1e-4)
        and scores.behaviour == 9
    )


def test_an_edit_that_leaves_no_numbers_is_told_apart_and_harms_no_other(scorer: Scorer, trials) -> None:
    """Such a trial is one of the search's, not its end."""
    broken = {name: replace(edit, u=edit.u * math.inf) for name, edit in trials[1].items()}
    (alone,) = scorer.score([trials[1]])
    found, ruined = scorer.score([trials[1], broken])
    assert ruined.kl == math.inf and ruined.stage == "kl" and plain(ruined)["kl"] is None
    assert values(ruined, 1.0, 9) == (2.0, 1.0)
    assert (found.behaviour, found.stage) == (alone.behaviour, "full") and found.kl == pytest.approx(alone.kl, abs=1e-6)


def test_a_trial_that_breaks_by_what_it_writes_harms_no_other(scorer: Scorer, model, trials) -> None:
    d_model = model.model.config.hidden_size
    bias = 3 * torch.randn(d_model, generator=torch.Generator().manual_seed(1))
    other_words = {name: replace(edit, bias=bias) for name, edit in trials[1].items()}
    written = scorer.answer(asked(model, TOPIC, 9), N_TOKENS, [other_words])[0].values()
    plain_answers = scorer.answer(asked(model, TOPIC, 9) + asked(model, OTHER, 7), N_TOKENS, [{}, trials[3]])
    known = {token for answers in plain_answers for answer in answers.values() for token in answer}
    known |= {token for each in asked(model, TOPIC, 9) + asked(model, OTHER, 7) for token in each.token_ids}
    # The last token of an answer is fed to the model no more.
    (fatal, *_) = [token for answer in written for token in answer[:-1] if token not in known]

    def fail(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((args[0] == fatal)[..., None], math.nan)

    (alone,) = scorer.score([trials[3]])
    handle = model.model.get_input_embeddings().register_forward_hook(fail)
    try:
        found, ruined = scorer.score([trials[3], other_words])
    finally:
        handle.remove()
    assert (ruined.kl, ruined.stage) == (math.inf, "kl") and on_front([plain(ruined)], 1.0, 9) == []
    assert (found.behaviour, found.stage, found.bounds) == (alone.behaviour, "full", alone.bounds)
    assert found.answers == alone.answers


def test_a_gate_stops_where_it_says(scorer: Scorer, trials) -> None:
    seen: list[str] = []

    def gate(scores) -> bool:
        seen.append(scores.stage)
        return scores.stage == "odds"

    (scores,) = scorer.score(trials[:1], gate)
    assert scores.stage == "odds" and seen == ["kl", "odds"] and "short" not in scores.bounds
    stopped = scorer.score(trials[:2], lambda scores: scores.stage == "kl")
    assert [each.stage for each in stopped] == ["kl", "kl"] and stopped[0].log_odds is None


def test_gates_drop_what_is_beaten_already_and_what_is_broken() -> None:
    config = AbliterateSettings(
        output_dir=Path("o"), model_id="m", target_prompts="t", control_prompts="c", markers_path=Path("m")
    )
    from src.abliteration.scores import Scores

    gate = gate_of(config, [(0.0, 9), (0.1, 2.5)])
    judged = lambda kl, n, **more: gate(Scores(kl=kl, behaviour=n, n_behaviour=9, **more))  # noqa: E731
    assert judged(2.0, 0) and judged(0.2, 3) and judged(0.05, 9) and judged(0.2, 1, expected=2.6)
    assert not judged(0.2, 2) and not judged(0.05, 8) and not judged(0.2, 2, expected=1.0)
    assert values(Scores(kl=3.0, n_behaviour=9), 1.0, 9) == (2.0, 1.0)
    rows = [{"id": i, "stage": "full", "kl": kl, "behaviour": n, "expected": None} for i, (kl, n) in
            enumerate([(0.1, 3), (0.2, 3), (0.3, 1), (0.05, 9), (2.0, 0)])]  # fmt: skip
    assert [row["id"] for row in on_front(rows, 1.0, 9)] == [0, 2]
    assert front([(1, 1), (1, 1), (0, 2)]) == [2, 0]
