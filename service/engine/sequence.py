"""One prompt on its way through the decoder, and the group of those that belong to one request."""

import math
from dataclasses import dataclass

from torch import Tensor

from model import Generation, GenerationParams, MemoryRequirement, memory_requirement
from service.engine.request import AdmissionClass, GenerateInput, Generations, Request
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
        if all(math.isfinite(one.score) for texts in all_generations for one in texts):
            self.request.resolve(all_generations)
        else:
            self.fail(InferenceFailedError("the model gave a score that is not a number"))


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
