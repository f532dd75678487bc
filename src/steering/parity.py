"""`--parity N`: the first prompts in all arms on transformers and on vLLM, parity.json and a table."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from src.common.capture_spec import Capture
from src.common.engine_config import EngineConfigBase
from src.common.errors import CheckFailed
from src.common.files import write_json_atomic
from src.common.jsonl import round_measured
from src.common.run_folder import read_json
from src.models.engine import Engine, load_engine
from src.models.parity import Compared, Reference, give_memory_back, on_transformers, on_vllm, summary
from src.models.types import GenerationRequest
from src.steering.settings import SteerSettings
from src.steering.tasks import Task

LOGGER = logging.getLogger(__name__)
FILE_NAME = "parity.json"
AskedOf = Callable[[Engine, Task], GenerationRequest]
"""What a task asks of a loaded engine."""
WHAT = {
    "cosine_min": "smallest cosine of a position's hidden states, vLLM's against transformers', up to where the tokens "
    "part",
    "mean_absolute_error": "over all numbers of those positions",
    "top_1_agreement": "greedy next tokens that are equal after equal tokens; each row counts to its first difference",
    "log_probability_difference": "largest difference, in nats, of the log-probability of a greedy token on which both "
    "agree; untempered, the mass of the likeliest token",
}


def is_done(folder: Path, n_prompts: int) -> bool:
    """Whether an earlier start of the run passed with as many prompts."""
    path = folder / FILE_NAME
    found = read_json(path) if path.exists() else {}
    return bool(found.get("passed")) and found.get("n_prompts") == n_prompts


def first_tasks(tasks: Sequence[Task], n_prompts: int) -> list[Task]:
    """The first prompts in every arm, one repeat."""
    first = list(dict.fromkeys(task.prompt.id for task in tasks))[:n_prompts]
    return [task for task in tasks if task.prompt.id in first and task.rep_idx == 0]


def run_transformers(
    config: SteerSettings, tasks: Sequence[Task], request_of: Callable[[Engine], Callable[[Task], GenerationRequest]]
) -> list[Reference]:
    """
    The first --parity prompts on transformers, which is gone afterwards: vLLM takes the memory that it finds. tasks: in
    order. request_of: with an engine, what a task asks of it.
    """
    hf = replace_backend(config)
    LOGGER.info("Parity: the first %d prompts on transformers", config.parity)
    with load_engine(hf, config.batch_size) as model:
        ask = request_of(model)
        some = [ask(task) for task in first_tasks(tasks, config.parity)]
        places = places_of(config, some, model.n_layers)
        requests = [replace(request, temperature=0.0, capture=Capture(places=places)) for request in some]
        references = on_transformers(model, requests)
    del model, ask
    give_memory_back()
    return references


def places_of(
    config: SteerSettings, requests: Sequence[GenerationRequest], n_layers: int
) -> tuple[tuple[int, str], ...]:
    """Those of --capture, else wherever an arm acts and the last layer."""
    if config.kept:
        return config.kept.of(1, n_layers, config.hook_points).places
    acted = {(o.layer, o.hook_point) for request in requests if request.spec for o in request.spec.operations}
    return tuple(sorted(acted | {(n_layers - 1, "resid_post")}))


def check_vllm(
    config: SteerSettings, folder: Path, engine: Engine, references: Sequence[Reference], tasks: Sequence[Task],
    console: Console,
) -> None:  # fmt: skip
    """vLLM's side; writes parity.json and prints the table. Raises CheckFailed below a threshold."""
    compared = on_vllm(engine, references)
    found = summary(compared, str(engine.facts["dtype"]))
    by_id = {task.row_id: task for task in tasks}
    rows = [_row(by_id[each.id], each) for each in compared]
    write_json_atomic(
        folder / FILE_NAME,
        {"passed": found.pop("passed"), "n_prompts": config.parity} | _rounded(found) | {"what": WHAT, "rows": rows},
    )
    print_table(found, console)
    if found["failures"]:
        raise CheckFailed(f"vLLM and transformers differ: {'; '.join(found['failures'])}; see {folder / FILE_NAME}")


def print_table(found: dict, console: Console) -> None:
    """A line a place, and one on the tokens."""
    bars = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in found["thresholds"].items())
    table = Table(
        title=f"vLLM against transformers ({found['dtype']}; thresholds: {bars})", title_justify="left", box=SIMPLE_HEAD
    )
    table.add_column("Hidden states")
    for heading in ("smallest cosine", "mean absolute error"):
        table.add_column(heading, justify="right")
    for name, each in found["places"].items():
        layer, hook_point = name.split(".")
        numbers = f"{each['cosine_min']:.7f}", f"{each['mean_absolute_error']:.2e}"
        table.add_row(f"{hook_point} of layer {layer}", *numbers)
    console.print(table)
    greedy = found["greedy"]
    console.print(
        f"{greedy['rows_identical']} of {greedy['rows']} greedy answers identical, {greedy['tokens_agreed']} tokens "
        f"until the first differences (top-1 agreement {greedy['top_1_agreement']:.4f}); largest difference of a "
        f"token's log-probability {found['log_probability_difference']:.1e}"
    )


def replace_backend(config: SteerSettings) -> EngineConfigBase:
    """The same model for transformers."""
    names = ("model_id", "adapter_path", "revision", "dtype", "device", "trust_remote_code", "max_model_len", "seed")
    return EngineConfigBase(
        output_dir=config.output_dir, backend="hf", **{name: getattr(config, name) for name in names}
    )


def _row(task: Task, each: Compared) -> dict[str, object]:
    return {
        "id": each.id,
        "arm": task.arm.name,
        "prompt_id": task.prompt.id,
        "tokens_agreed": each.n_agreed,
        "tokens_transformers": each.n_tokens[0],
        "tokens_vllm": each.n_tokens[1],
        "identical": each.identical,
        "log_probability_difference": round_measured(each.log_probability),
    }


def _rounded(found: dict) -> dict:
    """Measured numbers as they are written; cosines near 1 keep their digits."""
    shown = lambda each: {  # noqa: E731
        "cosine_min": _number(each["cosine_min"]), "mean_absolute_error": round_measured(each["mean_absolute_error"]),
    }  # fmt: skip
    places = {name: shown(each) for name, each in found["places"].items()}
    difference = round_measured(found["log_probability_difference"])
    return found | {"places": places, "log_probability_difference": difference}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
