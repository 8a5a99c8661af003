"""The papers' networks: counts by hand, Glorot normal weights, zero biases, inputs they cannot take."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from ticketlab import masks, models
from ticketlab.models.resnet import Padded
from ticketlab.seeds import initialise
from ticketlab.state import state

# By hand, on 3x32x32 images and 10 classes: 3x3 convolutions, then 256-256-10 on the pooled image.
CONV_WEIGHTS = {
    2: [27 * 64, 576 * 64],
    4: [27 * 64, 576 * 64, 576 * 128, 1152 * 128],
    6: [27 * 64, 576 * 64, 576 * 128, 1152 * 128, 1152 * 256, 2304 * 256],
}
CONV_INPUTS = {2: 64 * 16 * 16, 4: 128 * 8 * 8, 6: 256 * 4 * 4}
CONV_TOTALS = {2: 4_300_992, 4: 2_425_024, 6: 2_261_184}


def build(name, shape=(3, 32, 32), n_classes=10, seed=0):
    return initialise(lambda: models.build(name, shape, n_classes), seed)


def shaped(name, shape=(3, 32, 32), n_classes=10):
    """The network without its draws, which take longer than all else."""
    with torch.device("meta"):
        model = models.build(name, shape, n_classes)
    return model.to_empty(device="cpu")


def prunable_sizes(model):
    return [m.numel() for m in masks.ones(model).values()]


def test_lenet_has_the_published_weights():
    model = build("lenet_300_100", (1, 28, 28))
    assert prunable_sizes(model) == [235_200, 30_000, 1_000]
    assert masks.total(masks.ones(model)) == 266_200
    assert sum(p.numel() for p in model.parameters()) == 266_610
    assert [n for n, _ in model.named_parameters()][-1] == "output.bias"


def test_the_small_network_for_the_digits():
    assert prunable_sizes(build("mlp_100_50", (1, 8, 8))) == [6_400, 5_000, 500]


@pytest.mark.parametrize("depth", [2, 4, 6])
def test_conv_counts_by_hand(depth):
    sizes = [*CONV_WEIGHTS[depth], CONV_INPUTS[depth] * 256, 256 * 256, 2_560]
    assert sum(sizes) == CONV_TOTALS[depth]
    model = build(f"conv_{depth}")
    assert prunable_sizes(model) == sizes
    channels = sum((64, 64, 128, 128, 256, 256)[:depth])
    assert sum(p.numel() for p in model.parameters()) == sum(sizes) + channels + 256 + 256 + 10


def test_conv_counts_are_the_papers():
    # Frankle & Carbin (2019), figure 2: weights of the convolutions, 38K, 260K and 1.1M; in all 4.3M and 2.4M.
    # Its 1.7M for Conv-6 does not follow from the layers it lists, which make 2.3M.
    assert [round(sum(CONV_WEIGHTS[d]) / 1e4) for d in (2, 4, 6)] == [4, 26, 114]
    assert [round(CONV_TOTALS[d] / 1e6, 1) for d in (2, 4, 6)] == [4.3, 2.4, 2.3]


@pytest.mark.parametrize("depth", [2, 4, 6])
def test_batch_norm_takes_the_place_of_the_biases(depth):
    with_norm, without = build(f"conv_{depth}_bn", (1, 8, 8)), build(f"conv_{depth}", (1, 8, 8))
    assert masks.prunable(with_norm) == masks.prunable(without)
    assert prunable_sizes(with_norm) == prunable_sizes(without)
    convolutions = [m for m in with_norm.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == depth
    assert all(m.bias is None for m in convolutions)
    norms = [m for m in with_norm.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m.num_features for m in norms] == [m.out_channels for m in convolutions]


IMAGES = [name for name in models.NAMES if name.partition("_")[0] in ("lenet", "mlp", "conv", "resnet", "vgg", "vit")]


@pytest.mark.parametrize("name", IMAGES)
def test_every_network_maps_images_to_classes(name):
    # An odd number of pixels: the pool drops the last row. Patches must divide it.
    shape = {"vgg": (2, 17, 19), "vit": (2, 8, 12)}.get(name.partition("_")[0], (2, 9, 11))
    model = build(name, shape, 7).eval()
    assert model(torch.zeros(3, *shape)).shape == (3, 7)


@pytest.mark.parametrize("name", ["lenet_300_100", "conv_2", "conv_6_bn"])
def test_weights_are_glorot_normal_and_biases_zero(name):
    model = build(name, (3, 16, 16), seed=5)
    for module in model.modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        weight, field = module.weight, math.prod(module.weight.shape[2:])
        std = math.sqrt(2 / (field * (weight.shape[0] + weight.shape[1])))
        n = weight.numel()
        assert abs(weight.mean().item()) < 5 * std / math.sqrt(n)
        assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n))
        fourth = (weight / std).double().pow(4).mean().item()  # 3 for a normal; uniform draws have 1.8
        assert abs(fourth - 3) < 5 * math.sqrt(96 / n)
        assert module.bias is None or not module.bias.any()


def test_a_seed_makes_the_network():
    first, again, other = (state(build("conv_2_bn", (1, 8, 8), seed=s)).params for s in (1, 1, 2))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("conv_2", (64,), r"conv_2 needs images \[channels, height, width\] .*got \(64,\). Use an mlp"),
        ("conv_4_bn", (32, 32), r"conv_4 needs images .*got \(32, 32\)"),
        ("conv_4", (1, 3, 8), r"at least 4 pixels a side: got \(1, 3, 8\)"),
        ("conv_6", (3, 8, 7), r"at least 8 pixels a side: got \(3, 8, 7\)"),
        ("resnet_20", (64,), r"resnet_20 needs images \[channels, height, width\] .*got \(64,\)"),
        ("vgg_16", (3, 15, 32), r"vgg_16 needs images .*at least 16 pixels a side: got \(3, 15, 32\)"),
        ("vit_tiny", (3, 10, 12), "patch must divide the image: got 4 for 10 x 12 pixels. .*vit_tiny_p2"),
        ("decoder_tiny", (3, 8, 8), r"a decoder needs rows of tokens \[t\]: got \(3, 8, 8\). Use a vit"),
    ],
)
def test_inputs_that_a_network_cannot_take_are_refused(name, shape, match):
    with pytest.raises(ValueError, match=match):
        models.build(name, shape, 10)


@pytest.mark.parametrize("depth", [0, 3, 8])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match="depth must be 2, 4 or 6"):
        initialise(lambda: models.conv((3, 16, 16), 10, depth=depth), 0)


@pytest.mark.parametrize(("given", "meant"), [("lenet-300-100", "lenet_300_100"), ("conv2", "conv_2")])
def test_an_unknown_name_comes_with_the_nearest(given, meant):
    with pytest.raises(ValueError, match=f"unknown model '{given}'. Did you mean '{meant}'.*Known: lenet_300_100"):
        models.build(given, (1, 28, 28), 10)


# Residual networks. Totals as published: He et al. (2016), table 6, to the hundredth of a million; Frankle et al.
# (2020), 274K for ResNet-20 with projections; torchvision's model cards for ResNet-18, 34 and 50.
RESNETS = [
    ("resnet_20_padded", (3, 32, 32), 10, 269_722),
    ("resnet_32_padded", (3, 32, 32), 10, 464_154),
    ("resnet_56_padded", (3, 32, 32), 10, 853_018),
    ("resnet_110_padded", (3, 32, 32), 10, 1_727_962),
    ("resnet_20", (3, 32, 32), 10, 272_474),
    ("resnet_18", (3, 32, 32), 10, 11_173_962),
    ("resnet_18", (3, 224, 224), 1000, 11_689_512),
    ("resnet_34", (3, 224, 224), 1000, 21_797_672),
    ("resnet_50", (3, 224, 224), 1000, 25_557_032),
]


def cifar_resnet_counts(depth, width, projections):
    """Weights of convolutions and the output layer, and all parameters, from the layers that the paper lists."""
    n, w = (depth - 2) // 6, width
    convolutions, channels = [27 * w], w
    norms = [w]
    for units in (w, 2 * w, 4 * w):
        for _ in range(n):
            convolutions += [9 * channels * units, 9 * units * units]
            norms += [units, units]
            if channels != units and projections:
                convolutions.append(channels * units)
                norms.append(units)
            channels = units
    prunable = sum(convolutions) + 4 * w * 10
    return prunable, prunable + 10 + 2 * sum(norms)


@pytest.mark.parametrize(("name", "shape", "n_classes", "published"), RESNETS)
def test_residual_networks_have_the_published_parameters(name, shape, n_classes, published):
    model = shaped(name, shape, n_classes)
    assert sum(p.numel() for p in model.parameters()) == published
    wanted = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert list(masks.prunable(model)) == wanted


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 56])
@pytest.mark.parametrize("width", [4, 16])
@pytest.mark.parametrize("kind", ["", "_padded"])
def test_residual_counts_by_hand(depth, width, kind):
    model = shaped(f"resnet_{depth}{kind}_w{width}")
    counts = masks.total(masks.ones(model)), sum(p.numel() for p in model.parameters())
    assert counts == cifar_resnet_counts(depth, width, not kind)


VGG_WEIGHTS = {11: 9_217_728, 13: 9_402_048, 16: 14_710_464, 19: 20_018_880}


@pytest.mark.parametrize("depth", VGG_WEIGHTS)
def test_vgg_counts_by_hand(depth):
    stages = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}[depth]
    channels = [64 * times for times, n in zip((1, 2, 4, 8, 8), stages, strict=True) for _ in range(n)]
    weights = [9 * a * b for a, b in zip([3, *channels[:-1]], channels, strict=True)]
    assert len(weights) == depth - 3  # the paper counts three linear layers
    assert sum(weights) == VGG_WEIGHTS[depth]
    model = shaped(f"vgg_{depth}")
    assert prunable_sizes(model) == [*weights, 5_120]
    assert sum(p.numel() for p in model.parameters()) == sum(weights) + 2 * sum(channels) + 5_130


def test_vgg_16_has_the_published_parameters():
    # Frankle et al. (2020), table 1: 14.7M. Their convolutions have biases: one per channel.
    assert sum(p.numel() for p in shaped("vgg_16").parameters()) + 4_224 == 14_728_266


def test_a_residual_network_is_what_the_paper_draws():
    model = build("resnet_8_w4", (3, 8, 8), seed=1).double().eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "norm" in name and tensor.is_floating_point():
            tensor.data = 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    values = dict(model.state_dict())

    def normed(x, conv, norm, stride=1):
        weight = values[f"{conv}.weight"]
        x = functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, var, scale, shift = (
            values[f"{norm}.{what}"][:, None, None] for what in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = torch.randn(5, 3, 8, 8, generator=generator, dtype=torch.float64)
    y = normed(x, "conv1", "norm1").relu()
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        block = f"stage{stage}.0"
        inner = normed(y, f"{block}.conv1", f"{block}.norm1", stride).relu()
        beside = y if stage == 1 else normed(y, f"{block}.shortcut.conv", f"{block}.shortcut.norm", stride)
        y = (normed(inner, f"{block}.conv2", f"{block}.norm2") + beside).relu()
    wanted = y.mean((2, 3)) @ values["output.weight"].T + values["output.bias"]
    torch.testing.assert_close(model(x), wanted, rtol=1e-10, atol=1e-10)


def test_a_padded_shortcut_takes_every_second_pixel_and_adds_zeros():
    x = torch.arange(2 * 2 * 4 * 4.0).view(2, 2, 4, 4)
    y = Padded(2, 5, 2)(x)
    assert y.shape == (2, 5, 2, 2)
    assert torch.equal(y[:, :2], x[:, :, ::2, ::2])
    assert not y[:, 2:].any()


@pytest.mark.parametrize("name", ["resnet_20_padded", "vgg_11_w16"])
def test_weights_are_kaiming_normal(name):
    for module in build(name, seed=3).modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            std, n = math.sqrt(2 / module.weight[0].numel()), module.weight.numel()
            assert module.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n))
            assert module.bias is None or not module.bias.any()


def test_large_images_have_the_stem_of_imagenet():
    strides = [
        m.stride for m in shaped("resnet_18", (3, 224, 224)).modules() if isinstance(m, nn.Conv2d | nn.MaxPool2d)
    ]
    assert strides[:2] == [(2, 2), 2]
    assert shaped("resnet_18", (3, 64, 64)).conv1.stride == (1, 1)


def test_sizes_stand_behind_a_name():
    assert build("resnet_20_w8").conv1.out_channels == 8
    assert build("vgg_13_w4").conv1_1.out_channels == 4
    model = build("vit_tiny_d2_w12_h2_p8")
    assert (len(model.blocks), model.blocks[0].attention.heads) == (2, 2)
    assert model.patches.weight.shape == (12, 3, 8, 8)
    assert build("encoder_tiny_v99", (7,)).embedding.num_embeddings == 99
    model = build("vit_mini_s10_o20")
    assert (model.blocks[-1].drop_path.p, model.dropout.p) == (0.1, 0.2)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("resnet_20_d3", r"behind resnet_20 may stand _wN \(width\), each once and at least 1: got 'resnet_20_d3'"),
        ("resnet_20_s10", r"behind resnet_20 may stand _wN \(width\), each once"),
        ("vit_mini_s100", r"drop_path must lie in \[0, 1\): got 0.0 and 1.0"),
        ("resnet_20_w0", "at least 1: got 'resnet_20_w0'"),
        ("resnet_20_w8_w4", "each once"),
        ("conv_2_w8", "behind conv_2 may stand no sizes"),
        ("resnet_21_w8", "unknown model 'resnet_21'. Did you mean 'resnet_"),
        ("resnet", "unknown model 'resnet'. Did you mean"),
        ("vit_tiny_w10", "heads divide the width: got 12, 10, 3"),
    ],
)
def test_other_sizes_are_refused(name, match):
    with pytest.raises(ValueError, match=match):
        models.build(name, (3, 32, 32), 10)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: models.cifar_resnet((3, 8, 8), 10, depth=21), r"depth must be 6 n \+ 2 .*got 21"),
        (lambda: models.cifar_resnet((3, 8, 8), 10, depth=8, shortcut="c"), "shortcut must be .*got 'c'"),
        (lambda: models.resnet((3, 8, 8), 10, depth=20), "depth must be one of 18, 34, 50: got 20"),
        (lambda: models.vgg((3, 32, 32), 10, depth=12), "depth must be one of 11, 13, 16, 19: got 12"),
    ],
)
def test_other_depths_of_deep_networks_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        initialise(make, 0)
