"""TensorBoard, W&B, MLflow and Trackio, each by its own client, imported when a run begins.

All get the same: numbers under the keys of ``metrics.jsonl`` with the round as step, and the recipe
as parameters. What a library does with a round that it is given twice differs; see each class.
"""

from __future__ import annotations

import difflib
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from orchard.extras import require
from orchard.recipe.describing import Scalar
from orchard.recipe.reading import format_value

_PROJECT = "orchard"


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run when it begins or goes on.

    Attributes:
        run_id: The same whenever the run is resumed, and different for every run's folder.
        folder: The run's folder.
        parameters: The recipe, dotted key to value.
        last_round: The last round that this tracker has; None where it has none.
    """

    run_id: str
    folder: Path
    parameters: Mapping[str, Scalar]
    last_round: int | None

    @property
    def name(self) -> str:
        """What people call the run: its folder's name."""
        return self.folder.resolve().name


class Tracker(Protocol):
    """Somewhere that numbers of rounds are sent to."""

    def begin(self, run: TrackedRun) -> None:
        """Open the run there, or open it again."""

    def log(self, values: Mapping[str, float], *, round_number: int) -> None:
        """Add the numbers of one round, which is later than all before."""

    def end(self, *, is_finished: bool) -> None:
        """Close the run there; it is finished, or was stopped."""


class TensorBoard:
    """Event files in ``tensorboard/`` of the run's folder.

    A round that was written twice counts once: a resumed run tells readers to forget what it is
    about to write again.
    """

    def begin(self, run: TrackedRun) -> None:
        """Open an event file, and write the recipe into the first."""
        from torch.utils.tensorboard import SummaryWriter

        first = 0 if run.last_round is None else run.last_round + 1
        folder = str(run.folder / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=first)
        if run.last_round is None:
            lines = [f"    {key} = {format_value(v)}" for key, v in run.parameters.items()]
            self._writer.add_text("recipe", "\n".join(lines), 0)

    def log(self, values: Mapping[str, float], *, round_number: int) -> None:
        """Add a scalar for each key."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, round_number)
        self._writer.flush()

    def end(self, *, is_finished: bool) -> None:
        """Close the file."""
        self._writer.close()


class MLflow:
    """A run of the experiment ``orchard``, or MLFLOW_EXPERIMENT_NAME, at MLFLOW_TRACKING_URI.

    A round that is sent twice counts once: a resumed run is found by a tag, and asked what it has
    of the first round that it is sent.
    """

    _TAG = "orchard.run_id"
    _MAX_METRICS, _MAX_PARAMETERS = 1000, 100  # in one request

    def begin(self, run: TrackedRun) -> None:
        """Find or create the run, and write the recipe as its parameters."""
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(name)
        )
        found = self._client.search_runs(
            [experiment_id], filter_string=f"tags.`{self._TAG}` = '{run.run_id}'"
        )
        self._may_have_round = bool(found)
        if found:
            self._run_id = found[0].info.run_id
            self._client.set_terminated(self._run_id, status="RUNNING")
            return
        created = self._client.create_run(
            experiment_id, run_name=run.name, tags={self._TAG: run.run_id}
        )
        self._run_id = created.info.run_id
        parameters = [Param(key, format_value(value)) for key, value in run.parameters.items()]
        for some in _batches(parameters, self._MAX_PARAMETERS):
            self._client.log_batch(self._run_id, params=some)

    def log(self, values: Mapping[str, float], *, round_number: int) -> None:
        """Add a metric for each key; characters that MLflow does not take become their numbers."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [
            Metric(_mlflow_key(key), value, now, round_number) for key, value in values.items()
        ]
        if self._may_have_round:
            metrics = [metric for metric in metrics if not self._has(metric.key, round_number)]
            self._may_have_round = False
        for some in _batches(metrics, self._MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=some)

    def end(self, *, is_finished: bool) -> None:
        """Say whether the run has finished."""
        self._client.set_terminated(self._run_id, status="FINISHED" if is_finished else "KILLED")

    def _has(self, key: str, round_number: int) -> bool:
        history = self._client.get_metric_history(self._run_id, key)
        return any(point.step == round_number for point in history)


class WeightsAndBiases:
    """A run of the project ``orchard``, or WANDB_PROJECT; without network where WANDB_MODE=offline.

    A resumed run continues the one with its id, and online W&B drops steps that it has. Offline
    each start writes a folder of its own in ``wandb/`` of the run's folder, under the same id.
    """

    def begin(self, run: TrackedRun) -> None:
        """Open the run of this id, with the recipe as its config."""
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=run.run_id,
            name=run.name,
            dir=str(run.folder),
            config=dict(run.parameters),
            resume="allow",
            settings=wandb.Settings(console="off"),  # what is printed is nobody else's
        )

    def log(self, values: Mapping[str, float], *, round_number: int) -> None:
        """Add the numbers at once, not when the next step begins."""
        self._run.log(dict(values), step=round_number, commit=True)

    def end(self, *, is_finished: bool) -> None:
        """Send what is left; an exit code other than 0 marks a run that was stopped."""
        self._run.finish(exit_code=0 if is_finished else 1)


class Trackio:
    """A run of the local project ``orchard``, or TRACKIO_PROJECT.

    A resumed run continues the one of its name. A round that was sent just before a crash may be
    there twice: Trackio keeps both.
    """

    def begin(self, run: TrackedRun) -> None:
        """Open the run of this name, with the recipe as its config and no watching of hardware."""
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=f"{run.name}-{run.run_id[:8]}",
            config=dict(run.parameters),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, values: Mapping[str, float], *, round_number: int) -> None:
        """Add the numbers."""
        self._run.log(dict(values), step=round_number)

    def end(self, *, is_finished: bool) -> None:
        """Wait until everything is written."""
        self._run.finish()


TRACKERS: Mapping[str, type[Tracker]] = MappingProxyType(
    {
        "tensorboard": TensorBoard,
        "wandb": WeightsAndBiases,
        "mlflow": MLflow,
        "trackio": Trackio,
    }
)
"""Name, which is that of the extra too, to what talks to it."""


def make_trackers(names: Iterable[str]) -> dict[str, Tracker]:
    """Return trackers by name, without importing their libraries.

    Raises:
        ValueError: There is no such tracker, or its library is not installed.
    """
    trackers: dict[str, Tracker] = {}
    for name in names:
        if name not in TRACKERS:
            nearest = difflib.get_close_matches(name, TRACKERS, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"track must be of {', '.join(TRACKERS)}, got {name}{hint}")
        require(name, to="track with it")
        trackers[name] = TRACKERS[name]()
    return trackers


_Any = TypeVar("_Any")


def _batches(items: Sequence[_Any], size: int) -> Iterator[list[_Any]]:
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


def _mlflow_key(key: str) -> str:
    """Return a key of letters, digits and what MLflow allows beside them; no two become one."""

    def number(match: re.Match[Any]) -> str:
        return f":{ord(match[0]):x}:"

    return re.sub(r"[^A-Za-z0-9_\-. /]", number, key)
