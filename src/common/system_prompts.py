"""What a persona's system prompt says, and chat templates read from files. No model here: a typo answers at once."""

import re
from pathlib import Path

from src.common.errors import InputError
from src.common.row_files import read_text

STYLES = {"you-are-a": "You are {article} {persona}.", "act-as": "Act as {article} {persona}."}
PLAIN = "plain"
ARTICLES = ("a", "an", "the")


def check_style(style: str) -> None:
    """Raises InputError for a style that is neither a known name nor a text that holds {persona}."""
    if style != "none" and "{persona}" not in STYLES.get(style, style):
        raise InputError(
            f"--system_prompt_style {style!r}: expected {', '.join(STYLES)}, none, or a text that holds {{persona}}"
        )


def system_prompt(persona: str, article: str, style: str) -> str | None:
    """
    "You are an assistant.", or "You are Hamlet." for an empty or `none` article; None for the style `none`.

    style: you-are-a, act-as, none, or a text with {article} and {persona}. Raises InputError for any other.
    """
    check_style(style)
    if style == "none":
        return None
    template = STYLES.get(style, style)
    # The blank goes with the article; braces in a persona's name are data, hence no str.format.
    bare = article.strip().lower() in ("", "none")
    template = template.replace("{article} ", "").replace("{article}", "") if bare else template
    parts = re.split(r"(\{article\}|\{persona\})", template)
    return "".join({"{article}": article, "{persona}": persona}.get(part, part) for part in parts)


def parted(text: str) -> tuple[str | None, str]:
    """(persona, article) of `Hamlet`, `a pirate`, or of nothing, which is no persona."""
    first, _, rest = text.strip().partition(" ")
    return (rest.strip(), first) if first in ARTICLES and rest.strip() else (text.strip() or None, "")


def read_chat_template(chat_template: str) -> str:
    """The Jinja text of a file. Raises InputError: no such file, not UTF-8, not valid Jinja."""
    from jinja2 import Environment, TemplateSyntaxError

    path = Path(chat_template)
    if not path.is_file():
        raise InputError(f"--chat_template {chat_template}: no such file; expected a Jinja file or `{PLAIN}`")
    text = read_text(path)
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text.replace("{% generation", "{% if true").replace(
            "{%- generation", "{%- if true").replace("endgeneration", "endif"))  # fmt: skip
    except TemplateSyntaxError as error:
        raise InputError(f"{path}:{error.lineno}: {error.message}; expected a Jinja chat template") from error
    return text
