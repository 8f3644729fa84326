"""Weights of nnU-Net's own trainings, for the backbone that is its network."""

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import nn

from lib.model.nets import build_model
from lib.model.nets.pretrained import load_vision_weights
from lib.model.nets.vision.resenc import BLOCKS, LEVELS, WIDEST, plan
from support.helpers import tiny_task

PATCH = (64, 32, 32)


def test_a_checkpoint_of_nnunet_comes_whole_but_for_its_heads(tmp_path):
    """With deep supervision, as nnU-Net trains it, and the scores of NumPy's that it saves beside the weights."""
    model = {"vision": "resenc", "feature_size": 8, "vision_weights": str(tmp_path / "checkpoint_final.pth")}
    task = tiny_task(patch=PATCH, model=model)
    strides, kernels = plan(PATCH, task.spacing)
    widths = [min(8 * 2**n, WIDEST * 8) for n in range(LEVELS)]
    more = {"norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "nonlin": nn.LeakyReLU}
    torch.manual_seed(11)
    net = ResidualEncoderUNet(
        1, LEVELS, widths, nn.Conv3d, kernels, strides, BLOCKS, 5, 1, conv_bias=True, deep_supervision=True, **more
    )
    saved = {"network_weights": net.state_dict(), "_best_ema": np.float64(0.8), "logging": {"dice": [np.float32(0.5)]}}
    torch.save(saved, tmp_path / "checkpoint_final.pth")
    vision = build_model(task).vision
    report = load_vision_weights(vision, task)
    assert (report.encoder, report.kept) == (1.0, ())
    assert all(name.startswith("decoder.seg_layers.") for name in report.left)
    weights = net.state_dict()
    assert all(torch.equal(t, weights[name.removeprefix("net.")]) for name, t in vision.state_dict().items())
