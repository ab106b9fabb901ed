"""Jobs that were read together and advance together, one token a step, until each is done."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from model.decoding.beam import BeamSearch
from model.decoding.job import DecodeJob
from model.decoding.processors import ScoreProcessor
from model.decoding.sampling import Sampling
from model.decoding.search import Continuation, Scores, Search, TokenIds
from model.language import DecodingState, LanguageModel


class Task:
    """A job at work. rows: the sequences of its next step; `parent` is a row of the cohort's last step."""

    def __init__(self, job: DecodeJob, search: Search) -> None:
        self.job = job
        self.search = search
        self.rows: Sequence[Continuation] = ()


class Cohort:
    """A batch whose rows share one cache.

    A job is read in one row, whatever the number of its beams. In later steps one selection of cache rows
    follows the beams, copies the row of a job that was just read to all of them, and forgets the rows of
    jobs that are done or were cancelled.
    """

    def __init__(self, language_model: LanguageModel, jobs: Sequence[DecodeJob]) -> None:
        self._language_model = language_model
        self._state: DecodingState | None = None
        self.tasks = [Task(job, build_search(job, language_model)) for job in jobs]

    @property
    def num_rows(self) -> int:
        """The rows the next step computes."""
        return sum(len(task.rows) for task in self.tasks)

    def step(self) -> list[Task]:
        """Advances every row by a token; gives the jobs that are done with it, which leave the cohort."""
        num_rows = [len(task.rows) or 1 for task in self.tasks]  # one before the first step
        logits = self._next_token_logits()  # [R, N]
        proposals = [
            task.search.propose(rows)
            for task, rows in zip(self.tasks, torch.split(logits, num_rows), strict=True)
        ]
        first_row = 0
        for task, rows, (scores, token_ids) in zip(self.tasks, num_rows, _to_host(proposals), strict=True):
            accepted = task.search.accept(scores, token_ids)
            task.rows = [Continuation(first_row + parent, token_id) for parent, token_id in accepted]
            first_row += rows
        done = [task for task in self.tasks if not task.rows]
        self.tasks = [task for task in self.tasks if task.rows]
        return done

    def _next_token_logits(self) -> Tensor:
        if self._state is None:
            jobs = [task.job for task in self.tasks]
            logits, self._state = self._language_model.prefill(
                [job.language_model_inputs for job in jobs], [job.prompt_ids for job in jobs]
            )
            return logits
        rows = [row for task in self.tasks for row in task.rows]
        self._state.select([row.parent for row in rows])
        return self._language_model.advance(self._state, [row.token_id for row in rows])


def build_search(job: DecodeJob, language_model: LanguageModel) -> Search:
    """Gives the search that a job's parameters ask for, at its beginning."""
    eos_token_ids = language_model.eos_token_ids
    context = language_model.answer_context(len(job.language_model_inputs), job.prompt_ids)
    processor = ScoreProcessor(job.params, context, eos_token_ids, language_model.device)
    search = BeamSearch if job.params.num_beams > 1 else Sampling
    return search(job.params, processor, eos_token_ids)


def _to_host(proposals: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Scores, TokenIds]]:
    """Brings the proposals of all jobs over at once; gives each job's scores and ids, [R, k] each."""
    flat = [torch.cat([proposal[side].flatten().float() for proposal in proposals]) for side in (0, 1)]
    # The one device-to-host sync of a step. Ids travel as float32, which is exact below 2 ** 24.
    scores, token_ids = torch.stack(flat).cpu().numpy()
    first = 0
    for proposed, _ in proposals:
        part = slice(first, first + proposed.numel())
        yield scores[part].reshape(proposed.shape), token_ids[part].reshape(proposed.shape).astype(np.int64)
        first += proposed.numel()
