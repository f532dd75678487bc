"""What asking costs: tokens always, US dollars where the prices are known."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from src.common.api_types import Answer
from src.common.errors import InputError
from src.common.jsonl import round_measured
from src.common.row_files import read_text

PRICE_KEYS = {"input", "output"}


def read_prices(path: Path | None) -> dict[str, tuple[float, float]]:
    """Model → US dollars per million tokens of prompt and of answer. Raises InputError for another shape."""
    if path is None:
        return {}
    try:
        prices = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: {error.msg}; expected a JSON object") from None
    if not isinstance(prices, dict):
        raise InputError(f'{path}: expected an object, model → {{"input", "output"}}')
    for model, price in prices.items():
        if not isinstance(price, dict) or set(price) != PRICE_KEYS or not all(map(_is_price, price.values())):
            raise InputError(
                f'{path}: {model}: {price!r}; expected {{"input", "output"}}, dollars per million tokens'[:300]
            )
    return {model: (price["input"], price["output"]) for model, price in prices.items()}


def _is_price(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


@dataclass
class Usage:
    """What was used since the start. Only answers are counted: what a failed attempt cost is not told."""

    prices: Mapping[str, tuple[float, float]]
    requests: int = 0
    """Attempts sent, failed ones among them."""
    from_cache: int = 0
    failures: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    dollars: float = 0.0
    unpriced: int = 0
    """Answers whose price or tokens nobody told."""

    def count(self, model: str, answers: Sequence[Answer]) -> None:
        """Adds the answers to one request."""
        price = self.prices.get(model)
        for answer in answers:
            self.input_tokens += answer.input_tokens or 0
            self.output_tokens += answer.output_tokens or 0
            if price is None or answer.input_tokens is None or answer.output_tokens is None:
                self.unpriced += 1
            else:
                self.dollars += (answer.input_tokens * price[0] + answer.output_tokens * price[1]) / 1e6

    def since(self, earlier: "Usage | None") -> dict[str, float | int | None]:
        """What was added since an earlier copy: dollars are null where some of it has no price."""
        before = earlier or Usage(self.prices)
        priced = self.unpriced == before.unpriced
        counted = ("requests", "from_cache", "failures", "input_tokens", "output_tokens")
        return {"cost": round_measured(self.dollars - before.dollars) if priced else None} | {
            name: getattr(self, name) - getattr(before, name) for name in counted
        }
