"""Tickets in and out: ``torch.nn.utils.prune``, masks that others made, folders as model hubs keep them, ONNX.

``level.module(0)`` is a plain module with the ticket in it, and its ``state_dict`` is in PyTorch's words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from ticketlab import masks as mask_ops
from ticketlab.engine.config import ImpConfig, described, in_words
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

    What torch did not prune has no mask. A measure takes the module after ``torch.nn.utils.prune.remove``.

    Raises:
        Refused: A module that is not pruned so.
    """
    originals = {name.removesuffix("_orig") for name, _ in module.named_parameters() if name.endswith("_orig")}
    stems = {name.removesuffix("_mask"): mask for name, mask in module.named_buffers() if name.endswith("_mask")}
    found = {stem: mask.bool() for stem, mask in stems.items() if stem in originals}
    if not found:
        raise Refused("module must be pruned by torch.nn.utils.prune: it has no weight_mask beside a weight_orig.")
    return found


def from_zeros(module: nn.Module, prunable: Sequence[str] | None = None) -> Masks:
    """True where a weight is not zero, of every prunable weight: the masks of a module that others pruned to zeros.

    Args:
        module: Holds the weights.
        prunable: Names of what counts as prunable, with wildcards; as of `masks.prunable` when None.

    Raises:
        Refused: No zero among them, or as `masks.prunable`.
    """
    params = dict(module.named_parameters())
    found = {name: params[name].detach() != 0 for name in mask_ops.prunable(module, prunable)}
    if all(bool(mask.all()) for mask in found.values()):
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
    params, masks = dict(module.named_parameters()), {}
    for given, array in arrays.items():
        tensor = array.detach() if isinstance(array, Tensor) else torch.as_tensor(np.asarray(array))
        other = (tensor != 0) & (tensor != 1)
        if bool(other.any()):
            raise Refused(f"a mask must be zeros and ones: {given!r} has {tensor[other][0].item()}.")
        name = given if given in params else given.removesuffix("_mask").removesuffix(".mask")
        masks[name] = tensor.bool().to(params[name].device if name in params else "cpu")
    return _fitting(module, masks)


def _fitting(module: nn.Module, masks: Mapping[str, Tensor]) -> Masks:
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    if not masks:
        raise Refused("masks must name a parameter at least: got none.")
    for name, mask in masks.items():
        if name not in shapes:
            known = ", ".join([*shapes][:8]) + ", ..." * (len(shapes) > 8)
            raise Refused(f"a mask must have the name of a parameter: {name!r} is not there: {known} are. Rename it.")
        if shapes[name] != tuple(mask.shape):
            given, turned = tuple(mask.shape), tuple(mask.shape)[::-1] == shapes[name]
            hint = " Transpose it: torch keeps [out, in]." * turned
            raise Refused(f"a mask must have the shape of its parameter: {name!r} {given} is {shapes[name]}.{hint}")
    return dict(masks)


def save_folder(
    level: Level,
    folder: str | Path,
    *,
    about: ImpConfig | Mapping[str, Any] | None = None,
    model: Factory | None = None,
) -> Path:
    """One ticket as a folder that a model hub takes: weights and masks as safetensors, numbers as JSON, and a card.

    Args:
        level: Level of one network, from ``select``.
        folder: Folder, made anew.
        about: The study that it is of, which the card then describes, or whatever else to write down.
        model: Builds the architecture; the study's own when None, which a level read from disk does not know.

    Raises:
        Refused: Several networks, an architecture that is not known, or a folder with something in it.
    """
    path = Path(folder).expanduser()
    if level.stacked:
        raise Refused(f"a folder holds one network: got {len(level.metrics)}. Take one with level.select(...).")
    if path.exists() and any(path.iterdir()):
        raise Refused(f"{path} must be new or empty: it has files. Choose another folder.")
    module, row = level.module(0, model=model), json.loads(level.metrics.iloc[0].to_json())
    numbers = {"density": float(mask_ops.density(level.masks)), "level": level.level, **row}
    study = in_words(about) if isinstance(about, ImpConfig) else {}
    if isinstance(about, ImpConfig):
        numbers |= {"task": about.task, "model": about.model, "study": described(about)}
    else:
        numbers |= dict(about or {})
    zero = all(not bool(level.end.params[name][~mask].any()) for name, mask in level.masks.items())
    path.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous().clone() for n, t in module.state_dict().items()}, path / WEIGHTS)
    save_file({n: m.contiguous() for n, m in level.masks.items()}, path / MASKS)
    (path / CONFIG).write_text(json.dumps(numbers, indent=1, default=str) + "\n")
    (path / CARD).write_text(_card(numbers, study, zero))
    return path


def load_folder(folder: str | Path, model: Factory) -> tuple[nn.Module, Masks]:
    """The module, in evaluation mode and in the dtype that was saved, and the masks of a folder by ``save_folder``.

    Raises:
        Refused: Files that are missing or not whole, or weights that are not the architecture's.
    """
    path, module = Path(folder).expanduser(), initialise(model, 0)
    try:
        weights, masks = load_file(path / WEIGHTS), load_file(path / MASKS)
        module.load_state_dict(weights)
    except (OSError, RuntimeError, SafetensorError) as error:
        why = " ".join(str(error).split())
        raise Refused(f"{path} must hold {WEIGHTS} and {MASKS} of the architecture that model builds: {why}") from error
    for name, tensor in module.state_dict(keep_vars=True).items():
        tensor.data = weights[name]
    return module.eval(), _fitting(module, masks)


def to_onnx(module: nn.Module, x: Tensor, file: str | Path) -> Path:
    """The module as an ONNX file, by ``torch.onnx.export``, for batches of any size; zeros stay zeros.

    Args:
        module: Any that ``torch.export`` follows, in evaluation mode, such as ``level.module(0)``.
        x: An example of inputs [n, ...], n at least 2.
        file: Name of the file, such as ``ticket.onnx``.

    Raises:
        Refused: The packages ``onnx`` and ``onnxscript`` are not installed.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise Refused(f"ONNX is written with onnx and onnxscript: {missing} not installed. pip install onnx onnxscript")
    path = Path(file).expanduser()
    any_size = ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(module, (x,), path, dynamic_shapes=any_size, external_data=False, verbose=False)
    return path


def _card(numbers: Mapping[str, Any], study: Mapping[str, str], zero: bool) -> str:
    what = f"{numbers.get('model', 'a network')} on {numbers.get('task', 'its task')}"
    error = numbers.get("test_error")
    rows = {
        "weights kept": f"{100 * numbers['density']:.3g} %, level {numbers['level']}, {numbers.get('treatment', '')}",
        "test error": "not known" if error is None else f"{100 * error:.2f} %",
        "init seed, order seed": f"{numbers.get('init_seed')}, {numbers.get('order_seed')}",
        **{name: words for name, words in study.items() if name not in ("treatments", "init seeds")},
    }
    table = "\n".join(f"| {name} | {words} |" for name, words in rows.items())
    pruned = "are zero" if zero else "keep their values, which the network uses,"
    return f"""---
library_name: ticketlab
tags: [lottery-ticket, pruning]
---

# A lottery ticket of {what}

| | |
|---|---|
{table}

Pruned weights {pruned} in `{WEIGHTS}`; `{MASKS}` has the masks (true: kept), `{CONFIG}` all that is known.

```python
import ticketlab as tl

module, masks = tl.exchange.load_folder("this folder", my_factory)  # my_factory() builds the architecture
print(tl.masks.density(masks))
```

Without ticketlab: `module.load_state_dict(safetensors.torch.load_file("{WEIGHTS}"))`.
"""
