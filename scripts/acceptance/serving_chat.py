"""
The full figures of `src.serve chat` on the bundled model, each server a process of its own: the answers of clients at
once against those alone, what a client that goes still costs, faults, a stop, tokens a CPU second. About 6 minutes of a
core; --picture also takes one of the playground (needs Chromium):
uv run --extra cpu python scripts/acceptance/serving_chat.py --backends hf vllm --picture docs/playground.png
"""

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.chat_server import CHAT, parts_of, process  # noqa: E402

MODEL = "bundled:smollm2-135m"
QUESTIONS = ("What is the sea?", "Tell me about a cat.", "How do I bake bread?", "What do you do on Sundays?")
COEFFICIENTS = (0, 10, 15, 20, 25, 30, -20, 40)
WORDS = ["--model_id", MODEL, "--dtype", "float32", "--max_model_len", "1024"]


def direction(folder: Path) -> Path:
    """French against English, as the README extracts it."""
    data = ROOT / "data/directions/french_english"
    words = ["--positive_path", data / "target.jsonl", "--negative_path", data / "control.jsonl", "--paired"]
    words += ["--token_position", "mean_prompt", "--model_id", MODEL, "--output_dir", folder / "french"]
    subprocess.run([sys.executable, "-m", "src.extract_directions", *map(str, words)], cwd=ROOT, check=True)
    return folder / "french" / "directions.safetensors"


def body(question: str, coefficient: float, max_tokens: int, **more: Any) -> dict[str, Any]:
    steering = [f"french:15:{coefficient}"] if coefficient else []
    known = {"model": MODEL, "messages": [{"role": "user", "content": question}], "temperature": 0}
    return known | {"max_tokens": max_tokens, "steering": steering, "uncertainty": True} | more


async def answer(client: httpx.AsyncClient, asked: dict[str, Any]) -> list[tuple[int, float]]:
    """(token, entropy) of each token."""
    response = await client.post(CHAT, json=asked)
    assert response.status_code == 200, response.text
    found = [each for part in parts_of(response.text) for c in part["choices"] for each in c.get("uncertainty", [])]
    return [(each["token_id"], each["entropy"]) for each in found]


def same_at_once(url: str, pid: int) -> bool:
    """8 clients with 8 doses, 4 questions each, at once and alone: token by token; tokens a CPU second of both."""
    asked = [body(q, c, 32 + i, stream=i % 2 == 0) for q in QUESTIONS for i, c in enumerate(COEFFICIENTS)]

    async def both() -> tuple[list, list, list[float]]:
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            seconds = [cpu_seconds(pid)]
            together = await asyncio.gather(*(answer(client, each) for each in asked))
            seconds.append(cpu_seconds(pid))
            alone = [await answer(client, each) for each in asked]
            return together, alone, [*seconds, cpu_seconds(pid)]

    together, alone, (start, middle, end) = asyncio.run(both())
    tokens = [[token for token, _ in each] for each in alone]
    same = sum([token for token, _ in each] == other for each, other in zip(together, tokens, strict=True))
    gap = max(
        abs(a - b)
        for one, two in zip(together, alone, strict=True)
        for (x, a), (y, b) in zip(one, two, strict=False)
        if x == y
    )
    n = sum(map(len, tokens))
    print(
        f"  at once = alone, token by token: {same} of {len(asked)} answers, {n} tokens; entropies differ ≤ {gap:.1e}"
    )
    print(f"  different answers: {len({tuple(each[:24]) for each in tokens})} of {len(asked)}")
    print(f"  tokens a CPU second: {n / (middle - start):.1f} at once, {n / (end - middle):.1f} one after another")
    return same == len(asked)


def cpu_seconds(pid: int) -> float:
    """User and system seconds of a process so far."""
    return sum(psutil.Process(pid).cpu_times()[:2])


