"""What is carried is exact, a ticket carried to its own source is itself, and what does not fit is refused."""

from __future__ import annotations

import pytest
import torch
from cases import blobs, build, half_masks, images, small_conv_bn, small_mlp
from torch import nn

import ticketlab as tl
from ticketlab import masks as mask_ops
from ticketlab.engine.transfer import carry
from ticketlab.masks import masked
from ticketlab.models import mlp
from ticketlab.state import stack, stack_states

OUTPUT = {"output.weight", "output.bias"}


def more_classes():
    return mlp((6,), 4, hidden=(8, 5))


def other_inputs():
    return mlp((7,), 3, hidden=(8, 5))


def source():
    """The masks and the weights of a source."""
    net = build(small_mlp, 1)
    return half_masks(net, 0), tl.state(net)


def assert_equal(a, b, names=None):
    for name in names or a:
        assert torch.equal(a[name], b[name]), name


# What is carried


def test_the_mask_alone_leaves_the_fresh_weights():
    masks, _ = source()
    net = build(small_mlp, 2)
    start = carry(net, tl.state(net), dict(reversed(masks.items())), 7)
    assert_equal(start.masks, masks)
    assert list(start.masks) == list(mask_ops.prunable(net))
    assert_equal(start.state.params, tl.state(net).params)
    assert start.order_seed == 7 and not start.frozen and start.learning_rate is None


def test_mask_and_weights_are_the_sources_on_every_kept_position():
    masks, weights = source()
    net = build(small_mlp, 2)
    start = carry(net, tl.state(net), masks, 0, weights=weights)
    assert_equal(start.masks, masks)
    assert_equal(masked(start.state.params, start.masks), masked(weights.params, masks))


def test_buffers_come_with_the_weights():
    net, own = build(small_conv_bn, 0), build(small_conv_bn, 1)
    weights = tl.state(own)
    weights.buffers["1.running_mean"].fill_(3.0)
    masks = mask_ops.ones(net)
    assert_equal(carry(net, tl.state(net), masks, 0, weights=weights).state.buffers, weights.buffers)
    assert_equal(carry(net, tl.state(net), masks, 0).state.buffers, tl.state(net).buffers)


@pytest.mark.parametrize("with_weights", [False, True])
def test_the_output_layer_is_fresh_and_dense_where_class_counts_differ(with_weights):
    masks, weights = source()
    net = build(more_classes, 2)
    fresh = tl.state(net)
    start = carry(net, fresh, masks, 0, weights=weights if with_weights else None)
    assert start.masks["output.weight"].shape == (4, 5) and start.masks["output.weight"].all()
    rest = set(fresh.params) - OUTPUT
    assert_equal(start.masks, masks, set(masks) - OUTPUT)
    assert_equal(start.state.params, fresh.params, OUTPUT)
    assert_equal(start.state.params, weights.params if with_weights else fresh.params, rest)


class HeadFirst(nn.Module):
    """The output layer is registered first, and weight-normalised; something else ends the list."""

    def __init__(self, classes: int = 3, normed: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(5, classes)
        if normed:
            nn.utils.parametrizations.weight_norm(self.head)
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 5)

    def forward(self, x):
        return self.head(self.last(self.first(x).relu()).relu())


@pytest.mark.parametrize("normed", [False, True])
def test_the_output_layer_is_where_shapes_differ_whatever_the_order(normed):
    own, net = build(lambda: HeadFirst(3, normed), 0), build(lambda: HeadFirst(4, normed), 1)
    masks, weights, fresh = half_masks(own, 0), tl.state(own), tl.state(net)
    masks = {name: masks[name] for name in mask_ops.prunable(own)}
    start = carry(net, fresh, masks, 0, weights=weights, x=blobs().train.x[:3])
    head = {name for name in fresh.params if name.startswith("head.")}
    assert len(head) == (3 if normed else 2)
    assert_equal(start.state.params, fresh.params, head)
    assert_equal(start.state.params, weights.params, set(fresh.params) - head)
    assert all(start.masks[n].all() for n in head & set(masks)) and list(start.masks) == list(mask_ops.prunable(net))
    assert_equal(start.masks, masks, set(masks) - head)


def test_masks_name_what_was_pruned_and_the_head_may_be_left_out():
    masks, weights = source()
    masks = {"fc2.weight": masks["fc2.weight"]}
    net = build(more_classes, 2)
    start = carry(net, tl.state(net), masks, 0, weights=weights)
    assert_equal(start.masks, masks)
    assert_equal(start.state.params, tl.state(net).params, OUTPUT)
    assert_equal(start.state.params, weights.params, set(weights.params) - OUTPUT)
    wider = build(lambda: mlp((6,), 3, hidden=(8, 7)), 2)  # of the mask alone it might be an output layer
    carry(wider, tl.state(wider), masks, 0)
    with pytest.raises(ValueError, match=r"\['fc2.weight'\] make no outputs of the receiving model"):
        carry(wider, tl.state(wider), masks, 0, x=blobs().train.x[:3])


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.output = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.output(x + self.branch(x))


