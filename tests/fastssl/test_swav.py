"""SwAV: Sinkhorn and the loss against NumPy, whole steps against a second statement of them, its queue, its resume."""

import collections
import copy
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastssl import checkpoint, config, train
from fastssl.log import read_metrics
from fastssl.losses import sinkhorn, swapped_prediction, usage_entropy
from fastssl.methods import RunFacts, build_method
from fastssl.methods import swav as swav_module
from fastssl.methods.swav import Queue, SwavConfig, redealt
from fastssl.nn.encoder import build_encoder
from fastssl.optim import build_optimizer, set_lr
from fastssl.schedule import Clock, learning_rate
from fastssl.settings import OptimConfig
from fastssl.training import Training, to_device
from tests.fastssl.runs import assert_same_state, finish, start
from tests.fastssl.test_moco import TinyBackbone
from tests.oracle import swav as oracle

S = np.array([[0.9, 0.1, -0.2], [0.8, 0.3, 0.0], [0.7, -0.1, 0.4], [0.2, 0.6, 0.5]])
BATCH = 4
LR = (0.5, 0.4, 0.3, 0.2, 0.1)


def cosines(rng, *shape):
    return rng.uniform(-1, 1, shape)


# Sinkhorn and the loss


@pytest.mark.parametrize(
    ("epsilon", "iterations", "rows"),
    [
        (0.05, 3, {0: (0.999506, 0.000491, 0.000002), 1: (0.833886, 0.165370, 0.000745),
                   2: (0.048369, 0.000024, 0.951607), 3: (0.0, 0.802628, 0.197372)}),
        (0.05, 1, {1: (0.979032, 0.020635, 0.000334), 3: (0.0, 0.531071, 0.468928)}),
        (0.03, 3, {2: (0.015284, 0.0, 0.984716)}),
    ],
)  # fmt: skip
def test_sinkhorn_has_the_values_that_the_published_code_gives(epsilon, iterations, rows):
    codes = sinkhorn(torch.tensor(S, dtype=torch.float32), epsilon, iterations)
    for row, expected in rows.items():
        assert codes[row].tolist() == pytest.approx(expected, abs=1.5e-6)
    if (epsilon, iterations) == (0.05, 3):
        assert codes.sum(0).tolist() == pytest.approx([1.881762, 0.968513, 1.149725], abs=2e-6)


@pytest.mark.parametrize(("rows", "prototypes"), [(1, 2), (6, 4), (5, 40)])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_matches_the_published_formula(rng, rows, prototypes, iterations):
    scores = cosines(rng, rows, prototypes)
    (expected,) = oracle.sinkhorn([scores], 0.05, iterations)
    np.testing.assert_allclose(sinkhorn(torch.from_numpy(scores), 0.05, iterations), expected, rtol=0, atol=1e-12)


scores_of = st.tuples(st.integers(1, 9), st.integers(2, 12), st.integers(0, 2**32 - 1)).map(
    lambda t: torch.from_numpy(np.random.default_rng(t[2]).uniform(-1, 1, t[:2]))
)


@given(scores_of, st.floats(0.03, 1.0), st.integers(1, 5))
def test_rows_of_codes_sum_to_1_and_are_not_negative(scores, epsilon, iterations):
    codes = sinkhorn(scores, epsilon, iterations)
    torch.testing.assert_close(codes.sum(1), torch.ones(len(scores), dtype=torch.float64))
    assert codes.min() >= 0


@given(scores_of, st.floats(-100, 100))
def test_a_constant_added_to_all_scores_changes_no_code(scores, constant):
    torch.testing.assert_close(sinkhorn(scores + constant, 0.05, 3), sinkhorn(scores, 0.05, 3), rtol=0, atol=1e-9)


@given(scores_of, st.integers(2, 4))
def test_the_same_rows_on_more_ranks_leave_the_codes(scores, world):
    """The joined batch of W equal ranks: every rank gets the codes that it would get alone."""
    joined = sinkhorn(scores.repeat(world, 1), 0.05, 3)
    torch.testing.assert_close(joined, sinkhorn(scores, 0.05, 3).repeat(world, 1), rtol=0, atol=1e-12)


