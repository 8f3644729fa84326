"""Learning rates and clipping of a round, by hand-derivable cases."""

import pytest
import torch
from torch import nn

from lib.tasks import Training
from lib.trainers.recipe import build_schedule, clip_gradients


def test_a_loss_that_jumps_does_not_scale_down_the_other_parts():
    calm, wild = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": [calm]}, {"params": [wild]}], lr=1.0)
    calm.grad, wild.grad = torch.tensor([0.3, 0.4]), torch.tensor([30.0, 40.0])
    assert clip_gradients(optimizer) == pytest.approx([0.5, 50.0])
    assert calm.grad.tolist() == pytest.approx([0.3, 0.4])
    assert wild.grad.tolist() == pytest.approx([0.6, 0.8])


def test_each_group_of_the_schedule_ends_at_the_least_rate():
    recipe = Training(warm_up=0.25, min_learning_rate=1e-7)
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1e-2, 1e-4)]
    optimizer = torch.optim.SGD(groups)
    schedule, rates = build_schedule(optimizer, 8, recipe), []
    for _ in range(9):
        rates.append([g["lr"] for g in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates[:3] == [pytest.approx([share * 1e-2, share * 1e-4]) for share in (1 / 3, 2 / 3, 1)]
    assert rates[5] == pytest.approx([(1e-2 + 1e-7) / 2, (1e-4 + 1e-7) / 2]), "half way down"
    assert rates[8] == pytest.approx([1e-7, 1e-7])
