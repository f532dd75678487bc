"""
Fetch a model or an adapter from the hub into a folder, for nodes without internet. From the repository root:
uv run -m src.download_model --model_id HuggingFaceTB/SmolLM2-135M-Instruct --output_dir data/models/smollm2
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from src.common.cli import run_command
from src.common.errors import InputError
from src.common.files import sha256_file, write_json_atomic
from src.common.settings import setting

LOGGER = logging.getLogger(__name__)
CARD = "download.json"
SPARE_BYTES = 1_000_000_000


@dataclass(kw_only=True)
class DownloadModelConfig:
    """The download"""

    model_id: str = setting(aliases=("model",))
    """Hub id of a model or of a LoRA adapter: owner/name."""
    revision: str | None = None
    """Branch, tag or commit; the newest when left out."""
    output_dir: Path = setting()
    """Folder that then holds the files, to pass as --model_id or --adapter_path."""
    describe_only: bool = False
    """Only say what would be fetched and whether it fits."""


def main(config: DownloadModelConfig) -> None:
    from src.models import hub

    # 1. What there is to fetch, and whether there is room.
    if config.output_dir.exists() and not config.output_dir.is_dir():
        raise InputError(f"--output_dir {config.output_dir}: this is a file; expected a folder")
    remote = hub.remote_files(config.model_id, config.revision)
    weights = [name for name in remote.sizes if name.endswith(".safetensors")]
    if not weights:
        raise InputError(
            f"--model_id {config.model_id}: it holds no safetensors weights; pickled ones are never loaded"
        )
    describe(config, remote.sizes)
    if config.describe_only:
        return

    # 2. Fetch; files that are there already are kept.
    config.output_dir.mkdir(parents=True, exist_ok=True)
    folder = hub.download(config.model_id, remote.commit, local_dir=config.output_dir)

    # 3. Check what came, and say in a card what it is.
    for name, size in remote.sizes.items():
        there = (folder / name).stat().st_size if (folder / name).exists() else 0
        if there != size:
            raise InputError(f"{folder / name}: {there} of {size} bytes came; run the same command again")
    card = {
        "model_id": config.model_id,
        "commit": remote.commit,
        "licence": remote.licence,
        "files": {n: {"bytes": size, "sha256": sha256_file(folder / n)} for n, size in sorted(remote.sizes.items())},
    }
    write_json_atomic(folder / CARD, card)
    print(f"wrote {folder}  {len(remote.sizes)} files of {config.model_id} at {remote.commit}")
    print(f"wrote {folder / CARD}  where they come from, their sizes and sha256")
    flag = "--adapter_path" if (folder / "adapter_config.json").exists() else "--model_id"
    print(f"to use it: {flag} {folder}")


def describe(config: DownloadModelConfig, sizes: dict[str, int]) -> None:
    """Print the sizes and the room there is. Raises InputError when what is missing would not fit."""
    present = sum(size for name, size in sizes.items() if _size(config.output_dir / name) == size)
    total = sum(sizes.values())
    parent = next(p for p in [config.output_dir, *config.output_dir.absolute().parents] if p.is_dir())
    free = shutil.disk_usage(parent).free
    for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:20]:
        print(f"{size / 1e6:10.1f} MB  {name}")
    print(f"{total / 1e6:10.1f} MB in {len(sizes)} files, {present / 1e6:.1f} MB of it there; {free / 1e9:.1f} GB free")
    if total - present + SPARE_BYTES > free:
        raise InputError(
            f"--output_dir {config.output_dir}: {(total - present) / 1e9:.1f} GB are still to come and "
            f"{free / 1e9:.1f} GB are free (1 GB is kept spare); choose a folder on a larger disk"
        )


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


if __name__ == "__main__":
    run_command(main, DownloadModelConfig)
