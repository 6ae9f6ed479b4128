"""The losses and rollouts of IRIS as slow, independent code, one token after the other, with nothing kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GRID = (2, 4)
"""Of the tokens of a frame."""


def standardised(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"tokens": "tokens", "proprio": "proprio", "action": "action"}
    return {
        name: (batch[name] - getattr(model, f"{of}_mean")) / getattr(model, f"{of}_std") for name, of in names.items()
    }


def slow_codes(tokenizer: Any, frame: Tensor) -> tuple[list[int], Tensor, Tensor]:
    """Numbers, outputs and entries [K, dim] of the codes of a frame [N, D], with PyTorch's own pooling."""
    x = F.gelu(frame @ tokenizer.read.weight.T + tokenizer.read.bias + tokenizer.read_position)
    x = F.adaptive_avg_pool2d(x.T.unflatten(1, GRID), tokenizer.cells)
    x = F.gelu(x + tokenizer.mix_read(x[None])[0])
    outputs = tokenizer.to_codes(x.flatten(1).T).reshape(-1, tokenizer.code_dim)
    numbers = []
    for k, output in enumerate(outputs):
        entries = tokenizer.books[k % tokenizer.groups].entries
        numbers.append(int((entries - output).square().sum(1).argmin()))
    return (
        numbers,
        outputs,
        torch.stack([tokenizer.books[k % tokenizer.groups].entries[i] for k, i in enumerate(numbers)]),
    )


def slow_decoded(tokenizer: Any, entries: Tensor) -> Tensor:
    """[K, dim] -> [N, D], with PyTorch's own interpolation."""
    x = tokenizer.from_codes(entries.reshape(-1, tokenizer.groups * tokenizer.code_dim)).T.unflatten(1, tokenizer.cells)
    x = F.gelu(x + tokenizer.mix_cells(F.gelu(x)[None])[0])
    x = F.interpolate(x[None], GRID, mode="bilinear")[0].flatten(1).T + tokenizer.write_position
    mixed = tokenizer.mix_written(F.gelu(x).T.unflatten(1, GRID)[None])[0].flatten(1).T
    return tokenizer.write(F.gelu(x + mixed))  # type: ignore[no-any-return]


def turn(values: Tensor, time: float) -> Tensor:
    """Rotate [heads, 2 * half] as complex numbers."""
    half = values.shape[1] // 2
    angle = torch.tensor([time * 10_000 ** (-i / half) for i in range(half)])
    rotated = torch.complex(values[:, :half], values[:, half:]) * torch.polar(torch.ones(half), angle)
    return torch.cat([rotated.real, rotated.imag], 1)


def slow_outputs(model: Any, x: list[Tensor], times: list[int], sees: Callable[[int, int], bool]) -> list[Tensor]:
    """Outputs of the transformer for tokens [width], each from all that `sees(token, other)` allows, without anything kept."""
    for block in model.transformer.blocks:
        joined = [block.qkv(block.norm_attention(one)).view(3, block.heads, -1) for one in x]
        turned = [(turn(q, time), turn(k, time), v) for (q, k, v), time in zip(joined, times, strict=True)]
        after = []
        for i, (query, _, _) in enumerate(turned):
            seen = [turned[j] for j in range(i + 1) if sees(i, j)]
            scores = torch.stack([(query * key).sum(1) for _, key, _ in seen]) / query.shape[1] ** 0.5
            attended = sum(w[:, None] * value for w, (_, _, value) in zip(scores.softmax(0), seen, strict=True))
            y = x[i] + block.out(attended.flatten())  # type: ignore[union-attr]
            after.append(y + block.mlp(block.norm_mlp(y)))
        x = after
    return [model.transformer.norm(one) for one in x]


def embed(model: Any, entries: Tensor, proprio: Tensor, action: Tensor | None) -> list[Tensor]:
    """The transformer's tokens of a frame: its codes, and where it is given the action after it."""
    layer, found = model.embed_code, []
    for k, entry in enumerate(entries):
        group = k % model.tokenizer.groups
        found.append(entry @ layer.weight[group] + layer.bias[group] + model.position[k])
    if action is not None:
        found.append(model.embed_action(torch.cat([action, proprio])) + model.position[-1])
    return found