def test_many_iterations_use_every_prototype_equally(rng):
    codes = sinkhorn(torch.from_numpy(cosines(rng, 12, 4)), 0.5, 200)
    torch.testing.assert_close(codes.sum(0), torch.full((4,), 3.0, dtype=torch.float64))


def test_hard_codes_are_the_largest_entries(rng):
    scores = torch.from_numpy(cosines(rng, 6, 4))
    soft, hard = sinkhorn(scores, 0.05, 3), sinkhorn(scores, 0.05, 3, hard=True)
    assert torch.equal(hard, F.one_hot(soft.argmax(1), 4).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sinkhorn_is_float32_and_finite_where_float16_overflows(dtype):
    """e^(1/0.05) is beyond float16, and at the smallest epsilon e^-80 is still a float32."""
    scores = torch.tensor([[1.0, -1.0], [-1.0, -1.0], [1.0, 1.0]], dtype=dtype)
    with torch.autocast("cpu", dtype):
        codes = sinkhorn(scores, 0.025, 3)
    assert codes.dtype == torch.float32
    assert torch.isfinite(codes).all()


def test_the_loss_has_the_value_that_the_published_code_gives():
    scores = torch.tensor(np.stack([S, S[:, ::-1] * 0.5 + 0.1, np.roll(S, 1, axis=0) * 0.8]), dtype=torch.float32)
    codes = [sinkhorn(scores[i], 0.05, 3) for i in (0, 1)]
    assert swapped_prediction(scores, codes, 0.1).item() == pytest.approx(3.766305, abs=3e-6)


@pytest.mark.parametrize(("views", "batch", "prototypes"), [(2, 1, 2), (3, 4, 5), (8, 3, 7)])
def test_the_loss_and_its_gradient_match_the_formula(rng, views, batch, prototypes):
    scores = cosines(rng, views, batch, prototypes)
    codes = [oracle.sinkhorn([scores[i]], 0.05, 3)[0] for i in (0, 1)]
    ours = torch.from_numpy(scores).requires_grad_()
    loss = swapped_prediction(ours, [torch.from_numpy(c) for c in codes], 0.1)
    loss.backward()
    np.testing.assert_allclose(loss.item(), oracle.loss(scores, codes, 0.1), rtol=1e-12)
    np.testing.assert_allclose(ours.grad, oracle.loss_gradient(scores, codes, 0.1), atol=1e-12)


def test_the_oracles_gradient_is_its_losss_slope(rng):
    scores = cosines(rng, 3, 2, 4)
    codes = [oracle.sinkhorn([scores[i]], 0.05, 3)[0] for i in (0, 1)]
    step, slope = 1e-6, np.zeros_like(scores)
    for place in np.ndindex(scores.shape):
        ends = [scores.copy(), scores.copy()]
        ends[0][place] -= step
        ends[1][place] += step
        slope[place] = (oracle.loss(ends[1], codes, 0.1) - oracle.loss(ends[0], codes, 0.1)) / (2 * step)
    np.testing.assert_allclose(oracle.loss_gradient(scores, codes, 0.1), slope, atol=1e-8)


def test_usage_entropy_is_1_for_equal_use_and_0_for_one_prototype():
    assert usage_entropy(torch.eye(4)[None]).item() == pytest.approx(1.0)
    assert usage_entropy(torch.tensor([[[0.0, 1.0, 0.0]]]).repeat(2, 5, 1)).item() == 0.0


# Whole steps


def swav(dtype=torch.float64, batch=BATCH, steps_per_epoch=1000, roles=None, **settings):
    torch.manual_seed(3)
    base = {"name": "swav", "dim": 5, "hidden": 7, "num_prototypes": 6, "freeze_prototypes": "0steps"}
    facts = RunFacts(roles or {"global": 2, "local": 3}, 0, Clock(steps_per_epoch, batch))
    return build_method({**base, **settings}, TinyBackbone().to(dtype), facts).to(dtype)


def views(step, batch=BATCH, local=3):
    """Two views of 8 px and some of 5 px."""
    generator = torch.Generator().manual_seed(step)

    def crops(count, side):
        return [torch.rand(batch, 3, side, side, generator=generator, dtype=torch.float64) for _ in range(count)]

    return {"global": crops(2, 8), "local": crops(local, 5)}


def optimizer_of(method, **settings):
    settings = {"name": "lars", "lr": LR[0], "weight_decay": 1e-3, "trust": 0.1, **settings}
    return build_optimizer(method, OptimConfig(**settings), torch.device("cpu"))


def train_steps(method, steps, views=views, model=None):
    """Five steps of the loop at most, each with the next of `LR`. Returns the losses."""
    optimizer, losses = optimizer_of(method), []
    for step in range(steps):
        set_lr(optimizer, LR[step])
        method.before_step(step)
        output = (model or method)(views(step), step)
        output.loss.backward()
        method.after_backward(step)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(output)
        losses.append(output.loss.item())
    return losses


def published_loss(z, scores, prototypes, queues, pushes, reverse=False):
    """The authors' loss of crop-major rows: queue scores, push, Sinkhorn, view by view.

    queues      a deque of past rows a view, the newest first, used when it is full
    reverse     the first view's rows are assigned in the reverse order (Un-Mix)
    """
    num_views, loss = len(z) // BATCH, 0.0
    for i in range(2):
        order = np.arange(BATCH)[::-1] if reverse and i == 0 else np.arange(BATCH)
        out, pushed = (x.detach().numpy()[i * BATCH : (i + 1) * BATCH][order] for x in (scores, z))
        if queues[i].maxlen and len(queues[i]) == queues[i].maxlen:
            out = np.concatenate([np.stack(list(queues[i])) @ prototypes.detach().numpy().T, out])
        if pushes:
            queues[i].extendleft(pushed[::-1])
        code = torch.from_numpy(oracle.sinkhorn([out], 0.05, 3)[0][-BATCH:])
        for v in range(num_views):
            if v != i:
                x = scores[v * BATCH : (v + 1) * BATCH] / 0.1
                log_p = x - x.exp().sum(1, keepdim=True).log()
                loss = loss - (code * log_p).sum(1).mean() / (num_views - 1) / 2
    return loss


def published_swav(step, crops, network, prototypes, queues, pushes):
    z = network(crops)
    return published_loss(z, z @ prototypes.T, prototypes, queues, pushes)


def published_steps(method, steps, queue_length, queue_from, freeze, loss_of_step=published_swav, views=views):
    """The authors' order of events, with LARC and SGD by hand."""
    trunk, head = copy.deepcopy(method.encoder), copy.deepcopy(method.projection_head)
    prototypes = method.prototypes.weight.detach().clone().requires_grad_()
    queues = [collections.deque(maxlen=queue_length) for _ in range(2)]
    parameters = [*trunk.parameters(), *head.parameters(), prototypes]
    velocities, losses = [None] * len(parameters), []

    def network(crops):
        sizes = sorted({len(c[0, 0]) for c in crops}, reverse=True)
        z = head(torch.cat([trunk(torch.cat([c for c in crops if len(c[0, 0]) == size])) for size in sizes]))
        return z / z.norm(dim=1, keepdim=True)

    for step in range(steps):
        with torch.no_grad():
            prototypes /= prototypes.norm(dim=1, keepdim=True)
        crops = [c for role in ("global", "local") for c in views(step)[role]]
        pushes = queue_length > 0 and step >= queue_from
        loss = loss_of_step(step, crops, network, prototypes, queues, pushes)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for n, (p, g) in enumerate(zip(parameters, gradients)):
                if p is not prototypes or step >= freeze:
                    moved, velocities[n] = oracle.larc(p.numpy(), g.numpy(), velocities[n], LR[step], 0.9, 1e-3, 0.1)
                    p.copy_(torch.from_numpy(moved))
        losses.append(loss.item())
    return {"encoder": trunk, "projection_head": head, "prototypes": prototypes, "queues": queues, "losses": losses}


def assert_same_training(method, losses, published):
    """Weights, batch norm, prototypes, both queues and every loss; float64."""
    assert losses == pytest.approx(published["losses"], rel=0, abs=1e-9)
    for part in ("encoder", "projection_head"):
        theirs = published[part].state_dict()
        for name, ours in getattr(method, part).state_dict().items():
            torch.testing.assert_close(ours, theirs[name], rtol=0, atol=1e-9, msg=name)
    torch.testing.assert_close(method.prototypes.weight, published["prototypes"], rtol=0, atol=1e-9)
    for ours, theirs in zip(method.queue, published["queues"]):
        assert len(theirs) == len(ours) == theirs.maxlen
        np.testing.assert_allclose(ours, np.array(theirs).reshape(ours.shape), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("queue_length", "queue_from"), [(0, 0), (8, 1), (11, 0)])
def test_five_steps_equal_the_published_order_of_events(queue_length, queue_from):
    """Views of two sizes; the freeze ends at step 2, and a queue that starts at step 1 is full before step 3.

    The published code pushes a view's embeddings between its queue's scores and Sinkhorn, ours after the step.
    """
    method = swav(queue_length=queue_length, queue_from=f"{queue_from}steps", freeze_prototypes="2steps")
    rows = queue_length // BATCH * BATCH
    published = published_steps(method, 5, rows, queue_from, freeze=2)
    assert_same_training(method, train_steps(method, 5), published)


def test_the_queue_matters_once_it_is_full_and_not_before():
    """A queue of two batches that starts at step 1: the losses part at step 3."""
    plain, queued = (
        train_steps(swav(queue_length=q, queue_from="1steps", freeze_prototypes="99steps"), 5) for q in (0, 8)
    )
    assert queued[:3] == plain[:3]
    assert queued[3] != plain[3]


@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 3))
def test_the_queue_is_used_exactly_when_its_length_in_steps_has_passed(batches, spare, start):
    """Kept rows are the newest, first; a length that is no multiple of the batch is rounded down."""
    method = swav(queue_length=batches * BATCH + spare, queue_from=f"{start}steps")
    deque = collections.deque(maxlen=batches * BATCH)
    for step in range(8):
        queue = Queue(method.queue, method.num_queued)
        assert queue.full == (step >= start + batches)
        z = torch.arange(2 * BATCH, dtype=torch.float64).view(2, BATCH, 1).expand(2, BATCH, 5) + 100 * step
        method.after_step(type("O", (), {"carry": method.pushed(queue, z, step)})())
        if step >= start:
            deque.extendleft(z[1, :, 0].flip(0).tolist())
    assert method.queue[1, : len(deque), 0].tolist() == list(deque)


