"""Real architectures x measures: each is right, against plain PyTorch in float64, or refused by name; none is silent.

`REFUSED` and `LEFT_OUT` say what is expected to be refused and what is not pruned: what changes there must be changed
here, knowingly.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, cached_property, partial

import pytest
import torch
from architectures import ALL, Architecture, normed, of_hugging_face
from reference import train_alone
from reference_measures import batchnorm_anew, network_between
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import ticketlab as tl
from ticketlab.data import batch_indices
from ticketlab.derivatives import gauss_newton_product, hessian_product
from ticketlab.engine.criteria import Evidence
from ticketlab.errors import Refused
from ticketlab.losses import CROSS_ENTROPY
from ticketlab.network import network
from ticketlab.seeds import kept_generators
from ticketlab.state import State, state

pytestmark = [
    pytest.mark.filterwarnings("ignore:only .* of the entries:UserWarning"),  # measure_prunable looks at it
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # reentrant checkpoints without a graph
]
Named = dict[str, Tensor]

COUPLED = "batch norm '1' keeps no running statistics"
HIDDEN = "use_reentrant=True"
NO_DOUBLE = "Expected mat_a to be Float32"
REFUSED: dict[str, dict[str, str]] = {
    # Its gradient hides in a backward pass of its own, where torch.autograd.grad does not go. Training does.
    "checkpointed_reentrant": {
        **dict.fromkeys(("kernel", "singular_values", "gradient", "curvature", "snip"), HIDDEN),
        "permutation": r"Dense must have hidden units that can be permuted: .*\(here: cat\)",
    },
    "checkpointed": {"permutation": r"Dense must have hidden units that can be permuted: .*\(here: cat\)"},
    "batch_statistics": dict.fromkeys(
        ("imp", "kernel", "path", "singular_values", "gradient", "curvature", "snip", "outputs"), COUPLED
    ),
    # Which experts see a token is up to values.
    "hf_mixtral": {"permutation": "must be traceable by torch.export .*: Could not guard on data-dependent expression"},
    # grouped_mm is not there in float64.
    "hf_mixtral_grouped": dict.fromkeys(
        ("imp", "kernel", "path", "singular_values", "gradient", "curvature", "snip", "outputs", "permutation",
         "effective_masks", "uses", "output_layer"), NO_DOUBLE
    ),
}  # fmt: skip

LEFT_OUT: dict[str, tuple[str, ...]] = {
    "lstm": ("embed.weight",),
    "gru": ("embed.weight",),
    "vit": ("token", "position"),
    "encoder": ("embedding.weight", "position"),
    "decoder": ("embedding.weight", "position"),
    "hf_vit": ("*.cls_token", "*.position_embeddings"),
    "hf_swin": ("*.relative_position_bias_table",),
    "hf_levit": ("*.attention_biases",),
    "hf_bert": ("*_embeddings.weight",),
    "hf_gpt2": ("*.wte.weight", "*.wpe.weight"),  # the first is the output layer's too
    "hf_t5_encoder": ("inner.shared.weight", "*.relative_attention_bias.weight"),
    "hf_llama": ("*.embed_tokens.weight",),
    "hf_mamba": ("*.embeddings.weight", "*.A_log"),
    "hf_mixtral": ("*.embed_tokens.weight", "*.mlp.gate.weight", "*.mlp.experts.*"),
    "hf_mixtral_grouped": ("*.embed_tokens.weight", "*.mlp.gate.weight", "*.mlp.experts.*"),
    "tv_convnext": ("*.layer_scale",),
    "tv_vit": ("class_token", "*.pos_embedding"),
    "tv_swin": ("*.relative_position_bias_table",),
    "timm_vit": ("cls_token", "pos_embed"),
    "timm_swin": ("*.relative_position_bias_table",),
}
"""Matrices that are not prunable unless they are named: all others are."""

BY_HAND: dict[str, dict[str, float]] = {
    "lstm": {"cell.weight_*": 4},  # tokens
    "gru": {"cell.weight_*": 4},
    "hf_mamba": {"*.conv1d.weight": 6, "*.dt_proj.weight": 4},  # padded by 2 on both sides
    "hf_mixtral": {"*.experts.*": 4 * 2 / 3},  # tokens, of which each goes to 2 of 3
    "tv_vit": {"*.self_attention.*": 5},  # 4 patches and the class
    "tv_swin": {"features.1.*.attn.*": 64, "features.3.*.attn.*": 16},  # patches
}
"""How often one example uses weights that no module of their own multiplies with."""


@dataclass(frozen=True)
class Case:
    """One architecture with all that the measures take."""

    name: str
    arch: Architecture
    model: nn.Module
    """Lends its forward pass; of other weights than those that are measured."""
    net: nn.Module
    """What is measured, not pruned: a plain module with no weight, bias or statistic at its first value."""
    other: nn.Module
    """Another such network."""
    task: tl.Task

    @property
    def state(self) -> State:
        return state(self.net)

    @cached_property
    def masks(self) -> Named:
        """About two thirds of the weights, at random."""
        generator = torch.Generator().manual_seed(1)
        return {n: torch.rand(named(self.net)[n].shape, generator=generator) < 0.67 for n in prunable(self)}

    @property
    def ticket(self) -> nn.Module:
        """m * theta as a plain module of its own, in evaluation mode."""
        net = copy.deepcopy(self.net)
        with torch.no_grad():
            for name, mask in self.masks.items():
                named(net)[name][~mask] = 0.0
        return net

    def examples(self, n: int) -> tuple[Tensor, Tensor]:
        return self.task.train.x[:n], self.task.train.y[:n]

    def close(self, found: Tensor, expected: Tensor) -> None:
        """Equal but for rounding, relative to the largest entry, which is not zero."""
        size = float(expected.abs().max())
        assert found.shape == expected.shape and 0 < size < math.inf
        torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=self.arch.rounding * size)

    def all_close(self, found: Named, expected: Named) -> None:
        """The same of all tensors at once."""
        assert list(found) == list(expected)
        self.close(*(torch.cat([part[n].double().flatten() for n in expected]) for part in (found, expected)))


def named(net: nn.Module) -> dict[str, nn.Parameter]:
    return dict(net.named_parameters())


def trained(net: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in net.named_parameters() if p.requires_grad}


def prunable(case: Case) -> tuple[str, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tested apart
        return tl.masks.prunable(case.model, case.arch.prunable or None)


@cache
def case(name: str) -> Case:
    arch = ALL[name]
    if arch.missing:
        pytest.skip(arch.missing)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries' own
        model, *nets = (tl.initialise(arch.build, seed).double() for seed in range(3))
        task, generator = arch.task(), torch.Generator().manual_seed(7)
        if name != "hf_mixtral_grouped":
            for net in nets:
                disturb(net, task.train.x, generator)
            with torch.no_grad():
                model.eval()(task.train.x)  # what it keeps of its own weights must not be taken for others'
    return Case(name, arch, model.eval(), *(net.eval() for net in nets), task)


@torch.no_grad()
def disturb(net: nn.Module, x: Tensor, generator: torch.Generator) -> None:
    """No weight or bias stays at its first value; statistics are those of these inputs."""
    for p in net.parameters():
        p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.1)
    norms = [(m, m.momentum) for m in net.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    for norm, _ in norms:
        norm.momentum = 1.0
    net.train()(x)
    for norm, momentum in norms:
        norm.momentum = momentum


def loss_of(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy over examples, or over the tokens of all."""
    return F.cross_entropy(net(x).flatten(0, -2), y.flatten())


