"""Studies of papers by name: ``preset("cifar_resnet_20")`` is a whole config, and a small one that ends in minutes.

Each says where its numbers are from and where they differ. Whatever a paper leaves open is the default of `ImpConfig`.
Not checked against the papers themselves: the numbers of their tables, figures and appendices, the variants of
ResNet-20, and the values of DeiT; the rest was read in the authors' code, or in an early draft.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ticketlab.engine.config import ImpConfig
from ticketlab.engine.recipe import Recipe
from ticketlab.errors import Refused, nearest

FIVE = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Preset:
    """One study of a paper."""

    paper: str
    """Authors and year."""
    source: str
    """Where in the paper what stands, and what differs here."""
    config: ImpConfig
    """As in the paper."""
    small: ImpConfig
    """The same question in minutes on two CPU cores."""
    shortened: str
    """What ``small`` shortens."""


def preset(name: str, *, small: bool = False) -> ImpConfig:
    """The config of a paper's study; change it with ``dataclasses.replace``.

    Args:
        name: One of `PRESETS`.
        small: The variant that ends in minutes on two CPU cores, whose numbers are not the paper's.

    Raises:
        Refused: An unknown name (the nearest one is given).
    """
    if name not in PRESETS:
        raise Refused(nearest("preset", name, tuple(PRESETS)))
    return PRESETS[name].small if small else PRESETS[name].config


def _smaller(config: ImpConfig, recipe: dict[str, Any], **changes: Any) -> ImpConfig:
    return replace(config, recipe=replace(config.recipe, **recipe), **changes)


# Frankle & Carbin (2019).

_LENET = ImpConfig(
    task="mnist",
    model="lenet_300_100",
    scope="layer",
    levels=20,
    init_seeds=FIVE,
    validation_size=5000,
    recipe=Recipe(steps=50_000, batch_size=60, optimizer="adam", learning_rate=1.2e-3),
)
_CONV_SOURCE = (
    "Figures 2 and 5, appendix H: Adam, batch 60, layer scope, output layer at half the rate, five trials, 5,000 "
    "validation examples, tickets rewound to step 0 beside reinitialised ones. Differs: training batches are cropped "
    "and flipped, as every task made of cifar10 is; the paper names no augmentation."
)
_CONV_SHORT = (
    "Runs on the bundled digits (8 x 8 pixels) in place of CIFAR-10, for 300 steps, 3 levels and 3 seeds, with 200 "
    "validation examples."
)


def _conv(depth: int, steps: int, rate: float, conv_fraction: float) -> Preset:
    config = ImpConfig(
        task="cifar10",
        model=f"conv_{depth}",
        scope="layer",
        conv_fraction=conv_fraction,
        levels=25,
        init_seeds=FIVE,
        validation_size=5000,
        recipe=Recipe(steps=steps, batch_size=60, optimizer="adam", learning_rate=rate),
    )
    small = _smaller(config, {"steps": 300}, task="digits", levels=3, init_seeds=(0, 1, 2), validation_size=200)
    return Preset("Frankle & Carbin (2019)", _CONV_SOURCE, config, small, _CONV_SHORT)


# Frankle et al. (2020).

_SGD = Recipe(
    steps=63_000,
    batch_size=128,
    optimizer="sgd",
    learning_rate=0.1,
    momentum=0.9,
    weight_decay=1e-4,
    schedule="step",
    milestones=(32_000, 48_000),
    eval_every=500,
)
_RESNET_20 = ImpConfig(
    task="cifar10",
    model="resnet_20",
    levels=12,
    treatments=("ticket", "reinit", "random_erk"),
    rewind_step=500,
    snapshot_steps=(2_000,),
    recipe=_SGD,
)
_VGG_16 = replace(_RESNET_20, model="vgg_16", levels=20, rewind_step=1_000, snapshot_steps=())
_CIFAR_SMALL: dict[str, Any] = {"steps": 400, "milestones": (200, 300), "warmup_steps": 40, "eval_every": 100}
_CIFAR_SHORT = (
    "runs 400 steps with drops at 200 and 300, a warm-up of 40 and a rewind to step 50, prunes half of what is left "
    "at each of 2 levels, for 2 seeds, with 1,000 validation examples. No random masks."
)


def _cifar_small(config: ImpConfig, model: str, recipe: dict[str, Any]) -> ImpConfig:
    return _smaller(
        config,
        recipe,
        model=model,
        levels=2,
        prune_fraction=0.5,
        treatments=("ticket", "reinit"),
        init_seeds=(0, 1),
        rewind_step=50,
        snapshot_steps=(),
        validation_size=1000,
    )


_EPOCH = 1252  # steps of 1,024 of the 1,281,167 training images
_RESNET_50 = ImpConfig(
    task="imagenet",
    model="resnet_50",
    levels=1,
    prune_fraction=0.7,
    treatments=("ticket", "reinit", "random_erk"),
    rewind_step=6 * _EPOCH,
    recipe=replace(
        _SGD,
        steps=90 * _EPOCH,
        batch_size=1024,
        learning_rate=0.4,
        milestones=(30 * _EPOCH, 60 * _EPOCH, 80 * _EPOCH),
        warmup_steps=5 * _EPOCH,
        eval_every=_EPOCH,
    ),
)

# Transformers.

_VIT = ImpConfig(
    task="cifar10",
    model="vit_tiny_s10",
    levels=8,
    treatments=("ticket", "reinit", "random_erk"),
    rewind_step=1_320,
    recipe=Recipe(
        steps=26_400,
        batch_size=512,
        optimizer="adamw",
        learning_rate=5e-4,
        weight_decay=0.05,
        decay_all=False,
        label_smoothing=0.1,
        schedule="cosine",
        warmup_steps=440,
        eval_every=440,
    ),
)
_BERT = ImpConfig(
    task="mnli",
    model="bert_base_o10",
    levels=10,
    prune_fraction=0.1,
    treatments=("ticket", "reinit", "random_mask"),
    prunable=("inner.bert.encoder.*", "inner.bert.pooler.*"),
    recipe=Recipe(
        steps=36_813, batch_size=32, optimizer="adamw", learning_rate=2e-5, schedule="linear", eval_every=2_000
    ),
)

PRESETS: dict[str, Preset] = {
    "mnist_lenet_300_100": Preset(
        "Frankle & Carbin (2019)",
        "Figures 2 to 4, appendix G: Adam at 1.2e-3, batch 60, 50,000 steps, layer scope, 20 % a level and 10 % of "
        "the output layer, five trials, 5,000 validation examples, looked at every 100 steps, tickets rewound to step "
        "0 beside reinitialised ones.",
        _LENET,
        _smaller(_LENET, {"steps": 1_500}, levels=10, init_seeds=(0, 1, 2)),
        "Trains for 1,500 steps in place of 50,000, to 10 levels (11 % of the weights) in place of 20, for 3 seeds.",
    ),
    "cifar_conv_2": _conv(2, 20_000, 2e-4, 0.10),
    "cifar_conv_4": _conv(4, 25_000, 3e-4, 0.10),
    "cifar_conv_6": _conv(6, 30_000, 3e-4, 0.15),
    "cifar_resnet_20": Preset(
        "Frankle et al. (2020)",
        "Table 1, the standard ResNet-20: SGD with momentum 0.9 at 0.1, a tenth of it from steps 32,000 and 48,000 "
        "on, 63,000 steps, batch 128, weight decay 1e-4, global scope, 20 % a level. Rewound to step 500, which "
        "suffices for its tickets; the dense network is stable from step 2,000, which is stored too. Differs: batch "
        "norm begins with scales of 1, in the authors' code with uniform ones in [0, 1); 5,000 images are held out "
        "for validation. The paper's other variants: --learning-rate 0.01, or 0.03 with --warmup-steps 30000.",
        _RESNET_20,
        _cifar_small(_RESNET_20, "resnet_8_w8", _CIFAR_SMALL),
        "ResNet-8 of width 8 (19,954 parameters) in place of ResNet-20; " + _CIFAR_SHORT,
    ),
    "cifar_vgg_16": Preset(
        "Frankle et al. (2020)",
        "Table 1, the standard VGG-16: as ResNet-20, rewound to step 1,000, from which on the dense network is "
        "stable. Differs: convolutions have no bias before batch norm, whose scales begin at 1; 5,000 images are held "
        "out for validation; the output layer is pruned as any other.",
        _VGG_16,
        _cifar_small(_VGG_16, "vgg_16_w8", _CIFAR_SMALL),
        "VGG-16 of width 8 (231,746 parameters) in place of 64; " + _CIFAR_SHORT,
    ),
    "imagenet_resnet_50": Preset(
        "Frankle et al. (2020)",
        "Table 1: SGD with momentum 0.9 at 0.4, a tenth of it after epochs 30, 60 and 80, of 90, five epochs of "
        "warm-up, batch 1,024, weight decay 1e-4, pruned once, to 30 %. Rewound to epoch 6 of 90, the 7 % of training "
        "within which Frankle et al. (2019, Stabilizing) find tickets. Pass ImageNet as task=, from shards (python "
        "-m ticketlab.to_shards). Differs: batch norm begins with scales of 1, without weights of zero in the last of "
        "a block.",
        _RESNET_50,
        _smaller(
            _RESNET_50,
            {"steps": 300, "batch_size": 60, "learning_rate": 0.05, "milestones": (100, 200, 270), "warmup_steps": 20,
             "eval_every": 100},
            task="digits", model="resnet_50_w4", treatments=("ticket", "reinit"), init_seeds=(0, 1), rewind_step=20,
        ),
        "Runs ResNet-50 of width 4 on the bundled digits (8 x 8 pixels) for 300 steps of 60 at a rate of 0.05, for 2 "
        "seeds. No random masks.",
    ),
    "vit_cifar": Preset(
        "network and recipe of Touvron et al. (2021)",
        "No paper's tickets: the network and the recipe of DeiT-Ti (tables 1 and 9), with patches of 4 on CIFAR-10: "
        "AdamW at 5e-4 for a batch of 512, weight decay 0.05 on matrices, label smoothing 0.1, stochastic depth 0.1, "
        "300 epochs of 88 steps, 5 of them a warm-up, cosine. Global scope, 20 % a level, rewound to epoch 15 (5 %), "
        "chosen here. Differs: crops and flips are the only augmentation.",
        _VIT,
        _smaller(
            _VIT,
            {"steps": 400, "batch_size": 64, "learning_rate": 1e-3, "warmup_steps": 50, "eval_every": 100},
            model="vit_mini_d2_s10", levels=2, prune_fraction=0.5, treatments=("ticket", "reinit"), init_seeds=(0, 1),
            rewind_step=25, validation_size=1000,
        ),
        "A ViT of 2 blocks of width 64 for 400 steps of 64 at a rate of 1e-3, prunes half of what is left at each of "
        "2 levels, for 2 seeds, with 1,000 validation examples. No random masks.",
    ),
    "bert_finetune": Preset(
        "Chen et al. (2020)",
        "MNLI: BERT-base fine-tuned for 3 epochs of 12,271 steps with AdamW at 2e-5, batch 32, 128 tokens, a rate "
        "that falls linearly to 0; 10 % a round of the linear layers below the head, global scope, rewound to the "
        "pretrained weights. Pass those as start= and the data as task= (see tl.models.bert); without start= it is a "
        "BERT that has read nothing. Differs: each round's rate falls over that round, in their code over all of "
        "them; that code prunes 10 % of all weights a round, their text 10 % of those left, as here.",
        _BERT,
        _smaller(
            _BERT,
            {"steps": 600, "learning_rate": 1e-3, "eval_every": 100},
            task="stdlib_topics", model="encoder_tiny_d2_w64_h2", levels=3, treatments=("ticket", "reinit"),
            init_seeds=(0, 1), prunable=("blocks.*",),
        ),
        "An encoder of 2 blocks of width 64 on bytes of the standard library, from random weights, for 600 steps at a "
        "rate of 1e-3, 3 levels and 2 seeds. No random masks.",
    ),
}  # fmt: skip