def test_the_filling_of_a_queue_is_logged():
    method = swav(queue_length=8, queue_from="0steps")
    filled = []
    for step in range(4):
        output = method(views(step), step)
        method.after_step(output)
        filled.append(output.logs["queue_filled"].item())
    assert filled == [0.0, 0.5, 1.0, 1.0]
    assert "queue_filled" not in swav()(views(0), 0).logs


@given(st.integers(0, 4))
def test_frozen_prototypes_move_only_by_their_normalisation(freeze):
    method = swav(freeze_prototypes=f"{freeze}steps")
    expected = method.prototypes.weight.detach().clone()
    optimizer = optimizer_of(method, weight_decay=0.1)
    for step in range(4):
        expected = F.normalize(expected, dim=1)
        method.before_step(step)
        method(views(step), step).loss.backward()
        method.after_backward(step)
        optimizer.step()
        optimizer.zero_grad()
        same = torch.equal(method.prototypes.weight, expected)
        assert same == (step < freeze)
        if not same:
            break


def test_codes_are_constants_and_gradients_reach_backbone_head_and_prototypes():
    method = swav()
    output = method(views(0), 0)
    output.loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in method.named_parameters() if not n.endswith(("0.bias", "conv.bias")))
    assert not any(log.requires_grad for log in output.logs.values())


