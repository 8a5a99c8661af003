"""A user's module lends its tensors, and gets everything back as it was, bit for bit, ``__dict__`` included."""

from __future__ import annotations

import random
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ticketlab.errors import Refused
from ticketlab.seeds import rewinder


@contextmanager
def lent(
    model: nn.Module, params: Mapping[str, Tensor] | None, buffers: Mapping[str, Tensor] | None, training: bool = False
) -> Iterator[nn.Module]:
    """The module's parameters and buffers hold these tensors until the block ends; then it is as it was.

    The tensors are put *into* the module's own ``Parameter`` objects, so that whatever holds one of those (a hook, a
    closure, a second name, an optimizer) sees them. A forward pass that writes writes into them; of what is not given
    the module holds a copy. What the forward pass leaves on the module is taken off again.

    Raises:
        Refused: As `aliases`.
    """
    own, modules = _tensors_of(model), list(model.modules())
    put_back, kept = _remember(modules, {id(t) for t in own.values()})
    views = _aliases(own, kept)
    data = [(t, t.data, t.grad, t.requires_grad) for t in own.values()]
    shared, strides = [(view, view.data) for view, _, _ in views], {name: own[name].stride() for _, name, _ in views}
    modes = [(module, module.training) for module in modules]  # scripted ones keep it elsewhere
    given = {**(params or {}), **(buffers or {})}
    try:
        for name, tensor in own.items():
            tensor.data = given[name] if name in given else tensor.data.clone()
            tensor.grad = None
        for view, name, offset in views:
            tensor = own[name].data
            if tensor.stride() != strides[name]:
                raise Refused(
                    f"{name!r} must lie in memory as the model's, which keeps a view of it: use .contiguous()."
                )
            view.data = tensor.as_strided(view.shape, view.stride(), tensor.storage_offset() + offset)
        model.train(training)
        if not training:
            forget(model, modules)
            _mend_norms(modules)
        yield model
    finally:
        for view, values in shared:
            view.data = values
        put_back()
        for module, mode in modes:
            if module.training != mode:
                module.training = mode
        for tensor, values, gradient, trained in data:
            tensor.data = values
            tensor.grad = gradient
            if tensor.requires_grad != trained:
                tensor.requires_grad_(trained)


def aliases(model: nn.Module) -> bool:
    """Whether a module keeps tensors that share memory with its parameters or buffers, such as ``weight.detach()``.

    Raises:
        Refused: One that cannot follow when other tensors are lent: with a graph of its own, or reaching beyond them.
    """
    own = _tensors_of(model)
    return bool(_aliases(own, _remember(list(model.modules()), {id(t) for t in own.values()})[1]))


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _aliases(own: Mapping[str, Tensor], kept: list[Tensor]) -> list[tuple[Tensor, str, int]]:
    """Of the tensors that a module keeps, those in the memory of its own: of which one, and where in it."""
    places = {_storage(tensor): name for name, tensor in own.items()} if kept else {}
    found = []
    for view in kept:
        place = _storage(view)
        if place is None or place not in places or view.numel() == 0:
            continue
        name = places[place]
        tensor = own[name]
        offset = int(view.storage_offset()) - int(tensor.storage_offset())
        inside = offset >= 0 and offset + _span(view) <= _span(tensor)
        if view.grad_fn is not None or view.dtype != tensor.dtype or not inside:
            raise Refused(
                f"what a module keeps must not share memory with {name!r}, unless as a plain part of it: a tensor of "
                f"shape {tuple(view.shape)} does, and would stay behind where other weights are put in. "
                "Take views such as weight.t() in the forward pass."
            )
        found.append((view, name, offset))
    return found


def _storage(tensor: Tensor) -> int | None:
    """The address of its memory, where it has one."""
    with suppress(RuntimeError):
        return tensor.untyped_storage().data_ptr() or None if tensor.layout == torch.strided else None
    return None


def _span(tensor: Tensor) -> int:
    """How far the last entry is from the first in memory."""
    return sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def forget(model: nn.Module, modules: Sequence[nn.Module] | None = None) -> None:
    """Have modules compute anew what they compute of their weights once and keep until they are trained again.

    LeViT's attention biases are such: those of other weights, or of a graph that has been freed. Modes stay.
    """
    modules = list(model.modules()) if modules is None else modules
    if all(type(module).train is nn.Module.train for module in modules):
        return
    modes = [(module, module.training) for module in modules]
    model.train()
    model.eval()
    for module, mode in modes:
        if module.training != mode:
            module.training = mode


