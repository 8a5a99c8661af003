"""Readers of files of strangers: each takes the content of a file, and checks what was accepted."""

from __future__ import annotations

import gzip
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ticketlab as tl
from examples.certificate.network import decode as decode_network
from examples.certificate.network import encode as encode_network
from examples.certificate.record import CLAIMS, read_record
from ticketlab import bounds
from ticketlab.engine import store
from ticketlab.engine.config import described, from_json
from ticketlab.idx import read_cifar10, read_idx

CORPUS = Path(__file__).parent / "corpus"
Target = Callable[[bytes], None]
"""Raises `Refused` for what is not taken, and an AssertionError where something was taken that should not be."""


@cache
def _room() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


def _file(name: str, content: bytes) -> Path:
    path = _room() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def idx(content: bytes) -> None:
    found = read_idx(_file("x-ubyte", content))
    sizes = b"".join(n.to_bytes(4, "big") for n in found.shape)
    assert content == bytes([0, 0, 8, found.ndim]) + sizes + found.tobytes()


def idx_gz(content: bytes) -> None:
    found = read_idx(_file("x-ubyte.gz", content))
    assert gzip.decompress(content)[4 + 4 * found.ndim :] == found.tobytes()


def cifar10(content: bytes) -> None:
    record = 3073
    for part in range(1, 6):
        _file(f"cifar/data_batch_{part}.bin", bytes(record))
    raw = read_cifar10(_file("cifar/test_batch.bin", content).parent, n_batch=1, n_test=2)
    assert len(content) == 2 * record and raw.y_test.tolist() == [content[0], content[record]]


def certificate(content: bytes) -> None:
    record = read_record(_file("certificate.json", content))
    assert record.claims.keys() == CLAIMS.keys()
    assert all(json.loads(content)[name] == value for name, value in record.claims.items())


def message(content: bytes) -> None:
    assert encode_network(decode_network(content)) == content


def mask_code(content: bytes) -> None:
    masks, params = bounds.decode(content, *_reference())
    assert all(mask.dtype == torch.bool for mask in masks.values()) and params.keys() >= masks.keys()


@cache
def _reference() -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    return {"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}, ("weight",)


def config(content: bytes) -> None:
    """A run's config.json under a name that carries no identity, as a copy has."""
    read = store.read_config(_file("copied/config.json", _resealed(content)).parent)
    again = store.plain(described(from_json(read["config"])))
    assert {**again, **read["config"]} == {**read["config"], **again}


def manifest(content: bytes) -> None:
    """shards.json beside the shards that it describes."""
    folder = _shards()
    (folder / "shards.json").write_bytes(content)
    task = tl.load_shards(folder, validation_size=2, test_size=2, verify=True)
    assert len(task.train) + len(task.validation) + len(task.test) == 12


@cache
def _shards() -> Path:
    examples = [(np.full(3, i, np.float32), i % 2) for i in range(12)]
    return tl.write_shards(_room() / "shards", examples, name="tiny", progress=False)


def level(content: bytes) -> None:
    """A file of a stored level in place of one of its own, each in turn, with a checksum that fits."""
    folder, whole = _run()
    name = (store.METRICS, store.CURVES, store.MASKS, store.WEIGHTS)[content[0] % 4 if content else 0]
    path = folder / "level_00"
    manifest = json.loads(whole[store.MANIFEST])
    manifest["sha256"][name] = hashlib.sha256(content[1:]).hexdigest()
    changed = {**whole, name: content[1:], store.MANIFEST: _resealed(json.dumps(manifest).encode())}
    for file, text in changed.items():
        (path / file).write_bytes(text)
    store.read_level(folder, 0)


def level_manifest(content: bytes) -> None:
    folder, whole = _run()
    for file, text in {**whole, store.MANIFEST: _resealed(content)}.items():
        (folder / "level_00" / file).write_bytes(text)
    read = store.read_level(folder, 0)
    assert read.level == 0 and read.density == 1


@cache
def _run() -> tuple[Path, Mapping[str, bytes]]:
    study = tl.ImpConfig(levels=0, init_seeds=(0,), recipe=tl.Recipe(steps=2, eval_every=1, batch_size=5))
    inputs = torch.arange(80.0).reshape(20, 4)
    task = tl.Task.from_tensors(inputs, torch.arange(20) % 2)
    run = tl.Study(study, model=_net, task=task, device="cpu", progress=False)
    list(run.levels(_room() / "runs"))
    folder = run.folder(_room() / "runs")
    return folder, {path.name: path.read_bytes() for path in (folder / "level_00").iterdir()}


def _net() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))


TARGETS: dict[str, Target] = {
    f.__name__: f
    for f in (idx, idx_gz, cifar10, certificate, message, mask_code, config, manifest, level, level_manifest)
}


def seeds(name: str) -> list[bytes]:
    """Whole inputs of a target: committed ones, and what is made when it is needed."""
    made: dict[str, Callable[[], list[bytes]]] = {
        "cifar10": lambda: [bytes(2 * 3073)],
        "mask_code": lambda: [
            bounds.encode(
                {"weight": torch.eye(3, 4).bool()}, {"weight": torch.eye(3, 4), "bias": torch.ones(3)}, values
            )
            for values in ("seed", "signs", "coded")
        ],
        "manifest": lambda: [(_shards() / "shards.json").read_bytes()],
        "config": lambda: [_without_identity((_run()[0] / "config.json").read_bytes())],
        "level": lambda: [
            bytes([i]) + _run()[1][file]
            for i, file in enumerate((store.METRICS, store.CURVES, store.MASKS, store.WEIGHTS))
        ],
        "level_manifest": lambda: [_run()[1][store.MANIFEST]],
    }
    committed = [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]
    return committed + made.get(name, list)()


def _resealed(content: bytes) -> bytes:
    """A record whose digest fits again, where the store writes one: what is behind it is what is to be fuzzed."""
    try:
        record = json.loads(content)
        record.pop("digest", None)
        return getattr(store, "sealed", lambda one: json.dumps(one).encode())(record)
    except (ValueError, AttributeError, TypeError, RecursionError):
        return content


def _without_identity(content: bytes) -> bytes:
    stored: dict[str, Any] = json.loads(content)
    stored.pop("identity", None)
    return json.dumps(stored).encode()
