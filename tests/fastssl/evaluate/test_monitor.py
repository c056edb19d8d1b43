import dataclasses
import threading

import pytest
import torch

from fastssl import checkpoint, config
from fastssl.evaluate.main import run
from fastssl.evaluate.monitor import KnnMonitor
from fastssl.evaluate.settings import load
from fastssl.methods import RunFacts, build_method
from fastssl.nn.encoder import build_encoder
from fastssl.stopping import Interrupted, Reason
from shard_tools.manifest import Manifest, ShardError

SMALL = [
    "encoder=resnet10_narrow",
    "encoder.width=0.125",
    "views.query.size=24",
    "method.queue_length=64",
    "method.split_groups=2",
    "knn.every=1ep",
    "knn.k=5",
]


def settings(root, *more):
    return config.load([*SMALL, f"data.root={root}", *more])


def method_of(cfg):
    torch.manual_seed(0)
    roles = {"query": 1, "key": 1}
    return build_method(cfg.method, build_encoder(**dataclasses.asdict(cfg.encoder)), RunFacts(roles)).train()


def monitor_of(cfg, method, root):
    return KnnMonitor(cfg, Manifest.load(root), method, torch.device("cpu"))


def test_training_with_a_monitor_is_bit_equal_to_training_without(patch_shards):
    cfg = settings(patch_shards)
    weights = []
    for monitored in (False, True):
        method = method_of(cfg)
        monitor = monitor_of(cfg, method, patch_shards)
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
        torch.manual_seed(11)
        for step in range(3):
            views = {role: [torch.randn(8, 3, 24, 24)] for role in ("query", "key")}  # draws from the global state
            method.before_step(step)
            output = method(views, step)
            optimizer.zero_grad()
            output.loss.backward()
            method.after_backward(step)
            optimizer.step()
            method.after_step(output)
            if monitored:
                assert 0.0 <= monitor()["knn/top1"] <= 1.0
                assert all(m.training for m in method.backbone().modules())
        weights.append(method.state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_a_monitor_that_is_broken_off_leaves_nothing_behind(patch_shards):
    """At its first word, after the features of the bank, and in the search for neighbours."""
    cfg = settings(patch_shards)
    method = method_of(cfg)
    monitor = monitor_of(cfg, method, patch_shards)
    asked = []
    whole = monitor(lambda: asked.append(True))
    assert len(asked) == 3
    threads = threading.active_count()
    before = {key: value.clone() for key, value in method.state_dict().items()}
    for last in (1, 2, 3):
        calls = iter(range(last))

        def between(calls=calls, last=last):
            if next(calls) == last - 1:
                raise Interrupted(Reason.ASKED)

        with pytest.raises(Interrupted):
            monitor(between)
        assert all(m.training for m in method.backbone().modules())
        assert threading.active_count() == threads
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    assert monitor() == whole


def test_the_monitor_says_what_the_evaluator_says_of_the_checkpoint(patch_shards, tmp_path):
    cfg = settings(patch_shards)
    method = method_of(cfg)
    online = monitor_of(cfg, method, patch_shards)()
    (prefix,) = [name for name, module in method.named_modules() if module is method.backbone()]
    meta = {"config": config.plain(cfg), "backbone_prefix": f"{prefix}."}
    checkpoint.save(tmp_path, 3, method, {}, meta, keep=2)
    offline = run(
        load([f"checkpoint={tmp_path}", f"data.root={patch_shards}", "evaluator.k=[5]", "evaluator.temperature=[0.1]"])
    )
    assert online == {key: offline[key] for key in ("knn/top1", "knn/top5")}


def test_the_limit_bounds_bank_and_queries(patch_shards):
    cfg = settings(patch_shards, "knn.limit=1", "knn.k=200")
    method = method_of(cfg)
    train, test = (int(Manifest.load(patch_shards, split).index()["label"][0]) for split in ("train", "test"))
    assert monitor_of(cfg, method, patch_shards)() == {
        "knn/top1": float(train == test),
        "knn/top5": float(train == test),
    }


def test_data_that_cannot_be_evaluated_on_is_refused_before_the_first_step(tiny_shards, tiny_shards_unlabelled):
    for root in (tiny_shards, tiny_shards_unlabelled):  # no test split, no labels
        cfg = settings(root)
        with pytest.raises(ShardError, match=r"knn\.every=never"):
            monitor_of(cfg, method_of(cfg), root)
