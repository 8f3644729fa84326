"""What a round tells while it runs."""

from types import SimpleNamespace

import torch
from ignite.engine import Engine

from lib.trainers import tracking
from lib.trainers.tracking import Tracker
from support.helpers import tiny_task


def test_a_long_epoch_is_told_step_by_step(tmp_path, monkeypatch, caplog):
    """Two epochs of five steps, 12 seconds each: after 36 seconds of silence there is a line."""
    now, told = [0.0], []

    def step(_engine, _batch):
        now[0] += 12
        return dict.fromkeys(("loss", "segmentation", "class_embedding", "alignment"), torch.tensor(2.0))

    trainer = Engine(step)
    monkeypatch.setattr(tracking, "time", SimpleNamespace(time=lambda: now[0], monotonic=lambda: now[0]))
    monkeypatch.setattr(
        tracking, "prepare_stats", lambda _s, t, _e: {"epoch": t.state.epoch, "total_epochs": t.state.max_epochs}
    )
    network = SimpleNamespace(sigmas=lambda: dict.fromkeys(("a", "b", "c"), 1.0))
    context = SimpleNamespace(
        **{"events_dir": str(tmp_path), "tracking": "None", "start_ts": 0.0, "evaluator": None},
        **{"trainer": trainer, "network": network, "optimizer": SimpleNamespace(param_groups=[{"lr": 1e-3}])},
    )
    tracker = Tracker(context, tiny_task())
    tracker.attach(trainer, None, lambda: told.append(tracker.stats()))
    with caplog.at_level("INFO", logger="lib.trainers.tracking"):
        trainer.run([{"image": [0]}] * 5, max_epochs=2)
    lines = [record.getMessage().partition(" (segmentation")[0] for record in caplog.records]
    assert lines == [
        "Epoch 1/2, step 3/5: loss 2.0000, time left 0:01:24",  # seven steps are left
        "Epoch 1/2: loss 2.0000",
        "Epoch 2/2, step 3/5: loss 2.0000, time left 0:00:24",
        "Epoch 2/2: loss 2.0000",
    ]
    shown = [[stats[k] for k in ("epoch", "step", "steps", "seconds_left")] for stats in told]
    assert shown == [[0, 3, 5, 84], [1, 3, 5, 24]], "the last epoch that has ended, and the step since"
    assert tracker.stats()["epoch"] == 2 and "step" not in tracker.stats()
