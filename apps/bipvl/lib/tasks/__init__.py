"""Tasks and concepts: what there is to segment, and the sentences that describe it.

One YAML file in `sample-apps-config/` and one in `concepts/` make a task. Everything that needs to know which classes
exist, which value a file holds for them or which words describe them asks this module. It imports neither torch nor
monailabel, so that it can be read, tested and used anywhere.

Labels are matched by name, never by position: file values, network channels, text rows and written values all go
through `Task`.
"""

from lib.tasks.concepts import ATTRIBUTES, TEXT_FORMATS, ClassText, Concepts, Review, TaskError
from lib.tasks.loading import (
    CONCEPTS_DIR,
    TASKS_DIR,
    concepts_file,
    list_tasks,
    load_concepts,
    load_task,
    task_data,
    task_from_dict,
)
from lib.tasks.names import check_names, folded, meant
from lib.tasks.schema import (
    VISION_BACKBONES,
    Frozen,
    Intensity,
    Label,
    ModelSpec,
    Region,
    ScratchText,
    Snomed,
    Task,
)
from lib.tasks.training import AXES, UNJUDGED, Augmentation, Axis, Training, Unjudged

__all__ = [
    "ATTRIBUTES",
    "AXES",
    "Augmentation",
    "Axis",
    "CONCEPTS_DIR",
    "ClassText",
    "Concepts",
    "Frozen",
    "Intensity",
    "Label",
    "ModelSpec",
    "Region",
    "Review",
    "ScratchText",
    "Snomed",
    "TASKS_DIR",
    "TEXT_FORMATS",
    "Task",
    "TaskError",
    "Training",
    "UNJUDGED",
    "Unjudged",
    "VISION_BACKBONES",
    "check_names",
    "concepts_file",
    "folded",
    "list_tasks",
    "load_concepts",
    "load_task",
    "meant",
    "task_data",
    "task_from_dict",
]
