"""Which labelled splits an evaluation trains on and tests on."""

from __future__ import annotations

import numpy as np

from shard_tools.manifest import MANIFEST_NAME, Manifest, ShardError, splits
from shard_tools.remote import Access, RemoteFolder, locate

TEST_SPLITS = ("test", "val")  # in this order: where both are packed, val is what the settings were chosen on


def train_and_test(
    root: str, split: str, test_root: str = "", test_split: str = "", access: Access | None = None
) -> tuple[Manifest, Manifest]:
    """The two manifests; test_root "" means root, test_split "" the first of test and val that is there.

    Raises ShardError if a split is missing or has samples without a label, if the two have different classes, or if
    one of these has no training sample, so that it could never be found.
    """
    train, test = Manifest.load(root, split, access), find_test(test_root or root, test_split, access)
    require_same_classes(train, test)
    _require_every_class(train)
    return train, test


def find_test(root: str, split: str = "", access: Access | None = None) -> Manifest:
    """The named split at `root`, or the first of test and val; root may also be a split folder itself.

    root    a folder, or the URL of one: then without `split`, _info.json must list what it holds
    """
    folder = locate(root, access)
    if isinstance(folder, RemoteFolder):
        return Manifest.load(root, split or _listed(folder), access)
    if split or not folder.is_dir():
        return Manifest.load(root, split or TEST_SPLITS[0])
    if (folder / MANIFEST_NAME).is_file() and folder.name in TEST_SPLITS:
        return Manifest.load(folder)
    # data.root may be the train split's own folder.
    beside = folder.parent if (folder / MANIFEST_NAME).is_file() else folder
    for name in TEST_SPLITS:
        if (beside / name / MANIFEST_NAME).is_file():
            return Manifest.load(beside, name)
    found = ", ".join(splits(beside)) or "nothing"
    raise ShardError(
        f"{beside} has no split {' or '.join(TEST_SPLITS)} to test on, only {found}; pack one, or name one with"
        f" data.test_root=SHARDS data.test_split=SPLIT"
    )


def _listed(folder: RemoteFolder) -> str:
    """The first of test and val that the remote `folder` lists."""
    found = splits(folder.url, folder.access)
    if name := next((name for name in TEST_SPLITS if name in found), ""):
        return name
    raise ShardError(
        f"the _info.json of {folder} lists no split {' or '.join(TEST_SPLITS)}, only {', '.join(found) or 'nothing'};"
        f" name one with data.test_root=URL data.test_split=SPLIT"
    )


def require_same_classes(train: Manifest, test: Manifest) -> None:
    """ShardError with the remedy unless every sample of both has a label, and class numbers mean the same in both."""
    _require_labels(train)
    _require_labels(test)
    if train.classes != test.classes:
        difference = _difference(train, test)
        raise ShardError(f"{train.place} and {test.place} have different classes ({difference}); pack both alike")


def _require_labels(manifest: Manifest) -> None:
    if not manifest.labelled:
        raise ShardError(f"{manifest.place} has no labels, which an evaluator needs; pack it with classes")
    without = int((manifest.index()["label"] < 0).sum())
    if without:
        raise ShardError(f"{without} samples of {manifest.place} have no label; pack it without these")


def _require_every_class(train: Manifest) -> None:
    counts = np.bincount(train.index()["label"], minlength=len(train.classes or ()))
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        name = (train.classes or ())[int(empty[0])]
        raise ShardError(
            f"{len(empty)} of the {len(counts)} classes of {train.place} have no image, the first is {name!r}; pack it "
            f"without these classes, or with images of them"
        )


def _difference(train: Manifest, test: Manifest) -> str:
    ours, theirs = train.classes or (), test.classes or ()
    for number, (a, b) in enumerate(zip(ours, theirs)):
        if a != b:
            return f"class {number} is {a!r} in one and {b!r} in the other"
    return f"{len(ours)} in one and {len(theirs)} in the other"
