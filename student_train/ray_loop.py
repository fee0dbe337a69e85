"""A student in Ray Train: TorchTrainer(ray_train_loop, train_loop_config={"config": "run.yaml"}, ...).

Ray gives the ranks and their process group, and runs this loop in a thread of each worker, where no signal arrives.
What is different from other launchers is here; the run itself is that of `potstill train`: its folder holds
checkpoints and metrics, and a start of the same configuration continues there. So does a restart by Ray
(FailureConfig), whatever Ray keeps of its own.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potstill.common.config import load_config
from potstill.common.errors import ConfigError, PreemptedError, UserError
from potstill.common.log import setup_logging
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.run.hooks import Hooks
from potstill.student_train.run.trackers import flat_numbers

log = logging.getLogger(__name__)
POINTER_FILE = "potstill.json"  # all that Ray keeps as a checkpoint: where the run's own is
ENDED_SECONDS = 300.0  # behind the time that Ray has announced; without one Ray waits 120 s
_KEYS = {"config", "set", "folder"}
_REPORTED = ("train", "eval", "checkpoint", "start", "end")


def ray_train_loop(loop_config: Mapping[str, Any]) -> None:
    """One worker's part of a run, for ray.train.torch.TorchTrainer (Ray Train v2).

    `loop_config`: `config`, a file of `potstill train --config`; `set`, a list of KEY=VALUE; `folder`, where their
    relative paths begin (default: where Ray starts its workers). All nodes must see these paths. Raises what `train`
    raises. Where Ray takes a node away the run is saved and waits to be ended, so that Ray starts it again.
    """
    setup_logging()
    config = read_loop_config(loop_config)
    from potstill.student_train.run.trainer import train

    reports = RayReports(config.run.output_dir)
    reports.add({"kind": "start", "step": 0})  # so that a storage path of Ray that does not work shows now
    summary = train(config, hooks=Hooks(report=reports.add, stop_reason=reports.stop_reason))
    reports.add({"kind": "end", "step": summary.steps, "status": summary.status, "tokens": summary.tokens})
    reports.close()
    if not summary.is_done and reports.preempted is not None:
        _wait_to_be_ended(reports.preempted_until)
        raise PreemptedError(f"{config.run.output_dir} is saved at step {summary.steps}: {reports.preempted}")


def _wait_to_be_ended(deadline: float) -> None:
    """Until Ray ends this worker with its node: a loop that returned would be a run that is over, for Ray."""
    log.warning("saved, waiting for Ray to take the node away and to start the run again")
    while time.time() < deadline:
        time.sleep(1.0)


def read_loop_config(loop_config: Mapping[str, Any]) -> TrainConfig:
    """The configuration that `train_loop_config` names. Raises ConfigError."""
    if unknown := sorted(loop_config.keys() - _KEYS):
        raise ConfigError(f"train_loop_config has {', '.join(unknown)}; expected config, set or folder")
    overrides = loop_config.get("set", [])
    if isinstance(overrides, str) or not all(isinstance(one, str) for one in overrides):
        raise ConfigError(f"train_loop_config: set is {overrides!r}; expected a list of texts KEY=VALUE")
    if "folder" in loop_config:
        if not Path(loop_config["folder"]).is_dir():
            raise ConfigError(
                f"train_loop_config: folder {loop_config['folder']} is not to be seen here; put the run, its stores "
                "and its configuration where every node of the cluster has them"
            )
        os.chdir(loop_config["folder"])
    return load_config(TrainConfig, loop_config.get("config"), list(overrides))


class RayReports:
    """Tells Ray of the lines and checkpoints of a run, in a thread, so that no step waits for Ray.

    A report is a collective call of all workers, and Ray takes one every two seconds. So rank 0 says which record is
    the next, all ranks report their own of that number, and those between are left out; none that names a checkpoint
    is. The metrics of a report are the newest figures of each kind.
    """

    def __init__(self, run: Path) -> None:
        from ray import train

        self._run, self._is_main = run, train.get_context().get_world_rank() == 0
        self._changed = threading.Condition()
        self._records: dict[int, tuple[dict[str, Any], bool]] = {}  # by number: metrics, whether one of a checkpoint
        self._num_records = self._next = 0
        self._figures: dict[str, Any] = {"run": os.path.abspath(run), "checkpoint": None}
        self._is_closed = False
        self._error: Exception | None = None
        self.preempted: str | None = None
        self.preempted_until = 0.0  # when Ray has surely ended this worker, in the clock's seconds
        self._thread = threading.Thread(target=self._work, name="ray-reports", daemon=True)
        self._thread.start()

    def add(self, record: dict[str, Any]) -> None:
        """Take a record; all ranks have the same ones in the same order. Raises what an earlier report raised."""
        if record["kind"] not in _REPORTED:
            return
        self._figures |= {"kind": record["kind"], "step": record["step"], **flat_numbers(record)}
        if "checkpoint" in record:
            self._figures["checkpoint"] = os.path.abspath(record["checkpoint"])
        if "status" in record:
            self._figures["status"] = record["status"]
        with self._changed:
            if self._error is not None:
                raise UserError(f"Ray does not take the figures of this run: {self._error}") from self._error
            keeps = record["kind"] in ("checkpoint", "start", "end")
            self._records[self._num_records] = (dict(self._figures), keeps)
            self._num_records += 1
            self._changed.notify_all()

    def stop_reason(self) -> str | None:
        """Why Ray wants an end, as far as it is known here; see Hooks."""
        return self.preempted

    def close(self) -> None:
        """Wait until all is reported. Raises UserError when Ray did not take it."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        if self._error is not None:
            raise UserError(f"Ray does not take the figures of this run: {self._error}") from self._error

    def _work(self) -> None:
        try:
            while self._wait_for(self._next):
                self._report()
        except Exception as error:  # of Ray's, from another thread: it is raised in the one that trains
            with self._changed:
                self._error = error

    def _wait_for(self, number: int) -> bool:
        """Wait until there is a record of this number; False when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._num_records > number)
            return self._num_records > number

    def _report(self) -> None:
        from ray import train
        from ray.train.collective import broadcast_from_rank_zero

        number = int(broadcast_from_rank_zero(self._choose()))
        self._wait_for(number)
        with self._changed:
            metrics, keeps = self._records[number]
            self._records = {at: record for at, record in self._records.items() if at > number}
            self._next = number + 1
        if keeps and self._is_main:
            with tempfile.TemporaryDirectory() as folder:
                text = json.dumps({name: metrics[name] for name in ("run", "checkpoint", "step")})
                (Path(folder) / POINTER_FILE).write_text(text, encoding="utf-8")
                train.report(metrics, checkpoint=train.Checkpoint.from_directory(folder))
        else:
            train.report(metrics)
        info = train.get_preemption_info()
        if info is not None:
            begin = time.time() if info.deadline_ms is None else info.deadline_ms / 1000.0
            self.preempted_until = begin + ENDED_SECONDS
            self.preempted = f"Ray takes away {len(info.preempted_node_ids)} nodes of it (ranks {info.preempted_ranks})"

    def _choose(self) -> int:
        """The record to report: the first of a checkpoint, else the newest. Rank 0's answer is the one that counts."""
        with self._changed:
            ahead = sorted(at for at in self._records if at >= self._next)
            return next((at for at in ahead if self._records[at][1]), ahead[-1])