def test_views_of_one_size_share_a_batch_norm_unless_each_goes_alone():
    crops = [*views(0)["global"], *views(0)["local"]]
    merged, alone = swav(), swav(merge_crops=False)
    encoded = copy.deepcopy(alone.encoder)
    features = torch.cat([encoded(crop) for crop in crops])
    expected = F.normalize(copy.deepcopy(alone.projection_head)(features), dim=1).view(5, BATCH, -1)
    torch.testing.assert_close(alone.embed(crops), expected)
    assert not torch.allclose(merged.embed(crops), expected)
    merged.eval(), alone.eval()
    alone.load_state_dict(merged.state_dict())
    torch.testing.assert_close(alone.embed(crops), merged.embed(crops))


def test_a_network_that_knows_nothing_scores_chance():
    scores = torch.zeros(4, 3, 6, dtype=torch.float64)
    codes = [sinkhorn(scores[i], 0.05, 3) for i in (0, 1)]
    assert swapped_prediction(scores, codes, 0.1).item() == pytest.approx(swav().chance_level())
    assert swav().chance_level() == pytest.approx(math.log(6))


def test_resnet_50_has_the_published_number_of_parameters_and_tensors():
    with torch.device("meta"):
        backbone = build_encoder("resnet50")
    method = build_method(config.load(["method=swav", "data.root=x"]).method, backbone, RunFacts({"global": 2}))
    assert sum(p.numel() for p in method.parameters()) == 28_354_752
    assert len(method.state_dict()) == 328


