"""Uploading a folder of shards to the hub as a dataset."""

import os
from pathlib import Path

from src.common.errors import InputError

UPLOADED = ["shard-*.parquet", "shard-*.json", "manifest.json"]


def require_token(repo_id: str) -> None:
    """Raises InputError, before hours of work, where there is no token to upload with, or the name is none."""
    from huggingface_hub import get_token

    if repo_id.count("/") != 1:
        raise InputError(f"--push_to_hub {repo_id}: expected owner/name")
    if not get_token():
        raise InputError(f"--push_to_hub {repo_id}: no token of the hub; set HF_TOKEN, or run `hf auth login`")


def push_shards(folder: Path, repo_id: str, public: bool) -> None:
    """
    Makes the dataset repository, private unless `public`, and uploads shards, sidecars and manifest.
    Raises InputError where the hub refuses, and where the repository is there with another visibility.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repo_id, repo_type="dataset", private=not public, exist_ok=True)
        is_private = api.repo_info(repo_id, repo_type="dataset").private
        if is_private == public:
            word = "private" if is_private else "public"
            raise InputError(f"--push_to_hub {repo_id}: the repository is there and {word}; choose another name")
        api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=folder, allow_patterns=UPLOADED)
    except (HfHubHTTPError, OSError) as error:
        said = str(error).strip().split("\n")[0]
        raise InputError(
            f"--push_to_hub {repo_id}: {type(error).__name__}: {said}; the shards are in {folder}; the same command "
            f"uploads them"
        ) from error
    print(f"uploaded to {os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/datasets/{repo_id}")
