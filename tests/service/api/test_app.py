"""The application over a fake model, without sockets: routes, headers, errors, and its life."""

import asyncio
import re
from typing import Any

import pytest
from starlette.types import Message

from service.runtime.settings import Settings
from tests.service.fakes import (
    NAN_WORD,
    POISON_RED,
    FakeBackend,
    png,
    png_base64,
)
from tests.service.running import (
    assert_problem,
    metric,
    sample,
    site,
    until_async,
    until_waiting,
)

IMAGE = png_base64(100)


async def test_a_caption_has_the_promised_shape() -> None:
    async with site() as running:
        response = await running.client.post("/caption", json={"image": IMAGE, "num_captions": 2})
        answer = response.json()
        assert response.status_code == 200
        assert answer["model"] == "fake"
        assert answer["captions"] == [
            {"text": f"100 a photo #{rank}", "score": -1.0 - rank, "num_tokens": 2, "finish_reason": "stop"}
            for rank in range(2)
        ]
        assert answer["image_cached"] is False
        assert answer["timings_ms"].keys() == {
            "queue", "preprocess", "vision", "qformer", "decode", "total",
        }  # fmt: skip
        assert response.headers["cache-control"] == "no-store"
        stages = ("queue", "preprocess", "vision", "qformer", "decode", "total")
        for stage in stages:
            assert re.search(rf"\b{stage};dur=\d", response.headers["server-timing"])


async def test_the_same_image_again_is_cached_and_the_header_says_so() -> None:
    async with site() as running:
        await running.client.post("/caption", json={"image": IMAGE})
        again = await running.client.post("/caption", files={"image": png(100)})
        assert again.json()["image_cached"] is True
        assert 'cache;desc="hit"' in again.headers["server-timing"]


async def test_a_prompt_takes_the_reservation_of_the_models_own() -> None:
    async with site() as running:
        response = await running.client.post("/caption", json={"image": IMAGE, "prompt": "once upon"})
        assert response.json()["captions"][0]["text"] == "100 once upon #0"


async def test_of_several_images_a_bad_one_fails_alone() -> None:
    async with site() as running:
        images = [png_base64(1), "bm90IGFuIGltYWdl", png_base64(POISON_RED), "!", png_base64(2)]
        answer = (await running.client.post("/caption", json={"images": images})).json()
        results = answer["results"]
        assert [results[at]["captions"][0]["text"] for at in (0, 4)] == ["1 a photo #0", "2 a photo #0"]
        assert [results[at]["error"]["code"] for at in (1, 2, 3)] == [
            "unsupported_image", "inference_failed", "invalid_image",
        ]  # fmt: skip
        assert results[3]["error"]["errors"][0]["field"] == "images.3"


async def test_questions_are_answered_in_their_order_with_alternatives() -> None:
    backend = FakeBackend()
    async with site(backend) as running:
        backend.vision_batches.clear()
        body = {
            "image": IMAGE,
            "question": ["who?", "where?"],
            "history": [{"question": "what?", "answer": "cat"}],
            "prompt_template": "ask {}",
            "num_answers": 2,
        }
        answer = (await running.client.post("/vqa", json=body)).json()
        assert answer["answers"] == [
            {
                "question": question,
                "answer": f"100 what? cat ask {question} #0",
                "score": -1.0,
                "num_tokens": 2,
                "alternatives": [
                    {"answer": f"100 what? cat ask {question} #1", "score": -2.0, "num_tokens": 2}
                ],
            }
            for question in ("who?", "where?")
        ]
        assert backend.vision_batches == [[100]]


async def test_retrieval_says_which_mode_it_used() -> None:
    async with site() as running:
        body = {"text": "100", "candidates": {"images": [png_base64(90), png_base64(200)]}}
        answer = (await running.client.post("/retrieve", json=body)).json()
        assert answer["mode"] == "rerank"
        assert [result["index"] for result in answer["results"]] == [1, 0]
        assert [result["rank"] for result in answer["results"]] == [1, 2]
        assert answer["results"][0].keys() == {"rank", "index", "score", "itc", "itm_probability"}
        assert answer["timings_ms"].keys() == {
            "queue", "preprocess", "vision", "qformer", "match", "total",
        }  # fmt: skip
        answer = (await running.client.post("/retrieve", json={**body, "mode": "itc", "top_k": 1})).json()
        assert answer["results"] == [
            {"rank": 1, "index": 0, "score": pytest.approx(1 - 10 / 255), "itc": pytest.approx(1 - 10 / 255)}
        ]


