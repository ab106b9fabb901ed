"""The backend over the embedded checkpoints: every component reports its progress, layer by layer."""

from collections.abc import Callable

import pytest
import torch

from model import EmbeddingKind, GenerationParams
from service.blip2_backend import Blip2Backend
from service.model_backend import EncoderId
from service.runtime.loading import load_backend
from service.runtime.settings import Settings

GREEDY = GenerationParams(num_beams=1, max_new_tokens=2, min_new_tokens=2)


@pytest.fixture(scope="module", params=["tiny", "tiny-t5"])
def backend(request: pytest.FixtureRequest) -> Blip2Backend:
    return load_backend(Settings(model=request.param, device="cpu"))  # with packed weights


def features(backend: Blip2Backend) -> torch.Tensor:
    side = backend.image_size(EncoderId.MAIN)
    return backend.encode_images(torch.zeros(1, side, side, 3, dtype=torch.uint8), EncoderId.MAIN)


def decode(backend: Blip2Backend) -> None:
    query_output = backend.encode(EmbeddingKind.QUERY_OUTPUT, features(backend))[0]
    decoder = backend.build_decoder()
    prompt_ids = backend.tokenize_prompt("a photo", GREEDY)
    decoder.add(backend.build_decode_request(query_output, prompt_ids, GREEDY, None))
    assert num_ended_layers(backend, decoder.step) > 1  # the prefill
    assert num_ended_layers(backend, decoder.step) > 1


def num_ended_layers(backend: Blip2Backend, work: Callable[[], object]) -> int:
    """Return how many layers end while `work` is done, of those that report."""
    ended: list[object] = []
    handles = [
        layer.register_forward_hook(lambda *_: ended.append(None))
        for layer in backend.generating_model.layers
    ]
    work()
    for handle in handles:
        handle.remove()
    return len(ended)


@torch.inference_mode()
def test_each_kind_of_work_reports_each_of_its_layers(backend: Blip2Backend) -> None:
    image_features = features(backend)
    work: dict[str, Callable[[], object]] = {
        "vision": lambda: features(backend),
        "queries": lambda: backend.encode(EmbeddingKind.QUERY_OUTPUT, image_features),
        "decode": lambda: decode(backend),
    }
    if backend.can_match:
        work["texts"] = lambda: backend.embed_texts(["a red circle"])
        work["pairs"] = lambda: backend.match_logits(image_features, ["a red circle"])
    for name, run in work.items():
        before = backend.last_progress
        assert num_ended_layers(backend, run) > 1, name
        assert backend.last_progress > before, name
