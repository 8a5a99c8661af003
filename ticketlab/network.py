"""A module at m * theta in evaluation mode: built, checked and refused in one place.

Whatever is measured or scored is a ``Network``. It lends the user's module its tensors and gives everything back,
bit for bit, ``__dict__`` included. There are two ways to differentiate:

- ``with net.lent() as weights``: the module's own parameters hold m * theta until the block ends, backward passes
  included. Whatever works in plain PyTorch works there: hooks, closures, checkpointing, recurrent nets.
- ``net.call(weights, x)``, inside such a block: the same as a pure function, for ``torch.func`` transforms. A fast
  path; where an operation has no rule it raises, and where a rule is wrong only a check against the first way shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm

from ticketlab import masks as mask_ops
from ticketlab.batches import portion
from ticketlab.errors import Refused, check_type
from ticketlab.lending import attention_as_products, forget, lent, placed, recurrence_as_products
from ticketlab.losses import CROSS_ENTROPY, Loss
from ticketlab.precision import float32_arithmetic
from ticketlab.probing import attempt, check_examples, close, few, probe, watching_generators
from ticketlab.seeds import kept_generators
from ticketlab.shown import as_line, as_table
from ticketlab.state import Buffers, Masks, Params, State, check_finite, check_module, select

Execution = Literal["auto", "loop", "vmap"]


@dataclass(frozen=True)
class Network:
    """One network, or a stack of them, that has passed the checks of `network`."""

    model: nn.Module
    """Lends its forward pass; not changed."""
    params: Params
    """m * theta, detached; with the replica axis first where there is one."""
    buffers: Buffers
    """Floating ones in the dtype of the weights."""
    masks: Masks | None = None
    """True = kept; stacked or not."""
    replicas: int | None = None
    """Length of the replica axis; None for a single network."""
    writes_input: bool = True
    """Whether the forward pass may write into its input, which then gets a copy."""
    writes_params: bool = True
    """Whether it may write into parameters."""

    __repr__, _repr_html_ = as_line, as_table

    @property
    def dtype(self) -> torch.dtype:
        """Of the first floating parameter."""
        return next((p.dtype for p in self.params.values() if p.is_floating_point()), torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.params.values()), torch.device("cpu"))

    @cached_property
    def trainable(self) -> tuple[str, ...]:
        """Names of the parameters that require a gradient."""
        return tuple(name for name, p in self.model.named_parameters() if p.requires_grad)

    @cached_property
    def live(self) -> dict[str, Tensor]:
        """Live coordinates of every trainable parameter: kept weights, and all of what has no mask."""
        ones = {n: torch.ones_like(self.params[n], dtype=torch.bool) for n in self.trainable}
        return {n: one & self.masks[n] if self.masks and n in self.masks else one for n, one in ones.items()}

    def each(self) -> Iterator[Network]:
        """The networks of a stack one by one; a single network is its own only one."""
        if self.replicas is None:
            yield self
            return
        for r in range(self.replicas):
            masks = self.masks and {n: m[r] if m.ndim == self.params[n].ndim else m for n, m in self.masks.items()}
            params, buffers = select(self.params, r), select(self.buffers, r)
            yield replace(self, params=params, buffers=buffers, masks=masks, replicas=None)

    @contextmanager
    def lent(self) -> Iterator[dict[str, nn.Parameter]]:
        """The module holds this network; yields its trainable parameters, whose values are m * theta."""
        assert self.replicas is None, "a stack is lent one network at a time: use each()"
        params = {n: p.clone() for n, p in self.params.items()} if self.writes_params else self.params
        buffers = {n: b.clone() for n, b in self.buffers.items()}  # which batch norm may write into
        with (
            lent(self.model, params, buffers),
            attention_as_products(),
            recurrence_as_products(self.model, self.device),
            float32_arithmetic(self.device),
        ):
            yield {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def forward(self, x: Tensor) -> Tensor:
        """f(x) of the module as it stands, inside `lent`; ``x`` is not written into."""
        forget(self.model)
        return self.model(x.clone() if self.writes_input else x)

    def call(self, weights: Mapping[str, Tensor], x: Tensor, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
        """f(x) as a pure function of named parameters; what ``weights`` lacks stays as it is here."""
        tensors = {**self.params, **self.buffers, **(buffers or {}), **weights}
        with attention_as_products(), placed(self.model, tensors):
            forget(self.model)
            return self.model(x.clone() if self.writes_input else x)

    @torch.no_grad()
    def __call__(self, x: Tensor, execution: Execution = "auto") -> Float[Tensor, "*replica_n_out"]:
        """Outputs without a graph, one network after another or by ``vmap`` where that gives the same."""
        if self._by_vmap(x, execution):
            return self._mapped(x)
        found = []
        for one in self.each():
            with one.lent():
                found.append(one.forward(x))
        return found[0] if self.replicas is None else torch.stack(found)

    @torch.no_grad()
    def evaluate(
        self, x: Tensor, y: Tensor, loss: Loss = CROSS_ENTROPY, batch_size: int = 2500, execution: Execution = "auto"
    ) -> tuple[Float[Tensor, "*replica"], Float[Tensor, "*replica"]]:
        """Mean loss in nats and error in [0, 1], float64: summed example by example, whatever the batches."""
        size = portion(x, y, batch_size)

        def means(forward: Callable[[Tensor], Tensor]) -> Float[Tensor, "*replica 2"]:
            total = torch.zeros(2, dtype=torch.float64, device=x.device)
            for xs, ys in zip(x.split(size), y.split(size), strict=True):
                one = loss.each(forward(xs), ys)
                total = total + torch.stack([part.sum(-1, dtype=torch.float64) for part in one], -1)
            return total / torch.full_like(total, len(y))  # a GPU multiplies by 1 / a plain number

        if self._by_vmap(x, execution):
            return means(self._mapped).unbind(-1)  # type: ignore[return-value]
        found = []
        for one in self.each():
            with one.lent():
                found.append(means(one.forward))
        return (found[0] if self.replicas is None else torch.stack(found)).unbind(-1)  # type: ignore[return-value]

    def _by_vmap(self, x: Tensor, execution: Execution) -> bool:
        if self.replicas is None or resolve(execution, self.model, x.device, self.replicas) == "loop":
            return False
        if x.shape[1:] not in self._mapping:
            self._mapping[x.shape[1:]] = self._maps(x[:2], required=execution == "vmap")
        return self._mapping[x.shape[1:]]

    @cached_property
    def _mapping(self) -> dict[torch.Size, bool]:
        """Whether ``vmap`` gives what the loop gives, by shapes of an input that were tried."""
        return {}

    def _mapped(self, x: Tensor) -> Tensor:
        def one(tensors: dict[str, Tensor]) -> Tensor:
            return self.call(tensors, x)

        # Copies are lent, for a forward pass may write into what it holds.
        with lent(self.model, None, None), float32_arithmetic(self.device):
            return vmap(one)({n: t.clone() for n, t in (self.params | self.buffers).items()})

    def _maps(self, x: Tensor, required: bool) -> bool:
        """Whether ``vmap`` has rules for all of the forward pass, and they give what the loop gives."""
        try:
            mapped = self._mapped(x)
        except Exception as error:  # whatever an operation without a rule raises
            if required:
                raise Refused(f"vmap cannot follow this model: {error}. Leave execution at 'auto'.") from error
            return False
        if required and not close(mapped, self(x, "loop")):
            raise Refused("vmap gives other outputs for this model than a loop does. Leave execution at 'auto'.")
        return required or close(mapped, self(x, "loop"))


def network(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
    x: Tensor | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    finite: bool = True,
    replaced: Collection[str] = (),
) -> Network:
    """The network m * theta, everything checked against the model and, where given, on inputs.

    Args:
        model: Lends its forward pass; not changed.
        state: Parameters and buffers, or a dict of parameters alone; single or stacked. Where only the masks are
            stacked (the levels of one network), parameters are the same on all of the axis.
        x: Inputs [n, ...] that it will see. On a few of them the outputs must be one tensor [n, ...], each
            example's its own, and the same twice.
        masks: True = kept; stacked or not.
        buffers: In place of those in ``state``; stacked or not.
        finite: Refuse weights, buffers, inputs or outputs that are not finite, of which statistics would be finite
            numbers. A buffer may hold -inf, as attention masks do.
        replaced: Names of buffers that the caller estimates anew: they need not be known.

    Raises:
        Refused: Names, shapes or dtypes that do not fit the model or one another; a dict of parameters where the
            forward pass reads buffers and they are not known; inputs that the model fails on; outputs that are no
            tensor, coupled or random.
    """
    if torch.is_inference_mode_enabled():
        raise Refused("a module lends its tensors outside of torch.inference_mode alone. Use torch.no_grad() instead.")
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise Refused(
            "numbers must not depend on who asks for them, and here they would be autocast's. Leave torch.autocast, or "
            "put it into the model's forward."
        )
    params, own_buffers = state if isinstance(state, State) else (state, None)
    given = buffers if buffers is not None else own_buffers
    replicas = n_replicas(model, params)
    if masks is not None:
        mask_ops.validate(model, masks)
    held = dict(model.named_buffers()) if given is None else dict(given)
    _check_buffers(model, held)
    replicas = _common_axis(model, replicas, masks or {}, held)
    if replicas is not None:
        params, held = _expanded(model, params, replicas, True), _expanded(model, held, replicas, False)
    params = {n: params[n].detach() for n, _ in model.named_parameters()}
    net = Network(
        model,
        mask_ops.masked(params, masks),
        _as_weights(held, params),
        None if masks is None else dict(masks),
        replicas,
    )
    if finite:
        check_finite("params", net.params)
        check_finite("buffers", {n: b.clamp(min=0) for n, b in net.buffers.items() if _dense(b)})
    if x is None:
        return net
    _check_inputs(net, x)
    if finite:
        check_finite("x", few(x))  # of those on disk all were checked when they were written
    if given is None:
        _refuse_unknown_buffers(net, x, replaced)
    writes_input, writes_params = _check_outputs(net, x, finite)
    return replace(net, writes_input=writes_input, writes_params=writes_params)


def apply(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
    x: Tensor,
    *,
    masks: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    execution: Execution = "auto",
) -> Float[Tensor, "*replica_n_out"]:
    """f(x; m * theta) in evaluation mode, for one network or a stack; arguments as in `network`."""
    return network(model, state, x, masks=masks, buffers=buffers, finite=False)(x, execution)


def evaluate(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    *,
    masks: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    loss: Loss = CROSS_ENTROPY,
    batch_size: int = 2500,
    execution: Execution = "auto",
) -> tuple[Float[Tensor, "*replica"], Float[Tensor, "*replica"]]:
    """Mean loss in nats and error in [0, 1] over a data set, in evaluation mode.

    Both are float64 and do not depend on ``batch_size`` beyond the rounding of the outputs: losses are summed in
    float64 and errors are counted as integers. A network with NaN weights has a NaN loss and errs everywhere.

    Returns:
        (loss_nats, error), each a scalar, or [replica] for a stack.

    Raises:
        Refused: As `network`, or targets that do not fit the outputs.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise Refused(f"batch_size must be at least 1 example: got {batch_size}.")
    check_type("loss", loss, Loss, "Pass task.objective, or losses.LOSSES[name].")
    net = network(model, state, x, masks=masks, buffers=buffers, finite=False)
    loss.check(y, len(x), output_shape(net, x))
    return net.evaluate(x, y, loss, batch_size, execution)


