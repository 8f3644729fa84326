"""What of MONAI's networks is replaced, and that everything else is as MONAI makes it."""

import pytest
import torch
from monai.networks.nets import UNETR, BasicUNetPlusPlus, SwinUNETR
from monai.networks.nets.swin_unetr import WindowAttention, compute_mask

from lib.model.nets.vision import FusedWindowAttention, build_vision

PATCH = (64, 32, 32)
LEFT_OUT = ("out.", "final_conv")  # the model has its own head


@pytest.mark.parametrize(
    ("vision", "build"),
    [
        ("swin_unetr", lambda: SwinUNETR(1, 1, feature_size=12)),
        ("swin_unetr_v2", lambda: SwinUNETR(1, 1, feature_size=12, use_v2=True)),
        ("unetr", lambda: UNETR(1, 1, PATCH, 12, 192, 768, 3)),
        ("unetpp", lambda: BasicUNetPlusPlus(3, 1, 1, (12, 24, 48, 96, 192, 12))),
    ],
)
def test_a_seed_makes_monais_weights_under_monais_names(vision, build):
    """So checkpoints of before load, and what is built next draws the same numbers."""
    torch.manual_seed(3)
    plain, following = build(), torch.rand(1)
    torch.manual_seed(3)
    net = build_vision(vision, 1, PATCH, 12).get_submodule("net")
    assert torch.equal(torch.rand(1), following)
    expected = {
        name: value
        for name, value in plain.state_dict().items()
        if not name.startswith(LEFT_OUT) and "cross_attn" not in name
    }
    ours = net.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    order = [name for name, _ in plain.named_parameters() if name in expected]
    assert [name for name, _ in net.named_parameters()] == order, "optimizer states are by place"
    attentions = [m for m in net.modules() if isinstance(m, WindowAttention)]
    assert all(isinstance(m, FusedWindowAttention) for m in attentions)
    assert len(attentions) == (8 if vision.startswith("swin") else 0)


@pytest.mark.parametrize("masked", [False, True])
def test_fused_window_attention_is_monais(masked):
    """Result and every gradient, for two samples of eight windows."""
    torch.manual_seed(0)
    plain = WindowAttention(12, 3, (4, 4, 4), qkv_bias=True)
    fused = FusedWindowAttention(12, 3, (4, 4, 4), qkv_bias=True)
    fused.load_state_dict(plain.state_dict())
    mask = compute_mask([8, 8, 8], (4, 4, 4), (2, 2, 2), "cpu") if masked else None
    x = torch.randn(2 * 8, 64, 12)
    results = []
    for attention in (plain, fused):
        given = x.clone().requires_grad_()
        result = attention(given, mask)
        result.square().sum().backward()
        results.append((result, given.grad, *(p.grad for p in attention.parameters())))
    for ours, theirs in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(fused(x, mask), results[0][0], rtol=1e-5, atol=1e-5)
