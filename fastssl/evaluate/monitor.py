"""kNN accuracy while training: the same number as `fastssl-evaluate evaluator=knn` gives for that step's checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastssl.evaluate.features import features_of
from fastssl.evaluate.knn import knn
from fastssl.evaluate.splits import find_test, require_same_classes
from fastssl.evaluate.subject import center_view, crop_sizes
from fastssl.methods import Method
from fastssl.settings import Config
from shard_tools.manifest import Manifest, ShardError


class KnnMonitor:
    """Call it at any step, on all ranks together: {"knn/top1": 0.61, "knn/top5": 0.95}.

    It calls `between` again and again, equally often on all ranks; what that raises, on all ranks at once, ends it.
    It leaves nothing behind: the backbone's modes, parameters, buffers and the random state are as before, so that a
    run with a monitor equals one without, bit for bit. Raises ShardError when built if the data cannot be evaluated on,
    so that this is known before the first step.
    """

    def __init__(self, cfg: Config, train: Manifest, method: Method, device: torch.device | str) -> None:
        try:
            self.test = find_test(cfg.data.root, cfg.knn.test_split, cfg.data.remote)
            require_same_classes(train, self.test)
        except ShardError as error:
            raise ShardError(f"{error}; or turn the kNN monitor off with knn.every=never") from error
        self.cfg, self.train, self.method, self.device = cfg, train, method, device
        trained = next(iter(cfg.views.values()))
        size, resize = crop_sizes(cfg.knn.view_size, cfg.knn.view_resize, trained.size)
        augment = {**cfg.augment, **trained.augment}
        self.view = center_view(size, resize, cfg.data.mean, cfg.data.std, trained.crop, augment)

    def __call__(self, between: Callable[[], None] = lambda: None) -> dict[str, float]:
        bank, queries = (
            features_of(
                self.method.backbone(),
                manifest,
                self.view,
                device=self.device,
                precision=self.cfg.run.precision,
                loader=self.cfg.loader,
                limit=self.cfg.knn.limit,
                between=between,
            )
            for manifest in (self.train, self.test)
        )
        (result,) = knn(
            queries,
            bank,
            num_classes=len(self.train.classes or ()),
            ks=[self.cfg.knn.k],
            temperatures=[self.cfg.knn.temperature],
            device=self.device,
            between=between,
        )
        return {"knn/top1": result.top1, "knn/top5": result.top5}
