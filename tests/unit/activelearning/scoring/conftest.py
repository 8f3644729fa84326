"""A tiny task, its untrained network, four cases and an inference task."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib.infers import BiPVLInfer
from lib.model.nets import build_model
from lib.stores.local import LocalStore
from support.helpers import tiny_task, write_nifti

PATCH = (48, 48, 48)


@pytest.fixture(scope="module")
def task():
    return tiny_task(patch=PATCH, model={"vision": "unet", "feature_size": 4})


@pytest.fixture(scope="module")
def model(task):
    torch.manual_seed(0)
    return build_model(task).eval()


@pytest.fixture
def store(tmp_path, task):
    """Four cases, one of them labelled."""
    folder = tmp_path / "studies"
    (folder / "labels" / "final").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in "abcd":
        write_nifti(folder / f"{name}.nii.gz", rng.integers(-50, 200, (30, 30, 20)).astype(np.int16))
    write_nifti(folder / "labels" / "final" / "b.nii.gz", np.ones((30, 30, 20), np.uint8))
    return LocalStore(folder, tasks=[task])


@pytest.fixture
def engine(tmp_path, task):
    return BiPVLInfer(task, tmp_path / "models" / task.name)
