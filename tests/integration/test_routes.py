"""The three routes of a real service, with JSON and forms, compared with the model in this process."""

import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from model import Blip2, Generation, GenerationParams
from tests.integration.pictures import in_base64, picture

PICTURES = [picture(seed) for seed in range(4)]
TEXTS = ["a red circle", "two blue stars", "a cross above a square"]


class Reference:
    """The model in this process, with one request at a time."""

    def __init__(self, checkpoint: Path) -> None:
        self.blip2 = Blip2.from_pretrained(str(checkpoint))

    def image_features(self, index: int) -> torch.Tensor:
        image = Image.open(io.BytesIO(PICTURES[index]))
        return self.blip2.encode_images(self.blip2.preprocess(image)[None])

    @torch.inference_mode()
    def generate(self, index: int, prompt: str, **params: Any) -> tuple[Generation, ...]:
        query_output = self.blip2.encode_queries(self.image_features(index))
        inputs = self.blip2.project_queries(query_output)
        return self.blip2.generate(inputs, [prompt], GenerationParams(**params))[0]

    @torch.inference_mode()
    def image_embeds(self, index: int) -> torch.Tensor:
        assert self.blip2.matcher is not None
        queries = self.blip2.matcher.encode_image_queries(self.image_features(index)).query_output
        return self.blip2.matcher.image_embeds(queries)

    @torch.inference_mode()
    def itc(self, index: int, text: str) -> float:
        matcher = self.blip2.matcher
        assert matcher is not None
        text_embeds = matcher.text_embeds(*matcher.tokenize([text]))
        return matcher.itc_scores(self.image_embeds(index), text_embeds).item()

    @torch.inference_mode()
    def match_logits(self, index: int, text: str) -> torch.Tensor:
        matcher = self.blip2.matcher
        assert matcher is not None
        return matcher.match_logits(self.image_features(index), *matcher.tokenize([text]))[0]


@pytest.fixture(scope="module")
def reference(random_checkpoint: Path) -> Reference:
    return Reference(random_checkpoint)