async def test_a_bad_candidate_is_named() -> None:
    async with site() as running:
        body = {"text": "100", "candidates": {"images": [png_base64(90), "!"]}}
        problem = assert_problem(await running.client.post("/retrieve", json=body), 422, "invalid_image")
        assert problem["errors"][0]["field"] == "candidates.images.1"


@pytest.mark.parametrize(
    ("backend", "path"),
    [
        (FakeBackend(can_generate=False), "/caption"),
        (FakeBackend(can_generate=False), "/vqa"),
        (FakeBackend(can_match=False), "/retrieve"),
    ],
)
async def test_a_task_the_checkpoint_lacks_is_404(backend: FakeBackend, path: str) -> None:
    async with site(backend) as running:
        problem = assert_problem(await running.client.post(path, json={}), 404, "task_unavailable")
        setting = "BLIP2_RETRIEVAL_MODEL" if path == "/retrieve" else "BLIP2_MODEL"
        assert f"set {setting} to one that has" in problem["detail"]
        assert (await running.client.get("/readyz")).status_code == 200


async def test_unknown_paths_and_methods_are_problems_too() -> None:
    async with site() as running:
        assert_problem(await running.client.get("/galleries"), 404, "not_found")
        assert_problem(await running.client.post("/classify", json={}), 404, "not_found")
        response = await running.client.get("/caption")
        assert_problem(response, 405, "method_not_allowed")
        assert response.headers["allow"] == "POST"


async def test_a_prompt_too_long_for_the_model_is_refused_before_the_line() -> None:
    async with site() as running:
        body = {"image": IMAGE, "prompt": "word " * 60}
        problem = assert_problem(await running.client.post("/caption", json=body), 422, "invalid_prompt")
        assert "60 words, the limit is 50" in problem["detail"]


async def test_a_failing_model_is_500_without_its_details() -> None:
    async with site() as running:
        response = await running.client.post("/caption", json={"image": png_base64(POISON_RED)})
        assert "poison" not in assert_problem(response, 500, "inference_failed")["detail"]
        response = await running.client.post("/caption", json={"image": IMAGE, "prompt": NAN_WORD})
        assert_problem(response, 500, "inference_failed")
        assert (await running.client.post("/caption", json={"image": IMAGE})).status_code == 200


@pytest.mark.parametrize("offered", ["abc-123", "0af7651916cd43dd:8448eb21/1+2=3@host", "x" * 128])
async def test_a_well_formed_request_id_is_kept(offered: str) -> None:
    async with site() as running:
        response = await running.client.get("/livez", headers={"X-Request-ID": offered})
        assert response.headers["x-request-id"] == offered


@pytest.mark.parametrize("offered", ["", "has space", "x" * 129, 'quote"', "-starts-wrong", "ümlaut"])
async def test_a_malformed_request_id_is_replaced(offered: str) -> None:
    async with site() as running:
        response = await running.client.get("/livez", headers={b"X-Request-ID": offered.encode("latin-1")})
        assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])


@pytest.mark.parametrize("budget", ["0", "-5", "soon", "1.5", "3600001", "9" * 30, "٣"])
async def test_a_budget_that_is_none_is_refused(budget: str) -> None:
    async with site() as running:
        response = await running.client.post(
            "/caption", json={"image": IMAGE}, headers={b"X-Request-Timeout-Ms": budget.encode()}
        )
        problem = assert_problem(response, 422, "invalid_request")
        assert problem["errors"][0]["field"] == "X-Request-Timeout-Ms"


async def test_a_request_whose_budget_ends_in_the_queue_is_504_and_never_reaches_the_device() -> None:
    backend = FakeBackend()
    async with site(backend, Settings(max_rows=16)) as running:
        backend.decode_gate.clear()
        first = asyncio.create_task(running.client.post("/caption", json={"image": IMAGE, "num_beams": 16}))
        await until_async(lambda: [100] in backend.vision_batches)
        late = await running.client.post(
            "/caption", json={"image": png_base64(77)}, headers={"X-Request-Timeout-Ms": "30"}
        )
        assert "30 ms" in assert_problem(late, 504, "deadline_exceeded")["detail"]
        backend.decode_gate.set()
        assert (await first).status_code == 200
        assert not any(77 in batch for batch in backend.vision_batches)
        assert await metric(running, 'blip2_abandoned_total{reason="deadline"}') == 1
        assert await metric(running, "blip2_waiting") == 0


