"""Opening models: from memory, a folder, by name; what is the user's stays; one clear error for what is no model."""

import json
import shutil

import families
import pandas as pd
import pytest
import torch
from conftest import build, same
from families import FAMILY_NAMES, IMAGE, inputs
from processors import processor, tokenizer
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, dynamic_module_utils
from transformers.utils import logging

import lvlm_utils as lv
from lvlm_utils import models
from lvlm_utils.prefix import can_share


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    path = tmp_path_factory.mktemp("models") / "my-llava"
    tiny.model.save_pretrained(path)
    tiny.processor.save_pretrained(path)
    return path


def test_root_is_the_repository():
    assert (lv.ROOT / "lvlm_utils" / "models.py").is_file()


def test_a_folder_opens_as_the_model_saved_there(folder, tiny, image):
    lvlm = lv.load(str(folder), device="cpu", attention="eager")
    assert (lvlm.name, lvlm.window, lvlm.image_token_id) == ("my-llava", 4096, tiny.image_token_id)
    assert (lvlm.dtype, lvlm.attention, lvlm.device.type) == (torch.float32, "eager", "cpu")
    with torch.inference_mode():
        logits = [m.model(**lv.prompt(m, image, "", "Is it?").inputs).logits for m in (lvlm, tiny)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=0)


def test_opening_reads_no_weight_twice(folder, tiny, monkeypatch):
    """What identifies weights is asked by who needs it: the revision is the hub's, for show."""
    assert lv.load(folder, device="cpu").revision == tiny.revision == ""
    monkeypatch.setattr(tiny.model.config, "_commit_hash", "0123456789abcdef", raising=False)
    assert lv.load(tiny.model, tiny.processor).revision == "0123456789ab"
    placed = lv.load(folder, device_map="meta")  # weights without content
    assert lv.load(placed.model, placed.processor).device.type == "meta"


def state(model, processor) -> list:
    """What is the user's and might be touched."""
    tokenizer = processor.tokenizer
    return [
        [module.training for module in model.modules()], [one.requires_grad for one in model.parameters()],
        [(one.dtype, one.device, one._version, id(one)) for one in model.parameters()],
        model.config.to_dict(), model.generation_config.to_dict(), model.get_decoder().config._attn_implementation,
        model.model.vision_tower.config._attn_implementation, model.is_gradient_checkpointing,
        tokenizer.pad_token, tokenizer.padding_side, tokenizer.truncation_side, tokenizer.chat_template,
        dict(tokenizer.special_tokens_map), tokenizer.model_max_length, processor.chat_template, len(tokenizer),
        processor.image_processor.to_dict(), torch.is_grad_enabled(), torch.get_rng_state().tolist(),
        logging.is_progress_bar_enabled(), sorted(vars(model)), sorted(vars(processor)), sorted(vars(tokenizer)),
    ]  # fmt: skip


def test_a_model_in_memory_stays_as_it_is(image):
    """In the middle of training: half frozen, in bfloat16, without a padding token, with attention of its own."""
    model, processor = build()
    model.train().bfloat16().set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    model.model.vision_tower.eval().requires_grad_(False)
    model.gradient_checkpointing_enable()
    model.generation_config.do_sample, model.generation_config.num_beams = True, 3
    processor.tokenizer.pad_token, processor.tokenizer.padding_side = None, "right"
    before = state(model, processor)
    lvlm = lv.load(model, processor)
    assert state(model, processor) == before
    batch = lv.prompt(lvlm, [image, None], ["A lamp.", ""], "Is it?")
    assert state(model, processor) == before
    lv.generate(lvlm, batch, 2)
    assert repr(lvlm) and repr(batch)
    assert state(model, processor) == before and lvlm.model is model and lvlm.processor is processor
    for wrong in (None, "processor"):  # nothing is changed on the way to an error
        with pytest.raises(ValueError, match="is no processor: it has no tokenizer"):
            lv.load(model, wrong, attention="sdpa", device="meta")
    assert state(model, processor) == before
    assert lv.load(model, processor, attention="sdpa").attention == "sdpa"  # only what is asked for


def test_a_model_in_memory_keeps_its_dtype():
    model, processor = build()
    assert lv.load(model.bfloat16(), processor).dtype == torch.bfloat16


