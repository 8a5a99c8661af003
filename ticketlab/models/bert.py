"""The BERT, GPT-2 and Llama of Hugging Face's transformers: one tensor of tokens in, one tensor of logits out.

Random ones of any size are made offline; pretrained ones are read from a folder on this machine. transformers is an
optional extra, imported when a network is made. To start every replica from pretrained weights, as Chen et al. (2020)
do, with ``reinit`` still drawing fresh ones:

>>> from functools import partial
>>> import ticketlab as tl
>>> fresh = partial(tl.models.bert.load, "bert-base", n_classes=3, weights=False)
>>> start = tl.state(tl.initialise(partial(tl.models.bert.load, "bert-base", n_classes=3), 0))  # doctest: +SKIP
>>> levels = tl.imp(tl.preset("bert_finetune"), model=fresh, task=task, start=start)  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ticketlab import masks
from ticketlab.errors import Refused
from ticketlab.models.transformer import tokens_of


class Logits(nn.Module):
    """A model of transformers without the record around its logits; it stands under the name ``inner``."""

    def __init__(self, inner: nn.Module, padding: int | None = None) -> None:
        super().__init__()
        self.inner, self.padding = inner, padding

    def forward(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n *t outputs"]:
        attended = None if self.padding is None else (tokens != self.padding).long()
        return self.inner(input_ids=tokens, attention_mask=attended).logits

    def extra_repr(self) -> str:
        return f"padding={self.padding}"


def bert(
    input_shape: Sequence[int],
    n_classes: int,
    *,
    depth: int = 12,
    width: int = 768,
    heads: int = 12,
    vocabulary: int = 30522,
    dropout: float = 0.0,
) -> nn.Module:
    """BERT (Devlin et al. 2019) with a classifier on its pooled first token: tokens [n, t] -> logits [n, classes].

    The defaults are BERT-base: 109,482,240 parameters below the classifier. The share of dropout is the paper's at 0.1.

    Raises:
        Refused: transformers is not installed, inputs that are not rows of tokens, heads that do not divide the width.
    """
    length = tokens_of("BERT", input_shape)
    _check_heads(width, heads)
    sizes = {"num_hidden_layers": depth, "hidden_size": width, "num_attention_heads": heads}
    sizes |= {"intermediate_size": 4 * width, "vocab_size": vocabulary, "num_labels": n_classes}
    sizes |= {"max_position_embeddings": max(512, length)}
    shares = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    library = _transformers()
    return Logits(library.BertForSequenceClassification(library.BertConfig(**sizes, **shares)))


def gpt2(
    input_shape: Sequence[int],
    n_classes: int,
    *,
    depth: int = 12,
    width: int = 768,
    heads: int = 12,
    dropout: float = 0.0,
) -> nn.Module:
    """GPT-2 (Radford et al. 2019): tokens [n, t] -> logits [n, t, vocabulary], of ``n_classes`` tokens.

    Its output layer is its embedding, which is not prunable; its linear layers are transformers' ``Conv1D``. The
    defaults, with 50,257 tokens, have the 124,439,808 parameters of the smallest one that was published.

    Raises:
        Refused: transformers is not installed, inputs that are not rows of tokens, heads that do not divide the width.
    """
    length = tokens_of("GPT-2", input_shape)
    _check_heads(width, heads)
    sizes = {"n_layer": depth, "n_embd": width, "n_head": heads, "vocab_size": n_classes}
    sizes |= {"n_positions": max(1024, length), "bos_token_id": 0, "eos_token_id": 0}
    shares = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    library = _transformers()
    return Logits(library.GPT2LMHeadModel(library.GPT2Config(**sizes, **shares, use_cache=False)))


def llama(input_shape: Sequence[int], n_classes: int, *, depth: int = 2, width: int = 128, heads: int = 2) -> nn.Module:
    """Llama (Touvron et al. 2023): tokens [n, t] -> logits [n, t, vocabulary], of ``n_classes`` tokens.

    Its MLPs have 8/3 times the width, to a multiple of 16; it has no biases, and no dropout in its MLPs.

    Raises:
        Refused: transformers is not installed, inputs that are not rows of tokens, heads that do not divide the width.
    """
    length = tokens_of("Llama", input_shape)
    _check_heads(width, heads)
    sizes = {"num_hidden_layers": depth, "hidden_size": width, "num_attention_heads": heads, "vocab_size": n_classes}
    sizes |= {"num_key_value_heads": heads, "intermediate_size": -(-8 * width // 48) * 16}
    sizes |= {"max_position_embeddings": max(2048, length), "bos_token_id": 0, "eos_token_id": 0}
    library = _transformers()
    return Logits(library.LlamaForCausalLM(library.LlamaConfig(**sizes, use_cache=False)))


def load(path: str | Path, *, n_classes: int | None = None, weights: bool = True, padding: bool = True) -> nn.Module:
    """A pretrained model from a folder of ``config.json`` and weights; nothing is downloaded.

    Args:
        path: As ``save_pretrained`` writes it.
        n_classes: For a classifier, whose last layer is new and drawn at random unless the folder has one of this
            size; None: a causal language model.
        weights: Read them; False: the same network with a fresh draw of its own initialiser.
        padding: Whether no token attends to the padding token that its config names.

    Returns:
        In float32, with the dropout of its config.

    Raises:
        Refused: transformers is not installed, no such folder, or one that it cannot read.
    """
    if not Path(path, "config.json").is_file():
        raise Refused(f"a pretrained model must be a folder with config.json and weights: got {str(path)!r}.")
    library = _transformers()
    kind = library.AutoModelForCausalLM if n_classes is None else library.AutoModelForSequenceClassification
    labels = {} if n_classes is None else {"num_labels": n_classes}
    try:
        config = library.AutoConfig.from_pretrained(str(path), local_files_only=True, **labels)
        if hasattr(config, "use_cache"):
            config.use_cache = False
        if weights:
            inner = kind.from_pretrained(str(path), config=config, local_files_only=True, dtype=torch.float32)
        else:
            inner = kind.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise Refused(f"transformers cannot read {str(path)!r}: {str(error).splitlines()[0]}") from error
    return Logits(inner, getattr(config, "pad_token_id", None) if padding else None)


def prunable(model: nn.Module) -> tuple[str, ...]:
    """What Chen et al. (2020) prune, for ``ImpConfig.prunable``: the linear layers below the head.

    BERT's pooler is one of them; classifiers, output layers, embeddings and norms are not.

    Args:
        model: One of this file, or any that holds a model of transformers as ``inner``.

    Raises:
        Refused: It holds none.
    """
    body = getattr(getattr(model, "inner", None), "base_model", None)
    if not isinstance(body, nn.Module):
        raise Refused(f"the model must hold a transformers model as .inner: {type(model).__name__} does not.")
    inside, named = {id(p) for p in body.parameters()}, dict(model.named_parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="only .* of the entries")  # most of a small one is its embedding
        return tuple(name for name in masks.prunable(model) if id(named[name]) in inside)


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise Refused(f"heads must divide the width: got {heads} for {width}.")


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise Refused(
            f"this model needs the package transformers: {error}. Install it with pip install 'ticketlab[models]'."
        ) from error
