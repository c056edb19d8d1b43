"""Train: `torchrun -m fastssl.train method=moco_v2 data.root=SHARDS`, or the same without torchrun on one process."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastssl import __version__, checkpoint, config, dist, failing, run_lock
from fastssl.evaluate.online import online_probe
from fastssl.log import RunLog
from fastssl.methods import Method
from fastssl.run_state import StateKeeper
from fastssl.schedule import Clock, learning_rate
from fastssl.settings import Config, LoaderConfig
from fastssl.stopping import Interrupted, Reason, StopRequest
from fastssl.training import Training, to_device, view_output
from fastssl.watchdog import Watchdog
from pipelines.backends import chosen
from pipelines.loader import Batch, Loader, available_cores
from pipelines.views import num_views
from shard_tools import exit_codes
from shard_tools.manifest import Manifest
from shard_tools.remote import shown

HELP = """
fastssl-train: self-supervised training on shards (= torchrun -m fastssl.train ...)

  fastssl-train method=moco_v2 encoder=resnet50 data.root=SHARDS run.dir=runs/first
  torchrun --nproc-per-node 8 -m fastssl.train method=moco_v2 data.root=SHARDS

settings are key=value; the same command with the same run.dir resumes
  method=NAME    moco_v1 moco_v2  clsa_single clsa_multi clsa_sym clsa_multi_sym  swav swav_2x224 swav_w2 swav_w4
                 unmix_moco unmix_moco_v1 unmix_moco_cifar unmix_swav unmix_swav_cifar  moco_decoder autoencoder
  encoder=resnet50|resnet18|resnet18_cifar|resnet10_narrow|stamps_conv4   encoder.name=timm/NAME
  recipe=NAME    a published run or a small one, such as swav_256, stl96_moco_v2, cifar10_clsa_cpu, galaxies_cpu
  data.root=SHARDS         run.batch_size=256 (global)   run.duration=200ep|5000steps|10Mimages
  run.device=auto|cpu|cuda run.precision=fp32|bf16|fp16  run.seed=0  run.compile=off|default|max-autotune
  knn=cifar knn.every=1ep  online=linear (signs of life while training, both need labels)
  loader.backend=auto|dali|native|exact|stamps   loader.threads=0   optim.lr=0.03   optim.fused=torch|apex|off
  --print-config           show every setting with its value, and stop
SIGTERM, SIGUSR1 or Ctrl-C: saves after this step and stops; a second one ends at once. run.timeout_s=600: without
progress for so long it ends, with all stacks. RUN.DIR/run_state.json tells a scheduler what to do next
exit codes: 0 done, 2 a setting or the data is wrong, 3 too many bad samples, stopped and saved, 4 disk full,
            5 another job runs here, 6 no progress, 7 damaged files, 8 too many steps in a row were not finite,
            stopped and saved, 9 another rank failed, 75 stopped on request and saved
"""


def main(argv: list[str] | None = None) -> int:
    return config.run_command(_command, HELP, argv)


def _command(arguments: list[str]) -> int:
    overrides = [a for a in arguments if a != "--print-config"]
    cfg = config.load(overrides)
    if "--print-config" in arguments:
        print(config.to_yaml(cfg))
        return 0
    code = run(cfg)
    dist.teardown()  # not after an error: it would wait for ranks that are gone
    return code


def run(cfg: Config) -> int:
    """One process's part of a training run, from settings to the last checkpoint. Returns the exit code."""
    state = StateKeeper(Path(cfg.run.dir))
    with StopRequest() as stop, Watchdog(cfg.run.timeout_s, state, stop) as watchdog:
        return _run(cfg, state, stop, watchdog)


