"""A training half way: all that going on from a step to the same bits needs, in files like those of a level.

Batch orders, draws and rates are functions of seed and step; what is left are weights, the optimizers' moments, and
what was seen on the way. Two files, ``tensors.safetensors`` and ``state.json``, which is sealed and names the other's
checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ticketlab.engine import store
from ticketlab.engine.watch import Watch
from ticketlab.shown import as_line, as_table
from ticketlab.state import State

TENSORS, STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoints:
    """Where a training leaves its last checkpoint, and how often."""

    folder: Path
    run: str
    """Identity of the run; a checkpoint of another is not read."""
    seconds: float = 600.0
    """Time between two, at least."""

    __repr__, _repr_html_ = as_line, as_table

    def write(self, half: Half) -> None:
        """In place of the one before, whole or not at all."""
        content = save_tensors({name: t.detach().cpu().contiguous() for name, t in half.tensors.items()})
        digest = hashlib.sha256(content).hexdigest()
        temporary = self.folder.with_name(f"{self.folder.name}.tmp")
        with store.refused(self.folder):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            store.write_synced(temporary / TENSORS, content)
            store.write_synced(temporary / STATE, store.sealed({"run": self.run, "sha256": digest, **half.state}))
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(temporary, self.folder)

    def read(self, device: torch.device, optimizers: int) -> Half | None:
        """The last one; None where there is none that is whole, of this run, and of as many optimizers."""
        try:
            state = json.loads((self.folder / STATE).read_text())
            content = (self.folder / TENSORS).read_bytes()
            whole = store.is_sealed(state) and state["sha256"] == hashlib.sha256(content).hexdigest()
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        if not whole or (state["run"], state["optimizers"]) != (self.run, optimizers):
            return None
        return Half({n: t.to(device) for n, t in load_tensors(content).items()}, state)

    def clear(self) -> None:
        """Once the level is stored."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Half:
    """A training half way."""

    tensors: Mapping[str, Tensor]
    """By names such as ``live/params/fc1.weight`` or ``optimizer/0/3/exp_avg``."""
    state: Mapping[str, Any]
    """As JSON: step, seconds, and what a `Watch` has seen."""

    __repr__, _repr_html_ = as_line, as_table


def taken(
    step: int, seconds: float, watch: Watch, snapshots: Mapping[int, State], optimizers: Sequence[torch.optim.Optimizer]
) -> Half:
    """What there is after so many steps."""
    states = {"live": watch.live, "best": watch.best, "last": watch.last[0]}
    states |= {f"step_{k:08d}": state for k, state in snapshots.items()}
    tensors = {f"{name}/{key}": t for name, state in states.items() for key, t in _flat(state).items()}
    for i, optimizer in enumerate(optimizers):
        for j, held in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{j}/{key}": t for key, t in held.items() if isinstance(t, Tensor)}
    seen = {name: getattr(watch, name) for name in ("rows", "alive", "best_loss", "best_step", "diverged_step")}
    return Half(tensors, {"step": step, "seconds": seconds, "optimizers": len(optimizers), **seen})


@torch.no_grad()
def put_in(half: Half, watch: Watch, snapshots: dict[int, State], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Go back to where a checkpoint was taken; tensors stay where they lie."""
    for name, state in (("live", watch.live), ("best", watch.best), ("last", watch.last[0])):
        for key, tensor in _flat(state).items():
            tensor.copy_(half.tensors[f"{name}/{key}"])
    for k in {name.partition("/")[0] for name in half.tensors if name.startswith("step_")}:
        like = watch.live.clone()
        for key, tensor in _flat(like).items():
            tensor.copy_(half.tensors[f"{k}/{key}"])
        snapshots[int(k.removeprefix("step_"))] = like
    for name in ("rows", "alive", "best_loss", "best_step", "diverged_step"):
        setattr(watch, name, half.state[name])
    for i, optimizer in enumerate(optimizers):
        held: dict[int, dict[str, Tensor]] = {}
        for name, tensor in half.tensors.items():
            if name.startswith(f"optimizer/{i}/"):
                _, _, j, key = name.split("/")
                held.setdefault(int(j), {})[key] = tensor
        own = optimizer.state_dict()["state"]
        if own:  # part of a recording, which knows where its tensors lie
            for at, tensors in held.items():
                for key, tensor in tensors.items():
                    own[at][key].copy_(tensor)
        else:
            optimizer.load_state_dict({"state": held, "param_groups": optimizer.state_dict()["param_groups"]})


def _flat(state: State) -> dict[str, Tensor]:
    return {f"{part}/{name}": t for part, tensors in state._asdict().items() for name, t in tensors.items()}
