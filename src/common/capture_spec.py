"""Which hidden states of a request are kept: `--capture LAYERS[:all|last|mean|generated]`. No torch."""

from dataclasses import dataclass

from src.common.directions_file import HOOK_POINTS
from src.common.errors import InputError
from src.common.intervention_fields import parse_layers

KEPT = ("all", "last", "mean", "generated")
OUTPUT = "output"
"""In place of a hook point, with the last layer: what the logits are made of, after the final norm. For engines."""


@dataclass(frozen=True, kw_only=True)
class Capture:
    """Rows start ≤ position < end of a request's hidden states at some places, after interventions there."""

    places: tuple[tuple[int, str], ...]
    """(layer, hook point) each."""
    start: int = 0
    """First absolute position."""
    end: int | None = None
    """None for no end."""
    mean: bool = False
    """Keep the mean of the rows only."""

    def __post_init__(self) -> None:
        if not self.places:
            raise ValueError("a capture of no layer")
        for _, hook_point in self.places:
            if hook_point not in (*HOOK_POINTS, OUTPUT):
                raise ValueError(f"a capture at {hook_point!r}; expected one of {', '.join(HOOK_POINTS)}")
        if self.start < 0 or (self.end is not None and self.end <= self.start):
            raise ValueError(f"a capture of the positions {self.start} to {self.end}; expected 0 ≤ start < end")

    def n_positions(self, n_computed: int) -> int:
        """How many positions it holds when `n_computed` tokens of a request went through the model."""
        return max(0, (n_computed if self.end is None else min(self.end, n_computed)) - self.start)


@dataclass(frozen=True)
class CaptureSpec:
    """What `--capture` says, for any prompt."""

    layers: tuple[int, ...] | str
    """Or "all"."""
    kept: str
    """`all` positions, the `last` of the prompt, the `mean` of all, or the `generated` ones."""

    def of(self, prompt_length: int, n_layers: int, hook_points: tuple[str, ...]) -> Capture:
        """The capture of a request. Raises InputError for a layer that the model lacks."""
        layers = tuple(range(n_layers)) if isinstance(self.layers, str) else self.layers
        if layers[-1] >= n_layers:
            raise InputError(f"--capture: layer {layers[-1]}; the model's layers are 0 to {n_layers - 1}")
        places = tuple((layer, hook_point) for layer in layers for hook_point in hook_points)
        start, end = {
            "all": (0, None),
            "mean": (0, None),
            "last": (prompt_length - 1, prompt_length),
            "generated": (prompt_length, None),
        }[self.kept]
        return Capture(places=places, start=start, end=end, mean=self.kept == "mean")


def parse_capture(text: str) -> CaptureSpec:
    """`14`, `8-12:mean`, `all:last`. Raises InputError for another form."""
    layers, _, kept = text.partition(":")
    kept = kept or "all"
    try:
        if kept not in KEPT:
            raise ValueError(f"{kept!r}; expected {', '.join(KEPT)}")
        parsed = parse_layers(layers)
        if parsed == "best":
            raise ValueError("'best' belongs to a directions file; give the layer's number")
    except ValueError as error:
        raise InputError(f"--capture {text}: {error}; for example 14, 8-12:mean or all:last") from None
    return CaptureSpec(parsed, kept)
