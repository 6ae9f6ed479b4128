"""The Robotic World Model (arXiv 2501.10100): a GRU that is trained on its own predictions, fed back with gradients.

A training window has M observed frames and N that follow. The GRU reads the observed ones, and then N times its own sampled prediction
and the next action: dual autoregression. N = 1 is teacher forcing. As in the authors' code (rsl_rl_rwm, modules/system_dynamics.py), an
ensemble is several heads on one GRU, and reward and end are predicted by a GRU of their own, trained on real frames alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from wmcache.common.errors import UserError
from wmcache.common.options import Positive, option
from wmcache.trainer.models import MODELS, Belief, DataShape, Generators, Imagined
from wmcache.trainer.models.recurrent import RecurrentModel, RecurrentOptions
from wmcache.trainer.models.stepwise import draw_noise
from wmcache.trainer.models.trainable import shifted

LEAST_LOG_STD = -5.0
"""At first; it is learned."""


@dataclass(frozen=True)
class RwmOptions(RecurrentOptions):
    """Sizes and variants."""

    tokens: Literal["all", "none"] = option("all", "Predict tokens, or proprio alone.", group="Model")
    hidden: Positive = option(256, "Units of each layer of the GRU.")
    layers: Positive = option(2, "Layers of the GRU.")
    head: Positive = option(128, "Hidden units of each head.")
    ensemble: Positive = option(1, "Heads that predict the next frame, each trained on a bootstrap of the batch.")
    observed_steps: Annotated[int, Ge(1), Le(1024)] = option(4, "Observed frames of a training window.")
    forecast: Annotated[int, Ge(1), Le(1024)] = option(
        8, "Frames that are predicted one from another; 1: teacher forcing."
    )
    vary: bool = option(
        True,
        "Draw for each batch how many frames are observed, up to --observed-steps, or observe all of them (the paper). "
        "An episode begins with a single frame.",
        flag="--vary-observed/--all-observed",
    )
    step_weight: Annotated[float, Gt(0), Le(1)] = option(
        1.0, "Weight of a predicted frame in the loss, relative to the one before it."
    )

    def __post_init__(self) -> None:
        """Refuse a model without inputs."""
        if self.tokens == "none" and self.proprio == "none":
            raise UserError(
                "--tokens none and --proprio none leave no input; choose a store with proprio, or --tokens all"
            )


class Head(nn.Module):
    """A Gaussian of the next state [..., S], whose mean is a change of the present one, from an output of the GRU."""

    def __init__(self, inputs: int, hidden: int, state: int) -> None:
        """Take sizes; the bounds of the log-std are learned."""
        super().__init__()
        self.mean, self.log_std = (make_mlp(inputs, hidden, state) for _ in range(2))
        self.lowest = nn.Parameter(torch.full((state,), LEAST_LOG_STD))
        self.log_range = nn.Parameter(torch.zeros(state))

    def forward(self, output: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation."""
        highest = self.lowest + self.log_range.exp()
        log_std = highest - F.softplus(highest - self.log_std(output).float())
        log_std = self.lowest + F.softplus(log_std - self.lowest)
        return state + self.mean(output).float(), log_std.exp()

    def bound_loss(self) -> Tensor:
        """Compute the mean distance of the bounds of the log-std."""
        return self.log_range.exp().mean()


