"""PEFT adapters of a checkpoint for the Hub: merged when they are loaded, equal to transformers and peft."""

import copy
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from warnings import catch_warnings

import pytest
import torch
from peft import LoKrConfig, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, PreTrainedModel

from model import Blip2, CheckpointError
from model.checkpoints import (
    load_blip2,
    load_language_model,
    load_vision_model,
    resolve_retrieval_model,
    save_hub,
)
from model.checkpoints.__main__ import main
from model.checkpoints.hub.peft import find_base_model
from model.components import Blip2Components
from tests.builders import build_components, random_pixels
from tests.builders_t5 import build_t5_components
from tests.model.checkpoints.damage import edit_config
from tests.model.checkpoints.hub.test_processor import build_retrieval

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of peft

KINDS: dict[str, tuple[Callable[[], Blip2Components], type[PreTrainedModel]]] = {
    "opt": (build_components, Blip2ForConditionalGeneration),
    "t5": (lambda: build_t5_components("untied"), Blip2ForConditionalGeneration),
    "itm": (build_retrieval, Blip2ForImageTextRetrieval),
}
CONFIGS: dict[str, PeftConfig] = {
    "opt": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "opt, all linear layers": LoraConfig(
        r=2, target_modules=["fc1", "fc2", "qkv", "query", "language_projection"], use_rslora=True
    ),
    "opt, a trained projection": LoraConfig(
        r=2, target_modules=["out_proj"], modules_to_save=["language_projection"], bias="lora_only"
    ),
    "opt, LoKr of full rank": LoKrConfig(r=10_000, alpha=10_000, target_modules=["q_proj", "fc1"]),
    "opt, a tied head": LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),
    "opt, tied word embeddings": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "opt, trained word embeddings": LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    ),
    "opt, trained embeddings and head": LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    ),
    "opt, a trained head of its own": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "opt, trained tokens": LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 6]}
    ),
    "t5": LoraConfig(r=4, target_modules=["q", "v", "wi_0"], use_dora=True),
    "t5, a trained head": LoraConfig(r=2, target_modules=["q"], modules_to_save=["lm_head"]),
    "itm, trained word embeddings": LoraConfig(
        r=2, target_modules=["query"], modules_to_save=["word_embeddings", "itm_head"]
    ),
    "t5, the head": LoraConfig(r=4, target_modules=["q", "lm_head"]),
    "itm": LoraConfig(r=4, target_modules=["query", "value", "qkv", "itm_head"]),
}


def train(directory: Path, kind: str, config: PeftConfig, *, name: str = "lora") -> PeftModel:
    """Save a base model, and an adapter of it whose weights are not zero; return the latter's model."""
    build, model_class = KINDS[kind]
    save_hub(directory / "base", build())
    base = model_class.from_pretrained(directory / "base").eval()
    model = get_peft_model(base, copy.deepcopy(config)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (each for each in model.parameters() if each.requires_grad):
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.2)
    with catch_warnings(action="ignore"):  # that word embeddings are saved too
        model.save_pretrained(directory / name)
    return model


def edit_base(directory: Path, name: str) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))


