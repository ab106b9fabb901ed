"""The evaluation of a server that knows every scene, and of one that is busy or broken."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.evaluation.client import EvaluationError, ServerClient
from training.evaluation.evaluate import EvaluationPlan, evaluate, plan_questions
from training.world.captions import listing_caption
from training.world.rendering import render_scene
from training.world.scenes import Scene, iter_scenes
from training.world.truth import identified_scenes

PLAN = EvaluationPlan(seed=9, split="unseen", num_scenes=6, questions_per_scene=3, num_reranked=2)


class Oracle:
    """A server that responds correctly about the scenes of `PLAN`, after 429 for `busy` requests."""

    def __init__(self, busy: int = 0) -> None:
        self.busy = busy
        self.modes: set[str] = set()
        scenes = [*iter_scenes(PLAN.seed, PLAN.split, PLAN.num_scenes)]
        self.scenes = {self.key(scene): scene for scene in [*scenes, *identified_scenes(9, "unseen", 6)]}
        self.answers = {
            (self.key(scene), item.question): item.answer
            for scene, questions in zip(scenes, plan_questions(PLAN, scenes), strict=True)
            for item in questions
        }

    @staticmethod
    def key(scene: Scene) -> bytes:
        return render_scene(scene, PLAN.image_size).tobytes()

    @staticmethod
    def pixels(image: str) -> bytes:
        with Image.open(io.BytesIO(base64.b64decode(image))) as opened:
            return np.asarray(opened).tobytes()

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/vqa":
            pixels = self.pixels(body["image"])
            return {"answers": [{"answer": self.answers[pixels, question]} for question in body["question"]]}
        if path == "/caption":
            return {"captions": [{"text": listing_caption(self.scenes[self.pixels(body["image"])])}]}
        self.modes.add(body["mode"])
        query = body.get("text") or listing_caption(self.scenes[self.pixels(body["image"])])
        candidates = body["candidates"]
        texts = candidates.get("texts") or [
            listing_caption(self.scenes[self.pixels(image)]) for image in candidates["images"]
        ]
        return {"results": [{"index": texts.index(query)}]}


@contextmanager
def serving(oracle: Oracle) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            busy, oracle.busy = oracle.busy > 0, oracle.busy - 1
            content = json.dumps({} if busy else oracle.answer(self.path, body)).encode()
            self.send_response(429 if busy else 200)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_server_that_is_always_right_scores_one_everywhere() -> None:
    oracle = Oracle(busy=2)
    with serving(oracle) as url, ServerClient(url, concurrency=2) as client:
        figures = evaluate(client, PLAN)
    assert set(figures["questions"].values()) == {1.0}
    assert figures["captions"]["wholly_true"] == figures["captions"]["named_pairs_true"] == 1.0
    for mode in ("itc", "rerank"):
        assert figures[f"retrieval image to text, {mode}"]["R@1"] == 1.0
        assert figures[f"retrieval text to image, {mode}"]["R@1"] == 1.0
    assert oracle.modes == {"itc", "rerank"}
    assert 0 < figures["questions, chance"]["overall"] < figures["questions"]["overall"]
    assert figures["retrieval, chance"] == pytest.approx({"R@1": 1 / 6, "R@5": 5 / 6, "R@10": 1.0})


def test_only_the_tasks_that_are_asked_for_are_measured() -> None:
    oracle = Oracle()
    with serving(oracle) as url, ServerClient(url, concurrency=2) as client:
        figures = evaluate(client, replace(PLAN, tasks=("captions",)))
    assert set(figures) == {"captions"}
    assert oracle.modes == set()


def test_a_server_that_is_not_there_is_named() -> None:
    with (
        ServerClient("http://127.0.0.1:9", concurrency=1) as client,
        pytest.raises(EvaluationError, match=r"127\.0\.0\.1:9.*is the server running"),
    ):
        client.post("/caption", {})
