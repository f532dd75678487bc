"""Settings of asking: whom, what, how often."""

from dataclasses import dataclass

from src.common.api_config import ApiConfigBase
from src.common.settings import setting


@dataclass(kw_only=True)
class AskSettings(ApiConfigBase):
    """Fields of `src.ask`."""

    dataset_path: str = setting()
    """The questions: JSON list, JSONL, CSV, Parquet or text file, or hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]."""
    question_field: str | None = None
    """The column that holds the question, a text or a list of {"role", "content"}; the first there is of messages,
    prompt, question, text unless given."""
    system_prompt: str | None = None
    """A system message before every question."""
