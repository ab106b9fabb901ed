"""One small model, and the same weights in transformers' own classes."""

from pathlib import Path

import pytest
from transformers import Blip2ForConditionalGeneration

from model import Blip2
from model.checkpoints import save_hub


@pytest.fixture(scope="session")
def blip2(random_checkpoint: Path) -> Blip2:
    return Blip2.from_pretrained(str(random_checkpoint))


@pytest.fixture(scope="session")
def hub_directory(blip2: Blip2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the generation model of `blip2` in the Hub's format."""
    directory = tmp_path_factory.mktemp("hub")
    save_hub(directory, blip2.components)
    return directory


@pytest.fixture(scope="session")
def reference(hub_directory: Path) -> Blip2ForConditionalGeneration:
    """Load transformers' own model with the weights of `blip2`."""
    return Blip2ForConditionalGeneration.from_pretrained(hub_directory).eval()
