"""The warm-up runs the largest steps that the scheduler makes, and survives those that do not fit."""

import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model import DecodeRequest, MemoryRequirement
from service.engine.scheduler import MAX_TEXTS_PER_STEP
from service.model_backend import EncoderId
from service.runtime.settings import Settings
from tests.service.fakes import MAX_PROMPT_WORDS, FakeBackend, FakeDecoder, out_of_memory
from tests.service.running import answers, site, until_async


class Recorder(FakeBackend):
    """Records the largest steps: rows of the decoder, tokens of the longest prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.max_rows = 0
        self.longest_prompt = 0

    def build_decoder(self) -> FakeDecoder:
        return RecordingDecoder(self)


class RecordingDecoder(FakeDecoder):
    def __init__(self, backend: Recorder) -> None:
        super().__init__(backend)
        self._recorder = backend
        self._num_rows = 0

    def add(self, job: DecodeRequest) -> None:
        super().add(job)
        self._num_rows += job.params.num_rows
        self._recorder.max_rows = max(self._recorder.max_rows, self._num_rows)
        self._recorder.longest_prompt = max(self._recorder.longest_prompt, len(job.prompt_ids))


async def test_the_warm_up_runs_full_batches_of_the_largest_items() -> None:
    backend = Recorder()
    async with site(backend, Settings(max_rows=96)):
        assert backend.longest_prompt >= MAX_PROMPT_WORDS - 4
        assert backend.max_rows >= 96
        assert max(map(len, backend.vision_batches)) == 8
        assert max(backend.text_batches) == MAX_TEXTS_PER_STEP
        assert max(backend.match_batches) == 32


async def test_a_device_that_takes_seconds_for_an_image_is_given_smaller_steps() -> None:
    class Slow(Recorder):
        def encode_images(self, pixels: Tensor, encoder: EncoderId) -> Tensor:
            time.sleep(1.01)  # which is how long it takes
            return super().encode_images(pixels, encoder)

    backend = Slow()
    async with site(backend, Settings(max_rows=96)):
        assert max(map(len, backend.vision_batches)) == 1
        assert backend.num_added == 2  # a caption, and one prompt of all rows
        assert max(backend.text_batches) == 4


async def test_the_longest_prompt_is_one_whose_keys_and_values_have_room() -> None:
    class Large(Recorder):
        def kv_bytes(self, requirements: Sequence[MemoryRequirement]) -> int:
            return sum(one.num_prefix_tokens for one in requirements) * 2**20

    backend = Large()
    async with site(backend, Settings(kv_bytes=MAX_PROMPT_WORDS // 2 * 2**20)):
        assert MAX_PROMPT_WORDS // 2 * 0.8 < backend.longest_prompt <= MAX_PROMPT_WORDS // 2


@pytest.mark.parametrize("memory_rows", [8, 40])
async def test_a_step_that_exceeds_the_memory_does_not_fail_the_start(memory_rows: int) -> None:
    async with site(FakeBackend(memory_rows=memory_rows)) as running:
        assert await answers(running, "/readyz", 200)


async def test_a_largest_step_that_fails_alone_does_not_fail_the_start() -> None:
    class Small(FakeBackend):
        """A model without memory for any long text."""

        def embed_texts(self, texts: Sequence[str]) -> Tensor:
            if any("photo photo" in text for text in texts):
                raise out_of_memory()
            return super().embed_texts(texts)

    async with site(Small()) as running:
        assert await answers(running, "/readyz", 200)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it is meant to die
async def test_a_device_lost_in_the_largest_step_ends_the_process() -> None:
    class Fragile(FakeBackend):
        def embed_texts(self, texts: Sequence[str]) -> Tensor:
            if len(texts) > 8:
                raise torch.AcceleratorError("the device is lost")
            return super().embed_texts(texts)

    failures: list[Exception] = []
    async with site(Fragile(), wait=False, on_failure=failures.append):
        await until_async(lambda: failures)
    assert "self-test failed" in str(failures[0])
