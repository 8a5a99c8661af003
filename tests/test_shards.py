"""Data on disk: what is read back is what would be in memory, bit for bit, and nothing more is read than asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

import ticketlab as tl
from tests.cases import small_conv_bn
from ticketlab import to_shards
from ticketlab.data import Task
from ticketlab.errors import Refused
from ticketlab.image_folder import ImageFolder
from ticketlab.mapped import Mapped
from ticketlab.shards import load_shards

GENERATOR = np.random.default_rng(0)
PIXELS = GENERATOR.integers(0, 256, (60, 3, 8, 8), dtype=np.uint8)
LABELS = np.arange(60) % 3
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
SPLITS = {"validation_size": 0.2, "test_size": 0.25, "split_seed": 3}


def linear() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))


class Images(Dataset):
    """Map-style, as of torchvision: no end of its own."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int):
        return torch.from_numpy(PIXELS[index % 60]), int(LABELS[index % 60])


class Stream(IterableDataset):
    def __iter__(self):
        return zip(PIXELS, LABELS, strict=True)


def write(folder: Path, train=None, test=None, **options) -> Path:
    given = {"name": "pixels", "mean": MEAN, "std": STD, "examples_per_shard": 7, "progress": False} | options
    return tl.write_shards(folder, Images() if train is None else train, test, **given)


def in_memory(dtype: torch.dtype = torch.float32, augmentation: str = "none") -> Task:
    """The same, as everybody normalises."""
    mean, std = (torch.tensor(values, dtype=dtype).view(3, 1, 1) for values in (MEAN, STD))
    x = (torch.from_numpy(PIXELS).to(dtype) / 255 - mean) / std
    return Task.from_tensors(x, LABELS, name="pixels", augmentation=augmentation, **SPLITS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("shards") / "pixels")


def assert_same_data(mapped: Task, known: Task) -> None:
    assert (mapped.name, mapped.n_classes, mapped.input_shape) == (known.name, known.n_classes, known.input_shape)
    assert (mapped.dtype, mapped.device, mapped.loss) == (known.dtype, known.device, known.loss)
    for one, other in zip(mapped.splits(), known.splits(), strict=True):
        assert isinstance(one.x, Mapped)
        assert torch.equal(one.y, other.y)
        assert one.x[:].dtype == other.x.dtype
        assert torch.equal(one.x[:], other.x)


# ------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_bit_is_that_in_memory(folder, dtype):
    assert_same_data(load_shards(folder, dtype=dtype, **SPLITS), in_memory(dtype))


@pytest.mark.parametrize("source", [Stream(), list(zip(PIXELS, LABELS, strict=True)), zip(PIXELS, LABELS, strict=True)])
def test_any_iterable_of_pairs(tmp_path, source):
    assert_same_data(load_shards(write(tmp_path / "a", source), **SPLITS), in_memory())


def test_examples_are_indexed_as_those_of_a_tensor(folder):
    x, known = load_shards(folder, **SPLITS).train.x, in_memory().train.x
    n = len(known)
    for key in (0, -1, slice(3, 30, 4), slice(None), [5, 2, 2], torch.tensor([n - 1, 0]), known[:, 0, 0, 0] > 0, []):
        assert torch.equal(x[key], known[key])
    assert (x.shape, x.ndim, len(x), x.is_floating_point()) == (known.shape, 4, n, True)
    parts = list(x.split(10))
    assert all(torch.equal(a, b) for a, b in zip(parts, known.split(10), strict=True))
    assert torch.equal(x.take(torch.tensor([4, 1]))[:], known[[4, 1]])
    assert torch.equal(x.to(dtype=torch.float64)[:], in_memory(torch.float64).train.x)
    assert repr(x) == f"Mapped({tuple(known.shape)}, torch.float32, 9 shards of uint8)"
    with pytest.raises(IndexError):
        x[n]


