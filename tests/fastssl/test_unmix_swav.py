"""Un-Mix on SwAV: whole steps against second statements of both variants, what mixing must keep, resume and ranks."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastssl import config, train
from fastssl.methods import RunFacts, build_method
from fastssl.methods.unmix_swav import UnmixSwavConfig, mixed_prediction, original_and_mixed
from fastssl.mixing import MixingConfig, draw_mixture, mix
from fastssl.nn.encoder import build_encoder
from fastssl.schedule import Clock, learning_rate
from tests.fastssl import test_swav
from tests.fastssl.runs import finish, start
from tests.fastssl.test_swav import BATCH, assert_same_run, assert_same_training, published_steps, train_steps
from tests.oracle import swav as oracle

SEED = 4
REGION, HALF = {"global_p": 0.0, "beta": 1.0}, {"global_p": 0.5, "beta": 1.0}


def unmix(variant="reference", mixing=REGION, local=2, **settings):
    torch.manual_seed(3)
    facts = RunFacts({"global": 2, "local": local}, SEED, Clock(1000, BATCH))
    base = {"name": "unmix_swav", "dim": 5, "hidden": 7, "num_prototypes": 6, "freeze_prototypes": "2steps"}
    backbone = test_swav.TinyBackbone().double()
    return build_method({**base, "variant": variant, "mixing": mixing, **settings}, backbone, facts).double()


def views(step, local=2):
    return test_swav.views(step, local=local)


def mixtures_of(crops, step, mixing, drift):
    """Each pair's mixture by the draws of `fastssl.mixing`, and lambda as it stands after each pair."""
    first = draw_mixture(MixingConfig(**mixing), SEED, 2 * step)
    lam, images, lams = first.lam, [], []
    for pair in range(2):
        centre = draw_mixture(MixingConfig(**mixing), SEED, 2 * step + pair).centre
        mixed, after = mix(crops[2 * pair], dataclasses.replace(first, lam=lam, centre=centre))
        lam = after if drift else lam
        images.append(mixed)
        lams.append(after)
    return images, lams


def rows(z, *order):
    """Crop-major rows of the network's c0 c1 m0 c2 c3 m1, in another order of crops."""
    return torch.cat([z.view(6, BATCH, -1)[i] for i in order])


def published_unmix(mixing):
    """The authors' code: three SwAV losses, each with its own pushes, lambda of the last pair."""

    def loss_of_step(step, crops, network, prototypes, queues, pushes):
        (m0, m1), lams = mixtures_of(crops, step, mixing, drift=True)
        z = network([crops[0], crops[1], m0, crops[2], crops[3], m1])
        total = 0.0
        for weight, order, reverse in (
            (1.0, (0, 1, 3, 4), False),
            (lams[1], (2, 1, 5, 4), False),
            (1.0 - lams[1], (2, 1, 5, 4), True),
        ):
            z_set = rows(z, *order)
            loss = test_swav.published_loss(z_set, z_set @ prototypes.T, prototypes, queues, pushes, reverse)
            total = total + weight * loss
        return total

    return loss_of_step


