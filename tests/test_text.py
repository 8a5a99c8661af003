"""`ticketlab.text`: passages of the standard library, and tasks of tokens from end to end."""

from __future__ import annotations

import math
import sysconfig
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ticketlab as tl
from benchmarks.text import n_gram, scores
from benchmarks.text import topics as benchmark_topics
from ticketlab import text
from ticketlab.batches import batch_indices, portion

TOPICS = list(text.TOPICS)


class Tiny(nn.Module):
    """A causal decoder of one block; with a label per passage it reads the mean of all places."""

    def __init__(
        self, t: int, n_outputs: int, vocabulary: int = text.VOCABULARY, width: int = 8, per_token: bool = True
    ):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Parameter(0.1 * torch.randn(t, width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head, self.per_token = nn.Linear(width, n_outputs), per_token

    def forward(self, x):
        z = self.tokens(x) + self.places
        q, k, v = self.qkv(z).chunk(3, -1)
        z = z + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(torch.tanh(z) if self.per_token else torch.tanh(z).mean(1))


@pytest.fixture(scope="module")
def lm() -> tl.Task:
    return tl.load_task("stdlib_lm")


@pytest.fixture(scope="module")
def topics() -> tl.Task:
    return tl.load_task("stdlib_topics")


def passages(task: tl.Task) -> list[set[bytes]]:
    """What each split shows of its passages: all bytes but the last."""
    return [{row[1:].tobytes() for row in split.x.numpy().astype(np.uint8)} for split in task.splits()]


# ------------------------------------------------------------------------------------------ what the tasks are


def test_next_bytes_and_topics(lm, topics):
    assert [len(split) for split in lm.splits()] == [20000, 1000, 2000]
    assert [len(split) for split in topics.splits()] == [16000, 800, 1600]
    assert (lm.input_shape, topics.input_shape) == ((text.LENGTH,), (text.LENGTH,))
    assert (lm.n_classes, topics.n_classes, lm.dtype) == (256, 8, None)
    for split in (*lm.splits(), *topics.splits()):
        assert split.x.dtype == split.y.dtype == torch.int64
        assert (split.x[:, 0] == text.BEGIN).all()
        assert split.x[:, 1:].max() < text.PAD  # what is no text is no byte of it
    for split in lm.splits():
        assert torch.equal(split.x[:, 1:], split.y[:, :-1])
    for split, each in zip(topics.splits(), (2000, 100, 200), strict=True):
        assert split.y.bincount().tolist() == [each] * 8


def test_a_file_is_in_one_split_of_both_tasks(lm, topics):
    """Looked up in the files themselves: the bytes that the passages show are found again, uncut."""
    owners: dict[bytes, set[str]] = {}
    for name, content in text.stdlib().files.items():
        for begin in range(0, len(content) - text.LENGTH + 1, text.LENGTH):
            owners.setdefault(content[begin : begin + text.LENGTH - 1], set()).add(name)
    split_of: dict[str, set[int]] = {}
    for task in (lm, topics):
        for number, split in enumerate(passages(task)):
            for passage in split:
                if len(owners[passage]) == 1:
                    split_of.setdefault(*owners[passage], set()).add(number)
    assert all(len(splits) == 1 for splits in split_of.values())
    assert len(split_of) > 300
    for split in topics.splits():
        for row, label in zip(split.x[:100].numpy().astype(np.uint8), split.y[:100].tolist(), strict=True):
            assert TOPICS[label] in {text.topic_of(name) for name in owners[row[1:].tobytes()]}


def test_no_passage_occurs_twice(lm):
    whole = torch.cat([split.y for split in lm.splits()])
    assert len(torch.unique(whole, dim=0)) == len(whole)


def test_the_test_set_is_always_the_same(lm, topics):
    for task in (lm, topics):
        other = tl.load_task(task.name, split_seed=1, validation_size=400)
        assert torch.equal(other.test.x, task.test.x)
        assert torch.equal(other.test.y, task.test.y)
        assert len(other.validation) == 400
        assert passages(other)[1] & passages(task)[0]  # other files are validated on
        assert not passages(other)[0] & passages(other)[1]
    assert tl.load_task("stdlib_topics", validation_size=403).validation.y.bincount().tolist() == [51] * 3 + [50] * 5
    assert tl.load_task("stdlib_lm").fingerprint() == lm.fingerprint()
    for size in (0, 2.5, 100_000):
        with pytest.raises(ValueError, match="validation_size must be"):
            tl.load_task("stdlib_lm", validation_size=size)


def test_a_name_is_that_of_one_text(lm, monkeypatch):
    task, digest = text.split_name(lm.name)
    assert (task, len(digest)) == ("stdlib_lm", 8)
    assert tl.load_task(lm.name).fingerprint() == lm.fingerprint()
    assert (
        tl.Study(replace(CONFIG, task="stdlib_lm"), model=lambda: Tiny(128, 256)).config.task == lm.name
    )  # what a run is stored under
    for name in ("digits.00000000", "stdlib", "stdlib_lm_0"):
        with pytest.raises(ValueError, match="unknown task"):
            tl.load_task(name)
    known = text.stdlib()
    monkeypatch.setattr(text, "stdlib", lambda: known._replace(digest="00000000"))
    assert tl.load_task("stdlib_lm").fingerprint() != lm.fingerprint()
    with pytest.raises(ValueError, match=f"digest {digest}: this Python's, .* has 00000000"):
        tl.load_task(lm.name)


def test_the_text_is_read_from_the_python_that_runs(tmp_path, monkeypatch):
    """A library of our own: which files count, and what their digest depends on."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})

    def read() -> text.Text:
        text.stdlib.cache_clear()
        return text.stdlib()

    with pytest.raises(ValueError, match="sources must be on disk"):
        read()
    kept = [f"{modules.split()[0]}.py" for modules in text.TOPICS.values()]
    for name in (
        *kept,
        "asyncio/test/a.py",
        "encodings/a.py",
        "html/entities.py",
        "site-packages/asyncio/a.py",
        "own.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"a = 1\r\n")
    (tmp_path / "os.py").write_bytes("# é".encode("latin-1"))
    first = read()
    assert first.files == {name: b"a = 1\n" for name in sorted(kept)}
    (tmp_path / "os.py").write_bytes(b"a = 1\n")
    second = read()
    assert second.digest != first.digest
    (tmp_path / "os.py").rename(tmp_path / "re.py")
    assert read().digest not in (first.digest, second.digest)


@pytest.fixture(autouse=True)
def _the_running_python():
    read = text.stdlib  # a test may put another in its place
    yield
    read.cache_clear()


# ------------------------------------------------------------------------------------------ what they are worth


def test_n_grams_by_counting():
    """p(b | h) = (c(hb) + p(b)) / (c(h) + 1), counted by hand."""
    train, test = np.frombuffer(b"abab" + b"abcc", np.uint8).reshape(2, 4), np.frombuffer(b"abxb", np.uint8)[None]
    one, two = n_gram(train, test, 1), n_gram(train, test, 2)
    p = {"a": (3 + 1 / 256) / 9, "b": (3 + 1 / 256) / 9, "x": (1 / 256) / 9}
    assert one[0, :, ord("b")] == pytest.approx(p["b"])
    assert two[0, 0, ord("a")] == pytest.approx((2 + p["a"]) / 3)  # after BEGIN, twice
    assert two[0, 1, ord("b")] == pytest.approx((3 + p["b"]) / 4)  # after a, three times
    assert two[0, 3, ord("b")] == pytest.approx(p["b"])  # after x, which was never seen
    assert two.sum(-1) == pytest.approx(1)
    assert scores(np.full((5, 4), 0.25), np.zeros(5, int)) == pytest.approx((math.log(4), 0))


def test_bytes_are_predictable_as_far_as_stated(lm):
    """`benchmarks.text` says it of the whole; of a sample the numbers are near: about 3.2, 2.5 and 2.0 nats."""
    train, test = lm.train.y[:5000].numpy(), lm.test.y[:60].numpy()
    losses = [scores(n_gram(train, test, n), test)[0] for n in (1, 2, 3)]
    for loss, least, most in zip(losses, (2.9, 2.2, 1.7), (3.4, 2.8, 2.4), strict=True):
        assert least < loss < most


def test_topics_can_be_told(topics):
    """A logistic regression on pairs of bytes errs in about 0.43 of all passages, chance in 0.875."""
    few = topics.limit(train=2000, test=800)
    table = benchmark_topics(few, {"1- and 2-grams": (1, 2)}).set_index("baseline")
    assert table.loc["chance", "test_error"] == 0.875
    assert table.loc["1- and 2-grams", "test_error"] < 0.65


# ------------------------------------------------------------------------------------------ training on tokens


def small(task: tl.Task, n: int = 120) -> tl.Task:
    """The first 16 tokens of a few passages."""

    def cut(split: tl.Split) -> tl.Split:
        return tl.Split(
            split.x[:n, :16].clone(), split.y[:n, :16].clone() if split.y.ndim == 2 else split.y[:n].clone()
        )

    return task.map(cut)


CONFIG = tl.ImpConfig(
    levels=1,
    init_seeds=(0, 1),
    dtype="float64",
    prunable=("qkv.weight", "out.weight", "head.weight"),  # less than half of so small a network
    recipe=tl.Recipe(steps=12, batch_size=20, eval_every=6),
)


def test_losses_are_in_nats_per_token(lm):
    task = small(lm)
    net = tl.initialise(lambda: Tiny(16, 256), 0)
    loss, error = tl.evaluate(net, tl.state(net), task.test.x, task.test.y)
    logits = net(task.test.x).detach()
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits.flatten(0, 1), task.test.y.flatten())), rel=1e-6)
    assert float(error) == pytest.approx(float((logits.argmax(-1) != task.test.y).double().mean()))


def test_a_ticket_of_a_language_model(lm, tmp_path):
    task = small(lm)
    study = tl.Study(CONFIG, model=lambda: Tiny(16, 256), task=task, device="cpu", progress=False)
    dense, level = study.levels(tmp_path)
    assert study.folder(tmp_path).name.startswith(f"{lm.name}-lambda-")
    for one in (dense, level):
        for row, split in ((one.metrics.iloc[0], task.test),):
            net = study.model
            end = one.select(treatment="ticket", init_seed=0).end
            loss, error = tl.evaluate(net, end, split.x, split.y)
            assert (row["test_loss_nats"], row["test_error"]) == (float(loss), float(error))
        assert set(one.curves["step"]) == {6, 12}
        assert one.curves["loss_nats"].between(1, 8).all()
        assert one.curves["error"].between(0.3, 1).all()
    path = tl.connectivity.linear_path(study.model, *(dense.end.select(r) for r in (0, 1)), task, n_alphas=3)
    assert path.curves["test", "loss_nats"][0] == pytest.approx(dense.metrics["test_loss_nats"][0])


def test_replicas_of_tokens_are_those_of_plain_loops(lm):
    """The loop, which `auto` takes where there is an embedding, and vmap agree with PyTorch alone."""
    task, recipe = (
        small(lm),
        tl.Recipe(steps=5, batch_size=20, optimizer="sgd", momentum=0.0, learning_rate=0.5, eval_every=5),
    )
    nets = [tl.initialise(lambda: Tiny(16, 256), seed).double() for seed in (0, 1)]
    starts = [tl.Start(tl.state(net), {}, seed) for seed, net in enumerate(nets)]
    found = {
        how: tl.train(nets[0], starts, task, recipe, execution=how, progress=False).end for how in ("auto", "loop")
    }
    for r, net in enumerate(nets):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for step in range(5):
            index = batch_indices(len(task.train), 20, r, step)
            logits = net(task.train.x[index])
            loss = F.cross_entropy(logits.flatten(0, 1), task.train.y[index].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for name, p in net.named_parameters():
            assert torch.allclose(found["auto"].params[name][r], p, rtol=1e-9, atol=1e-12)
            assert torch.equal(found["auto"].params[name], found["loop"].params[name])


def test_pretrained_on_bytes_transferred_to_topics(lm, topics):
    """One vocabulary and one length: the trunk of the one is the start of the other."""
    trained = tl.train(
        net := tl.initialise(lambda: Tiny(16, 256), 0),
        [tl.Start(tl.state(net), {}, 0)],
        small(lm),
        tl.Recipe(steps=6, batch_size=20, eval_every=6),
        progress=False,
    ).end.select(0)
    factory = lambda: Tiny(16, 8, per_token=False)  # noqa: E731
    fresh = tl.state(tl.initialise(factory, 0))
    start = tl.State({n: p if "head" in n else trained.params[n] for n, p in fresh.params.items()}, fresh.buffers)
    config = replace(CONFIG, dtype="float32", treatments=("ticket",))
    (*_, level) = tl.imp(config, model=factory, task=small(topics), start=start, store=None, progress=False)
    masked = level.select(treatment="ticket", init_seed=0)
    name = "qkv.weight"
    assert torch.equal(masked.start.params[name], trained.params[name] * masked.masks[name])
    assert level.metrics["test_error"].between(0, 1).all()


def test_a_forward_pass_is_cut_where_its_outputs_are_large():
    x, y = torch.zeros(9, 128, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)
    assert portion(x, y, 2500) == 234  # 128 tokens of 256 numbers each
    assert portion(x, torch.full((9, 128), 50256), 2500) == 1
    assert portion(torch.zeros(9, 3, 32, 32), y, 2500) == 2500
    assert portion(torch.zeros(2, 3, 224, 224), y, 2500) == 51
    assert portion(torch.zeros(9, 784), y, 7) == 7


def test_what_a_language_model_is_too_large_for_is_refused(lm):
    """128 tokens of 256 outputs each: 32,768 outputs per example."""
    net, (x, y) = tl.initialise(lambda: Tiny(128, 256), 0), (lm.train.x[:100], lm.train.y[:100])
    with pytest.raises(ValueError, match=r"the kernel must fit into memory: .* Take fewer inputs"):
        tl.ntk.kernel(net, tl.state(net), x)
    masks = tl.masks.ones(net, CONFIG.prunable)
    evidence = tl.criteria.Evidence(net, masks, tl.state(net), tl.state(net), x, y)
    with pytest.raises(ValueError, match="4096 at most: the model has 32768"):
        tl.criteria.score("obd_gauss_newton", evidence)
    assert set(tl.criteria.score("snip", evidence)) == set(masks)


def test_measures_of_outputs_per_token_are_those_of_plain_autograd():
    """Every place's outputs count: the gradient per example is the mean over its tokens, the kernel is over all."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 5, (9, 4), generator=generator)
    x, y = tokens[:, :3], tokens[:, 1:].clone()
    y[::2, 0] = -100  # does not count
    net = tl.initialise(lambda: Tiny(3, 5, vocabulary=5, width=4), 0).double()
    state = tl.state(net)
    loss = F.cross_entropy(net(x).mT, y, reduction="none")
    (loss.sum(1) / (y != -100).sum(1)).mean().backward()
    found = tl.gradients.gradient(net, state, x, y)
    kernel = tl.ntk.kernel(net, state, x)
    rows = [torch.autograd.grad(f, list(net.parameters()), retain_graph=True) for f in net(x).flatten()]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    for name, p in net.named_parameters():
        assert torch.allclose(found[name], p.grad, rtol=1e-10, atol=1e-14)
    assert torch.allclose(kernel.reshape(9 * 15, 9 * 15), jacobian @ jacobian.T, rtol=1e-10, atol=1e-12)
