"""webdataset over tar shards, with torchvision's transforms on Pillow images in its WebLoader.

Differs: shards are drawn with replacement and shuffled in a buffer of 1000 images, as its documentation has it for
training without end, instead of one order over the whole set.
"""

import webdataset as wds

from bench.peers.measure import main
from bench.peers.torchvision_pillow import OPERATIONS, AllViews, decode


def batches(options):
    shards = sorted(str(path) for path in options.shards.glob("*.tar"))
    dataset = (
        wds.WebDataset(shards, resampled=True)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg;jpeg;png", "cls")
        .map_tuple(AllViews(options.views), lambda label: label)
        .batched(options.batch, partial=False)
    )
    yield from wds.WebLoader(dataset, batch_size=None, num_workers=options.workers)


if __name__ == "__main__":
    main(batches, "float32 NCHW, normalised", decode, OPERATIONS)
