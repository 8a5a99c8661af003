"""Small networks that nobody here wrote, by name: of transformers, torchvision and timm, and plain ones.

Random configurations of a few thousand weights, each built and run in a fraction of a second. An example is one tensor,
an image or a row of tokens; a model that returns a record of outputs is wrapped in a module that takes the logits out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ticketlab.data import Task
from ticketlab.models import build

VOCABULARY, TOKENS, CLASSES = 8, 4, 3


@dataclass(frozen=True)
class Architecture:
    """A network and what it eats."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 16, 16)
    """Of an example: an image, floating; or a row of tokens, [t]."""
    library: str | None = None
    """What must import; None: torch alone."""
    words: bool = False
    """Whether outputs are [n, t, vocabulary], the next token at each place, and not [n, classes]."""
    source: str | None = None
    """The module that embeds tokens."""
    rounding: float = 1e-8
    """Largest difference, relative to the largest entry."""
    prunable: tuple[str, ...] = ()
    """What is pruned in place of the weights of the usual layers."""

    @property
    def missing(self) -> str | None:
        """Why the library does not import."""
        try:
            importlib.import_module(self.library or "torch")
        except Exception as error:  # torchvision beside another build of torch raises what it likes
            return f"{self.library} does not import here: {type(error).__name__}"
        return None

    def task(self, n: int = 12) -> Task:
        """Random examples in float64, with labels that have nothing to do with them."""
        generator = torch.Generator().manual_seed(0)
        if len(self.shape) == 1:
            x = torch.randint(1, VOCABULARY, (n, *self.shape), generator=generator)
        else:
            x = torch.randn(n, *self.shape, generator=generator, dtype=torch.float64)
        y = torch.randint(VOCABULARY, x.shape, generator=generator) if self.words else torch.arange(n) % CLASSES
        classes = VOCABULARY if self.words else CLASSES
        return Task.from_tensors(x, y, name="noise", validation_size=3, test_size=3, n_classes=classes)


# Plain networks.


class Recurrent(nn.Module):
    """Tokens, an embedding, a recurrent layer of two directions, its last state, a linear layer."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.cell = kind(8, 12, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.embed(x))[0][:, -1])


class MixerBlock(nn.Module):
    """Mixes the patches, then the channels (Tolstikhin et al. 2021)."""

    def __init__(self, patches: int, channels: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.tokens = nn.Sequential(nn.Linear(patches, hidden), nn.GELU(), nn.Linear(hidden, patches))
        self.channels = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.first(x).mT).mT
        return x + self.channels(self.second(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, stride=4)
        self.blocks = nn.Sequential(MixerBlock(16, 12, 20), MixerBlock(16, 12, 20))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        return self.head(self.norm(self.blocks(x)).mean(1))


class Dense(nn.Module):
    """A dense block whose layers are computed again in the backward pass, as torchvision's ``memory_efficient``."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 4, 3, padding=1, bias=False)) for c in (8, 12, 16)
        )
        self.norm, self.head = nn.BatchNorm2d(20), nn.Linear(20, CLASSES)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, checkpoint(layer, x, use_reentrant=self.reentrant)], 1)
        return self.head(self.norm(x).relu().mean((2, 3)))


class Stem(nn.Module):
    """Convolutions, a norm, and tokens of what they see, as in LeViT and CvT.

    A batch norm of torch 2.13 and 2.14 misreads the gradient that comes back to a single example this way.
    """

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.Hardswish(), nn.Conv2d(8, 12, 2), norm(12))
        self.mix, self.head = nn.Linear(12, 12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        return self.head((tokens + self.mix(tokens).tanh()).mean(1))


def normed(norm: Callable[[int], nn.Module], dropout: float = 0.0) -> nn.Module:
    """Two convolutions, each behind it a norm."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1), norm(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 3, stride=2, padding=1), norm(12), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(48, CLASSES)),
    )


PLAIN = {
    "lstm": Architecture(partial(Recurrent, nn.LSTM), (TOKENS,), source="embed"),
    "gru": Architecture(partial(Recurrent, nn.GRU), (TOKENS,), source="embed"),
    "mixer": Architecture(Mixer),
    "checkpointed": Architecture(Dense),
    "checkpointed_reentrant": Architecture(partial(Dense, reentrant=True)),
    "stem": Architecture(Stem),
    "stem_instance_norm": Architecture(partial(Stem, nn.InstanceNorm2d)),
    "group_norm": Architecture(partial(normed, partial(nn.GroupNorm, 2))),
    "instance_norm": Architecture(partial(normed, nn.InstanceNorm2d)),
    "instance_norm_tracked": Architecture(partial(normed, partial(nn.InstanceNorm2d, track_running_stats=True))),
    "batch_statistics": Architecture(partial(normed, partial(nn.BatchNorm2d, track_running_stats=False))),
}


class Logits(nn.Module):
    """A Hugging Face model without the record around its logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).logits


