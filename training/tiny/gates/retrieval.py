"""The gates of stage 1 and of its retrieval fine-tuning."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from model import Blip2
from model.checkpoints import LoadOptions
from model.matching import Matcher
from training.evaluation.metrics import Figures, caption_figures
from training.stages.text_head import caption_greedily
from training.tiny.gates.matching import PairScorer, judge_rankings, measure_scorers
from training.tiny.gates.plan import VALIDATION_SPLITS, GatePlan, prepare_pixels
from training.tiny.gates.results import Measurement
from training.tiny.gates.text_head import token_losses
from training.world.captions import listing_caption
from training.world.scenes import Scene, Split
from training.world.truth import identified_scenes

_BATCH_SIZE = 64


class GalleryScorer:
    """A stage-1 model applied to images [N, P, V] and their captions."""

    def __init__(self, matcher: Matcher, image_features: Tensor, captions: Sequence[str]) -> None:
        self._matcher = matcher
        self._image_features = image_features
        self._input_ids, self._attention_mask = matcher.tokenize(captions)

    @torch.inference_mode()
    def similarities(self) -> Tensor:
        image_embeds = [
            self._matcher.image_embeds(self._matcher.encode_image_queries(features).query_output)
            for features in torch.split(self._image_features, _BATCH_SIZE)
        ]
        text_embeds = self._matcher.text_embeds(self._input_ids, self._attention_mask)
        return self._matcher.itc_scores(torch.cat(image_embeds), text_embeds).cpu()

    @torch.inference_mode()
    def match_logits(self, images: Tensor, captions: Tensor) -> Tensor:
        pairs = torch.split(torch.stack([images, captions], dim=1), _BATCH_SIZE)
        logits = [
            self._matcher.match_logits(
                self._image_features[image], self._input_ids[text], self._attention_mask[text]
            )
            for image, text in (pair.unbind(dim=1) for pair in tqdm(pairs, desc="pairs", mininterval=5))
        ]
        return torch.cat(logits).cpu()


def measure_stage1(phase: str, plan: GatePlan) -> Measurement:
    """Measure the three tasks of stage 1; without bars, because fine-tuning for retrieval follows."""
    blip2, matcher = _load(phase, plan)
    measured = measure_scorers(_build_scorers(blip2, matcher, plan), plan)
    captions: dict[str, Figures] = {}
    losses: dict[str, Figures] = {}
    for split in VALIDATION_SPLITS:
        scenes = plan.scenes(split)
        image_features = _encode(blip2, scenes)
        generated = caption_greedily(matcher, image_features, beginning="a")  # as no description does
        captions[f"captions by the text head, {split}"] = caption_figures(generated, scenes)
        losses[f"loss per token, {split}"] = token_losses(matcher, image_features, scenes, plan.seed)
    return replace(measured, figures=measured.figures | captions | losses)


def measure_retrieval(phase: str, plan: GatePlan) -> Measurement:
    """Measure retrieval by ITC and re-ranked by ITM, and ITM on hard negatives."""
    return judge_rankings(measure_scorers(_build_scorers(*_load(phase, plan), plan), plan))


def _load(phase: str, plan: GatePlan) -> tuple[Blip2, Matcher]:
    blip2 = Blip2.from_pretrained(str(plan.result(phase)), LoadOptions(device=torch.device(plan.device)))
    assert blip2.matcher is not None, "a stage-1 adapter holds a matcher"
    return blip2, blip2.matcher


def _build_scorers(blip2: Blip2, matcher: Matcher, plan: GatePlan) -> dict[Split, PairScorer]:
    scorers: dict[Split, PairScorer] = {}
    for split in VALIDATION_SPLITS:
        scenes = identified_scenes(plan.seed, split, plan.num_scenes)
        captions = [listing_caption(scene) for scene in scenes]
        scorers[split] = GalleryScorer(matcher, _encode(blip2, scenes), captions)
    return scorers


@torch.inference_mode()
def _encode(blip2: Blip2, scenes: Sequence[Scene]) -> Tensor:
    """Encode scenes into image features [N, P, V]."""
    batches = [scenes[start : start + _BATCH_SIZE] for start in range(0, len(scenes), _BATCH_SIZE)]
    features = [
        blip2.encode_images(prepare_pixels(batch, blip2.preprocess))
        for batch in tqdm(batches, desc="images", mininterval=5)
    ]
    return torch.cat(features)