def test_floating_values_tokens_and_targets(tmp_path):
    values, targets = (
        GENERATOR.normal(size=(20, 4)).astype(np.float32),
        GENERATOR.normal(size=(20, 2)).astype(np.float32),
    )
    options = {"mean": None, "std": None, "name": "a"}
    task = load_shards(write(tmp_path / "a", zip(values, targets, strict=True), loss="squared_error", **options))
    assert_same_data(task, Task.from_tensors(values, targets, loss="squared_error", name="a"))
    tokens, following = GENERATOR.integers(0, 9, (20, 5), dtype=np.int16), GENERATOR.integers(0, 9, (20, 5))
    task = load_shards(write(tmp_path / "b", zip(tokens, following, strict=True), n_classes=9, **options))
    assert_same_data(task, Task.from_tensors(tokens, following, n_classes=9, name="a"))
    rows = PIXELS.reshape(60, -1)  # not of channels: one mean for all
    task = load_shards(write(tmp_path / "c", zip(rows, LABELS, strict=True), **options), **SPLITS)
    mean, std = rows.mean() / 255, rows.std() / 255
    assert torch.allclose(task.train.x[:5].mean(), ((task.train.x[:5] * std + mean).mean() - mean) / std, atol=1e-5)
    known = (torch.from_numpy(rows).double() / 255 - mean) / std
    pixels = load_shards(tmp_path / "c", dtype=torch.float64, **SPLITS)
    assert torch.allclose(pixels.test.x[:], Task.from_tensors(known, LABELS, **SPLITS).test.x, rtol=0, atol=1e-12)


