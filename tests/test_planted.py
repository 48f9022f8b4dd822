"""Well-known mistakes, planted one by one in the place of what is right: each must break parity.

Parity is that of tiny models with diffusers' and transformers', of the same weights, in float64.
"""

from functools import reduce
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clip_text
import unet3d
import vae
from clip_text import CLIPTextConfig, CLIPTextEncoder, Tokenizer
from conftest import close, randn, seeded, shaken
from diffusion import Diffusion
from unet3d import UNet3D, UNetConfig, per_frame

diffusers = pytest.importorskip("diffusers", reason="no diffusers to compare with")
transformers = pytest.importorskip("transformers", reason="no transformers to compare with")

Z = randn(2, 3, 4, 8, 16)
CONTEXT = randn(2, 7, 12)


def with_weights(weights: dict, ours: nn.Module) -> nn.Module:
    """Load all their weights; video parts, which they do not have, stay as they are born."""
    ours.double().load_state_dict({**ours.state_dict(), **weights})
    return ours.eval()


def unet():
    theirs = shaken(diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        cross_attention_dim=12, down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"]))
    ours = with_weights(theirs.state_dict(), UNet3D(UNetConfig(
        channels=(8, 16), attention=(True, False), layers=1, heads=2, groups=4, context_width=12,
        frames=3)))
    t = torch.tensor([981, 1])
    images = torch.stack([theirs(image, t, CONTEXT).sample for image in Z.unbind(1)], 1)
    assert close(ours(Z, t, CONTEXT), images, 1e-9)


def video_vae():
    theirs = shaken(diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1, norm_num_groups=4))
    theirs.quant_conv.bias[4:6] = torch.tensor([-40.0, 30.0])  # both sides of the clamp
    ours = with_weights(theirs.state_dict(), vae.VideoVAE(
        vae.VAEConfig(channels=(8, 16), layers=1, groups=4)))
    video = randn(2, 3, 3, 16, 32)
    posterior = theirs.encode(video[:, 0]).latent_dist
    latents = ours.sample_latents(*ours.encode(video), Z)
    assert close(latents[:, 0], 0.18215 * (posterior.mean + posterior.std * Z[:, 0]), 1e-9)
    assert close(ours.decode(Z)[:, 0], theirs.decode(Z[:, 0] / 0.18215).sample, 1e-9)


def text():
    tokenizer = Tokenizer([("a", "b"), ("ab", "c</w>")], context_length=8)
    captions = ["abc abcd", "", "a longer caption than eight tokens"]
    their_tokenizer = transformers.CLIPTokenizer(
        vocab=tokenizer._id_of, merges=tokenizer.merges, pad_token="<|endoftext|>")
    tokens = torch.tensor(their_tokenizer(captions, padding="max_length", max_length=8,
                                          truncation=True)["input_ids"])
    assert torch.equal(tokenizer(captions), tokens)
    theirs = shaken(transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=tokenizer.vocab_size, max_position_embeddings=8, hidden_size=24,
        intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, hidden_act="quick_gelu",
        attn_implementation="sdpa")))  # "eager" takes its softmax in float32
    weights = {f"text_model.{name.removeprefix('text_model.')}": weight  # version 5: no prefix
               for name, weight in theirs.state_dict().items() if "position_ids" not in name}
    ours = with_weights(weights, CLIPTextEncoder(CLIPTextConfig(tokenizer.vocab_size, 8, 24, 2, 4)))
    assert close(ours(tokens), theirs(tokens).last_hidden_state, 1e-9)


def sampling():
    def network(z, t, context, fps):
        return torch.sin(3 * z) + context.mean((1, 2))[:, None, None, None, None]
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        clip_sample=False, set_alpha_to_one=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(20)
    z = torch.randn(Z.shape, generator=seeded()).double()
    for t in scheduler.timesteps:
        uncond = network(z, t, 0 * CONTEXT, None)
        output = uncond + 7.5 * (network(z, t, CONTEXT, None) - uncond)
        z = scheduler.step(output, t, z).prev_sample
    ours = Diffusion().sample(network, Z.shape, CONTEXT, 0 * CONTEXT, None, steps=20, guidance=7.5,
                              generator=seeded())
    assert close(ours, z, 1e-9)


# --------------------------------------------------------------------------------------------------
# What is put where: an object, the name of its attribute, the wrong one


def around(owner, name: str, wrong) -> tuple:
    """Change a function: the wrong one gets the right one first."""
    right = getattr(owner, name)
    return owner, name, lambda *args, **kwargs: wrong(right, *args, **kwargs)


def instead(module, name: str, wrong) -> tuple:
    """Change a function of torch.nn.functional for one module alone."""
    return module, "F", SimpleNamespace(**{**vars(F), name: wrong})


def built(owner: type, change) -> tuple:
    """Change every object of a class when it is built."""
    def wrong(init, self, *args):
        init(self, *args)
        change(self)
    return around(owner, "__init__", wrong)


def setting(owner: type, path: str, value) -> tuple:
    """Change an attribute of every object of a class, or of a part of it."""
    *parts, name = path.split(".")
    return built(owner, lambda self: setattr(reduce(getattr, parts, self), name, value))


def output(owner: type, layer: str, change) -> tuple:
    """Change what a layer of a module returns, by a function of its input and output."""
    return built(owner, lambda module: module.get_submodule(layer).register_forward_hook(
        lambda _, inputs, out: change(inputs[0], out)))