# Settings


def schedule(overrides, steps_per_epoch, epochs):
    cfg = config.load([*overrides, "data.root=x"])
    clock = Clock(steps_per_epoch, cfg.run.batch_size)
    return cfg, learning_rate(cfg.optim, clock, epochs * steps_per_epoch)


def test_the_recipe_of_batch_4096_has_the_published_learning_rates():
    cfg, lr = schedule(["recipe=swav_4096"], 312, 100)
    at = [lr(t) for t in (0, 1, 3119, 3120, 15600, 31199)]
    assert at == pytest.approx([0.3, 0.301442771, 4.8, 4.8, 2.818738871, 0.004800015], rel=1e-7)
    assert (cfg.run.duration, cfg.method["queue_length"], cfg.method["freeze_prototypes"]) == ("100ep", 0, "313steps")


def test_the_recipe_of_batch_256_has_the_published_learning_rates_and_queue():
    cfg, lr = schedule(["recipe=swav_256"], 5004, 200)
    assert cfg.run.duration == "200ep"
    at = [lr(t) for t in (0, 5004, 500400, 1000799)]
    assert at == pytest.approx([0.6, 0.599963027, 0.3003, 0.0006000000015], rel=1e-8)
    assert (cfg.method["queue_length"], cfg.method["queue_from"]) == (3840, "15ep")
    assert cfg.method["freeze_prototypes"] == "5005steps"
    assert cfg.data.std == (0.228, 0.224, 0.225)


@pytest.mark.parametrize(
    ("recipe", "batch", "epochs", "queue", "queue_from", "freeze"),
    [
        ("swav_4096", 4096, "100ep", 0, "15ep", "313steps"),
        ("swav_256", 256, "200ep", 3840, "15ep", "5005steps"),
        ("swav_w2", 4096, "400ep", 0, "15ep", "313steps"),
        ("swav_w4", 2560, "400ep", 2560, "0ep", "313steps"),
    ],
)
def test_recipes_hold_the_published_queue_and_length(recipe, batch, epochs, queue, queue_from, freeze):
    cfg = config.load([f"recipe={recipe}", "data.root=x"])
    assert (cfg.run.batch_size, cfg.run.duration) == (batch, epochs)
    keys = ("queue_length", "queue_from", "freeze_prototypes")
    assert tuple(cfg.method[key] for key in keys) == (queue, queue_from, freeze)
    assert cfg.optim.lr == (0.6 if batch == 256 else 4.8)
    assert cfg.optim.warmup == ("0steps" if batch == 256 else "10ep")
    assert cfg.data.std == (0.228, 0.224, 0.225)


