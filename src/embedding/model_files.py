"""Which sentence-transformers model a reference means, what identifies it, and loading it."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from src.common.errors import InputError
from src.common.files import sha256_file
from src.models.fingerprint import fingerprint
from src.models.hub import model_folder

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

MODULES = "modules.json"


def embedding_folder(model_id: str, revision: str | None) -> Path:
    """
    The local folder of a sentence-transformers model, fetched from the hub where it is a hub id.
    Raises InputError as `model_folder`, and for a model that does not say how its tokens become one vector.
    """
    folder = model_folder(model_id, revision)
    if not (folder / MODULES).is_file():
        raise InputError(
            f"--model_id {model_id}: no {MODULES} in {folder}, so nothing says how its tokens become one vector; "
            f"expected a sentence-transformers model, as bundled:minilm"
        )
    return folder


def embedding_fingerprint(folder: Path) -> str:
    """sha256 over the weights (as `fingerprint`) of the folder and those below, their settings and tokenizer."""
    digest = hashlib.sha256()
    for path in sorted([folder, *(path for path in folder.rglob("*") if path.is_dir())]):
        shown = path.relative_to(folder).as_posix()
        if any(path.glob("*.safetensors")):
            digest.update(f"{shown}:{fingerprint(path)}\n".encode())
        for file in sorted([*path.glob("*.json"), *path.glob("*.txt")]):
            digest.update(f"{shown}/{file.name}:{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def load_sentence_transformer(folder: Path, device: "torch.device") -> "SentenceTransformer":
    """
    The model in float32, in evaluation mode. Raises InputError for one whose files do not fit together, and for one
    that is no transformer with a tokenizer (images, bags of words, static vectors).
    """
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.transformer import Transformer

    try:
        model = SentenceTransformer(
            str(folder), device=str(device), local_files_only=True, model_kwargs={"dtype": "float32"}
        )
    except (ValueError, OSError, KeyError, SafetensorError) as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(f"--model_id {folder}: not loadable ({first}); fetch it again") from error
    if not isinstance(model[0], Transformer) or model.tokenizer is None:
        raise InputError(
            f"--model_id {folder}: its first module is a {type(model[0]).__name__}; expected a Transformer"
        )
    return model.eval()


def chosen_prompt(model: "SentenceTransformer", prompt: str | None, prompt_name: str | None) -> str:
    """
    The text to put before every text: the one given, the one of the name, the model's default, or none.
    Raises InputError for a name that the model does not have.
    """
    if prompt is not None:
        return prompt
    name = prompt_name if prompt_name is not None else model.default_prompt_name
    if name is None:
        return ""
    if name not in model.prompts:
        known = ", ".join(model.prompts) or "none"
        raise InputError(f"--prompt_name {name}: the model has no such prompt; it has {known}")
    return model.prompts[name] or ""
