"""Train the projector and the adapters of smol-llava: two CPU cores are enough.

    python data/smol-llava/train.py --variant short|long [--seed 0] [--minutes 75] [--work FOLDER] [--out FOLDER]

Killed at any time, the same command goes on from the last checkpoint (in --work, removed by hand when done).
"""

import argparse
import json
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "emoji-world"), str(HERE.parent / "tiny-llava")]
# glibc must not give memory back between steps
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "30000000000", "MALLOC_TOP_PAD_": "268435456",
          "MALLOC_ARENA_MAX": "4"}  # fmt: skip
FOLDERS = {"short": HERE, "long": HERE.parent / "smol-llava-long"}
NAMES_SHARE = 0.35  # of the minutes: names in the place of patches; the rest is the joint stage
TARGETS, RANK = ("q_proj", "k_proj", "v_proj", "o_proj"), 16
# learning rate, share of the time in which it decays, rows of a step
PACE = {"names": (1e-3, 0.15, 2), "joint": (5e-4, 0.9, 4)}
PROJECTOR_RATE, FIXED = 0.2, 0.4  # its learning rate as a share, and the share of the joint stage before it moves


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=FOLDERS, required=True)
    parser.add_argument(
        "--minutes", type=float, default=75, help="both stages; pictures, replay and projector come on top"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=900, help="drawn once and used throughout")
    parser.add_argument("--prompts", type=int, default=1000, help="at most so many ordinary prompts are replayed")
    parser.add_argument("--work", type=Path, default=HERE / ".training", help="checkpoints, features and logs")
    parser.add_argument(
        "--out", type=Path, help="folder that gets adapters and projector (default: that of the variant)"
    )
    parser.add_argument("--threads", type=int, default=2, help="rows that are computed at once, one core each")
    return parser.parse_args()


def assembled(folder: Path):
    """The untrained model and its processor; put together once, because reading the parts takes a minute."""
    import parts
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if not folder.exists():
        model, processor = parts.build()
        model.save_pretrained(folder.with_suffix(".tmp"))
        processor.save_pretrained(folder.with_suffix(".tmp"))
        folder.with_suffix(".tmp").replace(folder)
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def replay(model, processor, prompts: list[str], file: Path) -> list[tuple[str, list[int]]]:
    """What the language model answers without adapters, greedily, with its end; long answers stop after 48 tokens without one."""
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    import torch
    from tqdm.auto import tqdm

    words, found = processor.tokenizer, []
    for at in tqdm(range(0, len(prompts), 24), desc="replay", unit="batch"):
        some = prompts[at : at + 24]
        turns = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in some]
        asked = words([processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns],
                      add_special_tokens=False, padding=True, return_tensors="pt")  # fmt: skip
        with torch.inference_mode():
            made = model.generate(**asked, max_new_tokens=48, do_sample=False)[:, asked.input_ids.shape[1] :].tolist()
        for prompt, answer in zip(some, made, strict=True):
            ends = words.eos_token_id in answer
            found.append((prompt, answer[: answer.index(words.eos_token_id) + 1] if ends else answer))
    file.write_text(json.dumps(found), encoding="utf-8")
    return found


