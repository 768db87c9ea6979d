"""Experiment trackers, beside the files that every run writes: wandb and trackio, which share an interface."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_orz.config import RunConfig, Tracker, to_json


def check_trackers(trackers: Sequence[Tracker]) -> None:
    """Raises ValueError for a tracker that is not installed."""
    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ValueError(
                f"tracking.trackers names {tracker}, which is not installed; pip install megatron_orz[{tracker}]"
            )


class Trackers:
    """Every tracker that a config names, as one."""

    def __init__(self, config: RunConfig) -> None:
        """Starts them. Raises RuntimeError when one does not, such as for want of a login."""
        self._modules: list[Any] = []
        for tracker in config.tracking.trackers:
            module = importlib.import_module(tracker)
            options: dict[str, Any] = {"dir": str(config.run_dir)} if tracker == "wandb" else {}
            try:
                module.init(
                    project=config.tracking.project,
                    name=config.run_dir.absolute().name,
                    config=json.loads(to_json(config)),
                    **options,
                )
            except Exception as error:  # each has errors of its own for logins, networks and disks
                self.close()
                raise RuntimeError(
                    f"cannot start {tracker}: {error}; log in, or leave it out of tracking.trackers"
                ) from error
            self._modules.append(module)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hands a row of metrics to every tracker, which sends it in its own time."""
        for module in self._modules:
            module.log(dict(metrics), step=step)

    def close(self) -> None:
        """Waits until every tracker has sent what it was given."""
        while self._modules:
            self._modules.pop().finish()