def formula_unmix(mixing):
    """The authors' formula, lambda (l(z_m, q_s) + l(z_s, q_m)) + (1 - lambda) (l(z_rm, q_s) + l(z_s, q_rm)).

    Written for every pair of a predicting view and a code, with reversed mixtures as views of their own.
    """

    def loss_of_step(step, crops, network, prototypes, queues, pushes):
        (m0, m1), lams = mixtures_of(crops, step, mixing, drift=False)
        z = network([crops[0], crops[1], m0, crops[2], crops[3], m1])
        held = [np.array(q) for q in queues]
        plain = rows(z, 0, 1, 3, 4)
        total = test_swav.published_loss(plain, plain @ prototypes.T, prototypes, queues, pushes)

        def code(i, s):
            out = s.detach().numpy()
            if queues[i].maxlen and len(held[i]) == queues[i].maxlen:
                out = np.concatenate([held[i] @ prototypes.detach().numpy().T, out])
            return torch.from_numpy(oracle.sinkhorn([out], 0.05, 3)[0][-BATCH:])

        def ell(s, q):
            return -(q * torch.log_softmax(s / 0.1, 1)).sum(1).mean()

        s = (z @ prototypes.T).view(6, BATCH, -1)
        clean, mixed = {1: s[1], 3: s[4]}, {0: s[2], 2: s[5]}
        for turned in (False, True):
            m = {v: x.flip(0) if turned else x for v, x in mixed.items()}
            weight = {v: 1.0 - lams[v // 2] if turned else lams[v // 2] for v in mixed}
            of_m0, of_c1 = code(0, mixed[0]), code(1, s[1])
            of_m0 = of_m0.flip(0) if turned else of_m0
            terms = [weight[0] * ell(clean[v], of_m0) for v in (1, 3)]
            terms += [weight[v] * ell(m[v], of_c1) for v in (0, 2)]
            terms += [0.5 * ell(m[2], of_m0), 0.5 * ell(clean[3], of_c1)]
            total = total + sum(terms) / 3 / 2
        return total

    return loss_of_step


@pytest.mark.parametrize("mixing", [REGION, HALF])
@pytest.mark.parametrize("queue_length", [0, 8, 20])
def test_five_reference_steps_equal_the_authors_order_of_events(queue_length, mixing):
    """A queue of two batches fills within the first step that pushes; one of five, in the middle of the second."""
    method = unmix(mixing=mixing, queue_length=queue_length, queue_from="1steps")
    published = published_steps(method, 5, queue_length, 1, 2, published_unmix(mixing), views)
    assert_same_training(method, train_steps(method, 5, views), published)


@pytest.mark.parametrize("mixing", [REGION, HALF])
@pytest.mark.parametrize("queue_length", [0, 8])
def test_five_corrected_steps_equal_the_authors_formula(queue_length, mixing):
    method = unmix("corrected", mixing, queue_length=queue_length, queue_from="1steps")
    published = published_steps(method, 5, queue_length, 1, 2, formula_unmix(mixing), views)
    assert_same_training(method, train_steps(method, 5, views), published)


def test_both_kinds_of_mixture_occur_in_the_five_steps():
    assert {draw_mixture(MixingConfig(**HALF), SEED, 2 * step).blend for step in range(5)} == {True, False}


def test_lambda_drifts_from_pair_to_pair_in_the_reference_alone():
    """Large crops, so that rounding is small; a box of lambda 0.5 that the edge cuts leaves more for the next pair."""
    crops = [torch.rand(2, 3, 64, 64) for _ in range(8)]
    means = {}
    for variant in ("reference", "corrected"):
        method = unmix(variant, local=6)
        means[variant] = np.mean([method.mixtures(crops, step)[1] for step in range(400)], axis=0)
    assert (np.diff(means["reference"]) > 0.02).all()
    np.testing.assert_allclose(means["reference"], [0.68, 0.78, 0.84, 0.88], atol=0.03)  # as the published code drifts
    np.testing.assert_allclose(means["corrected"], [0.68] * 4, atol=0.05)


def test_the_sets_of_crops_take_their_rows_from_the_networks_order():
    originals, mixed = original_and_mixed(torch.tensor([10, 11, 90, 12, 13, 91])[:, None])
    assert originals[:, 0].tolist() == [10, 11, 12, 13]
    assert mixed[:, 0].tolist() == [90, 11, 91, 13]


def terms(seed, num_views, batch=3, prototypes=5):
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.uniform(-1, 1, (num_views, batch, prototypes)))
    codes = [torch.from_numpy(rng.dirichlet(np.ones(prototypes), batch)) for _ in range(2)]
    return scores, codes, rng.uniform(0, 1, num_views // 2).tolist()


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4, 8]))
def test_mixtures_may_swap_with_their_reverse_if_lambda_does(seed, num_views):
    scores, codes, lams = terms(seed, num_views)
    turned = torch.stack([s if v % 2 else s.flip(0) for v, s in enumerate(scores)])
    swapped = mixed_prediction(turned, [codes[0].flip(0), codes[1]], [1.0 - lam for lam in lams], 0.1)
    torch.testing.assert_close(mixed_prediction(scores, codes, lams, 0.1), swapped)


@given(st.integers(0, 2**32 - 1))
def test_with_lambda_1_the_corrected_loss_is_swavs(seed):
    scores, codes, _ = terms(seed, 4)
    expected = oracle.loss(scores.numpy(), [c.numpy() for c in codes], 0.1)
    assert mixed_prediction(scores, codes, [1.0, 1.0], 0.1).item() == pytest.approx(expected)


@pytest.mark.parametrize("variant", ["reference", "corrected"])
def test_mixtures_with_lambda_1_double_the_loss(variant, monkeypatch):
    """Batch norm in eval, where companions do not matter."""
    from fastssl.methods import unmix_swav

    real = draw_mixture
    monkeypatch.setattr(unmix_swav, "draw_mixture", lambda *a: dataclasses.replace(real(*a), lam=1.0, blend=True))
    method = unmix(variant).eval()
    output = method(views(0), 0)
    assert output.logs["mixture_loss"].item() == pytest.approx(output.logs["original_loss"].item(), rel=1e-12)
    plain = test_swav.swav(roles={"global": 2, "local": 2}).eval()
    plain.load_state_dict(method.state_dict())
    assert output.loss.item() == pytest.approx(2 * plain(views(0), 0).loss.item(), rel=1e-12)


def test_the_queue_takes_three_pushes_a_step_in_the_reference_and_one_in_the_corrected_form():
    """Reference, newest first: the mixture reversed (its clean crop is not), the mixture, the crop."""
    for variant, pushes in (("reference", 3), ("corrected", 1)):
        method = unmix(variant, queue_length=5 * BATCH, queue_from="0steps")
        output = method(views(0), 0)
        queue = output.carry
        assert (method.num_queued, queue.filled) == (0, pushes * BATCH)
        method.after_step(output)
        assert method.num_queued == pushes * BATCH
        first, second = method.queue[:, : pushes * BATCH].unflatten(1, (pushes, BATCH))
        if variant == "reference":
            assert torch.equal(first[0], first[1].flip(0))
            assert torch.equal(second[0], second[1])
        torch.testing.assert_close(first.norm(dim=2), torch.ones_like(first[..., 0]))


