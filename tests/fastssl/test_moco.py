"""A whole MoCo step against a second statement of it, the queue against a deque, and the batch norms."""

import collections
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastssl.methods import RunFacts, build_method
from fastssl.nn.split_batchnorm import SplitBatchNorm2d, split_batchnorm_
from fastssl.schedule import Clock

ROLES = {"query": 1, "key": 1}


class TinyBackbone(nn.Module):
    num_features = 6

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x))).mean((2, 3))


def moco(seed=0, dtype=torch.float64, **settings):
    torch.manual_seed(3)
    base = {"name": "moco", "dim": 5, "queue_length": 11, "momentum": 0.9, "split_groups": 2}
    return build_method({**base, **settings}, TinyBackbone().to(dtype), RunFacts(ROLES, seed)).to(dtype)


def views(step, batch=4):
    generator = torch.Generator().manual_seed(step)
    return {r: [torch.rand(batch, 3, 8, 8, generator=generator, dtype=torch.float64)] for r in ("query", "key")}


def train(method, optimizer, steps):
    for step in range(steps):
        method.before_step(step)
        output = method(views(step), step)
        optimizer.zero_grad()
        output.loss.backward()
        method.after_backward(step)
        optimizer.step()
        method.after_step(output)
    return output


def published_steps(method, steps, lr, temperature, symmetric):
    """The authors' order: forward, EMA, key forward, loss, enqueue, backward, SGD by hand."""
    q, k = copy.deepcopy(method.encoder_q), copy.deepcopy(method.encoder_k)
    queue = collections.deque(method.queue.clone(), maxlen=len(method.queue))
    place = 0
    velocity = [torch.zeros_like(p) for p in q.parameters()]

    def nrm(x):
        return x / x.norm(dim=1, keepdim=True)

    def one_direction(x, y, negatives):
        logits = torch.cat([(x * y).sum(1, keepdim=True), x @ torch.stack(list(negatives)).T], 1) / temperature
        return -(logits[:, 0] - torch.log(torch.exp(logits).sum(1))).mean()

    for step in range(steps):
        first, second = views(step)["query"][0], views(step)["key"][0]
        rows = [nrm(q(first))] + ([nrm(q(second))] if symmetric else [])
        with torch.no_grad():
            for pk, pq in zip(k.parameters(), q.parameters()):
                pk.copy_(0.9 * pk + 0.1 * pq)
            keys = [nrm(k(second))] + ([nrm(k(first))] if symmetric else [])
        loss = sum(one_direction(x, y, queue) for x, y in zip(rows, keys))
        grads = torch.autograd.grad(loss, list(q.parameters()))
        with torch.no_grad():
            for key in torch.cat(keys[::-1]):
                queue[place % len(queue)] = key
                place += 1
            for p, g, v in zip(q.parameters(), grads, velocity):
                v.mul_(0.9).add_(g + 1e-4 * p)
                p.sub_(lr * v)
    return q, k, torch.stack(list(queue)), loss


@pytest.mark.parametrize(("head", "symmetric"), [("linear", False), ("mlp", False), ("mlp", True)])
def test_five_steps_equal_the_published_order_of_events(head, symmetric):
    method = moco(head=head, symmetric=symmetric, batch_norm="plain", temperature=0.2)
    expected = published_steps(method, 5, lr=0.1, temperature=0.2, symmetric=symmetric)
    optimizer = torch.optim.SGD(method.encoder_q.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    output = train(method, optimizer, 5)
    for ours, theirs in zip((method.encoder_q, method.encoder_k), expected):
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=name)
    torch.testing.assert_close(method.queue, expected[2], rtol=0, atol=1e-9)
    torch.testing.assert_close(output.loss, expected[3], rtol=0, atol=1e-9)


def test_key_encoder_and_queue_take_no_gradient():
    method = moco()
    method(views(0), 0).loss.backward()
    assert all(p.grad is None for p in method.encoder_k.parameters())
    assert all(p.grad is not None for p in method.encoder_q.parameters())


@pytest.mark.parametrize(("queue_length", "batch"), [(11, 4), (8, 4), (3, 4), (1, 2)])
def test_the_queue_wraps_as_a_deque_does_for_any_length(queue_length, batch):
    method = moco(queue_length=queue_length)
    deque = collections.deque(range(queue_length), maxlen=queue_length)  # slot i holds the key numbered deque[i]
    numbered = 0
    for _ in range(7):
        keys = torch.arange(numbered, numbered + batch, dtype=torch.float64)[:, None].expand(batch, 5)
        method.after_step(type("O", (), {"carry": (keys,)})())
        deque.extend(range(numbered, numbered + batch))
        numbered += batch
    assert sorted(method.queue[:, 0].tolist()) == sorted(float(d) for d in deque)


