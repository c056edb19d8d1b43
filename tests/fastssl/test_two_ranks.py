"""Two gloo ranks: CLSA and the decoder on two halves are what they are on the whole; Un-Mix mixes by halves."""

import pytest
import torch

from tests.fastssl.runs import finish, start
from tests.fastssl.test_clsa import clsa
from tests.fastssl.test_clsa import views as clsa_views
from tests.fastssl.test_moco_decoder import build as decoder
from tests.fastssl.test_moco_decoder import views as decoder_views
from tests.fastssl.test_unmix_moco import published_steps, unmix
from tests.fastssl.two_ranks_of_methods import CLSA, DECODER, UNMIX, five_steps


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    code, _, err = finish(start("tests.fastssl.two_ranks_of_methods", [str(folder)], ranks=2))
    assert code == 0, err
    return [torch.load(folder / f"rank-{r}.pt", weights_only=True) for r in (0, 1)]


@pytest.mark.dist
@pytest.mark.parametrize("form", CLSA)
def test_two_ranks_of_clsa_equal_one_on_the_joined_batch(ranks, form):
    """Weights, key encoder and queue; float64, batch norm in eval. The reference form's slip is the same slip."""
    for name, expected in five_steps(clsa(**CLSA[form]), clsa_views).items():
        torch.testing.assert_close(ranks[0][form][name], expected, rtol=0, atol=1e-9, msg=name)


@pytest.mark.dist
def test_two_ranks_of_the_decoder_equal_one_on_the_joined_batch(ranks):
    """Where the error is divided by the number of elements; divided by the weights' sum, a rank's sum is its own."""
    for name, expected in five_steps(decoder(), decoder_views, **DECODER).items():
        torch.testing.assert_close(ranks[0]["decoder"][name], expected, rtol=0, atol=1e-9, msg=name)


@pytest.mark.dist
@pytest.mark.parametrize("form", UNMIX)
def test_two_ranks_of_unmix_equal_one_that_mixes_the_batch_by_halves(ranks, form):
    """A rank's partners are its own and so is its draw; keys, queue and weights are shared."""
    expected, _ = published_steps(unmix(**UNMIX[form]).eval(), 5, ranks=2)
    for name, value in expected.items():
        torch.testing.assert_close(ranks[0][form][name], value, rtol=0, atol=1e-9, msg=name)


@pytest.mark.dist
@pytest.mark.parametrize("form", [*CLSA, *UNMIX, "decoder"])
def test_ranks_agree_to_the_bit(ranks, form):
    for name, value in ranks[0][form].items():
        assert torch.equal(value, ranks[1][form][name]), name
