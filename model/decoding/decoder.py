"""Continuous batching: jobs join and leave between steps, and none can tell who shares the batch."""

from collections.abc import Sequence

from model.decoding.cohort import Cohort, Task
from model.decoding.job import DecodeJob, Generation
from model.decoding.search import Hypothesis
from model.language import LanguageModel


class Decoder:
    """Runs any number of jobs on one language model, each with its own parameters.

    Jobs added between two steps are read together and then advance together as a cohort; every step is one
    pass of the language model per cohort. Not for several threads. `step` is to be called under
    `torch.inference_mode()`; after an exception from it the decoder must be replaced.
    """

    def __init__(self, language_model: LanguageModel) -> None:
        self._language_model = language_model
        self._waiting: list[DecodeJob] = []
        self._cohorts: list[Cohort] = []

    @property
    def num_jobs(self) -> int:
        return len(self._waiting) + sum(len(cohort.tasks) for cohort in self._cohorts)

    @property
    def num_rows(self) -> int:
        """The sequences at work, and those that waiting jobs will come to."""
        waiting = sum(job.params.num_rows for job in self._waiting)
        return waiting + sum(cohort.num_rows for cohort in self._cohorts)

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
        for cohort in self._cohorts:
            cohort.tasks = [task for task in cohort.tasks if task.job is not job]
        self._drop_empty_cohorts()

    def step(self) -> list[tuple[DecodeJob, tuple[Generation, ...]]]:
        """Advances every running sequence by one token; gives the jobs that are done, answers best first."""
        if self._waiting:
            self._cohorts.append(Cohort(self._language_model, self._waiting))
            self._waiting = []
        done = [task for cohort in self._cohorts for task in cohort.step()]
        self._drop_empty_cohorts()
        return [(task.job, self._generations(task)) for task in done]

    def _drop_empty_cohorts(self) -> None:
        self._cohorts = [cohort for cohort in self._cohorts if cohort.tasks]

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
