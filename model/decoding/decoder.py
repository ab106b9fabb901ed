"""Continuous batching: jobs join and leave between steps, and none can tell who shares the batch."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from model.decoding.beam import BeamSearch
from model.decoding.job import DecodeJob, Generation
from model.decoding.processors import ScoreProcessor
from model.decoding.sampling import Sampling
from model.decoding.search import Continuation, Hypothesis, Scores, Search, TokenIds
from model.language import Growth, LanguageModel


class Task:
    """A job at work. rows: the sequences of its next step; `parent` counts those of its last step."""

    def __init__(self, job: DecodeJob, search: Search) -> None:
        self.job = job
        self.search = search
        self.rows: Sequence[Continuation] = ()

    def growth(self) -> Growth:
        return Growth(self.job, [row.parent for row in self.rows], [row.token_id for row in self.rows])


class Decoder:
    """Runs any number of jobs on one language model, each with its own parameters.

    Every step is one pass of the language model over all running jobs, after one over those that were added
    since the last. Not for several threads. `step` is to be called under `torch.inference_mode()`; after an
    exception from it the decoder must be replaced.
    """

    def __init__(self, language_model: LanguageModel) -> None:
        self._language_model = language_model
        self._state = language_model.build_state()
        self._waiting: list[DecodeJob] = []
        self._running: list[Task] = []

    @property
    def num_jobs(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def num_rows(self) -> int:
        """The sequences at work, and those that waiting jobs will come to."""
        waiting = sum(job.params.num_rows for job in self._waiting)
        return waiting + sum(len(task.rows) for task in self._running)

    def add(self, job: DecodeJob) -> None:
        """Takes a job in; its work begins with the next step.

        Raises InvalidParamsError where a parameter is out of its bounds, InvalidPromptError where image
        tokens, prompt and answer exceed the positions of the language model.
        """
        job.params.validate()
        self._language_model.check_length(
            num_prompt_tokens=len(job.prompt_ids),
            num_soft_tokens=len(job.language_model_inputs),
            max_new_tokens=job.params.max_new_tokens,
        )
        self._waiting.append(job)

    def cancel(self, job: DecodeJob) -> None:
        """Forgets a job, whose rows leave with the next step; nothing happens where it is done already."""
        self._waiting = [waiting for waiting in self._waiting if waiting is not job]
        self._running = [task for task in self._running if task.job is not job]

    def step(self) -> list[tuple[DecodeJob, tuple[Generation, ...]]]:
        """Advances every running sequence by one token; gives the jobs that are done, answers best first."""
        logits = self._advance() + self._admit()
        proposals = [task.search.propose(rows) for task, rows in zip(self._running, logits, strict=True)]
        for task, (scores, token_ids) in zip(self._running, _to_host(proposals), strict=True):
            task.rows = task.search.accept(scores, token_ids)
        done = [task for task in self._running if not task.rows]
        self._running = [task for task in self._running if task.rows]
        return [(task.job, self._generations(task)) for task in done]

    def _advance(self) -> list[Tensor]:
        return self._state.advance([task.growth() for task in self._running]) if self._running else []

    def _admit(self) -> list[Tensor]:
        jobs, self._waiting = self._waiting, []
        if not jobs:
            return []
        self._running += [Task(job, build_search(job, self._language_model)) for job in jobs]
        prefixes = [
            self._language_model.embed_prefix(job.language_model_inputs, job.prompt_ids) for job in jobs
        ]
        logits = self._state.admit(jobs, prefixes, [job.params.num_rows for job in jobs])
        return list(logits[:, None])  # [1, N] each

    def _generations(self, task: Task) -> tuple[Generation, ...]:
        return tuple(self._generation(answer) for answer in task.search.answers())

    def _generation(self, answer: Hypothesis) -> Generation:
        is_ended = answer.token_ids[-1] in self._language_model.eos_token_ids
        return Generation(
            text=self._language_model.decode_tokens(answer.token_ids),
            token_ids=answer.token_ids,
            score=answer.score,
            num_tokens=len(answer.token_ids),
            finish_reason="stop" if is_ended else "length",
        )


def run_jobs(language_model: LanguageModel, jobs: Sequence[DecodeJob]) -> list[tuple[Generation, ...]]:
    """Runs jobs side by side to their ends; gives the answers to each, best first.

    To be called under `torch.inference_mode()`. Raises what `Decoder.add` raises.
    """
    decoder = Decoder(language_model)
    for job in jobs:
        decoder.add(job)
    answers: dict[DecodeJob, tuple[Generation, ...]] = {}
    while decoder.num_jobs:
        answers.update(decoder.step())
    return [answers[job] for job in jobs]


def build_search(job: DecodeJob, language_model: LanguageModel) -> Search:
    """Gives the search that a job's parameters ask for, at its beginning."""
    eos_token_ids = language_model.eos_token_ids
    context = language_model.answer_context(len(job.language_model_inputs), job.prompt_ids)
    processor = ScoreProcessor(job.params, context, eos_token_ids, language_model.device)
    search = BeamSearch if job.params.num_beams > 1 else Sampling
    return search(job.params, processor, eos_token_ids)


def _to_host(proposals: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Scores, TokenIds]]:
    """Brings the proposals of all jobs over at once; gives each job's scores and ids, [R, k] each."""
    if not proposals:
        return
    flat = [torch.cat([proposal[side].flatten().float() for proposal in proposals]) for side in (0, 1)]
    # The one device-to-host sync of a step. Ids travel as float32, which is exact below 2 ** 24.
    scores, token_ids = torch.stack(flat).cpu().numpy()
    first = 0
    for proposed, _ in proposals:
        part = slice(first, first + proposed.numel())
        yield scores[part].reshape(proposed.shape), token_ids[part].reshape(proposed.shape).astype(np.int64)
        first += proposed.numel()
