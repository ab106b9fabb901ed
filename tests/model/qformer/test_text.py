"""A question-conditioned Q-Former: its attention, its adapter and its answers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import Blip2, CheckpointError, EmbeddingKind, GenerationParams
from model.bulk import build_answering
from model.checkpoints import load_blip2
from model.checkpoints.convert import convert
from model.components import Blip2Components
from model.matching import Matcher
from model.qformer import QFormer
from model.qformer.text import QuestionEmbedder
from service.engine.image_pool import ImageInput
from service.engine.request import GenerateInput, Generations, Request
from service.runtime.loading import load_backend
from service.runtime.settings import Settings
from tests.builders import (
    build_components,
    build_matcher,
    build_qformer_config,
    build_text_tokenizer,
    random_images,
    random_pixels,
)
from tests.service.runtime.test_loading import serve

QUESTIONS = ("is there a red circle ?", "what color is the big star ?", "how many")
PARAMS = GenerationParams(num_beams=3, max_new_tokens=8, length_penalty=-1.0)


def build_conditioned() -> Blip2Components:
    """Build a model whose Q-Former has a text branch, as no published stage 2."""
    torch.manual_seed(1)
    config = build_qformer_config()
    embedder = QuestionEmbedder(config, build_text_tokenizer(), max_text_tokens=9).eval()
    with torch.no_grad():
        for weight in embedder.parameters():
            weight.normal_(std=0.5)
    return replace(
        build_components(), qformer=QFormer(config, has_text_branch=True).eval(), question_embedder=embedder
    )


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("conditioned") / "adapter"
    convert(build_conditioned(), directory, "adapter")
    return directory


@torch.inference_mode()
def test_queries_see_the_question_as_the_matching_pass_has_them_see_a_text() -> None:
    components = build_conditioned()
    matcher: Matcher = build_matcher()
    matcher.ln_vision, matcher.query_tokens, matcher.qformer = (
        components.ln_vision, components.query_tokens, components.qformer,
    )  # fmt: skip
    assert components.question_embedder is not None
    matcher.embeddings, matcher.max_text_tokens = components.question_embedder.embeddings, 9
    blip2 = Blip2(components)
    features = blip2.encode_images(random_pixels(3))
    shown = blip2.encode_queries(features, QUESTIONS)
    states: list[torch.Tensor] = []
    hook = matcher.itm_head.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    matcher.match_logits(features, *matcher.tokenize(QUESTIONS))
    hook.remove()
    torch.testing.assert_close(shown, states[0], rtol=0, atol=1e-6)
    assert not torch.allclose(shown, blip2.encode_queries(features, QUESTIONS[::-1]), atol=1e-2)


@torch.inference_mode()
def test_a_question_reads_the_same_beside_longer_ones_and_alone() -> None:
    blip2 = Blip2(build_conditioned())
    features = blip2.encode_images(random_pixels(3))
    together = blip2.encode_queries(features, QUESTIONS)
    alone = [blip2.encode_queries(features[at : at + 1], [QUESTIONS[at]])[0] for at in range(3)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_an_adapter_keeps_the_question_embedder_and_its_limit(adapter: Path) -> None:
    expected, reloaded = Blip2(build_conditioned()), Blip2.from_pretrained(str(adapter))
    assert reloaded.question_embedder is not None
    assert reloaded.question_embedder.max_text_tokens == 9
    features = expected.encode_images(random_pixels(3))
    ours = reloaded.encode_queries(features, QUESTIONS)
    torch.testing.assert_close(ours, expected.encode_queries(features, QUESTIONS), rtol=0, atol=0)


@pytest.mark.parametrize(("to", "name"), [("hub", "hub"), ("lavis", "model.pth")])
def test_formats_without_such_models_are_refused_before_anything_is_written(
    adapter: Path, tmp_path: Path, to: str, name: str
) -> None:
    with pytest.raises(CheckpointError, match=r"is shown the question.*convert to an adapter"):
        convert(load_blip2(str(adapter)).components, tmp_path / name, to)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@torch.inference_mode()
def test_the_service_and_bulk_work_show_each_question_to_the_q_former(adapter: Path) -> None:
    blip2 = Blip2.from_pretrained(str(adapter))
    backend = load_backend(Settings(model=str(adapter), device="cpu", dtype="float32"))
    assert backend.is_question_conditioned
    features = blip2.encode_images(blip2.preprocess.normalise(random_images(2)))
    prompts = [blip2.prompts.question_prompt(question) for question in QUESTIONS]
    expected = [
        [
            blip2.generate(
                blip2.project_queries(blip2.encode_queries(one[None], [question])), [prompt], PARAMS
            )[0][0].text
            for question, prompt in zip(QUESTIONS, prompts, strict=True)
        ]
        for one in features
    ]
    requests: list[Request[Generations]] = [
        Request(
            GenerateInput(
                ImageInput(str(index), random_images(2)[index], {}),
                tuple(
                    backend.tokenize_prompt(prompt, GenerationParams(max_new_tokens=8)) for prompt in prompts
                ),
                PARAMS,
                QUESTIONS,
            )
        )
        for index in range(2)
    ]
    assert requests[0].inputs.required == {EmbeddingKind.IMAGE_FEATURES}
    serve(backend, list(requests))
    served = [[best[0].text for best in request.future.result().value] for request in requests]
    in_bulk = build_answering(blip2, QUESTIONS, PARAMS).run(features)
    assert served == expected
    assert [[answer["answer"] for answer in line["answers"]] for line in in_bulk] == expected


@pytest.mark.parametrize("num_words", [0, 1, 6, 7, 8, 20])
def test_a_text_is_cut_exactly_where_tokens_of_it_are_left_out(num_words: int) -> None:
    """Nine tokens with [CLS] and [SEP]: seven of the text."""
    text = "red " * num_words
    tokenizer = build_text_tokenizer()
    embedder = QuestionEmbedder(build_qformer_config(), tokenizer, max_text_tokens=9)
    matcher = build_matcher()
    matcher.max_text_tokens = 9
    num_tokens = len(tokenizer.encode(text, add_special_tokens=False))
    assert num_tokens == num_words
    is_cut = matcher.tokenize([text])[0].shape[1] < num_tokens + 2
    assert embedder.is_cut(text) == matcher.is_cut(text) == is_cut == (num_words > 7)
