"""The stock chat templates that TRL ships, each on the bundled tokenizer with its own literals added as tokens."""

import importlib.util
import re
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

BUNDLED = "bundled"
# What templates write as special tokens: <|x|>, <|x>, <x|>, DeepSeek's fullwidth bars, <s>, <bos>, turns, [INST].
SPECIAL = re.compile(
    r"<\|[^<>|\n'\"{} ]{1,40}\|>|<｜[^<>\n'\"{}]{1,40}｜>|<\|[a-zA-Z_]+>|<[a-zA-Z_]+\|>|</?s>|<bos>|<eos>"
    r"|<(?:start|end)_of_turn>|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS)\]|<image>|<end_of_utterance>"
)
# Added as tokens too, but not special: a decoder shows them.
THINKING = re.compile(r"</?think>|\[/?THINK\]|<\|(?:START|END)_THINKING\|>")


def template_files() -> dict[str, Path | None]:
    """Name → file of the stock templates, the bundled model's own (no file) first; `*_training` ones are not stock."""
    folder = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
    files = {file.stem: file for file in sorted(folder.glob("*.jinja")) if not file.stem.endswith("_training")}
    return {BUNDLED: None} | files


def tokenizer_for(file: Path | None, bundled_folder: Path) -> PreTrainedTokenizerBase:
    """The bundled tokenizer speaking the template in `file`."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder)
    if file is not None:
        tokenizer.chat_template = file.read_text(encoding="utf-8")
        thinking = set(THINKING.findall(tokenizer.chat_template))
        tokenizer.add_tokens(sorted(set(SPECIAL.findall(tokenizer.chat_template)) - thinking), special_tokens=True)
        tokenizer.add_tokens(sorted(thinking))
    return tokenizer
