"""Tickets in and out: ``torch.nn.utils.prune``, masks that others made, and folders as model hubs keep them.

``level.module(0)`` is a plain module with the ticket in it: its ``state_dict`` is in PyTorch's words, and
``torch.onnx.export(level.module(0), (x,), "ticket.onnx")`` writes ONNX where ``onnx`` and ``onnxscript`` are installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from ticketlab import masks as mask_ops
from ticketlab.engine.level import Level
from ticketlab.errors import Refused
from ticketlab.seeds import Factory, initialise
from ticketlab.state import Masks

WEIGHTS, MASKS, CONFIG, CARD = "model.safetensors", "masks.safetensors", "config.json", "README.md"


def to_prune(module: nn.Module, masks: Masks) -> nn.Module:
    """The module, changed in place, with the masks as ``torch.nn.utils.prune`` keeps them: weight_orig and weight_mask.

    Raises:
        Refused: A mask of no parameter, or of another shape.
    """
    for name, mask in _fitting(module, masks).items():
        owner, _, own = name.rpartition(".")
        torch_prune.custom_from_mask(module.get_submodule(owner), own, mask)
    return module


def from_prune(module: nn.Module) -> Masks:
    """The masks of a module that ``torch.nn.utils.prune`` has pruned, by the names of its parameters before.

    Raises:
        Refused: A module that is not pruned so.
    """
    found = {
        name.removesuffix("_mask"): buffer.bool()
        for name, buffer in module.named_buffers()
        if name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in dict(module.named_parameters())
    }
    if not found:
        raise Refused("module must be pruned by torch.nn.utils.prune: it has no weight_mask beside a weight_orig.")
    return found


def from_zeros(module: nn.Module) -> Masks:
    """True where a weight is not zero, of every parameter of two axes or more that has a zero.

    Raises:
        Refused: No such parameter.
    """
    found = {n: p.detach() != 0 for n, p in module.named_parameters() if p.ndim > 1 and bool((p == 0).any())}
    if not found:
        raise Refused("module must have weights that are exactly zero: it has none, and is dense.")
    return found


def from_arrays(module: nn.Module, arrays: Mapping[str, Any]) -> Masks:
    """Masks of another framework, zeros and ones of any type, as those of a module's parameters.

    Args:
        module: Has the parameters that are masked.
        arrays: By the names of its parameters, with ``_mask`` or ``.mask`` behind them or not.

    Raises:
        Refused: A name or shape that the module does not have, or other values than 0 and 1.
    """
    masks = {}
    for name, array in arrays.items():
        tensor = array.detach() if isinstance(array, Tensor) else torch.as_tensor(np.asarray(array))
        if not bool(((tensor == 0) | (tensor == 1)).all()):
            raise Refused(f"a mask must be zeros and ones: {name!r} has {tensor[(tensor != 0) & (tensor != 1)][0]}.")
        masks[name.removesuffix("_mask").removesuffix(".mask")] = tensor.bool()
    return _fitting(module, masks)


def _fitting(module: nn.Module, masks: Mapping[str, Tensor]) -> Masks:
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    for name, mask in masks.items():
        if shapes.get(name) != tuple(mask.shape):
            has = f"is {shapes[name]}" if name in shapes else f"is not there: {', '.join(shapes)} are"
            raise Refused(f"a mask must have the name and shape of a parameter: {name!r} {tuple(mask.shape)} {has}.")
    return dict(masks)


def save_folder(level: Level, folder: str | Path, *, about: Mapping[str, Any] | None = None) -> Path:
    """One ticket as a folder that a model hub takes: weights and masks as safetensors, numbers as JSON, and a card.

    Args:
        level: Of one network, from ``select``; of a study whose architecture is known.
        folder: Made anew.
        about: What else to write down, such as ``dataclasses.asdict(config)``.

    Raises:
        Refused: Several networks, or a folder with something in it.
    """
    path = Path(folder).expanduser()
    if level.stacked:
        raise Refused(f"a folder holds one network: got {len(level.metrics)}. Take one with level.select(...).")
    if path.exists() and any(path.iterdir()):
        raise Refused(f"{path} must be new or empty: it has files. Choose another folder.")
    path.mkdir(parents=True, exist_ok=True)
    module, row = level.module(0), json.loads(level.metrics.iloc[0].to_json())
    save_file({n: t.contiguous().clone() for n, t in module.state_dict().items()}, path / WEIGHTS)
    save_file({n: m.contiguous() for n, m in level.masks.items()}, path / MASKS)
    numbers = {"density": float(mask_ops.density(level.masks)), "level": level.level, **row, **(about or {})}
    (path / CONFIG).write_text(json.dumps(numbers, indent=1, default=str) + "\n")
    (path / CARD).write_text(_card(numbers))
    return path


def load_folder(folder: str | Path, model: Factory) -> tuple[nn.Module, Masks]:
    """The module, in evaluation mode, and the masks of a folder by ``save_folder``.

    Raises:
        Refused: Files that are missing, or weights that are not the architecture's.
    """
    path, module = Path(folder).expanduser(), initialise(model, 0)
    try:
        weights, masks = load_file(path / WEIGHTS), load_file(path / MASKS)
        module.load_state_dict(weights)
    except (OSError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        raise Refused(f"{path} must hold {WEIGHTS} and {MASKS} of the architecture that model builds: {why}") from error
    return module.eval(), _fitting(module, masks)


def _card(numbers: Mapping[str, Any]) -> str:
    error = numbers.get("test_error")
    result = "" if error is None else f" It errs on {100 * error:.2f} % of the test set."
    what = f"{numbers.get('model', 'a network')} on {numbers.get('task', 'its task')}"
    return f"""---
library_name: ticketlab
tags: [lottery-ticket, pruning]
---

# A lottery ticket of {what}

{100 * numbers["density"]:.3g} % of the weights are kept, after {numbers["level"]} levels of iterative magnitude
pruning.{result} Pruned weights are zero in `{WEIGHTS}`; `{MASKS}` has the masks, `{CONFIG}` what it was made with.

```python
import ticketlab as tl

module, masks = tl.exchange.load_folder("this folder", my_factory)  # my_factory() builds the architecture
```
"""