class Pooled(nn.Module):
    """An encoder, the mean over its tokens, and a linear layer."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).last_hidden_state.mean(1))


# transformers.


def of_hugging_face(model: str, *, source: str | None = None, narrow: bool = False, **options: Any) -> Architecture:
    """A model of transformers, named by its class; ``narrow``: it computes in float32 within, whatever its weights are.

    What differs in the last bit of a float64 before differs in that of a float32 behind.
    """
    images, words = "Image" in model, not model.endswith("Classification")
    sizes = {"num_labels": CLASSES} if not words else {}
    sizes |= {"vocab_size": VOCABULARY} if not images else {}

    def build() -> nn.Module:
        kind = getattr(importlib.import_module("transformers"), model)
        return Logits(kind(kind.config_class(**options, **sizes)))

    shape = (3, 16, 16) if images else (TOKENS,)
    return Architecture(build, shape, "transformers", words, source, 1e-5 if narrow else 1e-8)


def t5_encoder() -> nn.Module:
    library = importlib.import_module("transformers")
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return Pooled(library.T5EncoderModel(library.T5Config(**sizes, dropout_rate=0.0)), 16)


STAGES = {"hidden_sizes": [8, 12], "depths": [1, 1]}
WINDOWS = {"patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 2, "mlp_ratio": 2.0}
BLOCKS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
ENCODER = {**BLOCKS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODER = {**BLOCKS, "num_key_value_heads": 1, "max_position_embeddings": 16}
GPT2 = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MOBILE = {"depth_multiplier": 0.01, "classifier_dropout_prob": 0.0}
MAMBA = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "conv_kernel": 3, "time_step_rank": 2}
EFFICIENT = {"width_coefficient": 0.25, "depth_coefficient": 1.0, "depth_divisor": 4, "hidden_dim": 320}
EFFICIENT |= {"kernel_sizes": [3, 3], "in_channels": [32, 32], "out_channels": [32, 32], "strides": [1, 2]}
EFFICIENT |= {"num_block_repeats": [1, 2], "expand_ratios": [1, 2], "dropout_rate": 0.0, "drop_connect_rate": 0.0}

LEVIT = {"hidden_sizes": [16, 16, 16], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [4, 4, 4]}
LEVIT |= {"image_size": 32, "mlp_ratio": [2, 2, 2], "drop_path_rate": 0}

HUGGING_FACE = {
    "hf_resnet": of_hugging_face("ResNetForImageClassification", **STAGES, embedding_size=8, layer_type="basic"),
    "hf_regnet": of_hugging_face("RegNetForImageClassification", **STAGES, embedding_size=8, groups_width=4),
    "hf_mobilenet_v1": of_hugging_face("MobileNetV1ForImageClassification", **MOBILE, min_depth=12),
    "hf_mobilenet_v2": of_hugging_face(
        "MobileNetV2ForImageClassification", **MOBILE, min_depth=4, depth_divisible_by=4, finegrained_output=False
    ),
    "hf_efficientnet": of_hugging_face("EfficientNetForImageClassification", **EFFICIENT, image_size=16),
    "hf_convnext": of_hugging_face(
        "ConvNextForImageClassification", **STAGES, patch_size=2, num_stages=2, layer_scale_init_value=0.1
    ),
    "hf_vit": of_hugging_face("ViTForImageClassification", **ENCODER, image_size=16, patch_size=8),
    "hf_swin": of_hugging_face("SwinForImageClassification", **WINDOWS, image_size=16, drop_path_rate=0.0),
    "hf_levit": replace(of_hugging_face("LevitForImageClassification", **LEVIT), shape=(3, 32, 32)),
    "hf_bert": of_hugging_face(
        "BertForSequenceClassification",
        **ENCODER,
        max_position_embeddings=16,
        source="inner.bert.embeddings.word_embeddings",
    ),
    "hf_gpt2": of_hugging_face("GPT2LMHeadModel", **GPT2, source="inner.transformer.wte"),
    "hf_t5_encoder": Architecture(
        t5_encoder, (TOKENS,), "transformers", source="inner.encoder.embed_tokens", rounding=1e-5
    ),
    "hf_llama": of_hugging_face(
        "LlamaForSequenceClassification", **DECODER, pad_token_id=0, source="inner.model.embed_tokens", narrow=True
    ),
    "hf_mamba": of_hugging_face("MambaForCausalLM", **MAMBA, source="inner.backbone.embeddings", narrow=True),
    "hf_mixtral": replace(
        of_hugging_face(
            "MixtralForCausalLM",
            **DECODER,
            num_local_experts=3,
            experts_implementation="eager",
            source="inner.model.embed_tokens",
            narrow=True,
        ),
        prunable=("*.self_attn.*", "*.experts.*"),
    ),
    "hf_mixtral_grouped": of_hugging_face("MixtralForCausalLM", **DECODER, num_local_experts=3),
}


# torchvision.


def vision(module: str) -> Any:
    return importlib.import_module(f"torchvision.models.{module}")


def spread(net: nn.Module) -> nn.Module:
    """Linear layers of larger weights: all of them would go first, and with them every path to an output."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
    return net


