"""
What PersonaRenderer does with the stock chat templates that TRL ships and with the bundled model's, as a table:
uv run python scripts/acceptance/chat_templates.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
NAME = "Zorblax"
MESSAGES = [
    {"role": "user", "content": "Hello there."},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
    {"role": "user", "content": "Really?"},
]


def row(name: str, tokenizer) -> tuple[str, bool]:
    from src.common.errors import InputError
    from src.models.chat_format import PersonaRenderer

    plain = PersonaRenderer(tokenizer, "system", system_prompt_style="none")
    stock = plain.stock(MESSAGES)
    same = plain.render(MESSAGES, "assistant", "an").text == stock
    system = PersonaRenderer(tokenizer, "system").render(MESSAGES, NAME, "").persona_applied
    try:
        renderer = PersonaRenderer(tokenizer, "header")
    except InputError as error:
        reason = "inside a special token" if "inside a special token" in str(error) else "no assistant header"
        return f"| {name} | {'yes' if same else 'NO'} | refused: {reason} | refused | {system} |", False
    same = same and renderer.render(MESSAGES, "assistant", "an").text == stock
    text = renderer.render(MESSAGES, NAME, "").text
    last = NAME in text[text.rindex("Really?") :]
    earlier = text[: text.rindex("Really?")].count(NAME)
    return f"| {name} | {'yes' if same else 'NO'} | {'yes' if last else 'NO'} | {earlier} of 2 | {system} |", last


def main() -> None:
    from src.models.bundled import bundled_folder
    from tests.chat_templates import template_files, tokenizer_for

    folder = bundled_folder("bundled:smollm2-135m")
    rows = [row(name, tokenizer_for(file, folder)) for name, file in template_files().items()]
    print("| template | `assistant` = stock | last header | earlier headers | system prompt |\n|---|---|---|---|---|")
    print("\n".join(line for line, _ in rows))
    n_applied = sum(applied for _, applied in rows)
    print(f"{n_applied} of {len(rows)} carry the persona in every header, the others are refused")


if __name__ == "__main__":
    main()
