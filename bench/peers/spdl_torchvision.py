"""SPDL's pipeline of threads in one process, with torchvision v2 on uint8 tensors: its own example of transforms.

Differs: as torchvision_tensor, whose views these are. Decoded by torchvision.io, since SPDL's own decoder needs the
shared libraries of FFmpeg, which no wheel holds.
"""

import itertools

import torch
from spdl.pipeline import PipelineBuilder
from torchvision.datasets import ImageFolder

from bench.peers.measure import main
from bench.peers.torchvision_tensor import OPERATIONS, AllViews, decode


def batches(options):
    torch.set_num_threads(1)  # the pipeline's threads are the parallelism
    files = ImageFolder(options.folder).samples
    make_views = AllViews(options.views)

    def shuffled():
        for _ in itertools.count():
            yield from (files[i] for i in torch.randperm(len(files)).tolist())

    def views_of(sample):
        path, label = sample
        return make_views(decode(path)), label

    def collate(samples):
        views, labels = zip(*samples)
        return [torch.stack(view) for view in zip(*views)], torch.tensor(labels)

    pipeline = (
        PipelineBuilder()
        .add_source(shuffled())
        .pipe(views_of, concurrency=options.workers)
        .aggregate(options.batch)
        .pipe(collate)
        .add_sink(2)
        .build(num_threads=options.workers)
    )
    with pipeline.auto_stop():
        yield from pipeline


if __name__ == "__main__":
    main(batches, "float32 NCHW, normalised", decode, OPERATIONS)
