"""CLSA: losses against NumPy, whole steps against the published order of events, what must hold for any batch.

Two ranks are in test_two_ranks.py.
"""

import collections
import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl import config, dist, train
from fastssl.log import read_metrics
from fastssl.losses import info_nce
from fastssl.methods import RunFacts, build_method
from fastssl.methods.clsa import contrast_and_match
from fastssl.schedule import Clock
from tests.fastssl.runs import settings as run_settings
from tests.fastssl.test_losses import unit
from tests.fastssl.test_moco import TinyBackbone
from tests.oracle import clsa as oracle

BATCH = 4
SIZES = {"key": [8], "query": [8, 10], "strong": [6, 10, 7]}
quick = settings(max_examples=40, deadline=None)


def clsa(seed=0, sizes=SIZES, batch=BATCH, **settings):
    torch.manual_seed(3)
    base = {"name": "clsa", "dim": 5, "queue_length": 11, "momentum": 0.9, "split_groups": 2}
    base |= {"temperature": 0.2, "strong_temperature": 0.3, "alpha": 0.7}
    facts = RunFacts({role: len(s) for role, s in sizes.items()}, seed, Clock(100, batch))
    return build_method({**base, **settings}, TinyBackbone().double(), facts).double()


def views(step, sizes=SIZES, batch=BATCH):
    generator = torch.Generator().manual_seed(step)
    return {
        role: [torch.rand(batch, 3, side, side, generator=generator, dtype=torch.float64) for side in sides]
        for role, sides in sizes.items()
    }


def train_steps(method, steps, lr=0.1):
    optimizer = torch.optim.SGD(method.encoder_q.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    for step in range(steps):
        method.before_step(step)
        output = method(views(step), step)
        optimizer.zero_grad()
        output.loss.backward()
        method.after_backward(step)
        optimizer.step()
        method.after_step(output)
    return output


def candidates(rng, weak, strong, batch, others, queue, width=6):
    """Random unit queries of each view, keys of all ranks, a queue, as NumPy arrays."""
    rows = [unit(rng, batch, width) for _ in range(weak + strong)]
    return rows[:weak], rows[weak:], unit(rng, batch + others, width), unit(rng, queue, width)


def as_torch(*parts):
    return [[torch.from_numpy(x) for x in part] if isinstance(part, list) else torch.from_numpy(part) for part in parts]


# --- the losses


@quick
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(0, 4), st.integers(1, 9),
    st.floats(0.05, 1.0), st.floats(0.05, 1.0), st.integers(0, 99),
)  # fmt: skip
def test_both_losses_and_their_gradients_match_numpy(weak, strong, batch, others, queue, t, t2, seed):
    w, s, keys, negatives = candidates(np.random.default_rng(seed), weak, strong, batch, others, queue)
    weak_t, strong_t, keys_t, queue_t = as_torch(w, s, keys, negatives)
    for x in [*weak_t, *strong_t]:
        x.requires_grad_()
    contrast, match, _ = contrast_and_match(weak_t, strong_t, keys_t, queue_t, others, t, t2)
    (contrast + 0.3 * match).backward()
    both = np.concatenate([keys, negatives])
    np.testing.assert_allclose([contrast.item(), match.item()], oracle.loss(w, s, both, others, t, t2), rtol=1e-11)
    to_weak, to_strong = oracle.gradients(w, s, both, others, t, t2)
    for x, expected in zip(weak_t, to_weak):
        np.testing.assert_allclose(x.grad.numpy(), expected, atol=1e-11)
    for x, expected in zip(strong_t, to_strong):
        np.testing.assert_allclose(x.grad.numpy(), 0.3 * expected, atol=1e-11)


def test_both_losses_have_the_values_that_the_published_code_gives():
    """Cosines given outright: with the axes for candidates, a query's coordinates are its cosines."""
    weak = torch.tensor([[0.8, 0.1, -0.3, 0.2], [0.0, 0.7, 0.4, -0.5]])
    strong = torch.tensor([[0.5, 0.2, -0.1, 0.1], [0.1, 0.3, 0.6, -0.4]])
    axes = torch.eye(4)
    contrast, match, _ = contrast_and_match([weak], [strong], axes[:2], axes[2:], 0, 0.2, 0.2)
    entropy = contrast_and_match([weak], [weak], axes[:2], axes[2:], 0, 0.2, 0.2)[1]
    assert contrast.item() == pytest.approx(0.154251, abs=1e-6)
    assert match.item() == pytest.approx(1.011624, abs=1e-6)
    assert (match - entropy).item() == pytest.approx(0.548108, abs=1e-6)