TOWERS = {"video_llava": ("image", "video"), "deepseek_vl_hybrid": ("vision", "high_res")}
# Their processor cannot be written to a folder without torchvision, which its videos need.
WITH_VIDEO_PROCESSOR = ("internvl", "smolvlm", *families.VIDEO_FAMILIES)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_opens_from_memory_and_from_a_folder(family, tmp_path):
    model, made = families.build(family, layers=2, window=1234), processor(family)
    held = lv.load(model, made)
    assert held.model is model and models.bare(held) is model and models.bare(model) is model
    model.save_pretrained(tmp_path)
    given = made
    if family not in WITH_VIDEO_PROCESSOR:
        made.save_pretrained(tmp_path)
        given = None
    read = lv.load(tmp_path, given, device="cpu")
    batch = inputs(model, batch=1)
    with torch.inference_mode():
        torch.testing.assert_close(read.model(**batch).logits, held.model(**batch).logits, atol=1e-5, rtol=0)
    for lvlm in (held, read):
        assert (lvlm.window, lvlm.image_token_id, lvlm.tokenizer.pad_token_id) == (1234, IMAGE, families.PAD)
        towers = models.towers_of(lvlm.model)
        assert tuple(towers) == TOWERS.get(family, ("vision",)) and lvlm.tower is next(iter(towers.values()))
        assert len(lvlm.decoder.layers) == 2 and isinstance(lvlm.projector, torch.nn.Module)


@pytest.mark.parametrize("name", ["tiny-lava", "/no/such/folder", "a/b/c"])
def test_an_unknown_name_lists_what_is_accepted(name):
    with pytest.raises(
        ValueError, match=r"tiny-llava, tiny-llava-long, smol-llava, smol-llava-long; a local folder or a hub id"
    ):
        lv.load(name)


def test_a_hub_id_that_cannot_be_opened_says_so(monkeypatch):
    def offline(*_, **__):
        raise OSError("no such repository\nand a long explanation")

    monkeypatch.setattr(models.hf.PreTrainedConfig, "get_config_dict", offline)
    with pytest.raises(ValueError, match="'some/model' is no model.*cannot be opened: no such repository$"):
        lv.load("some/model")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="holds no config.json"):
        lv.load(tmp_path)


def test_an_embedded_model_that_is_not_built(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="data/tiny-llava-long"):
        lv.load("tiny-llava-long")


def test_an_unknown_architecture_lists_the_known_ones(tmp_path):
    known = f"Known: {', '.join(sorted(FAMILY_NAMES))}; unverified: CogVLM"
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=f"Unknown architecture bert. {known}"):
        lv.load(tmp_path)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **small))
    with pytest.raises(ValueError, match=f"Unknown architecture llama. {known}"):
        lv.load(model, "processor")


def test_what_is_no_model_is_refused_in_one_line(tiny):
    for wrong, message in (
        (tiny.processor, "Expected what lv.load returns or a transformers model, not .*Processor"),
        (torch.nn.Linear(1, 1), "not Linear .peft: get_base_model"),
        (tiny.model.model, "LlavaModel predicts no tokens: give the model with its language-modelling head"),
    ):
        with pytest.raises(ValueError, match=message):
            lv.load(wrong, tiny.processor)
        with pytest.raises(ValueError, match=message):
            models.bare(wrong)
    with pytest.raises(ValueError, match="A tuple is .model, processor., with nothing beside it"):
        lv.load((tiny.model, tiny.processor), tiny.processor)
    with pytest.raises(ValueError, match="str is no processor: it has no tokenizer"):
        lv.load(tiny.model, "processor")


def test_a_folder_without_a_processor_takes_the_given_one(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"give one: load\(name, processor\)"):
        lv.load(tmp_path)
    assert lv.load(tmp_path, tiny.processor).processor is tiny.processor


def test_a_processor_that_lacks_a_package_says_which(folder, monkeypatch):
    def lacking(*_, **__):
        raise ImportError("\nSomeVideoProcessor requires the Torchvision library\nand a long explanation")

    monkeypatch.setattr(models.hf.AutoProcessor, "from_pretrained", lacking)
    with pytest.raises(ImportError, match="processor in .*my-llava.*requires the Torchvision library$"):
        lv.load(folder)


