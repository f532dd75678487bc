"""What a search is about and needs, put together from the settings and the loaded model."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.abliteration.detectors import MarkerDetector
from src.abliteration.edits import EditMaker, EditOptions
from src.abliteration.evaluation import Reference
from src.abliteration.kernel import Plan, plan_of
from src.abliteration.prompts import Split, asked
from src.abliteration.scores import Scorer
from src.abliteration.search import on_front
from src.abliteration.settings import COMPONENTS, AbliterateSettings
from src.abliteration.space import Space
from src.abliteration.storage import JOURNAL, open_storage
from src.abliteration.study import Study, chosen_on, rows_there
from src.common.directions_file import Directions, read_directions
from src.common.errors import InputError
from src.common.row_files import read_text
from src.common.secrets import without_passwords
from src.common.system_prompts import PLAIN
from src.models.added_biases import refuse_bias
from src.models.compiling import compiled_norms
from src.models.cpu_linear import packed_linears
from src.models.language_model import LanguageModel
from src.models.writer_check import refuse_changed_additions, refuse_partial

LOGGER = logging.getLogger(__name__)
FINGERPRINTS = ("model_fingerprint", "adapter_fingerprint")
MOST_ON_CONTROL = 0.5
"""The behaviour's share of control answers over that of target answers: above, the markers do not part them."""
N_SCANNED = 6
"""Prompts of each kind on which single layers are tried before the search."""
N_COMPARED = 8
"""Of these the ones whose KL is taken."""
N_STRONGEST = 3
"""Of these the ones that a search begins at."""
LEAST_KL = 0.005
"""Nats per token, added before dividing by it: below it differences say little."""


@contextmanager
def computing(config: AbliterateSettings, model: LanguageModel) -> Iterator[None]:
    """
    How all numbers that are compared with one another come about: without gradients, on packed weights, and with
    --compile by compiled parts. Raises InputError where there is nothing to compile, or nothing to compile with.
    """
    compiled = compiled_norms(model.model) if config.compile else nullcontext()
    with torch.inference_mode(), packed_linears(model.model), compiled:
        yield


def own_directions(config: AbliterateSettings, path: Any, model: LanguageModel) -> Directions:
    """The directions of a file. Raises InputError when they are another model's, or not of all layers."""
    found = read_directions(path)
    _refuse_other_model("--directions_path", found, config, model.facts)
    if found.metadata.hook_point != "resid_post":
        raise InputError(f"--directions_path {path}: of {found.metadata.hook_point}; expected resid_post")
    return found


def _refuse_other_model(flag: str, found: Directions, config: AbliterateSettings, facts: Mapping[str, Any]) -> None:
    for name in FINGERPRINTS:
        if getattr(found.metadata, name) != facts.get(name):
            raise InputError(
                f"{flag} {found.source}: extracted from {found.metadata.model_id}, whose {name} is another than that "
                f"of --model_id {config.model_id}; extract them from this model"
            )


def edit_options(config: AbliterateSettings, directions: Directions) -> EditOptions:
    """What holds for every trial. Raises InputError for --calibrate without scores, and as --induce's file does."""
    return EditOptions(
        components=tuple(config.components), norm=config.norm, heads=config.parsed_heads(),
        calibration=_calibration(directions) if config.calibrate else None, added=_added(config, directions),
    )  # fmt: skip


def refuse_inexact(config: AbliterateSettings, net: nn.Module, maker: EditMaker) -> None:
    """
    Raises InputError, before anything is asked, where edits would not be what they are said to be: parts that nobody
    knows write beside those that are edited, what --induce adds arrives changed, or no weight can hold it.
    """
    for layer in maker.options.added or ():
        if config.save == "model":
            refuse_bias(net, maker.adding(layer))
    if set(config.components) == set(COMPONENTS):
        refuse_partial(net, maker.writers, maker.gains)
    if maker.options.added:
        refuse_changed_additions(net, maker.writers, maker.additions())