def output_shape(net: Network, x: Tensor) -> tuple[int, ...]:
    """Shape of the outputs of one example."""
    with torch.no_grad():
        return tuple(_attempt(next(net.each()), x[:1]).shape[1:])


def resolve(
    execution: Execution, model: nn.Module, device: torch.device, replicas: int | None = None
) -> Literal["loop", "vmap"]:
    """How a stack of replicas is computed: the one place where this is chosen.

    On an accelerator launches dominate and ``vmap`` shares them. On a CPU it pays for small fully connected
    networks alone, where Python's overhead dominates too; convolutions take a slow grouped path under it, fused
    attention, which networks of tokens have, a loop, and from about 10^5 weights on a thread for each replica is
    faster (measured by ``benchmarks/execution.py``).
    A single replica has nothing to share.
    """
    if execution not in ("auto", "loop", "vmap"):
        raise Refused(f"execution must be 'auto', 'loop' or 'vmap': got {execution!r}.")
    if execution != "auto":
        return execution
    if replicas == 1:
        return "loop"
    small = sum(p.numel() for p in model.parameters()) < 100_000
    return "vmap" if device.type != "cpu" or (small and of_matrices(model)) else "loop"


def of_matrices(model: nn.Module) -> bool:
    """Whether products with matrices are all its weights are for: neither convolutions nor tokens."""
    tokens = any(isinstance(module, nn.Embedding) for module in model.modules())
    return not tokens and all(p.ndim <= 2 for p in model.parameters())


