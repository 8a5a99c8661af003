"""What a training step descends."""

from __future__ import annotations

from ticketlab.data import Task
from ticketlab.engine.recipe import Recipe
from ticketlab.losses import Loss


def objective(task: Task, recipe: Recipe) -> Loss:
    """What is descended; what is evaluated is the task's plain loss."""
    return task.objective.smoothed(recipe.label_smoothing)