def soft_tokens(model: PreTrainedModel) -> torch.Tensor:
    output = model.get_image_features(pixel_values=random_pixels(2), return_dict=True)
    pooled: torch.Tensor = output.pooler_output
    return pooled


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_a_merged_adapter_computes_what_peft_computes(name: str, tmp_path: Path) -> None:
    kind = name.partition(",")[0]
    reference = train(tmp_path, kind, CONFIGS[name])
    base, merged = (Blip2.from_pretrained(str(tmp_path / each)) for each in ("base", "lora"))
    pixels = random_pixels(2)
    features = merged.encode_images(pixels)
    if merged.matcher is not None:
        input_ids, mask = merged.matcher.tokenize(["a red circle", "two"])
        expected = reference(
            pixel_values=pixels,
            input_ids=nn.functional.pad(input_ids, (8, 0), value=reference.config.image_token_index),
            attention_mask=nn.functional.pad(mask, (8, 0), value=1),
            use_image_text_matching_head=True,
        ).logits_per_image
        ours = merged.matcher.match_logits(features, input_ids, mask)
        before = base.require_matcher().match_logits(base.encode_images(pixels), input_ids, mask)
    else:
        inputs, before_inputs = (
            each.project_queries(each.encode_queries(each.encode_images(pixels))) for each in (merged, base)
        )
        torch.testing.assert_close(inputs, soft_tokens(reference.base_model.model), rtol=1e-3, atol=1e-3)
        prompt_ids = merged.require_language_model().tokenize("a red")
        ours, _ = merged.require_language_model().prefill([inputs[0]], [prompt_ids])
        before, _ = base.require_language_model().prefill([before_inputs[0]], [prompt_ids])
        image_ids = [reference.config.image_token_index] * inputs.shape[1]
        start = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)} if kind == "t5" else {}
        expected = reference(
            pixel_values=pixels[:1], input_ids=torch.tensor([[*image_ids, *prompt_ids]]), **start
        ).logits[:, -1]
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert (ours - before).abs().max() > 0.01


def test_an_adapter_may_hold_the_word_embeddings_of_its_base(tmp_path: Path) -> None:
    train(tmp_path, "opt", CONFIGS["opt"]).save_pretrained(tmp_path / "more", save_embedding_layers=True)
    names = load_file(tmp_path / "more" / "adapter_model.safetensors").keys()
    assert any(name.endswith("embed_tokens.weight") for name in names)
    lora, more = (load_blip2(str(tmp_path / each)).components.language_model for each in ("lora", "more"))
    assert lora is not None
    assert more is not None
    for one, other in zip(lora.llm.parameters(), more.llm.parameters(), strict=True):
        assert torch.equal(one, other)


def test_embeddings_of_a_t5_that_differ_from_each_other_are_refused(tmp_path: Path) -> None:
    """Only those of the prompt are changed, and a T5 has one matrix for prompt, encoder and decoder."""
    train(tmp_path, "t5", LoraConfig(r=4, target_modules=["shared"]))
    with pytest.raises(CheckpointError, match="word embeddings that differ from each other"):
        Blip2.from_pretrained(str(tmp_path / "lora"))


def test_an_adapter_and_its_base_may_be_moved_together(tmp_path: Path) -> None:
    train(tmp_path, "opt", CONFIGS["opt"])
    edit_base(tmp_path / "lora", "../base")
    assert Blip2.from_pretrained(str(tmp_path / "lora")).language_model is not None


def test_the_fingerprint_depends_on_the_adapter(tmp_path: Path) -> None:
    train(tmp_path, "opt", CONFIGS["opt"])
    fingerprints = [Blip2.from_pretrained(str(tmp_path / each)).fingerprint for each in ("base", "lora")]
    weights = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    save_file(
        {name: 2 * each for name, each in weights.items()}, tmp_path / "lora" / "adapter_model.safetensors"
    )
    fingerprints.append(Blip2.from_pretrained(str(tmp_path / "lora")).fingerprint)
    assert len(set(fingerprints)) == 3


@pytest.mark.parametrize("name", ["opt", "opt, a tied head"])
def test_commands_read_an_adapter(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "opt", CONFIGS[name])
    assert main(["inspect", str(tmp_path / "lora")]) == 0
    assert "Hub, Blip2ForConditionalGeneration, with a PEFT adapter to merge" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "lora"), str(tmp_path / "merged"), "--to", "hub"]) == 0
    image = Path(__file__).parents[4] / "samples" / "star.png"
    for directory in ("lora", "merged"):
        assert main(["verify", str(tmp_path / directory), str(image)]) == 0
    ours, merged = (load_blip2(str(tmp_path / each)).components for each in ("lora", "merged"))
    assert ours.language_model is not None
    assert merged.language_model is not None
    for one, other in zip(
        ours.language_model.llm.parameters(), merged.language_model.llm.parameters(), strict=True
    ):
        assert torch.equal(one, other)


