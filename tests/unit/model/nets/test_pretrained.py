"""State dictionaries in the layouts of public files, made of MONAI's own networks, and what becomes of them."""

import argparse
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.networks.nets import UNETR, BasicUNetPlusPlus, SwinUNETR, UNet
from monai.networks.nets.swin_unetr import filter_swinunetr
from monai.networks.utils import copy_model_state

from benchmarks.accuracy.training import VisionOnly
from lib.infers.explain import concept_map
from lib.model import checkpoints
from lib.model.nets import build_model
from lib.model.nets.pretrained import load_vision_weights
from lib.model.reports.page import Examined
from lib.model.versions import Versions
from lib.tasks import TaskError
from lib.trainers.rounds import Round
from lib.trainers.roundtask import RoundTask
from support.helpers import tiny_task

PATCH = (64, 32, 32)
CLASSES = 14
CHANNELS = ("FLAIR", "T1", "T1Gd", "T2")


def network_of_others(channels=1, size=12, **more):
    """A whole network with weights that no initialisation makes."""
    torch.manual_seed(11)
    net = SwinUNETR(channels, CLASSES, feature_size=size, **more).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


@pytest.fixture(scope="module")
def theirs():
    return network_of_others()


def backbone(vision="swin_unetr", channels=1, **model):
    """One of ours with random weights."""
    torch.manual_seed(5)
    task = tiny_task(patch=PATCH, model={"vision": vision, **model})
    return build_model(task.model_copy(update={"channels": CHANNELS[:channels]})).vision.eval()


@pytest.fixture
def ours():
    return backbone()


def named(path, **changes):
    """A task that starts from a file."""
    return tiny_task(patch=PATCH, model={"vision_weights": str(path), **changes})


def four_channels(path):
    return named(path).model_copy(update={"channels": CHANNELS})


def written(folder, content):
    torch.save(content, folder / "weights.pt")
    return folder / "weights.pt"


# The layouts. Each is a name for what the public loading code reads.


def self_supervised(net):
    """MONAI's `model_swinvit.pt`: the encoder alone, older names of the MLP, the heads of its three tasks."""
    state = {f"module.{k.replace('mlp.linear', 'mlp.fc')}": v for k, v in net.swinViT.state_dict().items()}
    width = 16 * 12
    state |= {"module.rotation_head.weight": torch.randn(4, width), "module.rotation_head.bias": torch.randn(4)}
    state |= {"module.convTrans3d.weight": torch.randn(width, 1, 32, 32, 32)}
    return {"epoch": 3, "state_dict": state}


def pretrained_by_hand(net):
    """What MONAI's pre-training script saves today, on one GPU: the encoder within the network of the three tasks."""
    state = {f"swin_vit.{k}": v for k, v in net.swinViT.state_dict().items()}
    return {"epoch": 1, "state_dict": {**state, "contrastive_head.weight": torch.randn(512, 192)}}


