"""Keys and values of growing texts, where all rows of one sequence share those of its prefix.

The seams are `transformers`' own: a `Cache` that takes each layer's keys and values in, and an attention
function, registered by name, that reads them here. Any decoder-only model that uses both runs on it as it is.

Sequences of one width w lie in one lane, w rows each: their prefixes once per sequence, what follows once per
row. Rows that take a token together write it into the same column, whenever they began; a row does not see
the columns before its first.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, Cache, PreTrainedModel

from model.language.family import Growth

NAME = "shared_prefix"
_COLUMNS = 16  # that a lane grows by


def fits(llm: PreTrainedModel) -> bool:
    """Whether a model attends by `transformers`' attention interface alone, in all layers to all tokens."""
    kinds = set(getattr(llm.config, "layer_types", None) or ["full_attention"])
    return bool(llm._supports_attention_backend) and kinds == {"full_attention"}


class Store:
    """Keys and values of one layer, [entries, H, tokens, K] each, with room to grow."""

    def __init__(self) -> None:
        self.keys = torch.empty(0, 0, 0, 0)
        self.values = torch.empty(0, 0, 0, 0)

    def reserve(self, like: Tensor, entries: int, tokens: int) -> None:
        """Makes room, keeping what there is; like: [.., H, .., K] of the type and on the device wanted."""
        held_entries, _, held_tokens, _ = self.keys.shape
        if held_entries >= entries and held_tokens >= tokens:
            return
        shape = (max(entries, held_entries), like.shape[1], max(tokens, held_tokens), like.shape[3])
        for name in ("keys", "values"):
            grown = like.new_zeros(shape)
            if held_entries:
                grown[:held_entries, :, :held_tokens] = getattr(self, name)
            setattr(self, name, grown)

    def move(self, source: slice, target: slice) -> None:
        self.keys[target] = self.keys[source].clone()
        self.values[target] = self.values[source].clone()


@dataclass
class Lane:
    """The sequences of one width, in slots from 0 up.

    lengths: [J], of the prefixes. starts: [J], the column of each sequence's first token. column: the next.
    """

    width: int
    num_layers: int
    keys: list[Hashable] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    column: int = 0
    prefixes: list[Store] = field(default_factory=list)
    suffixes: list[Store] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prefixes = [Store() for _ in range(self.num_layers)]
        self.suffixes = [Store() for _ in range(self.num_layers)]

    @property
    def num_rows(self) -> int:
        return len(self.keys) * self.width

    def join(self, key: Hashable, layers: Sequence[tuple[Tensor, Tensor]], length: int) -> None:
        """Takes in a sequence; layers: keys and values of its prefix, [H, S, K] each."""
        slot = len(self.keys)
        self.keys.append(key)
        self.lengths.append(length)
        self.starts.append(self.column)
        for store, (keys, values) in zip(self.prefixes, layers, strict=True):
            store.reserve(keys[None], max(2 * slot, slot + 1), length)
            store.keys[slot, :, :length] = keys
            store.values[slot, :, :length] = values

    def leave(self, slot: int) -> None:
        """Forgets a sequence; the last one takes its slot."""
        last = len(self.keys) - 1
        if slot != last:
            for prefix, suffix in zip(self.prefixes, self.suffixes, strict=True):
                prefix.move(slice(last, last + 1), slice(slot, slot + 1))
                if self.starts[last] < self.column:  # else it has written nothing yet
                    suffix.move(self._rows(last), self._rows(slot))
        self.keys[slot], self.lengths[slot], self.starts[slot] = (
            self.keys[last],
            self.lengths[last],
            self.starts[last],
        )
        del self.keys[last], self.lengths[last], self.starts[last]
        if not self.keys:
            self.column = 0

    def _rows(self, slot: int) -> slice:
        return slice(slot * self.width, (slot + 1) * self.width)

    def drop_columns(self) -> None:
        """Forgets the columns that no sequence sees any more, once they are many."""
        first = min(self.starts)
        if first < _COLUMNS:
            return
        for store in self.suffixes:
            for tensor in (store.keys, store.values):
                tensor[:, :, : self.column - first] = tensor[:, :, first : self.column].clone()
        self.starts = [start - first for start in self.starts]
        self.column -= first


@dataclass(slots=True)
class LaneStep:
    """What a lane's attention needs in one pass, the same in all layers.

    rows: of the batch. parents: [R] former rows, None where all go on in their places. masks: what is added
    to the scores of prefix and suffix, [J, 1, 1, S] and [R, 1, 1, C].
    """

    lane: Lane
    rows: slice
    parents: Tensor | None
    first: int
    prefix_mask: Tensor
    suffix_mask: Tensor