# The measures. Each takes a case, and asserts.


def measure_prunable(case: Case) -> None:
    left_out = [
        n for n, p in named(case.model).items() if any(fnmatchcase(n, one) for one in LEFT_OUT.get(case.name, ()))
    ]
    assert all(any(fnmatchcase(n, one) for n in left_out) for one in LEFT_OUT.get(case.name, ()))
    matrices = {n: p.numel() for n, p in named(case.model).items() if p.ndim > 1}
    share = 1 - sum(matrices[n] for n in left_out) / sum(matrices.values())
    expected = tuple(n for n in matrices if n not in left_out)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert tl.masks.prunable(case.model) == expected
    assert [f"only {100 * share:.1f} %" in str(one.message) for one in said] == [True] * (share < 0.5)
    if case.arch.prunable:
        chosen = [n for n in matrices if any(fnmatchcase(n, one) for one in case.arch.prunable)]
        assert tl.masks.prunable(case.model, case.arch.prunable) == tuple(chosen)


def measure_imp(case: Case) -> None:
    recipe = tl.Recipe(steps=3, batch_size=4, optimizer="sgd", learning_rate=0.05, eval_every=2)
    options = {"levels": 2, "prune_fraction": 0.3, "init_seeds": (5,), "treatments": ("ticket",), "rewind_step": 1}
    config = tl.ImpConfig(**options, recipe=recipe, dtype="float64", prunable=case.arch.prunable)
    levels = list(tl.imp(config, model=case.arch.build, task=case.task, store=None, progress=False))
    masks = {n: torch.ones_like(named(case.model)[n], dtype=torch.bool) for n in prunable(case)}
    initial = tl.initialise(case.arch.build, 5).double()
    rewound, end = plain_training(initial, masks, case.task, recipe, first=0)
    for level in levels:
        if level.level:
            masks = pruned_by_sorting(masks, end, 0.3)
            _, end = plain_training(rewound, masks, case.task, recipe, first=1)
        assert all(torch.equal(level.masks[n][0], masks[n]) for n in masks)
        for found, expected in zip(level.end.select(0), state(end), strict=True):
            assert list(found) == list(expected)
            for name, tensor in expected.items():  # 1, for some are zero
                case.close(found[name].double() + 1, tensor.double() + 1)
        with torch.no_grad():
            loss = loss_of(end.eval(), case.task.test.x, case.task.test.y)
        assert level.metrics["test_loss_nats"][0] == pytest.approx(float(loss), rel=case.arch.rounding)


