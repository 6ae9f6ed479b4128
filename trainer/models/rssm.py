"""The recurrent state-space model of DreamerV3 (arXiv 2301.04104), and with Gaussian values of DisWM (arXiv 2503.08751).

A state is a memory, which no frame is needed for, and a stochastic value. The prior predicts the value from the memory alone; the
posterior sees the frame too. All of a frame, and reward and end of the steps to it, are decoded from the state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn

from wmcache.common.errors import UserError
from wmcache.common.options import Positive, Weight, option
from wmcache.engine.mlp import make_mlp
from wmcache.trainer.models import MODELS, Belief, DataShape, Generators
from wmcache.trainer.models.recurrent import SequenceModel, SequenceOptions, weight_of_steps
from wmcache.trainer.models.state_space import BlockGru, Categoricals, Gaussians, Latent
from wmcache.trainer.models.stepwise import draw_noise
from wmcache.trainer.models.symlog import TwoHot


@dataclass(frozen=True)
class RssmOptions(SequenceOptions):
    """Sizes and variants."""

    actions: Literal["seen", "none"] = option(
        "seen", "See actions, or predict videos without them; such a model cannot plan.", group="Model"
    )
    latent: Literal["gaussian", "categorical"] = option(
        "gaussian", "Distribution of the stochastic values: Gaussians, or categorical variables (DreamerV3)."
    )
    deter: Positive = option(200, "Units of the memory, a GRU.")
    blocks: Positive = option(1, "Blocks of the GRU, each with weights of its own.")
    stoch: Positive = option(50, "Stochastic variables.")
    classes: Annotated[int, Ge(2), Le(1024)] = option(16, "Classes of each categorical variable.")
    hidden: Positive = option(200, "Units of each hidden layer.")
    layers: Positive = option(2, "Hidden layers of the encoder and of the decoder.")
    free_nats: Weight = option(1.0, "KL divergence of a frame, in nats, below which it is not reduced.")
    dynamics_weight: Weight = option(0.8, "Weight of the KL divergence that trains the prior.")
    representation_weight: Weight = option(0.2, "Weight of the KL divergence that trains the posterior.")
    reward_weight: Weight = option(1.0, "Weight of the loss of predicted rewards.")

    def __post_init__(self) -> None:
        """Refuse blocks of different sizes."""
        if self.deter % self.blocks:
            raise UserError(f"--deter {self.deter} is not divisible by --blocks {self.blocks}; choose a multiple of it")

    def make_latent(self) -> Latent:
        """Return the distribution of the stochastic values."""
        return Gaussians(self.stoch) if self.latent == "gaussian" else Categoricals(self.stoch, self.classes)


@MODELS.register("rssm")
class Rssm(SequenceModel):
    """RSSM, see the module.

    What a frame shows is chosen without noise (the mean, or the most probable classes), so a belief depends on frames and actions alone.
    """

    Options = RssmOptions
    options: RssmOptions

    def __init__(self, shape: DataShape, options: RssmOptions, statistics: Mapping[str, Tensor]) -> None:
        """Build the model, see `WorldModel`; raises UserError for a frame of too many values."""
        super().__init__(shape, options, statistics)
        self.latent = options.make_latent()
        deter, hidden = options.deter, options.hidden
        self.frame_size, state = self.values + self.proprio_size, deter + self.latent.size
        self.takes_actions = options.actions == "seen" and shape.action_dim > 0
        self.memory = BlockGru(deter, (self.latent.size, max(1, shape.action_dim)), hidden, options.blocks)
        self.encoder, seen = self.make_encoder()
        self.prior = make_mlp(deter, hidden, 2, self.latent.parameters)
        self.posterior = make_mlp(deter + seen, hidden, 1, self.latent.parameters)
        self.decoder = self.make_decoder(state)
        self.two_hot = TwoHot()
        heads = {"reward": len(self.two_hot.values) * shape.has_reward, "end": int(shape.has_end)}
        self.heads = nn.ModuleDict(
            {
                name: make_mlp(state, hidden, 1, size, scale=0.0 if name == "reward" else None)
                for name, size in heads.items()
                if size
            }
        )

    def make_encoder(self) -> tuple[nn.Module, int]:
        """Return the network that `embed` runs, and how many numbers that gives."""
        return make_mlp(self.frame_size, self.options.hidden, self.options.layers), self.options.hidden

    def make_decoder(self, state: int) -> nn.Module:
        """Return the network from states [..., state] to frames [..., V + Q]."""
        return make_mlp(state, self.options.hidden, self.options.layers, self.frame_size)

    def embed(self, tokens: Tensor, proprio: Tensor) -> Tensor:
        """Return what the posterior sees of standardised frames [..., V] and [..., Q], without noise."""
        embedded: Tensor = self.encoder(torch.cat([tokens, proprio], -1))
        return embedded

    def encode(self, tokens: Tensor, proprio: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Embed frames [B, T, …] for the loss, and return losses of each frame that come on top, [B, T] each, weighted."""
        return self.embed(tokens, proprio), {}

    @classmethod
    def needs_actions(cls, options: RssmOptions) -> bool:
        """See `Trainable.needs_actions`."""
        return options.actions == "seen"

    def loss(self, batch: Mapping[str, Tensor], pool: int = 1) -> dict[str, Tensor]:  # noqa: ARG002 (see `pools`)
        """Compute the squared error of decoded frames, summed over tokens and proprio, and add the KL divergences and the heads' losses.

        These are the cross-entropies of the two-hot reward and of `terminated`; see `WorldModel.loss`.
        """
        tokens, proprio = self._flatten(self._latents(batch)), self.encode_proprio(batch["proprio"])
        seen, own = self.encode(tokens, proprio)
        memories, posteriors, values = self._read(seen, batch["action"])
        priors, weight = self.prior(memories), batch.get("weight")
        decoded = self._decode(memories[:, :-1], values)
        before, free, divergence = priors[:, :-1], self.options.free_nats, self.latent.divergence
        kl = divergence(posteriors.detach(), before)
        representation = divergence(posteriors, before.detach())
        losses = {
            "tokens": average((decoded["tokens"] - tokens).square().sum(-1), weight),
            "proprio": average((decoded["proprio"] - proprio).square().sum(-1), weight),
            "dynamics": self.options.dynamics_weight * average(kl.clamp_min(free), weight),
            "representation": self.options.representation_weight * average(representation.clamp_min(free), weight),
            **{name: average(each, weight) for name, each in own.items()},
        }
        if self.heads:
            # A step that no frame of the window follows leads to an imagined state.
            followed = torch.ones_like(kl) if weight is None else weight
            real = F.pad(followed[:, 1:], (0, 1))[..., None] > 0
            after = torch.where(real, F.pad(values[:, 1:], (0, 0, 0, 1)), self._choose(priors[:, 1:]))
            found, known = self._predict(memories[:, 1:], after), weight_of_steps(batch)
            if "reward" in found:
                rewards = self.two_hot.loss(found["reward"], batch["reward"].float())
                losses["reward"] = self.options.reward_weight * average(rewards, known)
            if "end" in found:
                ends = batch["terminated"].float()
                each = F.binary_cross_entropy_with_logits(found["end"][..., 0], ends, reduction="none")
                losses["end"] = average(each, known)
        parts = {name: one.detach() for name, one in losses.items()}
        return {"loss": torch.stack([*losses.values()]).sum(), **parts, "kl": average(kl, weight).detach()}

    def start(self, count: int) -> Belief:
        """See `WorldModel.start`. A belief has the state after the newest frame, and the tokens of that frame, standardised."""
        sizes = {"memory": self.options.deter, "value": self.latent.size, "tokens": self.values}
        return {name: torch.zeros(count, size, device=self.tokens_mean.device) for name, size in sizes.items()}

    def observe(self, belief: Belief, tokens: Tensor, proprio: Tensor, previous_action: Tensor | None) -> Belief:
        """See `WorldModel.observe`."""
        flat = self._flatten(tokens)
        action = flat.new_zeros(len(flat), self.shape.action_dim)
        action = action if previous_action is None else self._standardise(previous_action)
        memory = self._remember(belief["memory"], belief["value"], action)
        seen = self.embed(flat, self.encode_proprio(proprio))
        value = self.latent.mode(self.posterior(torch.cat([memory, seen], -1)))
        return {"memory": memory, "value": value, "tokens": flat}

    def features(self, belief: Belief) -> dict[str, Tensor]:
        """See `Dreams.features`; `hidden` is the state after the newest frame, which DreamerV3's actor sees."""
        return {"latent": belief["tokens"], "hidden": torch.cat([belief["memory"], belief["value"]], -1)}

    def _advance(
        self, belief: Belief, action: Tensor, generators: Generators | None, samples: int
    ) -> tuple[Belief, dict[str, Tensor]]:
        memory = self._remember(belief["memory"], belief["value"], self._standardise(action))
        value = self._draw(self.prior(memory), generators if self.temperature else None, samples)
        frame, found = self._decode(memory, value), self._predict(memory, value)
        if "reward" in found:
            found["reward"] = self.two_hot.mean(found["reward"])[..., None]
        return {"memory": memory, "value": value, "tokens": frame["tokens"]}, {**frame, **found}

    def _read(self, frames: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read sequences of embedded frames [B, T, …] from the first on.

        Returns:
            Memories, also the one that follows the last frame, [B, T + 1, deter]; parameters of the posteriors, and values, [B, T, …] each.
        """
        memory, value = (frames.new_zeros(len(frames), size) for size in (self.options.deter, self.latent.size))
        action = actions.new_zeros(len(actions), self.shape.action_dim)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for seen, following in zip(frames.unbind(1), self._standardise(actions).unbind(1), strict=True):
            memory = self._remember(memory, value, action)
            posterior = self.posterior(torch.cat([memory, seen], -1))
            value, action = self._choose(posterior), following
            found.append((memory, posterior, value))
        memories, posteriors, values = (torch.stack(part, 1) for part in zip(*found, strict=True))
        after = self._remember(memory, value, action)
        return torch.cat([memories, after[:, None]], 1), posteriors, values

    def _remember(self, memory: Tensor, value: Tensor, action: Tensor) -> Tensor:
        """Return the memory after a state and the standardised action that follows it."""
        if not self.takes_actions:
            action = memory.new_zeros(len(memory), max(1, self.shape.action_dim))
        found: Tensor = self.memory(memory, value, action)
        return found

    def _choose(self, parameters: Tensor) -> Tensor:
        """Draw values while training; otherwise return the most probable ones."""
        if not self.training:
            return self.latent.mode(parameters)
        size = (*parameters.shape[:-1], self.latent.variables)
        return self.latent.sample(parameters, self.latent.draw(size, device=parameters.device))

    def _draw(self, parameters: Tensor, generators: Generators | None, samples: int) -> Tensor:
        """Return values of the prior [E * S, …]; all S of an episode see the same noise."""
        if generators is None:
            return self.latent.mode(parameters)
        noise = draw_noise(self.latent.draw, (self.latent.variables,), generators, parameters, samples)
        return self.latent.sample(parameters, noise, self.temperature)

    def _decode(self, memory: Tensor, value: Tensor) -> dict[str, Tensor]:
        """Return tokens and proprio of states [..., deter] and [..., size], standardised."""
        tokens, proprio = (
            self.decoder(torch.cat([memory, value], -1)).float().split([self.values, self.proprio_size], -1)
        )
        return {"tokens": tokens, "proprio": proprio}

    def _predict(self, memory: Tensor, value: Tensor) -> dict[str, Tensor]:
        """Return the outputs of the heads for the steps to states."""
        state: Any = torch.cat([memory, value], -1)
        return {name: head(state).float() for name, head in self.heads.items()}


def average(each: Tensor, weight: Tensor | None) -> Tensor:
    """Average losses of frames or steps [B, T], with weights where these differ."""
    return (each if weight is None else each * weight).mean()
