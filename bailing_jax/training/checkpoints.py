"""Checkpoints of a run: Orbax steps in a folder, and the record of what the run is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.training.step import TrainState

RECORD = "run.json"
_STEPS = "checkpoints"


class Checkpoints:
    """The folder of a run.

    Attributes:
        folder: the run's folder; made if absent.
    """

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        """Open `folder`; `record` is everything that decides the run's losses.

        Raises:
            UserError: the folder holds another run.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._check(record)
        import orbax.checkpoint as ocp

        self._orbax = ocp
        self._manager = ocp.CheckpointManager(
            (folder / _STEPS).absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
        )

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Keep a state; an interrupted save leaves the one before."""
        step = int(state.step)
        if step != self.latest():
            self._manager.save(step, args=self._orbax.args.StandardSave(state._asdict()))
            self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> TrainState:
        """The newest state, on the devices of `like`."""
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like._asdict()
        )
        restored = self._manager.restore(
            self.latest(), args=self._orbax.args.StandardRestore(shapes)
        )
        return TrainState(**restored)

    def close(self) -> None:
        """Release the folder."""
        self._manager.close()

    def _check(self, record: dict[str, Any]) -> None:
        path = self.folder / RECORD
        record = json.loads(json.dumps(record))
        if not path.exists():
            if any(self.folder.iterdir()):
                raise UserError(
                    f"{self.folder}: not empty, and not a training run (no {RECORD})",
                    "Give --output a new folder.",
                    EXIT_USAGE,
                )
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            temporary.replace(path)
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(
                f"{path}: not JSON: {error}", "Use a new folder.", EXIT_USAGE
            ) from error
        different = sorted(
            name for name in {*found, *record} if found.get(name) != record.get(name)
        )
        if different:
            name = different[0]
            raise UserError(
                f"{self.folder} holds a run with other settings: {', '.join(different)} "
                f"({name}: {str(found.get(name))[:80]} there, {str(record.get(name))[:80]} here)",
                "Repeat its settings to go on, or give --output a new folder.",
                EXIT_USAGE,
            )