@pytest.mark.parametrize(
    ("preset", "crops", "hidden"),
    [
        ("swav_2x224", [(2, 224, (0.08, 1.0))], 2048),
        ("swav", [(2, 224, (0.14, 1.0)), (6, 96, (0.05, 0.14))], 2048),
        ("swav_w2", [(2, 224, (0.14, 1.0)), (4, 96, (0.05, 0.14))], 8192),
        ("swav_w4", [(2, 224, (0.08, 1.0)), (4, 96, (0.08, 0.14))], 8192),
    ],
)
def test_presets_hold_the_published_crops_and_chain(preset, crops, hidden):
    cfg = config.load([f"method={preset}", "data.root=x"])
    specs = cfg.view_specs()
    assert [(s.count, s.size, s.scale) for s in specs] == crops
    assert cfg.method["hidden"] == hidden
    assert (cfg.optim.name, cfg.optim.weight_decay, cfg.optim.weight_decay_on, cfg.optim.trust) == (
        "lars", 1e-6, "all", 0.001,
    )  # fmt: skip
    for spec in specs:
        chain = spec.augment
        assert (chain.brightness, chain.contrast, chain.saturation, chain.hue) == (0.8, 0.8, 0.8, 0.2)
        assert (chain.jitter_p, chain.grayscale_p, chain.blur_p, chain.flip_p) == (0.8, 0.2, 0.5, 0.5)


def test_a_preset_lists_every_setting_of_the_method():
    assert config.load(["method=swav", "data.root=x"]).method == SwavConfig().__dict__


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"epsilon": 0.01}, "method.epsilon is 0.01, but must be 0.025 or more"),
        ({"num_prototypes": 1}, "method.num_prototypes is 1"),
        ({"sinkhorn_iterations": 0}, "method.sinkhorn_iterations is 0"),
        ({"queue_length": -1}, "method.queue_length is -1"),
        ({"queue_from": "soon"}, "method.queue_from is 'soon'"),
        ({"roles": {"query": 1, "key": 1}}, "method swav reads 2 global, 0 or more local"),
        ({"roles": {"global": 3}}, "method swav reads 2 global"),
    ],
)
def test_a_wrong_setting_is_answered_by_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        swav(**settings)


def test_a_batch_smaller_than_the_prototypes_and_an_odd_queue_are_advised_against():
    assert swav(batch=4, queue_length=4).advice() == []
    (few,) = swav(batch=4).advice()
    assert "run.batch_size 4 and a queue of 0 are fewer than method.num_prototypes 6" in few
    (odd,) = swav(batch=4, queue_length=11).advice()
    assert "method.queue_length 11 is not a multiple of run.batch_size 4; the queue holds 8" in odd
    assert "the queue is left out" in swav(batch=128, queue_length=120).advice()[0]


# Ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    code, _, err = finish(start("tests.fastssl.two_ranks_swav", [str(folder)], ranks=2))
    assert code == 0, err
    return [torch.load(folder / f"rank-{r}.pt", weights_only=True) for r in (0, 1)]


@pytest.mark.dist
def test_codes_of_two_ranks_are_those_of_the_joined_batch(ranks):
    scores = np.random.default_rng(5).uniform(-1, 1, (2, 6, 5))
    for rank, expected in zip(ranks, oracle.sinkhorn(list(scores), 0.05, 3)):
        np.testing.assert_allclose(rank["codes"], expected, rtol=0, atol=1e-12)


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["eval", "sync", "queue"])
def test_two_ranks_equal_one_on_the_joined_batch(ranks, kind):
    """Five steps in float64, with a freeze; batch norm in eval, or synchronised in training, and then with a queue.

    Each rank queues its own rows, and Sinkhorn balances those of all ranks: the same rows as one process holds.
    """
    from tests.fastssl.two_ranks_swav import five_steps

    alone = five_steps(kind)
    for name, expected in alone["model"].items():
        torch.testing.assert_close(ranks[0][kind]["model"][name], expected, rtol=0, atol=1e-9, msg=name)
        assert torch.equal(ranks[0][kind]["model"][name], ranks[1][kind]["model"][name]), name
    if kind == "queue":
        halves = [r[kind]["queue"].unflatten(1, (-1, BATCH // 2)) for r in ranks]  # pushes of half a batch each
        joined = torch.cat(halves, 2).flatten(1, 2)
        torch.testing.assert_close(joined, alone["queue"], rtol=0, atol=1e-9)
        assert not torch.equal(ranks[0][kind]["queue"], ranks[1][kind]["queue"])


@pytest.mark.dist
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 2)])
def test_synchronised_batch_norm_is_batch_norm_of_the_joined_batch(ranks, shape):
    """Output, running statistics and all gradients, with another loss on each rank."""
    from tests.fastssl.two_ranks_swav import batch_norm_facts

    plain = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(3).double()
    expected = batch_norm_facts(plain, shape)
    ours = [r[f"batch_norm_{len(shape)}"] for r in ranks]
    for name in ("output", "gradient"):
        torch.testing.assert_close(torch.cat([r[name] for r in ours]), expected[name], rtol=0, atol=1e-12)
    for name in ("weight", "bias"):
        torch.testing.assert_close(sum(r[name] for r in ours), expected[name], rtol=1e-14, atol=1e-12)
    for name in ("running_mean", "running_var", "num_batches_tracked", "evaluated"):
        for r in ours:
            torch.testing.assert_close(r[name], expected[name], rtol=0, atol=1e-12)


