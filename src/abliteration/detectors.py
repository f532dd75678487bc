"""What decides whether a response shows the behaviour, as the settings say."""

from collections.abc import Sequence

from src.abliteration.answering import Detector
from src.abliteration.judge import JudgeScorer
from src.abliteration.markers import Markers, read_markers
from src.abliteration.nli import NliScorer
from src.abliteration.settings import AbliterateSettings


class MarkerDetector:
    """Whether a text holds a marker."""

    grows = True

    def __init__(self, markers: Markers) -> None:
        self.markers = markers

    def shown(self, texts: Sequence[str]) -> list[bool]:
        """One a text."""
        return [self.markers.shows(text) for text in texts]


class WholeTextDetector:
    """Whether a classifier or a judge says so of the whole text."""

    grows = False

    def __init__(self, scorer: NliScorer | JudgeScorer) -> None:
        self._scorer = scorer

    def shown(self, texts: Sequence[str]) -> list[bool]:
        """One a text."""
        return self._scorer.shows(texts)


def detector_of(config: AbliterateSettings) -> Detector:
    """The detector of --scorer. Raises InputError for a bad marker file or rubric, and a classifier that is none."""
    if config.scorer == "nli":
        return WholeTextDetector(NliScorer(config.nli_model_id, config.nli_hypothesis, device=config.device))
    if config.scorer == "judge":
        folder = config.output_dir / "judge"
        return WholeTextDetector(JudgeScorer(config.judge_model_id, config.judge_rubric, config.judge_base_url, folder))
    return MarkerDetector(Markers(read_markers(config.markers_path)))