def post(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def images(*indices: int) -> dict[str, list[str]]:
    return {"images": [in_base64(PICTURES[index]) for index in indices]}


def scores_by_index(answer: dict[str, Any]) -> dict[int, float]:
    results = answer["results"]
    assert [result["rank"] for result in results] == list(range(1, len(results) + 1))
    assert results == sorted(results, key=lambda result: -result["score"])
    return {result["index"]: result["score"] for result in results}


@pytest.mark.parametrize("index", range(3))
def test_captions_are_those_of_the_model_alone(
    client: httpx.Client, reference: Reference, index: int
) -> None:
    body = {"image": in_base64(PICTURES[index]), "num_captions": 3, "prompt": "a photo of"}
    captions = post(client, "/caption", body)["captions"]
    expected = reference.generate(index, "a photo of", num_return_sequences=3)
    assert [caption["text"] for caption in captions] == [generation.text for generation in expected]
    assert [caption["num_tokens"] for caption in captions] == [one.num_tokens for one in expected]
    assert [caption["finish_reason"] for caption in captions] == [one.finish_reason for one in expected]
    assert [caption["score"] for caption in captions] == pytest.approx([one.score for one in expected])


def test_tokens_are_told_with_their_log_probabilities_where_that_is_asked(
    client: httpx.Client, reference: Reference
) -> None:
    body = {"image": in_base64(PICTURES[0]), "prompt": "a photo of", "num_captions": 2}
    without = post(client, "/caption", body)["captions"]
    assert not any("logprobs" in caption for caption in without)
    captions = post(client, "/caption", body | {"logprobs": True})["captions"]
    expected = reference.generate(0, "a photo of", num_return_sequences=2)
    for caption, generation in zip(captions, expected, strict=True):
        logprobs = caption["logprobs"]
        assert tuple(token["token_id"] for token in logprobs) == generation.token_ids
        assert [token["logprob"] for token in logprobs] == pytest.approx(generation.log_probs, abs=1e-4)
        words = [token["token"] for token in logprobs if token["token"] in caption["text"].split()]
        assert words == caption["text"].split()
    body = {"image": in_base64(PICTURES[0]), "question": "how many", "num_answers": 2, "logprobs": True}
    (answer,) = post(client, "/vqa", body)["answers"]
    for each in (answer, *answer["alternatives"]):
        assert len(each["logprobs"]) == each["num_tokens"]


def test_the_default_caption_prompt_is_the_checkpoints(client: httpx.Client, reference: Reference) -> None:
    caption = post(client, "/caption", {"image": in_base64(PICTURES[0])})["captions"][0]
    prompt = reference.blip2.prompts.caption_prompt()
    assert caption["text"] == reference.generate(0, prompt)[0].text


def test_answers_are_those_of_the_model_alone(client: httpx.Client, reference: Reference) -> None:
    history = [{"question": "what is there", "answer": "a star"}]
    questions = ["what color is the star", "how many"]
    body = {
        "image": in_base64(PICTURES[1]),
        "question": questions,
        "history": history,
        "num_answers": 2,
    }
    answers = post(client, "/vqa", body)["answers"]
    for answer, question in zip(answers, questions, strict=True):
        prompt = reference.blip2.prompts.question_prompt(question, [("what is there", "a star")])
        best, second = reference.generate(
            1, prompt, num_return_sequences=2, max_new_tokens=10, length_penalty=-1.0
        )
        assert answer["question"] == question
        assert (answer["answer"], answer["num_tokens"]) == (best.text, best.num_tokens)
        assert answer["score"] == pytest.approx(best.score)
        assert [other["answer"] for other in answer["alternatives"]] == [second.text]


def test_a_prompt_template_takes_the_place_of_the_checkpoints(
    client: httpx.Client, reference: Reference
) -> None:
    body = {
        "image": in_base64(PICTURES[1]),
        "question": "what color",
        "prompt_template": "the question : {} ?",
    }
    answer = post(client, "/vqa", body)["answers"][0]["answer"]
    expected = reference.generate(1, "the question : what color ?", max_new_tokens=10, length_penalty=-1.0)
    assert answer == expected[0].text


def test_text_to_images_in_all_modes(client: httpx.Client, reference: Reference) -> None:
    body = {"text": TEXTS[0], "candidates": images(0, 1, 2)}
    itc = {index: reference.itc(index, TEXTS[0]) for index in range(3)}
    logits = {index: reference.match_logits(index, TEXTS[0]) for index in range(3)}
    assert scores_by_index(post(client, "/retrieve", {**body, "mode": "itc"})) == pytest.approx(itc, abs=1e-5)
    itm = {index: logits[index].log_softmax(0)[1].item() for index in range(3)}
    answer = post(client, "/retrieve", {**body, "mode": "itm"})
    assert scores_by_index(answer) == pytest.approx(itm, abs=1e-4)
    for result in answer["results"]:
        expected = logits[result["index"]].softmax(0)[1].item()
        assert result["itm_probability"] == pytest.approx(expected, abs=1e-4)
        assert result["itc"] == pytest.approx(itc[result["index"]], abs=1e-5)
    answer = post(client, "/retrieve", body)
    assert answer["mode"] == "rerank"
    rerank = {index: logits[index][1].item() + itc[index] for index in range(3)}
    assert scores_by_index(answer) == pytest.approx(rerank, abs=1e-4)


def test_image_to_texts(client: httpx.Client, reference: Reference) -> None:
    body = {"image": in_base64(PICTURES[3]), "candidates": {"texts": TEXTS}, "rerank_k": 2}
    answer = post(client, "/retrieve", body)
    itc = [reference.itc(3, text) for text in TEXTS]
    nearest = sorted(range(3), key=lambda index: -itc[index])[:2]
    expected = {index: itc[index] + reference.match_logits(3, TEXTS[index])[1].item() for index in nearest}
    assert scores_by_index(answer) == pytest.approx(expected, abs=1e-4)


def test_texts_to_texts_and_image_to_images(client: httpx.Client, reference: Reference) -> None:
    answer = post(client, "/retrieve", {"text": TEXTS[1], "candidates": {"texts": TEXTS}})
    assert (answer["mode"], answer["results"][0]["index"]) == ("itc", 1)
    assert answer["results"][0]["score"] == pytest.approx(1.0, abs=1e-5)
    answer = post(client, "/retrieve", {"image": in_base64(PICTURES[2]), "candidates": images(0, 2)})
    query, other = reference.image_embeds(2)[0], reference.image_embeds(0)[0]  # [Q, E]
    expected = {1: 1.0, 0: (query @ other.T).amax(dim=1).mean().item()}
    assert scores_by_index(answer) == pytest.approx(expected, abs=1e-5)


def test_a_form_gives_the_same_answers_as_json(client: httpx.Client) -> None:
    one = in_base64(PICTURES[0])

    def form(path: str, **content: Any) -> Any:
        return client.post(path, **content).json()

    def same(first: dict[str, Any], second: dict[str, Any], key: str) -> None:
        assert first[key] == second[key]

    file = {"image": ("a.png", PICTURES[0], "image/png")}
    same(
        form("/caption", files=file, data={"num_captions": "2", "prompt": "a"}),
        post(client, "/caption", {"image": one, "num_captions": 2, "prompt": "a"}),
        "captions",
    )
    same(
        form("/vqa", files=file, data={"question": ["what", "how many"]}),
        post(client, "/vqa", {"image": one, "question": ["what", "how many"]}),
        "answers",
    )
    same(
        form("/retrieve", files=file, data={"candidates": json.dumps({"texts": TEXTS})}),
        post(client, "/retrieve", {"image": one, "candidates": {"texts": TEXTS}}),
        "results",
    )


def test_several_images_are_captioned_each_and_a_bad_one_fails_alone(client: httpx.Client) -> None:
    files = [("image", PICTURES[0]), ("image", b"this is text"), ("image", PICTURES[1])]
    results = client.post("/caption", files=files).json()["results"]
    alone = [post(client, "/caption", {"image": in_base64(PICTURES[index])})["captions"] for index in (0, 1)]
    for result, captions in zip((results[0], results[2]), alone, strict=True):
        [caption], [expected] = result["captions"], captions
        assert caption == {**expected, "score": pytest.approx(expected["score"], abs=1e-4)}
    assert results[1]["error"]["status"] == 415


def test_a_damaged_image_that_is_read_is_told_of_in_the_answer(client: httpx.Client) -> None:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(0))).convert("RGB").save(buffer, "JPEG")
    whole, cut = buffer.getvalue(), buffer.getvalue()[:-2]
    expected = post(client, "/caption", {"image": in_base64(whole)})
    assert "warnings" not in expected
    message = "the JPEG has no end marker and may be cut off; no pixels are missing"
    for is_cached in (False, True):  # found in the file, so that a cached image has them too
        answer = post(client, "/caption", {"image": in_base64(cut)})
        assert answer["warnings"] == [f"image: {message}"]
        assert answer["captions"] == expected["captions"]
        assert answer["image_cached"] is is_cached
    results = post(client, "/caption", {"images": [in_base64(whole), in_base64(cut)]})["results"]
    assert "warnings" not in results[0]
    assert results[1]["warnings"] == [f"images.1: {message}"]
    answer = post(client, "/vqa", {"image": in_base64(cut), "question": "what color is the circle?"})
    assert answer["warnings"] == [f"image: {message}"]
    candidates = {"images": [in_base64(cut), in_base64(whole)]}
    answer = post(client, "/retrieve", {"text": "a red circle", "candidates": candidates})
    assert answer["warnings"] == [f"candidates.images.0: {message}"]


