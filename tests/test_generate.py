"""lv.generate and lv.forward: greedy whatever the checkpoint says, nothing thrown away, the model left as it was."""

import processors
import pytest
import torch
from conftest import build, picture, text_of
from transformers import GenerationConfig, WatermarkingConfig

import lvlm_utils as lv
from lvlm_utils import prompts

# What a checkpoint's generation_config may say -> a value that changes or breaks plain greedy decoding.
SETTINGS = {
    "do_sample": True, "num_beams": 3, "num_return_sequences": 2, "temperature": 50.0, "top_k": 3, "top_p": 0.5,
    "repetition_penalty": 1.9, "encoder_repetition_penalty": 9.0, "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1, "bad_words_ids": "said", "suppress_tokens": "said",
    "begin_suppress_tokens": "said", "sequence_bias": "said", "forced_bos_token_id": 7, "forced_eos_token_id": 7,
    "exponential_decay_length_penalty": (0, 1000.0), "min_new_tokens": 2, "min_length": 400, "max_length": 3,
    "max_time": 0.0, "stop_strings": ["e", "a", " "], "guidance_scale": 3.0, "renormalize_logits": True,
    "remove_invalid_values": True, "watermarking_config": WatermarkingConfig(bias=30.0), "token_healing": True,
    "prompt_lookup_num_tokens": 3, "prefill_chunk_size": 8, "cache_implementation": "static", "use_cache": False,
    "return_dict_in_generate": True, "output_scores": True, "output_attentions": True, "length_penalty": -3.0,
    "early_stopping": True, "penalty_alpha": 0.6, "dola_layers": "high", "num_beam_groups": 2,
    "diversity_penalty": 2.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def asked():
    """(lvlm, prompt, greedy texts, greedy ids)."""
    lvlm = lv.load(*build(), device="cpu")
    prompt = lv.prompt(lvlm, [picture("navy"), picture("green", 2)], ["", text_of(20)], "Is it?")
    texts, ids = prompts.generate(lvlm, prompt, 8), prompt.inputs["input_ids"]
    said = lvlm.model.generate(**prompt.inputs, max_new_tokens=8, do_sample=False)[:, ids.shape[1] :]
    assert texts == [text.strip() for text in lvlm.tokenizer.batch_decode(said, skip_special_tokens=True)]
    return lvlm, prompt, texts, said


def setting(name: str, said: torch.Tensor):
    ids = sorted(set(said.flatten().tolist()) - {0, 1, 2})
    values = {
        "bad_words_ids": [[i] for i in ids], "suppress_tokens": ids, "begin_suppress_tokens": ids,
        "sequence_bias": [[[i], -50.0] for i in ids],
    }  # fmt: skip
    return values.get(name, SETTINGS[name])


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_greedy_is_greedy_whatever_the_checkpoint_says(name, asked, monkeypatch):
    lvlm, prompt, texts, said = asked
    monkeypatch.setattr(lvlm.model, "generation_config", GenerationConfig(eos_token_id=2, pad_token_id=0))
    setattr(lvlm.model.generation_config, name, setting(name, said))
    if name in ("num_return_sequences", "num_beam_groups", "length_penalty", "early_stopping"):  # of beams alone
        lvlm.model.generation_config.num_beams = 4
    before = lvlm.model.generation_config.to_dict()
    steps = []
    hook = lvlm.decoder.register_forward_pre_hook(
        lambda _, args, kw: steps.append(tuple(kw["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    torch.manual_seed(0)
    try:
        assert prompts.generate(lvlm, prompt, 8) == texts
    finally:
        hook.remove()
    # one forward for the prompt, whole, and one for each further token, whatever would be done on the way there
    assert steps == [tuple(prompt.inputs["input_ids"].shape)] + [(2, 1)] * (len(steps) - 1) and len(steps) == 8
    assert lvlm.model.generation_config.to_dict() == before


def test_the_settings_above_do_something(asked, monkeypatch):
    """Half of them change the text, or break, where nobody takes them out."""
    lvlm, prompt, texts, said = asked
    felt = []
    for name in SETTINGS:
        own = GenerationConfig(eos_token_id=2, pad_token_id=0)
        setattr(own, name, setting(name, said))
        monkeypatch.setattr(lvlm.model, "generation_config", own)
        torch.manual_seed(0)
        try:
            output = lvlm.model.generate(**prompt.inputs, max_new_tokens=8)
            felt += [name] * (not isinstance(output, torch.Tensor) or output[:, -8:].tolist() != said.tolist())
        except Exception:  # noqa: BLE001 - whatever transformers raises
            felt.append(name)
    assert len(felt) > len(SETTINGS) / 2


def test_the_checkpoints_end_of_text_is_kept(asked, monkeypatch):
    lvlm, prompt, texts, said = asked
    monkeypatch.setattr(lvlm.model, "generation_config", GenerationConfig(eos_token_id=[2, int(said[0, 2])]))
    stopped = prompts.generate(lvlm, prompt, 8)
    assert stopped[0] == lvlm.tokenizer.decode(said[0, :3]).strip() != texts[0]


@torch.no_grad()
def test_the_callers_keywords_win(asked, monkeypatch):
    lvlm, prompt, texts, said = asked
    own = GenerationConfig(eos_token_id=2, pad_token_id=0, num_beams=5, length_penalty=-3.0, early_stopping=True)
    monkeypatch.setattr(lvlm.model, "generation_config", own)
    ids = setting("suppress_tokens", said)
    plain = GenerationConfig(eos_token_id=2, pad_token_id=0)
    for given in ({"suppress_tokens": ids}, {"num_beams": 3}, {"repetition_penalty": 1.9}, {"max_new_tokens": 3}):
        with monkeypatch.context() as patch:
            patch.setattr(lvlm.model, "generation_config", plain)
            wanted = lvlm.model.generate(**prompt.inputs, **{"max_new_tokens": 8, **given})
        wanted = lvlm.tokenizer.batch_decode(wanted[:, said.shape[1] - 8 + prompt.inputs["input_ids"].shape[1] :],
                                             skip_special_tokens=True)  # fmt: skip
        found = [text.strip() for text in wanted]
        limit = {} if "max_new_tokens" in given else {"max_new_tokens": 8}
        assert prompts.generate(lvlm, prompt, **limit, **given) == found != texts
        whole = GenerationConfig(**{"max_new_tokens": 8, **given})
        assert prompts.generate(lvlm, prompt, generation_config=whole) == found


def test_all_sequences_that_were_asked_for_come_back(asked):
    lvlm, prompt, _, _ = asked
    beams = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 6}
    found = prompts.generate(lvlm, prompt, **beams)
    assert [len(texts) for texts in found] == [3, 3] and len(set(found[0])) > 1
    single = lv.prompt(lvlm, picture("navy"), "", "Is it?")
    alone = prompts.generate(lvlm, single, **beams)
    assert alone == found[0] and all(isinstance(text, str) for text in alone)
    torch.manual_seed(3)
    drawn = prompts.generate(lvlm, single, do_sample=True, temperature=3.0, num_return_sequences=5, max_new_tokens=6)
    assert len(drawn) == 5 and len(set(drawn)) > 1
    assert isinstance(prompts.generate(lvlm, single, num_beams=4), str)
    (listed,) = prompts.generate(lvlm, lv.prompt(lvlm, [picture("navy")], "", "Is it?"), **beams)
    assert listed == alone


@pytest.mark.parametrize("name", ["return_dict_in_generate", "output_scores", "output_logits", "output_attentions",
                                  "output_hidden_states"])  # fmt: skip
def test_what_would_be_thrown_away_is_refused(name, asked):
    lvlm, prompt, texts, _ = asked
    with pytest.raises(ValueError, match=f"lv.generate returns text alone, {name}=True would be lost"):
        prompts.generate(lvlm, prompt, **{name: True})
    with pytest.raises(ValueError, match=f"{name}=True would be lost"):
        whole = GenerationConfig(**{name: True, "return_dict_in_generate": True})
        prompts.generate(lvlm, prompt, generation_config=whole)
    assert prompts.generate(lvlm, prompt, 8, **{name: False}) == texts


# The model stays the user's -----------------------------------------------------------------------------------------
@pytest.fixture
def training():
    """A model in the middle of training, with dropout, whose tower is frozen in eval mode."""
    model, processor = build()
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.9
    model.train()
    model.model.vision_tower.eval()
    return lv.load(model, processor)


def modes(model) -> list[bool]:
    return [module.training for module in model.modules()]


def test_dropout_is_off_while_we_ask_and_training_goes_on_after(training, asked, tiny, image):
    _, prompt, texts, _ = asked
    before = modes(training.model)
    assert any(before) and not all(before)
    assert prompts.generate(training, prompt, 8) == texts and modes(training.model) == before
    logits = prompts.forward(training, prompt)
    assert torch.equal(logits, prompts.forward(training, prompt)) and modes(training.model) == before
    with pytest.raises(TypeError):
        prompts.forward(training, prompt, logits_to_keep="all")
    assert modes(training.model) == before
    assert not torch.equal(*(training.model(**prompt.inputs).logits for _ in range(2)))  # dropout is there


def test_forward_gives_the_logits(asked):
    lvlm, prompt, _, said = asked
    logits = prompts.forward(lvlm, prompt)
    assert logits.shape[:2] == prompt.inputs["input_ids"].shape and not logits.requires_grad
    assert torch.equal(logits[:, -1].argmax(-1), said[:, 0])
    short = prompts.forward(lvlm, prompt, logits_to_keep=1)
    assert short.shape[1] == 1 and torch.allclose(short[:, 0], logits[:, -1], atol=1e-5)
    with torch.no_grad():
        wanted = prompts.forward(lvlm, prompt, gradients=True)
    wanted[:, -1].logsumexp(-1).sum().backward()
    weight = lvlm.model.get_input_embeddings().weight
    assert torch.equal(wanted, logits) and weight.grad.abs().sum() > 0
    lvlm.model.zero_grad()
    for name in ("labels", "output_attentions", "output_hidden_states"):
        with pytest.raises(ValueError, match=f"lv.forward returns logits alone, {name} would be lost"):
            prompts.forward(lvlm, prompt, **{name: prompt.inputs["input_ids"]})


@pytest.mark.parametrize("ask", [lambda *a: prompts.forward(*a), lambda *a: prompts.generate(*a, 1)])
def test_methods_and_statistics_know_the_groups_inside(ask, asked):
    lvlm, prompt, _, _ = asked
    with lv.prune(lvlm, "random", drop=0.5) as trace:  # of the context, which only the groups tell
        ask(lvlm, prompt)
    kept = (trace.kept[-1] & prompt.groups.context).sum(1)
    assert kept[0] == 0 and 0 < kept[1] < prompt.groups.context[1].sum()
    with lv.observe(lvlm, prompt.groups) as seen:
        ask(lvlm, prompt)
    assert seen.received.shape[1] == 2


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl", "idefics3"])
def test_a_tokenizer_without_a_padding_token_is_left_without_one(family, image):
    padded = processors.lvlm(family)
    bare = lv.load(padded.model, processors.processor(family))
    tokenizer = bare.processor.tokenizer
    tokenizer.pad_token = None
    bare = lv.load(bare.model, bare.processor)
    before = tokenizer.padding_side, tokenizer.chat_template, dict(tokenizer.special_tokens_map)
    arguments = [image, None], ["", text_of(20)], "Is it?"
    found, wanted = lv.prompt(bare, *arguments), lv.prompt(padded, *arguments)
    real = wanted.inputs["attention_mask"].bool()
    assert not real.all() and torch.equal(found.inputs["attention_mask"].bool(), real)
    assert torch.equal(found.inputs["input_ids"][real], wanted.inputs["input_ids"][real])
    for name in vars(wanted.groups):
        assert torch.equal(getattr(found.groups, name), getattr(wanted.groups, name))
    assert lv.generate(bare, found, 4) == lv.generate(padded, wanted, 4)
    assert tokenizer.pad_token is None
    assert (tokenizer.padding_side, tokenizer.chat_template, dict(tokenizer.special_tokens_map)) == before
