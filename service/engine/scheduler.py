"""The whole policy: which requests are admitted, which work runs next, and how much of it at once.

Each step goes to the workload that has had the least device time by weight; nothing waits for a batch to
fill. Rows, padded prompt tokens, images, texts, pairs and bytes of keys and values are counted here; the
decoder enforces the same limits of rows and bytes for those who use it without a service.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from itertools import chain, islice, zip_longest
from typing import Any, Final, TypeVar

from torch import Tensor

from service.engine.candidate_scores import CandidateScores
from service.engine.fair_queueing import WeightedFairScheduler
from service.engine.image_pool import EncodedImage
from service.engine.isolation import Bisection
from service.engine.request import MAX_PAIRS_PER_STEP, AdmissionClass, AnyRequest, GenerateInput
from service.engine.request_queue import RequestQueue
from service.engine.sequence import Sequence, WaitingSequences, build_sequences
from service.engine.step import BatchSizeLimit, DecodeStep, EncodeStep, MatchStep, Step, Workload
from service.errors import DeadlineExceededError
from service.model_backend import Backend

MAX_IMAGES_PER_STEP: Final = 8
MAX_TEXTS_PER_STEP: Final = 64
MAX_PROMPT_TOKENS_PER_STEP: Final = 1024  # prefilled at once, image tokens and padding included
MAX_TEXT_TOKENS_PER_STEP: Final = 2560  # of texts and pairs, padding and a pair's query tokens included
MAX_STEP_S: Final = 0.5  # batches of images, texts and pairs are sized to take about so long at most
MAX_PREFETCHED: Final = 8  # requests of a class whose images are encoded while others hold the rows
MAX_MATCH_IMAGES: Final = 1024  # of all admitted bulk requests; one of more is admitted alone
LONG_SHARE: Final = 0.75  # of the rows, for sequences of many tokens
# Shares of device time while all workloads are ready. Images of generation requests have by far the largest
# weight: encoding many first lets their sequences share decode steps, and prefetch bounds their number.
WEIGHTS: Final = {
    Workload.IMAGES_TO_GENERATE: 40.0,
    Workload.IMAGES_TO_MATCH: 1.0,
    Workload.MATCH: 1.0,
    Workload.GENERATE: 1.0,
}


T = TypeVar("T")


def open_classes(requests: Iterable[AnyRequest], max_rows: int) -> frozenset[AdmissionClass]:
    """Return the classes that may admit one more request, given the admitted ones.

    Generation is open while its requests have fewer than `max_rows` rows, long ones fewer than three
    quarters; both match classes have other `max_rows` each. A few of each class are prefetched: images are
    encoded ahead.
    """
    num_rows, num_prefetched = Counter[AdmissionClass](), Counter[AdmissionClass]()
    for request in requests:
        num_rows[request.admission_class] += request.inputs.num_rows
        num_prefetched[request.admission_class] += not request.holds_rows
    short, long = AdmissionClass.SHORT, AdmissionClass.LONG
    has_rows = num_rows[short] + num_rows[long] < max_rows
    is_open = {
        AdmissionClass.MATCH: num_rows[AdmissionClass.MATCH] < max_rows,
        AdmissionClass.BULK_MATCH: num_rows[AdmissionClass.BULK_MATCH] < max_rows,
        short: has_rows or num_prefetched[short] < MAX_PREFETCHED,
        long: (has_rows and num_rows[long] < LONG_SHARE * max_rows) or num_prefetched[long] < MAX_PREFETCHED,
    }
    return frozenset(name for name in AdmissionClass if is_open[name])


class Scheduler:
    """Holds the admitted requests and plans every step. For the engine's thread.

    max_rows: beams and samples that run at once. max_kv_bytes: of their keys and values. bisections: groups
    that run before other work of their workload. cached_texts: returns the embeddings of cached texts.
    """

    def __init__(
        self,
        backend: Backend,
        bisections: dict[Workload, Bisection[Any]],
        *,
        max_rows: int,
        max_kv_bytes: int,
        cached_texts: Callable[[Iterable[str]], dict[str, Tensor]],
    ) -> None:
        self.requests: list[AnyRequest] = []  # admitted and not done
        self._backend = backend
        self._bisections = bisections
        self._max_rows = max_rows
        self._max_kv_bytes = max_kv_bytes
        self._cached_texts = cached_texts
        self._fairness = WeightedFairScheduler(WEIGHTS)
        self._image_limit = BatchSizeLimit(MAX_IMAGES_PER_STEP, max_seconds=MAX_STEP_S)
        num_text_tokens = max(1, backend.max_text_tokens)  # of the longest text
        max_texts = max(1, min(MAX_TEXTS_PER_STEP, MAX_TEXT_TOKENS_PER_STEP // num_text_tokens))
        self._text_limit = BatchSizeLimit(max_texts, max_seconds=MAX_STEP_S)
        num_pair_tokens = num_text_tokens + backend.num_query_tokens
        max_pairs = max(1, min(MAX_PAIRS_PER_STEP, MAX_TEXT_TOKENS_PER_STEP // num_pair_tokens))
        self._pair_limit = BatchSizeLimit(max_pairs, max_seconds=MAX_STEP_S)
        self._row_limit = BatchSizeLimit(max_rows)
        self._encoding: list[AnyRequest] = []  # those whose images are not encoded yet
        self._matching: deque[CandidateScores] = deque()
        self._waiting = WaitingSequences()
        self._running: list[Sequence] = []
        self._blocked_at: tuple[int, ...] = ()  # the state in which nothing could join, and need not be tried
        self._is_cut = False  # rows keep sequences out
        self._is_quarantined = False  # what runs is a group of a bisection, which nothing may join

    @property
    def is_idle(self) -> bool:
        return not (self.requests or self._running)  # the running ones may be left of abandoned requests

    def admit(self, queue: RequestQueue) -> AnyRequest | None:
        """Admit the next request whose class has room; None where there is none."""
        while request := queue.take(open_classes(self.requests, self._max_rows), self._fits):
            if request.has_expired(time.monotonic()):
                request.fail(DeadlineExceededError("the deadline passed while the request was in the queue"))
            elif not request.is_done:
                request.admitted = time.monotonic()
                self.requests.append(request)
                self._encoding.append(request)
                return request
        return None

    def _fits(self, request: AnyRequest) -> bool:
        """Return whether the images of a bulk request may be held beside those of the admitted ones."""
        if not request.inputs.is_bulk:
            return True
        held = sum(len(each.images) for each in self.requests if each.inputs.is_bulk)
        return held == 0 or held + len(request.inputs.images) <= MAX_MATCH_IMAGES

    def schedule(self) -> Step | None:
        """Plan the next step; None while nothing can run."""
        self._start_work()
        work: dict[Workload, Collection[Any]] = {
            Workload.IMAGES_TO_GENERATE: self._images_to_generate(),
            Workload.IMAGES_TO_MATCH: self._images_to_match(),
            Workload.MATCH: [scores for scores in self._matching if scores.is_ready],
            Workload.GENERATE: [*self._running, *self._waiting],
        }
        for workload, pending in work.items():
            if not pending:
                self._bisections.pop(workload, None)
        ready = [workload for workload, pending in work.items() if pending]
        if not ready:
            return None
        chosen = self._fairness.next(ready)
        if chosen is Workload.GENERATE:
            return self._schedule_decode()
        if chosen is Workload.MATCH:
            return self._schedule_match(work[chosen])
        return self._schedule_encode(chosen, work[chosen])

    def update(self, step: Step, seconds: float, *, has_failed: bool) -> None:
        """Charge a step's device time; learn from its success, or requeue its sequences after a failure."""
        self._fairness.charge(step.workload, seconds)
        if has_failed and isinstance(step, DecodeStep):
            self._waiting.put_back(step.items)  # all begin anew
            self._running, self._is_quarantined = [], False
        elif not has_failed and step.limit is not None and step.size:
            step.limit.observe_success(step.size, seconds, is_cut=step.is_cut)
        self._running = [sequence for sequence in self._running if not sequence.is_finished]

    def remove_done(self) -> list[AnyRequest]:
        """Forget the requests that are done, and return those that were not abandoned by their callers."""
        done = [request for request in self.requests if request.is_done]
        for request in done:
            request.images = ()  # the caller may hold the request; the device's memory is freed now
            self._waiting.forget(request)
        self.requests = [request for request in self.requests if request not in done]
        self._encoding = [request for request in self._encoding if not request.is_done]
        self._matching = deque(scores for scores in self._matching if not scores.is_done)
        if not self.requests:
            self._bisections.clear()  # or they would hold the images of abandoned requests
        return [request for request in done if not request.future.cancelled()]

    def _start_work(self) -> None:
        """Start match requests, and generation requests whose image is encoded or cannot be."""
        waiting = list[AnyRequest]()
        for request in self._encoding:
            if request.image_error is not None:
                request.fail(request.image_error)
            elif not request.is_done:
                if not isinstance(request.inputs, GenerateInput):
                    self._matching.append(CandidateScores(request, self._cached_texts(request.inputs.texts)))
                elif request.is_encoded:
                    self._waiting.add(build_sequences(request, self._backend.num_query_tokens))
                else:
                    waiting.append(request)
        self._encoding = waiting

    def _images_to_generate(self) -> list[EncodedImage]:
        pending = (image for request in self._encoding for image in request.images if image.is_pending)
        return list(dict.fromkeys(pending))

    def _images_to_match(self) -> list[EncodedImage]:
        """Return images to encode: one of each request, then a second of each, and so on."""
        pending = [scores.next_images(self._image_limit.max_size) for scores in self._matching]
        rounds = chain.from_iterable(zip_longest(*pending))
        return list(dict.fromkeys(image for image in rounds if image is not None))

    def _schedule_encode(self, workload: Workload, pending: Collection[EncodedImage]) -> EncodeStep:
        images = self._next_quarantined(workload, pending)
        if not images:
            encoder = next(iter(pending)).encoder
            same = (image for image in pending if image.encoder is encoder)
            images = list(islice(same, self._image_limit.max_size))
        holders = [scores for scores in self._matching if not scores.images.isdisjoint(images)]
        for scores in holders:
            scores.request.start_work()
        return EncodeStep(workload, images, self._image_limit, holders)

    def _schedule_match(self, ready: Collection[CandidateScores]) -> MatchStep:
        """Schedule the next request round-robin; fill the batch with equal work of the following ones."""
        group = self._next_quarantined(Workload.MATCH, ready)
        if not group:
            group = list(ready)
            self._matching.remove(group[0])
            self._matching.append(group[0])
        group[0].request.start_work()
        if group[0].missing_texts:
            missing = dict.fromkeys(text for scores in group for text in scores.missing_texts)
            texts = list(islice(missing, self._text_limit.max_size))
            items = [scores for scores in group if not scores.missing_texts.keys().isdisjoint(texts)]
            return MatchStep(items, self._text_limit, texts=texts)
        if not group[0].has_pairs:
            return MatchStep([group[0]])
        remaining = chain.from_iterable(scores.remaining_pairs() for scores in group if scores.has_pairs)
        pairs = list(islice(remaining, self._pair_limit.max_size))
        return MatchStep(list(dict.fromkeys(pair.scores for pair in pairs)), self._pair_limit, pairs=pairs)

    def _schedule_decode(self) -> DecodeStep:
        dropped = [sequence for sequence in self._running if sequence.is_done]
        self._running = [sequence for sequence in self._running if not sequence.is_done]
        joining, is_cut = list[Sequence](), False
        if not self._running:
            joining = self._next_quarantined_decode()
            self._is_quarantined = bool(joining)
            for sequence in joining:
                self._waiting.remove(sequence)
        if not self._is_quarantined:
            joining, is_cut = self._join()
        for sequence in joining:
            sequence.request.holds_rows = True
            sequence.request.start_work()
        self._running += joining
        return DecodeStep(list(self._running), joining, dropped, self._row_limit, is_cut)

    def _next_quarantined(self, workload: Workload, pending: Collection[T]) -> list[T]:
        """Return the next group of a bisection, which runs before other work of its workload; else []."""
        bisection = self._bisections.get(workload)
        return [] if bisection is None else bisection.next_group(pending)

    def _next_quarantined_decode(self) -> list[Sequence]:
        while group := self._next_quarantined(Workload.GENERATE, self._waiting):
            if len(group) == 1 or _num_padded_tokens(group) <= MAX_PROMPT_TOKENS_PER_STEP:
                return group
            self._bisections[Workload.GENERATE].split(group)  # they may have joined one after the other
        return []

    def _join(self) -> tuple[list[Sequence], bool]:
        """Remove the waiting sequences that join now; return them, and whether rows kept others out.

        Long ones wait while they hold their share of the rows, and short ones pass them; none else is passed.
        """
        state = (self._waiting.num_changes, len(self._running), self._row_limit.max_size)
        if state == self._blocked_at:  # as it was a token ago
            return [], self._is_cut
        joining, classes, self._is_cut = list[Sequence](), set(AdmissionClass), False
        while sequence := self._waiting.next(classes):
            running = [*self._running, *joining]
            if sequence.is_long and self._exceeds_long_share(sequence, running):
                classes.remove(AdmissionClass.LONG)
                continue
            if joining and _num_padded_tokens([*joining, sequence]) > MAX_PROMPT_TOKENS_PER_STEP:
                break
            self._is_cut = bool(running) and self._exceeds_rows([*running, sequence])
            if self._is_cut or (running and self._exceeds_kv_bytes([*running, sequence])):
                break
            joining.append(sequence)
            self._waiting.join(sequence)
        self._blocked_at = () if joining else state
        return joining, self._is_cut

    def _exceeds_rows(self, sequences: Iterable[Sequence]) -> bool:
        return sum(sequence.num_rows for sequence in sequences) > self._row_limit.max_size

    def _exceeds_kv_bytes(self, sequences: Iterable[Sequence]) -> bool:
        requirements = [sequence.memory_requirement for sequence in sequences]
        return self._backend.kv_bytes(requirements) > self._max_kv_bytes

    def _exceeds_long_share(self, sequence: Sequence, running: Iterable[Sequence]) -> bool:
        num_long = sum(each.num_rows for each in running if each.is_long)
        return num_long > 0 and num_long + sequence.num_rows > LONG_SHARE * self._row_limit.max_size


def _num_padded_tokens(sequences: Collection[Sequence]) -> int:
    return len(sequences) * max(sequence.num_prefix_tokens for sequence in sequences)
