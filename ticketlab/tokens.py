"""Text of one's own as a task of tokens, by any tokenizer of Hugging Face (the optional extra ``transformers``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ticketlab.data import Split, Task
from ticketlab.errors import Refused
from ticketlab.losses import IGNORED
from ticketlab.seeds import stream
from ticketlab.text import first_fit


def task_from_text(
    texts: Sequence[str | Path],
    tokenizer: str | Path | Any,
    labels: Sequence[int] | None = None,
    *,
    length: int = 128,
    name: str = "text",
    validation_size: float = 0.1,
    test_size: float = 0.1,
    split_seed: int = 0,
    n_classes: int | None = None,
) -> Task:
    """Documents as passages of tokens [n, length], labelled by the tokens that come next or as their documents are.

    A document lies in one split as a whole. It is cut into passages one behind the other; of a last one that is short
    the rest is padding, which has no label (`losses.IGNORED`) in a language model. Inputs hold no attention mask: a
    causal model needs none, another finds one as ``x != tokenizer.pad_token_id``.

    Args:
        texts: Documents: strings, or paths (``pathlib.Path``) of files in UTF-8.
        tokenizer: A folder with a tokenizer of Hugging Face, or such a tokenizer. Nothing is downloaded.
        labels: A class per document; None makes a language model's task, labels [n, length].
        length: Tokens of a passage.
        name: Name of the task.
        validation_size: Share of all passages that whole documents are chosen for, as far as they fit.
        test_size: The same for the test set, which is chosen first.
        split_seed: Of which documents go where.
        n_classes: Of documents; the largest label and one more when None. A language model has an output per token of
            the tokenizer.

    Raises:
        Refused: No ``transformers``, no tokenizer or file there, fewer than three documents with enough text, labels
            that are not as many, no padding token where one is needed.
    """
    if isinstance(texts, str) or len(texts) < 3:
        raise Refused(
            "texts must be three documents at least, for a document is in one split as a whole: got "
            f"{'one string' if isinstance(texts, str) else len(texts)}. Cut a long one at its chapters."
        )
    if labels is not None and len(labels) != len(texts):
        raise Refused(f"labels must be one per document, {len(texts)}: got {len(labels)}.")
    if not length >= 1 or not 0 < test_size < 1 or not 0 < validation_size < 1 or test_size + validation_size >= 1:
        raise Refused(
            "length must be at least 1, and validation_size and test_size shares in (0, 1) that leave some to train "
            f"on: got {length}, {validation_size} and {test_size}."
        )
    own = _tokenizer(tokenizer)
    # A language model's passages overlap by the token that the last of each has to predict.
    parts = [_passages(own, _text(text), length, extra=labels is None) for text in texts]
    splits = _splits([len(part) for part in parts], validation_size, test_size, split_seed)
    made = []
    for kind, chosen in enumerate(splits):
        tokens = np.concatenate([parts[i] for i in chosen])
        order = torch.randperm(len(tokens), generator=stream("passages", split_seed, kind))
        rows = torch.from_numpy(tokens)[order]
        if labels is None:
            made.append(_next(rows, own))
        else:
            y = torch.tensor([int(labels[i]) for i in chosen for _ in parts[i]])
            made.append(Split(_padded(rows, own), y[order]))
    n = len(own) if labels is None else int(max(labels)) + 1 if n_classes is None else n_classes
    train, validation, test = made
    return Task(name, train, validation, test, n)


def _tokenizer(given: str | Path | Any) -> Any:
    if not isinstance(given, str | os.PathLike):
        return given
    try:
        loader = import_module("transformers").AutoTokenizer
    except ImportError as error:
        raise Refused(
            "a tokenizer of Hugging Face needs transformers, which is not installed: pip install 'ticketlab[models]'."
        ) from error
    if not Path(given).is_dir():
        raise Refused(f"tokenizer must be a folder, as tokenizer.save_pretrained writes it: got {str(given)!r}.")
    try:
        return loader.from_pretrained(given, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        why = str(error).strip().partition("\n")[0]
        raise Refused(f"{given} must hold a tokenizer, as tokenizer.save_pretrained writes it: {why}") from error


def _text(document: str | Path) -> str:
    if not isinstance(document, Path):
        return str(document)
    try:
        return document.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"texts must be strings, or paths of files in UTF-8: got {document} ({error}).") from error


def _passages(tokenizer: Any, text: str, length: int, extra: bool) -> np.ndarray:
    """Passages [k, length], or [k, length + 1] that overlap by one; what is missing at the end is -1."""
    ids = np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    begins = range(0, len(ids) - int(extra), length)
    found = np.full((len(begins), length + int(extra)), -1, dtype=np.int64)
    for row, begin in zip(found, begins, strict=True):
        part = ids[begin : begin + len(row)]
        row[: len(part)] = part
    return found


def _splits(sizes: Sequence[int], validation_size: float, test_size: float, seed: int) -> list[np.ndarray]:
    """Documents to train on, to validate on and to test on: those that fit, in random order."""
    size = np.array(sizes)
    left = np.flatnonzero(size)
    if len(left) < 3:
        raise Refused(f"three documents at least must hold two tokens: got {len(left)} that do. Give more text.")
    left = left[torch.randperm(len(left), generator=stream("documents", seed)).numpy()]
    chosen = []
    for share in (test_size, validation_size):
        chosen.append(first_fit(left, size, int(share * size.sum())))
        left = left[~np.isin(left, chosen[-1])]
    if not len(left):
        raise Refused("some document must be left to train on: all fit into the other splits. Make those smaller.")
    return [left, chosen[1], chosen[0]]


def _next(rows: Tensor, tokenizer: Any) -> Split:
    """Each token, and the next as its label."""
    y = rows[:, 1:].clone()
    y[y < 0] = IGNORED
    return Split(_padded(rows[:, :-1], tokenizer), y)


def _padded(x: Tensor, tokenizer: Any) -> Tensor:
    missing = x < 0
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), None)
    if missing.any() and pad is None:
        raise Refused(
            "the tokenizer must have a padding token for documents that end within a passage: it has none, and no end "
            "of text. Set tokenizer.pad_token, or give a length that divides them."
        )
    return torch.where(missing, 0 if pad is None else pad, x)
