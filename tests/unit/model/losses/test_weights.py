"""The total: losses weighted by learned uncertainties, Eq. 15."""

import pytest
import torch
from torch import Tensor

from lib.model.losses import UncertaintyWeights


def test_uncertainty_weights_value_and_gradient():
    weights = UncertaintyWeights(2)
    assert [tuple(p.shape) for p in weights.parameters()] == [(2,)]
    with torch.no_grad():
        weights.log_sigma.copy_(torch.tensor([2.0, 0.5]).log())
    losses_ = torch.tensor([4.0, 3.0], requires_grad=True)
    total = weights(losses_)
    # 4 / (2 * 4) + log 2 + 3 / (2 / 4) + log 1/2 = 6.5; with sigma instead of sigma^2 it would be 4.
    assert total.item() == pytest.approx(6.5, rel=1e-6)
    total.backward()
    torch.testing.assert_close(losses_.grad, torch.tensor([1 / 8, 2.0]))  # 1 / (2 sigma^2)
    torch.testing.assert_close(weights.log_sigma.grad, torch.tensor([0.0, -11.0]))  # 1 - L / sigma^2
    torch.testing.assert_close(weights.sigma, torch.tensor([2.0, 0.5]))


def test_uncertainty_weights_settle_at_sigma_squared_equal_to_the_loss():
    weights = UncertaintyWeights(3)
    values = torch.tensor([0.25, 1.0, 4.0])
    optimiser = torch.optim.LBFGS(weights.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        total = weights(values)
        total.backward()
        return total

    optimiser.step(closure)
    torch.testing.assert_close(weights.sigma**2, values, rtol=1e-3, atol=0)


def test_uncertainty_weights_survive_a_checkpoint():
    trained = UncertaintyWeights(3)
    with torch.no_grad():
        trained.log_sigma.copy_(torch.tensor([-1.0, 0.5, 2.0]))
    restored = UncertaintyWeights(3)
    restored.load_state_dict(trained.state_dict())
    values = torch.tensor([1.0, 2.0, 3.0])
    assert restored(values) == trained(values) != UncertaintyWeights(3)(values)


def test_uncertainty_weights_take_mixed_precision_and_refuse_a_wrong_count():
    mixed = [torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(2.0), torch.tensor(3.0, dtype=torch.float16)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = UncertaintyWeights(3)(mixed)
    assert total.dtype == torch.float32
    assert total.item() == 3.0
    with pytest.raises(ValueError, match=r"\(2,\), expected \(3,\)"):
        UncertaintyWeights(3)(torch.ones(2))
