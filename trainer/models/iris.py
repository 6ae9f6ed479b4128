"""IRIS (arXiv 2209.00588) on cached latents: a frame is a few discrete codes, which a transformer predicts one after the other.

The tokenizer (section 2.1) reads and decodes cached tokens in place of pixels. The transformer (section 2.2) reads frames of K codes and an
action: after the action it predicts reward, end and the first code of the next frame, and after each code the next one. Here proprio
comes in with the action, and the action's output predicts its change. Both parts are trained together; no gradient of the transformer
reaches the tokenizer. The transformer sees the entries of codes, not a table of its own, so that it can also see a mean of entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from einops import rearrange
from torch import Tensor, nn

from wmcache.common.errors import UserError
from wmcache.common.options import ShareBelowOne, Weight, option
from wmcache.common.schema import Size
from wmcache.trainer.models import MODELS, Belief, DataShape, Generators, Imagined
from wmcache.trainer.models.attention import KeysValues, zero_init
from wmcache.trainer.models.frame_codes import FrameCodes
from wmcache.trainer.models.state_space import BlockLinear
from wmcache.trainer.models.stepwise import StepwiseModel, draw_noise
from wmcache.trainer.models.symlog import TwoHot
from wmcache.trainer.models.token_causal import CausalTransformer, Kept

POSITION_STD = 0.02


@dataclass(frozen=True)
class IrisOptions:
    """Sizes and variants."""

    proprio: Literal["raw", "none"] = option("raw", "See and predict raw proprio, or use pixels alone.", group="Model")
    cells: Annotated[int, Ge(1), Le(256)] = option(
        16, "Cells of a frame, at most; a grid of more tokens is averaged to the square root of it in each direction."
    )
    cell_codes: Annotated[int, Ge(0), Le(64)] = option(0, "Codes of each cell; 0: as many as make a frame of 4.")
    vocabulary: Annotated[int, Ge(2), Le(2**16)] = option(512, "Entries of a codebook.")
    code_dim: Size = option(16, "Dimensions of an entry.")
    channels: Size = option(128, "Hidden channels of the tokenizer.")
    commitment: Weight = option(0.25, "Weight of the distance of the encoder's outputs from their entries.")
    width: Size = option(128, "Width of the transformer.")
    depth: Size = option(3, "Transformer blocks.")
    heads: Size = option(4, "Attention heads.")
    dropout: ShareBelowOne = option(0.0, "Dropout in attention, projections and MLP.")
    plan_codes: Literal["expected", "greedy"] = option(
        "expected", "Where nothing is drawn, imagine the mean of the entries or the most probable one."
    )
    temperature: Weight = option(0.0, "Temperature of the codes that are drawn in plans; 0: nothing is drawn.")

    def __post_init__(self) -> None:
        """Refuse heads that do not divide the width."""
        if self.width % (2 * self.heads):
            raise UserError(f"--width {self.width} is no multiple of twice --heads {self.heads}; change one of them")


@MODELS.register("iris")
class Iris(StepwiseModel):
    """IRIS, see the module. Inside, tokens, proprio and actions are standardised.

    A belief has the newest frame and the keys and values of the `context` newest ones, with the actions between them. As in any
    transformer with a sliding window, those depend on frames before.
    """

    Options = IrisOptions
    options: IrisOptions

    def __init__(self, shape: DataShape, options: IrisOptions, statistics: Mapping[str, Tensor]) -> None:
        """Build the model, see `WorldModel`."""
        super().__init__(shape, options, statistics)
        self.temperature, width = options.temperature, options.width
        self.proprio_size = shape.proprio_dim if options.proprio == "raw" else 0
        grid, book = (shape.tokens // shape.columns, shape.columns), (options.vocabulary, options.code_dim)
        sizes = options.cells, options.cell_codes, book, options.channels
        self.tokenizer = FrameCodes(grid, shape.token_dim, *sizes)
        self.codes, groups = self.tokenizer.codes, self.tokenizer.groups
        self.embed_code = BlockLinear(groups, options.code_dim, width)
        self.embed_action = nn.Linear(shape.action_dim + self.proprio_size, width)
        self.position = nn.Parameter(POSITION_STD * torch.randn(self.codes + 1, width))
        self.transformer = CausalTransformer(width, options.depth, options.heads, options.dropout)
        self.next_code = BlockLinear(groups, width, options.vocabulary)
        self.two_hot = TwoHot()
        heads = {
            "proprio": self.proprio_size,
            "reward": len(self.two_hot.values) * shape.has_reward,
            "end": int(shape.has_end),
        }
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in heads.items() if size})
        zero_init(*(self.heads[name] for name in ("proprio", "reward") if name in self.heads))  # type: ignore[arg-type]

    def loss(self, batch: Mapping[str, Tensor], pool: int = 1) -> dict[str, Tensor]:  # noqa: ARG002 (see `pools`)
        """Compute the losses of the tokenizer, and the cross-entropy of the codes of each frame but the first; add those of the heads.

        The tokenizer's are the MSE of decoded tokens and of the commitment; entries are moving means. Those of the heads are the MSE of
        proprio, and the cross-entropies of the two-hot reward and of `terminated`; see `WorldModel.loss`.
        """
        frames, proprio = self._standardise(batch["tokens"]), self.encode_proprio(batch["proprio"])
        count = frames.shape[1]
        coded = self.tokenizer(frames.flatten(0, 1))
        numbers, entries = (rearrange(part, "(b t) ... -> b t ...", t=count) for part in (coded.numbers, coded.entries))
        losses = {
            "tokens": F.mse_loss(coded.decoded, frames.flatten(0, 1)),
            "commitment": self.options.commitment * coded.distance,
        }
        logits, found = self.predict(entries, proprio, batch["action"])
        losses["codes"] = F.cross_entropy(logits.flatten(0, -2).float(), numbers[:, 1:].flatten())
        if "proprio" in found:
            losses["proprio"] = F.mse_loss(found["proprio"][:, :-1], proprio[:, 1:] - proprio[:, :-1])
        if "reward" in found:
            losses["reward"] = self.two_hot.loss(found["reward"], batch["reward"].float()).mean()
        if "end" in found:
            losses["end"] = F.binary_cross_entropy_with_logits(found["end"][..., 0], batch["terminated"].float())
        parts = {name: one.detach() for name, one in losses.items()}
        return {"loss": torch.stack([*losses.values()]).sum(), **parts, "used": self._used(numbers)}

    def predict(self, entries: Tensor, proprio: Tensor, actions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Predict frames of a window from entries [B, T, K, dim], embedded proprio [B, T, Q] and actions [B, T, f * A].

        Returns:
            Logits [B, T - 1, K, vocabulary] of the codes of each frame but the first, from all codes before; and the outputs of the heads
            [B, T, …] for the step after each frame.
        """
        count = entries.shape[1]
        x = torch.cat([self._embed_codes(entries), self._embed_action(actions, proprio)[:, :, None]], 2)
        times = torch.arange(count, device=x.device).repeat_interleave(self.codes + 1)[None]
        outputs, _ = self.transformer(x.flatten(1, 2), times)
        outputs = outputs.unflatten(1, (count, -1))
        before = torch.cat([outputs[:, :-1, -1:], outputs[:, 1:, : self.codes - 1]], 2)
        cells = rearrange(before, "b t (p g) w -> b t p g w", g=self.tokenizer.groups)
        return self.next_code(cells).flatten(2, 3), self._predict(outputs[:, :, -1])

    def start(self, count: int) -> Belief:
        """See `WorldModel.start`."""
        options, device = self.options, self.tokens_mean.device
        kept = (count, options.depth, options.heads, self._length, options.width // options.heads)
        sizes = {"tokens": self.shape.tokens * self.shape.token_dim, "proprio": self.proprio_size}
        belief = {name: torch.zeros(count, size, device=device) for name, size in sizes.items()}
        belief |= {"output": torch.zeros(count, options.width, device=device)}
        belief |= {name: torch.zeros(kept, device=device) for name in ("keys", "values")}
        known = torch.zeros(count, self._length, dtype=torch.bool, device=device)
        return {**belief, "known": known, "time": torch.zeros(count, device=device)}

    def observe(self, belief: Belief, tokens: Tensor, proprio: Tensor, previous_action: Tensor | None) -> Belief:
        """See `WorldModel.observe`."""
        frame, time, past = self._standardise(tokens), belief["time"] + 1, None
        if previous_action is not None and self.observed > 1:
            past = unpack(belief)
            _, past = self._act(past, belief, previous_action)
            past = past.newest((self.observed - 1) * (self.codes + 1))
        entries = self.tokenizer.encode(frame)
        times = time[:, None].expand(-1, self.codes)
        outputs, kept = self.transformer(self._embed_codes(entries[:, None])[:, 0], times, past)
        seen = {
            "tokens": frame.flatten(1),
            "proprio": self.encode_proprio(proprio),
            "output": outputs[:, -1],
            "time": time,
        }
        return {**seen, **pack(kept, self._length)}

    def imagine(self, belief: Belief, actions: Tensor, generators: Sequence[torch.Generator] | None = None) -> Imagined:
        """See `StepwiseModel.imagine`. No step sees the tokens, so they are not repeated for each future."""
        seen = {name: value for name, value in belief.items() if name != "tokens"}
        return super().imagine(seen, actions, generators)

    def features(self, belief: Belief) -> dict[str, Tensor]:
        """See `Dreams.features`; `hidden` is the output at the last code of the newest frame, and its proprio."""
        return {"latent": belief["tokens"], "hidden": torch.cat([belief["output"].float(), belief["proprio"]], -1)}

    @property
    def _length(self) -> int:
        """Tokens that the transformer sees of `context` frames and the actions between them."""
        return self.context * (self.codes + 1) - 1

    def _advance(
        self, belief: Belief, action: Tensor, generators: Generators | None, samples: int
    ) -> tuple[Belief, dict[str, Tensor]]:
        """See `StepwiseModel`."""
        output, kept = self._act(unpack(belief), belief, action)
        found, time, noise = self._predict(output), belief["time"] + 1, None
        if generators is not None and self.temperature:
            noise = draw_noise(torch.rand, (self.codes,), generators, output, samples)
        entries: list[Tensor] = []
        for k in range(self.codes):
            logits = self._logits(output, k)
            shares = self._choose(logits, None if noise is None else noise[:, k])
            entries.append(self.tokenizer.mean_entry(shares, k))
            outputs, kept = self.transformer(self._embed_code(entries[-1], k)[:, None], time[:, None], kept)
            output = outputs[:, 0]
        if "reward" in found:
            found["reward"] = self.two_hot.mean(found["reward"])[..., None]
        proprio = belief["proprio"]
        if "proprio" in found:
            proprio = found["proprio"] = proprio + found["proprio"]
        frame = {**found, "proprio": proprio, "tokens": self.tokenizer.decode(torch.stack(entries, 1)).flatten(1)}
        newest = {"tokens": frame["tokens"], "proprio": proprio, "output": output, "time": time}
        return {**newest, **pack(kept, self._length)}, frame

    def _act(self, past: Kept, belief: Belief, action: Tensor) -> tuple[Tensor, Kept]:
        """Return the output [B, width] for an action after the newest frame, and what later tokens see."""
        x = self._embed_action(action, belief["proprio"])
        outputs, kept = self.transformer(x[:, None], belief["time"][:, None], past)
        return outputs[:, 0], kept

    def _choose(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """Return the share of each entry [B, vocabulary] in what is imagined: their probabilities, or all of one, with their gradient."""
        shares = (logits / self.temperature if noise is not None else logits).softmax(-1)
        if noise is not None:
            chosen = (shares.cumsum(-1)[..., :-1] <= noise[:, None]).sum(-1)
        elif self.options.plan_codes == "greedy":
            chosen = shares.argmax(-1)
        else:
            return shares
        return F.one_hot(chosen, shares.shape[-1]) + (shares - shares.detach())

    def _logits(self, output: Tensor, k: int) -> Tensor:
        """Return the logits of code k [B, vocabulary] for the output before it [B, width]."""
        group = k % self.tokenizer.groups
        return (output @ self.next_code.weight[group] + self.next_code.bias[group]).float()

    def _embed_code(self, entry: Tensor, k: int) -> Tensor:
        """Embed the entry of code k, [B, dim] -> [B, width]."""
        group = k % self.tokenizer.groups
        return entry @ self.embed_code.weight[group] + self.embed_code.bias[group] + self.position[k]

    def _predict(self, outputs: Tensor) -> dict[str, Tensor]:
        """Return the outputs of the heads [..., size] for the actions' outputs [..., width]."""
        return {name: head(outputs).float() for name, head in self.heads.items()}

    def _embed_codes(self, entries: Tensor) -> Tensor:
        """Embed entries [B, T, K, dim] of whole frames, [B, T, K, width]."""
        cells = rearrange(entries, "b t (p g) c -> b t p g c", g=self.tokenizer.groups)
        embedded: Tensor = self.embed_code(cells).flatten(2, 3)
        return embedded + self.position[:-1]

    def _embed_action(self, action: Tensor, proprio: Tensor) -> Tensor:
        """Embed actions [..., f * A] in the store's units, and the proprio [..., Q] before them."""
        standard = (action - self.action_mean) / self.action_std
        embedded: Tensor = self.embed_action(torch.cat([standard, proprio], -1))
        return embedded + self.position[-1]

    def _standardise(self, tokens: Tensor) -> Tensor:
        return (tokens.float() - self.tokens_mean) / self.tokens_std

    @torch.no_grad()
    def _used(self, numbers: Tensor) -> Tensor:
        """Return the perplexity of a batch's codes [B, T, K], on average over the codebooks: how many entries are in use."""
        found = []
        for group in range(self.tokenizer.groups):
            counts = torch.bincount(
                numbers[..., group :: self.tokenizer.groups].flatten(), minlength=self.options.vocabulary
            )
            found.append(torch.special.entr(counts / counts.sum()).sum().exp())
        return torch.stack(found).mean()


def pack(kept: Kept, length: int) -> dict[str, Tensor]:
    """Return the newest tokens as a belief has them: keys and values [B, blocks, heads, length, head_dim], padded at the front."""
    kept = kept.newest(length)
    keys, values = (torch.stack(part, 1) for part in zip(*kept.layers, strict=True))
    missing = length - kept.length
    known = keys.new_ones(len(keys), kept.length, dtype=torch.bool) if kept.known is None else kept.known
    padded = {name: F.pad(part, (0, 0, missing, 0)) for name, part in (("keys", keys), ("values", values))}
    return {**padded, "known": F.pad(known, (missing, 0))}


def unpack(belief: Belief) -> Kept:
    """Invert `pack`."""
    layers = zip(belief["keys"].unbind(1), belief["values"].unbind(1), strict=True)
    known = None if bool(belief["known"].all()) else belief["known"]
    return Kept(tuple(KeysValues(*layer) for layer in layers), known)
