"""Un-Mix on MoCo: the loss against NumPy, whole steps against the published order of events, and what always holds.

Two ranks are in test_two_ranks.py.
"""

import collections
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl import config, train
from fastssl.log import read_metrics
from fastssl.losses import info_nce
from fastssl.methods import RunFacts, build_method, unmix_moco
from fastssl.methods.unmix_moco import mixture_info_nce
from fastssl.mixing import MixingConfig, Mixture, draw_mixture, mix
from tests.fastssl.runs import assert_same_state
from tests.fastssl.runs import settings as run_settings
from tests.fastssl.test_losses import unit
from tests.fastssl.test_mixing import MIXTURES
from tests.fastssl.test_moco import TinyBackbone, views
from tests.oracle import unmix as oracle

quick = settings(max_examples=40, deadline=None)
FORMS = [{}, {"symmetric": True}, {"symmetric": True, "variant": "corrected"}]


def unmix(seed=0, **settings):
    torch.manual_seed(3)
    base = {"name": "unmix_moco", "dim": 5, "queue_length": 11, "momentum": 0.9, "temperature": 0.2, "split_groups": 2}
    facts = RunFacts({"query": 1, "key": 1}, seed)
    return build_method({**base, **settings}, TinyBackbone().double(), facts).double()


def train_steps(method, steps, lr=0.1):
    optimizer = torch.optim.SGD(method.encoder_q.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    for step in range(steps):
        method.before_step(step)
        output = method(views(step), step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_step(output)
    return output


# --- the loss


@quick
@given(st.integers(1, 5), st.integers(1, 9), st.floats(0.0, 1.0), st.floats(0.05, 1.0), st.integers(0, 99))
def test_the_objective_and_its_gradients_match_numpy(batch, queue, lam, t, seed):
    rng = np.random.default_rng(seed)
    q, m, k, n = unit(rng, batch, 6), unit(rng, batch, 6), unit(rng, batch, 6), unit(rng, queue, 6)
    query, mixed = torch.from_numpy(q).requires_grad_(), torch.from_numpy(m).requires_grad_()
    key, negatives = torch.from_numpy(k), torch.from_numpy(n)
    loss = info_nce(query, key, negatives, t)[0] + mixture_info_nce(mixed, key, negatives, lam, t)
    loss.backward()
    np.testing.assert_allclose(loss.item(), oracle.objective(q, m, k, n, lam, t), rtol=1e-11)
    to_query, to_mixed = oracle.objective_gradients(q, m, k, n, lam, t)
    np.testing.assert_allclose(query.grad.numpy(), to_query, atol=1e-11)
    np.testing.assert_allclose(mixed.grad.numpy(), to_mixed, atol=1e-11)


@quick
@given(st.integers(1, 5), st.floats(0.0, 1.0), st.integers(0, 99))
def test_the_reverse_order_with_the_other_lambda_is_the_same_loss(batch, lam, seed):
    rng = np.random.default_rng(seed)
    mixed, key, negatives = (torch.from_numpy(unit(rng, rows, 6)) for rows in (batch, batch, 7))
    there = mixture_info_nce(mixed, key, negatives, lam, 0.2).item()
    back = mixture_info_nce(mixed.flip(0), key, negatives, 1.0 - lam, 0.2).item()
    assert there == pytest.approx(back, abs=1e-12)


def test_half_precision_rows_give_a_finite_float32_loss():
    rows = F.normalize(torch.ones(4, 8)).half()
    loss = mixture_info_nce(rows, rows, -rows, 0.3, 0.001)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


# --- the method


@quick
@given(MIXTURES, st.integers(1, 3))
def test_features_of_the_reversed_mixture_are_the_features_reversed(mixture, groups):
    """In train mode too, whatever the parts over which batch norm is split."""
    mixed, _ = mix(views(0, batch=6)["query"][0], mixture)
    encoders = [unmix(split_groups=groups).train().encoder_q for _ in range(2)]
    torch.testing.assert_close(encoders[0](mixed.flip(0)), encoders[1](mixed).flip(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS[::2])
@pytest.mark.parametrize("blend", [False, True])
def test_with_lambda_one_the_loss_is_twice_mocos(form, blend, monkeypatch):
    """Not in the symmetric reference form, whose second direction mixes the first image."""
    monkeypatch.setattr(unmix_moco, "draw_mixture", lambda *_: Mixture(blend, 1.0, (0.3, 0.6)))
    output = unmix(**form).eval()(views(0), 0)
    symmetric = form.get("symmetric", False)
    torch.manual_seed(3)
    moco_settings = {"name": "moco", "dim": 5, "queue_length": 11, "temperature": 0.2, "symmetric": symmetric}
    moco = build_method(moco_settings, TinyBackbone().double(), RunFacts({"query": 1, "key": 1})).double()
    assert output.loss.item() == pytest.approx(2 * moco.eval()(views(0), 0).loss.item(), abs=1e-12)


@pytest.mark.parametrize(("form", "forwards"), list(zip(FORMS, [2, 3, 4])))
def test_no_mixture_passes_the_encoder_twice(form, forwards):
    method, seen = unmix(**form), []
    method.encoder_q.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    method(views(0), 0)
    assert len(seen) == forwards
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def published_steps(method, steps, ranks=1, lr=0.1):
    """The authors' order: query, mixture, features reversed, EMA, keys, the losses by joined logits, enqueue, SGD.

    The batch is in `ranks` parts with a mixture each, whose losses are averaged as DDP does. Batch norm in one group.
    """
    c = method.config
    q, k = copy.deepcopy(method.encoder_q), copy.deepcopy(method.encoder_k)
    queue = collections.deque(method.queue.clone(), maxlen=len(method.queue))
    place = 0
    velocity = [torch.zeros_like(p) for p in q.parameters()]

    def nrm(x):
        return x / x.norm(dim=1, keepdim=True)

    def contrast(x, key):
        negatives = torch.stack(list(queue))
        logits = torch.cat([(x * key).sum(1, keepdim=True), x @ negatives.T], 1) / c.temperature
        return -torch.log(torch.softmax(logits, 1)[:, 0]).mean()

    def with_mixture(x, m, lam, key):
        return contrast(x, key) + lam * contrast(m, key) + (1 - lam) * contrast(m.flip(0), key)

    for step in range(steps):
        parts = [[v[0].chunk(ranks)[rank] for v in views(step).values()] for rank in range(ranks)]
        rows = []
        for rank, images in enumerate(parts):
            drawn = draw_mixture(c.mixing, method.seed, step, rank)
            for number, image in enumerate(images[: 1 + c.symmetric]):
                row, column = (int(at * image.shape[-1]) for at in drawn.centre)
                if number == 0 or c.variant == "corrected":
                    mixture, lam = oracle.mix(image.numpy(), drawn.blend, drawn.lam, row, column)
                    rows.append([rank, nrm(q(image)), nrm(q(torch.from_numpy(mixture))), lam])
                else:
                    rows.append([rank, nrm(q(image)), rows[-1][2], rows[-1][3]])
        with torch.no_grad():
            for pk, pq in zip(k.parameters(), q.parameters()):
                pk.copy_(0.9 * pk + 0.1 * pq)
            keys = [{number: nrm(k(images[number])) for number in (1, 0)[: 1 + c.symmetric]} for images in parts]
        loss = 0.0
        for place_in_rows, (rank, x, m, lam) in enumerate(rows):
            key = keys[rank][0 if c.symmetric and place_in_rows % 2 else 1]
            loss = loss + with_mixture(x, m, lam, key) / ranks
        grads = torch.autograd.grad(loss, list(q.parameters()))
        with torch.no_grad():
            for number in (0, 1)[1 - c.symmetric :]:
                for key in torch.cat([own[number] for own in keys]):
                    queue[place % len(queue)] = key
                    place += 1
            for p, g, m in zip(q.parameters(), grads, velocity):
                m.mul_(0.9).add_(g + 1e-4 * p)
                p.sub_(lr * m)
    return {
        **{f"encoder_q.{name}": value for name, value in q.state_dict().items()},
        **{f"encoder_k.{name}": value for name, value in k.state_dict().items()},
        "queue": torch.stack(list(queue)),
    }, loss


@pytest.mark.parametrize("form", FORMS)
def test_five_steps_equal_the_published_order_of_events(form):
    """Of those five mixtures some blend and some paste."""
    assert {draw_mixture(MixingConfig(), 0, step, 0).blend for step in range(5)} == {False, True}
    method = unmix(batch_norm="plain", **form)
    expected, loss = published_steps(method, 5)
    output = train_steps(method, 5)
    for name, value in expected.items():
        torch.testing.assert_close(method.state_dict()[name], value, rtol=0, atol=1e-9, msg=name)
    torch.testing.assert_close(output.loss, loss, rtol=0, atol=1e-9)


def test_key_encoder_and_queue_take_no_gradient():
    method = unmix()
    method(views(0), 0).loss.backward()
    assert all(p.grad is None for p in method.encoder_k.parameters())
    assert all(p.grad is not None for p in method.encoder_q.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_features_that_know_nothing_score_chance(form):
    method = unmix(momentum=0.0, **form)
    with torch.no_grad():
        method.encoder_q.head[-1].weight.zero_()
        method.queue.copy_(F.normalize(method.encoder_q.head[-1].bias, dim=0).expand(11, 5))
    method.before_step(0)
    output = method(views(0), 0)
    directions = 2 if form else 1
    assert method.chance_level() == pytest.approx(2 * directions * math.log(12))
    assert output.loss.item() == pytest.approx(method.chance_level())
    parts = output.logs["original_loss"] + output.logs["mixture_loss"]
    assert parts.item() == pytest.approx(output.loss.item() / directions)


# --- settings


def test_presets_are_those_of_moco_and_a_mixture():
    for preset, base in (("unmix_moco", "moco_v2"), ("unmix_moco_v1", "moco_v1")):
        ours, theirs = (config.load([f"method={name}", "data.root=x"]) for name in (preset, base))
        mixing = {"name": "unmix_moco", "mixing": {"global_p": 0.5, "beta": 1.0}, "variant": "reference"}
        assert ours.method == {**theirs.method, **mixing}
        assert (ours.views, ours.augment, ours.optim) == (theirs.views, theirs.augment, theirs.optim)


def test_the_cifar_recipe_holds_the_published_values():
    cfg = config.load(["recipe=unmix_moco_cifar", "data.root=x"])
    assert cfg.method == {
        "name": "unmix_moco", "dim": 128, "queue_length": 4096, "momentum": 0.99, "temperature": 0.1, "head": "linear",
        "symmetric": True, "batch_norm": "split", "split_groups": 8, "key_exchange": "deal",
        "mixing": {"global_p": 0.5, "beta": 1.0}, "variant": "reference",
    }  # fmt: skip
    assert (cfg.encoder.name, cfg.encoder.stem, cfg.run.batch_size, cfg.run.duration) == (
        "resnet18",
        "cifar",
        512,
        "1000ep",
    )
    assert (cfg.optim.lr, cfg.optim.momentum, cfg.optim.weight_decay, cfg.optim.schedule) == (0.06, 0.9, 5e-4, "cosine")
    for view in cfg.view_specs():
        assert (view.size, view.scale, view.augment.blur_p, view.augment.jitter_p) == (32, (0.08, 1.0), 0.0, 0.8)


def test_the_recipe_for_96_px_holds_the_published_values():
    cfg = config.load(["recipe=stl96_moco_v2", "data.root=x"])
    assert [(v.size, v.scale, v.augment.std) for v in cfg.view_specs()] == [
        (96, (0.2, 1.0), (0.2696, 0.2604, 0.2731))
    ] * 2
    assert (cfg.encoder.name, cfg.method["temperature"], cfg.method["head"]) == ("resnet50", 0.2, "mlp")
    assert (cfg.optim.lr, cfg.run.batch_size, cfg.run.duration) == (0.06, 512, "200ep")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mixing": {"global_p": 2.0}}, r"method\.mixing\.global_p is 2\.0, but must be between 0 and 1"),
        ({"mixing": {"alpha": 1.0}}, r"unknown setting 'method\.mixing\.alpha'"),
        ({"variant": "authors"}, r"method\.variant is 'authors', but must be one of reference, corrected"),
    ],
)
def test_a_wrong_setting_is_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        unmix(**settings)


def test_views_of_other_roles_are_refused_by_name():
    with pytest.raises(ValueError, match="method unmix_moco reads 1 query, 1 key"):
        build_method({"name": "unmix_moco"}, TinyBackbone(), RunFacts({"global": 2}))


def test_a_run_in_two_pieces_repeats_the_mixtures_of_one_run(tiny_shards, tmp_path):
    once, pieces = tmp_path / "once", tmp_path / "pieces"
    for folder, more in ((once, []), (pieces, ["run.stop_after=3steps"]), (pieces, [])):
        arguments = ["method=unmix_moco", *run_settings(tiny_shards, folder, "run.duration=6steps", *more)]
        assert train.run(config.load(arguments)) == 0
    assert_same_state(once, pieces)
    last = read_metrics(once)[-1]
    assert last["loss"] == pytest.approx(last["original_loss"] + last["mixture_loss"], rel=1e-5)
