"""Open a large vision-language model (LVLM): an embedded one, a folder, a hub id, or a model you already hold."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from lvlm_utils import ROOT

EMBEDDED = ("tiny-llava", "tiny-llava-long")

# config.model_type -> where the parts are, as paths from the model. Another family is another record.
FAMILIES: dict[str, dict[str, str]] = {
    "llava": {"tower": "model.vision_tower", "projector": "model.multi_modal_projector"},
    "vipllava": {"tower": "model.vision_tower", "projector": "model.multi_modal_projector"},
    "llava_next": {"tower": "model.vision_tower", "projector": "model.multi_modal_projector"},
}


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
    image_token_id: int

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def family(self) -> dict[str, str]:
        return FAMILIES[self.model.config.model_type]

    @property
    def tower(self) -> torch.nn.Module:
        return self.model.get_submodule(self.family["tower"])

    @property
    def projector(self) -> torch.nn.Module:
        return self.model.get_submodule(self.family["projector"])

    @property
    def decoder(self) -> torch.nn.Module:
        return self.model.get_decoder()

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


def load(
    name: str | Path | PreTrainedModel | tuple[PreTrainedModel, ProcessorMixin],
    processor: ProcessorMixin | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> LVLM:
    """Open `name`: "tiny-llava", "tiny-llava-long", a folder, a hub id, or (model, processor).

    A model given in memory keeps its dtype, and its device unless `device` is given; otherwise `device=None` takes a
    GPU when there is one. `attention` is a transformers implementation name ("sdpa", "eager", ...), None its default.
    Only safetensors weights are read. Raises ValueError for an unknown name or architecture, FileNotFoundError when
    an embedded model has not been built.
    """
    if isinstance(name, tuple):
        name, processor = name
    if isinstance(name, PreTrainedModel):
        if processor is None:
            raise ValueError("A model in memory needs its processor: load(model, processor).")
        model, label, revision = name, name.config.name_or_path or "in-memory", _parameters_hash(name)
        _known_family(model.config)
        if attention is not None:
            model.set_attn_implementation(attention)
    else:
        source, config = _find(name, trust_remote_code)
        _known_family(config)
        options = {} if attention is None else {"attn_implementation": attention}
        with _quiet(Path(source).is_dir()):
            model = AutoModelForImageTextToText.from_pretrained(
                source, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, **options
            )
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
        label = source
        revision = _folder_hash(source) if Path(source).is_dir() else str(config._commit_hash)[:12]
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # set for each process by accelerate launch
        device = device or (gpu if torch.cuda.is_available() else "cpu")
    if device is not None:
        model.to(device)
    model.eval()
    if processor.tokenizer.pad_token is None:  # padding is always masked, so any token will do
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    window = model.config.get_text_config().max_position_embeddings
    return LVLM(model, processor, Path(label).name, revision, window, model.config.image_token_id)


def _find(name: str | Path, trust_remote_code: bool) -> tuple[str, Any]:
    """(folder or hub id, its config); raises one clear error when there is nothing of that name."""
    source = ROOT / "data" / str(name) if str(name) in EMBEDDED else Path(name).expanduser()
    if str(name) in EMBEDDED and not (source / "config.json").is_file():
        raise FileNotFoundError(
            f"The embedded model {name!r} is not built: no config.json in data/{name}. See data/tiny-llava/README.md."
        )
    known = f"{name!r} is no model. Embedded models: {', '.join(EMBEDDED)}; a local folder or a hub id is accepted too"
    if source.is_dir():
        if not (source / "config.json").is_file():
            raise ValueError(f"{known}. The folder exists, but holds no config.json.")
        source = str(source.resolve())
    elif str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
        source = str(name)
    else:
        raise ValueError(f"{known}.")
    try:
        return source, AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{known}. Its config cannot be opened: {str(error).splitlines()[0]}") from error


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


def _known_family(config: Any) -> None:
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"Unknown architecture {config.model_type!r}. Known: {', '.join(sorted(FAMILIES))}. "
            "Another one needs a record in lvlm_utils.models.FAMILIES."
        )


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
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]
