"""`ticketlab.tokens`: documents as passages of tokens, by a tokenizer of Hugging Face."""

from __future__ import annotations

import sys

import pytest
import torch

import ticketlab as tl
from ticketlab.losses import IGNORED

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = {"<pad>": 0, **{f"w{i}": i for i in range(1, 60)}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of words, saved as any other is."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    path = tmp_path_factory.mktemp("tokenizer")
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(path)
    return path


def document(first: int, n: int) -> str:
    return " ".join(f"w{i}" for i in range(first, first + n))


def rows(task: tl.Task) -> list[tuple[list[int], object]]:
    return sorted((x.tolist(), y.tolist()) for split in task.splits() for x, y in zip(split.x, split.y, strict=True))


def test_next_tokens_by_hand(folder):
    texts = [document(1, 7), document(11, 4), document(21, 5), ""]
    task = tl.task_from_text(texts, folder, length=3, test_size=0.3, validation_size=0.3, name="words")
    assert (task.name, task.n_classes, task.input_shape) == ("words", 60, (3,))
    assert rows(task) == [
        ([1, 2, 3], [2, 3, 4]),
        ([4, 5, 6], [5, 6, 7]),
        ([11, 12, 13], [12, 13, 14]),
        ([21, 22, 23], [22, 23, 24]),
        ([24, 25, 0], [25, IGNORED, IGNORED]),
    ]


def test_labels_of_documents_by_hand(folder):
    texts, labels = [document(1, 4), document(11, 3), document(21, 3)], [1, 0, 1]
    task = tl.task_from_text(texts, str(folder), labels, length=3, test_size=0.3, validation_size=0.3)
    assert task.n_classes == 2
    assert rows(task) == [([1, 2, 3], 1), ([4, 0, 0], 1), ([11, 12, 13], 0), ([21, 22, 23], 1)]


def test_documents_stay_together(folder, tmp_path):
    """Files, as well as strings; who goes where follows the seed."""
    files = [tmp_path / f"{i}.txt" for i in range(20)]
    for i, file in enumerate(files):
        file.write_text(document(1 + i, 1 + 2 * i) if i else document(1, 5))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tasks = [tl.task_from_text(files, tokenizer, list(range(20)), length=4, split_seed=seed) for seed in (0, 0, 1)]
    assert tasks[0].fingerprint() == tasks[1].fingerprint() != tasks[2].fingerprint()
    for task in tasks:
        owners = [set(split.y.tolist()) for split in task.splits()]
        assert sum(map(len, owners)) == len(set.union(*owners)) == 20
        n = sum(map(len, task.splits()))
        assert 0 < len(task.test) <= 0.1 * n
        assert 0 < len(task.validation) <= 0.1 * n
    assert rows(tasks[0]) == rows(tasks[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": "one long string"}, "three documents at least"),
        ({"texts": ["w1 w2", "w3", "w4"]}, "must hold two tokens: got 1"),
        ({"labels": [0, 1]}, "one per document, 3: got 2"),
        ({"length": 0}, "length must be at least 1"),
        ({"test_size": 0.6, "validation_size": 0.5}, "leave some to train on"),
        ({"tokenizer": "bert-base-uncased"}, "must be a folder"),
    ],
)
def test_refused(folder, change, message):
    given = {"texts": [document(1, 7), document(11, 4), document(21, 5)], "tokenizer": folder} | change
    with pytest.raises(ValueError, match=message):
        tl.task_from_text(**given)


def test_refused_where_nothing_is_to_be_had(folder, tmp_path, monkeypatch):
    texts = [document(1, 7), document(11, 4), tmp_path / "missing.txt"]
    with pytest.raises(ValueError, match=r"files in UTF-8: got .*missing.txt"):
        tl.task_from_text(texts, folder)
    with pytest.raises(ValueError, match="must hold a tokenizer"):
        tl.task_from_text(texts, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="must have a padding token"):
        tl.task_from_text([document(1, 7), document(11, 4), document(21, 5)], tokenizer, length=4)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="needs transformers, which is not installed"):
        tl.task_from_text(texts, folder)


def test_a_hugging_face_model_learns_from_it(folder):
    """GPT-2, as small as it gets: one study from a folder with a tokenizer to a ticket."""

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": 60}
            off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
            self.inner = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **off, use_cache=False))

        def forward(self, x):
            return self.inner(input_ids=x).logits

    texts = [document(1 + i % 40, 20) for i in range(30)]
    task = tl.task_from_text(texts, folder, length=8)
    config = tl.ImpConfig(
        levels=1,
        init_seeds=(0,),
        treatments=("ticket",),
        recipe=tl.Recipe(steps=4, batch_size=8, eval_every=2),
        prunable=("*.h.*.weight",),
    )
    _, level = tl.imp(config, model=Logits, task=task, store=None, progress=False)
    assert level.density == pytest.approx(0.8, abs=0.01)
    assert 2 < level.metrics["test_loss_nats"][0] < 5
