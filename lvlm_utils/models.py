"""Open a large vision-language model (LVLM): an embedded one, a folder, a hub id, or a model you already hold."""

import os
import runpy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from lvlm_utils import ROOT
from lvlm_utils.families import Family, decoder_of, family_of, find_family, towers_of, visual_ids

EMBEDDED = ("tiny-llava", "tiny-llava-long", "smol-llava", "smol-llava-long")
ACCEPTED = f"Embedded models: {', '.join(EMBEDDED)}; a local folder or a hub id is accepted too."
UNLIMITED = 10**9  # a tokenizer that knows no limit gives a huge number
# Keywords of from_pretrained that say where to read, so that config and processor need them as well as the model.
WHERE = {"revision", "token", "subfolder", "cache_dir", "force_download", "local_files_only", "code_revision"}


@dataclass(repr=False)
class LVLM:
    """A model with its processor and the few facts that the rest of the package needs.

    `window` is the longest prompt in tokens. `revision` is the hub's commit that the config came from, or "". It
    is informational: it does not change when weights are trained further, and is empty for a folder.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    name: str
    revision: str
    window: int
    image_token_id: int | None  # None where the authors' code has no placeholder

    def __repr__(self) -> str:
        count = sum(value.numel() for value in self.model.parameters())
        text = f"LVLM {self.name!r}: {type(self.model).__name__}, {count / 1e6:,.1f} M parameters\n  "
        text += f"{str(self.dtype).removeprefix('torch.')} on {self.device}, attention {self.attention}, "
        text += f"prompts of at most {self.window} tokens"
        for name, part in ({"decoder": self.decoder} | towers_of(self.model) if self.family.verified else {}).items():
            depth = max((len(one) for one in part.modules() if isinstance(one, torch.nn.ModuleList)), default=0)
            text += f"\n  {name}: {type(part).__name__} of {depth} layers"
        return text

    @property
    def tokenizer(self) -> hf.PreTrainedTokenizerBase:  # the authors' own code often comes with a tokenizer only
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def pad_token_id(self) -> int:
        """What rows are filled up with: the tokenizer's padding token, else EOS, else any, as it is always masked."""
        return next(i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if i is not None)

    @property
    def family(self) -> Family:
        return family_of(self.model)

    @property
    def tower(self) -> torch.nn.Module:
        """The vision tower; where there are several (`towers_of`) the first."""
        return next(iter(towers_of(self.model).values()))

    @property
    def projector(self) -> torch.nn.Module:
        return self.model.get_submodule(self.family.projector)

    @property
    def decoder(self) -> torch.nn.Module:
        return decoder_of(self.model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def attention(self) -> str:
        """Attention implementation of the language model, as transformers names it."""
        return self.model.config.get_text_config()._attn_implementation


def bare(model: LVLM | PreTrainedModel) -> PreTrainedModel:
    """The transformers model of an LVLM, or the given model itself. ValueError for what is not of a known family."""
    model = model.model if isinstance(model, LVLM) else model
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"Expected what lv.load returns or a transformers model, not {kind} (peft: get_base_model()).")
    family_of(model)
    if model.get_output_embeddings() is None:
        raise ValueError(f"{kind} predicts no tokens: give the model with its language-modelling head.")
    return model


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode (no dropout) inside; then every module gets back the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def load(
    name: str | Path | PreTrainedModel | tuple[PreTrainedModel, ProcessorMixin],
    processor: ProcessorMixin | None = None, *, dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None, device_map: str | dict | None = None, attention: str | None = None,
    trust_remote_code: bool = False, **from_pretrained: Any,
) -> LVLM:  # fmt: skip
    """Open a model by name, or take one that you hold as it is.

    name: "tiny-llava", "smol-llava", either with "-long", a folder, a hub id, or (model, processor).
    processor: needed with a model in memory; otherwise it replaces that of the checkpoint.
    dtype: of the weights. None: the checkpoint's own on a GPU, float32 on a CPU.
    device: by default a GPU where there is one; a model in memory is moved only if a device is given.
    device_map: "auto" lets accelerate spread the weights, which then stay there.
    attention: a transformers implementation ("sdpa", "eager", ...); None for its default.
    trust_remote_code: opens families that transformers lacks, with a warning. The others run the library's code.
    from_pretrained: further keywords of that function, such as quantization_config, revision or token.

    Only safetensors weights are read. A model in memory, its tokenizer and its settings are not changed, but for
    `device` and `attention` where they are given. Raises ValueError for an unknown name or architecture and for
    arguments that do not fit, FileNotFoundError for an embedded model that is not built, OSError where smol-llava can
    be neither found nor put together, ImportError for a package that is missing.
    """
    if isinstance(name, tuple):
        if len(name) != 2 or processor is not None:
            raise ValueError("A tuple is (model, processor), with nothing beside it.")
        name, processor = name
    asked = {"dtype": dtype, "device_map": device_map, **from_pretrained}
    asked = {key: value for key, value in asked.items() if value is not None}  # of from_pretrained
    held = not isinstance(name, str | Path)
    if held:
        model, label = bare(name), bare(name).config.name_or_path or "in-memory"
        if asked:
            raise ValueError(f"{', '.join(asked)} can be chosen while weights are read, not for a model in memory.")
    else:
        if device_map is not None and device is not None:
            raise ValueError("device_map places weights while they are read: give no device= with it.")
        gpu = torch.cuda.is_available() and "cpu" not in (str(device), device_map)
        if not {"dtype", "torch_dtype"} & set(asked):
            asked["dtype"] = "auto" if gpu else torch.float32
        label = _find(name, from_pretrained.get("subfolder", ""))
        model, processor = _read(label, processor, trust_remote_code, attention, asked)
        if device_map is None and not getattr(model, "is_quantized", False):  # LOCAL_RANK: by accelerate launch
            device = device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpu else "cpu")
    revision = (getattr(model.config, "_commit_hash", None) or "")[:12]
    lvlm = LVLM(model, processor, Path(label).name, revision, 0, next(iter(visual_ids(model)), None))
    if not hasattr(lvlm.tokenizer, "pad_token"):
        kind = type(processor).__name__
        raise ValueError(f"{kind} is no processor: it has no tokenizer. Use load(model, processor).")
    lvlm.window = _window(lvlm)
    if not lvlm.family.verified:
        kind = model.config.model_type or type(model).__name__
        warnings.warn(f"{kind} is unverified: nobody has run this package on it. Check what it gives.", stacklevel=2)
    if held and attention is not None:
        model.set_attn_implementation(attention)
    if device is not None:
        model.to(device)
    return lvlm


