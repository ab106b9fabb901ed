"""Language models in directories as their authors published them, and what LAVIS changes in them.

OPT's directory says that `</s>` ends an answer; LAVIS ends it with a newline. Flan-T5's says `gelu_new`;
LAVIS computes the exact GELU.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    Blip2ForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
)

from model import Blip2, CheckpointError
from model.checkpoints import load_blip2
from model.checkpoints.convert import convert
from model.language import LanguageModel
from tests.builders import build_language_tokenizer, build_opt, random_pixels
from tests.builders_t5 import build_t5, build_t5_tokenizer
from tests.model.checkpoints.lavis.lavis_files import Folder, build_tensors, of_stage2

END_OF_TEXT, NEWLINE = 2, 3


def edit_json(path: Path, **fields: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | fields))


def publish_opt(directory: Path) -> None:
    """Write an OPT with the ids of its authors: `</s>` begins a text and ends an answer."""
    build_opt().save_pretrained(directory)
    build_language_tokenizer().save_pretrained(directory)
    ids = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT, "pad_token_id": 1}
    edit_json(directory / "config.json", **ids)
    edit_json(directory / "generation_config.json", _from_model_config=True, **ids)


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of bytes, as OPT's is below its merges: a newline is one token, "Ċ"."""
    vocabulary = ["<s>", "<pad>", "</s>", *sorted(ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
    )


def publish_flan_t5(directory: Path) -> None:
    """Write a Flan-T5 as its authors did: its activation follows from "gated-gelu", and is `gelu_new`."""
    build_t5("untied").save_pretrained(directory)
    build_t5_tokenizer().save_pretrained(directory)
    edit_json(directory / "config.json", feed_forward_proj="gated-gelu", dense_act_fn="gelu_new")
    assert T5ForConditionalGeneration.from_pretrained(directory).config.dense_act_fn == "gelu_new"


def of_t5(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("opt_proj.", "t5_proj."): tensor for name, tensor in tensors.items()}


def save(folder: Folder, language_family: str, **fields: Any) -> str:
    tensors = of_stage2(build_tensors())
    if language_family == "opt":
        publish_opt(folder.path / "opt")
        return folder.save(tensors, **fields)
    publish_flan_t5(folder.path / "t5")
    return folder.save(of_t5(tensors), arch="blip2_t5", language_model="t5", **fields)


def language_model_of(path: str) -> LanguageModel:
    return Blip2.from_pretrained(path).require_language_model()


def activations(llm: torch.nn.Module) -> set[str]:
    return {type(module).__name__ for module in llm.modules() if "GELU" in type(module).__name__}


def test_an_opt_as_published_ends_its_answers_with_a_newline(folder: Folder) -> None:
    language_model = language_model_of(save(folder, "opt"))
    assert language_model.eos_token_ids == (NEWLINE,)
    assert language_model.tokenize("a")[0] == END_OF_TEXT


def test_the_newline_is_found_among_bytes(folder: Folder) -> None:
    publish_opt(folder.path / "opt")
    tokenizer = build_byte_tokenizer()
    tokenizer.save_pretrained(folder.path / "opt")
    opt = build_opt()
    opt.resize_token_embeddings(len(tokenizer))
    save_file(
        {name: tensor.clone() for name, tensor in opt.state_dict().items() if name != "lm_head.weight"},
        folder.path / "opt" / "model.safetensors",
    )
    edit_json(folder.path / "opt" / "config.json", vocab_size=len(tokenizer))
    language_model = language_model_of(folder.save(of_stage2(build_tensors())))
    assert [language_model.tokenizer.decode(each) for each in language_model.eos_token_ids] == ["\n"]


def test_an_opt_without_a_newline_needs_its_end_token_named(folder: Folder) -> None:
    publish_opt(folder.path / "opt")
    path = folder.path / "opt" / "tokenizer.json"
    path.write_text(path.read_text().replace(r'"\n"', '"newline"'))
    with pytest.raises(CheckpointError, match=r"tokenizer of 'opt' has no token of a newline.*eos_token_ids"):
        Blip2.from_pretrained(folder.save(of_stage2(build_tensors())))
    named = folder.save(of_stage2(build_tensors()), eos_token_ids=[7, END_OF_TEXT])
    assert language_model_of(named).eos_token_ids == (7, END_OF_TEXT)


@torch.inference_mode()
def test_a_flan_t5_as_published_computes_the_exact_gelu(folder: Folder) -> None:
    llm = language_model_of(save(folder, "t5")).llm
    assert activations(llm) == {"GELUActivation"}
    embeds, start = torch.randn(1, 5, 32), torch.zeros(1, 1, dtype=torch.long)
    logits = llm(inputs_embeds=embeds, decoder_input_ids=start).logits
    exact, published = (
        build_t5("untied"),
        T5ForConditionalGeneration.from_pretrained(folder.path / "t5").eval(),
    )
    torch.testing.assert_close(logits, exact(inputs_embeds=embeds, decoder_input_ids=start).logits)
    assert not torch.allclose(logits, published(inputs_embeds=embeds, decoder_input_ids=start).logits)


def test_a_language_model_inside_the_pth_file_is_changed_too(folder: Folder) -> None:
    publish_opt(folder.path / "opt")
    publish_flan_t5(folder.path / "t5")
    tensors = of_stage2(build_tensors())
    opt = {f"opt_model.{name}": value for name, value in build_opt(seed=7).state_dict().items()}
    assert language_model_of(folder.save(tensors | opt)).eos_token_ids == (NEWLINE,)
    t5 = {f"t5_model.{name}": value for name, value in build_t5("untied", seed=7).state_dict().items()}
    path = folder.save(of_t5(tensors) | t5, arch="blip2_t5", language_model="t5")
    assert activations(language_model_of(path).llm) == {"GELUActivation"}


@pytest.mark.parametrize("language_family", ["opt", "t5"])
@torch.inference_mode()
def test_what_lavis_changes_reaches_transformers(
    language_family: str, folder: Folder, tmp_path: Path
) -> None:
    components = load_blip2(save(folder, language_family)).components
    convert(components, tmp_path / "hub", "hub")
    reference = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "hub").eval()
    llm = reference.language_model
    pixels = random_pixels(1)
    blip2 = Blip2(components).eval()
    inputs = blip2.project_queries(blip2.encode_queries(blip2.encode_images(pixels)))
    language_model = blip2.require_language_model()
    logits, _ = language_model.prefill([inputs[0]], [language_model.tokenize("a")])
    image_ids = [reference.config.image_token_index] * inputs.shape[1]
    input_ids = torch.tensor([[*image_ids, *language_model.tokenize("a")]])
    start = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)} if language_family == "t5" else {}
    expected = reference(pixel_values=pixels, input_ids=input_ids, **start).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert llm.generation_config.eos_token_id == (NEWLINE if language_family == "opt" else 1)


