"""webdataset over tar shards, with torchvision's transforms on Pillow images in its WebLoader.

Differs: shuffled shard by shard and in a buffer of 1000 images instead of over the whole set; shards are shared out to
the workers, so there must be as many at least.
"""

import webdataset as wds

from bench.peers.measure import main
from bench.peers.torchvision_pillow import OPERATIONS, AllViews, decode


def batches(options):
    shards = sorted(str(path) for path in options.shards.glob("*.tar"))
    if len(shards) < options.workers:
        raise SystemExit(
            f"{options.shards} has {len(shards)} shards for {options.workers} workers; pack smaller shards"
        )
    dataset = (
        wds.WebDataset(shards, shardshuffle=len(shards), seed=0)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg;jpeg;png", "cls")
        .map_tuple(AllViews(options.views), lambda label: label)
        .batched(options.batch, partial=False)
        .repeat()
    )
    yield from wds.WebLoader(dataset, batch_size=None, num_workers=options.workers)


if __name__ == "__main__":
    main(batches, "float32 NCHW, normalised", decode, OPERATIONS)
