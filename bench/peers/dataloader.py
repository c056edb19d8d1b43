"""torch's DataLoader as all peers that use it set it up: worker processes that live on, shuffled, without end."""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder


def batches(
    dataset: ImageFolder, options: argparse.Namespace, collate: Callable[[list[Any]], Any] | None = None
) -> Iterator[Any]:
    """Batches of one permutation of `dataset` after the other, so that no epoch's end drains the workers."""
    sampler = RandomSampler(dataset, num_samples=10**9)
    yield from DataLoader(
        dataset, options.batch, sampler=sampler, num_workers=options.workers, collate_fn=collate, drop_last=True
    )
