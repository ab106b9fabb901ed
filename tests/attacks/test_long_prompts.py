"""One long question among short ones: no step is as long as the product of their number and its length."""

import time
from pathlib import Path

import httpx
import pytest

from tests.attacks.harness import MemoryWatch, bystander
from tests.integration.pictures import in_base64, picture
from tests.integration.processes import ServiceProcess, service

pytestmark = [pytest.mark.serial, pytest.mark.slow]

NUM_MARKS = 991  # each a token; with the template and the image's 28 they make 1,024
MAX_S = 30.0  # 32 prompts at the limit take 7 s on an idle machine
MAX_GROWTH_BYTES = 400 * 2**20


def ask(running: ServiceProcess, questions: list[str]) -> httpx.Response:
    body = {"image": in_base64(picture(7)), "question": questions, "num_beams": 5, "max_new_tokens": 10}
    return httpx.post(f"{running.url}/vqa", json=body, timeout=60)


def test_a_long_question_among_short_ones_is_answered_and_the_service_lives(tmp_path: Path) -> None:
    long, short = "?" * NUM_MARKS, "what is red?"
    with service(tmp_path, model="tiny-t5", stall_timeout_ms=1000, num_threads=1) as running:
        with bystander(running), MemoryWatch(running) as memory:
            for questions in ([long, *[short] * 14], [short, long] * 16, [long] * 32):
                started = time.monotonic()
                assert ask(running, questions).status_code == 200
                assert time.monotonic() - started < MAX_S
        assert memory.growth_bytes < MAX_GROWTH_BYTES
        one_more = ask(running, ["?" * (NUM_MARKS + 1), short])
        assert (one_more.status_code, one_more.json()["code"]) == (422, "invalid_prompt")
        assert httpx.get(f"{running.url}/livez").status_code == 200
