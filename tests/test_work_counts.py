"""Work per image, guarded by counts and never by seconds: decodes, reads, bytes, tensors, batches in flight.

Speed is lost by work that is done twice far more often than by slow code, and counts are the same on every machine.
"""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from itertools import islice

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl import config
from fastssl.schedule import Clock
from fastssl.training import Training, to_device
from pipelines.augment import AugmentSpec
from pipelines.loader import Loader, read_once
from pipelines.native import kernel
from pipelines.reader import Reader
from pipelines.synthetic import SyntheticLoader
from pipelines.views import ViewSpec
from shard_tools.manifest import Manifest
from tests.fastssl.runs import settings
from tests.shards import encode, write_split

NUM_IMAGES = 40
COLOUR = AugmentSpec(jitter_p=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale_p=0.2, blur_p=0.5)
ONE_VIEW = [ViewSpec("query", 32, augment=COLOUR)]
ELEVEN_VIEWS = [ViewSpec("global", 32, 3, augment=COLOUR), ViewSpec("local", 16, 8, augment=COLOUR)]
KERNEL = pytest.mark.skipif(bool(kernel.why_not()), reason=kernel.why_not())
NATIVE = pytest.param("native", marks=KERNEL)


@pytest.fixture(scope="module")
def shards(photos, tmp_path_factory):
    """40 JPEGs of 64 x 64 px in 3 shards."""
    root = tmp_path_factory.mktemp("counted")
    boxes = [(8 * i, 4 * i, 8 * i + 64, 4 * i + 64) for i in range(NUM_IMAGES // 4)]
    files = [("jpg", encode(photo.crop(box))) for box in boxes for photo in photos]
    write_split(root, files, [0] * NUM_IMAGES, shard_size=16)
    return Manifest.load(root, "train")


class Calls(Counter):
    """Counts calls of functions by name while they do what they did."""

    def of(self, name, function):
        def counting(*arguments, **options):
            self[name] += 1
            return function(*arguments, **options)

        return counting


@pytest.fixture
def decodes(monkeypatch):
    """Calls it to know how many images were decoded by whom until now: "pillow", "kernel", "libjpeg"."""
    calls, kernels = Calls(), []
    monkeypatch.setattr(Image, "_getdecoder", calls.of("pillow", Image._getdecoder))
    original = kernel.Kernel

    def make_kernel(*arguments, **options):
        kernels.append(original(*arguments, **options))
        return kernels[-1]

    monkeypatch.setattr(kernel, "Kernel", make_kernel)
    return lambda: +sum((Counter(one.num_decoded()) for one in kernels), start=calls)


@pytest.mark.parametrize("views", [ONE_VIEW, ELEVEN_VIEWS], ids=["one view", "eleven views"])
@pytest.mark.parametrize(("backend", "decoder"), [("exact", "pillow"), pytest.param("native", "kernel", marks=KERNEL)])
def test_an_image_is_decoded_once_whatever_the_number_of_views(shards, decodes, backend, decoder, views):
    if decoder == "kernel" and kernel.Kernel().instructions == "plain":
        decoder = "libjpeg"
    for _ in read_once(shards, views, batch_size=8, backend=backend, threads=2):
        pass
    assert decodes() == {decoder: NUM_IMAGES}


def test_an_image_is_read_once_by_one_read_of_its_bytes_and_a_shard_opened_once(shards, monkeypatch):
    calls, num_bytes = Calls(), []

    def counted_read(descriptor, size, offset, read=os.pread):
        payload = read(descriptor, size, offset)
        num_bytes.append(len(payload))
        return payload

    monkeypatch.setattr(os, "pread", counted_read)
    monkeypatch.setattr(os, "open", calls.of("open", os.open))
    for _ in read_once(shards, ELEVEN_VIEWS, batch_size=8, backend="exact", threads=2):
        pass
    assert sorted(num_bytes) == sorted(shards.index()["size"].tolist())
    assert calls["open"] == len(shards.shards)


@pytest.mark.parametrize("backend", ["exact", NATIVE])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_batches_in_flight_are_bounded_by_prefetch(shards, monkeypatch, backend, prefetch):
    calls, consumed = Calls(), 2
    monkeypatch.setattr(Reader, "request", calls.of("requested", Reader.request))
    with Loader(shards, ONE_VIEW, batch_size=4, seed=0, backend=backend, threads=2, prefetch=prefetch) as loader:
        backend_in_use = loader._renderer._backend
        monkeypatch.setattr(backend_in_use, "submit", calls.of("submitted", backend_in_use.submit))
        batches = loader.batches()
        for _ in range(consumed):
            next(batches)
        settled(calls)
        assert calls == {"submitted": consumed + prefetch, "requested": consumed + 2 * prefetch}


def settled(calls, still_s=0.3, at_most_s=10.0):
    """Wait until nothing was counted for a while."""
    ends = time.monotonic() + at_most_s
    before = None
    while before != calls and time.monotonic() < ends:
        before = Counter(calls)
        time.sleep(still_s)


@pytest.mark.parametrize("backend", ["exact", NATIVE])
def test_a_loader_holds_as_many_tensors_and_bytes_after_many_steps_as_after_few(shards, backend):
    with Loader(shards, ONE_VIEW, batch_size=8, seed=0, backend=backend, threads=2, prefetch=2) as loader:
        batches = loader.batches()
        held = []
        for count in (10, 60):
            for _ in islice(batches, count):
                pass
            time.sleep(0.2)  # the batches ahead are made
            held.append(live_tensors())
    assert held[0] == held[1]


@pytest.mark.parametrize("method", ["moco_v2", "swav"])
def test_a_step_does_the_same_work_every_time_and_keeps_nothing(method, tmp_path):
    small = {"moco_v2": settings("", tmp_path)}
    small["swav"] = [
        "method=swav", "encoder=resnet10_narrow", "encoder.width=0.25", "encoder.stem=small", "data.root=none",
        "views.global.size=32", "views.local.size=16", "views.local.count=2", "method.num_prototypes=30",
        "run.batch_size=8", "run.device=cpu",
    ]  # fmt: skip
    cfg = config.load(small[method])
    device = torch.device("cpu")
    training = Training.build(cfg, device, Clock(100, cfg.run.batch_size))
    with SyntheticLoader(cfg.view_specs(), batch_size=8) as loader:
        batch = next(loader.batches())
    done, held = [], []
    for step in range(5):
        with CountedOperations() as counted:
            training.step(to_device(batch, cfg, device), step, lr=0.01)
        done.append(counted.operations)
        held.append(live_tensors())
    assert done[2] == done[3] == done[4]
    assert sum(done[4].values()) > 300
    assert held[2] == held[3] == held[4]


class CountedOperations(TorchDispatchMode):
    """Every operation that torch runs, forward, backward and in the optimiser; each result is an allocation."""

    def __init__(self):
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.operations[str(function)] += 1
        return function(*arguments, **(options or {}))


def live_tensors():
    """(how many tensors Python holds, the bytes of their storages)."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return len(tensors), sum(storages.values())
