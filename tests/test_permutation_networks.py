"""The groups of architectures that nobody here wrote: streams, hidden units of feed-forward layers, heads.

That each is a symmetry in plain PyTorch is a column of the grid in ``test_architectures.py``.
"""

from __future__ import annotations

import pytest
import torch
from architectures import ALL
from cases import build

from ticketlab import permutation
from ticketlab.errors import Refused
from ticketlab.state import state

FREE = {
    "lstm": ["embed.weight[1]", "cell.weight_hh_l0[1]"],
    "gru": ["embed.weight[1]", "cell.weight_hh_l1_reverse[1]"],
    "mixer": ["patches.weight[0]", "blocks.0.tokens.0.weight[0]", "blocks.1.channels.0.weight[0]"],
    "group_norm": ["0.weight[0]", "3.weight[0]"],
    "instance_norm_tracked": ["0.weight[0]", "1.running_mean[0]", "3.weight[0]"],
    "hf_resnet": ["inner.resnet.embedder.embedder.convolution.weight[0]", "inner.classifier.1.weight[1]"],
    "hf_regnet": ["inner.regnet.embedder.embedder.convolution.weight[0]", "inner.classifier.1.weight[1]"],
    "hf_mobilenet_v1": ["inner.mobilenet_v1.conv_stem.convolution.weight[0]", "inner.classifier.weight[1]"],
    "hf_mobilenet_v2": ["inner.mobilenet_v2.layer.0.expand_1x1.convolution.weight[0]", "inner.classifier.weight[1]"],
    "hf_efficientnet": ["inner.efficientnet.encoder.blocks.1.expansion.expand_conv.weight[0]"],
    "hf_convnext": ["inner.convnext.encoder.stages.0.layers.0.pwconv1.weight[0]", "inner.classifier.weight[1]"],
    "hf_vit": ["inner.vit.embeddings.cls_token[2]", "inner.vit.layers.0.mlp.fc1.weight[0]"],
    "hf_swin": [
        "inner.swin.encoder.layers.0.blocks.0.mlp.fc1.weight[0]",
        "inner.swin.encoder.layers.0.blocks.0.attention.relative_position_bias.relative_position_bias_table[1]",
    ],
    "hf_bert": [
        "inner.bert.embeddings.word_embeddings.weight[1]",
        "inner.bert.encoder.layer.1.intermediate.dense.bias[0]",
    ],
    "hf_gpt2": ["inner.transformer.wte.weight[1]", "inner.transformer.h.1.mlp.c_fc.weight[1]"],  # with its cache
    "hf_t5_encoder": [
        "inner.encoder.embed_tokens.weight[1]",
        "inner.encoder.block.1.layer.1.DenseReluDense.wi.weight[0]",
    ],
    "hf_llama": ["inner.model.layers.0.self_attn.v_proj.weight[0]", "inner.model.layers.1.mlp.gate_proj.weight[0]"],
    "hf_mamba": ["inner.backbone.layers.0.mixer.D[0]", "inner.backbone.layers.1.mixer.conv1d.weight[0]"],
}
"""Axes along which all units may trade places: of streams, of feed-forward layers, of heads and within them."""


def built(name, dtype=torch.float64):
    architecture = ALL[name]
    if architecture.missing:
        pytest.skip(f"{architecture.missing}, of the extra `models`")
    x = architecture.task().train.x[:2]
    return build(architecture.build, dtype=dtype), x.to(dtype) if x.is_floating_point() else x


@pytest.mark.parametrize("name", FREE)
def test_the_groups_of_an_architecture(name):
    model, x = built(name)
    groups, before = permutation.groups(model, x), state(model)
    for place in FREE[name]:
        tensor, axis = place.rstrip("]").split("[")
        assert all(group for group, _ in groups.axes[tensor][int(axis)]), (place, groups.axes[tensor])
    assert groups.refuted == ()  # the rules are right by themselves
    chosen = permutation.random(groups, 0)
    permutation.assert_same_function(model, before, tuple(permutation.permute(groups, p, chosen) for p in before), x)


def test_rotary_frequencies_keep_their_order_and_experts_cost_what_they_touch():
    """A custom operation routes tokens to the experts: attention has its groups all the same."""
    model, x = built("hf_mixtral_grouped", torch.float32)
    groups = permutation.groups(model, x)
    assert groups.of("inner.model.layers.0.self_attn.v_proj.weight") and groups.refuted == ()
    assert not any(groups.of(name) for name, _ in model.named_buffers())


@pytest.mark.parametrize(
    ("name", "reason"), [("hf_mixtral", "must be traceable by torch.export"), ("checkpointed", r"\(here: cat\)")]
)
def test_architectures_without_groups_say_why(name, reason):
    with pytest.raises(Refused, match=reason):
        permutation.groups(*built(name))


def test_alignment_of_two_encoders_goes_through_heads_and_streams():
    """A network permuted at random is aligned to what it was: every weight is back in its place."""
    model, x = built("hf_bert")
    before, groups = state(model), permutation.groups(model, x)
    moved = permutation.permute(groups, before.params, permutation.random(groups, 1))
    aligned = permutation.align(model, x, before.params, moved)
    assert sum(float((aligned.params[n] - p).abs().sum()) for n, p in before.params.items()) < 1e-12
