"""
Asking through a provider's batch endpoint. batches.json in the run's folder says what was sent, so that a run that was
stopped, at whatever moment, waits for its batches rather than sending them again.
"""

import asyncio
import json
import logging
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from src.common.api_asking import Asked, Failures, OnAnswer
from src.common.api_batch_clients import BatchClient, Outcome, batch_client
from src.common.api_client import ApiClient
from src.common.api_types import ApiModel, AttemptFailed, Question
from src.common.errors import CheckFailed, InputError
from src.common.files import write_json_atomic
from src.common.run_folder import read_json
from src.common.secrets import withhold

LOGGER = logging.getLogger(__name__)
FILE_NAME = "batches.json"
NOTHING_TOLD = "the batch ended without a word on this request (it expired, or was cancelled)"


async def ask_in_batches(
    api: ApiClient,
    model_id: str,
    asked: Sequence[Asked],
    folder: Path,
    on_answer: OnAnswer,
    failures: Failures,
    poll_seconds: float,
) -> None:
    """
    As `ask_all`. Raises CheckFailed where the endpoint cannot be reached, and InputError where it refuses a batch; the
    same call goes on from there.
    """
    questions = {each.id: api.question(model_id, each.messages, each.parameters) for each in asked}
    waiting: dict[str, list[Asked]] = defaultdict(list)
    for each in asked:
        waiting[questions[each.id].key].append(each)
    by_key = {question.key: question for question in questions.values()}
    if not by_key:
        return
    model = next(iter(by_key.values())).model
    client = batch_client(model, api.timeout)
    batches = Batches(api, client, model, folder, by_key, waiting, on_answer, failures)
    try:
        await batches.take_from_cache()
        await batches.send_missing()
        await batches.wait(poll_seconds)
    except client.errors as error:
        raise CheckFailed(_told(model, error)) from None
    finally:
        await client.close()
        await api.close()


def _told(model: ApiModel, error: Exception) -> str:
    return withhold(f"batches of {model}: {type(error).__name__}: {error}"[:1000]) + "; the same command goes on"


class Batches:
    """The batches of one run."""

    def __init__(
        self,
        api: ApiClient,
        client: BatchClient,
        model: ApiModel,
        folder: Path,
        questions: dict[str, Question],
        waiting: dict[str, list[Asked]],
        on_answer: OnAnswer,
        failures: Failures,
    ) -> None:
        """questions and waiting: by the key of the question, which is what the requests are called."""
        self._api, self._client, self._model, self._path = api, client, model, folder / FILE_NAME
        self._questions, self._waiting = questions, waiting
        self._on_answer, self._failures = on_answer, failures
        self._sent: list[dict[str, Any]] = read_json(self._path) if self._path.exists() else []

    async def take_from_cache(self) -> None:
        """Hands on what was asked before."""
        for key in list(self._waiting):
            answers = self._api.cache.get(key) if self._api.cache else None
            if answers is not None:
                self._api.usage.from_cache += 1
                self._hand_on(key, Outcome(key, answers))

    async def send_missing(self) -> None:
        """Sends what no open batch holds, and finds out whether a batch of unknown fate was sent."""
        known = {entry["batch_id"] for entry in self._sent}
        for entry in self._open():
            if entry["batch_id"] is None:
                since = datetime.fromisoformat(entry["since"])
                entry["batch_id"] = await self._client.find(entry["tag"], since, known)
                if entry["batch_id"] is None:
                    self._sent.remove(entry)
                self._save()
        held = {key for entry in self._open() for key in entry["keys"]}
        for requests in self._chunks([key for key in self._waiting if key not in held]):
            await self._send(requests)

    async def _send(self, requests: list[dict[str, Any]]) -> None:
        entry = {
            "tag": uuid.uuid4().hex,
            "since": datetime.now(UTC).isoformat(),
            "batch_id": None,
            "over": False,
            "keys": [request["custom_id"] for request in requests],
        }
        # Written before it is sent: whatever happens in between, the next start knows to look for it.
        self._sent.append(entry)
        self._save()
        entry["batch_id"] = await self._client.send(requests, entry["tag"])
        self._save()
        self._api.usage.requests += len(requests)
        LOGGER.info("Sent batch %s of %d requests", entry["batch_id"], len(requests))

    def _chunks(self, keys: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        chunk: list[dict[str, Any]] = []
        size = 0
        for key in keys:
            request = self._client.request(self._questions[key])
            length = len(json.dumps(request)) + 1
            if chunk and (len(chunk) >= self._client.most_requests or size + length > self._client.most_bytes):
                yield chunk
                chunk, size = [], 0
            chunk.append(request)
            size += length
        if chunk:
            yield chunk

    async def wait(self, poll_seconds: float) -> None:
        """Until every batch is over and every outcome handed on."""
        while entries := self._open():
            for entry in entries:
                if await self._client.is_over(entry["batch_id"]):
                    await self._collect(entry)
            if self._open():
                await asyncio.sleep(poll_seconds)

    async def _collect(self, entry: dict[str, Any]) -> None:
        try:
            async for outcome in self._client.outcomes(entry["batch_id"]):
                if outcome.answers is not None and self._is_new(outcome.key):
                    await self._api.keep(outcome.key, outcome.answers)
                    self._api.usage.count(self._model.name, outcome.answers)
                self._hand_on(outcome.key, outcome)
        except InputError:
            # Refused as a whole: what is wrong with it may be put right, and sent again.
            entry["over"] = True
            self._save()
            raise
        except AttemptFailed as failed:
            raise CheckFailed(f"batch {entry['batch_id']}: {failed.reason}; the same command goes on") from None
        for key in entry["keys"]:
            self._hand_on(key, Outcome(key, None, NOTHING_TOLD))
        # Only now: until every answer is on disk the batch is fetched again.
        entry["over"] = True
        self._save()

    def _is_new(self, key: str) -> bool:
        """Whether an answer is waited for, or is in no cache: one to a question that fewer --num_tasks leave out."""
        cache = self._api.cache
        return key in self._waiting or (cache is not None and cache.get(key) is None)

    def _hand_on(self, key: str, outcome: Outcome) -> None:
        for each in self._waiting.pop(key, ()):
            if outcome.answers is None:
                self._api.usage.failures += 1
                self._failures.add(each, outcome.reason, outcome.status, attempts=1)
            else:
                self._on_answer(each, outcome.answers[0])

    def _open(self) -> list[dict[str, Any]]:
        return [entry for entry in self._sent if not entry["over"]]

    def _save(self) -> None:
        write_json_atomic(self._path, self._sent)