def plain_training(
    initial: nn.Module, masks: Named, task: tl.Task, recipe: tl.Recipe, first: int
) -> tuple[nn.Module, nn.Module]:
    """The network at step 1 and at the end, by a plain loop with the batches of the engine."""
    net = copy.deepcopy(initial).train()
    weights, rewound = named(net), net
    with torch.no_grad():
        for name, mask in masks.items():
            weights[name] *= mask
    optimizer = torch.optim.SGD(net.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum)
    for step in range(first, recipe.steps):
        rewound = copy.deepcopy(net) if step == 1 else rewound
        index = batch_indices(len(task.train), recipe.batch_size, 5, step)
        optimizer.zero_grad()
        loss_of(net, task.train.x[index], task.train.y[index]).backward()
        for name, mask in masks.items():
            if weights[name].grad is not None:
                weights[name].grad *= mask
        optimizer.step()
    return rewound, net


def pruned_by_sorting(masks: Named, net: nn.Module, fraction: float) -> Named:
    """The least of the live weights go, all layers together."""
    live = torch.cat([m.flatten() for m in masks.values()])
    sizes = torch.cat([named(net)[n].detach().abs().flatten() for n in masks])
    order = torch.sort(torch.where(live, sizes, torch.inf), stable=True).indices
    live[order[: math.floor(fraction * int(live.sum()) + 0.5)]] = False
    parts = live.split([m.numel() for m in masks.values()])
    return {n: part.view_as(masks[n]) for n, part in zip(masks, parts, strict=True)}


def measure_kernel(case: Case) -> None:
    x, _ = case.examples(2)
    theta = tl.ntk.kernel(case.model, case.state, x, masks=case.masks)
    net = case.ticket
    outputs, weights = net(x).flatten(), trained(net)  # a batch: see architectures.Stem
    of_weights = partial(torch.autograd.grad, inputs=list(weights.values()), retain_graph=True, materialize_grads=True)
    rows = [live_part(case, dict(zip(weights, of_weights(output), strict=True))) for output in outputs]
    jacobian = torch.stack([torch.cat([part.flatten() for part in row.values()]) for row in rows])
    case.close(theta.flatten(2).flatten(0, 1), jacobian @ jacobian.T)


def live_part(case: Case, tensors: Named) -> Named:
    return {n: t * case.masks[n] if n in case.masks else t for n, t in tensors.items()}