@quick
@given(st.integers(1, 5), st.integers(0, 4), st.integers(1, 9), st.floats(0.05, 1.0), st.integers(0, 99))
def test_the_contrast_is_mocos_with_the_other_keys_of_the_batch_as_negatives(batch, others, queue, t, seed):
    w, s, keys, negatives = candidates(np.random.default_rng(seed), 1, 1, batch, others, queue)
    (query,), s, keys, negatives = as_torch(w, s, keys, negatives)
    contrast, _, logs = contrast_and_match([query], s, keys, negatives, others, t, 0.2)
    rows = []
    for i in range(batch):
        rest = torch.cat([keys[: others + i], keys[others + i + 1 :], negatives])
        rows.append(info_nce(query[i : i + 1], keys[others + i : others + i + 1], rest, t))
    assert contrast.item() == pytest.approx(np.mean([loss.item() for loss, _ in rows]), rel=1e-11, abs=1e-12)
    assert logs["contrast_top1"].item() == pytest.approx(np.mean([log["contrast_top1"].item() for _, log in rows]))
    positives = np.mean([log["positive_similarity"].item() for _, log in rows])
    assert logs["positive_similarity"].item() == pytest.approx(positives, abs=1e-12)
    assert logs["negative_similarity"].item() == pytest.approx((query @ negatives.T).mean().item(), abs=1e-12)


@quick
@given(st.integers(1, 5), st.integers(1, 9), st.floats(0.05, 1.0), st.integers(0, 99))
def test_no_strong_view_matches_a_weak_one_better_than_itself(batch, queue, t, seed):
    """Gibbs: cross-entropy is at least the entropy, which a view equal to its target reaches with gradient 0."""
    (query,), (strong,), keys, negatives = as_torch(*candidates(np.random.default_rng(seed), 1, 1, batch, 0, queue))
    same = query.clone().requires_grad_()
    _, least, _ = contrast_and_match([query], [same], keys, negatives, 0, 0.2, t)
    _, match, _ = contrast_and_match([query], [strong], keys, negatives, 0, 0.2, t)
    least.backward()
    assert match.item() >= least.item() - 1e-12
    assert same.grad.abs().max() < 1e-12 / t


def test_half_precision_queries_give_finite_float32_losses():
    rows = torch.nn.functional.normalize(torch.ones(4, 8)).half()
    contrast, match, _ = contrast_and_match([rows], [rows], -rows, -rows, 0, 0.001, 0.001)
    assert contrast.dtype == match.dtype == torch.float32
    assert torch.isfinite(contrast)
    assert torch.isfinite(match)


# --- whole steps


