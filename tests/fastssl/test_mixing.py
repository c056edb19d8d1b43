"""Mixtures: the box of the published code, its NumPy statement, and what must hold for any draw."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.mixing import MixingConfig, Mixture, draw_mixture, mix
from tests.oracle import unmix

MIXTURES = st.builds(
    Mixture,
    blend=st.booleans(),
    lam=st.floats(0.0, 1.0),
    centre=st.tuples(*[st.floats(0.0, 1.0, exclude_max=True)] * 2),
)
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 33), st.integers(1, 33))
quick = settings(max_examples=60, deadline=None)


def images(shape):
    """Every value another."""
    return torch.arange(float(np.prod(shape)), dtype=torch.float64).reshape(shape)


@pytest.mark.parametrize(
    ("lam", "side", "box_side", "adjusted"),
    [(0.5, 224, 158, 0.502471), (0.9, 224, 70, 0.902344), (0.5, 96, 66, 1 - 66**2 / 96**2)],
)
def test_a_box_inside_the_image_is_that_of_the_published_code(lam, side, box_side, adjusted):
    mixed, weight = mix(images((2, 1, side, side)), Mixture(False, lam, (0.5, 0.5)))
    changed = (mixed != images((2, 1, side, side)))[0, 0]
    assert changed.any(0).sum() == changed.any(1).sum() == box_side
    assert changed.sum() == box_side**2
    assert weight == pytest.approx(adjusted, abs=5e-7)


@quick
@given(MIXTURES, st.integers(1, 5), st.integers(1, 33))
def test_a_mixture_is_that_of_its_numpy_statement(mixture, batch, side):
    x = images((batch, 2, side, side))
    row, column = (int(at * side) for at in mixture.centre)
    mixed, lam = mix(x, mixture)
    expected, expected_lam = unmix.mix(x.numpy(), mixture.blend, mixture.lam, row, column)
    np.testing.assert_allclose(mixed.numpy(), expected, rtol=1e-12, atol=1e-9)
    assert lam == pytest.approx(expected_lam, abs=1e-12)


@quick
@given(MIXTURES, SHAPES)
def test_mixing_commutes_with_the_flip_of_the_batch(mixture, shape):
    x = images(shape)
    assert torch.equal(mix(x.flip(0), mixture)[0], mix(x, mixture)[0].flip(0))


@quick
@given(MIXTURES, SHAPES)
def test_lambda_one_is_the_identity_and_the_images_stay_as_they_are(mixture, shape):
    x = images(shape)
    mixed, lam = mix(x, Mixture(mixture.blend, 1.0, mixture.centre))
    assert torch.equal(mixed, x)
    assert lam == 1.0
    mix(x, mixture)
    assert torch.equal(x, images(shape))


@quick
@given(MIXTURES.filter(lambda m: not m.blend), SHAPES)
def test_a_pasted_pixel_comes_from_the_partner_and_their_share_is_one_minus_lambda(mixture, shape):
    x = images(shape)
    mixed, lam = mix(x, mixture)
    pasted = mixed != x
    assert torch.equal(mixed[pasted], x.flip(0)[pasted])
    middle = shape[0] // 2 if shape[0] % 2 else None
    for i in range(shape[0]):
        assert pasted[i].double().mean().item() == pytest.approx(0.0 if i == middle else 1.0 - lam, abs=1e-12)


@quick
@given(MIXTURES, st.integers(1, 6))
def test_the_middle_of_an_odd_batch_mixes_with_itself(mixture, half):
    x = images((2 * half + 1, 1, 8, 8))
    assert torch.equal(mix(x, mixture)[0][half], x[half])


@pytest.mark.parametrize("blend", [True, False])
def test_memory_format_and_type_are_kept(blend):
    x = torch.rand(4, 3, 8, 8).contiguous(memory_format=torch.channels_last).bfloat16()
    mixed, _ = mix(x, Mixture(blend, 0.6, (0.5, 0.5)))
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert mixed.dtype == torch.bfloat16


@pytest.mark.parametrize("beta", [0.4, 1.0, 3.0])
def test_lambda_follows_its_beta_distribution_and_blends_their_probability(beta):
    """Fixed seeds, so the test cannot flicker: 4000 draws, Kolmogorov-Smirnov p above 1 %, 4 standard errors."""
    draws = [draw_mixture(MixingConfig(0.3, beta), seed=1, step=step) for step in range(4000)]
    assert scipy.stats.kstest([d.lam for d in draws], scipy.stats.beta(beta, beta).cdf).pvalue > 0.01
    for axis in (0, 1):
        assert scipy.stats.kstest([d.centre[axis] for d in draws], "uniform").pvalue > 0.01
    assert np.mean([d.blend for d in draws]) == pytest.approx(0.3, abs=4 * (0.21 / 4000) ** 0.5)


@pytest.mark.parametrize(("global_p", "blends"), [(0.0, {False}), (1.0, {True})])
def test_the_probabilities_0_and_1_are_never_and_always(global_p, blends):
    assert {draw_mixture(MixingConfig(global_p), 0, step).blend for step in range(50)} == blends


def test_a_draw_depends_on_seed_step_and_rank_alone():
    config = MixingConfig()
    keys = [(seed, step, rank) for seed in (0, 1) for step in (0, 1) for rank in (None, 0, 1)]
    draws = [draw_mixture(config, *key) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [draw_mixture(config, *key) for key in keys]


def test_a_draw_is_the_same_for_ever():
    """A resume under another version of Python must not see other mixtures."""
    drawn = draw_mixture(MixingConfig(), seed=7, step=11, rank=2)
    assert drawn == Mixture(False, 0.5628185148103324, (0.41162967217802404, 0.7790223584145125))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"global_p": 1.5}, r"method\.mixing\.global_p is 1\.5, but must be between 0 and 1"),
        ({"beta": 0.0}, r"method\.mixing\.beta is 0\.0, but must be above 0"),
    ],
)
def test_a_wrong_setting_is_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        MixingConfig(**settings)
