"""What of MONAI's networks is replaced, and that everything else is as MONAI makes it."""

import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from monai.networks.nets import UNETR, BasicUNetPlusPlus, MedNeXt, SwinUNETR
from monai.networks.nets.swin_unetr import WindowAttention, compute_mask
from torch import nn

from lib.model.nets.vision import build_vision, lay_out
from lib.model.nets.vision.resenc import plan
from lib.model.nets.vision.swin_unetr import FusedWindowAttention
from support.helpers import tiny_task

PATCH = (64, 32, 32)
LEFT_OUT = ("out.", "out_0.", "final_conv")  # the model has its own head


@pytest.mark.parametrize(
    ("vision", "build"),
    [
        ("swin_unetr", lambda: SwinUNETR(1, 1, feature_size=12)),
        ("swin_unetr_v2", lambda: SwinUNETR(1, 1, feature_size=12, use_v2=True)),
        ("unetr", lambda: UNETR(1, 1, PATCH, 12, 192, 768, 3)),
        ("unetpp", lambda: BasicUNetPlusPlus(3, 1, 1, (12, 24, 48, 96, 192, 12))),
        ("mednext", lambda: MedNeXt(3, 12, 1, 1, kernel_size=3, use_residual_connection=True)),
    ],
)
def test_a_seed_makes_monais_weights_under_monais_names(vision, build):
    """So checkpoints of before load, and what is built next draws the same numbers."""
    torch.manual_seed(3)
    plain, following = build(), torch.rand(1)
    torch.manual_seed(3)
    task = tiny_task(patch=PATCH, model={"vision": vision, "feature_size": 12, "swin_heads": 3})
    net = build_vision(task).get_submodule("net")
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


def test_resenc_halves_every_axis_of_cubic_voxels_down_to_four():
    strides, kernels = plan((128, 128, 64), (1.0, 1.0, 1.0))
    assert strides == [(1, 1, 1), *[(2, 2, 2)] * 4, (2, 2, 1)], "64 has four voxels left after four halvings"
    assert kernels == [(3, 3, 3)] * 6


def test_resenc_makes_cubes_of_long_voxels_before_it_halves_them():
    """Heart of 2 x 2 x 8 mm: 4 x 4 x 8 after one level, cubes of 8 mm after two, and no axis under four voxels."""
    strides, kernels = plan((96, 96, 16), (2.0, 2.0, 8.0))
    assert strides == [(1, 1, 1), (2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2), (1, 1, 1)]
    assert kernels == [(3, 3, 1), (3, 3, 1), *[(3, 3, 3)] * 4]


def test_resenc_never_halves_an_odd_axis():
    strides, _ = plan((48, 80, 16), (1.0, 1.0, 1.0))
    total = [1, 1, 1]
    for step in strides:
        total = [t * s for t, s in zip(total, step, strict=True)]
    assert total == [8, 16, 4], "48 to 6, 80 to 5, 16 to 4"


@pytest.mark.parametrize(("patch", "spacing"), [((64, 32, 32), [1.0, 1.0, 1.0]), ((64, 64, 16), [2.0, 2.0, 8.0])])
def test_resenc_computes_what_nnunets_own_network_computes(patch, spacing):
    task = tiny_task(patch=patch, spacing=spacing, model={"vision": "resenc", "feature_size": 8})
    backbone = build_vision(task).eval()
    strides, kernels = plan(patch, spacing)
    widths = [8, 16, 32, 64, 80, 80]
    own = {"norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"affine": True}, "nonlin": nn.LeakyReLU}
    plain = ResidualEncoderUNet(
        1, 6, widths, nn.Conv3d, kernels, strides, (1, 3, 4, 6, 6, 6), 2, 1, conv_bias=True, **own
    ).eval()
    for block in plain.modules():  # nnU-Net starts its residual branches at zero, which would hide an error
        if isinstance(block, nn.InstanceNorm3d):
            nn.init.normal_(block.weight)
    missing, unexpected = backbone.get_submodule("net").load_state_dict(plain.state_dict(), strict=False)
    assert not missing
    assert all("seg_layers" in name for name in unexpected)
    image = torch.randn(1, 1, *patch)
    with torch.no_grad():
        torch.testing.assert_close(plain.decoder.seg_layers[-1](backbone(image)), plain(image))
    shapes = [tuple(features.shape[1:]) for features in backbone.decoded(image)]
    assert [shape[0] for shape in shapes] == [64, 32, 16, 8] == list(backbone.decoder_widths)
    assert shapes[-1][1:] == patch
    for divided, (_, *size) in zip((8, 4, 2, 1), shapes, strict=True):
        assert size[0] == patch[0] // divided


def test_mednext_computes_what_monais_own_network_computes():
    backbone = build_vision(tiny_task(patch=PATCH, model={"vision": "mednext", "feature_size": 8})).eval()
    plain = MedNeXt(3, 8, 1, 2, kernel_size=3, use_residual_connection=True).eval()
    backbone.get_submodule("net").load_state_dict(plain.state_dict(), strict=False)
    image = torch.randn(1, 1, *PATCH)
    with torch.no_grad():
        torch.testing.assert_close(plain.out_0(backbone(image)), plain(image))


def test_weights_laid_out_for_a_cpu_compute_the_same():
    """Masks and gradients; the weights are the same numbers in another order, whatever network holds them."""
    image, found = torch.ones(1, 1, *PATCH).cumsum(2) / 64, []
    for laid_out in (False, True):
        torch.manual_seed(0)
        backbone = build_vision(tiny_task(patch=PATCH, model={"vision": "resenc", "feature_size": 8})).train()
        if laid_out:
            lay_out(nn.ModuleDict({"vision": backbone}), torch.device("cpu"))
        first = next(p for p in backbone.parameters() if p.dim() == 5 and p.shape[1] > 1)
        assert first.is_contiguous(memory_format=torch.channels_last_3d) == laid_out
        features = backbone(image)
        features.square().mean().backward()
        found.append((features, [p.grad for p in backbone.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    for plain, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("vision", ["resenc", "mednext"])
def test_checkpointing_changes_no_gradient(vision):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = {"vision": vision, "feature_size": 8, "checkpointing": checkpointing}
        backbone = build_vision(tiny_task(patch=PATCH, model=model)).train()
        backbone(torch.ones(1, 1, *PATCH).cumsum(2)).square().mean().backward()
        gradients.append([p.grad for p in backbone.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)