@pytest.mark.dist
def test_moco_with_synchronised_batch_norm_on_two_ranks_equals_one(ranks):
    from tests.fastssl.two_ranks_swav import moco_steps

    for name, expected in moco_steps().items():
        torch.testing.assert_close(ranks[1]["moco"][name], expected, rtol=0, atol=1e-9, msg=name)


def test_a_batch_norm_of_another_kind_cannot_be_synchronised():
    from fastssl.nn.sync_batchnorm import sync_batchnorm_

    with pytest.raises(ValueError, match=r"method\.batch_norm is 'sync', but the encoder has a BatchNorm3d"):
        sync_batchnorm_(nn.Sequential(nn.BatchNorm3d(2)))


# Runs


def settings(shards, run_dir, *more):
    """Seven steps an epoch, 12 in all: frozen for 5, a queue of two batches from step 2."""
    return [
        "method=swav", "encoder=resnet10_narrow", "encoder.width=0.25", "encoder.stem=small", "method.dim=8",
        "method.hidden=16", "method.num_prototypes=20", "method.queue_length=16", "method.queue_from=2steps",
        "method.freeze_prototypes=5steps", "views.global.size=32", "views.local.size=16", "views.local.count=2",
        "optim=lars_swav_256", f"data.root={shards}", f"run.dir={run_dir}", "run.device=cpu", "run.batch_size=8",
        "run.duration=12steps", "run.log_every=3", "run.save_every=2steps", "run.threads=1", "loader.threads=1", *more,
    ]  # fmt: skip


def run(*arguments):
    return train.run(config.load(settings(*arguments)))


def rank_states(run_dir):
    files = sorted(checkpoint.find(run_dir).glob("rank-*.pt"))
    return [torch.load(file, weights_only=True)["method"] for file in files]


def assert_same_run(a, b):
    """Bit for bit: weights, batch norm, optimiser, and each rank's queue."""
    assert_same_state(a, b)
    for left, right in zip(rank_states(a), rank_states(b), strict=True):
        assert left.keys() == right.keys() == {"queue", "num_queued"}
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_run_in_pieces_equals_one_run_bit_for_bit(tiny_shards, tmp_path, capsys):
    """Cut while the prototypes are frozen and the queue half full, and again when it is in use."""
    once, pieces = tmp_path / "once", tmp_path / "pieces"
    assert run(tiny_shards, once) == 0
    said = capsys.readouterr().err
    assert "a loss of 2.996 is chance level" in said
    assert "warning" not in said
    for cut in ("run.stop_after=3steps", "run.stop_after=8steps", "run.log_every=3"):
        assert run(tiny_shards, pieces, cut) == 0
    assert_same_run(once, pieces)
    lines = read_metrics(once)
    assert {"loss", "feature_std", "prototype_entropy", "queue_filled"} <= lines[0].keys()
    assert lines[-1]["queue_filled"] == 1.0
    assert rank_states(once)[0]["queue"].shape == (2, 16, 8)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_starts_near_float32_and_stays_finite(tiny_shards, tmp_path, precision):
    first = {name: first_loss(tiny_shards, name) for name in ("fp32", precision)}
    assert first[precision] == pytest.approx(first["fp32"], abs=0.1)
    assert first[precision] != first["fp32"]
    assert run(tiny_shards, tmp_path, f"run.precision={precision}", "run.log_every=1", "run.duration=28steps") == 0
    lines = read_metrics(tmp_path)
    assert lines[0]["rejected_steps"] == (precision == "fp16")  # until the scale of gradients has come down
    assert lines[-1]["rejected_steps"] == 0
    assert np.isfinite([line["loss"] for line in lines if not line["rejected_steps"]]).all()


