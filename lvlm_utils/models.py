"""Open a large vision-language model (LVLM): an embedded one, a folder, a hub id, or a model you already hold."""

import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import logging

from lvlm_utils import ROOT
from lvlm_utils.families import FAMILIES, REMOTE, Family, decoder_of, family_of, find_family, towers_of, visual_ids

__all__ = ["EMBEDDED", "FAMILIES", "LVLM", "Family", "bare", "decoder_of", "load", "towers_of", "visual_ids"]

EMBEDDED = ("tiny-llava", "tiny-llava-long")
ACCEPTED = f"Embedded models: {', '.join(EMBEDDED)}; a local folder or a hub id is accepted too."
UNLIMITED = 10**9  # a tokenizer that knows no limit gives a huge number


@dataclass
class LVLM:
    """A model with its processor and the few facts that the rest of the package needs.

    `window` is the longest prompt in tokens; `revision` identifies the weights (content hash, or the hub's commit).
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    name: str
    revision: str
    window: int
    image_token_id: int | None  # None: remote code without a placeholder

    @property
    def tokenizer(self):
        return _tokenizer(self.processor)

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
    if not isinstance(model, PreTrainedModel):
        given = type(model).__name__
        raise ValueError(
            f"Expected what lv.load returns or a transformers model, not {given} (peft: get_base_model())."
        )
    family_of(model)
    if model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} predicts no tokens: give the model with its language-modelling head.")
    return model


def load(
    name: str | Path | PreTrainedModel | tuple[PreTrainedModel, ProcessorMixin],
    processor: ProcessorMixin | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    device_map: str | dict | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> LVLM:
    """Open `name`: "tiny-llava", "tiny-llava-long", a folder, a hub id, or (model, processor).

    A model given in memory keeps its dtype, and its device unless `device` is given; otherwise `device=None` takes a
    GPU when there is one, and `device_map="auto"` lets accelerate spread the weights, which then stay where they are.
    `attention` is a transformers implementation name ("sdpa", "eager", ...), None its default. Only safetensors
    weights are read. `trust_remote_code` opens families that transformers lacks, with a warning; the others run the
    library's code. Raises ValueError for an unknown name or architecture and for arguments that do not fit,
    FileNotFoundError for an embedded model that is not built, ImportError for a package that is missing.
    """
    if isinstance(name, tuple):
        if len(name) != 2 or processor is not None:
            raise ValueError("A tuple is (model, processor), with nothing beside it.")
        name, processor = name
    if device_map is not None:
        if device is not None or not isinstance(name, str | Path):
            raise ValueError("device_map places weights while they are read: not with device=, nor a model in memory.")
        if find_spec("accelerate") is None:
            raise ImportError("device_map needs accelerate: pip install accelerate.")
    if isinstance(name, str | Path):
        label = _find(name)
        model = _read(label, dtype, device_map, attention, trust_remote_code)
        processor = processor or _processor(label, _is_remote(model))
        revision = _folder_hash(label) if Path(label).is_dir() else str(model.config._commit_hash)[:12]
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # set for each process by accelerate launch
        device = device or (gpu if torch.cuda.is_available() else "cpu")
    else:
        model = bare(name)
        if processor is None:
            raise ValueError("A model in memory needs its processor: load(model, processor).")
        if attention is not None:
            model.set_attn_implementation(attention)
        label, revision = model.config.name_or_path or "in-memory", _parameters_hash(model)
    tokenizer = _tokenizer(processor)
    if not hasattr(tokenizer, "pad_token"):
        raise ValueError(f"{type(processor).__name__} is no processor: it has no tokenizer.")
    if _is_remote(model):
        warnings.warn(f"{label} runs its authors' own code and is unverified: check what it gives.", stacklevel=2)
    if device is not None and device_map is None:
        model.to(device)
    model.eval()
    if tokenizer.pad_token is None:  # padding is always masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    image_token_id = next(iter(visual_ids(model)), None)
    return LVLM(model, processor, Path(label).name, revision, _window(model, tokenizer), image_token_id)


def _find(name: str | Path) -> str:
    """The folder or hub id; raises one clear error when there is nothing of that name."""
    source = ROOT / "data" / str(name) if str(name) in EMBEDDED else Path(name).expanduser()
    if str(name) in EMBEDDED and not (source / "config.json").is_file():
        raise FileNotFoundError(
            f"The embedded model {name!r} is not built: no config.json in data/{name}. See data/tiny-llava/README.md."
        )
    if source.is_dir():
        if not (source / "config.json").is_file():
            raise ValueError(f"{str(name)!r} is no model: the folder holds no config.json. {ACCEPTED}")
        return str(source.resolve())
    if str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
        return str(name)
    raise ValueError(f"{str(name)!r} is no model. {ACCEPTED}")


def _read(source: str, dtype, device_map, attention: str | None, trust_remote_code: bool) -> PreTrainedModel:
    try:
        config, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{source!r} is no model. {ACCEPTED} Its config cannot be opened: {reason}") from error
    remote = find_family(config.get("model_type"), config.get("architectures") or []) in REMOTE.values()
    if remote and not trust_remote_code:
        raise ValueError(
            f"{source} is not part of transformers: it runs its authors' own code and is unverified here. Give "
            "trust_remote_code=True if you trust that code."
        )
    auto = AutoModelForCausalLM if remote else AutoModelForImageTextToText
    options = {} if attention is None else {"attn_implementation": attention}
    with _quiet(Path(source).is_dir()):
        return auto.from_pretrained(
            source, dtype=dtype, device_map=device_map, use_safetensors=True, trust_remote_code=remote, **options
        )


def _processor(source: str, trust_remote_code: bool) -> ProcessorMixin:
    try:
        return AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (ImportError, OSError, ValueError) as error:
        kind = ImportError if isinstance(error, ImportError) else ValueError
        reason = str(error).strip().splitlines()[0]
        raise kind(f"The processor in {source} cannot be opened (give one: load(name, processor)). {reason}") from error


def _is_remote(model: PreTrainedModel) -> bool:
    return family_of(model) in REMOTE.values()


def _tokenizer(processor):
    return getattr(processor, "tokenizer", processor)  # remote code often comes with a tokenizer only


def _window(model: PreTrainedModel, tokenizer) -> int:
    """Longest prompt in tokens, by the config of the language model, else by its tokenizer."""
    text = model.config.get_text_config()
    for name in ("max_position_embeddings", "seq_length", "n_positions"):
        if getattr(text, name, None):
            return getattr(text, name)
    if tokenizer.model_max_length < UNLIMITED:
        return tokenizer.model_max_length
    raise ValueError("The longest prompt is not known: set max_position_embeddings in the config of the text model.")


@contextmanager
def _quiet(local: bool) -> Iterator[None]:
    """No progress bar while a local folder is read (a download keeps its own); the setting comes back."""
    hide = local and logging.is_progress_bar_enabled()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            logging.enable_progress_bar()


def _folder_hash(folder: str) -> str:
    files = sorted(Path(folder).glob("*.safetensors"))
    digests = [_file_hash(str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:12]


@lru_cache(maxsize=256)
def _file_hash(path: str, mtime: int, size: int) -> str:
    """sha256 of a file; time and size are there to notice a changed file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parameters_hash(model: PreTrainedModel) -> str:
    if any(value.is_meta for value in model.parameters()):
        raise ValueError("Offloaded weights cannot be identified: load by name, lv.load(name, device_map=...).")
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]
