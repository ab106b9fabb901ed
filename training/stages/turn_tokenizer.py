"""QA turns as token ids: as the service tokenises a prompt, and the language model writes an answer."""

from model.errors import InvalidPromptError
from model.language import LanguageModel
from model.text_encoder import TextEncoder
from training.data.batches import QaTurn
from training.data.packing import WeightedText


class TurnTokenizer:
    """Tokenises prompts and answers of one language model.

    The ids of a prompt are those it has alone, as when the model is asked. An answer ends with the token
    that ends an answer of the service: the first of `LanguageModel.eos_token_ids`. A text that is too long is
    cut in front of that token, never behind it: a model that sees no end learns not to stop.
    """

    def __init__(self, language_model: LanguageModel) -> None:
        self._language_model = language_model
        self._encoder = TextEncoder(language_model.tokenizer)
        self._begin_ids = language_model.model_family.special_tokens.prefix_ids
        self.end_token_id = language_model.eos_token_ids[0]

    def prompt_ids(self, prompt: str) -> tuple[int, ...]:
        """Return the ids of a prompt with its special tokens, as the service does."""
        return self._language_model.tokenize(prompt)

    def continue_prompt(self, turn: QaTurn, *, max_tokens: int, prompt_weight: float = 0.0) -> WeightedText:
        """Tokenise a turn of a decoder-only model as one text of at most `max_tokens`, end token included.

        Answer and end token have the turn's loss weight, the prompt but for its first word has
        `prompt_weight`. Without a prompt the begin token, where there is one, is a target too (BLIP-2's OPT).
        Raises InvalidPromptError where the prompt leaves no space for an answer.
        """
        prompt = self.prompt_ids(turn.prompt)
        space = max_tokens - len(prompt) - 1
        if space < 1:
            raise InvalidPromptError(
                f"the prompt {turn.prompt[:60]!r} has {len(prompt)} tokens, and a text at most {max_tokens} "
                "with its answer and its end; shorten the prompt or raise max_text_tokens"
            )
        answer = [*self._continuation_ids(turn.prompt, turn.answer)[:space], self.end_token_id]
        if turn.prompt:
            num_unweighted = len(self._begin_ids) + 1
            prompt_weights = [0.0] * num_unweighted + [prompt_weight] * len(prompt)
        else:
            prompt_weights = [turn.weight] * len(prompt)
        weights = (*prompt_weights[: len(prompt)], *[turn.weight] * len(answer))
        return WeightedText((*prompt, *answer), weights)

    def answer_ids(self, answer: str, *, max_tokens: int) -> tuple[int, ...]:
        """Tokenise an answer of an encoder-decoder model: at most `max_tokens`, end token included."""
        return (*(*self._begin_ids, *self._encoder.encode(answer))[: max_tokens - 1], self.end_token_id)

    def _continuation_ids(self, prompt: str, answer: str) -> list[int]:
        """Return the ids of an answer behind a prompt and a space.

        " red" and "red" are different tokens of a byte-pair encoding, and an answer is generated with the
        former. Where prompt and answer share a token, the answer is tokenised behind a colon instead.
        """
        has_no_gap = not prompt or not answer or prompt[-1].isspace()
        text = answer if has_no_gap else f" {answer}"
        for context in (prompt, ":"):
            ids, whole = self._encoder.encode(context), self._encoder.encode(context + text)
            if whole[: len(ids)] == ids:
                return whole[len(ids) :]
        return self._encoder.encode(text)