def _run(cfg: Config, state: StateKeeper, stop: StopRequest, watchdog: Watchdog) -> int:
    device = dist.setup(cfg.run.device, watchdog.limit_s())
    watchdog.connect()
    set_threads(cfg, device)
    run_dir, manifest = Path(cfg.run.dir), cfg.data.manifest()
    with contextlib.ExitStack() as opened:
        loader = opened.enter_context(open_loader(cfg, manifest, device))
        clock = Clock(loader.steps_per_epoch, cfg.run.batch_size)
        total = clock.steps(cfg.run.duration, "run.duration")
        until = min(total, clock.steps(cfg.run.stop_after, "run.stop_after") if cfg.run.stop_after else total)
        lr = learning_rate(cfg.optim, clock, total)
        training = Training.build(cfg, device, clock)
        training.probe = online_probe(cfg.online, manifest, training.method, device)
        monitor = _knn_monitor(cfg, manifest, training)
        opened.enter_context(run_lock.held(run_dir))  # after all that can be wrong without a run
        opened.enter_context(watchdog.announcing())
        state.take()
        start, lost = _resume(training, run_dir, loader.fingerprint)
        if start >= until:
            if dist.rank() == 0:
                print(f"{run_dir} is already at step {start} of {total}; nothing to do", file=sys.stderr)
            state.end(exit_codes.DONE)
            return exit_codes.DONE
        chance = training.method.chance_level()
        log = RunLog(run_dir, start, total, cfg.run.batch_size, cfg.run.log_every, chance)
        opened.callback(log.close)
        for line in _describe(training, manifest, loader, clock, total, lr, start):
            log.say(line)
        if lost:
            log.say(f"warning: {lost}")
        if dist.rank() == 0:
            (run_dir / "config.yaml").write_text(config.to_yaml(cfg))
        state.begin(start, total)

        def save(step: int) -> None:
            watchdog.beat(f"the save of step {step}")
            method = training.method
            tensors = {"optimizer": training.optimizer.state_dict(), "scaler": training.scaler.state_dict()}
            if training.probe:
                tensors["online"] = training.probe.state_dict()
            meta = _meta(cfg, loader.fingerprint, method)
            with log.pause():
                checkpoint.save(run_dir, step, method, tensors, meta, cfg.run.keep, method.rank_state())
            state.saved(step)
            watchdog.beat(f"the end of step {step}")

        def evaluate() -> dict[str, float]:
            with log.pause():
                dist.follow_main_(training.method, training.method.own_buffers)
                return monitor(between)

        def between() -> None:
            watchdog.beat("an evaluation")
            if reason := stop.agreed():
                raise Interrupted(reason)

        def step_done() -> Reason:
            watchdog.step_done()
            return stop.agreed(trouble(training, log, manifest, cfg))

        stop.begin()
        stopped_at, reason = fit(
            training, watchdog.over(loader.batches(start), start), lr, log, steps=range(start, until), save=save,
            evaluate=evaluate, save_every=clock.every(cfg.run.save_every, "run.save_every"),
            evaluate_every=clock.every(cfg.knn.every, "knn.every"), stop=step_done,
        )  # fmt: skip
        stop.close()
        code, sentence = outcome(reason, stopped_at, total, training, manifest)
        state.end(code, sentence)
    if sentence and dist.rank() == 0:
        failing.say(code, sentence)
    return code


def fit(
    training: Training,
    batches: Iterator[Batch],
    lr: Callable[[int], float],
    log: RunLog,
    *,
    steps: range,
    save: Callable[[int], None],
    save_every: int,
    evaluate: Callable[[], dict[str, float]],
    evaluate_every: int,
    stop: Callable[[], Reason],
) -> tuple[int, Reason]:
    """The loop. Returns the number of steps that are done and saved, and why they are fewer than `steps.stop`."""
    for step in steps:
        began = time.perf_counter()
        batch = next(batches)
        waited_s = time.perf_counter() - began
        output = training.step(to_device(batch, training.cfg, training.device), step, lr(step))
        if training.probe:
            output.logs |= training.probe.learn(batch.labels, training.rejection.rejected)
        training.rejection.remember(batch.ids)
        log.step(step, output, lr(step), waited_s, batch.replaced, training.rejection.rejected)

        done, last, reason = step + 1, step + 1 == steps.stop, stop()
        if evaluate_every and not reason and (done % evaluate_every == 0 or last):
            try:
                log.record(done, evaluate())
            except Interrupted as interrupted:
                reason = interrupted.reason
                log.say(f"the evaluation after step {done} is left out, to stop now")
        if last or reason or (save_every and done % save_every == 0):
            save(done)
        if reason == Reason.NOT_FINITE or (reason and not last):
            return done, reason
    return steps.stop, Reason.NONE


def open_loader(cfg: Config, manifest: Manifest, device: torch.device) -> Loader:
    """This rank's loader. Raises ValueError or ShardError."""
    return Loader(
        manifest,
        cfg.view_specs(),
        batch_size=cfg.run.batch_size,
        seed=cfg.run.seed,
        rank=dist.rank(),
        world=dist.world(),
        backend=cfg.loader.backend,
        device=str(device),
        threads=cfg.loader.threads,
        prefetch=cfg.loader.batches_ahead,
        output=view_output(cfg, device),
        order=cfg.loader.order,
        window=cfg.loader.window,
        on_bad=cfg.loader.on_bad,
        decode=cfg.loader.decode,
    )


