"""What can be set in a training: every field of `Settings` is a flag of train.py (ours)."""

import argparse
from dataclasses import dataclass, field, fields

from data import InputError
from magicvideo import PRESETS

STAGES = ("vae", "image", "video")
LATER = ("interpolate", "upscale")  # what follows the key frames, trained one by one
EVERY = STAGES + LATER


def setting(default, text: str):
    """A field of Settings and the flag of the same name, with its line of help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Settings:
    """What a run is made of; every field is a flag, its default that of the tiny preset."""

    data: str = setting("shapes", 'folder of clips, or "shapes" for the embedded data set')
    preset: str = setting("tiny", "sizes of the model: tiny, small or paper")
    stage: str = setting("", "vae, image, video, interpolate or upscale; without it the first three")
    init_from: str = setting("", "model.pt or Stable Diffusion folder to start from; each --stage but vae needs one")
    train: str = setting("all", '"all" weights (paper), or "new": adaptors, temporal attention and FPS alone')
    freeze: str = setting("", "weights whose names hold one of these words stay as they are; commas between")
    decoder_only: bool = setting(False, "stage vae: the encoder stays as it is, so that latents mean what they did")
    frames: int = setting(0, "frames of a clip; 0 = as many as the preset has")
    vae_steps: int = setting(800, "steps of stage vae, 0 leaves it out")
    image_steps: int = setting(300, "the same of stage image")
    video_steps: int = setting(3400, "the same of stage video")
    interpolate_steps: int = setting(2000, "the same of stage interpolate")
    upscale_steps: int = setting(2000, "the same of stage upscale")
    batch_size: int = setting(16, "clips a step, of each process; in stage image as many single frames as these have")
    vae_batch_size: int = setting(12, "frames a step of stage vae, of each process")
    parts: int = setting(2, "parts of a U-Net batch: on a CPU side by side, on a GPU in turn (less memory)")
    lr: float = setting(2.5e-3, "highest learning rate of the U-Net, after warm-up; it falls to 0 as a cosine")
    muon_lr: float = setting(0.02, "the same of the matrices, which Muon moves; 0 = AdamW moves them as all else")
    new_parts_lr: float = setting(5.0, "how much faster new parts (adaptors above all) learn where AdamW moves them")
    vae_lr: float = setting(3e-3, "highest learning rate of the VAE")
    warmup: int = setting(50, "steps over which the learning rate rises")
    ema: float = setting(0.995, "decay of the moving average of the weights, reached by way of (1 + n) / (10 + n)")
    kl_weight: float = setting(2e-3, "weight of the KL term of the VAE")
    thumbnail: float = setting(0.1, "weight of the VAE's term that makes three latents a thumbnail of the frame")
    latent_noise: float = setting(0.0, "of the encoder's noise, how much the U-Net trains on: 0 = means, 1 = as SD")
    text_dropout: float = setting(0.1, "part of the captions left out: the unconditional branch of guidance")
    word_dropout: float = setting(0.0, "part of the words left out of the other captions, each by chance")
    precision: str = setting("fp32", '"fp32", or "bf16": products in bfloat16, weights and sums in float32')
    gradient_checkpointing: bool = setting(False, "keep less of the U-Net for the way back, compute it twice")
    cache: int = setting(3600, "clips, cut at random, that are encoded once for all steps; 0 = encoded in every step")
    workers: int = setting(0, "processes that read clips ahead of the steps; 0 = read between them")
    compile: bool = setting(False, "torch.compile the U-Net: minutes at first, then faster steps")
    save_every: int = setting(500, "steps between checkpoints")
    sample_every: int = setting(500, "steps between pictures in OUT/samples; 0 = none")
    seed: int = setting(0, "of weights, data and noise")

    def steps(self, stage: str) -> int:
        """How many steps a stage has."""
        return {"vae": self.vae_steps, "image": self.image_steps, "video": self.video_steps,
                "interpolate": self.interpolate_steps, "upscale": self.upscale_steps}[stage]


# where larger models train with other settings (untried beyond a few steps: no GPU has run them yet)
PRESET_SETTINGS = {
    "tiny": {},
    "small": {"parts": 1, "cache": 0, "workers": 4, "muon_lr": 0.0, "thumbnail": 0.0, "latent_noise": 1.0,
              "new_parts_lr": 1.0, "kl_weight": 1e-4, "batch_size": 8, "vae_batch_size": 16, "lr": 2e-4, "vae_lr": 2e-4,
              "ema": 0.9995, "warmup": 500,
              "vae_steps": 30_000, "image_steps": 50_000, "video_steps": 100_000,
              "interpolate_steps": 50_000, "upscale_steps": 50_000},
    "paper": {"parts": 1, "cache": 0, "workers": 4, "muon_lr": 0.0, "thumbnail": 0.0, "latent_noise": 1.0,
              "new_parts_lr": 1.0, "kl_weight": 1e-4, "batch_size": 1, "vae_batch_size": 8, "lr": 5e-5, "vae_lr": 5e-5,
              "ema": 0.9999, "warmup": 1000, "precision": "bf16", "gradient_checkpointing": True,
              "vae_steps": 50_000, "image_steps": 100_000, "video_steps": 200_000,
              "interpolate_steps": 100_000, "upscale_steps": 100_000},
}


def read_flags(arguments: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """The command line -> (--out, --resume, --device) and the settings that were given, by name."""
    parser = argparse.ArgumentParser(description="Trains MagicVideo; without flags vae, image and video, on shapes.")
    for f in fields(Settings):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument("--" + f.name.replace("_", "-"), **kind, default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} (default, of tiny: {f.default})".replace("%", "%%"))
    parser.add_argument("--out", help="folder of the run (default: runs/shapes, runs/shapes-2, ..., a new one)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--check-data", action="store_true",
                        help="decode every clip of --data, name those that cannot be used, train nothing")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    flags = parser.parse_args(arguments)
    return flags, {f.name: getattr(flags, f.name) for f in fields(Settings) if hasattr(flags, f.name)}


def check(s: Settings) -> None:
    """Raises InputError for a setting out of range, before anything is made."""
    if s.preset not in PRESETS:
        raise InputError(f'--preset "{s.preset}": there is no such preset; use {", ".join(PRESETS)}')
    if s.stage not in ("", *EVERY):
        raise InputError(f'--stage "{s.stage}": there is no such stage; use {", ".join(EVERY)}, or leave the flag out '
                         f'for the first three')
    if s.precision not in ("fp32", "bf16"):
        raise InputError(f'--precision "{s.precision}": use fp32 or bf16')
    if s.train not in ("all", "new"):
        raise InputError(f'--train "{s.train}": use all or new')
    if s.train == "new" and s.stage != "video":
        raise InputError("--train new: the image stage has no new parts; add --stage video")
    if s.stage not in ("", "vae") and not s.init_from:
        what = "a trained VAE" if s.stage in ("image", "video") else "the model of the key frames"
        raise InputError(f"--stage {s.stage} needs {what} to start from: add --init-from MODEL.pt")
    if s.decoder_only and (s.stage != "vae" or not s.init_from):
        raise InputError("--decoder-only: for a model whose encoder is trained; add --stage vae --init-from MODEL.pt")
    at_least_one = ("batch_size", "vae_batch_size", "parts", "save_every")
    for f in fields(Settings):
        value, flag = getattr(s, f.name), "--" + f.name.replace("_", "-")
        least, most = int(f.name in at_least_one), 1 if f.name in ("ema", "text_dropout", "word_dropout") else 2**62
        if f.type is not str and not least <= value <= most:
            raise InputError(f"{flag} {value}: must be at least {least}{' and at most 1' if most == 1 else ''}")
