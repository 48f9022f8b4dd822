"""Memorize one clip (exercise 16): `python overfit.py` trains a U-Net and writes overfit.pt."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import ShapesDataset
from magicvideo import MagicVideo
from unet3d import UNet3D

GOAL = 0.06
STEPS = 300
HOME = Path(__file__).resolve().parent


def fit(unet: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
    """Train `unet` on a clip, STEPS steps of an optimizer, each on a few timesteps and noises.

    loss(t, eps), t (b,) of 0 .. 999 and eps (b, f, 4, h, w), is the loss of each, (b,); shape is
    (f, 4, h, w).
    """
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in tqdm(range(STEPS), disable=None):
        value = loss(torch.randint(1000, (4,)), torch.randn(4, *shape)).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


def losses(model: MagicVideo, unet: nn.Module) -> tuple[Callable, tuple[int, ...]]:
    """Return a clip's loss as a function of t and eps, and the shape of its latents."""
    clip = ShapesDataset("test")[0]
    with torch.no_grad():
        z0 = model.encode(clip["video"][None])
        context = model.encode_text([clip["caption"]])
    fps = torch.tensor([clip["fps"]])

    def loss(t: Tensor, eps: Tensor) -> Tensor:
        b = len(t)
        return model.diffusion.loss(unet, z0.expand(b, -1, -1, -1, -1), context.expand(b, -1, -1),
                                    fps.expand(b), t, eps)

    return loss, z0.shape[1:]


@torch.no_grad()
def measure(model: MagicVideo, unet: nn.Module) -> float:
    """Return the clip's loss over timesteps from 0 to 999 and a fixed noise."""
    loss, shape = losses(model, unet)
    t = torch.arange(0, 1000, 25)
    eps = torch.randn(len(t), *shape, generator=torch.Generator().manual_seed(1))
    return torch.cat([loss(*part) for part in zip(t.split(8), eps.split(8))]).mean().item()


def main() -> None:
    """Train and write overfit.pt; print the loss before and after."""
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    model = MagicVideo.load(HOME / "checkpoints/shapes.pt")
    unet = UNet3D(model.config.unet)  # untrained
    print(f"loss before: {measure(model, unet):.3f}, to reach: {GOAL}")
    fit(unet, *losses(model, unet))
    print(f"loss after: {measure(model, unet):.4f}")
    torch.save(unet.state_dict(), HOME / "overfit.pt")


if __name__ == "__main__":
    main()
