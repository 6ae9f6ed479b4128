"""Latent diffusion: a transformer that predicts velocities, its moving average, and the schedule of noise.

What both models of AVDC share (arXiv 2310.08576; flow-diffusion/AVDC), with a DiT (arXiv 2212.09748) in place of a U-Net: the cosine
schedule of 100 steps, v-prediction (arXiv 2202.00512, appendix D), the min-SNR weight (arXiv 2303.09556) and the moving average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from wmcache.common.errors import UserError, reason
from wmcache.trainer.models.attention import Block, angles, modulated, zero_init

NOISE_STEPS = 100
MOST_SNR = 5.0
"""Gamma of the min-SNR weight."""
AVERAGE_RATE = 0.999
SEED = 0
"""Of the noise that is the same in every use."""

Predict = Literal["change", "frame"]
Scale = Annotated[float, Gt(0), Le(100)]
SamplingSteps = Annotated[int, Ge(1), Le(NOISE_STEPS)]


@dataclass(frozen=True)
class DitSizes:
    """Sizes of the transformer."""

    width: int
    depth: int
    heads: int

    def require_even_heads(self, prefix: str = "") -> None:
        """Raise UserError where the heads do not divide the width; `prefix` is that of the flags."""
        if self.width % (2 * self.heads):
            names = f"--{prefix}width {self.width}", f"--{prefix}heads {self.heads}"
            raise UserError(f"{names[0]} is no multiple of twice {names[1]}; change one of them")


def require_sampling_steps(steps: int) -> None:
    """Raise UserError where the steps of a sample do not divide those of the schedule."""
    if NOISE_STEPS % steps:
        raise UserError(f"--sampling-steps {steps} does not divide the {NOISE_STEPS} steps of the schedule; choose 4")


class Dit(nn.Module):
    """Blocks over the tokens of a sample, each scaled and shifted by the noise step and a condition (adaLN-zero)."""

    def __init__(self, kinds: Sequence[tuple[int, int, int]], condition: int, sizes: DitSizes) -> None:
        """Build it for tokens of some kinds, each (count, channels of inputs, channels of outputs), and a condition of so many numbers."""
        super().__init__()
        width = sizes.width
        self.project_in = nn.ModuleList(nn.Linear(inputs, width) for _, inputs, _ in kinds)
        self.position = nn.Parameter(0.02 * torch.randn(sum(count for count, _, _ in kinds), width))
        self.embed_step = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_condition = nn.Linear(condition, width) if condition else None
        self.blocks = nn.ModuleList(
            Block(width, sizes.heads, width // sizes.heads, 4 * width, 0.0, conditioned=True, bias=True)
            for _ in range(sizes.depth)
        )
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(width, 2 * width)
        self.project_out = nn.ModuleList(nn.Linear(width, outputs) for _, _, outputs in kinds)
        zero_init(self.modulate, *(layer for layer in self.project_out if isinstance(layer, nn.Linear)))

    def forward(self, parts: Sequence[Tensor], condition: Tensor, steps: Tensor) -> list[Tensor]:
        """Return outputs [B, n, channels] of each kind.

        Args:
            parts: inputs [B, n, channels] of each kind.
            condition: [B, numbers]. steps: int64 [B], the noise step of each sample.
        """
        x = torch.cat([layer(part) for layer, part in zip(self.project_in, parts, strict=True)], 1)
        x = (x + self.position)[:, None]
        angle = angles(steps.float(), x.shape[-1] // 2)
        known = self.embed_step(torch.cat([angle.cos(), angle.sin()], -1))
        if self.embed_condition is not None:
            known = known + self.embed_condition(condition)
        for block in self.blocks:
            x, _ = block(x, window=1, condition=known[:, None])
        shift, scale = self.modulate(F.silu(known))[:, None].chunk(2, -1)
        found = torch.split(modulated(self.norm(x[:, 0]), shift, scale), [part.shape[1] for part in parts], 1)
        return [layer(part).float() for layer, part in zip(self.project_out, found, strict=True)]


Denoise = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Runs a `Dit` on noisy samples [B, …] at noise steps [B]; returns velocities [B, …]."""


class Diffusion(nn.Module):
    """Trains a `Dit`, and samples from its moving average. A sample [B, …] has any size; noise has a standard deviation of 1."""

    def __init__(self, network: Dit, sampling_steps: int) -> None:
        """Take the network, and in how many DDIM steps samples are made."""
        super().__init__()
        self.network, self.sampling_steps = network, sampling_steps
        self.average = AveragedModel(network, avg_fn=move_average)
        self.average.requires_grad_(False)

    @cached_property
    def scheduler(self) -> Any:
        """The schedule, a `diffusers.DDIMScheduler`."""
        scheduler = make_scheduler()
        scheduler.set_timesteps(self.sampling_steps)
        return scheduler

    def errors(self, clean: Tensor, denoise: Denoise) -> Tensor:
        """Return the squared errors [B, …] of the velocities of noisy samples, each times min(SNR, gamma) / (SNR + 1).

        That is min(SNR, gamma) times the squared error of the clean sample. While training, noise and its steps are drawn from PyTorch's
        generator, else from one with a fixed seed.
        """
        device = clean.device
        generator = None if self.training else torch.Generator(device).manual_seed(SEED)
        steps = torch.randint(NOISE_STEPS, (len(clean),), device=device, generator=generator)
        noise = torch.randn(clean.shape, device=device, generator=generator)
        noisy = self.scheduler.add_noise(clean, noise, steps)
        velocity = self.scheduler.get_velocity(clean, noise, steps)
        signal = self.scheduler.alphas_cumprod.to(device)[steps].view(-1, *[1] * (clean.ndim - 1))
        # SNR = signal / (1 - signal), with `signal` the alpha-bar of the step.
        weight = torch.minimum(signal, MOST_SNR * (1 - signal))
        errors: Tensor = weight * (denoise(self.network, noisy, steps) - velocity).square()
        return errors

    def sample(self, noise: Tensor, denoise: Denoise) -> Tensor:
        """Return what DDIM (arXiv 2010.02502, equation 12, eta = 0) makes of noise [B, …]."""
        found = noise
        for step in self.scheduler.timesteps.tolist():
            steps = torch.full((len(found),), step, device=found.device)
            found = self.scheduler.step(denoise(self.average.module, found, steps), step, found).prev_sample
        return found

    def follow(self) -> None:
        """Move the average towards the network."""
        self.average.update_parameters(self.network)


def move_average(average: Tensor, value: Tensor, updates: Tensor | int) -> Tensor:
    """Return the next moving average; its rate rises with the number of updates, so that first weights are soon forgotten."""
    rate = min(AVERAGE_RATE, (1 + int(updates)) / (10 + int(updates)))
    return average.lerp(value, 1 - rate)


def make_scheduler() -> Any:
    """Return the schedule; raises UserError where diffusers is not installed."""
    try:
        from diffusers import DDIMScheduler
    except (ImportError, RuntimeError) as error:  # a missing dependency of it is the second
        raise UserError(f"diffusers is not installed ({reason(error)}); pip install 'wmcache[avdc]'") from error
    return DDIMScheduler(
        num_train_timesteps=NOISE_STEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",  # the first step is pure noise
        clip_sample=False,
    )


def fixed_noise(*size: int) -> Tensor:
    """Return standard normal noise that is always the same."""
    return torch.randn(size, generator=torch.Generator().manual_seed(SEED), device="cpu")
