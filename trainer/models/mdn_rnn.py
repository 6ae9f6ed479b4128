"""The M of World Models (arXiv 1803.10122, section 2.2): an LSTM whose output is a mixture of Gaussians of the next latent.

By default a mixture for each dimension, as the paper's code has it; `--mixture vector` has one for the whole latent. The means are those of
the change from the present latent, unless `--predict frame`. World Models trains it on whole episodes, on latents drawn afresh for each
batch: `--sequences episodes --latents drawn`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmcache.common.options import Positive, Weight, option
from wmcache.trainer.models import MODELS, Belief, DataShape, Generators
from wmcache.trainer.models.recurrent import SequenceModel, SequenceOptions, weight_of_steps
from wmcache.trainer.models.stepwise import draw_noise
from wmcache.trainer.models.trainable import shifted

FORGET_BIAS = 1.0
LEAST_LOG_SIGMA = math.log(0.01)  # of standardised values


@dataclass(frozen=True)
class MdnRnnOptions(SequenceOptions):
    """Sizes and variants."""

    predict: Literal["change", "frame"] = option("change", "Predict the change, or the next frame.", group="Model")
    hidden: Positive = option(256, "Units of the LSTM.")
    mixtures: Positive = option(5, "Gaussians of a mixture.")
    mixture: Literal["dimension", "vector"] = option(
        "dimension", "A mixture for each dimension of the latent, or one for the whole latent."
    )
    end_weight: Weight = option(1.0, "Weight of frames that end an episode in the loss of predicted ends.")
    temperature: Weight = option(
        0.0, "Temperature of what is drawn in plans; 0: the mean of the most probable Gaussian."
    )


class Memory(NamedTuple):
    """Output and cell of an LSTM, [B, hidden] each."""

    hidden: Tensor
    cell: Tensor


class Mixture(NamedTuple):
    """Gaussians of the change or of the frame: logits [..., V or 1, K], means and log_sigmas [..., V, K]."""

    logits: Tensor
    means: Tensor
    log_sigmas: Tensor


@MODELS.register("mdn-rnn")
class MdnRnn(SequenceModel):
    """MDN-RNN, see the module.

    A frame is a vector of V = N * D values.
    """

    shifts = True
    Options = MdnRnnOptions
    options: MdnRnnOptions

    def __init__(self, shape: DataShape, options: MdnRnnOptions, statistics: Mapping[str, Tensor]) -> None:
        """Build the model, see `WorldModel`; raises UserError for a frame of too many values."""
        super().__init__(shape, options, statistics)
        self.inputs = nn.Linear(self.values + self.proprio_size + shape.action_dim, 4 * options.hidden)
        self.recurrence = nn.Linear(options.hidden, 4 * options.hidden, bias=False)
        logits = 1 if options.mixture == "vector" else self.values
        sizes = {"logits": logits, "means": self.values, "log_sigmas": self.values}
        self.mixture = nn.ModuleDict(
            {name: nn.Linear(options.hidden, size * options.mixtures) for name, size in sizes.items()}
        )
        heads = {"proprio": self.proprio_size, "reward": int(shape.has_reward), "end": int(shape.has_end)}
        self.heads = nn.ModuleDict({name: nn.Linear(options.hidden, size) for name, size in heads.items() if size})

    def loss(self, batch: Mapping[str, Tensor], pool: int = 1) -> dict[str, Tensor]:  # noqa: ARG002 (see `pools`)
        """Compute the negative log-likelihood of the next latent per dimension, and add the losses of the heads.

        These are the MSE of proprio and reward, and the cross-entropy of `terminated`; see `WorldModel.loss`.
        """
        latents, weight = self._latents(batch), batch.get("weight")
        tokens, proprio = self._flatten(latents), self.encode_proprio(batch["proprio"])
        seen, known = self._flatten(shifted(batch, "tokens", latents)), self.encode_proprio(shifted(batch, "proprio"))
        outputs = self._read(seen, known, shifted(batch, "action"), fused=weight is not None)
        after = None if weight is None else weight[:, 1:]
        hidden = outputs[:, :-1]
        changes = self.options.predict == "change"
        target = tokens[:, 1:] - seen[:, :-1] if changes else tokens[:, 1:]
        each = log_likelihoods(self._mixture(hidden), target)
        losses = {"nll": -(each if after is None else each * after[..., None]).sum() / target.numel()}
        found = {name: head(outputs).float() for name, head in self.heads.items()}
        if "proprio" in found:
            moved = proprio[:, 1:] - known[:, :-1] if changes else proprio[:, 1:]
            losses["proprio"] = average(F.mse_loss, found["proprio"][:, :-1], moved, after)
        steps = weight_of_steps(batch)
        if "reward" in found:
            losses["reward"] = average(F.mse_loss, found["reward"][..., 0], batch["reward"].float(), steps)
        if "end" in found:
            ends = batch["terminated"].float()
            if (rare := self.options.end_weight) != 1:
                steps = (1 if steps is None else steps) * (1 + (rare - 1) * ends)
            losses["end"] = average(F.binary_cross_entropy_with_logits, found["end"][..., 0], ends, steps)
        return {"loss": torch.stack([*losses.values()]).sum(), **{name: one.detach() for name, one in losses.items()}}

    def start(self, count: int) -> Belief:
        """See `WorldModel.start`. A belief has the memory of all frames but the newest one, and that frame, standardised."""
        sizes = {"hidden": self.options.hidden, "cell": self.options.hidden, "tokens": self.values}
        sizes["proprio"] = self.proprio_size
        return {name: torch.zeros(count, size, device=self.tokens_mean.device) for name, size in sizes.items()}

    def observe(self, belief: Belief, tokens: Tensor, proprio: Tensor, previous_action: Tensor | None) -> Belief:
        """See `WorldModel.observe`."""
        memory = Memory(belief["hidden"], belief["cell"])
        if previous_action is not None:
            memory = self._remember(memory, self._inputs(belief["tokens"], belief["proprio"], previous_action))
        return {**memory._asdict(), "tokens": self._flatten(tokens), "proprio": self.encode_proprio(proprio)}

    def features(self, belief: Belief) -> dict[str, Tensor]:
        """See `Dreams.features`; `hidden` and `cell` are those before the newest frame, which the paper's C sees beside it."""
        return {"latent": belief["tokens"], "hidden": belief["hidden"], "cell": belief["cell"]}

    def _advance(
        self, belief: Belief, action: Tensor, generators: Generators | None, samples: int
    ) -> tuple[Belief, dict[str, Tensor]]:
        """Imagine a frame of S futures of E episodes; returns the belief after it, and it with the outputs of the heads, [E * S, …]."""
        tokens, proprio = belief["tokens"], belief["proprio"]
        memory = Memory(belief["hidden"], belief["cell"])
        memory = self._remember(memory, self._inputs(tokens, proprio, action))
        following = self._draw(memory.hidden, generators if self.temperature else None, samples)
        found = {name: head(memory.hidden).float() for name, head in self.heads.items()}
        moved = found.pop("proprio", proprio[:, :0])
        keeps = self.options.predict == "change"
        tokens, proprio = (tokens + following, proprio + moved) if keeps else (following, moved)
        frame = {"tokens": tokens, "proprio": proprio}
        return {**memory._asdict(), **frame}, {**frame, **found}

    def _inputs(self, tokens: Tensor, proprio: Tensor, action: Tensor) -> Tensor:
        """Compute what frames and the actions after them add to the gates of the LSTM; actions are in the store's units."""
        found: Tensor = self.inputs(torch.cat([tokens, proprio, self._standardise(action)], -1))
        return found

    def _read(self, tokens: Tensor, proprio: Tensor, action: Tensor, *, fused: bool) -> Tensor:
        """Read sequences [B, T, …] from the first frame on; returns the output of the LSTM, [B, T, hidden].

        Args:
            fused: compute long sequences with PyTorch's LSTM, in float32; equal up to rounding.
        """
        if fused:
            return self._read_fused(tokens, proprio, action)
        zeros = torch.zeros(len(tokens), self.options.hidden, device=tokens.device)
        memory, outputs = Memory(zeros, zeros), []
        for inputs in self._inputs(tokens, proprio, action).unbind(1):
            memory = self._remember(memory, inputs)
            outputs.append(memory.hidden)
        return torch.stack(outputs, 1)

    def _read_fused(self, tokens: Tensor, proprio: Tensor, action: Tensor) -> Tensor:
        frames = torch.cat([tokens, proprio, self._standardise(action)], -1).float()
        zeros = frames.new_zeros(1, len(frames), self.options.hidden)
        forget = frames.new_zeros(4, self.options.hidden)
        forget[1] = FORGET_BIAS
        weights = [self.inputs.weight, self.recurrence.weight, self.inputs.bias, forget.flatten()]
        with torch.autocast(frames.device.type, enabled=False):
            outputs: Tensor = torch.lstm(frames, (zeros, zeros), weights, True, 1, 0.0, True, False, True)[0]
        return outputs

    def _remember(self, memory: Memory, inputs: Tensor) -> Memory:
        gates = (inputs + self.recurrence(memory.hidden)).float()
        write, keep, value, read = gates.chunk(4, -1)
        cell = torch.sigmoid(keep + FORGET_BIAS) * memory.cell + torch.sigmoid(write) * torch.tanh(value)
        return Memory(torch.sigmoid(read) * torch.tanh(cell), cell)

    def _mixture(self, hidden: Tensor) -> Mixture:
        shape = (-1, self.options.mixtures)
        logits, means, log_sigmas = (layer(hidden).float().unflatten(-1, shape) for layer in self.mixture.values())
        return Mixture(logits, means, log_sigmas.clamp_min(LEAST_LOG_SIGMA))

    def _draw(self, hidden: Tensor, generators: Generators | None, samples: int) -> Tensor:
        """Return values [E * S, V] of the mixtures after `hidden` [E * S, hidden]; all S of an episode see the same noise."""
        if generators is None:
            shape = (-1, self.options.mixtures)
            logits, means = (self.mixture[name](hidden).float().unflatten(-1, shape) for name in ("logits", "means"))
            return chosen(means, logits.argmax(-1, keepdim=True))
        mixture, temperature = self._mixture(hidden), self.temperature
        uniform = draw_noise(torch.rand, mixture.logits.shape[1:2], generators, hidden, samples)
        normal = draw_noise(torch.randn, (self.values,), generators, hidden, samples)
        shares = (mixture.logits / temperature).softmax(-1).cumsum(-1)
        component = (shares[..., :-1] < uniform[..., None]).sum(-1, keepdim=True)
        sigma = chosen(mixture.log_sigmas, component).exp() * math.sqrt(temperature)
        return chosen(mixture.means, component) + sigma * normal


def chosen(values: Tensor, component: Tensor) -> Tensor:
    """Select from [..., V, K] by components [..., V or 1, 1], [..., V]."""
    return values.gather(-1, component.expand(*values.shape[:-1], 1))[..., 0]


def average(loss: Callable[..., Tensor], found: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Average a loss of outputs [B, T, …] over all, with weights of their frames [B, T] where these differ; a scalar."""
    if weight is None:
        return loss(found, target)
    errors = loss(found, target, reduction="none")
    return (errors * weight.view(weight.shape + (1,) * (errors.ndim - 2))).mean()


def log_likelihoods(mixture: Mixture, target: Tensor) -> Tensor:
    """Compute log p of targets [..., V]: [..., V] by dimension, or [..., 1] of one mixture for the whole vector."""
    logits, means, log_sigmas = mixture
    errors = (target[..., None] - means) * torch.exp(-log_sigmas)
    likelihoods = -0.5 * (errors.square() + math.log(2 * math.pi)) - log_sigmas
    # Dimensions of one mixture for the whole vector are independent given the component.
    joint = likelihoods if logits.shape[-2] > 1 else likelihoods.sum(-2, keepdim=True)
    return torch.logsumexp(logits.log_softmax(-1) + joint, -1)
