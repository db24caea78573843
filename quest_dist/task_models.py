"""Tasks and models: what a task asks of the models that it runs on, and those that it loads itself.

Both are known before a worker starts; a wrong one is a ValueError that names the setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quest_dist import models, plan
from quest_dist.plan import Point, Spec
from quest_dist.tasks.task import Task


def identified(spec: Spec, task: Task, device: str) -> Spec:
    """A task's spec with the models that it loads beside the grid's checked, and in its identity by
    content."""
    others = task.other_models()
    content = dict(spec.identity)
    for key, settings in others.items():
        try:
            models.check(settings, device)
            content[key] = models.identity(settings)
        except ValueError as error:
            text = str(error).replace("model.", f"{key}.", 1)
            raise ValueError(f"task {spec.name}: {text}") from error
    return plan.with_content(spec, content) if others else spec


def check(points: Sequence[Point], tasks: Mapping[str, Task]) -> None:
    """Raise ValueError for a model, loaded with its weights, that its task cannot run."""
    for point in points:
        task, model = tasks[point.task.name], point.model
        dtype, shape = model.identity.get("dtype"), model.settings.get("shape")
        if not task.needs_weights:
            continue
        if task.needs_float32 and dtype != "float32":
            raise ValueError(
                f"task {point.task.name}: model.{model.name}.dtype={dtype}: rounding would decide"
                " where tokens nearly tie; choose float32"
            )
        try:
            if shape:
                task.check_model(shape)
        except ValueError as error:
            raise ValueError(f"task {point.task.name}: {error} (model.{model.name})") from error