@MODELS.register("rwm")
class RobotWorldModel(RecurrentModel):
    """RWM, see the module. A state is the tokens and the proprio of a frame, [..., S].

    An ensemble predicts the mean over its heads. Where the temperature is above 0, each episode draws a head for each model step instead
    (TS1 of arXiv 1805.12114), and from its Gaussian.
    """

    shifts = True
    Options = RwmOptions
    options: RwmOptions

    def __init__(self, shape: DataShape, options: RwmOptions, statistics: Mapping[str, Tensor]) -> None:
        """Build the model, see `WorldModel`; raises UserError for a frame of too many values."""
        super().__init__(shape, options, statistics, has_tokens=options.tokens == "all")
        state, hidden = self.values + self.proprio_size, options.hidden
        outputs = {"reward": int(shape.has_reward), "end": int(shape.has_end)}
        self.heads = nn.ModuleDict({name: make_mlp(hidden, options.head, 1) for name, has in outputs.items() if has})
        memories = ["hidden", *(["auxiliary"] if self.heads else [])]
        self.bases = nn.ModuleDict(
            {name: nn.GRU(state + shape.action_dim, hidden, options.layers, batch_first=True) for name in memories}
        )
        self.members = nn.ModuleList([Head(hidden, options.head, state) for _ in range(options.ensemble)])

    def train(self, mode: bool = True) -> Self:
        """Set the mode; cuDNN has gradients of a GRU in training mode alone, which without dropout has no other effect."""
        super().train(mode)
        self.bases.train()
        return self

    @classmethod
    def window(cls, options: RwmOptions, history: int) -> int:  # noqa: ARG003
        """See `Trainable.window`: observed and predicted frames, whatever the history."""
        return options.observed_steps + options.forecast

    @property
    def has_latents(self) -> bool:
        """See `WorldModel.has_latents`."""
        return self.values > 0

    def loss(self, batch: Mapping[str, Tensor], pool: int = 1) -> dict[str, Tensor]:  # noqa: ARG002 (see `pools`)
        """Compute the squared error of drawn states, summed over S, and the bound loss; add the losses of the heads.

        These are the MSE of the reward, and the cross-entropy of `terminated`; see `Trainable.loss`.
        """
        states = torch.cat([self._flatten(batch["tokens"]), self.encode_proprio(batch["proprio"])], -1)
        tokens, proprio, action = (shifted(batch, name) for name in ("tokens", "proprio", "action"))
        inputs = torch.cat([self._flatten(tokens), self.encode_proprio(proprio), self._standardise(action)], -1)
        observed = self.options.observed_steps
        if self.options.vary:
            observed = int(torch.randint(1, observed + 1, ()))
        length = observed + self.options.forecast
        errors, bounds = [], []
        for member in self.members:
            assert isinstance(member, Head)
            rows = torch.randint(len(states), (len(states),)) if len(self.members) > 1 else torch.arange(len(states))
            errors.append(self._errors(member, states[rows, :length], inputs[rows, :length]))
            bounds.append(member.bound_loss())
        losses = {"state": torch.stack(errors).mean(), "bound": torch.stack(bounds).mean()}
        found = {}
        if self.heads:  # they read real frames alone
            outputs, _ = self.bases["auxiliary"](inputs)
            found = {name: head(outputs)[..., 0].float() for name, head in self.heads.items()}
        if "reward" in found:
            losses["reward"] = F.mse_loss(found["reward"], batch["reward"].float())
        if "end" in found:
            losses["end"] = F.binary_cross_entropy_with_logits(found["end"], batch["terminated"].float())
        return {"loss": torch.stack([*losses.values()]).sum(), **{name: one.detach() for name, one in losses.items()}}

    def _errors(self, member: Head, states: Tensor, inputs: Tensor) -> Tensor:
        """Feed a head's samples back, and return their mean weighted error.

        Args:
            states: [B, M + N, S], to predict.
            inputs: [B, M + N, S + f * A], states and actions as the model sees them.
        """
        ahead = self.options.forecast
        observed = states.shape[1] - ahead
        outputs, memory = self.bases["hidden"](inputs[:, :observed])
        state, errors = inputs[:, observed - 1, : states.shape[2]], []
        for target, action in zip(
            states[:, observed:].unbind(1), inputs[:, observed:, states.shape[2] :].unbind(1), strict=True
        ):
            mean, std = member(outputs[:, -1], state)
            state = mean + std * torch.randn_like(mean)
            errors.append((state - target).square().sum(-1).mean())
            if len(errors) < ahead:
                outputs, memory = self.bases["hidden"](torch.cat([state, action], -1)[:, None], memory)
        weights = torch.tensor([self.options.step_weight**k for k in range(ahead)], device=states.device)
        return (weights * torch.stack(errors)).mean()

    def start(self, count: int) -> Belief:
        """See `WorldModel.start`. The memory is that of all frames but the newest one."""
        device = self.tokens_mean.device
        memory = (count, self.options.layers, self.options.hidden)
        belief = {name: torch.zeros(memory, device=device) for name in self.bases}
        sizes = {"tokens": self.values, "proprio": self.proprio_size}
        return belief | {name: torch.zeros(count, size, device=device) for name, size in sizes.items()}

    def observe(self, belief: Belief, tokens: Tensor, proprio: Tensor, previous_action: Tensor | None) -> Belief:
        """See `WorldModel.observe`."""
        memory = {name: belief[name] for name in self.bases}
        if previous_action is not None:
            memory = self._remember(belief, previous_action)
        return {**memory, "tokens": self._flatten(tokens), "proprio": self.encode_proprio(proprio)}

    def features(self, belief: Belief) -> dict[str, Tensor]:
        """See `Dreams.features`; `hidden` has all layers of the GRU, before the newest frame."""
        latent = belief["tokens"] if self.values else belief["proprio"]
        return {"latent": latent, "hidden": belief["hidden"].flatten(1)}

    def cost(self, imagined: Imagined, goal: Tensor) -> Tensor:
        """See `WorldModel.cost`."""
        return super().cost(imagined, goal) if self.has_latents else torch.zeros_like(imagined.proprio[..., 0])

    def _advance(
        self, belief: Belief, action: Tensor, generators: Generators | None, samples: int
    ) -> tuple[Belief, dict[str, Tensor]]:
        memory = self._remember(belief, action)
        state = torch.cat([belief["tokens"], belief["proprio"]], -1)
        found = [member(memory["hidden"][:, -1], state) for member in self.members]
        means, stds = (torch.stack(part) for part in zip(*found, strict=True))
        state = self._draw(means, stds, generators, samples) if generators and self.temperature else means.mean(0)
        tokens, proprio = state[..., : self.values], state[..., self.values :]
        frame = {"tokens": tokens, "proprio": proprio}
        outputs = {name: head(memory["auxiliary"][:, -1]).float() for name, head in self.heads.items()}
        return {**memory, **frame}, {**frame, **outputs}

    def _draw(self, means: Tensor, stds: Tensor, generators: Generators, samples: int) -> Tensor:
        """Draw from the Gaussians of all members [members, E * S, S]; all futures of an episode see the same noise."""
        member = functools.partial(torch.randint, len(means))
        chosen = draw_noise(member, (), generators, means[0], samples)
        normal = draw_noise(torch.randn, means.shape[-1:], generators, means[0], samples)
        rows = torch.arange(len(chosen), device=means.device)
        return means[chosen, rows] + stds[chosen, rows] * math.sqrt(self.temperature) * normal

    def _remember(self, belief: Belief, action: Tensor) -> dict[str, Tensor]:
        """Return the memory [B, layers, hidden] of each GRU after the newest frame and the action that follows it."""
        inputs = torch.cat([belief["tokens"], belief["proprio"], self._standardise(action)], -1)[:, None]
        memory = {}
        for name, base in self.bases.items():
            _, after = base(inputs, belief[name].transpose(0, 1).contiguous())
            memory[name] = after.transpose(0, 1)
        return memory


def make_mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return a perceptron with one hidden layer."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
