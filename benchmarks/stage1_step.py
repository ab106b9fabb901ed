"""Time a step of stage 1, forward and backward, beside steps that share less between its passes.

    python -m benchmarks.stage1_step [--repeats 7] [--out benchmarks/stage1_step.md]

All compute the same losses from the same batch of cached features. Memory is what autograd holds for the
backward pass: the bytes of all tensors that it saves, each storage once.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.reporting import describe_machine, spread_of
from model.config import QFormerConfig
from model.matching import Matcher
from model.qformer import QueryStates
from training.data.batches import PairBatch
from training.losses import itc_loss, itg_labels, itg_loss, itm_loss, sample_hard_negatives
from training.stages.stage1 import stage1_losses
from training.world.vocabulary import build_text_tokenizer

Step = Callable[[Matcher, PairBatch, int], Tensor]


@dataclass(frozen=True, slots=True)
class Size:
    """One model and batch: B pairs, of which `num_pairs` in ITM and ITG, with P image tokens."""

    name: str
    config: QFormerConfig
    batch_size: int
    num_pairs: int
    num_image_tokens: int

    def __str__(self) -> str:
        c = self.config
        return (
            f"{self.name}: Q-Former {c.num_hidden_layers} x {c.hidden_size}, {c.num_query_tokens} queries, "
            f"vocabulary {c.vocab_size}; image {self.num_image_tokens} x {c.encoder_hidden_size}; "
            f"batch {self.batch_size}, {self.num_pairs} pairs"
        )


def _config(
    width: int, layers: int, queries: int, vision: int, vocabulary: int, frequency: int
) -> QFormerConfig:
    return QFormerConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        encoder_hidden_size=vision,
        num_query_tokens=queries,
        vocab_size=vocabulary,
        max_position_embeddings=64,
        joint_size=256,
        cross_attention_frequency=frequency,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


SIZES = (
    Size("embedded tiny", _config(192, 4, 28, 192, 128, 1), 64, 32, 65),
    Size("MiniLM's BERT on a CNN", _config(384, 6, 16, 1280, 30522, 2), 64, 24, 81),
    Size("BLIP-2", _config(768, 12, 32, 1408, 30523, 2), 8, 8, 257),
)


def separate_step(matcher: Matcher, batch: PairBatch, num_pairs: int) -> Tensor:
    """Compute the loss with nothing shared: ITG has a query pass of its own."""
    states = matcher.encode_image_queries(batch.image_features)
    own_states = matcher.encode_image_queries(batch.image_features[:num_pairs])
    return _sum_losses(matcher, batch, num_pairs, states, own_states)


def shared_queries_step(matcher: Matcher, batch: PairBatch, num_pairs: int) -> Tensor:
    """Compute the loss with the query pass shared between ITC and ITG, as LAVIS does."""
    states = matcher.encode_image_queries(batch.image_features)
    cached = tuple((keys[:num_pairs], values[:num_pairs]) for keys, values in states.keys_values)
    return _sum_losses(matcher, batch, num_pairs, states, QueryStates(states.query_output, cached))


def _sum_losses(
    matcher: Matcher, batch: PairBatch, num_pairs: int, states: QueryStates, itg_states: QueryStates
) -> Tensor:
    images, ids, mask = batch.image_features, batch.input_ids, batch.attention_mask
    text_embeds = matcher.text_embeds(ids, mask)
    scores = matcher.itc_scores(matcher.image_embeds(states.query_output), text_embeds) / matcher.temperature
    texts, wrong = (each[:num_pairs] for each in sample_hard_negatives(scores, batch.matches))
    own = torch.arange(num_pairs)
    image_index, text_index = torch.cat([own, wrong, own]), torch.cat([own, own, texts])
    logits = matcher.match_logits(images[image_index], ids[text_index], mask[text_index])
    decoder_ids, decoder_mask = ids[:num_pairs].clone(), mask[:num_pairs]
    decoder_ids[:, 0] = matcher.tokenizer.bos_token_id
    generated = matcher.generation_logits(decoder_ids, decoder_mask, itg_states.keys_values)
    generation = itg_loss(generated, itg_labels(decoder_ids, decoder_mask))
    return itc_loss(scores, batch.matches) + itm_loss(logits, num_pairs) + generation


def shared_step(matcher: Matcher, batch: PairBatch, num_pairs: int) -> Tensor:
    """Compute the loss as training does."""
    return stage1_losses(matcher, batch, num_pairs)["loss"]


STEPS: dict[str, Step] = {
    "four separate passes": separate_step,
    "query pass shared by ITC and ITG (LAVIS)": shared_queries_step,
    "keys and values of images shared too, text head on targets alone (this project)": shared_step,
}


def build_batch(size: Size) -> PairBatch:
    """Build random features, and captions of 10 to 20 tokens padded to the longest."""
    generator = torch.Generator().manual_seed(0)
    shape = (size.batch_size, size.num_image_tokens, size.config.encoder_hidden_size)
    lengths = torch.randint(10, 21, (size.batch_size, 1), generator=generator)
    mask = (torch.arange(int(lengths.max())) < lengths).long()
    ids = torch.randint(5, size.config.vocab_size, mask.shape, generator=generator) * mask
    features = torch.randn(shape, generator=generator)
    return PairBatch(features, ids, mask, torch.eye(size.batch_size, dtype=torch.bool))


def saved_bytes(work: Callable[[], object]) -> int:
    """Return the bytes that autograd saves during `work`, but for those of parameters."""
    storages: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        result = work()  # alive until all is counted, so that no storage is reused
    del result
    return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="A step of stage 1 beside steps that share less.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of autocast")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = []
    for line in _report(arguments):
        print(line, flush=True)
        lines.append(line)
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _report(arguments: argparse.Namespace) -> Iterator[str]:
    yield "# A step of stage 1 on cached features"
    yield ""
    yield (
        f"`python -m benchmarks.stage1_step --repeats {arguments.repeats} --dtype {arguments.dtype}`, torch "
        f"{torch.__version__}, {arguments.threads} threads, {describe_machine()}. Forward and backward, "
        "without the optimizer. Seconds are medians; ratios are medians of rounds in which each step ran "
        "once (least, most). Memory is what autograd holds for the backward pass."
    )
    for size in SIZES:
        yield ""
        yield f"## {size}"
        yield ""
        yield "| step | s | faster than separate passes | memory, MiB |"
        yield "|---|---|---|---|"
        yield from _rows(size, arguments)


def _rows(size: Size, arguments: argparse.Namespace) -> Iterator[str]:
    torch.manual_seed(0)
    matcher, batch = Matcher(size.config, build_text_tokenizer(), max_text_tokens=32), build_batch(size)
    is_reduced = arguments.dtype == "bfloat16"

    def forward(step: Step) -> Tensor:
        torch.manual_seed(1)  # the same negatives for all
        precision: AbstractContextManager[object] = (
            torch.autocast("cpu", torch.bfloat16) if is_reduced else nullcontext()
        )
        with precision:
            return step(matcher, batch, size.num_pairs)

    def seconds(step: Step) -> float:
        matcher.zero_grad(set_to_none=True)
        started = time.perf_counter()
        torch.autograd.backward(forward(step))
        return time.perf_counter() - started

    rounds = [[seconds(step) for step in STEPS.values()] for _ in range(arguments.repeats + 1)][1:]
    for index, (name, step) in enumerate(STEPS.items()):
        median_s = statistics.median(each[index] for each in rounds)
        ratio = spread_of(each[0] / each[index] for each in rounds)
        mebibytes = saved_bytes(lambda step=step: forward(step)) / 2**20  # type: ignore[misc]
        yield f"| {name} | {median_s:.3f} | {ratio} | {mebibytes:.0f} |"


if __name__ == "__main__":
    main()