def test_equal_seeds_give_equal_samples(client: httpx.Client) -> None:
    body = {"image": in_base64(PICTURES[0]), "do_sample": True, "num_captions": 4, "temperature": 2.0}
    first, second = (post(client, "/caption", {**body, "seed": 5})["captions"] for _ in range(2))
    assert first == second
    assert post(client, "/caption", {**body, "seed": 6})["captions"] != first


def test_probes_version_and_documentation_answer(client: httpx.Client) -> None:
    for path in ("/livez", "/readyz", "/startupz", "/health"):
        assert client.get(path).json() == {"status": "ok"}
    version = client.get("/version").json()
    assert version["tasks"] == ["caption", "vqa", "retrieve"]
    assert len(version["fingerprint"]) == 64
    assert client.get("/", follow_redirects=True).status_code == 200
    assert client.get("/openapi.json").json()["openapi"].startswith("3.")


def test_the_metrics_tell_of_the_work(client: httpx.Client) -> None:
    post(client, "/caption", {"image": in_base64(picture(99))})
    text = client.get("/metrics").text
    for series in (
        'blip2_batch_rows_count{stage="vision"}',
        'blip2_stage_seconds_count{stage="decode"}',
        'blip2_requests_total{route="/caption",status="200"}',
        "blip2_generated_tokens_total",
        "process_resident_memory_bytes",
    ):
        value = next(line.split()[-1] for line in text.splitlines() if line.startswith(series))
        assert float(value) > 0