def divided_by_half_minus_one(sinusoid, x, width):
    last = sinusoid(x / 10000, 2)
    return torch.cat([sinusoid(x, width - 2).unflatten(1, (2, -1)), last[..., None]], 2).flatten(1)


def time_after_norm_2(self, z, emb, adaptors):
    x = per_frame(self.conv1, F.silu(per_frame(self.norm1, z)))
    x = per_frame(self.norm2, x) + self.time_emb_proj(F.silu(emb))[..., None, None]
    x = per_frame(self.conv2, F.silu(x))
    return x + (per_frame(self.conv_shortcut, z) if self.conv_shortcut else z)


attend = F.scaled_dot_product_attention
LINEAR = (1 - torch.linspace(0.00085, 0.012, 1000)).cumprod(0).double()
MISTAKES = {
    unet: {
        "resnet norm 1, eps 1e-6": setting(unet3d.ResnetBlock, "norm1.eps", 1e-6),
        "resnet norm 2, eps 1e-6": setting(unet3d.ResnetBlock, "norm2.eps", 1e-6),
        "output norm, eps 1e-6": setting(UNet3D, "conv_norm_out.eps", 1e-6),
        "transformer norm, eps 1e-5": setting(unet3d.SpatialTransformer, "norm.eps", 1e-5),
        "layer norms, eps 1e-6": setting(unet3d.TransformerBlock, "norm2.eps", 1e-6),
        "sines first": around(unet3d, "sinusoid", lambda f, x, w: f(x, w).roll(w // 2, -1)),
        "sinusoid divided by half - 1": around(unet3d, "sinusoid", divided_by_half_minus_one),
        "no SiLU in the time path": instead(  # there emb has three axes, images have four
            unet3d, "silu", lambda x: x if x.ndim == 3 else F.silu(x)),
        "time added after norm 2": (unet3d.ResnetBlock, "forward", time_after_norm_2),
        "GEGLU's halves swapped": output(
            unet3d.GEGLU, "proj", lambda x, out: out.roll(out.shape[-1] // 2, -1)),
        "tanh GELU": instead(unet3d, "gelu", lambda x: F.gelu(x, approximate="tanh")),
        "half as many heads": setting(unet3d.Attention, "heads", 1),
        "attention scaled by the whole width": instead(
            unet3d, attend.__name__, lambda q, k, v: attend(q, k, v, scale=8**-0.5)),
        "linear projections": setting(unet3d.SpatialTransformer, "proj_in", nn.Linear(8, 8)),
        "bilinear upsampling": instead(
            unet3d, "interpolate", lambda x, **_: F.interpolate(x, None, 2, mode="bilinear")),
        "padded right and bottom": (unet3d.Downsample, "forward", lambda self, x: (
            F.conv2d(F.pad(x, (0, 1, 0, 1)), self.conv.weight, self.conv.bias, stride=2))),
    },
    video_vae: {
        "resnet norms, eps 1e-5": setting(vae.ResnetBlock, "norm1.eps", 1e-5),
        "attention norm, eps 1e-5": setting(vae.Attention, "group_norm.eps", 1e-5),
        "output norms, eps 1e-5": setting(vae.Decoder, "conv_norm_out.eps", 1e-5),
        "padded left and top": instead(vae, "pad", lambda x, sides: F.pad(x, (1, 0, 1, 0))),
        "attention's residual added twice": output(vae.Attention, "", torch.add),
        "attention without biases": setting(vae.Attention, "to_q.bias", None),
        "logvar not clamped": around(  # diffusers calls torch.clamp
            torch.Tensor, "clamp", lambda f, x, *bounds: x),
        "latents scaled before sampling": around(
            vae.VideoVAE, "sample_latents", lambda f, *args: f(*args[:3], args[3] / 0.18215)),
    },
    text: {
        "layer norms, eps 1e-6": setting(clip_text.CLIPTextLayer, "layer_norm1.eps", 1e-6),
        "exact GELU": (clip_text.MLP, "forward", lambda self, x: self.fc2(F.gelu(self.fc1(x)))),
        "no mask": instead(clip_text, attend.__name__, lambda q, k, v, **_: attend(q, k, v)),
        "no last norm": output(CLIPTextEncoder, "text_model.final_layer_norm", lambda x, out: x),
        "padding with 0": around(Tokenizer, "__call__", lambda f, self, captions: (
            f(self, captions) * (f(self, captions) != self.end))),
    },
    sampling: {
        "linear betas": setting(Diffusion, "alphas_cumprod", LINEAR),
        "no offset 1": around(
            Diffusion, "timesteps", lambda f, self, steps: [t - 1 for t in f(self, steps)]),
        "DDIM ends at 1": around(Diffusion, "alpha_bar", lambda f, d, t, _=None: f(d, t, 1.0)),
        "guidance from the text's side": around(
            Diffusion, "sample", lambda f, *a, guidance, **k: f(*a, guidance=guidance + 1, **k)),
    },
}


@torch.no_grad()
@pytest.mark.parametrize("parity", MISTAKES)
def test_nothing_planted_keeps_parity(parity):
    parity()


@torch.no_grad()
@pytest.mark.parametrize("parity, name", [(check, name) for check in MISTAKES
                                          for name in MISTAKES[check]])
def test_a_planted_mistake_breaks_parity(parity, name, monkeypatch):
    monkeypatch.setattr(*MISTAKES[parity][name])
    with pytest.raises((AssertionError, RuntimeError)) as error:  # or a weight that does not fit
        parity()
    assert error.type is AssertionError or "loading state_dict" in str(error.value)