# Checks.


def n_replicas(model: nn.Module, params: Mapping[str, Tensor]) -> int | None:
    """Length of the replica axis of ``params``; None when they are those of a single network.

    Raises:
        Refused: Names or shapes are neither the model's nor the model's behind one common axis; no module.
    """
    check_module(model)
    own = dict(model.named_parameters())
    if not isinstance(params, Mapping) or set(params) != set(own):
        names = set(params) if isinstance(params, Mapping) else set()
        missing, extra = sorted(set(own) - names), sorted(names - set(own))
        raise Refused(
            f"params must have the model's names: missing {missing}, unknown {extra}. "
            "Take them from tl.state(model) or from a level of the same model."
        )
    lengths: set[int | None] = set()
    for name, tensor in params.items():
        shape = tuple(own[name].shape)
        if not isinstance(tensor, Tensor) or tensor.is_floating_point() != own[name].is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise Refused(f"params[{name!r}] must be a tensor like the model's, {own[name].dtype}: got {kind}.")
        if tuple(tensor.shape) == shape:
            lengths.add(None)
        elif tensor.ndim == len(shape) + 1 and tuple(tensor.shape[1:]) == shape:
            lengths.add(tensor.shape[0])
        else:
            raise Refused(
                f"params[{name!r}] must have shape {shape}, or [replica, *{shape}]: got {tuple(tensor.shape)}."
            )
    if len(lengths) > 1:
        raise Refused(f"all params must share one replica axis: got lengths {sorted(map(str, lengths))}.")
    if 0 in lengths:
        raise Refused("a stack must hold one network at least: its replica axis has length 0.")
    return lengths.pop() if lengths else None


