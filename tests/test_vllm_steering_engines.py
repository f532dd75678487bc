"""A small case of scripts/acceptance/vllm_steering.py: engines with workers of their own, preempted and compiled."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
PARTS = ("two stages", "compiled")


def test_steering_is_that_of_transformers_on_every_kind_of_engine() -> None:
    command = [sys.executable, "scripts/acceptance/vllm_steering.py", "--model_id", "tiny_qwen3", "--parts", *PARTS]
    process = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=1500)
    assert process.returncode == 0, process.stdout + process.stderr[-3000:]
    for part in PARTS:
        assert f"| {part} | 14 of 14 |" in process.stdout