def first_loss(shards, precision):
    cfg = config.load(settings(shards, "unused", f"run.precision={precision}"))
    training = Training.build(cfg, torch.device("cpu"), Clock(7, 8))
    with train.open_loader(cfg, cfg.data.manifest(), training.device) as loader:
        views = to_device(next(loader.batches(0)), cfg, training.device)
    return training.step(views, 0, 0.01).loss.item()


def queues_after(steps, batch, length, world):
    """The plain model: a deque a rank; a step puts its rank's part of the global batch in front. Row = its number."""
    queues = [collections.deque(maxlen=length // world) for _ in range(world)]
    for step in range(steps):
        for rank, queue in enumerate(queues):
            first, share = step * batch + rank * (batch // world) + 1, batch // world
            queue.extendleft(range(first + share - 1, first - 1, -1))
    return [list(queue) for queue in queues]


def held(queue, length):
    """The plain queue as a method's tensors: 2 views, width 3, zeros where nothing is yet."""
    rows = torch.tensor(queue + [0] * (length - len(queue)), dtype=torch.float32)
    return {"queue": torch.stack([rows, -rows])[..., None].repeat(1, 1, 3), "num_queued": torch.tensor(len(queue))}


@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1), (4, 2), (2, 4), (1, 4), (4, 1), (8, 2), (2, 2), (3, 6)])
@pytest.mark.parametrize("steps", [0, 1, 2, 5, 9])
def test_a_queue_dealt_to_other_ranks_is_what_they_would_have_gathered(monkeypatch, before, now, steps):
    batch, length = 24, 120  # five steps fill it
    states = [held(queue, length // before) for queue in queues_after(steps, batch, length, before)]
    for rank, expected in enumerate(queues_after(steps, batch, length, now)):
        monkeypatch.setattr(swav_module.dist, "world", lambda: now)
        monkeypatch.setattr(swav_module.dist, "rank", lambda rank=rank: rank)
        own = swav(torch.float32, batch, dim=3, queue_length=length, batch_norm="plain")
        assert own.load_rank_states(states) is None
        want = held(expected, length // now)
        assert torch.equal(own.queue, want["queue"])
        assert int(own.num_queued) == len(expected)


def test_queues_of_unequal_ranks_cannot_be_dealt_and_the_sentence_says_what_that_costs(monkeypatch):
    states = [held(list(range(1, 5)), 8), held(list(range(1, 9)), 8)]
    own = swav(torch.float32, 8, dim=3, queue_length=16)
    said = own.load_rank_states(states)
    assert said is not None
    assert said.startswith("the queues of the 2 ranks before cannot be dealt to 1; the queue starts empty")
    assert said.endswith("until 2 steps have filled it")
    assert int(own.num_queued) == 0
    assert not own.queue.any()


def test_one_rank_deals_to_itself_what_it_has():
    rows = torch.randn(2, 12, 3)
    assert torch.equal(redealt([rows], 4, 1)[0], rows)


@pytest.mark.dist
def test_two_ranks_resume_exactly_and_one_rank_gets_both_queues(tiny_shards, tmp_path, capsys):
    once, cut, alone = (tmp_path / name for name in ("once", "cut", "alone"))
    for folder, more in ((once, []), (cut, ["run.stop_after=7steps"]), (cut, [])):
        code, _, err = finish(start("fastssl.train", settings(tiny_shards, folder, *more), 2))
        assert code == 0, err
        if more:
            shutil.copytree(cut, alone)
    assert_same_run(once, cut)
    assert [s["queue"].shape for s in rank_states(once)] == [(2, 8, 8)] * 2
    before = rank_states(alone)
    assert run(tiny_shards, alone, "run.stop_after=8steps") == 0
    assert "queue" not in "".join(line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert rank_states(alone)[0]["num_queued"] == 16  # full, and the 8 of this step in front of the 2 x 4 of the last
    kept = torch.cat([state["queue"][:, :4] for state in before], 1)
    assert torch.equal(rank_states(alone)[0]["queue"][:, 8:], kept)
