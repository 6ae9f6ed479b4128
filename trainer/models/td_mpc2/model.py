"""TD-MPC2 on cached latents (arXiv 2310.16828; nicklashansen/tdmpc2).

A frame's tokens and proprio are encoded into a latent of its own, and dynamics predict the next latent: consistency, without
reconstruction. A plan maximises predicted rewards and the value of its last latent. Where the data has no reward, goals are drawn in
hindsight, and the reward is the closeness of a frame's tokens to the goal's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le, Lt
from einops import rearrange
from torch import Tensor, nn

from wmcache.cache.store import TokenStore
from wmcache.cache.windows import Goals, Windows
from wmcache.common.errors import UserError
from wmcache.common.options import Positive, ShareBelowOne, Weight, option
from wmcache.trainer.models import MODELS, Belief, DataShape, Imagined, WorldModel
from wmcache.trainer.models.recurrent import count_values
from wmcache.trainer.models.td_mpc2.parts import Agent, SimNorm, make_mlp

CONSISTENCY_WEIGHT = 20.0
ENCODER_RATE = 0.3
"""Learning rate of the encoders, relative to that of the other parameters."""
Reward = Literal["goal", "data", "none"]


@dataclass(frozen=True)
class TdMpc2Options:
    """Sizes and variants."""

    proprio: Literal["raw", "none"] = option("raw", "See raw proprio, or pixels alone.", group="Model")
    reward: Literal["auto", "goal", "data", "none"] = option(
        "auto",
        "What plans maximise: goal, closeness to goals that are drawn in hindsight; data, the reward of the store; none, so that plans "
        "compare latents; auto, the reward of the store where it has one, else goal.",
    )
    latent: Positive = option(256, "Numbers of a latent.")
    simplex: Positive = option(8, "Numbers of a latent that are normalised together, as probabilities.")
    encoder_width: Positive = option(256, "Hidden units of the encoder.")
    hidden: Positive = option(256, "Units of the two hidden layers of each other network.")
    critics: Annotated[int, Ge(2), Le(64)] = option(5, "Networks that predict values.")
    dropout: ShareBelowOne = option(0.01, "Dropout in the networks that predict values.")
    forecast: Annotated[int, Ge(1), Le(1024)] = option(3, "Latents that are predicted one from another in training.")
    step_weight: Annotated[float, Gt(0), Le(1)] = option(
        0.5, "Weight of a predicted latent in the loss, relative to the one before it."
    )
    discount: Annotated[float, Gt(0), Lt(1)] = option(
        0.95, "Discount of rewards by model step; goals in training are a geometric number of model steps away with it."
    )
    pessimism: Weight = option(
        0.0,
        "Standard deviations of the predicted values that plans subtract from their mean, for data that never grow.",
    )

    def __post_init__(self) -> None:
        """Refuse groups of different sizes."""
        if self.latent % self.simplex:
            raise UserError(f"--latent {self.latent} is not a multiple of --simplex {self.simplex}; choose one")


@MODELS.register("td-mpc2")
class TdMpc2(WorldModel):
    """TD-MPC2, see the module. Inside, frames [..., V] of V = N * D values, proprio and actions are standardised.

    A decoder, which no other part receives gradients from, shows what latents contain in the store's units. The goal is an image, so it
    has an encoder of its own where frames have proprio too, which predicts the latent of a frame from its tokens alone.
    """

    Options = TdMpc2Options
    options: TdMpc2Options

    def __init__(self, shape: DataShape, options: TdMpc2Options, statistics: Mapping[str, Tensor]) -> None:
        """Build the model, see `WorldModel`; raises UserError for a frame of too many values, or a reward that the data has not."""
        self.values = count_values(shape)
        super().__init__(shape, options, statistics)
        if options.reward == "data" and not shape.has_reward:
            raise UserError("--reward data: the store has no reward; choose goal or none")
        usual: Reward = "data" if shape.has_reward else "goal"
        self.source: Reward = usual if options.reward == "auto" else options.reward
        self.proprio_size = shape.proprio_dim if options.proprio == "raw" else 0
        latent, actions, hidden = options.latent, shape.action_dim, [options.hidden] * 2
        frame, width, norm = self.values + self.proprio_size, [options.encoder_width], SimNorm(options.simplex)
        self.encoder = make_mlp(frame, width, latent, norm=norm)
        self.goal_encoder = make_mlp(self.values, width, latent, norm=norm) if self.proprio_size else None
        self.dynamics = make_mlp(latent + actions, hidden, latent, norm=norm)
        self.decoder = make_mlp(latent, hidden[:1], frame)
        self.agent: Agent | None = None
        if self.source != "none":
            self.agent = Agent(
                latent * (2 if self.source == "goal" else 1),
                actions,
                hidden,
                critics=options.critics,
                dropout=options.dropout,
                discount=options.discount,
                has_end=self.source == "data" and shape.has_end,
            )

    @classmethod
    def configure(cls, store: TokenStore, windows: Windows, options: Any) -> Any:
        """See `Trainable.configure`; the policy has continuous actions."""
        if store.discrete and options.reward != "none":
            raise UserError(f"{store.path} has discrete actions, td-mpc2 continuous ones; choose --model rssm")
        return super().configure(store, windows, options)

    @classmethod
    def window(cls, options: TdMpc2Options, history: int) -> int:  # noqa: ARG003
        """See `Trainable.window`: a frame and those that are predicted, whatever the history."""
        return options.forecast + 1

    @classmethod
    def goals(cls, options: TdMpc2Options) -> Goals | None:
        """See `Trainable.goals`."""
        return Goals(discount=options.discount) if options.reward in ("auto", "goal") else None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `Trainable.parameter_groups`; the encoders learn more slowly."""
        encoders = [*self.encoder.parameters(), *([] if self.goal_encoder is None else self.goal_encoder.parameters())]
        slow = set(encoders)
        others = [one for one in self.parameters() if one.requires_grad and one not in slow]
        return [{"params": encoders, "scale": ENCODER_RATE}, {"params": others}]

    def after_step(self) -> None:
        """See `Trainable.after_step`."""
        if self.agent is not None:
            self.agent.follow()

    def loss(self, batch: Mapping[str, Tensor], pool: int = 1) -> dict[str, Tensor]:  # noqa: ARG002 (see `pools`)
        """Compute the consistency (equation 3), and add the losses of `Agent`, the decoder and the goal's encoder.

        See `Trainable.loss`. A step k is weighted by `step_weight` ** k.
        """
        flat, actions = self._flatten(batch["tokens"]), self._standardise(batch["action"])
        frames, ahead = torch.cat([flat, self.encode_proprio(batch["proprio"])], -1), self.options.forecast
        with torch.no_grad():
            encoded = self.encoder(frames)
        latents = self._roll_out(self.encoder(frames[:, 0]), actions[:, :ahead])
        weights = self.options.step_weight ** torch.arange(ahead + 1, device=flat.device)
        errors = (latents[:, 1:] - encoded[:, 1:]).square().mean(-1)
        losses = {"consistency": CONSISTENCY_WEIGHT * (errors * weights[:-1]).mean()}
        losses["decoder"] = F.mse_loss(self.decoder(latents.detach()).float(), frames)
        if self.goal_encoder is not None:
            losses["goal"] = CONSISTENCY_WEIGHT * F.mse_loss(self.goal_encoder(flat), encoded)
        if self.agent is not None:
            losses |= self._agent_losses(self.agent, batch, flat, latents, encoded, weights)
        parts = {name: one.detach() for name, one in losses.items()}
        return {"loss": torch.stack([*losses.values()]).sum(), **parts}

    def _agent_losses(
        self,
        agent: Agent,
        batch: Mapping[str, Tensor],
        flat: Tensor,
        latents: Tensor,
        encoded: Tensor,
        weights: Tensor,
    ) -> dict[str, Tensor]:
        """Choose goals, rewards and ends; arguments are those of `loss`, [B, T, …]."""
        actions, following, ended = self._standardise(batch["action"]), encoded[:, 1:], None
        if self.source == "goal":
            goal = self._hindsight(flat, self._flatten(batch["goal_tokens"]))
            rewards = -(flat[:, 1:] - goal[:, None]).square().mean(-1).sqrt()
            aim = self._encode_goal(goal)[:, None].expand(-1, latents.shape[1], -1)
            latents, following = torch.cat([latents, aim], -1), torch.cat([following, aim[:, 1:].detach()], -1)
        else:
            rewards = batch["reward"].float()
            if agent.end is not None:
                # No frame follows the end of an episode, nor the window's last step, which leads to an imagined latent.
                with torch.no_grad():
                    after = self.dynamics(torch.cat([encoded[:, -1], actions[:, -1]], -1))
                following, ended = torch.cat([following, after[:, None]], 1), batch["terminated"].float()
        steps = following.shape[1]
        return agent.losses(latents, actions[:, :steps], following, rewards[:, :steps], ended, weights)

    def _hindsight(self, flat: Tensor, later: Tensor) -> Tensor:
        """Choose goals [B, V]: of four rows one has a frame of its own window, one another row's goal, and two their own later frames."""
        rows = torch.arange(len(later), device=later.device)
        own = flat[rows, 1 + rows // 4 % self.options.forecast]
        kind = (rows % 4)[:, None]
        return torch.where(kind == 0, own, torch.where(kind == 1, later.roll(1, 0), later))

    def start(self, count: int) -> Belief:
        """See `WorldModel.start`. A belief is the latent of the newest frame."""
        return {"latent": torch.zeros(count, self.options.latent, device=self.tokens_mean.device)}

    def observe(self, belief: Belief, tokens: Tensor, proprio: Tensor, previous_action: Tensor | None) -> Belief:  # noqa: ARG002
        """See `WorldModel.observe`."""
        return {"latent": self.encoder(torch.cat([self._flatten(tokens), self.encode_proprio(proprio)], -1))}

    def imagine(
        self,
        belief: Belief,
        actions: Tensor,
        generators: Sequence[torch.Generator] | None = None,  # noqa: ARG002 (see `draws`)
    ) -> Imagined:
        """See `WorldModel.imagine`. `state` has the latent before each step, its action, and the latent after it."""
        samples, moves = actions.shape[1], self._standardise(actions).flatten(0, 1)
        latents = self._roll_out(belief["latent"].repeat_interleave(samples, 0), moves)
        before, after = latents[:, :-1], latents[:, 1:]
        frames: Tensor = self.decoder(after).float()
        tokens, proprio = frames[..., : self.values], frames[..., self.values :]
        tokens = rearrange(tokens, "b t (n d) -> b t n d", n=self.shape.tokens) * self.tokens_std + self.tokens_mean
        found = {"latents": tokens, "proprio": proprio, "state": torch.cat([before, moves, after], -1)}
        if self.agent is not None and self.source == "data":
            found |= {"reward": self.agent.rewards(before, moves), "continues": self.agent.continues(before, moves)}
            found["value"] = self.agent.value(after[:, -1:], self.options.pessimism)
        return Imagined(**{name: rearrange(one, "(e s) ... -> e s ...", s=samples) for name, one in found.items()})

    def cost(self, imagined: Imagined, goal: Tensor) -> Tensor:
        """See `WorldModel.cost`: the sum over steps is the negative return to the goal, that after the last step by the value.

        Without rewards of goals it is the distance of latents from the goal's.
        """
        assert imagined.state is not None
        latent, actions = self.options.latent, self.shape.action_dim
        before, moves, after = torch.split(imagined.state, [latent, actions, latent], -1)
        aim = self._encode_goal(self._flatten(goal))[:, None, None].expand_as(after)
        if self.agent is None or self.source != "goal":
            distance: Tensor = (after - aim).square().mean(-1)
            return distance
        discounts = self.options.discount ** torch.arange(after.shape[2] + 1, device=after.device)
        rewards = self.agent.rewards(torch.cat([before, aim], -1), moves)
        value = self.agent.value(torch.cat([after, aim], -1)[:, :, -1:], self.options.pessimism)
        returns: Tensor = discounts[:-1] * rewards + F.pad(discounts[-1] * value, (after.shape[2] - 1, 0))
        return -returns

    @property
    def has_policy(self) -> bool:
        """See `Proposes`."""
        return self.agent is not None

    @torch.no_grad()
    def propose(
        self, belief: Belief, generators: Sequence[torch.Generator], *, goal: Tensor | None, horizon: int, count: int
    ) -> Tensor:
        """See `Proposes`; the policy acts in its own imagination."""
        assert self.agent is not None
        latent = belief["latent"].repeat_interleave(count, 0)
        aim = latent[:, :0]
        if self.source == "goal" and goal is not None:
            aim = self._encode_goal(self._flatten(goal)).repeat_interleave(count, 0)
        actions: list[Tensor] = []
        for _ in range(horizon):
            drawn = [torch.randn(count, self.shape.action_dim, generator=one) for one in generators]
            action, _ = self.agent.policy(torch.cat([latent, aim], -1), torch.cat(drawn).to(latent.device))
            actions.append(action)
            latent = self.dynamics(torch.cat([latent, action], -1))
        found = torch.stack(actions, 1) * self.action_std + self.action_mean
        return rearrange(found, "(e k) t a -> e k t a", k=count)

    def _roll_out(self, latent: Tensor, actions: Tensor) -> Tensor:
        """Return latents [B, T + 1, L] from the first one on."""
        latents = [latent]
        for action in actions.unbind(1):
            latents.append(self.dynamics(torch.cat([latents[-1], action], -1)))
        return torch.stack(latents, 1)

    def _encode_goal(self, flat: Tensor) -> Tensor:
        encoder: nn.Module = self.encoder if self.goal_encoder is None else self.goal_encoder
        found: Tensor = encoder(flat)
        return found

    def _standardise(self, action: Tensor) -> Tensor:
        return (action - self.action_mean) / self.action_std

    def _flatten(self, tokens: Tensor) -> Tensor:
        """Standardise tokens [..., N, D] of the store, [..., V]."""
        return ((tokens.float() - self.tokens_mean) / self.tokens_std).flatten(-2)
