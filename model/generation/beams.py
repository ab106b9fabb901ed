"""Texts of many jobs side by side, as arrays: whatever is done to one of them is done to all at once."""

from dataclasses import dataclass, fields

import numpy as np

from model.generation.batched_params import Flags, Ids, Scores


@dataclass(slots=True)
class Texts:
    """W texts of up to T tokens for each of J jobs.

    token_ids, log_probs: [J, W, T]. lengths: [J, W]. scores: [J, W], -inf where there is no text.
    """

    token_ids: Ids
    log_probs: Scores
    lengths: Ids
    scores: Scores

    @classmethod
    def none(cls, num_jobs: int, num_texts: int, num_tokens: int) -> "Texts":
        shape = (num_jobs, num_texts)
        return cls(
            np.zeros((*shape, num_tokens), np.int64),
            np.zeros((*shape, num_tokens), np.float32),
            np.zeros(shape, np.int64),
            np.full(shape, -np.inf, np.float32),
        )

    @property
    def present(self) -> Flags:
        """[J, W], where there is a text. One whose score is not a number is there, for its user to see."""
        return ~np.isneginf(self.scores)

    def of_jobs(self, jobs: Ids) -> "Texts":
        return Texts(*(getattr(self, field.name)[jobs] for field in fields(self)))

    def put(self, jobs: Ids, texts: "Texts") -> None:
        for field in fields(self):
            getattr(self, field.name)[jobs] = getattr(texts, field.name)

    def take(self, chosen: Ids) -> "Texts":
        """Gives, for each job, the texts that [J, k] numbers name."""
        jobs = np.arange(len(chosen))[:, None]
        return Texts(*(getattr(self, field.name)[jobs, chosen] for field in fields(self)))

    def best(self, count: int) -> "Texts":
        """Gives each job's texts of the highest scores, best first; of equal ones the earlier first."""
        return self.take(ranking(self.scores)[:, :count])

    def beside(self, others: "Texts") -> "Texts":
        """Gives the texts of both, those of `others` last."""
        return Texts(
            *(
                np.concatenate([getattr(self, field.name), getattr(others, field.name)], axis=1)
                for field in fields(self)
            )
        )

    def where(self, kept: Flags, scores: Scores) -> "Texts":
        """Gives the texts with other scores, and without those not kept."""
        return Texts(
            self.token_ids, self.log_probs, self.lengths, np.where(kept, scores, np.float32(-np.inf))
        )

    def extended(self, parents: Ids, token_ids: Ids, log_probs: Scores, scores: Scores) -> "Texts":
        """Gives texts of one token more; each argument: [J, k]."""
        grown = self.take(parents)
        jobs, texts = np.indices(parents.shape)
        grown.token_ids[jobs, texts, grown.lengths] = token_ids
        grown.log_probs[jobs, texts, grown.lengths] = log_probs
        grown.lengths += 1
        grown.scores = scores
        return grown

    def resized(self, num_jobs: int, num_texts: int, num_tokens: int) -> "Texts":
        """Gives the texts in arrays of this shape; what is beyond it must not be needed any more."""
        resized = Texts.none(num_jobs, num_texts, num_tokens)
        for field in fields(self):
            old, new = getattr(self, field.name), getattr(resized, field.name)
            common = tuple(slice(min(sizes)) for sizes in zip(old.shape, new.shape, strict=True))
            new[common] = old[common]
        return resized


def ranking(scores: Scores) -> Ids:
    """Gives the numbers of each row's scores, [J, k], the best first; of equal ones the earlier.

    Last stands -inf, and before it what is not a number, which a broken model gives.
    """
    keys = np.where(np.isnan(scores), np.finfo(np.float32).max, -scores)
    return np.argsort(keys, axis=1, kind="stable")
