"""Finding a model's files: a bundled model, a local folder, or the hub, with errors that say what to do. No torch."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from src.common.errors import InputError

# The files that a load reads; never pickled weights, never the second copies that some repositories keep.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
IGNORED = ["original/*", "consolidated*.safetensors", "onnx/*", "openvino/*", "*.bin", "*.pt", "*.pth"]
MODEL_FLAG, ADAPTER_FLAG = "--model_id", "--adapter_path"
HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


def split_reference(model_id: str, adapter_path: Path | None = None) -> tuple[str, str | None]:
    """
    (model, adapter) of a model reference `X[+ADAPTER]`. Raises InputError when an adapter is named twice.

    A `+` inside an existing folder's name is part of the name.
    """
    if "+" not in model_id or Path(model_id).exists():
        return model_id, str(adapter_path) if adapter_path else None
    base, adapter = model_id.rsplit("+", 1)
    if adapter_path:
        raise InputError(f"--model_id {model_id} names an adapter and so does --adapter_path {adapter_path}; drop one")
    return base, adapter


def check_reference(model_id: str, adapter_path: Path | None = None, flag: str = MODEL_FLAG) -> None:
    """
    Raise the InputError of a wrong local path at once, before anything slow is imported or fetched.

    flag: what gave `model_id`. A hub id passes: whether it exists is known only when it is fetched.
    """
    from src.models.bundled import CHAT_MODEL, EMBEDDING_MODEL, PREFIX

    base, adapter = split_reference(model_id, adapter_path)
    if base.startswith(PREFIX):
        if base.removeprefix(PREFIX) not in (CHAT_MODEL, EMBEDDING_MODEL):
            raise InputError(f"{flag} {base}: expected {PREFIX}{CHAT_MODEL} or {PREFIX}{EMBEDDING_MODEL}")
    elif not _is_hub_id(base, flag):
        model_folder(base, flag=flag)
    adapter_flag = ADAPTER_FLAG if flag == MODEL_FLAG else flag
    if adapter and not _is_hub_id(adapter, adapter_flag):
        adapter_folder(adapter, adapter_flag)


def model_folder(model_id: str, revision: str | None = None, flag: str = MODEL_FLAG) -> Path:
    """
    The local folder that holds a model's files, fetched from the hub when it is a hub id. flag: what gave it.

    Raises InputError for a folder that is missing or holds no config.json or weights, an unknown or gated hub id, an
    unknown revision, or an unreachable hub.
    """
    from src.models.bundled import PREFIX, bundled_folder

    if model_id.startswith(PREFIX):
        return bundled_folder(model_id)
    return _checked(_local_or_hub(model_id, revision, flag), "config.json", f"{flag} {model_id}")


def adapter_folder(adapter: str, flag: str = ADAPTER_FLAG) -> Path:
    """The local folder of a LoRA adapter (local or hub). Raises InputError as `model_folder` does."""
    return _checked(_local_or_hub(adapter, None, flag), "adapter_config.json", f"{flag} {adapter}")


def _is_hub_id(name: str, flag: str) -> bool:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return False
    if folder.exists():
        raise InputError(f"{flag} {name}: this is a file; expected a folder, a hub id or bundled:smollm2-135m")
    if not HUB_ID.match(name) or name.startswith("."):
        raise InputError(f"{flag} {name}: no such folder, and not a hub id (owner/name); check the path")
    return True


def _local_or_hub(name: str, revision: str | None, flag: str) -> Path:
    return download(name, revision, flag) if _is_hub_id(name, flag) else Path(name).expanduser()


def _checked(folder: Path, config_name: str, what: str) -> Path:
    if not (folder / config_name).is_file():
        raise InputError(f"{what}: {folder} holds no {config_name}; expected a folder as save_pretrained writes it")
    if not any(folder.glob("*.safetensors")):
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        remedy = f"convert {', '.join(others)} to safetensors" if others else "fetch it again with src.download_model"
        raise InputError(f"{what}: {folder} holds no weights (*.safetensors); {remedy}")
    return folder


class RemoteFiles(NamedTuple):
    """What a download would bring."""

    commit: str
    sizes: dict[str, int]
    """Bytes of each file that a load reads."""
    licence: str | None


def remote_files(repo_id: str, revision: str | None, flag: str = "--model_id") -> RemoteFiles:
    """The files that `download` would fetch, without fetching them. Raises InputError as `download` does."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    with explaining(repo_id, revision, flag):
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    wanted = filter_repo_objects(sizes, allow_patterns=PATTERNS, ignore_patterns=IGNORED)
    licence = info.card_data.get("license") if info.card_data else None
    return RemoteFiles(str(info.sha), {name: sizes[name] for name in wanted}, licence)


class DatasetFacts(NamedTuple):
    """What the hub says of a dataset."""

    commit: str
    """That a revision means now."""
    licence: str | None


def dataset_facts(name: str, revision: str | None, flag: str) -> DatasetFacts:
    """The commit and the licence of a dataset of the hub. Raises InputError as `download`."""
    from huggingface_hub import HfApi

    with explaining(name, revision, flag, kind="dataset"):
        info = HfApi().dataset_info(name, revision=revision)
    return DatasetFacts(str(info.sha), info.card_data.get("license") if info.card_data else None)


def download(repo_id: str, revision: str | None, flag: str = "--model_id", local_dir: Path | None = None) -> Path:
    """
    Fetch what a load needs of a hub repository into the cache, or into `local_dir`; returns the folder.

    Files already there are not fetched again. Raises InputError, each with its remedy, for a gated repository without
    access, an unknown id or revision, and a hub that does not answer.
    """
    from huggingface_hub import snapshot_download

    with explaining(repo_id, revision, flag):
        folder = snapshot_download(
            repo_id, revision=revision, allow_patterns=PATTERNS, ignore_patterns=IGNORED, local_dir=local_dir
        )
    return Path(folder)


@contextmanager
def explaining(repo_id: str, revision: str | None, flag: str, kind: str = "model") -> Iterator[None]:
    """Turn the hub client's exceptions into InputErrors that say what to do. kind: model or dataset."""
    # The HTTP client's base error, under the name by which the hub's client knows it: the client itself changes.
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except HFValidationError:
        raise InputError(f"{flag} {repo_id}: not a hub id; expected owner/name") from None
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise _explained(error, repo_id, revision, flag, kind) from error


def _explained(error: Exception, repo_id: str, revision: str | None, flag: str, kind: str) -> InputError:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    name = f"{flag} {repo_id}"
    # A snapshot that is not in the cache either is reported as such, with the hub's own answer as its cause.
    cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
    if isinstance(cause, GatedRepoError):
        return InputError(
            f"{name}: this {kind} is gated. Ask for access on its page on the hub, "
            f"then set HF_TOKEN to a token of that account"
        )
    if isinstance(cause, RevisionNotFoundError):
        flag = "--revision" if kind == "model" else "the revision"
        return InputError(f"{name}: it has no revision {revision!r}; leave {flag} out for the newest")
    if isinstance(cause, RepositoryNotFoundError):
        return InputError(f"{name}: no such folder here and no such {kind} on the hub (or it is private: set HF_TOKEN)")
    unanswered = f"the hub does not answer as it should ({type(cause).__name__})"
    if kind == "dataset":
        return InputError(f"{name}: {unanswered}. Try again where there is internet, or give a local file")
    return InputError(
        f"{name}: not in the local cache, and {unanswered}. "
        f"Where there is internet, `uv run -m src.download_model --model_id {repo_id} --output_dir FOLDER` fetches a "
        f"folder to pass instead; or try bundled:smollm2-135m"
    )
