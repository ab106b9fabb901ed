"""One prompt on its way through the decoder, the group of its request, and the order in which they join."""

from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from model import Generation, GenerationParams, MemoryRequirement, memory_requirement
from service.engine.fair_queueing import FairOrder
from service.engine.request import AdmissionClass, AnyRequest, GenerateInput, Generations, Request
from service.errors import InferenceFailedError


@dataclass(frozen=True, slots=True, eq=False)
class SequenceGroup:
    """A generation request in the decoder. generations: for each prompt its texts, or none so far."""

    request: Request[Generations]
    generations: list[tuple[Generation, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """One prompt of a group, from the moment its image is encoded until its texts are generated.

    index: of the prompt in its group. encoded: the [Q, D] query_output, or the [P, V] image_features where
    the Q-Former reads the question. question: for the Q-Former, or None. num_prefix_tokens: image tokens
    and prompt tokens, which are prefilled.
    """

    group: SequenceGroup
    index: int
    encoded: Tensor
    prompt_ids: tuple[int, ...]
    question: str | None
    params: GenerationParams
    num_prefix_tokens: int

    @property
    def request(self) -> Request[Generations]:
        return self.group.request

    @property
    def num_rows(self) -> int:
        return self.params.num_rows

    @property
    def num_row_tokens(self) -> int:
        """Rows times the most tokens of each: what it may cost."""
        return self.params.num_rows * self.params.max_new_tokens

    @property
    def is_long(self) -> bool:
        return self.request.admission_class is AdmissionClass.LONG

    @property
    def is_done(self) -> bool:
        return self.request.is_done

    @property
    def is_finished(self) -> bool:
        """Whether the texts of this prompt are generated; others of its request may still run."""
        return bool(self.group.generations[self.index])

    @property
    def memory_requirement(self) -> MemoryRequirement:
        return memory_requirement(self.num_prefix_tokens, self.params)

    def fail(self, error: Exception) -> None:
        self.request.fail(error)

    def finish(self, generations: tuple[Generation, ...]) -> None:
        """Store the texts of this prompt, best first; answer the request once all its prompts have theirs."""
        self.group.generations[self.index] = generations
        if not all(self.group.generations):
            return
        all_generations = tuple(self.group.generations)
        if all(one.is_finite for texts in all_generations for one in texts):
            self.request.resolve(all_generations)
        else:
            self.fail(InferenceFailedError("the model gave a score that is not a number"))


class WaitingSequences:
    """The sequences that wait for rows. In each admission class requests take turns; see `FairOrder`.

    num_changes: increases with each change.
    """

    def __init__(self) -> None:
        self.num_changes = 0
        self._orders = {name: FairOrder() for name in AdmissionClass}
        self._waiting: dict[AdmissionClass, dict[AnyRequest, deque[Sequence]]] = {
            name: {} for name in AdmissionClass
        }

    def __len__(self) -> int:
        return sum(len(sequences) for requests in self._waiting.values() for sequences in requests.values())

    def __iter__(self) -> Iterator[Sequence]:
        for requests in self._waiting.values():
            yield from chain.from_iterable(requests.values())

    def __contains__(self, item: object) -> bool:
        return any(sequence is item for sequence in self)

    def add(self, sequences: SequenceOf[Sequence]) -> None:
        """Append the sequences of one request that came last."""
        request = sequences[0].request
        self._waiting[request.admission_class][request] = deque(sequences)
        self.num_changes += 1

    def put_back(self, sequences: SequenceOf[Sequence]) -> None:
        """Insert sequences that must begin anew where they were before: requests in order of arrival."""
        for sequence in reversed(sequences):
            requests = self._waiting[sequence.request.admission_class]
            requests.setdefault(sequence.request, deque()).appendleft(sequence)
        for name, requests in self._waiting.items():
            self._waiting[name] = dict(sorted(requests.items(), key=lambda each: each[0].submitted))
        self.num_changes += 1

    def next(self, classes: Iterable[AdmissionClass]) -> Sequence | None:
        """Return the next sequence of each class in its order; of two the one whose request is older."""
        first = [
            self._orders[name].next(self._waiting[name].keys()) for name in classes if self._waiting[name]
        ]
        if not first:
            return None
        request = min(first, key=lambda each: each.submitted)
        return self._waiting[request.admission_class][request][0]

    def join(self, sequence: Sequence) -> None:
        """Remove the next sequence, and charge its request for it."""
        request = sequence.request
        self._orders[request.admission_class].charge(request, sequence.num_row_tokens)
        self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        requests = self._waiting[sequence.request.admission_class]
        requests[sequence.request].remove(sequence)
        if not requests[sequence.request]:
            del requests[sequence.request]
        self.num_changes += 1

    def forget(self, request: AnyRequest) -> None:
        """Remove all sequences of a request that is done."""
        self._orders[request.admission_class].forget(request)
        if self._waiting[request.admission_class].pop(request, None):
            self.num_changes += 1


def build_sequences(request: Request[Generations], num_query_tokens: int) -> list[Sequence]:
    """Return one sequence for each prompt of a request whose image is encoded."""
    inputs = request.inputs
    assert isinstance(inputs, GenerateInput)
    (kind,) = inputs.required
    group = SequenceGroup(request, [()] * len(inputs.prompts))
    return [
        Sequence(
            group=group,
            index=index,
            encoded=request.images[0].available[kind],
            prompt_ids=prompt_ids,
            question=inputs.questions[index] if inputs.questions else None,
            params=inputs.params,
            num_prefix_tokens=num_query_tokens + len(prompt_ids),
        )
        for index, prompt_ids in enumerate(inputs.prompts)
    ]