def test_an_adapter_may_be_a_retrieval_model(tmp_path: Path) -> None:
    train(tmp_path, "itm", CONFIGS["itm"])
    assert resolve_retrieval_model(str(tmp_path / "lora")) == tmp_path / "lora"


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    train(tmp_path, "opt", CONFIGS["opt"])
    path = tmp_path / "lora" / "adapter_model.safetensors"
    weights = load_file(path)
    first = sorted(weights)[0]
    save_file({name: each for name, each in weights.items() if name != first}, path)
    with pytest.raises(CheckpointError, match=rf"do not belong together: the tensor '{first}' is in one"):
        Blip2.from_pretrained(str(tmp_path / "lora"))
    save_file({name: each[..., :-1].contiguous() for name, each in weights.items()}, path)
    with pytest.raises(CheckpointError, match=r"cannot be merged into its base model \(.*size mismatch"):
        Blip2.from_pretrained(str(tmp_path / "lora"))


@pytest.mark.parametrize(
    ("part", "field", "value", "expected"),
    [
        ("", "quantization_config", {"quant_method": "bitsandbytes"}, "its weights are quantised"),
        (
            "qformer_config",
            "intermediate_size",
            48,
            "base, the base model of a PEFT adapter, cannot be loaded",
        ),
        ("text_config", "num_hidden_layers", 7, "missing_keys"),
        ("text_config", "hidden_size", "x", "hidden_size"),
    ],
)
def test_a_damaged_base_model_is_refused(
    part: str, field: str, value: object, expected: str, tmp_path: Path
) -> None:
    train(tmp_path, "opt", CONFIGS["opt"])
    edit_config(tmp_path / "base", lambda fields: (fields[part] if part else fields).update({field: value}))
    with pytest.raises(CheckpointError, match=rf"base.*{expected}"):
        Blip2.from_pretrained(str(tmp_path / "lora"))


def test_weights_that_cannot_be_merged_are_refused(tmp_path: Path) -> None:
    save_hub(tmp_path / "base", build_components())
    fields = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, base_model_name_or_path=str(tmp_path / "base")
    ).to_dict()
    (tmp_path / "prefix").mkdir()
    (tmp_path / "prefix" / "adapter_config.json").write_text(json.dumps(fields, default=str))
    save_file({"prompt_embeddings": torch.zeros(4, 8)}, tmp_path / "prefix" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"prefix cannot be merged into its base model"):
        Blip2.from_pretrained(str(tmp_path / "prefix"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"adapter_config\.json names no 'base_model_name_or_path'"),
        ({"base_model_name_or_path": "gone/away/from/here"}, r"there is no checkpoint 'gone/away/from/here'"),
        ({"base_model_name_or_path": "other"}, r"names 'other', which is no BLIP-2 in the Hub's format"),
    ],
)
def test_a_base_model_that_cannot_be_found_is_named(
    fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    (tmp_path / "lora" / "other").mkdir(parents=True)
    (tmp_path / "lora" / "other" / "config.json").write_text('{"model_type": "opt"}')
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=message):
        Blip2.from_pretrained(str(tmp_path / "lora"))


@pytest.mark.parametrize(
    "weights",
    [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
    ],
)
def test_an_adapter_beside_the_weights_of_a_whole_model_is_refused(weights: str, tmp_path: Path) -> None:
    """transformers would load the base model and the adapter, and ignore these weights."""
    train(tmp_path, "opt", CONFIGS["opt"])
    both = shutil.copytree(tmp_path / "base", tmp_path / "both")
    shutil.copytree(tmp_path / "lora", both, dirs_exist_ok=True)
    (both / "model.safetensors").rename(both / weights)
    complaint = rf"both holds both a PEFT adapter .*{weights}.*directory of their own.* or delete them"
    for load in (load_blip2, resolve_retrieval_model):
        with pytest.raises(CheckpointError, match=complaint):
            load(str(both))
    with pytest.raises(CheckpointError, match=complaint):
        load_language_model(both)
    with pytest.raises(CheckpointError, match=complaint):
        load_vision_model(both)
    assert main(["inspect", str(both)]) == 2


