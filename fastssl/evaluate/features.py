"""One pass of a frozen backbone over a data set: features, labels and ids, each sample once, on any number of ranks."""

# B images of a batch, N samples, F feature width, S side of a view in px
from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastssl import dist
from fastssl.precision import autocast
from fastssl.settings import LoaderConfig
from pipelines.augment import IMAGENET_MEAN, IMAGENET_STD
from pipelines.loader import Batch, read_once
from pipelines.views import ViewSpec, normalize
from shard_tools.manifest import Manifest


@dataclass(frozen=True)
class Features:
    """features (N, F) float32, labels (N,) int64, ids (N,) int64; rows in the order of the ids, on the CPU."""

    features: Tensor
    labels: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, rows: Tensor) -> Features:
        return Features(self.features[rows], self.labels[rows], self.ids[rows])


def features_of(
    backbone: nn.Module,
    manifest: Manifest,
    view: ViewSpec,
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    batch_size: int = 256,
    loader: LoaderConfig | None = None,
    limit: int = 0,
    show: Callable[[Iterable[Batch], int], Iterable[Batch]] = lambda batches, total: batches,
    between: Callable[[], None] = lambda: None,
) -> Features:
    """Features of a split seen through one deterministic view; all of it, or its first `limit` samples.

    batch_size is a rank's. The features are the same, bit for bit, for any number of ranks. `show` may wrap the batches
    in a progress bar; it is told how many there will be. `between` is called before each batch, equally often on all
    ranks, and may end the pass by an exception.
    Raises RuntimeError if the pass moved any tensor of the backbone.
    """
    loader = loader or LoaderConfig()
    num_samples = min(limit, manifest.num_samples) if limit else manifest.num_samples
    rows = block_rows(num_samples, batch_size, dist.rank(), dist.world())
    frozen = Frozen(backbone)
    with ExitStack() as opened:
        batches: Iterable[Batch] = ()
        if len(rows):
            read = read_once(
                manifest, [view], batch_size=batch_size, rank=0, world=1, backend=loader.backend, device=str(device),
                threads=loader.threads, output="uint8", rows=rows.numpy(),
            )  # fmt: skip
            batches = opened.enter_context(closing(cast(Generator[Batch, None, None], read)))
        rounds = -(-num_samples // (batch_size * dist.world()))
        found = extract(
            backbone,
            _asking(show(batches, -(-len(rows) // batch_size)), rounds, between),
            device=device,
            precision=precision,
            mean=view.augment.mean,
            std=view.augment.std,
        )
    frozen.check("while features were computed")
    return found


@torch.no_grad()
def extract(
    backbone: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    l2: bool = False,
) -> Features:
    """Features of every sample, gathered from all ranks and sorted by id. Each rank gives its own part of the samples.

    The backbone runs in eval mode and is left as it was: modes, parameters, buffers and random state.
    mean, std   the normalisation of uint8 batches; float batches are taken to be normalised
    l2          rows of unit length
    Raises ValueError if a feature is not finite, or if a sample came twice.
    """
    features, labels, ids = [], [], []
    with evaluating(backbone):
        for batch in batches:
            (images,) = next(iter(batch.views.values()))
            features.append(forward(backbone, images, device=device, precision=precision, mean=mean, std=std).cpu())
            labels.append(batch.labels.cpu())
            ids.append(batch.ids.cpu())
    mine = Features(
        torch.cat(features) if features else torch.empty(0, width_of(backbone)),
        torch.cat(labels) if labels else torch.empty(0, dtype=torch.long),
        torch.cat(ids) if ids else torch.empty(0, dtype=torch.long),
    )
    whole = _sorted(_gather(mine, device))
    bad = ~whole.features.isfinite().all(1)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {len(whole)} samples have features that are not finite, the first is sample "
            f"{int(whole.ids[bad][0])}: the checkpoint may have diverged; try an earlier step, or run.precision=fp32"
        )
    if l2:
        whole = Features(functional.normalize(whole.features, dim=1), whole.labels, whole.ids)
    return whole


def width_of(backbone: nn.Module) -> int:
    """F: how many features the backbone makes of an image."""
    return cast(int, backbone.num_features)


def forward(
    backbone: nn.Module,
    images: Tensor,
    *,
    device: torch.device | str,
    precision: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """(B, 3, S, S) uint8 or normalised float -> (B, F) float32 on `device`, channels-last inside."""
    images = images.to(device, non_blocking=True)
    if images.dtype == torch.uint8:
        images = normalize(images, mean, std, torch.float32)
    images = images.contiguous(memory_format=torch.channels_last)
    with autocast(precision, device):
        return backbone(images).float()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each submodule is back in the mode it had, also where these differed."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


class Frozen:
    """Remembers every parameter and buffer of a backbone, and raises if one of them has moved since.

    A probe of a backbone that moves is no probe: batch norm left in train mode, or a parameter in the optimiser, raises
    the accuracy quietly. MoCo's evaluation had this check after the first epoch.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone
        self.before = {key: value.clone() for key, value in backbone.state_dict().items()}

    def check(self, when: str) -> None:
        """Raises RuntimeError naming the tensors that differ in any bit."""
        now = self.backbone.state_dict()
        moved = [key for key, value in self.before.items() if not torch.equal(value, now[key])]
        if moved:
            names = ", ".join(moved[:3])
            raise RuntimeError(
                f"the frozen backbone moved {when}: {len(moved)} tensors differ from the checkpoint ({names})"
            )


class RawPixels(nn.Module):
    """The baseline of no network at all: the image at `side` x `side` px, flattened."""

    def __init__(self, side: int = 16, channels: int = 3) -> None:
        super().__init__()
        self.side = side
        self.num_features = channels * side * side

    def forward(self, images: Tensor) -> Tensor:
        size = (self.side, self.side)
        if images.shape[-2:] != size:
            images = functional.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        return images.flatten(1)


def block_rows(num_samples: int, batch_size: int, rank: int, world: int) -> Tensor:
    """The rows of rank `rank`: every `world`-th block of `batch_size` rows, the last one shorter.

    Read in batches of `batch_size`, they make the very batches that one process makes, so that the features are equal
    bit for bit for any number of ranks (kernels may round differently for another batch shape).
    """
    blocks = torch.arange(num_samples).split(batch_size)[rank::world]
    return torch.cat(blocks) if blocks else torch.empty(0, dtype=torch.long)


def _asking(batches: Iterable[Batch], rounds: int, between: Callable[[], None]) -> Iterator[Batch]:
    """`batches`, with `between` called before each, and `rounds` times in all: a rank may have one batch less."""
    count = 0
    for batch in batches:
        between()
        count += 1
        yield batch
    for _ in range(count, rounds):
        between()


def _gather(mine: Features, device: torch.device | str) -> Features:
    """Every rank's rows, in rank order, on every rank. Ranks may have different numbers of rows."""
    if dist.world() == 1:
        return mine
    counts = dist.all_gather(torch.tensor([len(mine)], device=device)).tolist()

    def gathered(rows: Tensor) -> Tensor:
        padding = rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])
        everyone = dist.all_gather(torch.cat([rows, padding]).to(device)).cpu()
        return torch.cat([part[:count] for part, count in zip(everyone.split(max(counts)), counts, strict=True)])

    return Features(gathered(mine.features), gathered(mine.labels), gathered(mine.ids))


def _sorted(features: Features) -> Features:
    ids, order = features.ids.sort()
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise ValueError(f"sample {int(twice[0])} was evaluated twice; each rank must read its own part of the data")
    return features.subset(order)
