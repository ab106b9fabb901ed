"""Continuous batching: jobs join and leave between steps, and none can tell who shares the batch."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.devices import upload
from model.generation.batched_params import Ids
from model.generation.beam_search import Board, Proposals
from model.generation.params import GenerationParams
from model.generation.request import DecodeJob, DecoderLimits, Generation, Task, build_task, extent_of
from model.generation.sampler import Choice, Chooser, Draw, Request
from model.language import LanguageModel, Rows

Answers = tuple[Generation, ...]  # best first


class Decoder:
    """Runs any number of jobs on one language model, each with its own parameters.

    Every step is one pass of the language model over all running jobs, after one over those let in since the
    last. Jobs beyond `limits` wait, in the order they came. Not for several threads. `step` is to be called
    under `torch.inference_mode()`; after an exception from it the decoder must be replaced.
    """

    def __init__(self, language_model: LanguageModel, limits: DecoderLimits | None = None) -> None:
        self._language_model = language_model
        self._limits = limits or DecoderLimits()
        self._state = language_model.build_state()
        self._board = Board(language_model.eos_token_ids)
        self._chooser = Chooser(language_model.eos_token_ids, language_model.device)
        self._waiting: list[Task] = []
        self._running: list[Task] = []  # as state and board count them

    @property
    def num_jobs(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def num_rows(self) -> int:
        """The rows of jobs at work, and those that waiting jobs will come to."""
        waiting = sum(task.extent.num_rows for task in self._waiting)
        return waiting + int(self._board.running.present.sum())

    def add(self, job: DecodeJob) -> None:
        """Takes a job in; its work begins with the next step that has room for it.

        Raises InvalidParamsError where a parameter is out of its bounds or the job alone exceeds the limits,
        InvalidPromptError where image tokens, prompt and answer exceed the positions of the language model.
        """
        job.params.validate()
        self.check(len(job.prompt_ids), len(job.language_model_inputs), job.params)
        self._waiting.append(build_task(job, self._language_model))

    def check(self, num_prompt_tokens: int, num_soft_tokens: int, params: GenerationParams) -> None:
        """Raises what `add` raises for a job that would never have room. May be called from any thread."""
        self._language_model.check_length(
            num_prompt_tokens=num_prompt_tokens,
            num_soft_tokens=num_soft_tokens,
            max_new_tokens=params.max_new_tokens,
        )
        self._limits.check(extent_of(num_prompt_tokens + num_soft_tokens, params), self._state)

    def has_room(self, num_prefix_tokens: int, params: GenerationParams) -> bool:
        """Whether a job of so many prompt and soft tokens, if added now, would begin with the next step."""
        extents = [task.extent for task in (*self._running, *self._waiting)]
        return not self._limits.are_exceeded([*extents, extent_of(num_prefix_tokens, params)], self._state)

    def cancel(self, job: DecodeJob) -> None:
        """Forgets a job, whose rows are gone at once; nothing happens where it is done already."""
        self._waiting = [task for task in self._waiting if task.job is not job]
        self._retain([task.job is not job for task in self._running])

    def token_ids(self, job: DecodeJob) -> tuple[int, ...]:
        """Gives the answer so far of a job of one row that is not done, end token excluded."""
        assert job.params.num_rows == 1, "beams change their minds, and samples are several"
        number = next((number for number, task in enumerate(self._running) if task.job is job), None)
        if number is None:
            return ()
        said = self._board.running.token_ids[number, 0, : self._board.num_tokens[number]]
        return tuple(said.tolist())

    def step(self) -> list[tuple[DecodeJob, Answers]]:
        """Advances every running row by one token; gives the jobs that are done."""
        chosen = [*self._advance(), *self._admit()]
        if not chosen:
            return []
        self._board.accept(_to_host(chosen, self._board))
        is_done = self._board.is_done.tolist()
        done = [
            (self._running[number].job, self._answers(number))
            for number, ended in enumerate(is_done)
            if ended
        ]
        self._retain([not ended for ended in is_done])
        return done

    def _advance(self) -> Iterator["Chosen"]:
        if self._running:
            jobs, texts = self._board.rows()
            token_ids = self._board.running.token_ids[jobs, texts, self._board.num_tokens[jobs] - 1]
            logits = self._state.advance(Rows(jobs, self._board.parents[jobs, texts], token_ids))
            yield self._choose(logits, jobs, texts)

    def _admit(self) -> Iterator["Chosen"]:
        entering = self._let_in()
        if not entering:
            return
        prefixes = [
            self._language_model.embed_prefix(task.job.language_model_inputs, task.job.prompt_ids)
            for task in entering
        ]
        first = len(self._board)
        self._running += entering
        self._board.append([task.job.params for task in entering], [task.context for task in entering])
        logits = self._state.admit(prefixes, [task.extent for task in entering])
        jobs, texts = self._board.rows()
        jobs, texts = jobs[jobs >= first], texts[jobs >= first]
        if len(jobs) > len(logits):  # samples begin with a row each, all with the scores of one
            logits = logits[upload(jobs - first, logits.device)]
        yield self._choose(logits, jobs, texts)

    def _let_in(self) -> list[Task]:
        """Gives the waiting jobs that there is room for, oldest first; nobody is overtaken."""
        running = [task.extent for task in self._running]
        waiting = [task.extent for task in self._waiting]
        count = len(waiting)
        if self._limits.are_exceeded(running + waiting, self._state):
            count = next(
                number
                for number in range(len(waiting))
                if self._limits.are_exceeded(running + waiting[: number + 1], self._state)
            )
        entering, self._waiting = self._waiting[:count], self._waiting[count:]
        return entering

    def _choose(self, logits: Tensor, jobs: Ids, texts: Ids) -> "Chosen":
        board = self._board
        request = Request(
            board.params.of_jobs(jobs),
            board.num_tokens[jobs] < board.params.min_new_tokens[jobs],
            board.histories(jobs, texts),
            self._draws(jobs),
        )
        count = int(board.num_candidates.max())
        return Chosen(jobs, texts, self._chooser(logits, request, count))

    def _draws(self, jobs: Ids) -> list[Draw]:
        return [
            Draw(slice(*np.searchsorted(jobs, [number, number + 1])), generator)
            for number, task in enumerate(self._running)
            if (generator := task.generator) is not None and number in jobs
        ]

    def _retain(self, kept: Sequence[bool]) -> None:
        """Forgets some jobs; the last ones take their places."""
        order = packed(kept)
        if len(order) < len(kept):
            self._state.retain(order)
            self._board.retain(order)
            self._running = [self._running[number] for number in order]

    def _answers(self, number: int) -> Answers:
        texts, job = self._board.finished, self._running[number].job
        if not texts.present[number, 0]:  # the model gave no token a chance, not even an end
            return (Generation("", (), math.nan, 0, "stop"),)
        return tuple(
            self._generation(
                tuple(texts.token_ids[number, rank, : texts.lengths[number, rank]].tolist()),
                tuple(texts.log_probs[number, rank, : texts.lengths[number, rank]].tolist()),
                float(texts.scores[number, rank]),
            )
            for rank in range(job.params.num_return_sequences)
            if texts.present[number, rank]
        )

    def _generation(
        self, token_ids: tuple[int, ...], log_probs: tuple[float, ...], score: float
    ) -> Generation:
        is_ended = token_ids[-1] in self._language_model.eos_token_ids
        return Generation(
            text=self._language_model.decode_tokens(token_ids),
            token_ids=token_ids,
            score=score,
            num_tokens=len(token_ids),
            finish_reason="stop" if is_ended else "length",
            log_probs=log_probs,
        )


class Chosen(NamedTuple):
    """What may continue R rows; jobs, texts: [R], whose they are."""

    jobs: Ids
    texts: Ids
    choice: Choice


def run_jobs(language_model: LanguageModel, jobs: Sequence[DecodeJob]) -> list[Answers]:
    """Runs jobs side by side to their ends; gives the answers to each, best first.

    To be called under `torch.inference_mode()`. Raises what `Decoder.add` raises.
    """
    decoder = Decoder(language_model)
    for job in jobs:
        decoder.add(job)
    answers: dict[DecodeJob, Answers] = {}
    while decoder.num_jobs:
        answers.update(decoder.step())
    return [answers[job] for job in jobs]


def packed(kept: Sequence[bool]) -> list[int]:
    """Gives an order of those kept that moves as few as can be: [yes, no, yes, yes] gives [0, 3, 2]."""
    order = [number for number, is_kept in enumerate(kept) if is_kept]
    count = len(order)
    from_behind = [number for number in order if number >= count]
    return [number if kept[number] else from_behind.pop() for number in range(count)]


def _to_host(chosen: Sequence[Chosen], board: Board) -> Proposals:
    """Brings all that was chosen over at once, and puts it where its jobs have their texts."""
    size = max(each.choice.log_probs.shape[1] for each in chosen)
    shape = (*board.running.scores.shape, size)
    proposals = Proposals(np.zeros(shape, np.int64), np.full(shape, -np.inf, np.float32))
    flat = [torch.stack([each.choice.log_probs, each.choice.token_ids.float()]).flatten() for each in chosen]
    # The one device-to-host sync of a step. Ids travel as float32, which is exact below 2 ** 24.
    arrays = np.split(torch.cat(flat).cpu().numpy(), np.cumsum([len(part) for part in flat])[:-1])
    for (jobs, texts, choice), array in zip(chosen, arrays, strict=True):
        log_probs, token_ids = array.reshape(2, *choice.log_probs.shape)
        proposals.log_probs[jobs, texts, : log_probs.shape[1]] = log_probs
        proposals.token_ids[jobs, texts, : token_ids.shape[1]] = token_ids
    return proposals