async def test_exactly_as_many_wait_as_allowed_and_the_rest_is_429_with_retry_after() -> None:
    backend = FakeBackend()
    settings = Settings(max_waiting=4, max_images=4, max_questions=4, max_candidates=4, max_rows=16)
    async with site(backend, settings) as running:
        backend.decode_gate.clear()
        post = running.client.post
        running_one = asyncio.create_task(post("/caption", json={"image": IMAGE, "num_beams": 16}))
        await until_async(lambda: [100] in backend.vision_batches)
        waiting = [asyncio.create_task(post("/caption", json={"image": IMAGE})) for _ in range(4)]
        await until_waiting(running, 4)
        for _ in range(3):
            refused = await post("/caption", json={"image": IMAGE})
            assert_problem(refused, 429, "overloaded")
            assert 1 <= int(refused.headers["retry-after"]) <= 60
        backend.decode_gate.set()
        answers = await asyncio.gather(running_one, *waiting)
        assert [answer.status_code for answer in answers] == [200] * 5
        assert await metric(running, 'blip2_shed_total{reason="overloaded"}') == 3
        assert await metric(running, "blip2_waiting") == 0
        assert await metric(running, "blip2_running") == 0


async def test_a_request_of_many_items_obeys_the_same_rule_as_many_requests() -> None:
    backend = FakeBackend()
    settings = Settings(max_waiting=4, max_images=4, max_questions=4, max_candidates=4, max_rows=16)
    async with site(backend, settings) as running:
        backend.decode_gate.clear()
        post = running.client.post
        first = asyncio.create_task(post("/caption", json={"image": IMAGE, "num_beams": 16}))
        await until_async(lambda: [100] in backend.vision_batches)
        waiting = asyncio.create_task(post("/caption", json={"images": [IMAGE] * 3}))
        await until_waiting(running, 3)
        assert_problem(await post("/vqa", json={"image": IMAGE, "question": ["a", "b"]}), 429, "overloaded")
        backend.decode_gate.set()
        assert (await first).status_code == 200
        assert len((await waiting).json()["results"]) == 3


async def test_a_client_that_hangs_up_is_forgotten_before_the_device() -> None:
    backend = FakeBackend()
    async with site(backend, Settings(max_rows=16)) as running:
        backend.decode_gate.clear()
        first = asyncio.create_task(running.client.post("/caption", json={"image": IMAGE, "num_beams": 16}))
        await until_async(lambda: [100] in backend.vision_batches)
        disconnected = asyncio.Event()
        sent: list[Message] = []
        body = b'{"image": "%s"}' % png_base64(77).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await disconnected.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/caption", "raw_path": b"/caption",
            "query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http",
        }  # fmt: skip
        request = asyncio.create_task(running.app(scope, receive, send))
        await until_waiting(running, 1)
        disconnected.set()
        await request
        assert await metric(running, "blip2_waiting") == 0
        assert await metric(running, 'blip2_abandoned_total{reason="disconnected"}') == 1
        backend.decode_gate.set()
        assert (await first).status_code == 200
        assert not any(77 in batch for batch in backend.vision_batches)
        assert sent[0]["status"] == 499


async def test_version_names_service_and_model() -> None:
    async with site() as running:
        answer = (await running.client.get("/version")).json()
        assert answer["model"] == "fake"
        assert answer["fingerprint"] == "f" * 64
        assert answer["tasks"] == ["caption", "vqa", "retrieve"]
        assert re.fullmatch(r"\d+\.\d+\.\d+.*", answer["version"])


async def test_the_root_leads_to_the_documentation() -> None:
    async with site() as running:
        response = await running.client.get("/")
        assert response.is_redirect
        assert (await running.client.get(response.headers["location"])).status_code == 200