def published_steps(method, steps, lr=0.1):
    """The authors' order: weak, (key image), strong, EMA, keys, (second keys), the grid of terms, enqueue, SGD.

    Logits are joined and scored for every pair, and DDM takes the log of the softmax. Batch norm in one group.
    """
    c = method.config
    q, k = copy.deepcopy(method.encoder_q), copy.deepcopy(method.encoder_k)
    queue = collections.deque(method.queue.clone(), maxlen=len(method.queue))
    place = 0
    velocity = [torch.zeros_like(p) for p in q.parameters()]

    def nrm(x):
        return x / x.norm(dim=1, keepdim=True)

    def logits(x, keys):
        return torch.cat([x @ keys.T, x @ torch.stack(list(queue)).T], 1)

    for step in range(steps):
        v = views(step)
        weak = [nrm(q(x)) for x in v["query"]]
        if c.symmetric:
            weak.append(nrm(q(v["key"][0])))
        strong = [nrm(q(x)) for x in v["strong"]]
        with torch.no_grad():
            for pk, pq in zip(k.parameters(), q.parameters()):
                pk.copy_(0.9 * pk + 0.1 * pq)
            keys = [nrm(k(v["key"][0]))]
            if c.symmetric:
                second = nrm(k(v["query"][0]))
                if c.variant == "reference":
                    second = second[dist.shuffled_places(BATCH, method.seed, 2 * step).argsort()]
                keys.append(second)
        grid = [(x, keys[0]) for x in weak[: len(v["query"])]]
        if c.symmetric:
            grid += [(x, keys[1]) for x in weak[1:]]
        contrasts, pairs = [], []
        for x, key in grid:
            contrasts.append(-torch.log(torch.softmax(logits(x, key) / c.temperature, 1).diagonal()).mean())
            target = torch.softmax(logits(x, key) / c.strong_temperature, 1).detach()
            for y in strong:
                p = torch.softmax(logits(y, key) / c.strong_temperature, 1)
                pairs.append(-(target * torch.log(p)).sum(1).mean())
        scale = (len(contrasts), len(pairs)) if c.normalize_terms else (1, 1)
        loss = sum(contrasts) / scale[0] + c.alpha * sum(pairs) / scale[1]
        grads = torch.autograd.grad(loss, list(q.parameters()))
        enqueued = keys[-1:] if c.enqueue == "second" else keys[::-1]
        with torch.no_grad():
            for key in torch.cat(enqueued):
                queue[place % len(queue)] = key
                place += 1
            for p, g, m in zip(q.parameters(), grads, velocity):
                m.mul_(0.9).add_(g + 1e-4 * p)
                p.sub_(lr * m)
    return q, k, torch.stack(list(queue)), loss


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"normalize_terms": True},
        {"symmetric": True},
        {"symmetric": True, "variant": "reference"},
        {"symmetric": True, "enqueue": "both", "normalize_terms": True},
    ],
)
def test_five_steps_equal_the_published_order_of_events(form):
    method = clsa(split_groups=1, **form)
    expected = published_steps(method, 5)
    output = train_steps(method, 5)
    for ours, theirs in zip((method.encoder_q, method.encoder_k), expected):
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=name)
    torch.testing.assert_close(method.queue, expected[2], rtol=0, atol=1e-9)
    torch.testing.assert_close(output.loss, expected[3], rtol=0, atol=1e-9)


def test_key_encoder_and_queue_take_no_gradient():
    method = clsa(symmetric=True)
    method(views(0), 0).loss.backward()
    assert all(p.grad is None for p in method.encoder_k.parameters())
    assert all(p.grad is not None for p in method.encoder_q.parameters())


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_loss_does_not_depend_on_the_shuffle_when_batch_norm_is_in_eval(symmetric):
    losses = [clsa(seed=seed, symmetric=symmetric).eval()(views(0), 0).loss.item() for seed in (0, 1, 2)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12) == pytest.approx(losses[2], abs=1e-12)


@quick
@given(st.integers(0, 2**32), st.integers(0, 1000))
def test_second_keys_lie_beside_their_queries_in_the_corrected_form_only(seed, step):
    """Weak image = key image, equal encoders: every query's best candidate is its own key unless rows were permuted."""
    same = views(5, {"key": [8]})["key"][0]
    batch = {"key": [same], "query": [same], "strong": [same]}
    sizes = {"key": [8], "query": [8], "strong": [8]}
    order = dist.shuffled_places(BATCH, seed, 2 * step)
    in_place = (order == torch.arange(BATCH)).double().mean().item()
    for variant, second_half in (("corrected", 1.0), ("reference", in_place)):
        logs = clsa(seed, sizes, symmetric=True, variant=variant).eval()(batch, step).logs
        assert logs["contrast_top1"].item() == pytest.approx((1.0 + second_half) / 2)


@pytest.mark.parametrize("symmetric", [False, True])
def test_views_of_one_size_may_pass_together_without_changing_the_loss_in_eval(symmetric):
    apart, together = (clsa(merge_equal_sizes=m, symmetric=symmetric).eval() for m in (False, True))
    forwards = []
    for method in (apart, together):
        calls = []
        method.encoder_q.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        forwards.append((method(views(0), 0).loss.item(), len(calls)))
    assert forwards[0][0] == pytest.approx(forwards[1][0], abs=1e-12)
    assert forwards[0][1] == 5 + symmetric
    assert forwards[1][1] == 4  # 6, 7, 8 and 10 px


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("normalize_terms", [False, True])
def test_features_that_know_nothing_score_chance(symmetric, normalize_terms):
    method = clsa(symmetric=symmetric, normalize_terms=normalize_terms, momentum=0.0)
    with torch.no_grad():
        method.encoder_q.head[-1].weight.zero_()
        method.queue.copy_(torch.nn.functional.normalize(method.encoder_q.head[-1].bias, dim=0).expand(11, 5))
    method.before_step(0)
    output = method(views(0), 0)
    assert output.loss.item() == pytest.approx(method.chance_level())
    terms = (1, 1) if normalize_terms else (2 * (1 + symmetric), 6 * (1 + symmetric))
    assert method.chance_level() == pytest.approx((terms[0] + 0.7 * terms[1]) * math.log(11 + BATCH))
    parts = output.logs["contrast_loss"] + 0.7 * output.logs["ddm_loss"]
    assert parts.item() == pytest.approx(output.loss.item())
    assert output.logs["feature_std"].item() == pytest.approx(0.0, abs=1e-7)


