"""What is counted: Stable Diffusion's parameters and operations, and what MagicVideo adds to them."""

import json

import pytest
import torch
from torch import nn

import benchmark
import timing
from data import InputError
from magicvideo import PRESETS
from unet3d import SpatialTransformer, UNet3D


@pytest.fixture(scope="module")
def paper():
    """The rows of preset paper: {(part, per): (parameters, operations)}."""
    return {(part.strip(), per): numbers for part, per, *numbers in benchmark.count(PRESETS["paper"])}


def test_the_image_parts_are_stable_diffusions_in_parameters_and_operations(paper):
    size, operations = paper["U-Net, image parts", "frame"]
    assert size == 859_520_964 and operations / 1e9 == pytest.approx(180.1, abs=0.05)
    (encoder, encode), (decoder, decode) = (
        paper[f"VAE {part}", "frame"] for part in ("encoder", "decoder, image parts"))
    assert encoder + decoder == 83_653_863
    assert encode / 1e9 == pytest.approx(272.7, abs=0.05) and decode / 1e9 == pytest.approx(622.2, abs=0.05)
    assert paper["text encoder", "caption"][0] == 123_060_480


def test_operations_at_twice_the_size_are_those_of_stable_diffusion():
    with torch.device("meta"):
        run = benchmark.unet_run(benchmark.UNet3D(PRESETS["paper"].unet), 1, 64, 77, video=False)
        assert benchmark.flops(run) / 1e9 == pytest.approx(803.3, abs=0.05)


def test_what_the_video_parts_add_is_counted_by_hand(paper):
    # temporal attention: four c x c matrices, a norm, one bias; per place two products with a 16 x 16 matrix
    places = {320: 5, 640: 5, 1280: 6}
    size, operations = paper["+ temporal attention", "clip"]
    assert size == sum(n * (4 * c * c + 3 * c) for c, n in places.items())
    sides = {320: 32, 640: 16}
    by_hand = 0
    for c, n in places.items():
        for side in [sides[c]] * n if c in sides else [8] * 5 + [4]:
            by_hand += side**2 * (4 * 2 * 16 * c * c + 2 * 2 * 16 * 16 * c)
    assert operations == by_hand
    # every 3x3 convolution: its output is a scale and a shift, a product and a sum a value
    widths = []
    with torch.device("meta"):
        unet = benchmark.UNet3D(PRESETS["paper"].unet)
        for module in unet.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.register_forward_hook(lambda _, inputs, z: widths.append((z.shape[1], z.numel())))
            if isinstance(module, SpatialTransformer):  # and every self-attention, as wide as its transformer
                module.register_forward_hook(lambda _, inputs, z: widths.append((z.shape[2], z.numel())))
        benchmark.unet_run(unet, 16, 32, 77, video=True)()
    assert paper["+ adaptors", "clip"] == [sum(2 * 16 * c for c, _ in widths), sum(2 * n for _, n in widths)]


def test_a_product_of_matrices_is_two_operations_a_number():
    with torch.device("meta"):
        layer, x = nn.Linear(3, 5), torch.empty(7, 3)
        assert benchmark.flops(lambda: layer(x)) == 2 * 7 * 3 * 5


def test_the_64_times_is_that_of_positions_and_attention_more(capsys):
    benchmark.show_64_times(PRESETS["paper"].unet)
    ratios = [float(line.split()[-1].replace(",", "")) for line in capsys.readouterr().out.splitlines()[2:5]]
    layers, attention, whole = ratios
    assert 62 < layers < 64 < whole < attention < 64**2


def test_the_table_has_every_preset_and_an_unknown_one_is_refused(capsys):
    benchmark.main(["--count", "--preset", "tiny"])
    assert capsys.readouterr().out.startswith("tiny: 8 frames of 64 x 64")
    with pytest.raises(InputError, match="--preset"):
        benchmark.main(["--count", "--preset", "large"])


def test_peers_have_our_number_of_parameters_within_a_tenth_and_the_shape_of_our_output(tmp_path, capsys):
    pytest.importorskip("diffusers")
    out = tmp_path / "t.json"
    benchmark.main(["--time", "--rounds", "1", "--batch-size", "2", "--device", "cpu", "--out", str(out)])
    found = json.loads(out.read_text())
    rows = {(row["kind"], row["network"]): row for row in found["rows"]}
    size = rows["training", "MagicVideo"]["parameters"]
    assert size == sum(p.numel() for p in UNet3D(PRESETS["tiny"].unet).parameters())
    for kind in ("training", "sampling"):
        for peer in ("diffusers UNet3DConditionModel", "diffusers UNetMotionModel"):
            row = rows[kind, peer]
            assert abs(row["parameters"] / size - 1) <= 0.1 and row["seconds"] > 0
            assert row["ratio"] == row["seconds"] / rows[kind, "MagicVideo"]["seconds"]
    assert found["matrix_rate"] > 1e9 and "medians of 1" in capsys.readouterr().out


def test_a_peer_that_is_not_installed_is_left_out_by_name(monkeypatch, capsys):
    monkeypatch.setattr(timing, "PEERS", {"nobody's": lambda config, width: __import__("not_installed")})
    benchmark.main(["--time", "--rounds", "1", "--batch-size", "1", "--device", "cpu"])
    assert "nobody's: left out, not installed" in capsys.readouterr().out


def test_a_peer_of_another_size_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(timing, "PEERS", {"small": lambda config, width: nn.Linear(1, 1)})
    benchmark.main(["--time", "--rounds", "1", "--batch-size", "1", "--device", "cpu"])
    assert "small: left out, no width" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [(["--rounds", "0"], "--rounds 0"), (["--batch-size", "0"], "--batch-size 0"),
                                          (["--preset", "paper"], "--preset paper: a step takes minutes")])
def test_mistakes_with_time_are_one_line(flags, words):
    with pytest.raises(InputError, match=words) as error:
        benchmark.main(["--time", "--device", "cpu", *flags])
    assert "\n" not in str(error.value)
