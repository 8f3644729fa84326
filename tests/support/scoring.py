"""Scoring methods of a task whose versions have random weights."""

from __future__ import annotations

import torch

from lib.activelearning.scoring import CaseScoring
from lib.model import versions
from lib.model.nets import build_model


def publish(engine, task, seed):
    torch.manual_seed(seed)
    return engine.versions.publish(versions.checkpoint_of(build_model(task), task, {}))


def scoring(engine, tmp_path, limit=200):
    return CaseScoring("entropy", {engine.task.name: engine}, tmp_path / "models", limit)
