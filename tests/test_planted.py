"""Well-known mistakes, planted one at a time in a copy of the code: each must turn the tests red.

A mistake is a line of the table "numbers that must match", done wrong as other repositories did it. `python
tests/test_planted.py` plants all and prints which tests caught them.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UNET, VAE, TEXT, DIFFUSION = "unet3d", "vae", "clip_text", "diffusion"
MISTAKES = {  # name: (file, how it is, how it would be wrong)
    "U-Net resnet norm 1, eps 1e-6": (UNET, "self.norm1 = nn.GroupNorm(config.groups, c_in, eps=1e-5)",
                                      "self.norm1 = nn.GroupNorm(config.groups, c_in, eps=1e-6)"),
    "U-Net resnet norm 2, eps 1e-6": (UNET, "self.norm2 = nn.GroupNorm(config.groups, c_out, eps=1e-5)",
                                      "self.norm2 = nn.GroupNorm(config.groups, c_out, eps=1e-6)"),
    "U-Net output norm, eps 1e-6": (UNET, "self.conv_norm_out = nn.GroupNorm(config.groups, c[0], eps=1e-5)",
                                    "self.conv_norm_out = nn.GroupNorm(config.groups, c[0], eps=1e-6)"),
    "U-Net transformer norm, eps 1e-5": (UNET, "channels, eps=1e-6", "channels, eps=1e-5"),
    "VAE norms, eps 1e-5": (VAE, "c_in, eps=1e-6", "c_in, eps=1e-5"),
    "VAE attention norm, eps 1e-5": (VAE, "channels, eps=1e-6", "channels, eps=1e-5"),
    "VAE output norms, eps 1e-5": (VAE, "c[-1], eps=1e-6", "c[-1], eps=1e-5"),
    "U-Net layer norms, eps 1e-6": (UNET, "self.norm2 = nn.LayerNorm(channels, eps=1e-5)",
                                    "self.norm2 = nn.LayerNorm(channels, eps=1e-6)"),
    "CLIP layer norms, eps 1e-6": (TEXT, "nn.LayerNorm(width, eps=1e-5)", "nn.LayerNorm(width, eps=1e-6)"),
    "sines before cosines": (UNET, "[angles.cos(), angles.sin()]", "[angles.sin(), angles.cos()]"),
    "sinusoid divided by half - 1": (UNET, "device=x.device) / half)", "device=x.device) / (half - 1))"),
    "no SiLU in the time path": (UNET, "self.time_emb_proj(F.silu(emb))", "self.time_emb_proj(emb)"),
    "time added after norm 2": (UNET, "per_frame(self.conv2, F.silu(per_frame(self.norm2, x)))",
                                "per_frame(self.conv2, F.silu(per_frame(self.norm2, z if z.shape == x.shape else x)))"),
    "GEGLU's halves swapped": (UNET, "(w_value, w_gate), (b_value, b_gate) =",
                               "(w_gate, w_value), (b_gate, b_value) ="),
    "tanh GELU": (UNET, "w_gate, b_gate))", 'w_gate, b_gate), approximate="tanh")'),
    "half as many heads": (UNET, "self.heads = heads\n        self.to_q", "self.heads = heads // 2\n        self.to_q"),
    "attention scaled by the whole width": (UNET, "F.scaled_dot_product_attention(q, k, v)))",
                                            "F.scaled_dot_product_attention(q, k, v, scale=x.shape[-1] ** -0.5)))"),
    "VAE attention's residual added twice": (VAE, "return x + out.transpose", "return 2 * x + out.transpose"),
    "VAE attention without biases": (VAE, "self.to_q = nn.Linear(channels, channels)",
                                     "self.to_q = nn.Linear(channels, channels, bias=False)"),
    "linear projections": (UNET, "self.proj_in = nn.Conv2d(channels, channels, 1)",
                           "self.proj_in = nn.Linear(channels, channels)"),
    "bilinear upsampling": (UNET, 'mode="nearest"', 'mode="bilinear"'),
    "U-Net downsampling padded right and bottom": (
        UNET, "stride=2, padding=1)\n\n    def forward(self, x: Tensor) -> Tensor:\n        return self.conv(x)",
        "stride=2)\n\n    def forward(self, x: Tensor) -> Tensor:\n        return self.conv(F.pad(x, (0, 1, 0, 1)))"),
    "VAE downsampling padded left and top": (VAE, "(0, 1, 0, 1)", "(1, 0, 1, 0)"),
    "logvar not clamped": (VAE, "logvar.clamp(-30, 20)", "logvar"),
    "latents scaled before sampling": (VAE, "(mean + (0.5 * logvar).exp() * eps) * self.config.scaling_factor",
                                       "mean * self.config.scaling_factor + (0.5 * logvar).exp() * eps"),
    "linear betas": (DIFFUSION, "torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.steps) ** 2",
                     "torch.linspace(config.beta_start, config.beta_end, config.steps)"),
    "DDIM without the offset 1": (DIFFUSION, "offset = 1 if", "offset = 0 if"),
    "DDIM ends at alpha 1": (DIFFUSION, "alpha_previous = self.alpha_bar(t, z), self.alpha_bar(previous, z)\n",
                             "alpha_previous = self.alpha_bar(t, z), self.alpha_bar(previous, z, done=1.0)\n"),
    "guidance from the text's side": (DIFFUSION, "without + guidance * (given - without)",
                                      "given + guidance * (given - without)"),
    "CLIP with the exact GELU": (TEXT, "x * torch.sigmoid(1.702 * x)", "F.gelu(x)"),
    "CLIP without its mask": (TEXT, "is_causal=True", "is_causal=False"),
    "CLIP without its last norm": (TEXT, "return self.text_model.final_layer_norm(x)", "return x"),
    "CLIP padded with 0": (TEXT, "self.context_length), self.end)", "self.context_length), 0)"),
}


WATCHED_BY = {UNET: "outputs_equal", VAE: "outputs_equal or posterior", TEXT: "transformers or padding",
              DIFFUSION: "diffusers or guidance"}  # the tests that a mistake in the file should turn red


def plant(name: str | None, file: str) -> int:
    """Plants a mistake (None: none) in a copy of the code and runs the tests that watch it: pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for source in ROOT.glob("*.py"):
            shutil.copy(source, copy)
        shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        if name:
            _, right, wrong = MISTAKES[name]
            text = (copy / f"{file}.py").read_text()
            assert right in text, f"{file}.py no longer says: {right}"
            (copy / f"{file}.py").write_text(text.replace(right, wrong))
        if (child := os.fork()) == 0:  # a fork has diffusers and transformers imported already: seconds saved each time
            os.chdir(copy)
            sys.path[:] = [str(copy), *(entry for entry in sys.path if not entry.startswith(str(ROOT)))]
            sys.dont_write_bytecode = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", f"tests/test_{file}.py", "-k",
                                  WATCHED_BY[file]]))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextConfig, CLIPTextModel  # noqa: F401
    for file in WATCHED_BY:
        print(json.dumps([f"nothing in {file}", plant(None, file)]), flush=True)
    for name, (file, _, _) in MISTAKES.items():
        print(json.dumps([name, plant(name, file)]), flush=True)


@pytest.fixture(scope="module")
def status():
    """pytest's exit status for each planted mistake, by name."""
    for package in ("diffusers", "transformers", "clip"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: nothing watches over these mistakes")
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("file", WATCHED_BY)
def test_the_tests_pass_where_nothing_is_planted(status, file):
    assert status[f"nothing in {file}"] == pytest.ExitCode.OK


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_turns_the_tests_red(status, name):
    assert status[name] == pytest.ExitCode.TESTS_FAILED


if __name__ == "__main__":
    main()
