"""The hidden states that `--capture` keeps of each row: asked for with its request, written to `captures/`."""

from collections.abc import Sequence
from pathlib import Path

from src.common.capture_spec import Capture
from src.common.captures import FOLDER_NAME, CaptureWriter
from src.common.errors import InputError
from src.common.results import Results
from src.models.types import GenerationRequest, GenerationResult
from src.steering.settings import SteerSettings


class Kept:
    """The captures of a run. A row is there when it and its capture are."""

    def __init__(self, config: SteerSettings, folder: Path, results: Results) -> None:
        """
        Rows of an earlier start whose captures a kill took are dropped. Raises InputError for a captures folder that is
        broken, and for captures without their row.
        """
        assert config.kept is not None, "nothing is to be captured"
        self._spec = config.kept
        self._hook_points = config.hook_points
        self._results = results
        self._writer = CaptureWriter(folder / FOLDER_NAME)
        homeless = sorted(self._writer.done - results.rows.keys())
        if homeless:
            raise InputError(
                f"{folder / FOLDER_NAME}: row {homeless[0]!r} is captured and {results.path.name} lacks it; choose "
                f"another --output_dir"
            )
        results.drop(results.rows.keys() - self._writer.done)

    def of(self, prompt_length: int, n_layers: int) -> Capture:
        """What to keep of a prompt. Raises InputError for a layer that the model lacks."""
        return self._spec.of(prompt_length, n_layers, self._hook_points)

    def add(self, request: GenerationRequest, result: GenerationResult) -> None:
        """Keep a row's states; the row itself is written already."""
        capture = request.capture
        assert capture is not None, f"{request.id} keeps nothing"
        # The last token was generated and not run: the one that ended the answer, or the answer's own.
        n_run = len(request.token_ids) + len(result.token_ids) - (result.finish_reason == "length")
        self._results.sync()
        self._writer.add(
            result.id, result.captures, prompt_length=len(request.token_ids), start=capture.start,
            reduce="mean" if capture.mean else "none", n_positions=capture.n_positions(n_run),
        )  # fmt: skip

    def flush(self) -> None:
        """Onto the disk with what is there."""
        self._writer.close()

    def finish(self, row_ids: Sequence[str]) -> None:
        """All is there: the manifests."""
        self.flush()
        assert self._writer.done >= set(row_ids), "some rows were not captured"
        self._writer.finish()
