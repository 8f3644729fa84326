"""How a task is trained: the recipe of a round, what its steps read, and how patches are changed."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from lib.tasks.concepts import StrictModel

Unjudged = Literal["keep", "publish"]  # what becomes of a version that cannot be compared with the served one
UNJUDGED: tuple[Unjudged, ...] = get_args(Unjudged)

Axis = Literal["left-right", "posterior-anterior", "inferior-superior"]
AXES: tuple[Axis, ...] = ("left-right", "posterior-anterior", "inferior-superior")  # the axes of a RAS volume


class Training(StrictModel):
    """Training defaults (paper, section 4.1). The train request can override each of them."""

    epochs: Annotated[int, Field(ge=1)] = 300
    val_interval: Annotated[int, Field(ge=1)] = 5
    batch_size: Annotated[int, Field(ge=1)] = 1
    patches_per_case: Annotated[int, Field(ge=1)] = 2
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    language_learning_rate: Annotated[float, Field(gt=0)] = 1e-4  # of the text encoder (docs/running/training.md)
    min_learning_rate: Annotated[float, Field(ge=0)] = 1e-7
    continued_rate: Annotated[float, Field(gt=0)] = 1.0  # of the rates, in a round that goes on from a version
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.1  # share of a round over which the rates rise
    weight_decay: Annotated[float, Field(ge=0)] = 1e-5
    hard_negatives: Annotated[int, Field(ge=1)] = 3
    temperature: Annotated[float, Field(gt=0)] = 0.2
    text_interval: Annotated[int, Field(ge=1)] = 1  # steps that a reading of the text lasts (docs/running/training.md)
    text_noise: Annotated[float, Field(ge=0)] = 0.01
    drop_classes: Annotated[float, Field(ge=0, le=1)] = 0.0  # text head: share of steps that know some classes only
    drop_concepts: Annotated[float, Field(ge=0, le=1)] = 0.0  # text head: share of steps that read some sentences only
    mirror: Annotated[float, Field(ge=0, le=1)] = 0.0  # text head: share of steps that mirror patient and words
    vary_wording: Annotated[float, Field(ge=0, le=1)] | None = None  # text head: share that draws (`Task.vary_wording`)
    typing_errors: Annotated[float, Field(ge=0, le=1)] = 0.0  # text head: share of sentences with a typing error
    absent: Annotated[float, Field(ge=0, le=1)] = 0.0  # text head: share of steps with texts of what is not there
    global_weight: Annotated[float, Field(ge=0)] = 1.0
    local_weight: Annotated[float, Field(ge=0)] = 1.0
    gate_margin: Annotated[float, Field(ge=0, le=1)] = 0.02  # how much Dice one class may lose in a round
    gate_min_cases: Annotated[int, Field(ge=1)] = 1
    gate_unjudged: Unjudged = "keep"
    gate_clicks: Annotated[int, Field(ge=0)] = 4  # cases on which a robot user clicks, for the gate
    gate_reading: Annotated[float, Field(ge=0, le=1)] | None = None  # how much Dice with unseen wordings may fall
    refiner: Annotated[int, Field(ge=0)] = 0  # simulated corrections of the second stage (docs/running/training.md)
    cross_validate: bool = True  # while there are too few cases to set one aside


class Augmentation(StrictModel):
    """Random changes of a training patch. `flip` names axes of the RAS volume; a task with left and right classes must
    not flip left-right, because the flipped left kidney would still be called left."""

    flip: tuple[Axis, ...] = ()
    flip_probability: Annotated[float, Field(ge=0, le=1)] = 0.5
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 15.0
    rotate_probability: Annotated[float, Field(ge=0, le=1)] = 0.3
    shift_intensity: Annotated[float, Field(ge=0)] = 0.1
    scale_intensity: Annotated[float, Field(ge=0)] = 0.1
    zoom: Annotated[float, Field(ge=0, lt=1)] = 0.0  # up to this share larger or smaller
    zoom_probability: Annotated[float, Field(ge=0, le=1)] = 0.3
    gamma: Annotated[float, Field(ge=0)] = 0.0  # exponents of the intensity from 1 / (1 + gamma) to 1 + gamma
    noise: Annotated[float, Field(ge=0)] = 0.0  # standard deviation at most, in units of the network's input
    intensity_probability: Annotated[float, Field(ge=0, le=1)] = 0.5
