"""What a pruned model should say, computed the plain way: to compare lv.prune with."""

import torch

from lvlm_utils.families import decoder_of
from lvlm_utils.pruning import Plan


@torch.no_grad()
def greedy(model, batch, steps=6, **options):
    return model.generate(
        **batch, do_sample=False, max_new_tokens=steps, return_dict_in_generate=True, output_logits=True, **options
    )


def same(left, right):
    return torch.equal(left.sequences, right.sequences) and all(map(torch.equal, left.logits, right.logits))


def plan_of(stays, positions="original"):
    """A plan that keeps, before each layer, the given columns (batch, tokens)."""

    def choose(mask):
        return lambda tokens: tokens.here(mask)

    return Plan({layer: choose(mask) for layer, mask in stays.items()}, positions)


class Recomputation:
    """One sample and one layer at a time: no cache, no padding, no mask of the library, tokens cut out by hand.

    The embedded prompt and its positions are those that reach the decoder when the plain model generates.
    """

    def __init__(self, model, batch):
        self.model, self.decoder, calls = model, decoder_of(model), []
        hook = self.decoder.register_forward_pre_hook(lambda m, a, kwargs: calls.append(kwargs), with_kwargs=True)
        self.plain = greedy(model, batch)
        hook.remove()
        self.prompt, self.real = calls[0], batch["attention_mask"].bool()

    @torch.no_grad()
    def logits(self, row, new, stays=None, renumber=None):
        """Logits (len(new) + 1, vocabulary) behind the prompt of `row` and behind each of its `new` tokens.

        stays: layer -> (batch, tokens) bool, what is still there. renumber: at which of these layers positions are
        numbered anew from 0.
        """
        stays, renumber = stays or {}, renumber or ()
        real = self.real[row]
        place = torch.cat([real.nonzero()[:, 0], len(real) + torch.arange(len(new))])  # columns of the batch
        hidden = torch.cat([self.prompt["inputs_embeds"][row, real], self.decoder.embed_tokens(new)])
        position = self.prompt["position_ids"]
        position = position[..., min(row, position.shape[-2] - 1), :][..., real]
        position = position[-3:] if position.dim() == 2 else position  # a grid may have the text's own in front
        further = position.max() + 1 + torch.arange(len(new))
        position = torch.cat([position, further.expand(*position.shape[:-1], -1)], -1)
        visual, features = self.prompt.get("visual_pos_masks"), self.prompt.get("deepstack_visual_embeds") or []
        for number, layer in enumerate(self.decoder.layers):
            if number in stays:
                cut = torch.cat([stays[number][row], torch.ones(len(new), dtype=torch.bool)])[place]
                place, hidden, position = place[cut], hidden[cut], position[..., cut]
                if number in renumber:
                    position = torch.arange(len(place))
            n = len(place)
            rotary = self.decoder.rotary_emb(hidden[None], position_ids=position[..., None, :])
            mask = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
            if self.decoder.config._attn_implementation == "eager":
                mask = torch.where(mask, 0.0, torch.finfo(hidden.dtype).min).to(hidden.dtype)
            hidden = layer(
                hidden[None], attention_mask=mask, position_embeddings=rotary, position_ids=None, past_key_values=None
            )[0]
            if number < len(features):
                source = torch.full(visual.shape, -1)
                source[visual] = torch.arange(int(visual.sum()))
                here = torch.cat([source[row], torch.full((len(new),), -1)])[place]
                hidden = hidden.clone()
                hidden[here >= 0] += features[number][here[here >= 0]]
        hidden = self.decoder.norm(hidden[-len(new) - 1 :])
        return self.model.get_output_embeddings()(hidden)
