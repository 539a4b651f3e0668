"""Whether a round is one of the recipe that the site has joined with."""

from __future__ import annotations

import math
from dataclasses import replace

from orchard.communication.door import RoundTask
from orchard.communication.messages import Task
from orchard.communication.refusals import Code
from orchard.deployment.consent import Refusal
from orchard.engine.simulator import Schedule
from orchard.trees import Tree

_ROUNDING = 1e-9  # a cosine may differ in its last bits between machines


def models_due(schedule: Schedule, round_number: int) -> frozenset[str]:
    """Return which models may be measured as they are before a round."""
    before = round_number - 1
    if before == 0:
        return frozenset(schedule.models) & {"base"}
    if schedule.has_evaluation(before):
        return frozenset(schedule.models) & {"global", "personal"}
    return frozenset()


def check_request(request: RoundTask, schedule: Schedule) -> None:
    """Check what is asked in a round, before anything is decoded.

    Raises:
        Refusal: The recipe has no such round, or does not measure these models after the one
            before it.
    """
    # After the last round there is one more request, which measures and does not train.
    last = schedule.num_rounds + (0 if request.train else 1)
    if request.round > last:
        raise Refusal(
            Code.ROUND,
            f"round must be at most {last} by the recipe, got {request.round}",
            option="server.rounds",
        )
    due = models_due(schedule, request.round)
    if more := sorted(set(request.evaluate) - due):
        raise Refusal(
            Code.EVALUATION,
            f"models measured before round {request.round} must be of "
            f"{', '.join(sorted(due)) or 'none'} by the recipe, got {more[0]}",
            option="evaluation.models",
        )


def shapes_of(tree: Tree) -> Tree:
    """Return a tree without its values, which takes no memory for them."""
    return {name: tensor.to("meta") for name, tensor in tree.items()}


def check_tree(task: Task, shared: Tree) -> None:
    """Check that a task holds the global tree of its method and model, whole and nothing else.

    Args:
        task: As the channel read it.
        shared: The names and shapes that there must be.

    Raises:
        Refusal: It holds another.
    """
    for name in sorted(task.shared.keys() ^ shared.keys()):
        raise Refusal(Code.REQUEST, f"{name} must be in the task and in the model, got one of both")
    for name, tensor in task.shared.items():
        if tensor.shape != shared[name].shape or not tensor.is_floating_point():
            raise Refusal(
                Code.REQUEST,
                f"{name} must be of shape {tuple(shared[name].shape)} and floating point, got "
                f"{tuple(tensor.shape)} and {tensor.dtype}",
            )


def check_task(task: Task, request: RoundTask, schedule: Schedule) -> None:
    """Check that a task trains as the recipe says.

    Raises:
        Refusal: It is of another round, or has other steps or another learning rate, or measures
            the local model where the recipe does not.
    """
    if task.round_number != request.round:
        raise Refusal(
            Code.ROUND, f"round must be {request.round} as announced, got {task.round_number}"
        )
    if not request.train:
        return
    asked = schedule.task(request.round, {})
    due, got = asked.settings, task.settings
    is_same = math.isclose(due.learning_rate, got.learning_rate, rel_tol=_ROUNDING, abs_tol=0.0)
    if replace(got, learning_rate=due.learning_rate) != due or not is_same:
        raise Refusal(
            Code.SETTINGS,
            f"training in round {request.round} must be with {due} by the recipe, got {got}",
            option="client.lr" if not is_same else "client.steps",
        )
    if task.evaluate_local and not asked.evaluate_local:
        raise Refusal(
            Code.EVALUATION,
            f"the local model must not be measured in round {request.round} by the recipe",
            option="evaluation.models",
        )