def test_a_language_model_that_lavis_does_not_have_is_refused(tmp_path: Path) -> None:
    components = load_blip2(save(Folder(tmp_path), "opt")).components
    assert components.language_model is not None
    components.language_model.llm.config.model_type = "llama"
    with pytest.raises(
        CheckpointError, match=r"language model is of type 'llama', and LAVIS has 'opt' and 't5'"
    ):
        convert(components, tmp_path / "llama.pth", "lavis")


@pytest.mark.parametrize("language_family", ["opt", "t5"])
def test_a_model_that_lavis_would_change_comes_back_as_it_was(language_family: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    named: dict[str, object] = (
        {"eos_token_ids": [9]} if language_family == "opt" else {"dense_act_fn": "gelu_new"}
    )
    components = load_blip2(save(folder, language_family, **named)).components
    left_out = convert(components, tmp_path / "again.pth", "lavis")
    assert any(next(iter(named)) in line and "LAVIS does not read" in line for line in left_out)
    again = language_model_of(str(tmp_path / "again.pth"))
    assert components.language_model is not None
    assert again.eos_token_ids == components.language_model.eos_token_ids
    if language_family == "t5":
        assert activations(again.llm) == activations(components.language_model.llm) == {"NewGELUActivation"}
    else:
        assert again.eos_token_ids == (9,)
