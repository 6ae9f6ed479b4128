"""The decoders: the reference's sizes, any grid and image size, and a codebook that follows the tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wmcache.common.errors import UserError
from wmcache.engine.codebook import Codebook
from wmcache.trainer.decoders import Decoder, DecoderShape, build_decoder
from wmcache.trainer.decoders.vqvae import VqVaeDecoder

SMALL: dict[str, dict[str, Any]] = {
    "vqvae": {"channels": 8, "residual": 4, "blocks": 1},
    "transposed-conv": {"depth": 2},
}
REFERENCE = DecoderShape(14, 14, 384, 224)


def make(name: str, shape: DecoderShape, **options: Any) -> Decoder:
    size = shape.image_size
    statistics = {
        "tokens_mean": torch.zeros(shape.token_dim),
        "tokens_std": torch.ones(shape.token_dim),
        "images_mean": torch.zeros(3, size, size),
    }
    torch.manual_seed(0)
    return build_decoder(name, shape, options, statistics)


def layers(module: nn.Module, kind: type[nn.Module]) -> list[tuple[int, int]]:
    """Channels in and out of each layer of a kind, in order."""
    found = (part for part in module.modules() if type(part) is kind)
    return [(int(part.in_channels), int(part.out_channels)) for part in found]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("image_size", [30, 32])
def test_any_grid_becomes_an_image_of_the_size_of_the_frames(
    name: str, rows: int, columns: int, image_size: int
) -> None:
    model = make(name, DecoderShape(rows, columns, 5, image_size), **SMALL[name])
    assert model(torch.randn(3, rows * columns, 5).half()).shape == (3, 3, image_size, image_size)


def test_the_patch_decoder_has_the_references_sizes() -> None:
    with torch.device("meta"):
        model = make("vqvae", REFERENCE)
        images = model(torch.empty(1, 196, 384))
    block = [(384, 128), (128, 384)]
    assert layers(model, nn.Conv2d) == 2 * [(384, 384), *4 * block]
    assert layers(model, nn.ConvTranspose2d) == [(384, 192), (192, 384), (384, 192), (192, 3)]
    assert images.shape == (1, 3, 224, 224)


def test_each_stack_makes_the_grid_four_times_as_fine() -> None:
    with torch.device("meta"):
        model = make("vqvae", REFERENCE)
        assert isinstance(model, VqVaeDecoder)
        middle = model.first(torch.empty(1, 384, 14, 14))
        assert middle.shape == (1, 384, 56, 56)
        assert model.second(middle).shape == (1, 3, 224, 224)


def test_the_decoder_of_one_token_has_the_references_sizes() -> None:
    with torch.device("meta"):
        model = make("transposed-conv", DecoderShape(1, 1, 384, 224))
        drawn, _ = model.draw(torch.empty(1, 1, 384))
    (project,) = (part for part in model.modules() if isinstance(part, nn.Linear))
    assert (project.in_features, project.out_features) == (384, 2048)
    assert layers(model, nn.ConvTranspose2d) == [(2048, 512), (512, 256), (256, 128), (128, 64), (64, 3)]
    assert drawn.shape == (1, 3, 243, 243)


def test_the_patch_decoder_draws_a_token_where_it_is() -> None:
    model = make("vqvae", DecoderShape(12, 16, 3, 128), **SMALL["vqvae"])
    tokens = torch.zeros(1, 12 * 16, 3)
    moved = tokens.clone()
    moved[0, 16 * 5 + 9] = 1
    changed = (model.draw(moved)[0] - model.draw(tokens)[0]).abs().sum((0, 1)).nonzero()
    middle = (changed.min(0).values + changed.max(0).values) / 2
    torch.testing.assert_close(middle, 16 * torch.tensor([5.5, 9.5]), atol=8, rtol=0)


def test_the_decoder_of_few_tokens_tells_them_apart() -> None:
    model = make("transposed-conv", DecoderShape(2, 2, 3, 32), **SMALL["transposed-conv"])
    tokens = torch.randn(1, 4, 3)
    assert not torch.allclose(model(tokens), model(tokens.flip(1)))


@pytest.mark.parametrize("name", SMALL)
def test_a_few_frames_are_learned_by_heart(name: str) -> None:
    torch.manual_seed(0)
    tokens, images = torch.randn(4, 4, 6), torch.full((4, 3, 32, 32), -0.5)
    for i, image in enumerate(images):
        image[:, 8 * i : 8 * i + 8, 12:20] = 0.5  # a square that lies elsewhere in each
    model = make(name, DecoderShape(2, 2, 6, 32), **{"vqvae": {"channels": 32}, "transposed-conv": {"depth": 8}}[name])
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(200):
        optimiser.zero_grad()
        model.loss(tokens, images)["loss"].backward()
        optimiser.step()
    error = model.loss(tokens, images)["mse"].item()
    assert error < 0.1 * images.var().item()
    assert model.loss(tokens.flip(0), images)["mse"].item() > 5 * error


@pytest.mark.parametrize("name", SMALL)
def test_nothing_flows_back_into_what_made_the_tokens(name: str) -> None:
    model = make(name, DecoderShape(2, 2, 3, 32), **SMALL[name])
    weight = torch.ones((), requires_grad=True)
    model.loss(weight * torch.randn(2, 4, 3), torch.zeros(2, 3, 32, 32))["loss"].backward()
    assert weight.grad is None
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_tokens_are_standardised_and_the_mean_frame_is_added() -> None:
    shape, mean, std = DecoderShape(2, 2, 3, 32), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 2.0])
    plain = make("vqvae", shape, **SMALL["vqvae"])
    statistics = {"tokens_mean": mean, "tokens_std": std, "images_mean": torch.full((3, 32, 32), 0.25)}
    other = build_decoder("vqvae", shape, SMALL["vqvae"], statistics)
    other.load_state_dict({**plain.state_dict(), **statistics})
    tokens = torch.randn(2, 4, 3)
    torch.testing.assert_close(other(tokens * std + mean), plain(tokens) + 0.25)


def clusters() -> Tensor:
    return torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 3.0]])


def test_the_codebook_finds_the_places_of_the_tokens() -> None:
    torch.manual_seed(0)
    codebook = Codebook(8, 2, 0.9)
    for _ in range(100):
        codebook(clusters()[torch.randint(3, (16, 4))] + 0.05 * torch.randn(16, 4, 2))
    rounded, distance = codebook.eval()(clusters()[None])
    torch.testing.assert_close(rounded[0], clusters(), atol=0.1, rtol=0)
    assert distance < 0.01


def test_an_entry_moves_by_a_moving_average_and_not_by_a_gradient() -> None:
    codebook = Codebook(1, 2, 0.99)
    codebook.entries.copy_(torch.tensor([[1.0, 0.0]]))
    codebook.count.fill_(2.0)
    codebook.total.copy_(torch.tensor([[2.0, 0.0]]))
    tokens = torch.tensor([[[3.0, 1.0], [5.0, 3.0]]])
    codebook(tokens)
    expected = (0.99 * torch.tensor([2.0, 0.0]) + 0.01 * tokens[0].sum(0)) / (0.99 * 2 + 0.01 * 2)
    torch.testing.assert_close(codebook.entries[0], expected)
    assert not list(codebook.parameters())


def test_the_codebook_rests_while_it_is_only_looked_through() -> None:
    codebook = Codebook(4, 2, 0.9)
    codebook(torch.randn(8, 4, 2))
    before = codebook.entries.clone()
    codebook.eval()(torch.randn(8, 4, 2))
    assert torch.equal(codebook.entries, before)


def test_an_entry_that_no_token_is_near_to_begins_anew() -> None:
    torch.manual_seed(0)
    codebook = Codebook(2, 2, 0.5)
    codebook.entries.copy_(torch.tensor([[0.0, 0.0], [100.0, 100.0]]))
    codebook.count.copy_(torch.tensor([4.0, 4.0]))
    codebook.total.copy_(4 * codebook.entries)
    for _ in range(20):
        codebook(torch.randn(4, 2, 2))
    assert codebook.entries.abs().max() < 10


def test_commitment_is_a_part_of_the_loss() -> None:
    model = make("vqvae", DecoderShape(2, 2, 3, 32), **SMALL["vqvae"], quantize=True, codes=2, commitment=0.25)
    tokens, images = torch.randn(4, 4, 3), torch.zeros(4, 3, 32, 32)
    assert isinstance(model, VqVaeDecoder)
    assert model.codebook is not None
    model(tokens)
    model.eval()
    losses = model.loss(tokens, images)
    torch.testing.assert_close(losses["loss"] - losses["mse"], 0.25 * model.codebook(tokens)[1])


def test_what_no_decoder_has_is_refused() -> None:
    with pytest.raises(UserError, match="no decoder 'gan'"):
        make("gan", REFERENCE)
    with pytest.raises(UserError, match="no such option"):
        make("vqvae", REFERENCE, depth=3)
