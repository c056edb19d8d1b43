"""Every method's and every recipe's YAML: composes, trains three steps on tiny views, resumes to the same bits."""

import dataclasses

import pytest
import torch

from fastssl import checkpoint, config
from fastssl.log import RunLog
from fastssl.schedule import Clock, learning_rate
from fastssl.settings import Config
from fastssl.training import Training, to_device
from pipelines.synthetic import SyntheticLoader

BATCH, STEPS_PER_EPOCH = 8, 2
METHODS = sorted(path.stem for path in (config.config_dir() / "method").glob("*.yaml"))
RECIPES = sorted(path.stem for path in (config.config_dir() / "recipe").glob("*.yaml"))
PRESETS = [f"method={name}" for name in METHODS] + [f"recipe={name}" for name in RECIPES]

SMALL_METHOD = {
    "dim": 8, "queue_length": 16, "split_groups": 2, "num_prototypes": 12, "hidden": 16, "queue_from": "0steps",
    "freeze_prototypes": "2steps", "decoder": {
        "channels": 2, "start": [4, 8], "layers": [[4, 3, 2]], "last_kernel": 3, "activation": "prelu",
        "enlarge": "nearest", "output": "linear", "batch_norm": True,
    },
}  # fmt: skip


def tiny(preset: str) -> Config:
    """The preset's own settings with a small encoder, small views, queue and prototypes; durations become steps."""
    cfg = config.load([preset, "data.root=none", f"run.batch_size={BATCH}", "run.device=cpu"])
    stamps = cfg.encoder.name == "conv"
    side = 16 if stamps else 32
    widest = max(view.size for view in cfg.views.values())
    views = {
        role: dataclasses.replace(view, size=max(8, side * view.size // widest), resize=0)
        for role, view in cfg.views.items()
    }
    encoder = dataclasses.replace(cfg.encoder, name="resnet10", stem="small", width=0.125)
    if stamps:
        conv = dataclasses.replace(cfg.encoder.conv, side=side, layers=((4, 3, 2), (6, 3, 1)), features=8)
        encoder = dataclasses.replace(cfg.encoder, channels=2, conv=conv)
    method = {key: SMALL_METHOD.get(key, value) for key, value in cfg.method.items()}
    data = dataclasses.replace(cfg.data, mean=cfg.data.mean[:2], std=cfg.data.std[:2]) if stamps else cfg.data
    return dataclasses.replace(cfg, views=views, encoder=encoder, method=method, data=data)


def batches(cfg: Config, start: int):
    loader = SyntheticLoader(
        cfg.view_specs(),
        batch_size=BATCH,
        num_samples=BATCH * STEPS_PER_EPOCH,
        seed=cfg.run.seed,
        channels=cfg.encoder.channels,
    )
    return loader.batches(start)


def train(cfg: Config, training: Training, first: int, last: int, log: RunLog | None = None):
    clock = Clock(STEPS_PER_EPOCH, BATCH)
    lr = learning_rate(cfg.optim, clock, max(4, clock.steps(cfg.run.duration, "run.duration")))
    for step, batch in zip(range(first, last), batches(cfg, first)):
        output = training.step(to_device(batch, cfg, training.device), step, lr(step))
        assert torch.isfinite(output.loss)
        assert all(torch.isfinite(value) and not value.requires_grad for value in output.logs.values()), output.logs
        if log:
            log.step(step, output, lr(step), 0.0)


def everything(training: Training) -> dict[str, torch.Tensor]:
    found = {**training.method.state_dict(), **{f"rank.{k}": v for k, v in training.method.rank_state().items()}}
    for i, state in training.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in state.items() if v is not None}
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains_and_resumes_to_the_same_bits(preset, tmp_path):
    cfg = tiny(preset)

    def build() -> Training:
        training = Training.build(cfg, torch.device("cpu"), Clock(STEPS_PER_EPOCH, BATCH))
        if training.scaler.is_enabled():  # where the first of few steps would overflow, and be taken back
            training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": 2.0**6})
        return training

    once = build()
    before = {name: value.clone() for name, value in once.method.state_dict().items()}
    log = RunLog(tmp_path, 0, 3, BATCH, 3)
    train(cfg, once, 0, 3, log)
    log.close()
    assert any(not torch.equal(value, before[name]) for name, value in once.method.state_dict().items())
    assert once.method.backbone() in set(once.method.modules())

    pieces = build()
    train(cfg, pieces, 0, 2)
    state = {"optimizer": pieces.optimizer.state_dict(), "scaler": pieces.scaler.state_dict()}
    folder = checkpoint.save(tmp_path, 2, pieces.method, state, {}, 2, pieces.method.rank_state())
    resumed = build()
    saved = checkpoint.restore(folder, resumed.method, torch.device("cpu"))
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.scaler.load_state_dict(saved["scaler"])
    assert resumed.method.load_rank_states(checkpoint.load_rank_states(folder)) is None
    train(cfg, resumed, 2, 3)
    ours, theirs = everything(once), everything(resumed)
    assert ours.keys() == theirs.keys()
    different = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    assert not different, different[:5]


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_file_lists_every_setting_of_the_method(name):
    """So that a misspelt override is refused, and --print-config shows all there is."""
    from fastssl.methods import METHODS as REGISTERED

    cfg = config.load([f"method={name}", "data.root=none"])
    _, config_class = REGISTERED[cfg.method["name"]]
    assert set(cfg.method) == {field.name for field in dataclasses.fields(config_class)}


def test_the_help_lists_every_method():
    from fastssl.train import HELP

    assert not set(METHODS) - set(HELP.replace("|", " ").split())