def test_a_device_map_places_the_weights_and_nothing_moves_them(folder):
    placed = lv.load(folder, device_map="meta")  # weights on "meta" have no content, moving them would raise
    assert placed.device.type == "meta"
    assert lv.load(folder, device_map="auto").device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="device_map places weights while they are read: give no device= with it"):
        lv.load(folder, device="cpu", device_map="auto")


@pytest.mark.parametrize("given", [{"device_map": "auto"}, {"dtype": torch.bfloat16}, {"revision": "main"},
                                   {"quantization_config": {}}, {"token": "x", "subfolder": "y"}])  # fmt: skip
def test_what_says_how_to_read_weights_is_refused_for_a_model_in_memory(given, tiny):
    with pytest.raises(ValueError, match=f"{', '.join(given)} .* while weights are read, .* in memory"):
        lv.load(tiny.model, tiny.processor, **given)


def test_keywords_of_from_pretrained_reach_it(folder, monkeypatch, tmp_path):
    """The model gets all of them, config and processor those that say where to read."""
    got = {}

    def noted(name, function):
        def call(*args, **kwargs):
            got.setdefault(name, kwargs)
            return function(*args, **kwargs)

        return call

    for name, owner, method in (
        ("config", models.hf.PreTrainedConfig, "get_config_dict"),
        ("model", models.hf.AutoModelForImageTextToText, "from_pretrained"),
        ("processor", models.hf.AutoProcessor, "from_pretrained"),
    ):
        monkeypatch.setattr(owner, method, noted(name, getattr(owner, method)))
    inner = tmp_path / "whole"
    shutil.copytree(folder, inner / "inner")
    where = {"subfolder": "inner", "revision": "v2", "token": "secret", "local_files_only": True}
    lvlm = lv.load(inner, device="cpu", low_cpu_mem_usage=True, attn_implementation="eager", **where)
    assert lvlm.attention == "eager"
    for name in ("config", "model", "processor"):
        assert where.items() <= got[name].items(), name
    assert got["model"]["low_cpu_mem_usage"] is True and "low_cpu_mem_usage" not in got["processor"]
    with pytest.raises(TypeError, match="multiple values for keyword argument 'attn_implementation'"):
        lv.load(folder, device="cpu", attention="sdpa", attn_implementation="eager")


def test_a_quantized_model_is_not_moved(folder, monkeypatch):
    """Quantizers place the weights themselves, and refuse to move them."""

    def quantized(*_, quantization_config, **__):
        model, _ = build()
        model.is_quantized, model.to = quantization_config == "four bits", None
        return model

    monkeypatch.setattr(models.hf.AutoModelForImageTextToText, "from_pretrained", quantized)
    assert lv.load(folder, quantization_config="four bits").model.is_quantized


def test_the_dtype_is_float32_on_a_cpu_and_the_checkpoints_on_a_gpu(folder, tmp_path, tiny, monkeypatch):
    half = tmp_path / "half"
    lv.load(folder, device="cpu", dtype=torch.bfloat16).model.save_pretrained(half)
    read = {"name": half, "processor": tiny.processor}
    assert lv.load(**read, device="cpu").dtype == torch.float32
    assert lv.load(**read, device="cpu", dtype="auto").dtype == torch.bfloat16
    assert lv.load(**read, device="cpu", torch_dtype="bfloat16").dtype == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert lv.load(**read, device_map="meta").dtype == torch.bfloat16
    assert lv.load(**read, device="cpu").dtype == lv.load(**read, device_map="cpu").dtype == torch.float32


@pytest.mark.parametrize("shown", [True, False])
def test_the_progress_bar_is_as_it_was_after_a_folder_was_read(shown, folder, capfd, monkeypatch):
    before = logging.is_progress_bar_enabled()
    switch = {True: logging.enable_progress_bar, False: logging.disable_progress_bar}
    switch[shown]()
    try:
        lv.load(folder, device="cpu")
        assert logging.is_progress_bar_enabled() is shown and "it/s" not in capfd.readouterr().err
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(models.hf.AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: open("/no/file"))
            lv.load(folder, device="cpu")
        assert logging.is_progress_bar_enabled() is shown
    finally:
        switch[before]()


