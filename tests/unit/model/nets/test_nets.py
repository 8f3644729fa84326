"""The network: equalities with plain BERT and plain Swin UNETR, and the defects of earlier code that must not recur."""

import builtins
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from monai.networks.nets import UNETR, BasicUNetPlusPlus, SwinUNETR, UNet
from torch import nn

from lib.model.alignment import aggregate_text, concept_weights
from lib.model.losses import alignment_loss
from lib.model.nets import build_model
from lib.model.nets.fusion import BiFusion, IdentityFusion
from lib.model.nets.vision import BACKBONES
from lib.tasks import TaskError
from lib.trainers.objective import TrainingNetwork
from support.helpers import tiny_overlapping_task, tiny_task

PATCH = (64, 32, 32)


def task_for(vision="swin_unetr", **model):
    return tiny_task(patch=PATCH, model={"vision": vision, "head": "fixed", **model})


def model_for(task=None, seed=0):
    torch.manual_seed(seed)
    return build_model(task or task_for())


def image_for(task, batch=1, seed=1):
    return torch.randn(batch, len(task.channels), *PATCH, generator=torch.Generator().manual_seed(seed))


def tensors(output):
    return [*output.class_maps, *(part for part in output if isinstance(part, torch.Tensor))]


def without_fusion(model):
    model.fusion = nn.ModuleList(IdentityFusion() for _ in range(4))
    return model