def torchvision_resnet() -> nn.Module:
    kind = vision("resnet")
    net = kind.ResNet(kind.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)
    net.layer2 = net.layer3 = net.layer4 = nn.Identity()  # its widths are fixed: 64 in the first stage
    net.fc = nn.Linear(64, CLASSES)
    return net


def torchvision_regnet() -> nn.Module:
    kind = vision("regnet")
    sizes = kind.BlockParams([1, 1], [8, 16], [8, 8], [1.0, 1.0], [2, 2], se_ratio=0.25)
    return spread(kind.RegNet(sizes, num_classes=CLASSES, stem_width=8))


def torchvision_mobilenet() -> nn.Module:
    kind = vision("mobilenetv3")
    block = partial(kind.InvertedResidualConfig, width_mult=1.0, dilation=1)
    blocks = [
        block(8, 3, 16, 8, use_se=True, activation="RE", stride=2),
        block(8, 3, 16, 8, use_se=True, activation="HS", stride=1),
    ]
    return spread(kind.MobileNetV3(blocks, last_channel=16, num_classes=CLASSES, dropout=0.0))


def torchvision_efficientnet() -> nn.Module:
    kind = vision("efficientnet")
    blocks = [kind.MBConvConfig(1, 3, 1, 8, 8, 1, 1.0, 1.0), kind.MBConvConfig(2, 3, 2, 8, 8, 2, 1.0, 1.0)]
    return kind.EfficientNet(blocks, dropout=0.0, stochastic_depth_prob=0.0, num_classes=CLASSES, last_channel=16)


def torchvision_convnext() -> nn.Module:
    kind = vision("convnext")
    blocks = [kind.CNBlockConfig(8, 12, 1), kind.CNBlockConfig(12, None, 1)]
    return kind.ConvNeXt(blocks, layer_scale=0.1, num_classes=CLASSES)


def torchvision_vit() -> nn.Module:
    sizes = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 24}
    return spread(vision("vision_transformer").VisionTransformer(num_classes=CLASSES, **sizes))


def torchvision_swin() -> nn.Module:
    sizes = {"patch_size": [2, 2], "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": [2, 2]}
    kind = vision("swin_transformer")
    return kind.SwinTransformer(**sizes, mlp_ratio=2.0, num_classes=CLASSES, stochastic_depth_prob=0.0)


def torchvision_densenet() -> nn.Module:
    kind = vision("densenet")
    sizes = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8, "bn_size": 2}
    return kind.DenseNet(**sizes, num_classes=CLASSES, memory_efficient=True)