def logits_of(model: Any, output: Tensor, k: int) -> Tensor:
    group = k % model.tokenizer.groups
    return output @ model.next_code.weight[group] + model.next_code.bias[group]  # type: ignore[no-any-return]


def slow_losses(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Averages over the frames, codes and steps of all windows, one after the other."""
    inputs, steps = standardised(model, batch), batch["tokens"].shape[1]
    found: dict[str, list[Tensor]] = {
        name: [] for name in ("tokens", "commitment", "codes", "proprio", "reward", "end")
    }
    for b in range(len(batch["tokens"])):
        coded = [slow_codes(model.tokenizer, frame) for frame in inputs["tokens"][b]]
        for (_, outputs, entries), frame in zip(coded, inputs["tokens"][b], strict=True):
            found["tokens"].append((slow_decoded(model.tokenizer, entries) - frame).square().mean())
            found["commitment"].append(0.3 * (outputs - entries).square().mean())
        x, times = [], []
        for t, (_, _, entries) in enumerate(coded):
            own = embed(model, entries, inputs["proprio"][b, t], inputs["action"][b, t])
            x, times = x + own, times + [t] * len(own)
        outputs, size = slow_outputs(model, x, times, lambda *_: True), model.codes + 1
        for t in range(steps):
            after = outputs[t * size + model.codes]
            found["reward"].append(model.two_hot.loss(model.heads["reward"](after), batch["reward"][b, t]))
            logit = model.heads["end"](after)[0]
            found["end"].append(-F.logsigmoid(logit if batch["terminated"][b, t] else -logit))
            if t + 1 == steps:
                continue
            change = inputs["proprio"][b, t + 1] - inputs["proprio"][b, t]
            found["proprio"].append((model.heads["proprio"](after) - change).square().mean())
            for k, number in enumerate(coded[t + 1][0]):
                before = after if k == 0 else outputs[(t + 1) * size + k - 1]
                found["codes"].append(-logits_of(model, before, k).log_softmax(0)[number])
    return {name: torch.stack(values).mean() for name, values in found.items()}


def roll_out_iris(
    model: Any, batch: dict[str, Tensor], observed: int, context: int, actions: Tensor
) -> tuple[Tensor, Tensor]:
    """Latents and proprio of a future [T, f * A] of the first episode; all tokens of the episode are computed again for each one.

    Frames are numbered from the first that the belief has. Observed ones see others of the belief, imagined ones `context` frames.
    """
    inputs, choice = standardised(model, batch), model.options.plan_codes
    frames = [slow_codes(model.tokenizer, frame)[2] for frame in inputs["tokens"][0, :observed]]
    proprios = list(inputs["proprio"][0, :observed])
    standard = (actions - model.action_mean) / model.action_std
    latents = []

    def run(newest: Tensor) -> list[Tensor]:
        x: list[Tensor] = []
        times: list[int] = []
        for t, entries in enumerate([*frames, newest]):
            action = standard[t] if t < len(frames) else None
            own = embed(model, entries, proprios[min(t, len(proprios) - 1)], action)
            x, times = x + own, times + [t] * len(own)

        def sees(i: int, j: int) -> bool:
            is_action = i % (model.codes + 1) == model.codes
            window = context - 1 if is_action or times[i] < observed else context
            return times[i] - times[j] <= window

        return slow_outputs(model, x, times, sees)

    for _ in range(len(actions) - observed + 1):
        known = torch.zeros(0, model.options.code_dim)
        for k in range(model.codes):
            logits = logits_of(model, run(known)[-1], k)
            entries = model.tokenizer.books[k % model.tokenizer.groups].entries
            entry = entries[logits.argmax()] if choice == "greedy" else logits.softmax(0) @ entries
            known = torch.cat([known, entry[None]])
        moved = model.heads["proprio"](run(torch.zeros(0, model.options.code_dim))[-1])
        frames.append(known)
        proprios.append(proprios[-1] + moved)
        latents.append(slow_decoded(model.tokenizer, known) * model.tokens_std + model.tokens_mean)
    return torch.stack(latents), torch.stack(proprios[observed:])