@pytest.mark.parametrize("vision", BACKBONES)
def test_output_shapes_and_gradients_of_every_backbone(vision):
    task = task_for(vision)
    network = TrainingNetwork(model_for(task), task).train()
    for block in network.modules():  # nnU-Net starts residual branches at zero: what is inside waits for a step
        if isinstance(block, nn.InstanceNorm3d) and block.affine:
            nn.init.ones_(block.weight)
    image = image_for(task, batch=2)
    output = network.model(image)
    classes, sentences = 3, 6
    assert output.logits.shape == (2, classes + 1, *PATCH)
    assert [m.shape for m in output.class_maps] == [(2, classes + 1, *(p // n for p in PATCH)) for n in (8, 4, 2)]
    assert output.concept_rows.shape == (2, classes, sentences, task.model.scratch.width)
    assert output.concepts.shape == (2, classes, sentences, task.model.projection)
    assert output.vision.shape == (2, classes, task.model.projection)

    label = torch.randint(0, classes + 1, (2, 1, *PATCH), generator=torch.Generator().manual_seed(2))
    network(image, label)["loss"].backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent, f"never trained (defect 1): {silent[:5]}"


def test_overlapping_task_has_one_channel_a_region_and_four_image_channels():
    task = tiny_overlapping_task(patch=PATCH)
    output = model_for(task)(image_for(task))
    assert output.logits.shape[1] == output.class_maps[0].shape[1] == len(task.classes) == 3


def test_identity_fusion_reproduces_bert():
    model = without_fusion(model_for()).eval()
    with torch.no_grad():
        rows = model(image_for(task_for())).concept_rows.flatten(1, 2)[0]
        text = model.text
        plain = text.bert(input_ids=text.ids, attention_mask=text.mask.long()).last_hidden_state[:, 0]
    torch.testing.assert_close(rows, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("vision", "build", "renamed"),
    [
        ("swin_unetr", lambda: SwinUNETR(1, 4, feature_size=12), "out.conv.conv"),
        ("swin_unetr_v2", lambda: SwinUNETR(1, 4, feature_size=12, use_v2=True), "out.conv.conv"),
        ("unetr", lambda: UNETR(1, 4, PATCH, 12, 192, 768, 3), "out.conv.conv"),
        ("unetpp", lambda: BasicUNetPlusPlus(3, 1, 4, (12, 24, 48, 96, 192, 12)), "final_conv_0_4"),
    ],
)
def test_identity_fusion_reproduces_monai(vision, build, renamed):
    """With MONAI's weights and no fusion, the logits are those of MONAI's own forward."""
    task = task_for(vision)
    reference, model = build().eval(), without_fusion(model_for(task)).eval()
    weights = reference.state_dict()
    model.head.load_state_dict({k: weights[f"{renamed}.{k}"] for k in ("weight", "bias")})
    _, unexpected = model.vision.net.load_state_dict(weights, strict=False)
    assert all(k.startswith(("out.", "final_conv")) or "cross_attn" in k for k in unexpected)
    image = image_for(task)
    with torch.no_grad():
        expected = reference(image)
        torch.testing.assert_close(
            model(image).logits, expected[0] if isinstance(expected, list) else expected, rtol=1e-4, atol=1e-5
        )


def test_identity_fusion_reproduces_monai_unet():
    """MONAI's UNet ends in its own output convolution; ours keeps feature_size channels there and adds the head."""
    task = task_for("unet")
    model = without_fusion(model_for(task)).eval()
    plain = UNet(3, 1, 12, (12, 24, 48, 96, 192), (2, 2, 2, 2), num_res_units=2).eval()
    plain.load_state_dict(model.vision.net.state_dict())
    image = image_for(task)
    with torch.no_grad():
        torch.testing.assert_close(model(image).logits, model.head(plain(image)), rtol=1e-4, atol=1e-5)


def test_weights_load_into_a_differently_seeded_model():
    """Defect 1: fusion and projections are saved and restored with everything else."""
    first, second = model_for(seed=0).eval(), model_for(seed=7).eval()
    image = image_for(task_for())
    with torch.no_grad():
        before = second(image)
        second.load_state_dict(first.state_dict())
        for ours, theirs, old in zip(tensors(second(image)), tensors(first(image)), tensors(before), strict=True):
            assert torch.equal(ours, theirs)
            assert not torch.equal(ours, old)


def test_decoder_receives_the_fused_maps():
    """Defect 2: changing only the fused map of any one stage changes the logits."""
    model, image = model_for().eval(), image_for(task_for())
    with torch.no_grad():
        reference = model(image).logits
        for n in range(4):
            seen: list[Any] = []
            handle = model.fusion[n].register_forward_hook(
                lambda _m, _i, out, seen=seen: (seen.append(1), (out[0], out[1] + torch.randn_like(out[1])))[1]
            )
            changed = model(image).logits
            handle.remove()
            assert seen == [1]
            assert not torch.allclose(changed, reference, atol=1e-4), f"stage {n + 1} does not reach the decoder"


def test_skips_are_taken_after_fusion():
    """Defect 2, sharper: with every encoder stage deaf to the map before it, fusion still reaches the decoder."""
    model, image = model_for().eval(), image_for(task_for())
    received = []
    decode = model.vision.decode
    model.vision.decode = lambda i, e, maps: (received.extend(maps), decode(i, e, maps))[1]
    fused = []
    for block in model.fusion:
        block.register_forward_hook(lambda _m, _i, out: fused.append(out[1]))
    with torch.no_grad():
        model(image)
    assert len(received) == 4
    assert all(a is b for a, b in zip(received, fused, strict=True))


def test_longer_padding_changes_nothing():
    """Defect 3: padding is attended in no stage."""
    model, image = model_for().eval(), image_for(task_for())
    text = model.text
    ids, mask = (nn.functional.pad(t, (0, 13)) for t in (text.ids, text.mask))
    padded = replace(text.sentences, ids=ids, mask=mask, key="padded")
    with torch.no_grad():
        for ours, theirs in zip(tensors(model(image, padded)), tensors(model(image)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_forward_reads_no_file_and_tokenises_nothing(monkeypatch):
    """Defect 4."""
    model, image = model_for().eval(), image_for(task_for())

    def forbidden(*_args, **_kwargs):
        raise AssertionError("forward must not do this")

    monkeypatch.setattr(builtins, "open", forbidden)
    monkeypatch.setattr(os, "open", forbidden)
    monkeypatch.setattr(type(model.text), "tokenize", forbidden)
    with torch.no_grad():
        assert torch.isfinite(model(image).logits).all()


def test_text_is_read_once_for_a_set_of_weights():
    model, image = model_for().eval(), image_for(task_for())
    with torch.no_grad():
        first = model(image).logits
        again = model(image).logits
        assert model.text.token_passes == 1
        assert torch.equal(first, again)
        model.text.bert.embeddings.word_embeddings.weight.add_(0.5)
        assert not torch.equal(model(image).logits, first), "stale text after the weights changed"
        assert model.text.token_passes == 2
    model.train()
    model(image_for(task_for(), batch=2))
    assert model.text.token_passes == 3, "one pass per step, not one per sample"


def test_changing_the_text_changes_the_logits():
    task = task_for()
    model, image = model_for(task).eval(), image_for(task)
    other = task.with_concepts({task.classes[0]: {"shape": "a long thin tube far away from everything"}})
    with torch.no_grad():
        changed = model(image, model.text.tokenize(other.text_rows())).logits
        assert not torch.allclose(changed, model(image).logits, atol=1e-6)


def test_batch_of_two_equals_two_batches_of_one():
    """Defect 9."""
    task = task_for()
    model, image = model_for(task).eval(), image_for(task, batch=2)
    with torch.no_grad():
        together = model(image)
        for i in range(2):
            for a, b in zip(tensors(together), tensors(model(image[i : i + 1])), strict=True):
                torch.testing.assert_close(a[i : i + 1], b, rtol=1e-3, atol=1e-4)


def test_class_order_moves_rows_and_nothing_else():
    """Rows follow their class: with the classes in another order each keeps its row, and the image map stays."""
    task = task_for()
    model, image = model_for(task).eval(), image_for(task)
    order = [2, 0, 1]
    rows = task.text_rows()
    with torch.no_grad():
        straight = model(image)
        moved = model(image, model.text.tokenize([rows[i] for i in order]))
    torch.testing.assert_close(moved.concept_rows, straight.concept_rows[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved.logits, straight.logits, rtol=1e-3, atol=1e-4)


def test_aligned_concepts_are_the_fused_ones():
    """Defect 10: the projected concepts come from the fused rows of the same forward."""
    task = task_for()
    model = model_for(task).eval()
    with torch.no_grad():
        output = model(image_for(task))
        torch.testing.assert_close(model.project_text(output.concept_rows), output.concepts)
        torch.testing.assert_close(concept_weights(output.concepts, output.vision), output.weights)
        torch.testing.assert_close(aggregate_text(output.concepts, output.weights), output.text)
        other = model(image_for(task, seed=9))
    assert not torch.allclose(other.concept_rows, output.concept_rows, atol=1e-6), "rows must see the image"


@pytest.mark.parametrize("embedding", ["decoder", "last"])
def test_alignment_can_be_learned_from_scratch(embedding):
    """Text and vision start almost equal for all classes; the class vectors must differ enough to break the tie."""
    task = task_for("unet", class_embedding=embedding)
    network = TrainingNetwork(model_for(task), task)
    image = image_for(task)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        output = network.model(image)
        losses.append(alignment_loss(output.text, output.concepts, output.vision).total)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("embedding", ["decoder", "last"])
def test_all_three_losses_fall_together(embedding):
    """Three cubes at changing places: no loss may starve another, and alignment must leave chance."""
    size = (64, 64, 64)
    rates = {"learning_rate": 1e-2, "language_learning_rate": 1e-3}
    model = {"vision": "unet", "feature_size": 8, "head": "fixed", "class_embedding": embedding}
    task = tiny_task(patch=size, model=model, training=rates)
    network = TrainingNetwork(model_for(task), task).train()
    optimizer = torch.optim.AdamW(network.parameter_groups(), lr=1e-2)
    generator, history = torch.Generator().manual_seed(0), []
    for _ in range(60):
        image, label = torch.randn(1, 1, *size, generator=generator) * 0.1, torch.zeros(1, 1, *size)
        for value, centre in enumerate([(16, 16, 32), (44, 20, 32), (32, 44, 32)], 1):
            shift = torch.randint(-8, 9, (3,), generator=generator).tolist()
            cube = tuple(slice(c + s - 9, c + s + 9) for c, s in zip(centre, shift, strict=True))
            image[0, 0][cube] += value
            label[0, 0][cube] = value
        parts = network(image, label)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        history.append(parts)
    for name in ("segmentation", "class_embedding", "alignment_global", "alignment_local"):
        first, last = (torch.stack([p[name] for p in part]).mean() for part in (history[:5], history[-5:]))
        assert last < 0.7 * first, f"{name}: {first:.3f} -> {last:.3f}"


def test_an_untrained_block_leaves_the_encoders_nearly_as_they_are():
    task = task_for()
    model, image = model_for(task).eval(), image_for(task)
    with torch.no_grad():
        fused = model(image)
        plain = without_fusion(model)(image)
    for a, b in ((fused.logits, plain.logits), (fused.concept_rows, plain.concept_rows)):
        assert 0 < (a - b).norm() / b.norm() < 0.2


def test_windowed_attention_is_full_attention_within_each_window():
    torch.manual_seed(0)
    block, width = BiFusion(8, 24, window=4), 24
    volume = torch.randn(1, width, 8, 4, 4)
    tokens = volume.flatten(2).transpose(1, 2)
    with torch.no_grad():
        windowed = block._attend_vision(tokens, volume.shape[2:]).transpose(1, 2).unflatten(2, (8, 4, 4))
        for part in (slice(0, 4), slice(4, 8)):
            cube = volume[:, :, part].flatten(2).transpose(1, 2)
            alone = block.vision_self(cube).transpose(1, 2).unflatten(2, (4, 4, 4))
            torch.testing.assert_close(windowed[:, :, part], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_finite(precision):
    task = task_for()
    network = TrainingNetwork(model_for(task), task).train()
    label = torch.zeros(1, 1, *PATCH, dtype=torch.long)  # no class present
    label[..., :8] = 1
    for target in (label, torch.zeros_like(label)):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            parts = network(image_for(task), target)
        parts["loss"].backward()
        assert all(torch.isfinite(v) for v in parts.values())
        assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_checkpointing_changes_memory_not_results():
    plain, saving = task_for(), task_for(checkpointing=True)
    gradients = []
    for task in (plain, saving):
        model = model_for(task).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(image_for(task)).logits.pow(2).mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_hub_name_without_network_is_a_clear_error():
    with pytest.raises(TaskError, match=r"no-such-org/no-such-bert.*cannot be loaded.*local folder.*scratch"):
        build_model(task_for(text="no-such-org/no-such-bert"))


def test_text_encoder_from_a_local_folder(tmp_path):
    """A folder in the Hugging Face layout, as a site without network keeps it."""
    from transformers import PreTrainedTokenizerFast

    donor = model_for()
    donor.text.bert.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=donor.text.tokenizer, pad_token="[PAD]").save_pretrained(tmp_path)
    model = model_for(task_for(text=str(tmp_path)), seed=5)
    assert torch.equal(model.text.ids, donor.text.ids)
    ours, theirs = model.text.bert.state_dict(), donor.text.bert.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_too_long_a_sentence_is_named():
    task = task_for(scratch={"layers": 4, "width": 16, "heads": 2, "max_tokens": 16})
    with pytest.raises(TaskError, match="tokens; the text encoder takes at most 16"):
        build_model(task.with_concepts({task.classes[0]: {"shape": "very " * 30}}))