TORCHVISION = {
    "tv_resnet": Architecture(torchvision_resnet, library="torchvision"),
    "tv_regnet": Architecture(torchvision_regnet, library="torchvision"),
    "tv_mobilenet": Architecture(torchvision_mobilenet, library="torchvision"),
    "tv_efficientnet": Architecture(torchvision_efficientnet, library="torchvision"),
    "tv_convnext": Architecture(torchvision_convnext, library="torchvision"),
    "tv_vit": Architecture(torchvision_vit, library="torchvision"),
    "tv_swin": Architecture(torchvision_swin, library="torchvision"),
    "tv_densenet": Architecture(torchvision_densenet, library="torchvision"),
}


# timm.


def of_timm(module: str, kind: str, **options: Any) -> Architecture:
    return Architecture(
        lambda: getattr(importlib.import_module(f"timm.models.{module}"), kind)(num_classes=CLASSES, **options),
        library="timm",
    )


def timm_resnet() -> nn.Module:
    kind = importlib.import_module("timm.models.resnet")
    return kind.ResNet(kind.BasicBlock, (1, 1, 1, 1), CLASSES, channels=(8, 8, 12, 12), stem_width=8)


def timm_regnet() -> nn.Module:
    kind = importlib.import_module("timm.models.regnet")
    sizes = {"depth": 4, "w0": 8, "wa": 13.6, "wm": 2.0, "group_size": 4, "se_ratio": 0.25, "stem_width": 8}
    return spread(kind.RegNet(kind.RegNetCfg(**sizes), num_classes=CLASSES))


def timm_efficientnet(mobile: bool) -> nn.Module:
    blocks = [["ds_r1_k3_s1_e1_c8_nre_se0.25" if mobile else "ds_r1_k3_s1_e1_c8"], ["ir_r2_k3_s2_e2_c8_se0.25"]]
    blocks = importlib.import_module("timm.models._efficientnet_builder").decode_arch_def(blocks)
    kind = importlib.import_module(f"timm.models.{'mobilenetv3' if mobile else 'efficientnet'}")
    kind = kind.MobileNetV3 if mobile else kind.EfficientNet
    return kind(blocks, CLASSES, stem_size=8, num_features=16, norm_layer=nn.BatchNorm2d)


VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
SWIN = {**WINDOWS, "img_size": 16, "drop_path_rate": 0.0}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (4, 8, 8, 8), "patch_size": 1, "ls_init_value": 0.1}
DENSENET = {"growth_rate": 4, "block_config": (2, 2), "bn_size": 2, "memory_efficient": True}

TIMM = {
    "timm_resnet": Architecture(timm_resnet, library="timm"),
    "timm_regnet": Architecture(timm_regnet, library="timm"),
    "timm_mobilenetv3": Architecture(partial(timm_efficientnet, True), library="timm"),
    "timm_efficientnet": Architecture(partial(timm_efficientnet, False), library="timm"),
    "timm_convnext": of_timm("convnext", "ConvNeXt", **CONVNEXT),
    "timm_vit": of_timm("vision_transformer", "VisionTransformer", **VIT),
    "timm_swin": of_timm("swin_transformer", "SwinTransformer", **SWIN),
    "timm_densenet": of_timm("densenet", "DenseNet", **DENSENET),
}


# Our own.


def named(name: str, shape: tuple[int, ...] = (3, 16, 16), *, words: bool = False, **more: Any) -> Architecture:
    return Architecture(partial(build, name, shape, VOCABULARY if words else CLASSES), shape, words=words, **more)


OWN = {
    "resnet": named("resnet_8_w4", (3, 8, 8)),
    "resnet_padded": named("resnet_8_padded_w4", (3, 8, 8)),
    "vit": named("vit_mini_d2_w8_h2", (3, 8, 8)),
    "encoder": named(f"encoder_tiny_d2_w8_h2_v{VOCABULARY}", (TOKENS,), source="embedding"),
    "decoder": named("decoder_tiny_d2_w8_h2", (TOKENS,), words=True, source="embedding"),
}

ALL: dict[str, Architecture] = {**PLAIN, **OWN, **HUGGING_FACE, **TORCHVISION, **TIMM}