def measure_path(case: Case) -> None:
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in case.model.modules())
    for statistics in ("keep", "recalibrate")[: 1 + norms]:
        path = tl.connectivity.linear_path(
            case.model, case.state, state(case.other), case.task, masks=case.masks, n_alphas=3, batchnorm=statistics
        )
        for i, alpha in enumerate((0.0, 0.5, 1.0)):
            net = network_between(case.net, case.other, case.masks, alpha)
            net = batchnorm_anew(net, case.task.train.x) if statistics == "recalibrate" else net
            for split in ("train", "test"):
                x, y = getattr(case.task, split).x, getattr(case.task, split).y
                with torch.no_grad():
                    outputs = torch.cat([net(one[None]) for one in x]).double()
                loss, error = F.cross_entropy(outputs.flatten(0, -2), y.flatten()), (outputs.argmax(-1) != y).double()
                assert path.curves[split, "loss_nats"][i] == pytest.approx(float(loss), rel=case.arch.rounding)
                assert path.curves[split, "error"][i] == pytest.approx(float(error.mean()))


def measure_singular_values(case: Case) -> None:
    x, source = case.examples(2)[0], case.arch.source
    measure = partial(tl.signal.jacobian_singular_values, case.model, case.state, x, masks=case.masks)
    if source is not None:
        with pytest.raises(Refused, match=r"x must be floating .* Name source="):
            measure()
    found, expected, net = measure(source=source), [], case.ticket
    before = (x.clone() if source is None else net.get_submodule(source)(x).detach()).requires_grad_()
    after = behind(net, source, x, before).flatten(1)
    for i in range(len(x)):
        rows = [torch.autograd.grad(output, before, retain_graph=True)[0][i].flatten() for output in after[i]]
        expected.append(torch.linalg.svdvals(torch.stack(rows)))
    case.close(found, torch.stack(expected))


def behind(net: nn.Module, source: str | None, x: Tensor, values: Tensor) -> Tensor:
    """Outputs where the input, or what module ``source`` returns, is this."""
    if source is None:
        return net(values)
    handle = net.get_submodule(source).register_forward_hook(lambda *_: values)
    try:
        return net(x)
    finally:
        handle.remove()


def plain_gradient(case: Case) -> Named:
    net = case.ticket
    loss = loss_of(net, *case.examples(4))
    found = torch.autograd.grad(loss, list(trained(net).values()), materialize_grads=True, allow_unused=True)
    return dict(zip(trained(net), found, strict=True))


def measure_gradient(case: Case) -> None:
    found = tl.gradients.gradient(case.model, case.state, *case.examples(4), masks=case.masks, batch_size=3)
    case.all_close(found, live_part(case, plain_gradient(case)))


def measure_curvature(case: Case) -> None:
    """Products with the Hessian against double backward, with Gauss-Newton against the rows of the Jacobian."""
    (x, y), generator = case.examples(3), torch.Generator().manual_seed(5)
    one = network(case.model, case.state, x, masks=case.masks)
    weights = trained(case.net)
    v = live_part(case, {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in weights.items()})
    products = [f(one, x, y, CROSS_ENTROPY, v, batch_size=2) for f in (hessian_product, gauss_newton_product)]
    net = case.ticket
    inner = list(trained(net).values())
    grad = partial(torch.autograd.grad, materialize_grads=True, allow_unused=True)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have one derivative
        z = net(x)
        slopes = grad(F.cross_entropy(z.flatten(0, -2), y.flatten()), inner, create_graph=True)
        twice = grad(sum((g * v[n]).sum() for n, g in zip(v, slopes, strict=True)), inner, retain_graph=True)
        rows = [grad(output, inner, retain_graph=True) for output in z.flatten()]
    case.all_close(products[0], dict(zip(v, twice, strict=True)))
    pushed = torch.stack([sum((g * v[n]).sum() for n, g in zip(v, row, strict=True)) for row in rows]).view_as(z)
    p = z.detach().softmax(-1)
    bent = p * (pushed - (p * pushed).sum(-1, keepdim=True)) / z[..., 0].numel()
    expected = [sum(b * g for b, g in zip(bent.flatten(), column, strict=True)) for column in zip(*rows, strict=True)]
    case.all_close(products[1], dict(zip(v, expected, strict=True)))


def measure_snip(case: Case) -> None:
    evidence = Evidence(case.model, case.masks, state(case.model), case.state, *case.examples(4))
    found = tl.criteria.score("snip", evidence)
    gradient, weights = plain_gradient(case), named(case.ticket)
    case.all_close(found, {n: (gradient[n] * weights[n].detach()).abs() for n in case.masks})