def trouble(training: Training, log: RunLog, manifest: Manifest, cfg: Config) -> Reason:
    """What this rank has found that must end the run: too many rejected steps, more bad samples than its share of what
    is allowed, or nothing.

    One bad sample is always allowed.
    """
    if training.rejection.too_many():
        return Reason.NOT_FINITE
    too_many = len(log.bad) * dist.world() > max(1.0, cfg.loader.max_bad * manifest.num_samples)
    return Reason.TOO_MANY_BAD if too_many else Reason.NONE


def outcome(reason: Reason, stopped_at: int, total: int, training: Training, manifest: Manifest) -> tuple[int, str]:
    """The exit code of a run whose loop ended and saved, and what to say about it. A collective."""
    cfg = training.cfg
    if reason == Reason.NOT_FINITE:
        return exit_codes.NOT_FINITE, why_rejected(training, manifest, Path(cfg.run.dir), stopped_at)
    if reason == Reason.TOO_MANY_BAD:
        return exit_codes.TOO_MANY_BAD, (
            f"more than {cfg.loader.max_bad:.2%} of the samples of {manifest.place} are bad, "
            f"{cfg.run.dir}/bad-samples-*.txt lists them; saved at step {stopped_at}; run `shard_tools verify --decode "
            f"{manifest.place}`, or allow more with loader.max_bad"
        )
    if reason == Reason.ASKED:
        sentence = f"stopped at step {stopped_at} of {total}, saved; the same command goes on from there"
        return exit_codes.STOPPED, sentence
    return exit_codes.DONE, ""


def why_rejected(training: Training, manifest: Manifest, run_dir: Path, step: int) -> str:
    """A sentence on what made the steps before `step` be rejected, on all ranks. A collective.

    Ranks whose own numbers were bad write the names of their samples to a file each.
    """
    names = [manifest.member_name(row) for row in training.rejection.suspects()]
    if names:
        (run_dir / f"not-finite-rank-{dist.rank()}.txt").write_text("".join(f"{name}\n" for name in names))
    first = [name for of_rank in dist.all_say(names[:3]) for name in of_rank]
    where = (
        f"with {', '.join(first[:3])} and others in their batches, all listed in {run_dir}/not-finite-rank-*.txt"
        if first
        else "though no loss was, so that the backward is where they came from"
    )
    return (
        f"{training.cfg.run.max_rejected} steps in a row were rejected because of a NaN or an infinity, {where}; "
        f"weights are as they were before, saved at step {step}; look at these images, and if they are sound, begin "
        "anew in another run.dir with a lower optim.lr, with optim.warmup, or with run.precision=bf16 or fp32"
    )


def set_threads(cfg: Config, device: torch.device) -> None:
    """torchrun gives each rank one thread; on a CPU that is the compute, so share the cores instead."""
    if cfg.run.threads:
        torch.set_num_threads(cfg.run.threads)
    elif device.type == "cpu":
        torch.set_num_threads(available_cores())


def _knn_monitor(
    cfg: Config, manifest: Manifest, training: Training
) -> Callable[[Callable[[], None]], dict[str, float]]:
    if cfg.knn.every == "never":
        return lambda between: {}
    from fastssl.evaluate.monitor import KnnMonitor

    return KnnMonitor(cfg, manifest, training.method, training.device)


def _meta(cfg: Config, fingerprint: str, method: Method) -> dict[str, Any]:
    (prefix,) = [name for name, module in method.named_modules() if module is method.backbone()]
    return {
        "config": config.plain(cfg),
        "fingerprint": fingerprint,
        "backbone_prefix": f"{prefix}.",
        "versions": {"fastssl": __version__, "torch": torch.__version__},
    }


