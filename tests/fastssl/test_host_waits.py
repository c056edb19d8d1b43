"""A training step never makes the host wait for the device: counted on the CPU, and on a device that has no memory.

`torch.cuda.set_sync_debug_mode` would need a GPU. Here a dispatch mode sees every operator of the step instead. On the
CPU it counts those whose result decides a number or a shape on the host. On torch's `meta` device, which knows shapes
only and stands for the GPU, it also counts copies between host and device; reading a value there is an error anyway.
"""

import contextlib
import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastssl import config, train
from fastssl.log import RunLog
from fastssl.methods import METHODS
from fastssl.optim import build_optimizer
from fastssl.schedule import Clock
from fastssl.training import Training, to_device
from pipelines.synthetic import SyntheticLoader

BATCH = 8
SMALL = [
    "encoder=resnet10_narrow", "encoder.width=0.25", "encoder.stem=small", f"run.batch_size={BATCH}", "data.root=none",
    "run.dir=unused", "run.device=cpu",
]  # fmt: skip
MOMENTUM = ["method.queue_length=16", "method.split_groups=2"]
SWAV = ["method.num_prototypes=20", "method.hidden=16", "views.global.size=32", "views.local.size=16"]
DECODER = ["views.query.size=48", "encoder=stamps_small", "encoder.channels=5", "method.decoder.start=[4,12]",
           "method.decoder.layers=[[4,3,2],[4,3,2]]"]  # fmt: skip
FORMS = {
    "moco": ["method=moco_v2", *MOMENTUM, "views.query.size=32"],
    "moco_symmetric": ["method=moco_v2", *MOMENTUM, "views.query.size=32", "method.symmetric=true"],
    "clsa": ["method=clsa_single", *MOMENTUM, "views.key.size=32", "views.strong.size=16"],
    "clsa_sym": ["method=clsa_sym", *MOMENTUM, "views.key.size=32", "views.strong.size=16"],
    "unmix_moco": ["method=unmix_moco", *MOMENTUM, "views.query.size=32"],
    "moco_decoder": ["method=moco_decoder", "method.queue_length=16", "method.split_groups=2", *DECODER],
    "autoencoder": ["method=autoencoder", *DECODER],
    "swav": ["method=swav", *SWAV, "method.queue_length=16", "method.queue_from=0steps"],
    "unmix_swav": ["method=unmix_swav", *SWAV, "method.queue_length=16", "method.queue_from=0steps"],
}
FILLING = 3  # steps until the host knows that SwAV's queue of two batches is full; it asks at each of them (see below)
ON_THE_HOST = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}
BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Waits(TorchDispatchMode):
    """The names of operators that make the host wait for `device`, in `seen`."""

    def __init__(self, device):
        super().__init__()
        self.device, self.seen = device, []

    def __torch_dispatch__(self, operator, kinds, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        here = any(t.device.type == self.device for t in tensors)
        by_mask = name in BY_INDEX and any(t.dtype == torch.bool for t in tensors[1:])
        if here and (name in ON_THE_HOST or by_mask):
            self.seen.append(name)
        result = operator(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and isinstance(result, torch.Tensor):
            devices = {t.device.type for t in [*tensors, result]}
            if self.device in devices and len(devices) > 1:
                self.seen.append(f"{name} between {sorted(devices)}")
        return result


def training(form, *more):
    cfg = config.load([*SMALL, *FORMS[form], *more])
    return Training.build(cfg, torch.device("cpu"), Clock(100, BATCH))


def batches(cfg):
    specs, channels = cfg.view_specs(), cfg.encoder.channels
    return SyntheticLoader(specs, batch_size=BATCH, channels=channels, output="float32").batches()


def fill_queue(trained):
    """The steps in which SwAV fills its queue; none for other methods. Returns how many."""
    steps = FILLING if hasattr(trained.method, "num_queued") else 0
    for step, batch in zip(range(steps), batches(trained.cfg)):
        trained.step(to_device(batch, trained.cfg, trained.device), step, 0.01)
    return steps


def test_every_method_is_looked_at():
    assert {config.load([*SMALL, *form]).method["name"] for form in FORMS.values()} == set(METHODS)


@pytest.mark.parametrize("form", FORMS)
def test_the_loop_waits_for_nothing_but_data_between_log_lines(form, tmp_path):
    """Four steps of `fit` with no line, save or evaluation due before the end; SwAV's queue is full and in use."""
    trained = training(form)
    first = fill_queue(trained)
    log = RunLog(tmp_path, 0, 100, BATCH, every=50)
    saved = []
    with Waits("cpu") as waits:
        train.fit(
            trained, batches(trained.cfg), lambda step: 0.01, log, steps=range(first, first + 4), save=saved.append,
            save_every=0, evaluate=dict, evaluate_every=0, stop=lambda: False,
        )  # fmt: skip
    log.close()
    assert waits.seen == []
    assert saved == [first + 4]


@pytest.mark.parametrize("form", ["swav", "unmix_swav"])
def test_swav_waits_once_a_step_while_its_queue_fills_and_never_before_or_after(form):
    """How full it is decides what a step computes, and a rejected step has not filled it."""
    trained = training(form, "method.queue_from=2steps", "method.queue_length=48")
    waited = []
    for step, batch in zip(range(12), batches(trained.cfg)):
        with Waits("cpu") as waits:
            trained.step(to_device(batch, trained.cfg, trained.device), step, 0.01)
        waited.append(len(waits.seen))
    pushes = 3 if form == "unmix_swav" else 1  # of 8 rows each, in a step
    assert waited == [0] * 3 + [1] * (6 // pushes) + [0] * (9 - 6 // pushes)


@pytest.mark.parametrize("form", FORMS)
def test_a_step_on_another_device_copies_nothing_to_or_from_the_host(form, monkeypatch):
    """Without autocast and the fused kernel, which do not know this device; the loop on the CPU has the kernel.

    SwAV's queue is filled on the CPU before.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    trained = training(form, "optim.fused=off")
    fill_queue(trained)
    device = torch.device("meta")
    trained.method.to(device)
    trained = dataclasses.replace(
        trained, device=device, optimizer=build_optimizer(trained.method, trained.cfg.optim, device)
    )
    views = to_device(next(batches(trained.cfg)), trained.cfg, device)
    trained.step(views, FILLING, 0.01)  # the first one may make what later ones keep
    with Waits("meta") as waits:
        for step in range(FILLING + 1, FILLING + 4):
            output = trained.step(views, step, 0.01)
    assert output.loss.device == device
    assert waits.seen == []


def test_waits_are_seen():
    """The counter itself, on what a method might do."""
    x, mask = torch.ones(3), torch.tensor([True, False, True])
    for action, name in (
        (lambda: x.sum().item(), "_local_scalar_dense"),
        (lambda: bool(x.sum() > 0), "_local_scalar_dense"),
        (lambda: x[mask], "index"),
        (lambda: x.nonzero(), "nonzero"),
    ):
        with Waits("cpu") as waits:
            action()
        assert name in waits.seen
    x = torch.ones(3, device="meta")
    for action in (lambda: torch.arange(3).to("meta"), lambda: x.copy_(torch.ones(3)), lambda: torch.tensor(1.0).to(x)):
        with Waits("meta") as waits:
            action()
        assert len(waits.seen) == 1
    for action in (x.cpu, lambda: x.sum().item()):
        with pytest.raises((NotImplementedError, RuntimeError)):
            action()