def _mend_norms(modules: Sequence[nn.Module]) -> None:
    """Norms whose backward pass is right for a single example: taken off with all else that is left on the module.

    On a CPU batch norm reads the gradient of one example in the wrong order where it comes back through a transpose
    (torch 2.13 and 2.14): an index on the way makes it contiguous.
    """

    def contiguous_gradient(_module: nn.Module, _inputs: object, output: Any) -> Any:
        single = isinstance(output, Tensor) and output.ndim > 2 and len(output) == 1 and output.requires_grad
        return output.index_select(0, output.new_zeros(1, dtype=torch.long)) if single else None

    for module in modules:
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.register_forward_hook(contiguous_gradient)


def _remember(modules: Sequence[nn.Module], own: set[int]) -> tuple[Callable[[], None], list[Tensor]]:
    """What puts modules' attributes back as they are now, with what containers, tensors and generators hold.

    And the tensors among these.

    Args:
        modules: All of a model's.
        own: Ids of the parameters and buffers, which are not looked into.
    """
    attributes = [(module.__dict__, dict(module.__dict__)) for module in modules]
    containers: list[tuple[Any, list]] = []
    arrays: list[tuple[np.ndarray, np.ndarray]] = []
    tensors: list[tuple[Tensor, Tensor]] = []
    generators: list[Callable[[], None]] = []
    seen = own | set(map(id, modules))
    stack = [value for _, before in attributes for value in before.values() if type(value) not in _PLAIN]
    while stack:
        value = stack.pop()
        kind = type(value)
        if kind in _EMPTY and not value:  # most are a module's own, for hooks that it does not have
            containers.append((value, []))
            continue
        if kind in _PLAIN or not isinstance(value, _HOLDERS) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _CONTAINERS):
            content = _content(value)
            containers.append((value, content))
            stack += [part for item in content for part in item] if isinstance(value, dict) else content
        elif isinstance(value, np.ndarray):
            arrays.append((value, value.copy()))
        elif isinstance(value, _GENERATORS):
            generators.append(rewinder(value))
        elif isinstance(value, nn.Module):  # one that the model holds without having it as its own
            stack.append(value.__dict__)
        else:
            with suppress(RuntimeError):  # one that a transform has left behind holds nothing
                tensors.append((value, value.detach().clone()))

    def put_back() -> None:
        for now, before in attributes:
            now.clear()
            now.update(before)
        for container, content in containers:
            if (content or len(container)) and not _same(_content(container), content):
                container.clear()
                (container.update if isinstance(container, dict | set) else container.extend)(content)
        for array, entries in arrays:
            if array.flags.writeable:
                array[...] = entries
        for tensor, values in tensors:
            if tensor.layout != torch.strided or not torch.equal(tensor, values):
                tensor.data.copy_(values)
        for rewind in generators:
            rewind()

    return put_back, [tensor for tensor, _ in tensors]


_PLAIN = {type(None), bool, int, float, str}  # most of what there is: asked first, for the time it takes
_EMPTY = {dict, OrderedDict, list, set}
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_CONTAINERS = (dict, list, tuple, set, deque)
_HOLDERS = (*_CONTAINERS, Tensor, np.ndarray, nn.Module, *_GENERATORS)


def _content(container: Any) -> list:
    return list(container.items()) if isinstance(container, dict) else list(container)


def _same(now: list, before: list) -> bool:
    """By identity: what is held may be tensors, which have no truth value."""
    return len(now) == len(before) and all(
        a is b or (isinstance(a, tuple) and isinstance(b, tuple) and _same(list(a), list(b)))
        for a, b in zip(now, before, strict=True)
    )


@contextmanager
def placed(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Other tensor objects in the places of parameters and buffers, as transforms need; evaluation mode."""
    names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    places = [
        (where, key, own)
        for module in model.modules()
        for where in (module._parameters, module._buffers)
        for key, own in where.items()
        if own is not None
    ]
    modes = [(module, module.training) for module in model.modules() if module.training]
    if modes:
        model.eval()
    for where, key, own in places:
        where[key] = tensors[names[id(own)]]  # type: ignore[assignment]
    try:
        yield
    finally:
        for where, key, own in places:
            where[key] = own  # type: ignore[assignment]
        for module, mode in modes:
            module.training = mode


@contextmanager
def attention_as_products() -> Iterator[None]:
    """Attention as plain matrix products, which alone have every derivative and batching rule.

    Of other operations that ``vmap`` has no rule for, torch warns that it loops over them: slow, not wrong.
    """
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def recurrence_as_products(model: nn.Module, device: torch.device) -> AbstractContextManager[None]:
    """The fused recurrent layers of accelerators have one derivative, and that in training mode alone."""
    fused = device.type == "cuda" and any(isinstance(module, nn.RNNBase) for module in model.modules())
    return torch.backends.cudnn.flags(enabled=False) if fused else nullcontext()
