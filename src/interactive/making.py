"""
Answers made in a thread of their own, so that a stopped one is given up at once: while a long prompt is read a single
layer may take seconds on a CPU, and nobody should wait for that.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from src.models.language_model import LanguageModel
from src.models.streaming import stream
from src.models.types import GenerationRequest, GenerationResult

SECONDS_BETWEEN_LOOKS = 0.02
SECONDS_TO_END = 0.1
"""So long a stopped computation is waited for. In mid-answer a layer takes milliseconds."""
Token = tuple[str, int, float]


class Maker:
    """Makes one answer, or one pair of answers, at a time."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        # One thread: what was given up is over before anything else is computed.
        self._thread = ThreadPoolExecutor(1, "answers")

    def make(
        self, requests: Sequence[GenerationRequest], *, on_token: Callable[[str, int, float], None],
        should_stop: Callable[[], bool],
    ) -> list[GenerationResult]:  # fmt: skip
        """
        What `stream` gives, both callbacks called in this thread. Returns soon after `should_stop` was true; where the
        computation takes longer to end, at its next layer, the results hold what `on_token` was told, and no top-k
        mass. Raises what `stream` raises.
        """
        tokens: queue.SimpleQueue[Token | None] = queue.SimpleQueue()
        stopped = threading.Event()
        told: list[Token] = []

        def work() -> list[GenerationResult]:
            try:
                return stream(
                    self._model, requests, on_token=lambda *token: tokens.put(token), should_stop=stopped.is_set
                )
            finally:
                tokens.put(None)

        def tell(token: Token) -> None:
            told.append(token)
            on_token(*token)

        made = self._thread.submit(work)
        try:
            while not should_stop():
                with contextlib.suppress(queue.Empty):
                    token = tokens.get(timeout=SECONDS_BETWEEN_LOOKS)
                    if token is None:
                        return made.result()
                    tell(token)
        finally:
            # Whatever ends the waiting, Ctrl-C among it: the thread must not go on with what nobody takes.
            stopped.set()
        try:
            results = made.result(SECONDS_TO_END)
        except TimeoutError:
            return [self._so_far(request, told) for request in requests]
        while (token := tokens.get()) is not None:
            tell(token)
        return results

    def close(self) -> None:
        """Wait until nothing is computed any more."""
        self._thread.shutdown()

    def _so_far(self, request: GenerationRequest, told: Sequence[Token]) -> GenerationResult:
        own = [(token, entropy) for name, token, entropy in told if name == request.id]
        tokens = tuple(token for token, _ in own)
        return GenerationResult(
            id=request.id, token_ids=tokens, text=self._model.decode(tokens), top_k_mass=(),
            entropy=tuple(entropy for _, entropy in own), finish_reason="interrupted",
        )  # fmt: skip