def _calibration(directions: Directions) -> list[float]:
    """(target mean − control mean) / target mean of each layer's projections, between 0 and 2."""
    scores = directions.metadata.scores
    if not {"target_mean", "control_mean"} <= scores.keys():
        raise InputError(f"--calibrate: {directions.source} holds no class means; extract the directions here")
    first = lambda value: value[0] if isinstance(value, list) else value  # noqa: E731
    if directions.k > 1:
        raise InputError(f"--calibrate: {directions.source} holds {directions.k} directions a layer; expected one")
    found = []
    for layer, (target, control) in enumerate(zip(scores["target_mean"], scores["control_mean"], strict=True)):
        target, control = first(target), first(control)
        if target is None or control is None:
            raise InputError(f"--calibrate: {directions.source} holds no class means of layer {layer}")
        found.append(min(2.0, max(0.0, (target - control) / target)) if target else 0.0)
    return found


def _added(config: AbliterateSettings, directions: Directions) -> dict[int, Tensor] | None:
    parsed = config.parsed_induce()
    if parsed is None:
        return None
    path, layers, coefficient = parsed
    file = read_directions(path)
    _refuse_other_model("--induce", file, config, {name: getattr(directions.metadata, name) for name in FINGERPRINTS})
    if (file.n_layers, file.d_model) != (directions.n_layers, directions.d_model):
        raise InputError(f"--induce {path}: directions of a model of another shape")
    if layers == "best":
        layers = (file.metadata.best_layer,) if file.metadata.best_layer is not None else ()
    chosen = file.layers_present if layers == "all" else layers
    if not chosen:
        raise InputError(f"--induce {config.induce}: {path} names no best layer; name the layers")
    return {layer: coefficient * torch.from_numpy(file.vector(layer)) for layer in chosen}


def prepare_scorer(config: AbliterateSettings, model: LanguageModel, maker: EditMaker, detector: Any,
                   split: Mapping[str, Split], renderer: Any) -> Scorer:  # fmt: skip
    """The scorer of the search's prompts. Raises InputError when there is nothing to remove."""
    scorer = Scorer(
        model, maker.writers, detector,
        target=asked(split["target"].search, renderer), control=asked(split["control"].search, renderer),
        kl_tokens=config.kl_tokens, response_tokens=config.response_tokens, batch_size=config.batch_size,
    )  # fmt: skip
    n = len(split["target"].search)
    LOGGER.info("The behaviour shows in %d of %d answers without an edit", scorer.n_before, n)
    if scorer.n_left_out:
        LOGGER.info("KL leaves out %d control prompts on which it shows, too", scorer.n_left_out)
    if not scorer.n_before:
        raise InputError(
            f"none of {n} answers to the target prompts shows the behaviour: there is nothing to remove. Look at what "
            f"the model answers (src.steer or src.chat) and at --markers_path; --response_tokens is "
            f"{config.response_tokens}"
        )
    return scorer


def refuse_common_markers(reference: Reference) -> None:
    """Raises InputError when the behaviour already shows in too many answers to control prompts."""
    shares, shown = {}, {}
    for side, prompts in reference.protocol.prompts.items():
        shown[side] = [key for key, is_shown in reference.answers.shown.items() if is_shown and key[0] == side]
        shares[side] = len(shown[side]) / len(prompts)
    if not shown["control"] or shares["control"] <= MOST_ON_CONTROL * shares["target"]:
        return
    found = ""
    if isinstance(reference.protocol.detector, MarkerDetector):
        markers = [reference.protocol.detector.markers.find(reference.answers.texts[key]) for key in shown["control"]]
        most = max(set(markers), key=markers.count)
        found = f", {most!r} in {markers.count(most)} of the former"
    raise InputError(
        f"the behaviour shows in {shares['control']:.0%} of the answers to control prompts without an edit and in "
        f"{shares['target']:.0%} of those to target prompts{found}: what is looked for does not tell them apart; take "
        f"other markers, or other prompts"
    )


