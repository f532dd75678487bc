"""How `src.abliterate` has its directions extracted: every setting of it is passed on and acts."""

from pathlib import Path

import pytest

from src.common.directions_file import Directions, read_directions
from src.common.jsonl import write_jsonl_atomic
from tests.abliterate_runs import extracting_here, words
from tests.tiny_organism import prompts as some_prompts


def extracted(arguments: list[str], folder: Path) -> Directions:
    """As the command extracts them, its own process left out."""
    from src.abliterate import AbliterateConfig
    from src.abliteration.extraction import extract_directions
    from src.abliteration.prompts import read_split
    from src.common.cli import parse_config

    config = parse_config(AbliterateConfig, arguments)
    folder.mkdir()
    with extracting_here():
        return read_directions(extract_directions(config, folder, read_split(config)))


@pytest.fixture(scope="module")
def plain(organism: Path, prompts, tmp_path_factory: pytest.TempPathFactory) -> Directions:
    folder = tmp_path_factory.mktemp("plain") / "r"
    return extracted(words(organism, prompts, folder), folder)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of a third kind."""
    path = tmp_path_factory.mktemp("kept") / "kept.jsonl"
    texts = some_prompts(["plant", "water", "dig", "mow"], 20, seed=4)
    return write_jsonl_atomic(path, [{"prompt": text} for text in texts]) or path


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--method", "median_of_means"), {}),
        (("--method", "pca"), {}),
        (("--method", "ensemble"), {"ensemble_methods": ["mean_difference", "logistic"]}),
        (("--method", "mean_and_pca", "--n_directions", "2"), {}),
        (("--token_position", "token:-3"), {}),
        (("--project_out", "control_mean"), {"project_out": "control_mean"}),
        (("--system_prompt", "Be brief."), {"system_prompt": "Be brief."}),
        (("--preserve_prompts", "{kept}"), {"n_preserve_examples": 20}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_every_setting_of_the_extraction_acts(
    flags, told, plain: Directions, kept, organism, prompts, tmp_path
) -> None:
    flags = tuple(word.replace("{kept}", str(kept)) for word in flags)
    found = extracted(words(organism, prompts, tmp_path / "r", *flags), tmp_path / "r")
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert found.metadata.method == given.get("--method", "mean_difference")
    assert found.metadata.token_position == given.get("--token_position", "last_prompt")
    assert told.items() <= found.metadata.details.items()
    assert (found.n_layers, found.k) == (plain.n_layers, int(given.get("--n_directions", 1)))
    # Of several directions the first is theirs that the method adds others to, and a sign makes no other direction.
    alike = [abs(found.vector(layer, found.k - 1) @ plain.vector(layer)) for layer in range(plain.n_layers)]
    assert min(alike) < 0.9999