def test_mean_and_spread_of_the_training_pixels(tmp_path):
    write(tmp_path / "a", Images(), list(zip(PIXELS[:9] // 2, LABELS[:9], strict=True)), mean=None, std=None)
    scale = json.loads((tmp_path / "a" / "shards.json").read_text())["scale"]
    assert scale["mean"] == pytest.approx((PIXELS / 255).mean((0, 2, 3)), rel=1e-12)
    assert scale["std"] == pytest.approx((PIXELS / 255).std((0, 2, 3)), rel=1e-12)


def test_a_test_set_keeps_its_order(tmp_path):
    task = load_shards(write(tmp_path / "a", test=list(zip(PIXELS[:9], LABELS[:9], strict=True))), validation_size=6)
    assert (len(task.train), len(task.validation), task.test.y.tolist()) == (54, 6, LABELS[:9].tolist())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    assert torch.equal(task.test.x[:], (torch.from_numpy(PIXELS[:9]).float() / 255 - mean) / std)


def test_nothing_is_read_but_what_is_asked_for(folder, monkeypatch):
    """Opening, splitting, moving and cutting a task read no input; an evaluation reads no more at once than fits."""
    read: list[int] = []
    whole = Mapped._read
    monkeypatch.setattr(Mapped, "_read", lambda self, rows: read.append(len(rows)) or whole(self, rows))
    task = load_shards(folder, **SPLITS).to(dtype=torch.float64)
    assert task.fingerprint() != load_shards(folder, **SPLITS).fingerprint()
    assert len(task.of_classes(0, 1).train) < len(task.train)
    assert not read
    monkeypatch.setattr("ticketlab.batches._NUMBERS", 10 * 3 * 8 * 8)  # ten images
    net = tl.initialise(linear, 0).double()
    found = tl.evaluate(net, tl.state(net), task.train.x, task.train.y)
    known = in_memory(torch.float64).train
    assert max(read) <= 33  # checks look at a few
    assert sum(n == 10 for n in read) >= len(known) // 10
    monkeypatch.undo()
    assert [float(v) for v in found] == [
        float(v) for v in tl.evaluate(net, tl.state(net), known.x, known.y, batch_size=10)
    ]


# ------------------------------------------------------------------------------------------ what works on it


def test_classes_and_limits(folder):
    mapped, known = load_shards(folder, **SPLITS), in_memory()
    two = mapped.of_classes(1, 2)
    assert_same_data(two, known.of_classes(1, 2))
    few = mapped.limit(train=5)
    assert isinstance(few.train.x, torch.Tensor)
    assert isinstance(few.test.x, Mapped)
    assert torch.equal(few.train.x, known.train.x[:5])
    assert mapped.limit(5, 4, 3).resize(4, 4).fingerprint() == known.limit(5, 4, 3).resize(4, 4).fingerprint()
    assert mapped.limit(5, 4, 3).grey().fingerprint() == known.limit(5, 4, 3).grey().fingerprint()


def test_fingerprints_tell_what_differs(folder, tmp_path):
    task = load_shards(folder, **SPLITS)
    assert task.fingerprint() == load_shards(folder, **SPLITS).fingerprint()
    assert task.fingerprint() == load_shards(write(tmp_path / "again"), **SPLITS).fingerprint()
    other = [
        load_shards(folder, **SPLITS | {"split_seed": 4}),
        load_shards(write(tmp_path / "scale", mean=(0.1, 0.1, 0.1)), **SPLITS),
        load_shards(write(tmp_path / "pixel", zip(PIXELS ^ 1, LABELS, strict=True)), **SPLITS),
        load_shards(write(tmp_path / "name", name="other"), **SPLITS),
    ]
    assert len({task.fingerprint(), *(t.fingerprint() for t in other)}) == 5


@pytest.mark.parametrize("execution", ["loop", "vmap"])
def test_a_study_on_disk_is_that_in_memory(tmp_path, execution):
    """Batch norm, augmentation, criteria of data, curves, paths with statistics estimated anew: the same bits."""
    write(tmp_path / "a", augmentation="crop_flip")
    tasks = load_shards(tmp_path / "a", **SPLITS), in_memory(augmentation="crop_flip")

    def model():
        net = small_conv_bn()
        net[0] = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
        return net

    config = tl.ImpConfig(
        levels=1,
        scope="layer",
        criterion="snip",
        init_seeds=(0, 1),
        treatments=("ticket", "random_mask"),
        recipe=tl.Recipe(steps=6, batch_size=9, eval_every=3),
    )
    runs = []
    for task in tasks:
        study = tl.Study(config, model=model, task=task, device="cpu", execution=execution, progress=False)
        assert study.estimate().memory_bytes > 0
        levels = list(study.levels(None))
        ends = [levels[0].end.select(r) for r in (0, 1)]
        path = tl.connectivity.linear_path(study.model, *ends, task, n_alphas=3, splits=("train", "validation", "test"))
        runs.append((levels, path))
    for a, b in zip(*(levels for levels, _ in runs), strict=True):
        assert a.metrics.equals(b.metrics)
        assert a.curves.equals(b.curves)
        for part in ("start", "end"):
            for mine, others in zip(getattr(a, part), getattr(b, part), strict=True):
                assert all(torch.equal(mine[n], others[n]) for n in others)
        assert all(torch.equal(a.masks[n], b.masks[n]) for n in b.masks)
    for key, curve in runs[1][1].curves.items():
        assert np.array_equal(runs[0][1].curves[key], curve)


def test_what_needs_all_at_once_is_refused(folder):
    task = load_shards(folder, **SPLITS)
    net = tl.initialise(linear, 0)
    for ask in (
        lambda: task.train.x[:, 0],
        lambda: task.train.x.flatten(1),
        lambda: torch.stack([task.train.x]),
        lambda: net(task.train.x),
        lambda: task.resize(4, 4),
        task.grey,
        lambda: tl.apply(net, tl.state(net), task.train.x),
    ):
        with pytest.raises(ValueError, match=r"on disk|in memory"):
            ask()
    assert tl.graph.output_layers(net, task.train.x) == ("1.weight",)  # a few will do
    assert not hasattr(task.train.x, "nothing")


def test_measures_on_disk_are_those_in_memory_or_refused(folder):
    """Those that go through data in batches; the others say that they do not."""
    both = load_shards(folder, dtype=torch.float64, **SPLITS), in_memory(torch.float64)
    mapped, known = (task.train for task in both)
    net = tl.initialise(linear, 0).double()
    masks = tl.masks.ones(net)
    found, expected = (tl.gradients.gradient(net, tl.state(net), s.x, s.y, masks=masks) for s in (mapped, known))
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    found, expected = (tl.curvature.top_eigenvalues(net, tl.state(net), task, limit=5) for task in both)
    assert torch.equal(found.values, expected.values)
    kernel = tl.ntk.kernel(net, tl.state(net), known.x)
    try:
        assert torch.equal(tl.ntk.kernel(net, tl.state(net), mapped.x), kernel)
    except ValueError as error:
        assert "in memory" in str(error) or "on disk" in str(error)


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        ([(np.zeros((3, 8, 8), np.uint8), 0), (np.zeros((3, 8, 9), np.uint8), 1)], {}, r"input 1 has \(3, 8, 9\)"),
        ([(np.array([0.0, np.nan]), 0)], {}, "inputs must be finite: shard 0 of train has 1"),
        ([(np.array([-1, 2]), 0)], {}, "tokens, from 0: shard 0 of train has -1"),
        ([(np.zeros((8, 8, 3), np.uint8), 0)], {}, "channels first"),
        ([(np.array(["a"]), 0)], {}, "must be numbers"),
        ([(np.zeros(2), 0.5)], {}, "integer class labels"),
        ([(np.zeros(2), 0), (np.zeros(2), 3)], {"n_classes": 3}, "labels of shard 0 of train must be in 0..2"),
        ([(np.zeros(2), 0), (np.zeros(2), 2)], {}, "an example of each"),
        ([(np.zeros(2), 0), (np.zeros(2), [1, 2])], {}, "numbers of one shape"),
        ([np.zeros(2)], {}, "a pair of an input and a target"),
        ([], {}, "at least one example"),
        ([(np.zeros(2), 0), (np.zeros(2), 1)], {"mean": [0.5], "std": [0.5]}, "mean and std are of pixels"),
        ([(np.zeros((1, 2, 2), np.uint8), 0), (np.zeros((1, 2, 2), np.uint8), 1)], {}, "where a channel is constant"),
        ([(np.zeros(2), 0)], {"mean": [0.5]}, "must be given together"),
        ([(np.zeros(2), 0)], {"examples_per_shard": 0}, "at least 1: got 0"),
    ],
)
def test_refused_while_writing(tmp_path, examples, options, message):
    with pytest.raises(ValueError, match=message):
        tl.write_shards(tmp_path, examples, **{"name": "a", "progress": False} | options)
    with pytest.raises(ValueError, match="must hold a finished set of shards"):
        load_shards(tmp_path)


def test_damage_is_seen(tmp_path):
    folder = write(tmp_path / "a")
    with pytest.raises(ValueError, match="must be a new folder"):
        write(folder)
    load_shards(folder, verify=True, **SPLITS)
    shard = folder / "train" / "x_001.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    load_shards(folder, **SPLITS)  # not read
    with pytest.raises(ValueError, match=r"\['train/x_001.npy'\] of .* are not"):
        load_shards(folder, verify=True, **SPLITS)
    shard.write_bytes(bytes(content[:-1]))
    with pytest.raises(ValueError, match=r"x_001.npy must be a shard as it was written"):
        load_shards(folder, **SPLITS)
    np.save(shard, PIXELS[:3])
    with pytest.raises(ValueError, match=r"x_001.npy must hold \(7, 3, 8, 8\) of uint8: it has \(3, 3, 8, 8\)"):
        load_shards(folder, **SPLITS)
    shard.unlink()
    with pytest.raises(ValueError, match=r"x_001.npy must be a shard as it was written"):
        load_shards(folder, **SPLITS)
    np.save(folder / "train" / "y_000.npy", np.zeros(7, np.int64))
    with pytest.raises(ValueError, match=r"y_000.npy must be as it was written|x_001"):
        load_shards(folder, **SPLITS)
    whole = json.loads((folder / "shards.json").read_text())
    for changes, words in (
        ({"parts": {}}, "parts"),
        ({"parts": {"train": [{**whole["parts"]["train"][0], "x": "../../x_000.npy"}]}}, "shards"),
        ({"scale": {"mean": [0.5], "std": [0.5]}}, "scale"),
        ({"dtype": "ftaol32"}, "ftaol32"),
        ({"name": ...}, "KeyError"),
    ):
        changed = {key: value for key, value in {**whole, **changes}.items() if value is not ...}
        (folder / "shards.json").write_text(json.dumps(changed))
        with pytest.raises(Refused, match=f"must hold a finished set of shards, with its shards.json: .*{words}"):
            load_shards(folder)
    (folder / "shards.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match="format 2"):
        load_shards(folder)


# ------------------------------------------------------------------------------------------ images in folders


def imagenet(root: Path) -> Path:
    """A miniature in ImageNet's layout: three classes, images of different sizes, one of them grey."""
    for part, each in (("train", 8), ("val", 2)):
        for label, wnid in enumerate(("n01440764", "n01443537", "n02085620")):
            (root / part / wnid).mkdir(parents=True)
            for i in range(each):
                shape = (40 + 7 * i, 60 - 3 * i) if (i, label) == (1, 0) else (40 + 7 * i, 60 - 3 * i, 3)
                pixels = GENERATOR.integers(0, 120, shape) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / wnid / f"{wnid}_{i}.JPEG")
    return root


def test_imagenet_in_miniature_from_the_command_line(tmp_path, capsys):
    root = imagenet(tmp_path / "imagenet")
    assert to_shards.main([str(tmp_path / "mini"), "--images", str(root), "--size", "32"]) == 0
    assert "Task('mini': 22 + 2 + 6 examples (3, 32, 32), 3 outputs, cpu)" in capsys.readouterr().out
    task = load_shards(tmp_path / "mini", verify=True, dtype=torch.float64)
    assert task.test.y.tolist() == [0, 0, 1, 1, 2, 2]
    every = torch.cat([task.train.x[:], task.validation.x[:]])
    assert every.mean((0, 2, 3)).abs().max() < 1e-12
    assert (every.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-12
    factory = lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 3))  # noqa: E731
    config = tl.ImpConfig(
        levels=1, init_seeds=(0,), dtype="float64", recipe=tl.Recipe(steps=20, batch_size=8, eval_every=10)
    )
    *_, level = tl.imp(config, model=factory, task=task, store=tmp_path / "runs", progress=False)
    assert level.metrics["train_error"].max() < 0.2  # brightness tells the classes apart
    assert to_shards.main([str(tmp_path / "mini"), "--images", str(root)]) == 2
    assert to_shards.main([str(tmp_path / "other")]) == 2
    assert to_shards.main([str(tmp_path / "other"), "--dataset", "tests.test_shards:nothing"]) == 2
    assert capsys.readouterr().err.count("error: ") == 3


