"""
src.abliterate against heretic 1.4.0 on one planted organism: the same prompts in the same parts, the same number of
trials, every trial that matters exported as a whole model and measured again by one neutral scorer on prompts that
neither search has seen. Hours on two cores; what is finished is kept, so the same command goes on after a stop:

uv run python scripts/benchmarks/abliteration.py --organism FOLDER --peer_python PYTHON \\
  --target_prompts data/abliteration/cooking.jsonl --control_prompts data/abliteration/other.jsonl \\
  --markers_path data/abliteration/markers.txt --output_dir data/experiments/benchmark_abliteration --detach

--organism is a folder that scripts/plant_organism.py wrote. --peer_python is the Python of an environment of its own
with `pip install heretic-llm==1.4.0` and the torch and transformers that are used here.

Heretic always sends a system prompt; it gets the one that the chat template puts in by itself. Its search for the best
batch size and for a common beginning of all responses is left out; ours has neither. Both sides draw as many trials at
random as heretic does by default, 30 %. Seconds are CPU seconds, user and system, of a process and all that it starts,
from its start on, so that other work on the machine spoils none; with --threads 1 they are those of an idle machine. At
equal seconds: until the quicker side was done, of the other the front of the trials that had ended by then. The
hypervolume is of (behaviour share, KL) below (share before, 1); its interval is from the bootstrap over prompts, the
seeds' own taken together.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from abliteration_rescore import Rescorer, mean  # noqa: E402
from abliteration_sides import Heretic, Job, Ours, read_json  # noqa: E402
from abliteration_tables import summary, tables  # noqa: E402

from src.common.files import write_json_atomic, write_text_atomic  # noqa: E402

STARTUP_SHARE = 0.3
"""Of the trials, drawn at random: heretic's 60 of 200."""
BEFORE = "before"
NOT_COMPARED = ("seeds", "detach", "output_dir", "peer_python")
SAME_KL = 0.02
"""Of a KL: how far the same edit may be off when it is measured from its exported model."""


