"""What the tests share: random weights and tensors, in float64, where rounding hides no mistake."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

torch.set_num_threads(1)  # the tensors are so small that more threads only wait


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Make all weights random, those that start at zero or one too: none hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if p.ndim == 1 or name.endswith(("scale", "shift")):
            is_factor = name.endswith("scale") or "norm" in name and name.endswith("weight")
            p.data = 0.3 * noise + is_factor  # factors around 1, biases around 0
        else:
            p.data = noise / p[0].numel() ** 0.5  # outputs about as large as inputs
    return module


def image_started(module: nn.Module, seed: int = 0) -> nn.Module:
    """Make the image weights random, as if trained; the video parts stay as they are born."""
    from unet3d import is_video_parameter
    state = module.state_dict()
    born = {name: p.clone() for name, p in state.items() if is_video_parameter(name)}
    shaken(module, seed).load_state_dict(born, strict=False)
    return module


def tinier() -> dict:
    """Return the fields of a preset that trains in seconds: 4 frames of 32 x 32."""
    from clip_text import CLIPTextConfig
    from unet3d import UNetConfig
    from vae import VAEConfig
    return dict(
        size=32, preset="tiny", staggered=True,
        text=CLIPTextConfig(vocab_size=560, context_length=12, width=32, layers=1, heads=2),
        vae=VAEConfig(channels=(8, 8, 8, 16), layers=1, groups=4),
        unet=UNetConfig(channels=(16, 32), attention=(True, True), layers=1, heads=2, groups=4,
                        context_width=32, frames=4))


def small_model(seed: int = 0):
    """Build a MagicVideo with all its parts that samples in milliseconds: 4 frames of 16 x 16."""
    from clip_text import CLIPTextConfig, Tokenizer
    from data import shape_captions
    from magicvideo import MagicVideo, MagicVideoConfig
    from unet3d import UNetConfig
    from vae import VAEConfig
    config = MagicVideoConfig(
        preset="tiny", size=16, guidance=2.0, staggered=True,
        text=CLIPTextConfig(vocab_size=560, context_length=12, width=16, layers=1, heads=2),
        vae=VAEConfig(channels=(8, 8, 8), layers=1, groups=4),
        unet=UNetConfig(channels=(8, 16), attention=(True, True), layers=1, heads=2, groups=4,
                        context_width=16, frames=4))
    tokenizer = Tokenizer.train(shape_captions("train"), 560, 12)
    return shaken(MagicVideo(config, tokenizer), seed).float()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def clip_of_bytes() -> Tensor:
    """Make eight frames of 48 x 64 of whole bytes in 8 colors, frames 3 and 4 equal."""
    pictures = torch.randint(2, (8, 3, 48, 64), generator=seeded()) * 100 + 15
    pictures[4] = pictures[3]
    return pictures / 127.5 - 1


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def changed(z: Tensor, frame: int) -> Tensor:
    """Change all values of one frame of z (b, f, ...)."""
    z = z.clone()
    z[:, frame] = randn(*z[:, frame].shape, seed=99)
    return z


def close(a: Tensor, b: Tensor, within: float) -> bool:
    """Tell whether two tensors have one shape and differ nowhere by more than `within`."""
    return a.shape == b.shape and (a - b).abs().max().item() <= within


def recorded(model, calls: list):
    """Make a function that does what `model` does and notes what it is given."""
    def recording(*arguments):
        calls.append(arguments)
        return model(*arguments)
    return recording


class NoFloat64(TorchDispatchMode):
    """Fail where an operation on the device "meta" reads or makes float64: Apple GPUs have none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if any(x.is_meta for x in made):
            read = [x for x in tree_leaves([args, kwargs]) if isinstance(x, Tensor)]
            assert all(x.dtype != torch.float64 for x in made + read), f"{function} in float64"
        return out
