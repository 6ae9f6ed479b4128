"""Rollouts and steps of the world models as slow, independent code that keeps nothing but frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from model_tools import SHAPE, model_inputs
from torch import Tensor

Inputs = tuple[Tensor, Tensor, Tensor]


def roll_out(name: str, model: Any, tokens: Tensor, proprio: Tensor, actions: Tensor, context: int) -> Inputs:
    """Tokens and proprio embedding as `rollout` returns them."""
    function = roll_out_ddp if name == "ddp-wm" else roll_out_dino
    inputs = model_inputs(model, {"tokens": tokens, "proprio": proprio, "action": actions})
    latents, embedding = function(model, *inputs, context)
    return latents * model.tokens_std + model.tokens_mean, embedding


def pass_over(model: Any, tokens: Tensor, embedding: Tensor, actions: Tensor, window: int) -> Any:
    """All frames at once; each sees the window that ends with it."""
    x, condition = model.join(tokens, embedding, actions)
    x = x + model.position_of(range(tokens.shape[1]))
    for block in model.blocks:
        x, _ = block(x, condition=condition, window=window)
    return model.split(x, tokens, embedding)


def roll_out_dino(model: Any, tokens: Tensor, embedding: Tensor, actions: Tensor, context: int) -> Any:
    """With learned positions each step computes the last frames again, from position 0.

    With rotary ones it computes all frames since the first that the first step saw; each of them sees the frames of a window.
    """
    observed, rotary = tokens.shape[1], model.options.position == "rope"
    if model.options.proprio != "raw" and model.options.combine == "features":  # each patch predicts its own
        embedding = embedding.expand(-1, -1, tokens.shape[2], -1)
    for end in range(observed, actions.shape[1] + 1):
        seen = slice(max(0, (observed if rotary else end) - context), end)
        if rotary:
            following = pass_over(model, tokens[:, seen], embedding[:, seen], actions[:, seen], context)
        else:
            following = model.predict(tokens[:, seen], embedding[:, seen], actions[:, seen])
        tokens = torch.cat([tokens, following[0][:, -1:]], 1)
        embedding = torch.cat([embedding, following[1][:, -1:]], 1)
    return tokens[:, observed:], embedding[:, observed:, 0]


@dataclass
class Step:
    """What follows some frames of one sequence: the patches that are `chosen`, and the `rest`."""

    chosen: list[int]
    rest: list[int]
    tokens: Tensor
    embedding: Tensor
    rest_tokens: Tensor
    rest_embedding: Tensor

    def merged(self, corrects: bool, tokens: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """The next frame; without correction the rest is copied, but for proprio, which belongs to the whole frame."""
        following = tokens.clone()
        following[self.chosen] = self.tokens
        if corrects:
            following[self.rest] = self.rest_tokens
        if len(self.embedding) == 1:
            return following, self.embedding
        embeddings = embedding.expand(len(tokens), -1).clone()
        embeddings[self.chosen] = self.embedding
        embeddings[self.rest] = self.rest_embedding if corrects else self.embedding.mean(0)
        return following, embeddings


def join(model: Any, tokens: Tensor, embedding: Tensor, action: Tensor) -> Tensor:
    beside = [model.embed_action(action).expand(len(tokens), -1)]
    if model.options.proprio != "none":
        embedded = model.embed_proprio(embedding) if model.options.proprio == "raw" else embedding
        beside.insert(0, embedded.expand(len(tokens), -1))
    return torch.cat([tokens, *beside], -1)


def attend(part: Any, x: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    attention = part.attention
    layers = (attention.q, queries), (attention.k, keys), (attention.v, values)
    q, k, v = (layer(of).unflatten(-1, (attention.heads, -1)).transpose(0, 1) for layer, of in layers)
    found = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    normed: Tensor = part.norm(x + attention.out(found.transpose(0, 1).flatten(1)))
    return normed


def fuse(fusion: Any, frames: list[Tensor]) -> Tensor:
    *past, newest = frames
    if not past:
        alone: Tensor = fusion.norm(newest)
        return alone
    keys = [frame + fusion.position + fusion.age[age] for age, frame in enumerate(reversed(past))]
    return attend(fusion, newest, newest + fusion.query_position, torch.cat(keys), torch.cat(past[::-1]))


def step_ddp(model: Any, tokens: Tensor, embedding: Tensor, action: Tensor) -> Step:
    """From tokens [n, N, D] and embedding [n, M, Q] of the last frames of one sequence and the actions [n, A]."""
    dim, end = SHAPE.token_dim, SHAPE.token_dim + embedding.shape[-1]
    frames = [join(model, *frame) for frame in zip(tokens, embedding, action, strict=True)]
    fused = fuse(model.fusion, frames)
    likely = model.localiser(fused[None])[0].amax(-1).tolist()
    chosen = sorted(sorted(range(len(likely)), key=lambda patch: -likely[patch])[: model.foreground])
    rest = [patch for patch in range(len(likely)) if patch not in chosen]

    x = model.project_in(fused[chosen]) + model.primary.position[chosen]
    for block in model.primary.blocks:
        x = block(x[None, None], window=1)[0][0, 0]
    hidden = model.primary.norm(x)
    ahead = hidden if model.primary_out is None else model.primary_out(hidden)
    values, position = model.correction.project(hidden), model.correction.position
    corrected = attend(model.correction, fused[rest], fused[rest] + position[rest], values + position[chosen], values)
    behind = corrected if model.correction_out is None else model.correction_out(corrected)

    raw = model.options.proprio == "raw"
    step = Step(chosen, rest, ahead[:, :dim], ahead[:, dim:end], behind[:, :dim], behind[:, dim:end])
    if raw:
        step.embedding = step.embedding.mean(0, keepdim=True)
    if model.options.predict == "change":
        before = embedding[-1] if raw else embedding[-1].expand(SHAPE.tokens, -1)
        step.tokens, step.rest_tokens = tokens[-1][chosen] + step.tokens, tokens[-1][rest] + step.rest_tokens
        step.embedding = step.embedding + (before if raw else before[chosen])
        if not raw:
            step.rest_embedding = before[rest] + step.rest_embedding
    return step


def roll_out_ddp(model: Any, tokens: Tensor, embedding: Tensor, actions: Tensor, context: int) -> Any:
    """One sequence after the other, each step from all frames of the context."""
    imagined = []
    for frames, embeddings, own in zip(tokens, embedding, actions, strict=True):
        seen, known = list(frames), list(embeddings)
        for end in range(len(frames), len(own) + 1):
            last = slice(max(0, end - context), end)
            # One embedding for all patches at first, one for each later.
            each = torch.stack([part.expand(max(map(len, known)), -1) for part in known[last]])
            step = step_ddp(model, torch.stack(seen[last]), each, own[last])
            following = step.merged(model.stage_name == "lrm", seen[-1], known[-1])
            seen.append(following[0])
            known.append(following[1])
        observed = len(frames)
        imagined.append((torch.stack(seen[observed:]), torch.stack([part[0] for part in known[observed:]])))
    latents, embeddings = (torch.stack(part) for part in zip(*imagined, strict=True))
    return latents, embeddings
