"""A configuration of the recipe in miniature: every phase takes seconds."""

from dataclasses import replace

from training.config import Optimization, Stage1Config
from training.tiny.config import (
    EncoderDecoderShape,
    LanguageShape,
    TinyConfig,
    VisionShape,
    WorldConfig,
    load_tiny_config,
)


def miniature_config(steps: int, batch_size: int = 4) -> TinyConfig:
    """Return the shipped configuration with models of width 16, few scenes and `steps` steps a phase."""
    shipped = load_tiny_config()
    few = Optimization(
        steps=steps,
        batch_size=batch_size,
        learning_rate=5e-3,
        min_learning_rate=1e-4,
        warmup_steps=1,
        weight_decay=0.05,
        beta2=0.98,
        max_grad_norm=1.0,
    )
    return replace(
        shipped,
        autocast="float32",
        save_every=20,
        num_questions=2,
        world=WorldConfig(0, num_train_scenes=16, num_recolored_scenes=8, num_told_scenes=8, image_size=48),
        vision_model=VisionShape(16, 1, 2, 32, patch_size=12),
        language_model=LanguageShape(16, 3, 4, 32, max_position_embeddings=128),
        language_model_t5=EncoderDecoderShape(16, 3, 1, 4, 32),
        qformer=replace(
            shipped.qformer, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        ),
        vision_pretraining=few,
        language_pretraining=few,
        language_pretraining_t5=few,
        stage1=Stage1Config(num_pairs=2, optimization=few),
        retrieval=Stage1Config(num_pairs=2, optimization=replace(few, batch_size=2 * batch_size)),
        stage2=few,
        stage2_t5=few,
    )
