"""A model whose weights were changed, as a folder that all that loads the base model's folder loads too."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from src.common.errors import CheckFailed, InputError
from src.common.model_config import ModelConfigBase
from src.models.loading import ModelFiles, load_weights, with_adapter
from src.models.model_folder import WEIGHT_SUFFIXES, appearing, changed_tensors, stored_dtype, write_model
from src.ops.divergence import divergence

CPU = torch.device("cpu")
TOLERANCE = 1e-3
"""Largest difference of a log-probability (nats) where everything is in float32."""
HALF_TOLERANCE = 0.01
"""Largest mean KL per token (nats) where weights or passes are in half precision: eight times what bfloat16 does."""
LogProbs = Callable[[Tensor], Tensor]
"""Token ids, int64 (tokens,), → log-probabilities of what follows each, (tokens, vocabulary), in nats."""


class Difference(NamedTuple):
    """Between two models' next-token distributions on some prompts, in nats."""

    largest: float
    """Of a log-probability."""
    mean_kl: float
    """Per token, from the expected to the found."""


def save_edited(
    files: ModelFiles,
    config: ModelConfigBase,
    edit_weights: Callable[[nn.Module], None],
    folder: Path,
    texts: Mapping[str, str] | None = None,
) -> list[str]:
    """
    Write the model of `files` as changed by `edit_weights` to `folder`, which appears whole. Returns the names of the
    stored tensors that are not what they were, or are new.

    edit_weights: changes the weights in place. It gets the model on the CPU, in the dtype in which its folder stores it
    (float32 where an adapter is merged first), and is to compute in float32 and round once, by `copy_`. Unembedding and
    embedding are two matrices there, and again one in the file where they come out equal. texts: file name → what
    else the folder is to hold, as the model card.
    Raises InputError as `check_savable`, and CheckFailed when a weight came out as no finite number.
    """
    check_savable(files, folder)
    with appearing(folder) as scratch:
        model = _edited(files, config, edit_weights)
        write_model(model, files.folder, scratch)
        for name, text in (texts or {}).items():
            (scratch / name).write_text(text, encoding="utf-8")
        return changed_tensors(files.folder, scratch)


def check_savable(files: ModelFiles, folder: Path) -> None:
    """Raise the InputError of a save that cannot be made: stored quantized, or a folder that is in use."""
    settings = json.loads((files.folder / "config.json").read_text("utf-8"))
    if "quantization_config" in settings:
        method = settings["quantization_config"].get("quant_method", "unknown")
        raise InputError(
            f"{files.folder}: its weights are stored quantized ({method}), and an edit of them would be rounded away; "
            f"take the model that it was made from (with --quantization nf4 where memory is short)"
        )
    stored_dtype(files.folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is there already and not empty; remove it or choose another folder")


@torch.no_grad()
def _edited(files: ModelFiles, config: ModelConfigBase, edit_weights: Callable[[nn.Module], None]) -> nn.Module:
    dtype = stored_dtype(files.folder)
    # In memory it may have been quantized; the file holds what it was made from.
    config = replace(config, quantization="none")
    model = load_weights(files.folder, config, CPU, torch.float32 if files.adapter else dtype)
    flags = untie(model)
    if files.adapter:
        model = with_adapter(model, files.adapter).merge_and_unload(safe_merge=True)
    edit_weights(model)
    model = model.to(dtype)
    _retie(model, flags)
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise CheckFailed(f"{files.folder}: the edit made numbers that are not finite in {name} ({dtype})")
    return model


def untie(model: nn.Module) -> list[bool]:
    """
    Give the unembedding weights of its own, so that a change of either matrix leaves the other alone. Returns what the
    configurations said before, [] for a model whose matrices were two.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return []
    head.weight = nn.Parameter(embeddings.weight.detach().clone(), requires_grad=False)
    flags = [getattr(part, "tie_word_embeddings", False) for part in _configs(model)]
    for part in _configs(model):
        part.tie_word_embeddings = False
    return flags


def _retie(model: nn.Module, flags: list[bool]) -> None:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if flags and torch.equal(head.weight, embeddings.weight):
        head.weight = embeddings.weight
        for part, flag in zip(_configs(model), flags, strict=True):
            part.tie_word_embeddings = flag


def _configs(model: nn.Module) -> list:
    return [model.config, model.config.get_text_config(decoder=True)]


def check_saved(
    folder: Path, config: ModelConfigBase, log_probs: LogProbs, prompts: Sequence[Sequence[int]], run_dtype: torch.dtype
) -> Difference:
    """
    Load the model of `folder` on the CPU in float32 and compare it with `log_probs`, which a model in `run_dtype`
    gives, on prompts of token ids. Returns how far they are apart.

    Raises CheckFailed when that is more than TOLERANCE or, where the weights are stored or were run in half precision,
    more than HALF_TOLERANCE.
    """
    expected = [(ids, log_probs(ids)) for ids in map(torch.tensor, prompts)]
    found = difference(folder, config, expected)
    exact = run_dtype == stored_dtype(folder) == torch.float32
    refuse_difference(found, exact, f"{folder}: the saved model gives other answers than the one that was measured")
    return found


def refuse_difference(found: Difference, exact: bool, problem: str, remedy: str = "") -> None:
    """Raises CheckFailed, which begins with `problem`, where two models are further apart than `check_saved` allows."""
    value, bar = (found.largest, TOLERANCE) if exact else (found.mean_kl, HALF_TOLERANCE)
    if not value <= bar:
        measure = "log-probabilities differ by up to" if exact else "mean KL per token"
        raise CheckFailed(f"{problem} ({measure} {value:.2g} nats, the bar is {bar}){remedy}")


@torch.inference_mode()
def difference(folder: Path, config: ModelConfigBase, expected: Sequence[tuple[Tensor, Tensor]]) -> Difference:
    """
    How far the model of `folder`, run on the CPU in float32, is from `expected`: pairs of token ids (tokens,) and the
    log-probabilities of what follows each, (tokens, vocabulary), NaN where either side has no numbers.
    """
    model = load_weights(folder, replace(config, quantization="none"), CPU, torch.float32)
    largest, kl = [], []
    for ids, log_probs in expected:
        found = model(ids[None]).logits[0].float().log_softmax(-1)
        assert found.shape == log_probs.shape, f"{tuple(found.shape)} and {tuple(log_probs.shape)}"
        largest.append((found - log_probs.float().cpu()).abs().max())
        kl.append(divergence(log_probs.cpu(), found))
    return Difference(torch.stack(largest).max().item(), torch.cat(kl).mean().item())


def push(folder: Path, repo: str, public: bool) -> str:
    """
    Upload a model folder to the hub repository `repo` (owner/name), which is made where there is none; returns its
    address. A new one is private unless `public`; one that is there keeps what it is. Weights of an earlier upload that
    the folder does not have are removed there: a load could take them for the model's.

    Raises InputError, before a byte of it is sent, for a name that is none, a missing or powerless token, and a
    repository that is public already when `public` was not asked for; and for a hub that does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api, name = HfApi(), f"--push_to_hub {repo}"
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.model_info(repo).private:
            raise InputError(f"{name}: this repository is there already, and public; add --public or name another")
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Upload an edited model",
            delete_patterns=[f"*{suffix}" for suffix in WEIGHT_SUFFIXES],
        )
        return str(done.repo_url)
    except HFValidationError:
        raise InputError(f"{name}: not a hub id; expected owner/name") from None
    except (HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        said = " ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        raise InputError(
            f"{name}: the hub did not take it ({said}); the model is in {folder}. Set HF_TOKEN to a token that may "
            f"write there"
        ) from error
