"""The decoder: continuous batching, in which sequences join and leave between steps.

No generation depends on the other sequences of the batch.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.devices import upload
from model.generation.beam_search import Candidates, update_beams
from model.generation.beam_search_state import BeamSearchState
from model.generation.limits import DecoderLimits, check_fits
from model.generation.request import (
    DecodeRequest,
    Generation,
    ScheduledSequence,
    build_generation,
    build_sequence,
)
from model.generation.sampler import SampledRows, Sampler, SamplerInput, TopK
from model.language import DecodingState, IntArray, LanguageModel

Generations = tuple[Generation, ...]  # best first


class StepOutput(NamedTuple):
    """The tokens that may continue R rows; sequences, beams: [R], of each row."""

    sequences: IntArray
    beams: IntArray
    top_k: TopK


class Decoder:
    """Runs any number of requests on one language model, each with its own parameters.

    A step runs one decode step over all running rows, then one prefill over the requests that fit the limits
    now. Requests beyond `limits` wait, first come, first served. For one thread. `step` must be called under
    `torch.inference_mode()`; after an exception from it the decoder must be replaced.

    state: an empty decoding state of the language model, its own unless given.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        limits: DecoderLimits | None = None,
        *,
        state: DecodingState | None = None,
    ) -> None:
        self._language_model = language_model
        self._limits = limits or DecoderLimits()
        self._kv_state = state or language_model.build_state()
        self._search_state = BeamSearchState(language_model.eos_token_ids)
        self._sampler = Sampler(language_model.eos_token_ids, language_model.device)
        self._waiting: list[ScheduledSequence] = []
        self._running: list[ScheduledSequence] = []  # in the order of both states

    @property
    def num_requests(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def running_requests(self) -> tuple[DecodeRequest, ...]:
        """The requests that were prefilled and are not done."""
        return tuple(sequence.request for sequence in self._running)

    @property
    def num_rows(self) -> int:
        """The rows of running requests, and those that waiting ones will have."""
        waiting = sum(sequence.requirement.num_rows for sequence in self._waiting)
        return waiting + int(self._search_state.running.is_active.sum())

    def add(self, request: DecodeRequest) -> None:
        """Add a request, which is prefilled in the next step in which it fits the limits.

        Raises InvalidParamsError where a parameter is out of its bounds or the request alone exceeds the
        limits, InvalidPromptError where its tokens exceed the positions of the language model.
        """
        request.params.validate()
        check_fits(
            self._language_model,
            self._limits,
            num_prompt_tokens=len(request.prompt_ids),
            num_soft_tokens=len(request.language_model_inputs),
            params=request.params,
        )
        self._waiting.append(build_sequence(request, self._language_model))

    def cancel(self, request: DecodeRequest) -> None:
        """Drop a request and its rows at once; does nothing where it is done already."""
        self._waiting = [sequence for sequence in self._waiting if sequence.request is not request]
        self._keep([sequence.request is not request for sequence in self._running])

    def token_ids(self, request: DecodeRequest) -> tuple[int, ...]:
        """Return the tokens generated so far for a request of one row, the end token excluded."""
        assert request.params.num_rows == 1, "beams change with every step, and samples are several"
        running = self.running_requests
        if request not in running:
            return ()
        sequence, state = running.index(request), self._search_state
        generated_ids = state.running.token_ids[sequence, 0, : state.num_tokens[sequence]]
        return tuple(generated_ids.tolist())

    def step(self) -> list[tuple[DecodeRequest, Generations]]:
        """Generate one token for every running row; return the requests that are done."""
        outputs = [*self._decode(), *self._prefill()]
        if not outputs:
            return []
        update_beams(self._search_state, _download(outputs, self._search_state))
        is_done = self._search_state.is_done.tolist()
        done = [
            (self._running[index].request, self._collect(index))
            for index, ended in enumerate(is_done)
            if ended
        ]
        self._keep([not ended for ended in is_done])
        return done

    def _decode(self) -> Iterator[StepOutput]:
        if self._running:
            sequences, beams = self._search_state.rows()
            logits = self._kv_state.decode_step(self._search_state.decode_input(sequences, beams))
            yield self._sample(logits, sequences, beams)

    def _prefill(self) -> Iterator[StepOutput]:
        admitted = self._admit()
        if not admitted:
            return
        requests = [sequence.request for sequence in admitted]
        prefixes = [
            self._language_model.embed_prefix(request.language_model_inputs, request.prompt_ids)
            for request in requests
        ]
        first = len(self._search_state)
        self._running += admitted
        self._search_state.append(
            [request.params for request in requests], [sequence.context for sequence in admitted]
        )
        logits = self._kv_state.prefill(prefixes, [sequence.requirement for sequence in admitted])
        sequences, beams = self._search_state.rows()
        sequences, beams = sequences[sequences >= first], beams[sequences >= first]
        if len(sequences) > len(logits):  # samples start with a row each, all with the logits of one
            logits = logits[upload(sequences - first, logits.device)]
        yield self._sample(logits, sequences, beams)

    def _admit(self) -> list[ScheduledSequence]:
        """Remove from the waiting sequences, oldest first, those that fit the limits; return them."""
        running = [sequence.requirement for sequence in self._running]
        waiting = [sequence.requirement for sequence in self._waiting]
        count = len(waiting)
        if self._limits.are_exceeded(running + waiting, self._language_model):
            count = next(
                number
                for number in range(len(waiting))
                if self._limits.are_exceeded(running + waiting[: number + 1], self._language_model)
            )
        admitted, self._waiting = self._waiting[:count], self._waiting[count:]
        return admitted

    def _sample(self, logits: Tensor, sequences: IntArray, beams: IntArray) -> StepOutput:
        state = self._search_state
        inputs = SamplerInput(
            state.params.select(sequences),
            state.num_tokens[sequences] < state.params.min_new_tokens[sequences],
            state.histories(sequences, beams),
            self._sampled_rows(sequences),
        )
        count = int(state.num_candidates.max())
        return StepOutput(sequences, beams, self._sampler(logits, inputs, count))

    def _sampled_rows(self, sequences: IntArray) -> list[SampledRows]:
        return [
            SampledRows(slice(*np.searchsorted(sequences, [index, index + 1])), generator)
            for index, sequence in enumerate(self._running)
            if (generator := sequence.generator) is not None and index in sequences
        ]

    def _keep(self, kept: Sequence[bool]) -> None:
        """Drop all sequences but some; the last ones take the places of those dropped."""
        order = compact_order(kept)
        if len(order) < len(kept):
            self._kv_state.permute(order)
            self._search_state.permute(order)
            self._running = [self._running[index] for index in order]

    def _collect(self, sequence: int) -> Generations:
        finished, request = self._search_state.finished, self._running[sequence].request
        if not finished.is_active[sequence, 0]:  # the model ruled out all tokens, even the end
            return (Generation("", (), math.nan, 0, "stop"),)
        return tuple(
            build_generation(
                self._language_model,
                tuple(finished.token_ids[sequence, rank, : finished.lengths[sequence, rank]].tolist()),
                tuple(finished.log_probs[sequence, rank, : finished.lengths[sequence, rank]].tolist()),
                float(finished.scores[sequence, rank]),
            )
            for rank in range(request.params.num_return_sequences)
            if finished.is_active[sequence, rank]
        )


def run_requests(language_model: LanguageModel, requests: Sequence[DecodeRequest]) -> list[Generations]:
    """Run requests together until all are done; return the generations of each, best first.

    Must be called under `torch.inference_mode()`. Raises what `Decoder.add` raises.
    """
    decoder = Decoder(language_model)
    for request in requests:
        decoder.add(request)
    generations: dict[DecodeRequest, Generations] = {}
    while decoder.num_requests:
        generations.update(decoder.step())
    return [generations[request] for request in requests]


def compact_order(kept: Sequence[bool]) -> list[int]:
    """Return an order of the kept ones that moves as few as possible: [yes, no, yes, yes] gives [0, 3, 2]."""
    order = [index for index, is_kept in enumerate(kept) if is_kept]
    count = len(order)
    from_end = [index for index in order if index >= count]
    return [index if kept[index] else from_end.pop() for index in range(count)]


def _download(outputs: Sequence[StepOutput], state: BeamSearchState) -> Candidates:
    """Copy the outputs of one step to the host, and place them by sequence and beam."""
    size = max(output.top_k.log_probs.shape[1] for output in outputs)
    shape = (*state.running.scores.shape, size)
    candidates = Candidates(np.zeros(shape, np.int64), np.full(shape, -np.inf, np.float32))
    flat = [torch.stack([top_k.log_probs, top_k.token_ids.float()]).flatten() for _, _, top_k in outputs]
    # The one device-to-host sync of a step. Ids travel as float32, which is exact below 2 ** 24.
    arrays = np.split(torch.cat(flat).cpu().numpy(), np.cumsum([len(part) for part in flat])[:-1])
    for (sequences, beams, top_k), array in zip(outputs, arrays, strict=True):
        log_probs, token_ids = array.reshape(2, *top_k.log_probs.shape)
        candidates.log_probs[sequences, beams, : log_probs.shape[1]] = log_probs
        candidates.token_ids[sequences, beams, : token_ids.shape[1]] = token_ids
    return candidates