def main() -> None:
    arguments = parsed()
    output = arguments.output_dir
    output.mkdir(parents=True, exist_ok=True)
    refuse_other(arguments)
    if arguments.detach:
        detach(output)
        return
    seeds = [run_seed(arguments, seed) for seed in arguments.seeds]
    found = summary(seeds)
    write_json_atomic(output / "summary.json", found)
    write_text_atomic(output / "report.md", tables(found))
    print(tables(found))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("organism", "target_prompts", "control_prompts", "markers_path", "output_dir"):
        parser.add_argument(f"--{name}", type=lambda text: Path(text).resolve(), required=True)
    # Not resolved: the Python of an environment is a link out of it.
    parser.add_argument("--peer_python", type=lambda text: Path(text).absolute(), required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n_trials", type=int, default=30)
    parser.add_argument("--n_search", type=int, default=32, help="prompts of each kind that trials are judged on")
    parser.add_argument("--n_report", type=int, default=80, help="prompts of each kind for the neutral scorer, at most")
    parser.add_argument("--response_tokens", type=int, default=48)
    parser.add_argument("--kl_tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ours", default="", help='further flags of src.abliterate, as in --ours="--norm column"')
    parser.add_argument("--detach", action="store_true", help="go on in the background, with a log in --output_dir")
    arguments = parser.parse_args()
    for name in ("organism", "peer_python", "target_prompts", "control_prompts", "markers_path"):
        if not getattr(arguments, name).exists():
            parser.error(f"--{name} {getattr(arguments, name)}: no such file or folder")
    return arguments


def refuse_other(arguments: argparse.Namespace) -> None:
    """Ends the program when the folder holds what other settings gave: that would be taken for these settings' own."""
    path = arguments.output_dir / "settings.json"
    own = {k: v if isinstance(v, int) else str(v) for k, v in vars(arguments).items() if k not in NOT_COMPARED}
    if not path.exists():
        write_json_atomic(path, own)
    other = {name: value for name, value in read_json(path).items() if own.get(name) != value}
    if other:
        sys.exit(f"{path}: made with {other}, and this is another benchmark; take another --output_dir")


def detach(output: Path) -> None:
    """The same command in a session of its own, which a hang-up does not end."""
    command = [sys.executable, *[each for each in sys.argv if each != "--detach"]]
    with (output / "benchmark.log").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=os.getcwd(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    print(f"process {process.pid}; what it says is in {output / 'benchmark.log'}")


def run_seed(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Both searches with one seed, then their scores on the report's prompts: what `summary` takes."""
    folder = arguments.output_dir / f"seed-{seed}"
    job = Job(
        organism=arguments.organism, target_prompts=arguments.target_prompts,
        control_prompts=arguments.control_prompts, markers_path=arguments.markers_path, n_trials=arguments.n_trials,
        n_startup_trials=round(STARTUP_SHARE * arguments.n_trials), n_search=arguments.n_search,
        n_report=arguments.n_report, response_tokens=arguments.response_tokens, kl_tokens=arguments.kl_tokens,
        seed=seed, threads=arguments.threads, ours=arguments.ours,
    )  # fmt: skip
    split = parts(job)
    sides = {
        "ours": Ours(job, folder / "ours"),
        "heretic": Heretic(job, folder / "heretic", str(arguments.peer_python), heretic_prompts(split)),
    }
    searches = {name: step(folder / name, side.search) for name, side in sides.items()}
    limit = min(max(trial["ended"] for trial in search["trials"]) for search in searches.values())
    fronts = {
        name: {"equal_trials": front(search, None), "equal_seconds": front(search, limit)}
        for name, search in searches.items()
    }
    on_search = Lazy(lambda: scorer_of(job, split, "search"))
    for name, side in sides.items():
        recheck(folder / name, side, searches[name], fronts[name]["equal_trials"], on_search)
    del on_search
    rescorer = Lazy(lambda: scorer_of(job, split, "report"))
    scores = {BEFORE: scored(folder / "before.json", lambda: rescorer().score(str(job.organism)))}
    for name, side in sides.items():
        needed = sorted(set().union(*fronts[name].values()))
        scores[name] = scored_trials(folder / name, side, needed, rescorer)
    return {"seed": seed, "searches": searches, "fronts": fronts, "scores": scores, "limit": limit}


def scorer_of(job: Job, split: dict[str, Any], part: str) -> Rescorer:
    return Rescorer(
        str(job.organism), getattr(split["target"], part), getattr(split["control"], part), job.markers_path,
        response_tokens=job.response_tokens, kl_tokens=job.kl_tokens,
    )  # fmt: skip


def parts(job: Job) -> dict[str, Any]:
    """`target` and `control` → the parts that src.abliterate makes of them."""
    from src.abliteration.prompts import read_split
    from src.abliteration.settings import AbliterateSettings

    return read_split(
        AbliterateSettings(
            model_id=str(job.organism), target_prompts=str(job.target_prompts),
            control_prompts=str(job.control_prompts), markers_path=job.markers_path, n_search=job.n_search,
            n_report=job.n_report, seed=job.seed, output_dir=Path("unused"),
        )
    )  # fmt: skip


def heretic_prompts(split: dict[str, Any]) -> dict[str, list[str]]:
    """Heretic's names of the parts: it has two, and reports on those that it searched with."""
    named = {
        "good_prompts": ("control", "directions"),
        "bad_prompts": ("target", "directions"),
        "good_evaluation_prompts": ("control", "search"),
        "bad_evaluation_prompts": ("target", "search"),
    }
    return {name: [prompt.text for prompt in getattr(split[side], part)] for name, (side, part) in named.items()}


def step(folder: Path, search: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a search, run unless it is there; a broken one begins again, or its seconds would be wrong."""
    path = folder / "search.json"
    if not path.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        print(f"{folder}: searching", flush=True)
        write_json_atomic(path, search())
    return read_json(path)


def front(search: dict[str, Any], limit: float | None) -> list[int]:
    """Trials that no other of those that had ended after `limit` seconds is better than, by the search's own scores."""
    some = [t for t in search["trials"] if t["stage"] == "full" and (limit is None or t["ended"] <= limit)]
    found, least = [], float("inf")
    for trial in sorted(some, key=lambda t: (t["behaviour"], t["kl"])):
        if trial["kl"] < least:
            found.append(trial["id"])
            least = trial["kl"]
    return found


def recheck(folder: Path, side: Any, search: dict[str, Any], numbers: Sequence[int], rescorer: "Lazy") -> None:
    """
    Measure one trial of the front again from its exported model, on the search's own prompts. Raises RuntimeError when
    the search had another KL: then the two did not get the same prompts, or what was exported is not what was tried.
    """
    trial = next(each for each in search["trials"] if each["id"] == numbers[len(numbers) // 2])

    def measured() -> dict:
        for _, model in side.export([trial["id"]], folder / "exports"):
            return rescorer().score(str(model))
        raise RuntimeError(f"{folder}: trial {trial['id']} was not exported")

    found = scored(folder / "recheck.json", measured)
    kl, behaviour = mean(found, side.kl), mean(found, "shown")
    print(
        f"{folder}: trial {trial['id']} in the search: KL {trial['kl']:.5f}, behaviour {trial['behaviour']:.3f}; from "
        f"its model: {kl:.5f}, {behaviour:.3f}", flush=True,
    )  # fmt: skip
    if abs(kl - trial["kl"]) > SAME_KL * max(kl, trial["kl"]) + SAME_KL / 10:
        raise RuntimeError(f"{folder}: KL {trial['kl']} in the search and {kl} of the exported model of {trial['id']}")


class Lazy:
    """A value that is made when it is first asked for."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._value = make, None

    def __call__(self) -> Any:
        if self._value is None:
            self._value = self._make()
        return self._value


def scored(path: Path, score: Callable[[], dict]) -> dict:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, score())
    return read_json(path)


def scored_trials(folder: Path, side: Any, numbers: Sequence[int], rescorer: Lazy) -> dict[str, dict]:
    """Trial → its scores on the report's prompts; those that are there are not made again."""
    paths = {number: folder / "scores" / f"{number}.json" for number in numbers}
    missing = [number for number in numbers if not paths[number].exists()]
    for number, model in side.export(missing, folder / "exports"):
        print(f"{folder}: scoring trial {number}", flush=True)
        scored(paths[number], lambda model=model: rescorer().score(str(model)))
    return {str(number): read_json(path) for number, path in paths.items()}


if __name__ == "__main__":
    main()