def test_features_of_the_reversed_mixture_are_the_features_reversed():
    method = unmix().eval()
    crops = [*views(0)["global"], *views(0)["local"]]
    mixture = method.mixtures(crops, 0)[0][0]
    torch.testing.assert_close(method.embed([mixture.flip(0)]), method.embed([mixture]).flip(1))


def test_chance_level_is_that_of_both_losses():
    assert unmix().chance_level() == pytest.approx(2 * np.log(6))
    method = unmix().eval()
    method.prototypes.weight.data.zero_()
    assert method(views(0), 0).loss.item() == pytest.approx(method.chance_level())


def test_odd_views_and_pairs_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match=r"make views\.local\.count even"):
        unmix(local=3)
    crops = views(0)
    crops["local"][1] = torch.rand(BATCH, 3, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="crops of 5 and 4 px in one pair"):
        unmix()(crops, 0)


# Settings and runs


def test_presets_list_every_setting_with_the_published_values():
    imagenet = config.load(["method=unmix_swav", "data.root=x"])
    assert imagenet.method == dataclasses.asdict(UnmixSwavConfig())
    assert imagenet.method["mixing"] == REGION
    cifar = config.load(["recipe=unmix_swav_cifar", "data.root=x"])
    small = UnmixSwavConfig(
        hidden=512, num_prototypes=100, freeze_prototypes="5005steps", mixing=MixingConfig(global_p=0.5)
    )
    assert cifar.method == dataclasses.asdict(small)
    (spec,) = cifar.view_specs()
    assert (spec.count, spec.size, spec.scale, spec.augment.blur_p, spec.augment.hue) == (2, 32, (0.14, 1.0), 0.0, 0.1)


def test_the_cifar_recipe_has_the_published_learning_rates_and_number_of_parameters():
    cfg = config.load(["recipe=unmix_swav_cifar", "data.root=x"])
    lr = learning_rate(cfg.optim, Clock(390, cfg.run.batch_size), 400 * 390)
    assert [lr(t) for t in (0, 1, 1949, 1950)] == pytest.approx([0.0, 0.00030785018, 0.6, 0.6], rel=1e-7)
    with torch.device("meta"):
        method = build_method(cfg.method, build_encoder(**dataclasses.asdict(cfg.encoder)), RunFacts({"global": 2}))
    assert sum(p.numel() for p in method.parameters()) == 15_067_072


@pytest.mark.parametrize("recipe", ["unmix_swav_256", "unmix_swav_4096"])
def test_recipes_are_swavs_with_mixtures(recipe):
    ours, swavs = (config.load([f"recipe={r}", "data.root=x"]) for r in (recipe, recipe.removeprefix("unmix_")))
    mixing = {"name": "unmix_swav", "mixing": REGION, "variant": "reference"}
    assert ours.method == {**swavs.method, **mixing}
    assert (ours.optim, ours.views, ours.augment) == (swavs.optim, swavs.views, swavs.augment)


def settings(shards, run_dir, *more):
    return test_swav.settings(shards, run_dir, "method=unmix_swav", "method.mixing.global_p=0.5", *more)


@pytest.mark.parametrize("variant", ["reference", "corrected"])
def test_a_run_in_pieces_equals_one_run_bit_for_bit(tiny_shards, tmp_path, variant):
    once, pieces = tmp_path / "once", tmp_path / "pieces"
    more = [f"method.variant={variant}", "run.duration=8steps"]
    assert train.run(config.load(settings(tiny_shards, once, *more))) == 0
    for cut in ("run.stop_after=3steps", "run.log_every=3"):
        assert train.run(config.load(settings(tiny_shards, pieces, *more, cut))) == 0
    assert_same_run(once, pieces)


@pytest.mark.dist
def test_two_ranks_equal_one_process_that_pairs_the_same_images(tmp_path):
    """Ranks share draw, lambda and box. Images mix within a rank: it holds rows r and B - 1 - r of the joined batch.

    Five float64 steps with synchronised batch norm, a freeze and a queue; the queue's rows up to their order.
    """
    from tests.fastssl.two_ranks_unmix_swav import five_steps

    code, _, err = finish(start("tests.fastssl.two_ranks_unmix_swav", [str(tmp_path)], ranks=2))
    assert code == 0, err
    ranks = [torch.load(tmp_path / f"rank-{r}.pt", weights_only=True) for r in (0, 1)]
    for variant in ("reference", "corrected"):
        alone = five_steps(variant)
        for name, expected in alone["model"].items():
            torch.testing.assert_close(ranks[0][variant]["model"][name], expected, rtol=0, atol=1e-9, msg=name)
        joined = torch.cat([r[variant]["queue"] for r in ranks], 1)
        for ours, expected in zip(joined, alone["queue"]):
            torch.testing.assert_close(
                ours[ours[:, 0].argsort()], expected[expected[:, 0].argsort()], rtol=0, atol=1e-9
            )