def test_labels_follow_the_global_rank_unless_the_authors_slip_is_asked_for(monkeypatch):
    """The second rank of a run with one GPU a host."""
    keys = torch.from_numpy(unit(np.random.default_rng(0), 2 * BATCH, 5))
    monkeypatch.setattr(dist, "rank", lambda: 1)
    monkeypatch.setattr(dist, "local_rank", lambda: 0)
    for variant, place in (("corrected", BATCH), ("reference", 0)):
        method = clsa(variant=variant).eval()
        method.keys = lambda view, draw: keys
        queries = [method.queries(v) for v in views(0)["query"]]
        expected = oracle.loss(
            [q.detach().numpy() for q in queries], [], torch.cat([keys, method.queue]).numpy(), place, 0.2, 0.3
        )[0]
        assert method(views(0), 0).logs["contrast_loss"].item() == pytest.approx(expected, rel=1e-9)


# --- settings


@pytest.mark.parametrize("symmetric", [False, True])
def test_presets_hold_the_published_values_and_make_only_the_picked_views(symmetric):
    names = ("clsa_sym", "clsa_multi_sym") if symmetric else ("clsa_single", "clsa_multi")
    single, multi = (config.load([f"method={name}", "data.root=x"]) for name in names)
    assert single.method == multi.method
    assert {k: single.method[k] for k in ("temperature", "strong_temperature", "alpha", "symmetric")} == {
        "temperature": 0.2, "strong_temperature": 0.2, "alpha": 1.0, "symmetric": symmetric,
    }  # fmt: skip
    assert (single.optim.lr, single.optim.schedule, single.optim.schedule_per) == (0.03, "cosine", "epoch")
    crops = [
        (224, (0.2, 1.0)),
        (192, (0.172, 0.86)),
        (160, (0.143, 0.715)),
        (128, (0.114, 0.571)),
        (96, (0.086, 0.429)),
    ]
    key, weak, strong = ("key", 0, *crops[0]), [("query", 0, *c) for c in crops], [("strong", 5, *c) for c in crops]
    made = [[(v.role, v.augment.strong_draws, v.size, v.scale) for v in c.view_specs()] for c in (single, multi)]
    assert made == [[key, weak[0], strong[4]], [key, *weak, *strong]]
    assert {v.augment.blur_p for v in multi.view_specs()} == {0.5}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"strong_temperature": 0.0}, r"method\.strong_temperature is 0\.0, but must be above 0"),
        ({"alpha": -1.0}, r"method\.alpha is -1\.0, but must be 0 or more"),
        ({"variant": "authors"}, r"method\.variant is 'authors', but must be one of reference, corrected"),
    ],
)
def test_a_wrong_setting_is_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        clsa(**settings)


def test_a_run_without_strong_views_is_refused():
    with pytest.raises(ValueError, match="method clsa reads 1 key, 1 or more query, 1 or more strong"):
        clsa(sizes={"key": [8], "query": [8]})


def test_a_run_from_the_command_line_logs_both_losses(tiny_shards, tmp_path):
    sizes = ["views.key.size=32", "views.strong.size=24", "method.merge_equal_sizes=true", "run.duration=4steps"]
    assert train.run(config.load(["method=clsa_single", *run_settings(tiny_shards, tmp_path, *sizes)])) == 0
    last = read_metrics(tmp_path)[-1]
    assert last["loss"] == pytest.approx(last["contrast_loss"] + last["ddm_loss"], rel=1e-5)
    assert last["queue_filled"] == 1.0