def _resume(training: Training, run_dir: Path, fingerprint: str) -> tuple[int, str | None]:
    """Load the newest whole checkpoint of the run, if any: the step to begin with, and a sentence on what was lost."""
    cfg = training.cfg
    found = dist.main_says(str(checkpoint.newest(run_dir) or "") if dist.rank() == 0 else None)
    if not found:
        return 0, None
    folder = Path(str(found))
    if cfg.run.resume == "never":
        raise checkpoint.CheckpointError(f"{run_dir} has a checkpoint and run.resume is never; give another run.dir")
    meta = checkpoint.load_meta(folder)
    before, now = (_with_loader(values, cfg) for values in (meta["config"], config.plain(cfg)))
    changed = _changed(before, now)
    if changed:
        raise checkpoint.CheckpointError(
            f"{folder} was trained with other settings: {'; '.join(changed)}; set them back, or give another run.dir"
        )
    if meta["fingerprint"] != fingerprint:
        raise checkpoint.CheckpointError(
            f"{folder} was trained on other data than {shown(cfg.data.root)} holds, or by a version of fastssl that"
            " orders it otherwise; give those shards back, or another run.dir"
        )
    state = checkpoint.restore(folder, training.method, training.device)
    with checkpoint.fitting(folder, "training.pt"):
        training.optimizer.load_state_dict(state["optimizer"])
        training.scaler.load_state_dict(state["scaler"])
        if training.probe and "online" in state:
            training.probe.load_state_dict(state["online"])
    with checkpoint.fitting(folder, "rank-*.pt"):
        lost = training.method.load_rank_states(checkpoint.load_rank_states(folder))
    return int(meta["step"]), lost


# What may differ at a resume: where things are and how fast they go, not what is computed.
_FREE = ("loader.backend", "loader.threads", "loader.prefetch", "loader.on_bad", "loader.max_bad", "knn.", "online",
         "data.root", "data.remote", "run.dir", "run.device", "run.log_every", "run.save_every", "run.keep",
         "run.resume", "run.threads", "run.stop_after", "run.compile", "run.timeout_s", "run.max_rejected")  # fmt: skip


def _with_loader(values: dict[str, Any], cfg: Config) -> dict[str, Any]:
    """The settings with those of the loader that an older version did not know, and no window where none is used."""
    loader = dataclasses.asdict(LoaderConfig()) | values["loader"]
    return {**values, "loader": {**loader, "window": loader["window"] if cfg.loader.order == "window" else None}}


def _changed(before: Any, now: Any, path: str = "") -> list[str]:
    """Settings that differ and matter: ["run.seed was 0 and is 1"]."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [line for k in keys for line in _changed(before.get(k), now.get(k), f"{path}.{k}" if path else k)]
    if before == now or path.startswith(_FREE):
        return []
    return [f"{path} was {before!r} and is {now!r}"]


def _describe(
    training: Training,
    manifest: Manifest,
    loader: Loader,
    clock: Clock,
    total: int,
    lr: Callable[[int], float],
    start: int,
) -> Iterator[str]:
    """What is about to happen, so that a wrong number is seen before the night and not after it."""
    cfg, method = training.cfg, training.method
    share = cfg.run.batch_size // dist.world()
    backend = chosen(cfg.loader.backend, str(training.device), manifest.bands)
    yield (
        f"{cfg.method['name']} on {cfg.encoder.name}: {training.device.type}, {cfg.run.precision}, "
        f"{dist.world()} rank(s), {torch.get_num_threads()} compute thread(s), "
        f"views by {backend} on {cfg.loader.threads or available_cores()} thread(s)"
    )
    views = ", ".join(f"{s.count} {s.role} {s.size} px" for s in cfg.view_specs())
    yield (
        f"data: {manifest.num_samples:,} images in {len(manifest.shards)} shards of {manifest.place}, "
        f"{num_views(cfg.view_specs())} views per image ({views})"
    )
    yield (
        f"batch {cfg.run.batch_size} = {dist.world()} x {share}, {clock.steps_per_epoch} steps per epoch "
        f"({loader.dropped_per_epoch} images of each epoch's tail left out), {total} steps in all"
    )
    scaled = "scaled by batch/256" if cfg.optim.lr_scaling == "linear" else "not scaled by the batch"
    yield f"lr {cfg.optim.lr:g} as written, {scaled}, {lr(start):g} at step {start}"
    chance = method.chance_level()
    if chance is not None:
        yield f"a loss of {chance:.3f} is chance level; it may rise at first, while a queue fills with real keys"
    for sentence in method.advice():
        yield f"warning: {sentence}"
    if training.probe:
        yield f"online linear probe, Adam lr {cfg.online.lr:g}: a sign of life, no published protocol"
    if start:
        yield f"resumed at step {start}"


if __name__ == "__main__":
    sys.exit(main())
