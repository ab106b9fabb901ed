"""Runs sequences in the one decoder and its KV cache, which they join and leave between two tokens."""

from collections.abc import Sequence as SequenceOf

from model import DecodeRequest
from service.engine.protocols import EngineMetrics
from service.engine.sequence import Sequence
from service.engine.step import DecodeStep
from service.model_backend import Backend, StepDecoder


class DecodeRunner:
    """Holds the decoder and which of its requests is which sequence."""

    def __init__(self, backend: Backend, metrics: EngineMetrics) -> None:
        self._backend = backend
        self._metrics = metrics
        self._decoder: StepDecoder | None = None  # built when needed: a checkpoint may lack a language model
        self._sequences: dict[DecodeRequest, Sequence] = {}

    def run(self, step: DecodeStep) -> None:
        """Add the sequences that join and advance all by one token; finished ones store their texts."""
        self._cancel(step.dropped)
        if not step.items:
            return
        decoder = self._decoder = self._decoder or self._backend.build_decoder()
        if step.joining:
            self._add(decoder, step)
        self._metrics.observe_batch("decode", step.size)
        for request, generations in decoder.step():
            self._sequences.pop(request).finish(generations)

    def reset(self) -> None:
        """Discard the decoder and all that runs in it, after a failure."""
        self._decoder = None
        self._sequences.clear()

    def _add(self, decoder: StepDecoder, step: DecodeStep) -> None:
        for sequence in step.joining:
            request = self._backend.build_decode_request(
                sequence.encoded, sequence.prompt_ids, sequence.params, sequence.question
            )
            decoder.add(request)
            self._sequences[request] = sequence
        num_tokens = [sequence.num_prefix_tokens for sequence in step.joining]
        self._metrics.observe_padding(1 - sum(num_tokens) / (len(num_tokens) * max(num_tokens)))
        for sequence in step.items:
            sequence.request.observe_rows(step.size)

    def _cancel(self, dropped: SequenceOf[Sequence]) -> None:
        for request, sequence in list(self._sequences.items()):
            if sequence in dropped and self._decoder is not None:
                del self._sequences[request]
                self._decoder.cancel(request)