async def test_the_metrics_exist_from_the_first_scrape() -> None:
    async with site() as running:
        metrics = (await running.client.get("/metrics")).text
        for series in (
            'blip2_requests_total{route="/retrieve",status="429"}',
            'blip2_request_seconds_bucket{le="0.001",route="/caption"}',
            'blip2_request_seconds_bucket{le="60.0",route="/caption"}',
            'blip2_stage_seconds_count{stage="match"}',
            "blip2_queue_seconds_count",
            'blip2_batch_rows_count{stage="vision"}',
            "blip2_generated_tokens_total",
            'blip2_shed_total{reason="draining"}',
            'blip2_abandoned_total{reason="disconnected"}',
            'blip2_cache_requests_total{kind="image_embeds",result="skipped",tier="redis"}',
            "blip2_cache_breaker_open",
            "blip2_engine_heartbeat_age_seconds",
            "blip2_device_memory_bytes",
        ):
            assert sample(metrics, series) >= 0
        info = 'blip2_model_info{device="cpu",dtype="float32",fingerprint="%s",name="fake"}' % ("f" * 64)
        assert sample(metrics, info) == 1


async def test_the_metrics_count_what_was_served() -> None:
    async with site() as running:
        await running.client.post("/caption", json={"image": IMAGE, "num_captions": 3})
        await running.client.post("/caption", json={"image": "!"})
        await running.client.get("/no/such/path/at/all")
        assert await metric(running, 'blip2_requests_total{route="/caption",status="200"}') == 1
        assert await metric(running, 'blip2_requests_total{route="/caption",status="422"}') == 1
        assert await metric(running, 'blip2_requests_total{route="other",status="404"}') == 1
        assert await metric(running, "blip2_generated_tokens_total") == 6
        assert await metric(running, 'blip2_request_seconds_count{route="/caption"}') == 2
        assert await metric(running, 'blip2_stage_seconds_count{stage="decode"}') == 1


async def test_the_request_log_tells_times_and_rows_but_no_content(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="service")
    async with site() as running:
        await running.client.post("/caption", json={"image": IMAGE, "prompt": "confidential"})
    (record,) = [record for record in caplog.records if record.message == "request"]
    fields: dict[str, Any] = record.fields  # type: ignore[attr-defined]
    assert (fields["path"], fields["status"], fields["rows"]) == ("/caption", 200, 5)
    assert fields["timings_ms"].keys() >= {"queue", "decode", "total"}
    assert "confidential" not in str(fields)
    assert IMAGE[:20] not in str(fields)


async def test_the_openapi_document_describes_bodies_answers_and_problems() -> None:
    async with site() as running:
        document = (await running.client.get("/openapi.json")).json()
    paths = document["paths"]
    for path, name in (("/caption", "caption"), ("/vqa", "vqa"), ("/retrieve", "retrieve")):
        operation = paths[path]["post"]
        assert operation["operationId"] == name
        assert operation["tags"] == ["inference"]
        content = operation["requestBody"]["content"]
        assert content.keys() == {"application/json", "multipart/form-data"}
        assert content["application/json"]["example"]
        assert operation["responses"].keys() >= {
            "200",
            "400",
            "404",
            "413",
            "415",
            "422",
            "429",
            "503",
            "504",
        }
        problem = operation["responses"]["429"]["content"]["application/problem+json"]["schema"]
        assert problem == {"$ref": "#/components/schemas/Problem"}
    operation_ids = [operation["operationId"] for path in paths.values() for operation in path.values()]
    assert len(operation_ids) == len(set(operation_ids))


async def test_every_reference_in_the_openapi_document_leads_somewhere() -> None:
    async with site() as running:
        response = await running.client.get("/openapi.json")
    document = response.json()
    references = set(re.findall(r'"\$ref": ?"#/components/schemas/(\w+)"', response.text))
    assert references
    assert references <= document["components"]["schemas"].keys()
    assert document["components"]["schemas"]["CaptionRequest"]["properties"]["num_beams"]["maximum"] == 16


async def test_the_openapi_document_allows_null_for_each_field_that_is_optional() -> None:
    async with site() as running:
        schemas = (await running.client.get("/openapi.json")).json()["components"]["schemas"]
    for name in ("CaptionRequest", "VqaRequest", "RetrieveRequest", "Candidates", "Turn"):
        for field, schema in schemas[name]["properties"].items():
            options = [schema.get("type"), *(option.get("type") for option in schema.get("anyOf", ()))]
            allows_null = "null" in str(options)
            assert allows_null == (field not in schemas[name].get("required", ())), (name, field)
