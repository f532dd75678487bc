"""The study of a search: what is drawn, what a stop and a second process change of it, and what is refused."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest

from src.abliteration.search import NOTHING_REMOVED, choose, on_front, values
from src.abliteration.space import Space
from src.abliteration.storage import JOURNAL, open_storage
from src.abliteration.study import REPEATS, Study, rows_there
from src.common.errors import InputError
from src.common.provenance import command_line, without_secrets

SPACE = Space(n_layers=8, components=("attn", "mlp"), min_weight=0.0, max_weight=1.5)
N_STARTUP, N_TRIALS = 4, 9


def study_in(folder: Path, seed: int = 5, url: str | None = None) -> Study:
    return Study(open_storage(url, folder, 5.0), "s", n_startup=N_STARTUP, seed=seed)


def run(study: Study, until: int) -> None:
    """Trials, two at a time, until so many are done; of a behaviour that sits in layer 4's feed-forward part."""
    study.take_back(alone=True)
    while len(study.done()) < until:
        asked = study.ask(2, N_TRIALS)
        plans = [SPACE.draw(trial) for trial in asked]
        for trial, plan in zip(asked, plans, strict=True):
            weights = plan.weights(8)
            damage = sum(abs(w) for name in weights for w in weights[name]) / 20
            study.tell(trial, {"params": plan.as_params()}, (damage, max(0.0, 1 - weights["mlp"][4])))


def params(study: Study) -> list[dict]:
    return [trial.params for trial in study.done()]