def _find(name: str | Path, subfolder: str) -> str:
    """The folder or hub id; raises one clear error when there is nothing of that name."""
    name, embedded = str(name), str(name) in EMBEDDED
    source = ROOT / "data" / name if embedded else Path(name).expanduser()
    if embedded and name.startswith("smol"):  # kept in the user's cache, put together there when first asked for
        source = runpy.run_path(str(ROOT / "data" / "smol-llava" / "store.py"))["checkpoint"](name)
    if (source / subfolder / "config.json").is_file():
        return str(source.resolve())
    if embedded:
        raise FileNotFoundError(f"The embedded model {name!r} is not built: data/{name} has no config.json.")
    if source.is_dir():
        raise ValueError(f"{name!r} is no model: the folder holds no config.json. {ACCEPTED}")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"{name!r} is no model. {ACCEPTED}")
    return name


def _read(source: str, processor, trusted: bool, attention: str | None, asked: dict) -> tuple:
    """(model, processor)."""
    where = {key: value for key, value in asked.items() if key in WHERE}
    try:
        config, _ = hf.PreTrainedConfig.get_config_dict(source, **where)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{source!r} is no model. {ACCEPTED} Its config cannot be opened: {reason}") from error
    remote = not find_family(config.get("model_type"), config.get("architectures") or []).verified
    if remote and not trusted:
        raise ValueError(f"{source} is not part of transformers: it runs its authors' own code and is unverified. "
                         "Give trust_remote_code=True if you trust that code.")  # fmt: skip
    auto = hf.AutoModelForCausalLM if remote else hf.AutoModelForImageTextToText
    own = {"attn_implementation": attention} if attention else {}
    with ExitStack() as stack:
        if Path(source).is_dir() and logging.is_progress_bar_enabled():  # a download keeps its progress bar
            logging.disable_progress_bar()
            stack.callback(logging.enable_progress_bar)
        model = auto.from_pretrained(source, use_safetensors=True, trust_remote_code=remote, **own, **asked)
    try:
        return model, processor or hf.AutoProcessor.from_pretrained(source, trust_remote_code=remote, **where)
    except (ImportError, OSError, ValueError) as error:
        kind, reason = ImportError if isinstance(error, ImportError) else ValueError, str(error).strip().splitlines()[0]
        raise kind(f"The processor in {source} cannot be opened (give one: load(name, processor)). {reason}") from error


def _window(lvlm: LVLM) -> int:
    """Longest prompt in tokens, by the config of the language model, else by its tokenizer."""
    text = lvlm.model.config.get_text_config()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "seq_length", "n_positions")]
    window = next(filter(None, [*limits, lvlm.tokenizer.model_max_length]))
    if window >= UNLIMITED:
        raise ValueError("The longest prompt is not known: set max_position_embeddings in the text model's config.")
    return window
