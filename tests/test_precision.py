"""Precision of a training step: bfloat16 against a plain loop with autocast, switches of TF32 put aside and back."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from cases import blobs, build, half_masks, images, small_conv_bn, small_mlp
from reference import loss_and_error, train_alone
from torch import backends, nn

import ticketlab as tl
from ticketlab.engine import graphed
from ticketlab.engine.recipe import Recipe
from ticketlab.engine.start import Start
from ticketlab.engine.training import train
from ticketlab.precision import float32_arithmetic
from ticketlab.state import state

BF16 = Recipe(steps=12, batch_size=16, optimizer="adam", learning_rate=3e-3, eval_every=5, precision="bfloat16")
F32 = torch.float32


def attention():
    return nn.Sequential(
        nn.Unflatten(1, (6, 1)), nn.Linear(1, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True),
        nn.Flatten(), nn.Linear(48, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("factory", "make_task", "noise"),
    [(small_mlp, blobs, False), (small_conv_bn, images, False), (attention, blobs, True)],
    ids=["mlp", "conv_bn", "attention with dropout"],
)
def test_bfloat16_is_a_plain_loop_with_autocast_to_the_bit(factory, make_task, noise):
    task, model = make_task(dtype=F32), build(factory, 3, F32)
    masks = half_masks(model, 3)
    begun = [Start(state(model), masks, seed) for seed in (3, 4)]
    outcome = train(model, begun, task, BF16, execution="loop", snapshot_steps=(7,))
    with torch.random.fork_rng():
        alone = train_alone(model, masks, task, BF16, 3, noise=noise, fused=True)
        full = train_alone(model, masks, task, replace(BF16, precision="float32"), 3, noise=noise, fused=True)
    for name, p in state(alone).params.items():
        assert p.dtype == outcome.end.params[name].dtype == F32
        assert torch.equal(outcome.end.params[name][0], p), name
    assert any(not torch.equal(p, state(alone).params[n]) for n, p in state(full).params.items())  # it does round
    loss, error = loss_and_error(alone, task.test.x, task.test.y)  # in float32
    assert outcome.metrics["test_loss_nats"][0] == pytest.approx(loss, abs=1e-5)
    assert outcome.metrics["test_error"][0] == error


def test_vmap_rounds_as_the_loop_does_but_for_the_order_of_sums():
    task, recipe = blobs(dtype=F32), replace(BF16, optimizer="sgd", learning_rate=0.05, clip_norm=1.0)
    models = [build(small_mlp, seed, F32) for seed in (0, 1)]
    begun = [Start(state(m), half_masks(m, 0), seed) for seed, m in enumerate(models)]
    loop, mapped = (train(models[0], begun, task, recipe, execution=e).end.params for e in ("loop", "vmap"))
    full = train(models[0], begun, task, replace(recipe, precision="float32"), execution="vmap").end.params
    for name, p in loop.items():
        assert mapped[name].dtype == F32
        torch.testing.assert_close(mapped[name], p, rtol=2e-2, atol=2e-2)
    assert any(not torch.equal(p, full[n]) for n, p in mapped.items())


def test_what_a_dtype_or_device_has_not_is_refused():
    wide, narrow = build(small_mlp), build(small_mlp, 0, torch.bfloat16)
    with pytest.raises(ValueError, match=r"'bfloat16' is for float32 weights: got \['torch.float64'\]"):
        train(wide, [Start(state(wide), {}, 0)], blobs(), BF16)
    with pytest.raises(ValueError, match=r"for float32 weights: got \['torch.bfloat16'\]"):
        train(narrow, [Start(state(narrow), {}, 0)], blobs(dtype=torch.bfloat16), BF16)
    with pytest.raises(ValueError, match="'bfloat16' is for float32 weights: dtype is float64"):
        tl.ImpConfig(dtype="float64", recipe=BF16)
    single = build(small_mlp, 0, F32)
    with pytest.raises(ValueError, match="'tf32' is of CUDA devices"):
        train(single, [Start(state(single), {}, 0)], blobs(dtype=F32), replace(BF16, precision="tf32"))
    with pytest.raises(ValueError, match="bfloat16"):
        replace(BF16, precision="bfloat")
    model = build(small_mlp, 0, F32)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"would be autocast's|torch\.autocast"),
    ):
        train(model, [Start(state(model), {}, 0)], blobs(dtype=F32), BF16)


# Switches: their state can be set and read without the device.

OPERATIONS = {
    "cuda": (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn),
    "cpu": (backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn),
}


def switches():
    newer = [one.fp32_precision for group in OPERATIONS.values() for one in group]
    try:
        return [*newer, torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32]
    except RuntimeError:  # newer ones say something else
        return newer


@contextmanager
def switched(how):
    before = [(one, one.fp32_precision) for group in OPERATIONS.values() for one in group]
    older = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    try:
        how()
        yield
    finally:
        torch.set_float32_matmul_precision(older[0])
        backends.cudnn.allow_tf32 = older[1]
        for one, precision in before:
            one.fp32_precision = precision


SWITCHES = {
    "as they come": lambda: None,
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "off": lambda: setattr(backends.cudnn, "allow_tf32", False),
    "newer": lambda: setattr(backends.cudnn.conv, "fp32_precision", "ieee"),
}


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("how", SWITCHES)
def test_what_global_switches_say_is_put_aside_and_back(how, device, tf32):
    with switched(SWITCHES[how]):
        before = switches()
        with float32_arithmetic(torch.device(device), tf32):
            found = {one.fp32_precision for one in OPERATIONS[device]}
            assert found == {"tf32"} if tf32 else found <= {"ieee", "none"}
        assert switches() == before


def test_training_and_measuring_do_not_ask_the_switches():
    seen = []

    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output = nn.Linear(6, 3)

        def forward(self, x):
            seen.append((self.training, backends.mkldnn.matmul.fp32_precision))
            return self.output(x)

    model, task = build(Asking, 0, F32), blobs(dtype=F32)
    with switched(lambda: torch.set_float32_matmul_precision("medium")):
        if backends.mkldnn.matmul.fp32_precision != "bf16":
            pytest.skip("the switch of this version of PyTorch does not reach the CPU")
        outcome = train(model, [Start(state(model), {}, 0)], task, replace(BF16, precision="float32"))
        steps = len(seen)
        tl.evaluate(model, outcome.end, task.test.x, task.test.y)
    assert {precision for training, precision in seen[steps:]} == {"ieee"}
    assert [p for training, p in seen[:steps] if training][-12:] == ["ieee"] * 12
    assert {p for training, p in seen[:steps] if not training} == {"ieee"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "change",
    [
        {"precision": "bfloat16"},
        {"precision": "tf32"},
        {"precision": "float32", "weight_decay": 0.1, "decay_all": False},
        {"precision": "float32", "label_smoothing": 0.2, "clip_norm": 0.5, "schedule": "one_cycle"},
    ],
    ids=["bfloat16", "tf32", "decay", "clip"],
)
def test_recorded_steps_are_those_of_the_loop(change, monkeypatch):
    task = images(dtype=F32).to("cuda")
    models = [build(small_conv_bn, seed, F32) for seed in (0, 1)]
    masks = [{n: m.cuda() for n, m in half_masks(model, 3).items()} for model in models]
    begun = [Start(state(m.cuda()), mask, 3) for m, mask in zip(models, masks, strict=True)]
    recorded = []
    monkeypatch.setattr(graphed, "run", lambda *args, run=graphed.run: (recorded.append(args[1]), run(*args))[1])
    recipe = replace(BF16, optimizer="adamw", **change)
    graph, loop = (train(models[0], begun, task, recipe, execution=e).end.params for e in ("auto", "loop"))
    assert sum(map(len, recorded)) == recipe.steps
    tolerance = 3e-3 if recipe.precision == "float32" else 2e-2  # Adam makes a step of rounding where gradients vanish
    for name, p in loop.items():
        torch.testing.assert_close(graph[name], p, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_float32_and_tf32_on_a_cuda_device():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 3, 16, 16, generator=generator), torch.arange(64) % 3
    task = tl.Task.from_tensors(x, y).to("cuda")
    model = build(lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.Flatten(), nn.Linear(32 * 196, 3)), 0, F32).cuda()
    recipe = Recipe(steps=1, batch_size=32, optimizer="sgd", learning_rate=0.1, momentum=0.0, eval_every=1)
    ends = {
        precision: train(model, [Start(state(model), {}, 0)], task, replace(recipe, precision=precision)).end.params
        for precision in ("float32", "tf32", "bfloat16")
    }
    wide = build(lambda: model).double()
    exact = train(wide, [Start(state(wide), {}, 0)], task.to(dtype=torch.float64), recipe).end.params["0.weight"]
    error = {k: float((v["0.weight"].double() - exact).abs().max()) for k, v in ends.items()}
    assert error["float32"] * 20 < error["tf32"] < error["bfloat16"]
