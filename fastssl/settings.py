"""The tree of settings of a training run. Each group checks itself; what a method needs stands in its own file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.augment import IMAGENET_MEAN, IMAGENET_STD, AugmentSpec
from pipelines.views import ViewSpec
from shard_tools.manifest import Manifest
from shard_tools.remote import Access

MAX_CHANNELS = 2**16  # of images; stamps have MAX_BANDS at most
MAX_WIDTH = 64  # the widest that was published is 16 (Big Transfer); beyond, a setting in a file is a claim on memory


@dataclass(frozen=True)
class ConvConfig:
    """A plain convolutional encoder for stamps of `side` px, as `nn.conv_autoencoder.ConvEncoder` describes it."""

    side: int
    layers: tuple[tuple[int, int, int], ...]
    features: int = 128
    activation: Literal["relu", "prelu"] = "relu"
    squash: bool = False


@dataclass(frozen=True)
class EncoderConfig:
    """The backbone.

    name    resnet10, resnet18, resnet26 (bottlenecks), resnet34, resnet50, resnet101, resnet152, timm/NAME for any timm
            model, or conv
    stem    "imagenet": 7x7 stride 2 and max-pool; "small": 3x3 stride 2, no pool, for about 64 px, or 32 px in a hurry;
            "cifar": 3x3 stride 1, no pool, for about 32 px
    width   multiplies the channels of every stage (resnet50 with width 2 is SwAV's RN50w2)
    channels    of the images: 3 for photographs, the number of bands for stamps
    conv    for name conv only: its layers
    """

    name: str = "resnet50"
    stem: Literal["imagenet", "small", "cifar"] = "imagenet"
    width: float = 1.0
    channels: int = 3
    conv: ConvConfig | None = None

    def __post_init__(self) -> None:
        require(1 <= self.channels <= MAX_CHANNELS, "encoder.channels", self.channels, f"1 to {MAX_CHANNELS}")
        require(0 < self.width <= MAX_WIDTH, "encoder.width", self.width, f"above 0, {MAX_WIDTH} at most")


@dataclass(frozen=True)
class DataConfig:
    """root is a folder that `shard_tools pack` wrote, or its URL; mean and std normalise pixels in [0, 1].

    remote  how shards behind a URL are read (docs/remote.md)
    """

    root: str
    split: str = "train"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    remote: Access = field(default_factory=Access)

    def manifest(self) -> Manifest:
        """Raises ShardError for shards that are not there, or not what was packed."""
        return Manifest.load(self.root, self.split, self.remote)


@dataclass(frozen=True)
class ViewConfig:
    """A ViewSpec; `augment` overrides single keys of the run's chain.

    role    what the method calls these views; "" takes the key of the group. Several groups may share a role,
            which then has views of several sizes (CLSA)
    """

    size: int
    role: str = ""
    count: int = 1
    crop: str = "random_resized"
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    resize: int = 0
    turn_deg: float = 180.0
    shift_px: int = 0
    shows: str = "pixels"
    same_as: str = ""
    augment: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoaderConfig:
    """backend auto: dali on a GPU, native on a CPU. threads 0: the cores shared by the host's ranks.

    What is left at auto or 0 is taken from tuned.py's file, if `fastssl-bench mode=tune` wrote one on this machine.
    prefetch    batches made ahead of the step that consumes them; 0: two
    order       "global": one permutation of the whole data set an epoch; "window": shards in random order, then a
                shuffle over a window of open shards, for network storage
    window      shards in a window
    decode      "full"; with the native backend also "scaled": images of which every crop is larger than its view are
                decoded at 1/2, 1/4 or 1/8 of their size
    on_bad      in training, a sample that cannot be read or decoded is "replace"d by another one, or the run "fail"s;
                evaluations always fail
    max_bad     share of the data set; when more samples than that were replaced, the run saves and stops
    """

    backend: Literal["auto", "dali", "native", "exact", "stamps"] = "auto"
    threads: int = 0
    prefetch: int = 0
    order: Literal["global", "window"] = "global"
    window: int = 16
    decode: Literal["full", "scaled"] = "full"
    on_bad: Literal["replace", "fail"] = "replace"
    max_bad: float = 0.01

    def __post_init__(self) -> None:
        require(0.0 <= self.max_bad <= 1.0, "loader.max_bad", self.max_bad, "a share between 0 and 1")
        require(self.window >= 1, "loader.window", self.window, "1 or more")
        require(self.threads >= 0, "loader.threads", self.threads, "0 (all cores) or more")
        require(self.prefetch >= 0, "loader.prefetch", self.prefetch, "0 (tuned, or two) or more")

    @property
    def batches_ahead(self) -> int:
        return self.prefetch or 2


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its schedule.

    name            "sgd"; "lars": SGD whose gradients are rescaled, tensor by tensor, to `trust` times the weights'
                    norm (what SwAV's code calls LARC with clip=False); "adam"
    trust           lars only: the trust coefficient
    lr              as written; with lr_scaling "linear" it means batch 256 and is multiplied by run.batch_size / 256
    schedule        "cosine" to final_lr, "step" (times gamma at each milestone), or "constant"
    milestones      durations such as "120ep"
    schedule_per    "epoch": lr changes at epoch starts, as MoCo's code does; "step": every step
    warmup          a duration; lr grows linearly over it, from warmup_lr at its first step to lr at its last
    weight_decay_on "all" parameters, as MoCo and SwAV do, or "weights": not biases and norms, which lars then
                    does not rescale either
    fused           "torch": torch's fused kernel; "apex": NVIDIA Apex's FusedSGD, if that package is there; "off"
    """

    name: Literal["sgd", "lars", "adam"] = "sgd"
    lr: float = 0.03
    lr_scaling: Literal["none", "linear"] = "none"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    weight_decay_on: Literal["all", "weights"] = "all"
    nesterov: bool = False
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    schedule_per: Literal["epoch", "step"] = "epoch"
    final_lr: float = 0.0
    milestones: tuple[str, ...] = ()
    gamma: float = 0.1
    warmup: str = "0steps"
    warmup_lr: float = 0.0
    trust: float = 0.001
    fused: Literal["torch", "apex", "off"] = "torch"

    def __post_init__(self) -> None:
        require(self.lr >= 0.0, "optim.lr", self.lr, "0 or more")
        require(0.0 <= self.momentum < 1.0, "optim.momentum", self.momentum, "in [0, 1)")
        require(self.trust > 0.0, "optim.trust", self.trust, "above 0")
        require(self.weight_decay >= 0.0, "optim.weight_decay", self.weight_decay, "0 or more")
        require(
            self.schedule != "step" or bool(self.milestones),
            "optim.milestones",
            [],
            'durations such as ["120ep","160ep"]',
        )


@dataclass(frozen=True)
class RunConfig:
    """One run.

    dir             everything the run writes; the same command with the same dir resumes
    batch_size      global: over all ranks
    duration        "200ep", "5000steps" or "10Mimages"; stop_after ends this process earlier, schedule unchanged
    device          auto (cuda if there is one), cpu, or cuda
    precision       fp32, bf16, or fp16 with a GradScaler; norms, logits, queues and EMA stay fp32
    compile         "off", or torch.compile's mode for the encoders; checkpoints are the same either way
    log_every       steps between log lines; save_every a duration; keep: newest checkpoints kept
    resume          "auto": from the newest valid checkpoint of dir; "never": refuses a dir that has one
    threads         torch's CPU threads per rank; 0 leaves torch's own choice
    timeout_s       no step, batch of an evaluation or save in so many seconds ends the run, with the stacks of all
                    ranks; three times as long, and ten minutes at least, before the first step; 0: never
    max_rejected    when so many steps in a row were rejected, because a loss or a gradient of some rank was not finite,
                    the run saves and stops. Half precision rejects up to 16 until GradScaler has found its scale
    """

    dir: str
    batch_size: int = 256
    duration: str = "200ep"
    stop_after: str = ""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: Literal["off", "default", "reduce-overhead", "max-autotune"] = "off"
    channels_last: bool = True
    log_every: int = 20
    save_every: str = "1ep"
    keep: int = 2
    resume: Literal["auto", "never"] = "auto"
    threads: int = 0
    timeout_s: float = 600.0
    max_rejected: int = 20

    def __post_init__(self) -> None:
        require(self.timeout_s >= 0.0, "run.timeout_s", self.timeout_s, "0 (never) or more seconds")
        require(self.max_rejected >= 1, "run.max_rejected", self.max_rejected, "1 or more")
        require(self.batch_size >= 1, "run.batch_size", self.batch_size, "1 or more")
        require(0 <= self.seed < 2**63, "run.seed", self.seed, "a whole number from 0")
        require(self.log_every >= 1, "run.log_every", self.log_every, "1 or more")
        require(self.keep >= 2, "run.keep", self.keep, "2 or more, so that one bad file never costs the run")


@dataclass(frozen=True)
class KnnConfig:
    """kNN top-1 on frozen features while training; every "never" turns it off.

    every       a duration between evaluations; the last step is always evaluated
    test_split  the first of test and val that exists under data.root if empty
    limit       images of the train bank and of the test split at most; 0 takes all
    view_size, view_resize      the centre crop in px; 0 takes the size of the first training view, and 256/224 of it
    """

    every: str = "never"
    test_split: str = ""
    k: int = 200
    temperature: float = 0.1
    limit: int = 0
    view_size: int = 0
    view_resize: int = 0


@dataclass(frozen=True)
class OnlineConfig:
    """A classifier that learns beside the method, from labels that the method never sees (evaluate/online.py).

    probe   "off", or "linear"
    lr      of its Adam
    """

    probe: Literal["off", "linear"] = "off"
    lr: float = 1e-3

    def __post_init__(self) -> None:
        require(self.lr > 0.0, "online.lr", self.lr, "above 0")


@dataclass(frozen=True)
class Config:
    """Everything a training run is told. `method` holds `name` and the method's own settings."""

    method: dict[str, Any]
    encoder: EncoderConfig
    data: DataConfig
    views: dict[str, ViewConfig]
    augment: dict[str, Any]
    loader: LoaderConfig
    optim: OptimConfig
    run: RunConfig
    knn: KnnConfig
    online: OnlineConfig = field(default_factory=OnlineConfig)

    def view_specs(self) -> list[ViewSpec]:
        """The views of one image, in the order of the config. Raises ValueError with key and remedy."""
        return [
            ViewSpec(
                role=view.role or key,
                **{
                    f.name: getattr(view, f.name) for f in dataclasses.fields(view) if f.name not in ("role", "augment")
                },
                augment=augment_spec(
                    {**self.augment, **view.augment}, self.data.mean, self.data.std, f"views.{key}.augment"
                ),
            )
            for key, view in self.views.items()
        ]


def augment_spec(values: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...], path: str) -> AugmentSpec:
    """The checked AugmentSpec of a chain written in YAML, with the data set's normalisation."""
    from fastssl.config import convert

    return convert(AugmentSpec, {**values, "mean": mean, "std": std}, path)


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """ValueError with key, value and remedy unless `condition`."""
    if not condition:
        raise ValueError(f"{key} is {value!r}, but must be {remedy}")