def test_a_search_that_was_killed_proposes_what_it_would_have_done(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = study_in(tmp_path / "whole")
    run(whole, N_TRIALS)
    for n_done in (2, 6):
        # Two trials were asked for, one of them drawn, and nobody told.
        stopped = study_in(tmp_path / "killed")
        run(stopped, n_done)
        SPACE.draw(stopped.ask(2, N_TRIALS)[0])
    again = study_in(tmp_path / "killed")
    run(again, N_TRIALS)
    assert params(again) == params(whole)
    other = study_in(tmp_path, seed=6)
    run(other, 2)
    assert params(other)[0] != params(whole)[0]


def test_two_processes_that_begin_at_once_draw_different_points(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    trials = [study_in(tmp_path, url=url).ask(2, 20) for _ in range(2)]
    drawn = [SPACE.draw(trial).as_params()["attn.high"] for some in trials for trial in some]
    assert len(set(drawn)) == 4


@pytest.mark.parametrize("url", [None, "sqlite:///{}/study.db"], ids=["journal", "sqlite"])
def test_a_trial_of_a_process_killed_while_it_asked_is_run_again(url: str | None, tmp_path: Path) -> None:
    """Before its first sign of life, which Optuna then holds for running for ever, and before anything was drawn."""
    url = url and url.format(tmp_path)
    storage = open_storage(url, tmp_path, 1.0)
    killed = Study(storage, "s", n_startup=N_STARTUP, seed=5)
    plan = SPACE.draw(optuna.create_study().ask())
    killed.enqueue([plan])
    assert optuna.load_study(study_name="s", storage=storage).ask().number == 0
    again = Study(open_storage(url, tmp_path, 1.0), "s", n_startup=N_STARTUP, seed=5)
    assert again.n_running() == 1
    deadline = time.monotonic() + 60
    while again.n_running() and time.monotonic() < deadline:
        again.take_back(alone=True)
        time.sleep(0.1)
    assert again.n_running() == 0
    (repeat,) = again.ask(1, 1)
    assert repeat.number == 1 and SPACE.draw(repeat) == plan


def test_of_two_processes_only_one_gets_a_trial(tmp_path: Path) -> None:
    """The points that wait, and those of a process that has ended."""
    url, n = f"sqlite:///{tmp_path / 'study.db'}", 30
    ended = Study(open_storage(url, tmp_path, 1.0), "s", n_startup=N_STARTUP, seed=5)
    for i in range(n):
        ended._study.enqueue_trial({"source_layer": 1 + i / n})
    ended.ask(n, n)
    time.sleep(3)

    def asked(barrier: threading.Barrier) -> list[int]:
        mine = Study(open_storage(url, tmp_path, 1.0), "s", n_startup=N_STARTUP, seed=5)
        barrier.wait()
        mine.take_back(alone=False)
        barrier.wait()
        return [trial.number for trial in mine.ask(n, 2 * n)]

    barrier = threading.Barrier(2, timeout=120)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(asked, [barrier] * 2)
    repeats = [trial.user_attrs[REPEATS] for trial in ended._study.trials if REPEATS in trial.user_attrs]
    assert sorted(repeats) == list(range(n))
    assert not set(one) & set(other) and sorted([*one, *other]) == list(range(n, 3 * n))


def test_a_study_that_may_only_be_read_is_read(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    run(study_in(tmp_path, url=url), 2)
    storage = open_storage(f"sqlite:///file:{tmp_path / 'study.db'}?mode=ro&uri=true", tmp_path, 5.0, is_own=False)
    assert len(rows_there(storage, "s")) == 2


@pytest.mark.parametrize("url", [None, "sqlite:///{}/study.db"], ids=["journal", "sqlite"])
def test_points_that_a_kill_left_out_are_put_there_later(url: str | None, tmp_path: Path) -> None:
    plans = [SPACE.draw(optuna.create_study().ask()) for _ in range(3)]
    storage = open_storage(url and url.format(tmp_path), tmp_path, 5.0)
    study = Study(storage, "s", n_startup=N_STARTUP, seed=5)
    assert not study.is_begun
    study._study.enqueue_trial(plans[0].as_params())
    assert not study.is_begun
    for _ in range(2):
        study.enqueue(plans)
        assert study.is_begun and len(study._study.trials) == 3
    assert [SPACE.draw(trial) for trial in study.ask(3, 3)] == plans


def test_a_sign_of_life_that_fails_is_followed_by_the_next(tmp_path: Path, monkeypatch) -> None:
    """A database that is busy for a while; the trial stays with the process that has it."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = Study(open_storage(url, tmp_path, 1.0), "s", n_startup=N_STARTUP, seed=5)
    asked, given = study.ask(1, 1), threading.Event()
    answers = iter([optuna.exceptions.StorageInternalError("database is locked")])

    def beat(trial_id: int) -> None:
        for error in answers:
            raise error
        given.set()

    monkeypatch.setattr(study._storage, "record_heartbeat", beat)
    with study.alive(asked, 1.0):
        assert given.wait(60)


def test_more_trials_are_those_of_a_search_for_as_many_at_once(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole, added = study_in(tmp_path / "whole"), study_in(tmp_path)
    run(whole, N_TRIALS)
    assert len(added.ask(2, 1)) == 1
    added.take_back(alone=True)
    assert [len(added.ask(2, 1)) for _ in range(3)] == [1, 0, 0]
    # The one that was taken back, and no other.
    assert len(added._study.trials) == 2
    added.take_back(alone=True)
    run(added, N_TRIALS)
    assert params(added) == params(whole)


def test_a_trial_that_another_process_runs_is_not_taken_from_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    one, other = (Study(open_storage(url, tmp_path, 6.0), "s", n_startup=N_STARTUP, seed=5) for _ in range(2))
    asked = one.ask(1, 2)
    with one.alive(asked, 6.0):
        for _ in range(90):
            other.take_back(alone=True)
            assert other.n_running() == 1 and other.ask(2, 1) == []
            time.sleep(0.1)
    # Nothing is left of waiting for it.
    assert [trial.number for trial in other._study.trials] == [0]


def test_a_process_that_slept_goes_on_without_the_trial_it_lost(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    slept, other = (Study(open_storage(url, tmp_path, 1.0), "s", n_startup=N_STARTUP, seed=5) for _ in range(2))
    (lost,) = slept.ask(1, 2)
    deadline = time.monotonic() + 60
    while other.n_running() and time.monotonic() < deadline:
        other.take_back(alone=True)
        time.sleep(0.1)
    assert slept.draw(lost, SPACE) is None
    assert not slept.tell(lost, {"params": {}}, (0.0, 0.0))
    (again,) = slept.ask(1, 2)
    assert slept.draw(again, SPACE) is not None


def test_a_torn_last_line_is_taken_out(tmp_path: Path) -> None:
    run(study_in(tmp_path), 2)
    with (tmp_path / JOURNAL).open("ab") as journal:
        journal.write(b'{"op_code": 4, "worker_id": "torn')
    again = study_in(tmp_path)
    assert len(again.done()) == 2
    run(again, 4)
    assert len(study_in(tmp_path).done()) == 4


def test_a_study_of_something_else_is_refused(tmp_path: Path) -> None:
    storage = open_storage(None, tmp_path, 5.0)
    optuna.create_study(storage=storage, study_name="s").optimize(lambda trial: trial.suggest_float("x", 0, 1), 1)
    assert rows_there(storage, "s") == []
    optuna.delete_study(study_name="s", storage=storage)
    study = optuna.create_study(storage=storage, study_name="s", directions=["minimize", "minimize"])
    study.optimize(lambda trial: (trial.suggest_float("x", 0, 1), 0.0), 1)
    with pytest.raises(InputError, match=r"holds trials that are not of src\.abliterate"):
        study_in(tmp_path).refuse_other({"model_fingerprint": "f"})


def test_the_password_of_a_storage_is_nowhere_told(tmp_path: Path) -> None:
    url = "postgresql://me:hunter2/hunter2@127.0.0.1:1/study"
    with pytest.raises(InputError) as told:
        open_storage("nosuch" + url, tmp_path, 5.0)
    assert "hunter2" not in str(told.value) and "me:" in str(told.value)
    assert without_secrets({"storage": url, "judge_base_url": "http://localhost:8000/v1", "n": 1}) == {
        "storage": "postgresql://me:<withheld>@127.0.0.1:1/study", "judge_base_url": "http://localhost:8000/v1",
        "n": 1,
    }  # fmt: skip
    assert command_line(["--storage", url]) == ["--storage", "postgresql://me:<withheld>@127.0.0.1:1/study"]


def test_the_sampler_is_told_that_hardly_an_edit_is_no_good() -> None:
    from src.abliteration.scores import Scores

    told = lambda kl, n: values(Scores(stage="full", kl=kl, behaviour=n, n_behaviour=20), 1.0, 10)  # noqa: E731
    nothing, half, removed = told(1e-6, 10), told(0.01, 5), told(0.02, 0)
    assert removed[0] < half[0] < nothing[0] == pytest.approx(NOTHING_REMOVED, abs=1e-5)
    assert removed == (0.02, 0.0) and nothing[1] == 0.5


@pytest.mark.parametrize(
    ("n", "points", "chosen"),
    [
        # KL, counted, expected. What one of 48 still shows is not let go for a tenth less KL.
        (48, [(0.072, 1, 0.2), (0.0788, 0, 0.0)], 1),
        # Between answers that none shows, an expectation of less than one answer is not worth the damage.
        (48, [(0.02, 0, 0.8), (0.3, 0, 0.0)], 0),
        (48, [(0.02, 0, 1.4), (0.3, 0, 0.0)], 1),
        # Nor is an answer worth a model.
        (48, [(0.02, 1, 0.8), (0.9, 0, 0.0)], 0),
        (400, [(0.02, 4, 2.0), (0.035, 1, 0.5), (0.3, 0, 0.0)], 1),
        (400, [(0.02, 11, 2.0), (0.3, 0, 0.0)], 1),
        # Without an expectation, as from a classifier.
        (48, [(0.02, 9, None), (0.03, 8, None), (0.5, 8, None)], 1),
    ],
)
def test_which_trial_is_chosen(n: int, points: list, chosen: int) -> None:
    rows = [
        {"stage": "full", "kl": kl, "behaviour": counted, "expected": expected, "n_behaviour": n, "id": number}
        for number, (kl, counted, expected) in enumerate(points)
    ]
    found, rule = choose(on_front(rows, max_kl=1.0, n_before=n))
    assert found["id"] == chosen
    assert found["behaviour"] <= float(re.search(rf"at most (\d+) of {n} responses", rule)[1])