def test_an_empty_layer_is_carried_where_a_live_path_is_left():
    net, x = build(Branches), blobs().train.x[:3]
    masks = mask_ops.ones(net) | {"branch.weight": torch.zeros(5, 5, dtype=torch.bool)}
    for inputs in (None, x):
        assert_equal(carry(net, tl.state(net), masks, 0, x=inputs).masks, masks)
    cut = masks | {"stem.weight": torch.zeros(5, 6, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"a live path .* empty are \['stem.weight', 'branch.weight'\]"):
        carry(net, tl.state(net), cut, 0, x=x)
    with pytest.raises(ValueError, match="a ticket must keep a live weight: all layers are empty"):
        carry(net, tl.state(net), {n: torch.zeros_like(m) for n, m in masks.items()}, 0)


def test_a_ticket_carried_to_its_own_source_is_itself():
    """Mask and theta0 give the training of the ticket bit for bit, mask and theta_k that of a late-rewound one."""
    task = blobs()
    for k in (0, 6):
        recipe = tl.Recipe(steps=20, batch_size=16, eval_every=10)
        config = tl.ImpConfig(levels=2, init_seeds=(0, 1), rewind_step=k, treatments=("ticket",), recipe=recipe,
                              dtype="float64")  # fmt: skip
        dense, _, level = tl.imp(config, model=small_mlp, task=task, store=None, device="cpu", execution="loop")
        net = build(small_mlp, 5)
        starts = []
        for seed in (0, 1):
            ticket, weights = level.select(init_seed=seed), dense.select(init_seed=seed).snapshots[k]
            starts.append(carry(net, tl.state(net), ticket.masks, seed, weights=weights))
        outcome = tl.train(net, starts, task, recipe, first_step=k, execution="loop")
        assert_equal(outcome.end.params, level.end.params)
        assert outcome.metrics["test_error"].tolist() == level.metrics["test_error"].tolist()


# Refusals


def test_masks_of_another_model_are_refused():
    net = build(small_mlp, 0)
    conv = mask_ops.ones(build(small_conv_bn))
    with pytest.raises(ValueError, match=r"masks must be of the receiving model, with layers among .*one architecture"):
        carry(net, tl.state(net), conv, 0)
    wider = mask_ops.ones(build(lambda: mlp((6,), 3, hidden=(9, 5))))
    with pytest.raises(ValueError, match=r"only the number of classes may differ.*'fc1.weight'.*one architecture"):
        carry(net, tl.state(net), wider, 0)
    last = mask_ops.ones(build(lambda: mlp((6,), 3, hidden=(8, 6))))
    with pytest.raises(ValueError, match=r"only the number of classes may differ.*'fc2.weight'"):
        carry(net, tl.state(net), last, 0)
    with pytest.raises(ValueError, match=r"masks must be one network's: .*level.select"):
        carry(net, tl.state(net), stack([mask_ops.ones(net)] * 2), 0)
    with pytest.raises(ValueError, match=r"must be bool, True = kept: got torch.float32"):
        carry(net, tl.state(net), {name: mask.float() for name, mask in mask_ops.ones(net).items()}, 0)


def test_a_fresh_state_of_another_network_is_refused():
    net = build(small_mlp, 0)
    for wrong in (build(small_conv_bn), build(lambda: mlp((6,), 3, hidden=(9, 5))), build(more_classes)):
        with pytest.raises(ValueError, match=r"fresh must be one network's state, of the receiving model: .*weight"):
            carry(net, tl.state(wrong), mask_ops.ones(net), 0)
    with pytest.raises(ValueError, match="fresh must be one network's state"):
        carry(net, stack_states([tl.state(net)] * 2), mask_ops.ones(net), 0)


def test_inputs_of_another_size_are_refused_with_what_to_do():
    net = build(other_inputs, 0)
    with pytest.raises(ValueError, match=r"'fc1.weight'.*\(8, 6\).*\(8, 7\).*--resize"):
        carry(net, tl.state(net), mask_ops.ones(build(small_mlp)), 0)


def test_weights_that_do_not_fit_are_refused():
    masks, weights = source()
    net = build(small_mlp, 0)
    message = "weights must be one network's state, parameters and buffers, of the receiving architecture"
    with pytest.raises(ValueError, match=message):
        carry(net, tl.state(net), masks, 0, weights=stack_states([weights] * 2))
    with pytest.raises(ValueError, match=message):
        carry(net, tl.state(net), masks, 0, weights=tl.state(build(other_inputs)))
    conv = build(small_conv_bn)
    without = tl.State(tl.state(conv).params, {})
    with pytest.raises(ValueError, match=rf"{message}.*running_mean"):
        carry(conv, tl.state(conv), mask_ops.ones(conv), 0, weights=without)


def test_a_transferred_convolution_trains():
    task = images()
    net, own = build(small_conv_bn, 0), build(small_conv_bn, 1)
    start = carry(net, tl.state(net), half_masks(net, 0), 0, weights=tl.state(own))
    outcome = tl.train(net, [start], task, tl.Recipe(steps=2, batch_size=16))
    for name, mask in start.masks.items():
        assert not outcome.end.params[name][0][~mask].any()