def _check_buffers(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    own = dict(model.named_buffers())
    for name in {*buffers, *own}:
        if name not in own or name not in buffers or not _fits(buffers[name], own[name]):
            given = tuple(buffers[name].shape) if name in buffers else "none"
            wanted = f"shape {tuple(own[name].shape)}" if name in own else f"a name among {sorted(own)}"
            raise Refused(
                f"buffers[{name!r}] must have {wanted}, or that shape behind the replica axis of params: got {given}. "
                "Take params and buffers together, as a State, from tl.state(model) or a level."
            )


def _fits(tensor: Tensor, own: Tensor) -> bool:
    return own.shape in (tensor.shape, tensor.shape[1:])


def _as_weights(buffers: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> Buffers:
    """Buffers on the device of the weights, floating ones in their dtype where all have one: float32 statistics must
    not pull a float64 network down with them."""
    dtypes = {p.dtype for p in params.values() if p.is_floating_point()}
    device = next((p.device for p in params.values()), None)
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    return {n: b.detach().to(device, dtype if b.is_floating_point() else None) for n, b in buffers.items()}


def _common_axis(
    model: nn.Module, replicas: int | None, masks: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> int | None:
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    lengths = {} if replicas is None else {"params": {replicas}}
    for what, tensors in (("masks", masks), ("buffers", buffers)):
        found = {len(t) for n, t in tensors.items() if t.ndim == own[n].ndim + 1}
        lengths |= {what: found} if found else {}
    if len(set().union(*lengths.values())) > 1:
        raise Refused(f"params, masks and buffers must share one replica axis: got lengths {lengths}.")
    return next(iter(set().union(*lengths.values())), None)


def _expanded(model: nn.Module, tensors: Mapping[str, Tensor], replicas: int, params: bool) -> dict[str, Tensor]:
    own = dict(model.named_parameters() if params else model.named_buffers())
    return {n: t if t.ndim > own[n].ndim else t.expand(replicas, *t.shape) for n, t in tensors.items()}


def _check_inputs(net: Network, x: Tensor) -> None:
    check_examples(x)
    dtypes = {p.dtype for p in net.params.values()}
    if net.params and x.is_floating_point() and x.dtype not in dtypes:
        raise Refused(
            f"x must have the dtype of params, {net.dtype}: got {x.dtype}. Cast one of the two, as x.to({net.dtype})."
        )
    if net.params and x.device != net.device:
        raise Refused(f"x must be on the device of params, {net.device}: it is on {x.device}.")


def _refuse_unknown_buffers(net: Network, x: Tensor, replaced: Collection[str]) -> None:
    """A dict of parameters beside the buffers of another network is a wrong number without a word."""
    own = mask_ops.masked({n: p.detach().expand_as(net.params[n]) for n, p in net.model.named_parameters()}, net.masks)
    unknown = [n for n, b in net.buffers.items() if b.is_floating_point() and n not in replaced]
    if unknown and not all(torch.equal(p, own[n]) for n, p in net.params.items()) and reads(net, x, unknown):
        raise Refused(
            "the model's forward pass reads buffers (such as running statistics), and those of these params are not "
            "known: pass a State, such as level.start or level.end, in place of its params, or buffers=..., or "
            "buffers=dict(model.named_buffers()) where the module's own are meant."
        )


def _dense(buffer: Tensor) -> bool:
    return buffer.is_floating_point() and buffer.layout == torch.strided


@torch.no_grad()
def reads(net: Network, x: Tensor, names: Collection[str]) -> bool:
    """Whether outputs depend on these floating buffers: seen by replacing their values with NaN, and with others."""
    one, few = _sound(net), x[:1].nan_to_num() if x.is_floating_point() else x[:1]
    with kept_generators():
        known = _attempt(one, few)
        for poison in (lambda b: b * torch.nan, lambda b: 1 - b.nan_to_num(0, 0, 0) if _dense(b) else 2 * b):
            other = replace(one, buffers=one.buffers | {n: poison(one.buffers[n]) for n in names})
            try:
                y = _attempt(other, few)
            except Refused:  # a value that the forward pass cannot do without
                return True
            if not ((y == known) | (y.isnan() & known.isnan())).all():
                return True
    return False


def _check_outputs(net: Network, x: Tensor, finite: bool) -> tuple[bool, bool]:
    """Whether the forward pass writes into its input, and into parameters; refuse outputs that are no tensor, coupled
    or random, or NaN."""
    for name, module in net.model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise Refused(
                f"outputs must not depend on the rest of the batch: batch norm {name!r} keeps no running statistics. "
                "Build it with track_running_stats=True."
            )
    one = next(net.each()) if finite else _sound(net)
    examples = probe(x)
    with torch.no_grad(), watching_generators(x.device) as drawn:
        try:
            y, again, writes = _passes(one, examples)
        except Refused:  # the example that is in no batch may be none that the model takes
            examples = examples[[0, 1, 0]]
            y, again, writes = _passes(one, examples)
    if drawn() or not close(y, again):
        raise Refused(
            "each example must pass through the network by itself, the same each time: an output depends on the rest "
            "of the batch, or on chance, in evaluation mode. Replace what couples a batch (batch statistics, sorting, "
            "routing), and give F.dropout its training=self.training."
        )
    if finite and y[:2].isnan().any():
        raise Refused("outputs must be numbers: the model gives NaN for finite inputs and weights. Look at the ranges.")
    return writes


def _sound(net: Network) -> Network:
    """One network whose outputs tell something: not a diverged one, where there is another."""
    if net.replicas is None:
        return net
    return next((one for one in net.each() if all(p.isfinite().all() for p in one.params.values())), next(net.each()))


def _passes(net: Network, examples: Tensor) -> tuple[Tensor, Tensor, tuple[bool, bool]]:
    """Outputs, and again with other examples beside each; and whether the passes write into inputs and parameters.

    All in one go, so that a module that counts its calls is told by its outputs. Whichever example the largest entry is
    in, another is seen without it: a batch divided by its maximum is told too.
    """
    inputs = examples.clone()
    version = inputs._version
    with net.lent():
        y = attempt(net.model, inputs, writes=True)
        into_input = inputs._version != version or not torch.equal(inputs, examples)
        first, third, second = (attempt(net.model, examples[i], writes=True) for i in ([0], [2], [2, 1, 1, 2]))
        into_params = not all(torch.equal(p, net.params[name]) for name, p in net.model.named_parameters())
    return y, torch.cat([first, second[1:2], third]), (into_input, into_params)


def _attempt(net: Network, x: Tensor) -> Tensor:
    with net.lent():
        return attempt(net.model, x)
