import pytest
import torch
from transformers import OPTForCausalLM

from training.tiny.config import LanguageShape
from training.tiny.language import build_language_model, embed_descriptions
from training.world.captions import GRID
from training.world.scenes import iter_scenes
from training.world.vocabulary import build_language_tokenizer

TOKENIZER = build_language_tokenizer()
SHAPE = LanguageShape(32, 2, 4, 64, max_position_embeddings=128)


@pytest.fixture(scope="module")
def llm() -> OPTForCausalLM:
    torch.manual_seed(0)
    return build_language_model(SHAPE, TOKENIZER)


def test_cells_of_an_axis_begin_in_their_order(llm: OPTForCausalLM) -> None:
    embeddings = llm.get_input_embeddings().weight
    for axis in "xy":
        cells = embeddings[TOKENIZER.convert_tokens_to_ids([f"{axis}{cell}" for cell in range(GRID)])]
        along = cells @ (cells[GRID // 2 :].mean(0) - cells[: GRID // 2].mean(0))
        order = torch.stack([along, torch.arange(GRID).float()])
        assert torch.corrcoef(order)[0, 1] > 0.9


def test_descriptions_become_a_prefix_of_word_embeddings(llm: OPTForCausalLM) -> None:
    (scene,) = iter_scenes(0, "train", 1)
    prefix = embed_descriptions(llm, TOKENIZER, [scene], 28)
    assert prefix.shape == (1, 28, SHAPE.hidden_size)
    background = TOKENIZER.convert_tokens_to_ids(scene.background)
    torch.testing.assert_close(prefix[0, 0], llm.get_input_embeddings().weight[background])