def test_the_middle_of_an_image(tmp_path):
    """The shorter side to 8/7 of the size, then the centre: of a picture constant in its middle, that colour."""
    for label in "ab":
        (tmp_path / label).mkdir()
    picture = np.zeros((70, 140, 3), np.uint8)
    picture[:, 30:110] = (10, 200, 30)
    Image.fromarray(picture).save(tmp_path / "a" / "0.png")
    Image.fromarray(np.full((64, 64), 77, np.uint8)).save(tmp_path / "b" / "0.png")
    images = ImageFolder(tmp_path, 56)
    assert (len(images), images.classes) == (2, ("a", "b"))
    x, label = images[0]
    assert (x.shape, x.dtype, label) == ((3, 56, 56), np.uint8, 0)
    assert [np.unique(channel).tolist() for channel in x] == [[10], [200], [30]]
    assert np.unique(images[1][0]).tolist() == [77]
    # An image of Pillow itself, as of torchvision's data sets without a transform.
    tl.write_shards(
        tmp_path / "shards",
        [(Image.fromarray(picture), 0), (Image.fromarray(255 - picture), 1)],
        name="p",
        progress=False,
    )
    assert np.array_equal(np.load(tmp_path / "shards" / "train" / "x_000.npy")[0], picture.transpose(2, 0, 1))


def test_folders_of_images_are_refused_by_name(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="two folders of images at least"):
        ImageFolder(tmp_path, 8)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 of them without images \['b'\]"):
        ImageFolder(tmp_path, 8)
    (tmp_path / "b" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0.png must be an image"):
        ImageFolder(tmp_path, 8)[0]


def test_a_data_set_from_the_command_line(tmp_path, capsys):
    assert to_shards.main([str(tmp_path / "a"), "--dataset", "tests.test_shards:Images"]) == 0
    assert "Task('a': 43 + 5 + 12 examples (3, 8, 8), 3 outputs, cpu)" in capsys.readouterr().out