def gone(url: str) -> bool:
    """Clients that leave in mid-answer: the tokens that are generated after they went."""
    most = 0
    with httpx.Client(base_url=url, timeout=60) as client:
        for _ in range(5):
            with client.stream("POST", CHAT, json=body("Tell a very long story.", 10, 900, stream=True)) as response:
                lines = response.iter_lines()
                for _ in range(20):
                    next(lines)
            at_once = metric(client, "tiller_generated_tokens_total")
            end = time.monotonic() + 60
            while metric(client, "tiller_answers_running"):
                assert time.monotonic() < end, "the answer went on"
                time.sleep(0.01)
            time.sleep(0.5)
            most = max(most, metric(client, "tiller_generated_tokens_total") - at_once)
    print(f"  5 clients left in mid-answer: at most {most:.0f} more tokens of 900 were made for one")
    return most <= 20


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def official_client(url: str) -> bool:
    """The official client: chat streamed and not, completions, an error."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    asked = {"model": MODEL, "messages": [{"role": "user", "content": QUESTIONS[0]}], "temperature": 0}
    whole = client.chat.completions.create(**asked, max_tokens=24).choices[0].message.content
    chunks = client.chat.completions.create(**asked, max_tokens=24, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    french = client.chat.completions.create(**asked, max_tokens=24, extra_body={"steering": ["french:15:30"]})
    completion = client.completions.create(model=MODEL, prompt="The sea is", max_tokens=8, temperature=0)
    try:
        client.chat.completions.create(**asked, extra_body={"steering": ["french:99:30"]})
        refused = "nothing"
    except openai.BadRequestError as error:
        refused = str(error.body["message"])
    print(f"  unsteered: {whole!r}\n  +30 French: {french.choices[0].message.content!r}")
    print(f"  completion: {completion.choices[0].text!r}\n  layer 99: {refused}")
    return whole == streamed != french.choices[0].message.content and "99" in refused


def stopped(running: Any, url: str) -> bool:
    """SIGTERM in mid-answer."""
    with (
        httpx.Client(base_url=url, timeout=60) as client,
        client.stream("POST", CHAT, json=body("Tell a long story.", 0, 120, stream=True)) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        running.terminate()
        text = "\n".join(lines)
    n = sum(len(choice.get("uncertainty", [])) for part in parts_of(text) for choice in part["choices"])
    code = running.wait(60)
    print(f"  SIGTERM in mid-answer: {n} more tokens came, to the end: {'[DONE]' in text}; exit code {code}")
    return "[DONE]" in text and code == 0


def picture(url: str, path: Path) -> None:
    """The playground with an answer in French beside one in English."""
    from tests.browser import browser

    with browser(width=1200, height=620) as watched:
        page = watched.page
        page.goto(f"{url}/")
        page.get_by_text(f"{MODEL}, 30 layers").wait_for()
        page.get_by_label("layer", exact=True).select_option("15")
        page.get_by_label("coefficient").fill("26")
        page.get_by_label("tokens at most").fill("48")
        page.get_by_label("question").fill("What is the sea?")
        page.keyboard.press("Enter")
        page.locator("#send:not([disabled])").wait_for(timeout=180_000)
        path.parent.mkdir(exist_ok=True)
        page.screenshot(path=path, full_page=True)
        watched.assert_quiet()
    print(f"wrote {path}")


CHECKS = ("client", "at_once", "gone", "stop")


def run(backend: str, path: Path, checks: list[str], shown: Path | None) -> bool:
    """The checks of one backend on a server of its own; the picture before it is stopped."""
    print(f"{backend}:", flush=True)
    words = [*WORDS, "--backend", backend, "--directions", f"french={path}"]
    words += ["--kv_cache_gib", "1"] if backend == "vllm" else ["--batch_size", "8"]
    with process(*words, seconds=1800) as (running, url):
        known = {
            "client": lambda: official_client(url),
            "at_once": lambda: same_at_once(url, running.pid),
            "gone": lambda: gone(url),
            "stop": lambda: stopped(running, url),
        }
        if shown:
            picture(url, shown)
        held = {name: known[name]() for name in CHECKS if name in checks}
    print("  " + ", ".join(f"{name}: {'met' if is_met else 'NOT met'}" for name, is_met in held.items()), flush=True)
    return all(held.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["hf", "vllm"], choices=["hf", "vllm"])
    parser.add_argument("--checks", nargs="*", default=CHECKS, choices=CHECKS)
    parser.add_argument("--directions", type=Path, help="instead of extracting French anew")
    parser.add_argument("--picture", type=Path, help="of the playground, on the first backend")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = given.directions or direction(Path(folder))
        pictures = [given.picture, *[None] * len(given.backends)]
        held = [run(each, path, given.checks, shown) for each, shown in zip(given.backends, pictures, strict=False)]
    sys.exit(0 if all(held) else 1)


if __name__ == "__main__":
    main()
