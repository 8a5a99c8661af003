"""Transformers: counts as published and by hand, blocks as PyTorch's own layers, what is drawn in training."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from ticketlab import masks, models
from ticketlab.models.blocks import Block, DropPath
from ticketlab.models.vit import vit
from ticketlab.seeds import initialise


def shaped(name, shape, n_classes):
    """The network without its draws."""
    with torch.device("meta"):
        return models.build(name, shape, n_classes)


def count(model):
    return sum(p.numel() for p in model.parameters())


def blocks_by_hand(depth, width):
    """Weights of the linear layers of all blocks, and all their parameters."""
    weights = depth * (4 * width**2 + 2 * 4 * width**2)
    return weights, weights + depth * (4 * width + 5 * width + 4 * width)  # biases, and two norms


def transformer_by_hand(depth, width, n_outputs, inputs, free):
    """(prunable, parameters): blocks, the last norm, the output, and what embeds."""
    weights, parameters = blocks_by_hand(depth, width)
    prunable = weights + width * n_outputs + inputs
    return prunable, parameters + 2 * width + (width + 1) * n_outputs + inputs + free


@pytest.mark.parametrize(
    ("name", "shape", "n_classes", "by_hand", "published"),
    [
        # Touvron et al. (2021), table 1: 5M; its released weights have 5,717,416. 196 patches and a class token.
        ("vit_tiny", (3, 224, 224), 1000, (12, 192, 1000, 192 * 768, 192 * (1 + 1 + 197)), 5_717_416),
        ("vit_tiny", (3, 32, 32), 10, (12, 192, 10, 192 * 48, 192 * (1 + 1 + 65)), 5_362_762),
        ("vit_mini", (1, 28, 28), 10, (4, 64, 10, 64 * 16, 64 * (1 + 1 + 50)), None),
        ("encoder_tiny", (128,), 5, (4, 128, 5, 0, 128 * (256 + 128)), None),
        ("decoder_tiny", (128,), 65, (4, 128, 65, 0, 128 * (65 + 128)), None),
        ("decoder_tiny_pooled", (128,), 8, (4, 128, 8, 0, 128 * (256 + 128)), None),
    ],
)
def test_counts_by_hand(name, shape, n_classes, by_hand, published):
    model = shaped(name, shape, n_classes)
    prunable, parameters = transformer_by_hand(*by_hand)
    assert count(model) == parameters
    assert published is None or parameters == published
    model = model.to_empty(device="cpu")
    assert masks.total(masks.ones(model)) == prunable
    wanted = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sorted(masks.prunable(model)) == sorted(wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_a_block_is_pytorchs_own_encoder_layer(causal):
    block = initialise(lambda: Block(12, 3, 20, causal=causal), 0).double().eval()
    with torch.no_grad():
        for index, p in enumerate(block.parameters()):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(index), dtype=p.dtype))
    reference = nn.TransformerEncoderLayer(
        12, 3, 20, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True,
        dtype=torch.float64, device="meta",
    ).to_empty(device="cpu")  # fmt: skip
    own, projections = block.state_dict(), [getattr(block.attention, part) for part in "qkv"]
    values = {"self_attn.in_proj_weight": torch.cat([p.weight for p in projections])}
    values |= {"self_attn.in_proj_bias": torch.cat([p.bias for p in projections])}
    pairs = (("self_attn.out_proj", "attention.out"), ("linear1", "mlp.fc1"), ("linear2", "mlp.fc2"))
    for theirs, ours in (*pairs, ("norm1", "norm1"), ("norm2", "norm2")):
        values |= {f"{theirs}.{what}": own[f"{ours}.{what}"] for what in ("weight", "bias")}
    reference.load_state_dict(values)
    x = torch.randn(4, 7, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64) if causal else None
    # in training mode: its fused kernel for evaluation takes no float mask
    torch.testing.assert_close(block(x), reference.train()(x, src_mask=mask), rtol=1e-10, atol=1e-10)


def test_a_decoder_does_not_look_ahead():
    model = initialise(partial(models.build, "decoder_tiny_d2_w16_h2", (6,), 11), 0).eval()
    x = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 11
    assert torch.allclose(model(x)[:, :4], model(changed)[:, :4], atol=1e-6)
    assert not torch.allclose(model(x)[:, 4:], model(changed)[:, 4:], atol=1e-3)
    assert torch.allclose(model(x[:, :4]), model(x)[:, :4], atol=1e-6)  # shorter rows


def test_a_pooled_decoder_is_the_decoder_but_for_its_output_layer():
    whole = initialise(partial(models.build, "decoder_tiny_d2_w16_h2", (6,), 256), 0).eval()
    pooled = initialise(partial(models.build, "decoder_tiny_pooled_d2_w16_h2", (6,), 3), 1).eval()
    differ = {n for n, p in pooled.state_dict().items() if p.shape != whole.state_dict()[n].shape}
    assert list(pooled.state_dict()) == list(whole.state_dict()) and differ == {"output.weight", "output.bias"}
    pooled.load_state_dict({n: p for n, p in whole.state_dict().items() if n not in differ}, strict=False)
    x = torch.randint(256, (3, 6), generator=torch.Generator().manual_seed(0))
    whole.output = nn.Identity()
    torch.testing.assert_close(pooled(x), pooled.output(whole(x).mean(1)))


def test_registers_are_read_by_no_output_and_change_it():
    make = partial(vit, (3, 8, 8), 5, depth=1, width=8, heads=2, pool="mean")
    plain, more = initialise(make, 0).eval(), initialise(partial(make, registers=3), 0).eval()
    assert count(more) - count(plain) == 3 * 8
    assert "registers" not in masks.prunable(more)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    more.load_state_dict(plain.state_dict() | {"registers": more.registers.data + 1})
    assert not torch.allclose(plain(x), more(x))
    captured = []
    more.output.register_forward_hook(lambda module, inputs, output: captured.append(inputs[0]))
    more(x)
    tokens = torch.cat(
        [more.patches(x).flatten(2).transpose(1, 2) + more.position, more.registers.expand(2, -1, -1)], 1
    )
    torch.testing.assert_close(captured[0], more.norm(more.blocks(tokens))[:, :4].mean(1))


def test_stochastic_depth_drops_examples_and_keeps_the_mean():
    x = torch.ones(4000, 3, 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = DropPath(0.25).train()(x)
    assert torch.equal(y, y[:, :1, :1].expand_as(y))
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (y[:, 0, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 4000) ** 0.5)
    assert DropPath(0.25).eval()(x) is x


def test_the_share_of_dropped_paths_rises_linearly():
    model = initialise(partial(vit, (3, 8, 8), 5, depth=4, width=8, heads=2, drop_path=0.2, dropout=0.1), 0)
    assert [block.drop_path.p for block in model.blocks] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.1}
    assert {block.attention.dropout for block in model.blocks} == {0.1}


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"heads": 3}, "heads divide the width: got 1, 8, 3"),
        ({"dropout": 1.0}, r"must lie in \[0, 1\): got 1.0 and 0.0"),
        ({"drop_path": -0.1}, r"must lie in \[0, 1\): got 0.0 and -0.1"),
        ({"pool": "max"}, "pool must be 'class' or 'mean'.*got 'max'"),
    ],
)
def test_sizes_and_shares_out_of_range_are_refused(more, match):
    with pytest.raises(ValueError, match=match):
        vit((3, 8, 8), 5, **({"depth": 1, "width": 8, "heads": 2} | more))


# Hugging Face.


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def test_bert_and_gpt2_have_the_published_parameters(transformers):
    bert = shaped("bert_base", (128,), 3)
    assert count(bert.inner.bert) == 109_482_240
    assert count(bert) == 109_482_240 + 3 * 769
    gpt2 = shaped("gpt2_base", (128,), 50_257)
    assert count(gpt2) == 124_439_808  # the output layer is the embedding
    layers = [p for n, p in gpt2.named_parameters() if ".c_" in n and p.ndim == 2]
    assert sum(p.numel() for p in layers) == 12 * 12 * 768**2 == 84_934_656


def test_what_chen_et_al_prune_is_the_linear_layers_below_the_head(transformers):
    bert = shaped("bert_base", (128,), 3).to_empty(device="cpu")
    names, sizes = models.bert.prunable(bert), dict(bert.named_parameters())
    assert len(names) == 12 * 6 + 1
    assert sum(sizes[n].numel() for n in names) == 12 * (4 * 768**2 + 2 * 768 * 3072) + 768**2
    assert names == masks.prunable(bert, ("inner.bert.encoder.*", "inner.bert.pooler.*"))  # as a config says it


@pytest.mark.parametrize(
    ("name", "words", "layers"),
    [("bert_tiny_w8_h2_v11", False, 6 * 2 + 1), ("gpt2_tiny_w8_h2", True, 4 * 2), ("llama_tiny_w8_h2", True, 7 * 2)],
)
def test_hugging_face_models_map_tokens_to_logits(transformers, name, words, layers):
    model = initialise(partial(models.build, name, (5,), 11 if words else 3), 0).eval()
    x = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(0))
    assert model(x).shape == ((4, 5, 11) if words else (4, 3))
    assert len(models.bert.prunable(model)) == layers
    assert not any("emb" in n or "norm" in n.lower() or "head" in n for n in models.bert.prunable(model))


def test_pretrained_weights_come_from_a_folder(transformers, tmp_path):
    saved = initialise(partial(models.build, "bert_tiny_w8_h2_v11", (5,), 3), 0).eval()
    saved.inner.save_pretrained(tmp_path)
    again = initialise(partial(models.bert.load, tmp_path, n_classes=3), 1).eval()
    x = torch.randint(1, 11, (4, 5), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(x), saved(x))
    fresh = initialise(partial(models.bert.load, str(tmp_path), n_classes=3, weights=False), 1).eval()
    assert not torch.allclose(fresh(x), saved(x))
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in saved.named_parameters()}
    padded = torch.cat([x, torch.zeros(4, 2, dtype=torch.long)], 1)  # BERT's padding token is 0
    torch.testing.assert_close(again(padded), again(x))
    with pytest.raises(ValueError, match=r"must be a folder with config.json and weights: got '.*nowhere'"):
        models.bert.load(tmp_path / "nowhere", n_classes=3)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="transformers cannot read"):
        models.bert.load(tmp_path, n_classes=3)


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs the package transformers.*pip install 'ticketlab\[models\]'"):
        models.build("bert_tiny", (5,), 3)


def test_models_of_other_kinds_have_no_head_of_hugging_face():
    with pytest.raises(ValueError, match=r"must hold a transformers model as .inner: Linear does not"):
        models.bert.prunable(initialise(lambda: nn.Linear(2, 2), 0))