class SharedPrefixState:
    """See `model.language.family.DecodingState`."""

    def __init__(self, llm: PreTrainedModel) -> None:
        self._llm = llm
        self._num_layers: int = llm.config.num_hidden_layers
        self._lanes: dict[int, Lane] = {}

    def admit(self, keys: Sequence[Hashable], prefixes: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
        device = prefixes[0].device
        lengths = torch.tensor([len(prefix) for prefix in prefixes], device=device)  # [J]
        size = max(map(len, prefixes))
        positions = torch.arange(size, device=device) - (size - lengths)[:, None]  # [J, S], < 0: padding
        visible = (positions >= 0)[:, None, None, :] & torch.ones(
            size, size, dtype=torch.bool, device=device
        ).tril()  # [J, 1, S, S]
        visible |= torch.eye(size, dtype=torch.bool, device=device)  # padding sees itself: no row is empty
        cache = PrefillCache(visible)
        with _attending(self._llm, cache):
            output = self._llm(
                inputs_embeds=torch.stack(
                    [F.pad(prefix, (0, 0, size - len(prefix), 0)) for prefix in prefixes]
                ),
                attention_mask=visible,
                position_ids=positions.clamp(min=0),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=torch.tensor([size - 1], device=device),  # no slice: that of a batch is slow
            )
        for index, (key, prefix, width) in enumerate(zip(keys, prefixes, widths, strict=True)):
            lane = self._lanes.setdefault(width, Lane(width, self._num_layers))
            skipped = size - len(prefix)
            layers = [(k[index, :, skipped:], v[index, :, skipped:]) for k, v in cache.layers_read]
            lane.join(key, layers, len(prefix))
        return output.logits[:, -1].float()

    def advance(self, growths: Sequence[Growth]) -> list[Tensor]:
        by_key = {growth.key: growth for growth in growths}
        self._forget_all_but(by_key)
        tokens = [
            token
            for lane in self._lanes.values()
            for key in lane.keys
            for token in _padded(by_key[key].tokens, lane.width)
        ]
        cache = StepCache(self._begin_step(by_key))
        device = self._llm.get_input_embeddings().weight.device
        with _attending(self._llm, cache):
            output = self._llm(
                input_ids=torch.tensor(tokens, device=device)[:, None],
                attention_mask=torch.zeros(1, 1, 1, 1, device=device),  # any of 4 dimensions: none is made
                position_ids=torch.tensor(self._positions(), device=device)[:, None],
                past_key_values=cache,
                use_cache=True,
            )
        for lane in self._lanes.values():
            lane.column += 1
        logits = output.logits[:, -1].float()
        first: dict[Hashable, int] = {}
        at = 0
        for lane in self._lanes.values():
            for key in lane.keys:
                first[key] = at
                at += lane.width
        return [logits[first[g.key] : first[g.key] + len(g.tokens)] for g in growths]

    def _positions(self) -> list[int]:
        return [
            length + lane.column - start
            for lane in self._lanes.values()
            for length, start in zip(lane.lengths, lane.starts, strict=True)
            for _ in range(lane.width)
        ]

    def _forget_all_but(self, kept: Mapping[Hashable, Growth]) -> None:
        for lane in self._lanes.values():
            for slot in reversed(range(len(lane.keys))):
                if lane.keys[slot] not in kept:
                    lane.leave(slot)
        self._lanes = {width: lane for width, lane in self._lanes.items() if lane.keys}
        for lane in self._lanes.values():
            lane.drop_columns()

    def _begin_step(self, growths: Mapping[Hashable, Growth]) -> list[LaneStep]:
        device = self._llm.get_input_embeddings().weight.device
        dtype = self._llm.get_input_embeddings().weight.dtype
        low = torch.finfo(dtype).min
        steps, at = [], 0
        for lane in self._lanes.values():
            parents = [
                slot * lane.width + parent
                for slot, key in enumerate(lane.keys)
                for parent in _padded(growths[key].parents, lane.width)
            ]
            is_same = parents == list(range(lane.num_rows)) or lane.column == min(lane.starts)
            lengths = torch.tensor(lane.lengths, device=device)
            starts = torch.tensor(lane.starts, device=device).repeat_interleave(lane.width)
            first = min(lane.starts)
            prefix_mask = torch.arange(max(lane.lengths), device=device) >= lengths[:, None]  # [J, S]
            suffix_mask = torch.arange(first, lane.column + 1, device=device) < starts[:, None]  # [R, C]
            steps.append(
                LaneStep(
                    lane,
                    slice(at, at + lane.num_rows),
                    None if is_same else torch.tensor(parents, device=device),
                    first,
                    (prefix_mask.to(dtype) * low)[:, None, None, :],
                    (suffix_mask.to(dtype) * low)[:, None, None, :],
                )
            )
            at += lane.num_rows
        return steps


def _padded(values: Sequence[int], width: int) -> list[int]:
    """As many as a sequence has rows; those too many repeat the last one, and nobody looks at them."""
    return [*values, *[values[-1]] * (width - len(values))]


class PrefillCache(Cache):
    """Remembers what each layer makes of the prefixes."""

    def __init__(self, visible: Tensor) -> None:
        super().__init__(layers=[])
        self.visible = visible
        self.layers_read: list[tuple[Tensor, Tensor]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        self.layers_read.append((key_states, value_states))
        return key_states, value_states

    def get_seq_length(self, *_: object, **__: object) -> int:
        return 0

    def attend(self, _: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
        scores = (query @ key.transpose(-1, -2)) * scaling
        scores = scores.masked_fill(~self.visible.to(scores.device), torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value  # [J, H, S, K]


class StepCache(Cache):
    """Puts the newest keys and values into their lanes, and attends to all there."""

    def __init__(self, steps: Sequence[LaneStep]) -> None:
        super().__init__(layers=[])
        self._steps = steps

    def get_seq_length(self, *_: object, **__: object) -> int:
        return max(max(step.lane.lengths) + step.lane.column for step in self._steps)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        for step in self._steps:
            lane = step.lane
            store = lane.suffixes[layer_idx]
            rows, seen = lane.num_rows, slice(step.first, lane.column)
            store.reserve(key_states, rows, -(-(lane.column + 1) // _COLUMNS) * _COLUMNS)
            for tensor, new in ((store.keys, key_states), (store.values, value_states)):
                if step.parents is not None:
                    tensor[:rows, :, seen] = tensor[:rows, :, seen].index_select(
                        0, step.parents.to(tensor.device)
                    )
                tensor[:rows, :, lane.column] = new[step.rows, :, 0]
        return key_states, value_states

    def attend(self, layer: int, query: Tensor, key: Tensor, _: Tensor, scaling: float) -> Tensor:
        outputs = [
            _attend_lane(step, layer, query[step.rows, :, 0], key.shape[1], scaling) for step in self._steps
        ]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[:, :, None]  # [R, H, 1, K]


def _attend_lane(step: LaneStep, layer: int, query: Tensor, num_heads: int, scaling: float) -> Tensor:
    """Attends with [R, H, K] queries of one lane to prefixes and suffixes; gives [R, H, K]."""
    lane = step.lane
    count, width, size = len(lane.keys), lane.width, query.shape[-1]
    groups = query.shape[1] // num_heads
    prefix, suffix = lane.prefixes[layer], lane.suffixes[layer]
    length = max(lane.lengths)
    columns = slice(step.first, lane.column + 1)
    query = query.reshape(count, width, num_heads, groups, size) * scaling
    by_prefix = query.transpose(1, 2).reshape(count, num_heads, width * groups, size)
    by_row = query.reshape(count * width, num_heads, groups, size)
    prefix_scores = by_prefix @ prefix.keys[:count, :, :length].transpose(-1, -2)  # [J, H, w * G, S]
    prefix_scores = prefix_scores + step.prefix_mask.to(query.device)
    prefix_scores = prefix_scores.reshape(count, num_heads, width, groups, length).transpose(1, 2)
    suffix_scores = by_row @ suffix.keys[: count * width, :, columns].transpose(-1, -2)
    suffix_scores = suffix_scores + step.suffix_mask.to(query.device)
    scores = torch.cat(
        [prefix_scores.reshape(count * width, num_heads, groups, length), suffix_scores], dim=-1
    )
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)  # [R, H, G, S + C]
    of_prefix = weights[..., :length].reshape(count, width, num_heads, groups, length).transpose(1, 2)
    read = of_prefix.reshape(count, num_heads, width * groups, length) @ prefix.values[:count, :, :length]
    read = read.reshape(count, num_heads, width, groups, size).transpose(1, 2)
    read = read.reshape(count * width, num_heads, groups, size)
    read = read + weights[..., length:] @ suffix.values[: count * width, :, columns]
    return read.reshape(count * width, num_heads * groups, size)


_current: ContextVar[PrefillCache | StepCache | None] = ContextVar("current", default=None)


@contextmanager
def _attending(llm: PreTrainedModel, cache: PrefillCache | StepCache) -> Iterator[None]:
    """Has the model attend by `_attend` inside the block, and as before behind it."""
    before, token = llm.config._attn_implementation, _current.set(cache)
    llm.config._attn_implementation = NAME
    try:
        yield
    finally:
        llm.config._attn_implementation = before
        _current.reset(token)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, Tensor | None]:
    """The attention function: reads the cache at work, which knows what each row sees."""
    cache = _current.get()
    assert cache is not None, "it is registered for `_attending` alone"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = module.layer_idx
    assert isinstance(layer, int), "a layer that keeps keys and values has a number"
    return cache.attend(layer, query, key, value, scale).transpose(1, 2), None


AttentionInterface.register(NAME, _attend)
