"""What the tasks of `ticketlab.text` are worth without a network: ``python -m benchmarks.text``.

Next bytes by n-grams, topics by logistic regressions on how often sequences of bytes occur (tf-idf). A network that
does not beat a bigram has learned no more than that knows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import ticketlab as tl
from benchmarks.timing import command
from ticketlab import text


def n_gram(train: np.ndarray, test: np.ndarray, n: int) -> np.ndarray:
    r"""Probabilities [m, t, 256] of every byte of the test passages, from the n - 1 bytes before it.

    .. math:: p_n(b \mid h) = \frac{c(h b) + p_{n-1}(b \mid h')}{c(h) + 1}, \quad p_0 = 1/256

    with h' the context h without its first byte, and c the counts of the training passages. At the beginning of a
    passage, contexts are `text.BEGIN`.

    Args:
        train: Passages [k, t], bytes.
        test: Passages [m, t].
        n: 1 for a unigram.
    """
    known = [_table(train, order) for order in range(n)]
    found = np.full((*test.shape, text.VOCABULARY), 1 / text.VOCABULARY)
    for order, (contexts, counts) in enumerate(known):
        keys = _contexts(test, order)
        place = np.searchsorted(contexts, keys).clip(max=len(contexts) - 1)
        rows = (contexts[place] == keys)[..., None] * counts[place]
        found = (rows + found) / (rows.sum(-1, keepdims=True) + 1)
    return found


def _table(passages: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Contexts of so many bytes, sorted, and how often each byte follows them, [context, 256]."""
    contexts, index = np.unique(_contexts(passages, order), return_inverse=True)
    flat = index.reshape(-1) * text.VOCABULARY + passages.reshape(-1)
    return contexts, np.bincount(flat, minlength=len(contexts) * text.VOCABULARY).reshape(-1, text.VOCABULARY)


def _contexts(passages: np.ndarray, order: int) -> np.ndarray:
    """A number for the ``order`` bytes before each byte, [m, t]."""
    padded = np.pad(passages.astype(np.int64), ((0, 0), (order, 0)), constant_values=text.BEGIN)
    found = np.zeros(passages.shape, np.int64)
    for back in range(order):
        found = found * text.VOCABULARY + padded[:, back : back + passages.shape[1]]
    return found


def scores(probabilities: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Cross-entropy in nats and error per label, of probabilities [..., classes]."""
    right = np.take_along_axis(probabilities, labels[..., None], -1)
    return float(-np.log(right).mean()), float((probabilities.argmax(-1) != labels).mean())


def next_byte(task: tl.Task, most: int = 3) -> pd.DataFrame:
    """Rows for chance and n-grams, on 500 test passages of ``stdlib_lm``."""
    train, test = task.train.y.numpy(), task.test.y.numpy()
    rows = [("chance", math.log(text.VOCABULARY), 1 - 1 / text.VOCABULARY)]
    rows += [(f"{n}-gram", *scores(n_gram(train, test[:500], n), test[:500])) for n in range(1, most + 1)]
    return pd.DataFrame(rows, columns=["baseline", "test_loss_nats", "test_error"])


SEQUENCES = {"bytes": (1, 1), "1- and 2-grams": (1, 2), "2- to 5-grams": (2, 5)}


def topics(task: tl.Task, sequences: Mapping[str, tuple[int, int]] = SEQUENCES) -> pd.DataFrame:
    """Rows for chance and logistic regressions on sequences of bytes on the test set of ``stdlib_topics``."""
    train, test = ([row.tobytes().decode("latin-1") for row in _bytes(s)] for s in (task.train, task.test))
    y, y_test = task.train.y.numpy(), task.test.y.numpy()
    rows = [("chance", math.log(task.n_classes), 1 - 1 / task.n_classes)]
    for name, lengths in sequences.items():
        counts = HashingVectorizer(
            analyzer="char", ngram_range=lengths, n_features=2**16, norm=None, alternate_sign=False, lowercase=False
        )
        model = make_pipeline(counts, TfidfTransformer(sublinear_tf=True), LogisticRegression(C=5, max_iter=300))
        rows.append((name, *scores(model.fit(train, y).predict_proba(test), y_test)))
    return pd.DataFrame(rows, columns=["baseline", "test_loss_nats", "test_error"])


def _bytes(split: tl.Split) -> np.ndarray:
    return split.x[:, 1:].numpy().astype(np.uint8)  # without `text.BEGIN`


@dataclass(frozen=True)
class Config:
    """Simple methods on both text tasks."""


def main(_: Config) -> int:
    for name, measure in (("stdlib_lm", next_byte), ("stdlib_topics", topics)):
        task = tl.load_task(name)
        print(task.name, measure(task).to_string(index=False, float_format="%.4f"), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(command("text", Config, main))