def btcv(net):
    """The checkpoints of BTCV and BraTS, with the score as NumPy's number."""
    state = net.state_dict()
    optimizer = {"state": {0: {"step": 7}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    return {"epoch": torch.tensor(7), "best_acc": np.float64(0.8225), "state_dict": state, "optimizer": optimizer}


def model_zoo(net):
    """The model zoo's `model.pt`: names and tensors, nothing around them."""
    return net.state_dict()


def suprem(net):
    """SuPreM: the backbone within a distributed network that has heads of its own."""
    state = {f"module.backbone.{k}": v for k, v in net.state_dict().items()}
    state |= {"module.organ_embedding": torch.randn(32, 512), "module.GAP.3.weight": torch.randn(256, 192, 1, 1, 1)}
    return {"net": state, "optimizer": {}, "scheduler": {"last_epoch": 800}, "epoch": 800}


def dae(net):
    """Disruptive Autoencoders: another name for the encoder, an index more in its layers, a mask token."""
    state = {}
    for name, tensor in net.state_dict().items():
        name = name.replace("swinViT.", "encoder.")
        for n in range(1, 5):
            name = name.replace(f"encoder.layers{n}.0.", f"encoder.layers{n}.0.0.")
        state[name] = tensor
    state |= {"encoder.mask_token": torch.randn(1, 1, 12)}
    state |= {"encoder.norm.weight": torch.randn(192), "encoder.norm.bias": torch.randn(192)}
    return {"model": state}


ENCODERS = (self_supervised, pretrained_by_hand)
WHOLE = (btcv, model_zoo, suprem, dae)


def same_weights(vision, theirs):
    """Whether every tensor of a backbone is their network's of the same name."""
    weights = theirs.state_dict()
    return all(torch.equal(t, weights[name.removeprefix("net.")]) for name, t in vision.state_dict().items())


@pytest.mark.parametrize("layout", ENCODERS, ids=lambda f: f.__name__)
def test_an_encoder_alone_has_their_weights(layout, theirs, ours, tmp_path):
    report = load_vision_weights(ours, named(written(tmp_path, layout(theirs))))
    assert report.encoder == 1.0
    assert not report.spread
    assert {name.split(".")[0] for name in report.loaded} == {"swinViT"}
    assert same_weights(ours.net.swinViT, theirs.swinViT)


@pytest.mark.parametrize("layout", WHOLE, ids=lambda f: f.__name__)
def test_a_whole_network_comes_whole_but_for_its_head(layout, theirs, ours, tmp_path):
    report = load_vision_weights(ours, named(written(tmp_path, layout(theirs))))
    assert report.kept == ()
    assert {"out.conv.conv.weight", "out.conv.conv.bias"} <= {n.removeprefix("module.backbone.") for n in report.left}
    assert same_weights(ours, theirs)


def test_outputs_are_theirs(theirs, ours, tmp_path):
    """The states of the encoder, of the layout with most renamed; and with their own head the logits."""
    load_vision_weights(ours, named(written(tmp_path, dae(theirs))))
    image = torch.rand(1, 1, *PATCH)
    with torch.no_grad():
        x, early = ours.stem(image)
        maps = [x]
        for n in range(4):
            x = ours.stage(n, x)
            maps.append(x)
        states = theirs.swinViT(image, normalize=False)
        logits = theirs.out(ours.decode(image, early, maps[1:])[-1])
        for found, expected in zip((*maps, logits), (*states, theirs(image)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_of_an_encoder_alone_the_decoder_stays_and_heads_are_left(theirs, ours, tmp_path):
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    report = load_vision_weights(ours, named(written(tmp_path, self_supervised(theirs))))
    assert {name.split(".")[0] for name in report.loaded} == {"swinViT"}
    assert report.left == ("module.rotation_head.weight", "module.rotation_head.bias", "module.convTrans3d.weight")
    assert len(report.kept) > 20
    assert all(torch.equal(ours.state_dict()[f"net.{name}"], before[f"net.{name}"]) for name in report.kept)
    assert "100.0% of the encoder's parameters; as initialised: encoder1.layer" in str(report)
    assert "not used of the file: module.rotation_head.weight" in str(report)


def test_two_of_the_layouts_are_those_that_monai_reads_itself(theirs, tmp_path):
    loaded = [SwinUNETR(1, 2, feature_size=12) for _ in range(2)]
    state = self_supervised(theirs)
    loaded[0].load_from(state)
    copy_model_state(loaded[1], dae(theirs)["model"], filter_func=filter_swinunetr)
    for net in loaded:
        expected = theirs.swinViT.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in net.swinViT.state_dict().items())


# Image channels


def test_one_image_channel_into_four_answers_as_before(theirs, tmp_path):
    ours = backbone(channels=4)
    report = load_vision_weights(ours, four_channels(written(tmp_path, btcv(theirs))))
    first = ("encoder1.layer.conv1.conv.weight", "encoder1.layer.conv3.conv.weight")
    assert set(report.spread) == {"swinViT.patch_embed.proj.weight", *first}
    image = torch.rand(1, 1, *PATCH)
    with torch.no_grad():
        found = theirs.out(ours(image.expand(-1, 4, -1, -1, -1)))
        torch.testing.assert_close(found, theirs(image), rtol=1e-4, atol=1e-4)


def test_four_channels_stay_four_and_go_into_no_other_number(ours, tmp_path):
    theirs = network_of_others(channels=4)
    path = written(tmp_path, btcv(theirs))
    brain = backbone(channels=4)
    assert not load_vision_weights(brain, four_channels(path)).spread
    assert same_weights(brain, theirs)
    with pytest.raises(TaskError, match=r"It is for 4 image channels; valid are files for 1$"):
        load_vision_weights(ours, named(path))


# What is refused


def refused(ours, path):
    """The message, once it is certain that the network is as it was."""
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(TaskError) as caught:
        load_vision_weights(ours, named(path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
    assert str(caught.value).startswith(f"model.vision_weights {str(path)!r}: ")
    return str(caught.value)


def test_another_feature_size_is_named_with_the_one_that_fits(ours, tmp_path):
    message = refused(ours, written(tmp_path, btcv(network_of_others(size=24))))
    assert "swinViT.patch_embed.proj.weight is (24, 1, 2, 2, 2) in the file and (12, 1, 2, 2, 2) here" in message
    assert message.endswith("It fits with model.feature_size 24")


def test_heads_are_told_by_their_tables_although_all_else_fits(theirs, tmp_path):
    """The projections of one head and of three are of one size, and would be read as each other."""
    one = backbone(swin_heads=1)
    assert refused(one, written(tmp_path, self_supervised(theirs))).endswith("It fits with model.swin_heads 3")


def test_half_an_encoder_is_not_enough(theirs, ours, tmp_path):
    state = {k: v for k, v in theirs.state_dict().items() if "layers4" not in k}
    message = refused(ours, written(tmp_path, state))
    assert "of the encoder's parameters, and 90% are needed" in message
    assert "It lacks swinViT.layers4.0.blocks.0.norm1.weight" in message


@pytest.mark.parametrize("more", [{"use_v2": True}, {"depths": (2, 2, 6, 2)}], ids=["v2", "deeper"])
def test_a_network_that_does_more_than_ours_is_another_one(more, ours, tmp_path):
    message = refused(ours, written(tmp_path, btcv(network_of_others(**more))))
    assert "has a place here, and 90% must" in message
    assert "swinViT.layers" in message.split("No place for ")[1]


def test_the_second_version_takes_the_second_version(tmp_path):
    theirs = network_of_others(use_v2=True)
    ours = backbone("swin_unetr_v2")
    assert load_vision_weights(ours, named(written(tmp_path, btcv(theirs)), vision="swin_unetr_v2")).kept == ()
    assert same_weights(ours, theirs)


def test_two_networks_in_one_file_are_not_chosen_between(theirs, ours, tmp_path):
    state = theirs.swinViT.state_dict()
    both = {f"{side}.{k}": v for side in ("module", "backbone") for k, v in state.items()}
    assert "has two tensors for swinViT.patch_embed.proj.weight" in refused(ours, written(tmp_path, both))


def test_weights_that_are_no_numbers_are_refused(theirs, ours, tmp_path):
    state = dict(theirs.state_dict())
    state["swinViT.patch_embed.proj.bias"] = torch.full((12,), torch.nan)
    assert "NaN or infinity in swinViT.patch_embed.proj.bias" in refused(ours, written(tmp_path, state))


class Payload:
    """Runs something as soon as it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize("more", [argparse.Namespace(roi=96), Payload()], ids=["settings", "code"])
def test_nothing_but_tensors_and_plain_data_is_unpickled(more, theirs, ours, tmp_path):
    message = refused(ours, written(tmp_path, {**btcv(theirs), "args": more}))
    assert "holds more than tensors and plain data (Unsupported global: GLOBAL" in message
    assert "save its state dictionary alone" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"PK\x03\x04 cut short", "damaged, or not a file of torch.save"),
        (b"<html>404</html>", "damaged, or not a file of torch.save"),
        ({"epoch": 3, "weights": torch.ones(2)}, "90% are needed"),
        ({"epoch": 3, "args": {}}, "holds no weights by name, but epoch, args; valid are names, or under state_dict"),
        ([torch.ones(2)], "holds no weights by name, but list"),
    ],
)
def test_files_of_another_kind_are_called_so(content, message, ours, tmp_path):
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert message in refused(ours, path)


# Other backbones


def unet():
    return UNet(3, 1, 5, (12, 24, 48, 96, 192), (2, 2, 2, 2), num_res_units=2)


OTHERS = {
    "unet": unet,
    "unetpp": lambda: BasicUNetPlusPlus(3, 1, 5, (12, 24, 48, 96, 192, 12)),
    "unetr": lambda: UNETR(1, 5, PATCH, 12, 192, 768, 3),
}
WRAPPED = ("", "module.", "net.", "backbone.", "model.", "module.model.")  # UNet's own names begin with "model."


@pytest.mark.parametrize(
    ("vision", "prefix"), [*(("unet", prefix) for prefix in WRAPPED), ("unetpp", "module."), ("unetr", "backbone.")]
)
def test_the_other_backbones_take_monais_network_but_for_its_head(vision, prefix, tmp_path):
    torch.manual_seed(11)
    state = OTHERS[vision]().state_dict()
    path = written(tmp_path, {f"{prefix}{name}": tensor for name, tensor in state.items()})
    ours = backbone(vision)
    report = load_vision_weights(ours, named(path, vision=vision))
    assert report.encoder == 1.0
    assert len(report.loaded) > 10 * len(report.kept), "the last block of UNet is its head"
    assert all(torch.equal(ours.state_dict()[f"net.{name}"], state[name]) for name in report.loaded)


def test_a_vision_transformer_alone_is_the_encoder_of_unetr(tmp_path):
    torch.manual_seed(11)
    vit = UNETR(1, 5, PATCH, 12, 192, 768, 3).vit.state_dict()
    ours = backbone("unetr")
    report = load_vision_weights(ours, named(written(tmp_path, {"state_dict": vit}), vision="unetr"))
    assert report.encoder == 1.0
    state = ours.state_dict()
    assert all(torch.equal(state[f"net.{name}"], vit[name.removeprefix("vit.")]) for name in report.loaded)


def test_a_network_of_another_kind_fills_nothing(theirs, tmp_path):
    path = written(tmp_path, btcv(theirs))
    with pytest.raises(TaskError, match="fills 0% of the encoder's parameters"):
        load_vision_weights(backbone("unet"), named(path, vision="unet"))


# Where networks start


def test_a_fresh_network_starts_from_the_file_and_the_log_says_what_it_took(theirs, tmp_path, caplog):
    task = named(written(tmp_path, btcv(theirs)))
    with caplog.at_level(logging.INFO):
        model = build_model(task)
    assert same_weights(model.vision, theirs)
    assert f"model.vision_weights: {tmp_path / 'weights.pt'}: 157 of 157 tensors loaded" in caplog.text
    assert not same_weights(build_model(tiny_task()).vision, theirs)


def test_the_other_parts_start_as_without_the_file(theirs, tmp_path):
    states = []
    for task in (tiny_task(patch=PATCH), named(written(tmp_path, btcv(theirs)))):
        torch.manual_seed(2)
        states.append(build_model(task).state_dict())
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0] if not n.startswith("vision."))


def test_the_map_before_training_and_the_benchmark_start_there_too(theirs, tmp_path):
    task = named(written(tmp_path, btcv(theirs)))
    assets = build_model(tiny_task()).text.assets
    assert same_weights(concept_map.untrained(task, assets).vision, theirs)
    network, _ = VisionOnly("swin_unetr", task).net.children()
    assert same_weights(network, theirs)


def test_a_round_starts_from_the_file_until_a_version_is_served(theirs, tmp_path, caplog):
    path = written(tmp_path, btcv(theirs))
    task, versions = named(path), Versions(tmp_path / "m")
    context = SimpleNamespace(request={"seed": 0}, device=torch.device("cpu"))

    def network(parent):
        this = Round({}, [], [], Examined(task), parent=parent)
        return RoundTask(task, tmp_path / "m", this).network(context).model

    first = network(None)
    assert same_weights(first.vision, theirs)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.01)
    version = versions.publish(checkpoints.checkpoint_of(first, task, {"task": task.name}))
    path.unlink()
    with caplog.at_level(logging.INFO):
        second = network(version)
    assert "model.vision_weights is not read" in caplog.text
    assert all(torch.equal(t, first.state_dict()[name]) for name, t in second.state_dict().items())
    served, _ = checkpoints.restore_model(versions.read(version))
    assert all(torch.equal(t, first.state_dict()[name]) for name, t in served.state_dict().items())
    with pytest.raises(TaskError, match="no such file"):
        network(None)