def first_points(config: AbliterateSettings, scorer: Scorer, maker: EditMaker, space: Space,
                 best_layer: int | None) -> list[Plan]:  # fmt: skip
    """
    The plans that a search begins with. Each component of each layer is edited alone, by its own direction, on a few
    prompts; those that take most of the behaviour away for the least KL come first.
    """
    at_once = config.trials_per_batch
    plans = space.single_layers()
    edits = [maker.edits(plan) for plan in plans]
    parts = range(0, len(plans), at_once)
    changes = [each for at in parts for each in scorer.scan(edits[at : at + at_once], N_SCANNED)]
    lowest = sorted(range(len(plans)), key=lambda i: changes[i])[:N_COMPARED]
    kl = {i: scorer.scan_kl([edits[i]], N_SCANNED)[0] for i in lowest}
    order = sorted(lowest, key=lambda i: changes[i] / (kl[i] + LEAST_KL))
    for i in order[:N_STRONGEST]:
        where = ", ".join(f"{name} {kernel.position:.0f}" for name, kernel in plans[i].kernels.items() if kernel.high)
        LOGGER.info("Editing %s alone changes the log-odds by %.2f at a KL of %.2g", where, changes[i], kl[i])
    return space.starts([plans[i] for i in order[:N_STRONGEST]], best_layer)


def warm_points(config: AbliterateSettings, space: Space, study: Study, prompts: str) -> list[Plan]:
    """
    The front of the study of --warm_start, positions moved to this model's depth; `study` keeps where they come from.
    prompts: what `about` says of the search's. Raises InputError when there is no such study, and when it has other
    components.
    """
    if config.warm_start is None:
        return []
    folder, given = Path(config.warm_start), without_passwords(f"--warm_start {config.warm_start}")
    if folder.is_dir() and not (folder / JOURNAL).exists():
        raise InputError(f"{given}: holds no {JOURNAL}; expected the folder of a run, or an Optuna URL")
    storage = open_storage(None if folder.is_dir() else config.warm_start, folder, config.stale_seconds, is_own=False)
    rows = rows_there(storage, config.study_name)
    if not rows:
        raise InputError(f"{given}: no finished trial of a study {config.study_name!r}")
    best = on_front(rows, config.max_kl, rows[0]["n_behaviour"] + 1)
    plans = [plan_of(row["params"]) for row in best]
    odd = {name for plan in plans for name in plan.kernels} ^ set(space.components)
    if odd:
        raise InputError(f"{given}: its --components differ by {', '.join(sorted(odd))}")
    is_same = chosen_on(storage, config.study_name, prompts)
    study.note_warm_start(without_passwords(config.warm_start), is_same)
    chosen = "the search's prompts of this run" if is_same else "others, among which prompts of its report may be"
    LOGGER.info("Begun with the %d best points of %s, which were chosen on %s", len(best), given, chosen)
    depths = [row.get("n_layers", space.n_layers) for row in best]
    return [space.moved(plan, depth) for plan, depth in zip(plans, depths, strict=True)]


def about(config: AbliterateSettings, model: LanguageModel, directions: Directions, split: Mapping[str, Split]) -> dict:
    """What trials of one study must have in common for their scores to be compared."""
    ids = {side: [(each.id, each.text) for each in some.search] for side, some in split.items()}
    names = ("scorer", "nli_model_id", "nli_hypothesis", "judge_model_id", "judge_base_url", "norm", "components",
             "heads", "calibrate", "induce", "min_weight", "max_weight", "kl_tokens", "response_tokens", "max_kl",
             "seed", "system_prompt", "raw_prompts", "thinking_mode", "quantization")  # fmt: skip
    markers = "".join(read_text(path) for path in (config.markers_path, config.judge_rubric) if path)
    template = config.chat_template
    template = template if template in (None, PLAIN) else _sha256(read_text(Path(template)).encode())
    return {
        "model_fingerprint": model.facts.get("model_fingerprint"),
        "adapter_fingerprint": model.facts.get("adapter_fingerprint"),
        "dtype": model.facts.get("dtype"),
        "directions": _sha256(directions.directions.tobytes()),
        "prompts": _sha256(json.dumps(ids).encode()),
        "markers": _sha256(markers.encode()),
        "chat_template": template,
        **{name: getattr(config, name) for name in names},
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