def stage(name, mix, pictures, language, head, projector, writer, options, minutes, trained) -> None:
    """Train `trained`, named parameters, on rows of `mix` until the minutes are spent; resumes by itself."""
    import torch
    from lessons import LONGEST_FIRST, write
    from loop import schedule, train
    from optim import Masters
    from packed import logits, loss

    rng, (rate, decay, count) = writer.rng, PACE[name.split("-")[0]]
    groups = [[(n, p) for n, p in trained if ("linear" in n) == part] for part in (False, True)]
    rates = (rate, rate * PROJECTOR_RATE)
    optimisers = [Masters(g, 0.0, r, not_muon=("",)) for g, r in zip(groups, rates, strict=True) if g]  # AdamW for all

    def one(row):
        """Loss, numbers and gradients of one row; rows run side by side, so the gradients are not added in place."""
        value, numbers = loss(row, logits(language, head, projector, row, writer.image))
        return torch.autograd.grad(value / count, [p for _, p in trained], allow_unused=True), numbers, value.item()

    def step(done: float, number: int) -> dict:
        kinds = rng.choices(list(mix), list(mix.values()), k=count)
        kinds.sort(key=LONGEST_FIRST.index)  # so that no core waits long for the last row
        rows = [write(kind, writer, pictures) for kind in kinds]
        found = {}
        for kind, (gradients, numbers, value) in zip(kinds, pool.map(one, rows), strict=True):
            for (_, p), gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    p.grad = gradient if p.grad is None else p.grad + gradient
            found |= {f"{kind} {key}": v for key, v in numbers.items()} | {"loss": value}
        found["tokens"] = float(sum(len(row.ids) + sum(len(ids) for _, ids, _ in row.branches) for row in rows))
        moving = optimisers if done >= FIXED else optimisers[:1]
        for optimiser in moving:
            optimiser.step(schedule(done, number, 12, decay))
        for _, p in trained:
            p.grad = None
        return found

    usual, language.config._attn_implementation = language.config._attn_implementation, "grouped"
    with ThreadPoolExecutor(options.threads) as pool:
        train(name, options.work, minutes, optimisers, step, rng)
    language.config._attn_implementation = usual


def main() -> None:
    options = arguments()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(
            sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC
        )  # glibc reads them at the start only
    import curve
    import ordinary
    import packed  # noqa: F401  (registers the attention)
    import seen
    import torch
    from lessons import MIXES, Writer
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file
    from torch import nn

    torch.set_num_threads(1)  # each row has one core: threads that wait for each other lose much when others work, too
    torch.manual_seed(options.seed)
    options.work.mkdir(parents=True, exist_ok=True)
    model, processor = assembled(options.work / "base")
    model.requires_grad_(False)
    language, projector = model.model.language_model, model.model.multi_modal_projector
    head = model.lm_head.weight
    adapted = get_peft_model(language, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS)))
    adapters = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]

    # names in the place of patches: looking up is learned before any picture is seen
    table = seen.name_table(head[: processor.tokenizer.vocab_size], lambda text: processor.tokenizer(text).input_ids)
    named, minutes = f"names-{options.seed}", options.minutes * NAMES_SHARE
    rng = random.Random(f"smol-llava names {options.seed}")
    pretended = seen.pretend(table, rng, max(40, options.pictures // 2))
    stage(named, {"names": 1.0}, pretended, language, head, nn.Identity(), Writer(processor, rng, []), options, minutes,
          adapters)  # fmt: skip

    with adapted.disable_adapter():
        answers = replay(model, processor, ordinary.prompts()[: options.prompts], options.work / "replay.json")
    pictures = seen.draw(
        model.model.vision_tower, processor, options.work / "pictures.pt", options.pictures, options.seed
    )
    file = options.work / f"projector-{options.seed}.pt"
    if not file.exists():
        right = seen.regress(projector, pictures, table, 700, options.seed)
        print(f"projector: {right:.3f} of the object patches of other pictures land nearest to their own object")
        torch.save(projector.state_dict(), file)
    projector.load_state_dict(torch.load(file))
    projector.requires_grad_(True)
    rng = random.Random(f"smol-llava {options.variant} {options.seed}")
    joint, moved = f"joint-{options.variant}-{options.seed}", adapters + list(projector.named_parameters())
    stage(joint, MIXES[options.variant], pictures, language, head, projector, Writer(processor, rng, answers), options,
          options.minutes - minutes, moved)  # fmt: skip

    out = options.out or FOLDERS[options.variant]
    out.mkdir(parents=True, exist_ok=True)
    half = lambda state: {k: v.detach().half().contiguous() for k, v in state.items()}  # noqa: E731
    save_file(half(get_peft_model_state_dict(adapted, save_embedding_layers=False)), out / "adapter_model.safetensors")
    config = adapted.peft_config["default"]
    config.base_model_name_or_path, config.target_modules = None, sorted(TARGETS)  # the same bytes everywhere
    config.save_pretrained(out)
    save_file(half(projector.state_dict()), out / "projector.safetensors")
    curve.save(options.work, (named, joint), out)


if __name__ == "__main__":
    main()
