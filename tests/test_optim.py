"""How weights are moved: Muon, the learning rate, the moving average."""

import pytest
import torch
from torch import nn

import optim
from magicvideo import MagicVideo


def test_the_moving_average_warms_up_and_changes_places_with_the_weights():
    weight = torch.nn.Parameter(torch.zeros(1))
    average = optim.MovingAverage([weight], 0.999)
    weight.data.fill_(1)
    average.update()
    assert average.values[0].item() == pytest.approx(1 - 2 / 11)  # not 0.001: the first weights are forgotten at once
    average.swap()
    assert weight.item() == pytest.approx(9 / 11) and average.values[0].item() == 1
    average.swap()
    assert weight.item() == 1
    average.values, average.count = [torch.zeros(1)], 10**6
    average.update()
    assert average.values[0].item() == pytest.approx(0.001, rel=1e-3)


def test_the_learning_rate_rises_then_falls_to_zero():
    rates = [optim.learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) > 0.95 and rates[-1] < 0.001
    assert rates.index(max(rates)) == 9


@pytest.mark.parametrize("shape", [(8, 8), (8, 50), (50, 8), (16, 4, 3, 3), (4, 16, 3, 3)])
def test_a_step_of_muon_moves_every_direction_of_a_matrix_alike(shape):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    p.grad = torch.randn(shape) * torch.linspace(0.3, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
    before = p.detach().clone()
    optim.Muon([p], lr=0.1).step()
    moved = (before - p.detach()).flatten(1)
    values = torch.linalg.svdvals(moved) / 0.1 / max(1, moved.shape[0] / moved.shape[1]) ** 0.5
    assert 0.6 < values.min() and values.max() < 1.3
    assert (moved * p.grad.flatten(1)).sum() > 0  # downhill
    assert torch.linalg.svdvals(p.grad.flatten(1)).min() / torch.linalg.svdvals(p.grad.flatten(1)).max() < 0.7


def test_muon_equals_torchs_on_linear_layers():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    torch.manual_seed(0)
    for shape in ((12, 30), (30, 12)):
        ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
        a, b = optim.Muon([ours], lr=0.02), torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0)
        for _ in range(3):
            ours.grad = torch.randn(shape)
            theirs.grad = ours.grad.clone()
            a.step()
            b.step()
        assert (ours - 1).norm() > 0.05
        assert (ours - theirs).norm() < 0.02 * (ours - 1).norm()  # torch's works in bfloat16


def test_matrices_of_one_shape_are_moved_as_each_alone():
    torch.manual_seed(0)
    start, grads = torch.randn(3, 6, 10), torch.randn(2, 3, 6, 10)
    together, alone = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizers = [optim.Muon(together)], [optim.Muon([p]) for p in alone]
    for step in grads:
        for parameters, of_them in zip((together, alone), optimizers):
            for p, grad in zip(parameters, step):
                p.grad = grad.clone()
            for optimizer in of_them:
                optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-6) and not torch.equal(a, c) for a, b, c in zip(together, alone, start))


def test_hidden_matrices_are_muons_and_all_else_is_adamws():
    model = MagicVideo.from_preset("tiny")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [{"params": [*model.unet.parameters(), *model.text_encoder.parameters()], "factor": 2.0}]
    adamw, muon = optim.make_optimizers(model, groups, muon=True)
    of_adamw, of_muon = ([names[id(p)] for p in optimizer.param_groups[0]["params"]] for optimizer in (adamw, muon))
    assert sorted(of_adamw + of_muon) == sorted(names[id(p)] for p in groups[0]["params"])
    assert all(name.endswith("weight") and "norm" not in name and "embedding.weight" not in name
               and "adaptor" not in name and "conv_in" not in name and "conv_out" not in name for name in of_muon)
    assert {"unet.mid_block.resnets.0.conv1.weight", "unet.mid_block.attentions.0.proj_in.weight",
            "unet.mid_block.temporal_attentions.0.to_q.weight"} <= set(of_muon)
    assert adamw.param_groups[0]["factor"] == 2.0 and muon.param_groups[0]["factor"] == 1.0
    assert [type(o) for o in optim.make_optimizers(model, groups, muon=False)] == [torch.optim.AdamW]