def measure_permutation(case: Case) -> None:
    x, _ = case.examples(3)
    groups = tl.permutation.groups(case.model, x)
    pi = tl.permutation.random(groups, 0)
    net = case.ticket
    own = {n: p.detach().clone() for n, p in (*net.named_parameters(), *net.named_buffers())}
    moved = tl.permutation.permute(groups, own, pi)
    for group in groups.sizes:
        assert any(not torch.equal(moved[n], own[n]) for n in named(net) if group in groups.of(n))
    with torch.no_grad():
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            tensor.copy_(moved[name])
        case.close(net(x), case.ticket(x))


def measure_outputs(case: Case) -> None:
    x, _ = case.examples(4)
    with torch.no_grad():
        case.close(tl.apply(case.model, case.state, x, masks=case.masks), case.ticket(x))


def measure_output_layer(case: Case) -> None:
    """The last linear layer that runs."""
    found = tl.graph.output_layers(case.model, case.examples(4)[0])
    net, last = case.ticket, list[nn.Module]()
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, *_: last.append(module))
    net(case.examples(1)[0])
    assert found == tuple(n for n, p in named(net).items() if p is last[-1].weight)


def measure_uses(case: Case) -> None:
    """Outputs of a layer over its channels; what is a function's counts by hand."""
    x, _ = case.examples(1)
    found = tl.graph.uses(case.model, x, prunable(case))
    expected: dict[str, float] = {}

    def note(name: str, width: int, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        expected[name] = expected.get(name, 0) + output.numel() / width

    net = case.ticket
    for name in prunable(case):
        module = net.get_submodule(name.rpartition(".")[0])
        width = next((getattr(module, a) for a in ("out_features", "out_channels", "nf") if hasattr(module, a)), None)
        if width is not None:
            module.register_forward_hook(partial(note, name, width))
    net(x)
    for pattern, n in BY_HAND.get(case.name, {}).items():
        expected |= {name: n for name in prunable(case) if fnmatchcase(name, pattern)}
    assert found == pytest.approx(expected)


def measure_effective_masks(case: Case) -> None:
    """Of a positive network without biases, the outputs depend on weights on a live path, not on others."""
    masks, first = dict(case.masks), next(iter(case.masks))
    masks[first] = masks[first] & (torch.arange(len(masks[first])) % 2 == 0).view(-1, *[1] * (masks[first].ndim - 1))
    found = tl.graph.effective_masks(case.model, masks, case.examples(2)[0])
    assert list(found) == list(masks) and all((found[n] <= masks[n]).all() for n in masks)
    generator, net = torch.Generator().manual_seed(3), copy.deepcopy(case.model)

    def some(live: bool) -> list[tuple[str, int]]:
        places = [(n, int(i)) for n, m in masks.items() for i in (m & (found[n] == live)).view(-1).nonzero()]
        return [places[i] for i in torch.randperm(len(places), generator=generator)[:10].tolist()]

    alive, dead = some(True), some(False)
    for draw in range(24):  # behind a norm a ReLU is shut at some
        x = make_positive(net, masks, case.examples(2)[0], generator, signs=draw % 2 == 1)
        assert draw > 1 or not any(matters(net, *place, x) for place in dead)
        alive = [place for place in alive if not matters(net, *place, x)]
    assert not alive


def matters(net: nn.Module, name: str, index: int, x: Tensor) -> bool:
    """Whether the outputs change with one weight."""
    weight = named(net)[name].data.view(-1)
    before, own = net(x), float(weight[index])
    weight[index] = 3 * own
    after = net(x)
    weight[index] = own
    return not torch.equal(before, after)


@torch.no_grad()
def make_positive(net: nn.Module, masks: Named, x: Tensor, generator: torch.Generator, signs: bool) -> Tensor:
    """Random positive weights without biases, ``signs``: scales of norms are not positive alone; inputs like those."""
    for name, p in net.named_parameters():
        draw = torch.rand(p.shape, generator=generator, dtype=p.dtype) + 0.5
        if name in masks:
            p.copy_(draw * masks[name] / p[0].numel())
        elif "bias" in name.rpartition(".")[2]:
            p.zero_()
        elif p.ndim == 1:
            p.copy_(draw * (1 - 2 * (torch.rand(p.shape, generator=generator) < 0.5 * signs).to(p.dtype)))
    return torch.rand(x.shape, generator=generator, dtype=x.dtype) if x.is_floating_point() else x


MEASURES: dict[str, Callable[[Case], None]] = {
    name.removeprefix("measure_"): f for name, f in list(globals().items()) if name.startswith("measure_")
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", ALL)
def test_right_or_refused_by_name(name, measure):
    one = case(name)
    before, attributes = state(one.model), [dict(vars(m)) for m in one.model.modules()]
    refusal = REFUSED.get(name, {}).get(measure)
    if refusal:
        with pytest.raises(Refused, match=refusal):
            MEASURES[measure](one)
    else:
        MEASURES[measure](one)
    for now, then in zip(state(one.model), before, strict=True):  # the module is as it was
        assert all(torch.equal(now[n], then[n]) for n in then)
    assert all(vars(m) == then for m, then in zip(one.model.modules(), attributes, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_of_measures(name):
    assert set(REFUSED[name]) <= set(MEASURES) and name in ALL


@pytest.mark.parametrize("name", ["stem", "stem_instance_norm", "hf_levit", "checkpointed"])
def test_one_example_has_the_derivatives_that_it_has_in_a_batch(name):
    one = case(name)

    def measured(n: int) -> list[Tensor]:
        x, y = (part[[0] * n] for part in one.examples(1))
        kernels = [
            tl.ntk.kernel(one.model, one.state, x, masks=one.masks, method=method)[0, :, 0]
            for method in ("auto", "generic")
        ]
        evidence = Evidence(one.model, one.masks, one.state, one.state, x, y)
        by_name = (
            tl.gradients.gradient(one.model, one.state, x, y, masks=one.masks),
            tl.criteria.score("obd_gauss_newton", evidence),
        )
        flat = [torch.cat([part.flatten() for part in some.values()]) for some in by_name]
        return [*kernels, *flat, tl.signal.jacobian_singular_values(one.model, one.state, x, masks=one.masks)[0]]

    for found, expected in zip(measured(1), measured(2), strict=True):
        one.close(found, expected)
    one.close(measured(1)[0], tl.ntk.kernel(one.model, one.state, one.examples(2)[0], masks=one.masks)[0, :, 0])


BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 2}


@pytest.mark.parametrize(
    "arch",
    [
        Architecture(partial(normed, nn.BatchNorm2d, dropout=0.5)),
        of_hugging_face("BertForSequenceClassification", **BERT),
        of_hugging_face("SwinForImageClassification", **SWIN, hidden_dropout_prob=0.0),
    ],
    ids=["dropout", "bert", "swin_drop_path"],
)
def test_what_draws_as_it_trains_is_seeded(arch):
    if arch.missing:
        pytest.skip(arch.missing)
    recipe = tl.Recipe(steps=2, batch_size=4, optimizer="sgd", learning_rate=0.1)
    config = tl.ImpConfig(levels=0, init_seeds=(0,), order_seeds=(3,), dtype="float64", recipe=recipe)
    study = tl.Study(config, model=arch.build, task=arch.task(), progress=False)
    [level] = study.levels(None)
    with kept_generators():
        alone = train_alone(study.initialised(0), {}, study.task, recipe, 3, noise=True)
    for name, p in alone.named_parameters():
        torch.testing.assert_close(level.end.params[name][0], p.detach(), rtol=1e-9, atol=1e-9)


class Coupled(nn.Module):
    """What it takes of the rest of the batch is nothing at first."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.head = nn.Parameter(torch.zeros(())), nn.Linear(768, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.gain * x.amax(0)).flatten(1))


def test_coupling_that_first_weights_hide_is_refused_where_training_shows_it():
    config = tl.ImpConfig(levels=0, init_seeds=(0,), dtype="float64", recipe=tl.Recipe(steps=2, batch_size=4))
    with pytest.raises(Refused, match="each example must pass through the network by itself"):
        next(tl.imp(config, model=Coupled, task=Architecture(Coupled).task(), store=None, progress=False))