def test_the_initial_queue_holds_unit_rows_and_is_gone_after_k_keys():
    method = moco(queue_length=8)
    initial = method.queue.clone()
    torch.testing.assert_close(initial.norm(dim=1), torch.ones(8, dtype=torch.float64))
    for step in range(2):
        method.after_step(method(views(step), step))
    assert not any(torch.equal(a, b) for a in initial for b in method.queue)


def test_key_encoder_follows_as_an_average_of_parameters_only():
    method = moco()
    with torch.no_grad():
        for p in method.encoder_q.parameters():
            p.add_(1.0)
        method.encoder_q.backbone.bn.running_mean.fill_(7.0)
    before = [p.clone() for p in method.encoder_k.parameters()]
    method.before_step(0)
    for old, new, q in zip(before, method.encoder_k.parameters(), method.encoder_q.parameters()):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * q)
    assert method.encoder_k.backbone.bn.running_mean.abs().max() == 0


def test_shuffling_changes_companions_and_not_the_keys_own_rows():
    method = moco(batch_norm="split").eval()
    keys = method.keys(views(0)["key"][0], draw=5)
    torch.testing.assert_close(keys, F.normalize(method.encoder_k(views(0)["key"][0]), dim=1))


def test_the_loss_does_not_depend_on_the_shuffle_when_batch_norm_is_in_eval():
    losses = [moco(seed=seed).eval()(views(0), 0).loss.item() for seed in (0, 1, 2)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12) == pytest.approx(losses[2], abs=1e-12)


def test_the_loss_depends_on_the_shuffle_when_batch_norm_is_split():
    losses = [moco(seed=seed).train()(views(0, batch=8), 0).loss.item() for seed in range(4)]
    assert max(losses) - min(losses) > 1e-6


def test_split_batch_norm_normalises_each_part_by_itself():
    x = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    split = split_batchnorm_(nn.Sequential(nn.BatchNorm2d(4)), 3).double()
    parts = [nn.BatchNorm2d(4).double() for _ in range(3)]
    expected = torch.cat([bn(part) for bn, part in zip(parts, x.chunk(3))])
    torch.testing.assert_close(split(x), expected)
    torch.testing.assert_close(split[0].running_var, torch.stack([p.running_var for p in parts]).mean(0))
    torch.testing.assert_close(split[0].running_mean, torch.stack([p.running_mean for p in parts]).mean(0))
    assert isinstance(split[0], SplitBatchNorm2d)
    split.eval()
    assert torch.equal(split(x)[0], split(x[:1])[0])


def test_split_batch_norm_names_the_setting_when_the_batch_does_not_divide():
    with pytest.raises(ValueError, match=r"method\.split_groups is 3"):
        split_batchnorm_(nn.Sequential(nn.BatchNorm2d(3)), 3)(torch.randn(4, 3, 2, 2))


def test_chance_level_is_the_log_of_the_number_of_candidates():
    assert moco().chance_level() == pytest.approx(math.log(12))
    assert moco(symmetric=True).chance_level() == pytest.approx(2 * math.log(12))


def test_a_queue_as_long_as_an_epoch_is_advised_against():
    def advice(batches):
        facts = RunFacts(ROLES, clock=Clock(steps_per_epoch=batches, batch_size=4))
        return build_method({"name": "moco", "queue_length": 12}, TinyBackbone(), facts).advice()

    assert advice(4) == []
    (sentence,) = advice(3)
    assert sentence.startswith("method.queue_length 12 is not smaller than the 12 images of an epoch")


def test_a_network_that_knows_nothing_scores_chance():
    method = moco(queue_length=2000, temperature=1.0, batch_norm="plain")
    for p in method.encoder_q.parameters():
        nn.init.zeros_(p) if p.ndim == 1 else None
    constant = F.normalize(torch.ones(4, 5, dtype=torch.float64), dim=1)
    method.queue.copy_(constant[:1].expand(2000, 5))
    from fastssl.losses import info_nce

    loss, _ = info_nce(constant, constant, method.queue, 1.0)
    assert loss.item() == pytest.approx(method.chance_level())


def test_views_of_other_roles_are_refused_by_name():
    with pytest.raises(ValueError, match=r"method moco reads 1 query, 1 key"):
        build_method({"name": "moco"}, TinyBackbone(), RunFacts({"global": 2}))


def test_a_misspelt_method_setting_is_named():
    with pytest.raises(ValueError, match=r"method.temprature.*did you mean 'method.temperature'"):
        build_method({"name": "moco", "temprature": 0.1}, TinyBackbone(), RunFacts(ROLES))
