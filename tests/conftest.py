"""What the tests share: random weights and tensors, in float64, so that a small mistake has no rounding to hide in."""

import torch
from torch import Tensor, nn

torch.set_num_threads(1)                                    # the tensors are so small that more threads only wait


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """All weights random, those that start at zero or one included, so that no mistake hides behind them."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if p.ndim == 1 or name.endswith(("scale", "shift")):
            is_factor = name.endswith("scale") or "norm" in name and name.endswith("weight")
            p.data = 0.3 * noise + is_factor                # factors around 1, biases around 0
        else:
            p.data = noise / p[0].numel() ** 0.5            # outputs about as large as inputs
    return module


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def changed(z: Tensor, frame: int) -> Tensor:
    """z (b, f, ...) with other values in one frame."""
    z = z.clone()
    z[:, frame] = randn(*z[:, frame].shape, seed=99)
    return z


def close(a: Tensor, b: Tensor, within: float) -> bool:
    """Of one shape, finite, and nowhere further apart than `within`."""
    return a.shape == b.shape and (a - b).abs().max().item() <= within
