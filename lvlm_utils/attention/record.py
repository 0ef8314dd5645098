"""Turn the attention calls of a forward pass into statistics: one recorder for the decoder, one for each tower."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig

from lvlm_utils.attention.equi import EquiPositions
from lvlm_utils.attention.intercept import Call
from lvlm_utils.attention.seen import Seen, together
from lvlm_utils.attention.streaming import STREAMED, attention_row, rows_of, stream
from lvlm_utils.attention.visibility import Visibility

CLASS_TOKEN = {"class_embedding", "cls_token"}  # names of the parameter in towers that have one


class Views:
    """`Visibility` of calls; the layers of one forward pass share their mask, so it is read once."""

    def __init__(self):
        self.known = {}

    def of(self, call: Call) -> Visibility:
        batch, _, tokens, _ = call.query.shape
        key = (id(call.mask), batch, tokens, call.causal, call.query.device)
        if key not in self.known:  # the mask is held, so that no other gets its id
            view = Visibility(call.mask, batch, tokens, call.causal, rows_of(call.query.device), call.query.device)
            self.known[key] = (call.mask, view)
        return self.known[key][1]


class DecoderRecorder:
    """Statistics of every layer in the prefill; calls with a filled cache are decode steps and are left out."""

    def __init__(
        self,
        decoder: nn.Module,
        wanted: set[str],
        groups: torch.Tensor | None,
        equi: EquiPositions | None,
        seen: Seen,
        device: torch.device | str,
    ):
        self.layer = {id(part): n for n, layer in enumerate(decoder.layers) for part in layer.modules()}
        self.wanted, self.groups, self.equi, self.seen, self.device = wanted, groups, equi, seen, device
        self.layers: dict[int, dict[str, torch.Tensor]] | None = None  # None outside a prefill
        self.towers: list[TowerRecorder] = []

    def start(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        cache = kwargs.get("past_key_values")
        self.layers = {} if cache is None or cache.get_seq_length() == 0 else None
        self.views = Views()
        if self.layers is not None:
            for tower in self.towers:
                tower.prompt_starts()

    def see(self, call: Call) -> None:
        if self.layers is None:
            return
        batch, _, tokens, _ = call.query.shape
        if self.groups is not None:
            if self.groups.shape[:2] != (batch, tokens):
                raise ValueError(
                    f"The groups are of {tuple(self.groups.shape[:2])} (prompts, tokens), the attention is of "
                    f"{(batch, tokens)}: give the groups of this very prompt, and none inside lv.prune."
                )
            self.groups = self.groups.to(call.query.device)
        view = self.views.of(call)
        values = stream(call.query, call.key, call.scale, view, self.wanted & {*STREAMED}, self.groups)
        values["seers"] = view.seers[:, None].expand(batch, -1, -1)
        if "last" in self.wanted:
            values["last"] = attention_row(call.query, call.key, call.scale, view, view.last(batch))
        if "equi" in self.wanted:
            turn = self.equi.turn(call, view)
            values["equi"] = attention_row(call.query, call.key, call.scale, view, view.last(batch), turn)
        self.layers[self.layer[id(call.module)]] = values

    def finish(self, decoder: nn.Module, args: tuple, output: object) -> None:
        layers = [self.layers[n] for n in sorted(self.layers)] if self.layers else []
        if layers:
            self.seen.take({name: together([one[name] for one in layers], 0, self.device) for name in layers[0]})
        self.layers = self.views = None


class TowerRecorder:
    """Statistics of every layer of a vision tower, for all pictures of one prompt: several passes, if need be.

    A tower of the Qwen kind gets its pictures packed in one row, and calls its attention for every frame or window.
    """

    def __init__(
        self, tower: nn.Module, wanted: set[str], name: str, towers: dict[str, Seen], device: torch.device | str
    ):
        self.order = {id(part): n for n, part in enumerate(tower.modules())}
        self.has_class = any(path.rpartition(".")[2] in CLASS_TOKEN for path, _ in tower.named_parameters())
        self.wanted = wanted & {"received", "entropy", "variance"}
        self.name, self.towers, self.device = name, towers, device
        self.calls = None  # a dict while the tower runs: a layer's place in it -> statistics of its calls
        self.done = True  # the decoder has got the pictures seen so far

    def start(self, tower: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.done:
            self.pictures, self.done = defaultdict(list), False
        self.calls = defaultdict(list)
        self.views, self.grid = Views(), kwargs.get("grid_thw")

    def see(self, call: Call) -> None:
        if self.calls is None:
            return
        for one in call.unpacked():
            view, batch = self.views.of(one), len(one.query)
            values = stream(one.query, one.key, one.scale, view, self.wanted)
            values["seers"] = view.seers[:, None].expand(batch, -1, -1)
            if self.has_class:
                first = torch.zeros(batch, dtype=torch.long, device=one.query.device)
                values["cls"] = attention_row(one.query, one.key, one.scale, view, first)
            self.calls[self.order[id(call.module)]].append(values)

    def finish(self, tower: nn.Module, args: tuple, output: object) -> None:
        calls, self.calls = self.calls, None
        if not calls:  # its attention does not go through transformers' interface
            return
        layers = [calls[n] for n in sorted(calls)]
        for name in layers[0][0]:
            self.pictures[name] += self._pictures([[call[name] for call in calls] for calls in layers], tower.config)
        seen = Seen({*self.pictures} - {"seers"}, f"tower {self.name!r}")
        seen.take({name: together(pictures, 1, self.device) for name, pictures in self.pictures.items()})
        self.towers[self.name] = seen

    def _pictures(self, layers: list[list[torch.Tensor]], config: PreTrainedConfig) -> Sequence[torch.Tensor]:
        """(layers, heads, tokens) of every picture, from the calls of every layer."""
        if self.grid is None:
            return [*torch.stack([torch.cat(calls) for calls in layers], 1)]
        packed = torch.stack([torch.cat(calls, -1)[0] for calls in layers])
        return packed[..., patch_order(config, self.grid)].split(self.grid.prod(-1).tolist(), -1)

    def prompt_starts(self) -> None:
        """The decoder has got the pictures seen so far; without any, the tower has none to show."""
        if self.done:
            self.towers.pop(self.name, None)
        self.done = True


def patch_order(config: PreTrainedConfig, grid: torch.Tensor) -> torch.Tensor | slice:
    """Where each patch, in the order of the processor, stands in the tower: Qwen2.5-VL sorts them by window."""
    if not hasattr(config, "fullatt_block_indexes"):
        return slice(None)
    merge = config.spatial_merge_size
    side = config.window_size // config.patch_size // merge
    windows, before = [], 0
    for time, height, width in grid.tolist():
        units = torch.cartesian_prod(*map(torch.arange, (time, height // merge, width // merge)))
        keys = units // torch.tensor([1, side, side])
        windows.append(torch.unique(keys, dim=0, return_inverse=True)[1] + before)
        before = int(windows[-1].max()) + 1
    place = torch.cat(windows).argsort(stable=True).argsort()
    return (place[:, None] * merge**2 + torch.arange(merge**2)).flatten()