def test_print_says_what_it_is(tiny, folder):
    lines = repr(lv.load(folder, device="cpu")).splitlines()
    assert len(lines) <= 4 and max(map(len, lines)) <= 120
    said = "\n".join(lines)
    for word in ("my-llava", "llava", "0.3 M parameters", "float32", "cpu", "sdpa", "4096 tokens", "4 layers",
                 "3 layers", "CLIPVisionModel", "LlamaModel"):  # fmt: skip
        assert word in said, word
    assert repr(tiny).startswith("LVLM 'in-memory'")
    both = repr(lv.load(families.build("deepseek_vl_hybrid", layers=2), processor("deepseek_vl_hybrid")))
    assert "high_res" in both and "2 layers" in both


def test_the_window_comes_from_the_config_or_the_tokenizer(tiny, monkeypatch):
    text = tiny.model.config.text_config
    monkeypatch.setattr(text, "max_position_embeddings", 0)
    monkeypatch.setattr(tiny.tokenizer, "model_max_length", 777)
    assert lv.load(tiny.model, tiny.processor).window == 777
    monkeypatch.setattr(tiny.tokenizer, "model_max_length", 10**30)
    with pytest.raises(ValueError, match="longest prompt is not known: set max_position_embeddings"):
        lv.load(tiny.model, tiny.processor)
    monkeypatch.setattr(text, "seq_length", 99, raising=False)
    assert lv.load(tiny.model, tiny.processor).window == 99


# What a repository with code of its own looks like, as small as it can be.
REMOTE_CODE = """
import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

class Config(PreTrainedConfig):
    seq_length = 50

class CogVLMForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = Config
    def __init__(self, config):
        super().__init__(config)
        self.lm_head = torch.nn.Linear(2, 3)
        self.post_init()
    def get_output_embeddings(self):
        return self.lm_head
"""


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A folder of a family that transformers does not have, with its code beside the weights."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "cogvlm"
    folder.mkdir()
    (folder / "code.py").write_text(REMOTE_CODE)
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.CogVLMForCausalLM"}
    config = {"architectures": ["CogVLMForCausalLM"], "auto_map": classes, "hidden_size": 2}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {"lm_head.weight": torch.zeros(3, 2), "lm_head.bias": torch.zeros(3)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tokenizer("llava").save_pretrained(folder)
    return folder


def test_remote_code_opens_only_when_trusted_and_with_a_warning(remote):
    with pytest.raises(ValueError, match="authors' own code and is unverified. Give trust_remote_code=True"):
        lv.load(remote)
    with pytest.warns(UserWarning, match="CogVLMForCausalLM is unverified"):
        lvlm = lv.load(remote, device="cpu", trust_remote_code=True)
    assert (type(lvlm.model).__name__, lvlm.window, lvlm.image_token_id) == ("CogVLMForCausalLM", 50, None)
    assert lvlm.tokenizer is lvlm.processor
    assert not can_share(lvlm) and "CogVLMForCausalLM" in repr(lvlm)
    with pytest.warns(UserWarning, match="CogVLMForCausalLM is unverified"):  # held, it needs no trust
        assert lv.load(lvlm.model, lvlm.processor).family is lvlm.family


ASKED_APART = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "video_llama_3")


@pytest.mark.filterwarnings("ignore:.*cannot share prefixes")
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_answers_are_those_of_separate_prompts(family, image):
    lvlm = lv.load(families.build(family, layers=2, window=2048), processor(family))
    assert can_share(lvlm) == (family not in ASKED_APART)
    question = "Is the couch in the image?"
    samples = pd.DataFrame({"image": [image] * 2, "context": ["", "Two books lie on the table."], "question": question})
    shared = lv.answer(lvlm, samples, max_new_tokens=3, progress=False)
    apart = lv.answer(lvlm, samples, max_new_tokens=3, progress=False, share=False, batch_size=1)
    same(shared, apart)
    assert (shared["n_computed_tokens"].sum() < apart["n_computed_tokens"].sum()) == can_share(lvlm)


def test_only_safetensors_are_read(folder, tmp_path, tiny):
    copy = shutil.copytree(folder, tmp_path / "pickled")
    (copy / "model.safetensors").unlink()
    torch.save(tiny.model.state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        lv.load(copy)


def test_a_model_in_memory_needs_a_processor(tiny):
    with pytest.raises(ValueError, match="load\\(model, processor\\)"):
        lv.load(tiny.model)