def test_a_base_model_that_is_an_adapter_is_refused(tmp_path: Path) -> None:
    train(tmp_path, "opt", CONFIGS["opt"])
    second = shutil.copytree(tmp_path / "lora", tmp_path / "second")
    edit_base(second, "../lora")
    with pytest.raises(CheckpointError, match=r"'\.\./lora', which is a PEFT adapter itself; merge that one"):
        Blip2.from_pretrained(str(second))


def test_a_relative_base_model_is_looked_for_from_the_adapter_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = train(tmp_path, "opt", CONFIGS["opt"])
    shutil.move(tmp_path / "base", tmp_path / "lora" / "base")
    edit_base(tmp_path / "lora", "base")
    save_hub(tmp_path / "elsewhere" / "base", build_components(seed=5))
    monkeypatch.chdir(tmp_path / "elsewhere")
    blip2 = Blip2.from_pretrained(str(tmp_path / "lora"))
    with torch.inference_mode():
        ours = blip2.project_queries(blip2.encode_queries(blip2.encode_images(random_pixels(2))))
        torch.testing.assert_close(ours, soft_tokens(reference.base_model.model), rtol=1e-3, atol=1e-3)
    shutil.rmtree(tmp_path / "lora" / "base")
    assert find_base_model(tmp_path / "lora") == Path("base")


@pytest.mark.parametrize("trained", [[], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_an_adapter_of_a_resized_vocabulary_is_refused(kind: str, trained: list[str], tmp_path: Path) -> None:
    build, model_class = KINDS[kind]
    save_hub(tmp_path / "base", build())
    base = model_class.from_pretrained(tmp_path / "base")
    rows = base.get_input_embeddings().weight.shape[0]
    base.resize_token_embeddings(rows + 3)
    names = [name.replace("embed_tokens", "shared") if kind == "t5" else name for name in trained]
    config = LoraConfig(r=2, target_modules=["fc1" if kind == "opt" else "q"], modules_to_save=names)
    with catch_warnings(action="ignore"):
        get_peft_model(base, config).save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    complaint = rf"has shape \[{rows + 3}, 32\], its base model has \[{rows}, 32\]; .*with its tokenizer"
    with pytest.raises(CheckpointError, match=complaint):
        Blip2.from_pretrained(str(tmp_path / "lora"))


@pytest.mark.parametrize("fields", [{"r": 10**12}, {"rank_pattern": {"fc1": 10**12}}])
def test_an_absurd_rank_allocates_nothing(fields: dict[str, object], tmp_path: Path) -> None:
    train(tmp_path, "opt", CONFIGS["opt"])
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(CheckpointError, match=r"sets 'r' to 1000000000000, and the largest size in"):
        Blip2.from_pretrained(str(tmp_path / "lora"))


@pytest.mark.parametrize(
    "fields",
    [{"trainable_token_indices": [10**9]}, {"trainable_token_indices": 1.5}, {"megatron_config": {"a": 1}}],
)
def test_an_odd_configuration_is_refused(fields: dict[str, object], tmp_path: Path) -> None:
    train(tmp_path, "opt", CONFIGS["opt"])
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(CheckpointError, match=r"lora cannot be merged into its base model"):
        Blip2.from_pretrained(str(tmp_path / "lora"))


def test_an_adapter_in_a_pickle_is_refused(tmp_path: Path) -> None:
    train(tmp_path, "opt", CONFIGS["opt"])
    (tmp_path / "lora" / "adapter_model.safetensors").rename(tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.safetensors, and pickles"):
        Blip2.from_pretrained(str(tmp_path / "lora"))


def test_without_peft_the_command_to_merge_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, "opt", CONFIGS["opt"])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        CheckpointError,
        match=r"pip install 'blip2-server\[peft\]'.*model\.checkpoints convert .*lora MERGED --to hub",
    ):
        Blip2.from_pretrained(str(tmp_path / "lora"))
