"""Two gloo ranks: the collectives, and that MoCo on two halves is MoCo on the whole."""

import pytest
import torch

from fastssl import dist
from tests.fastssl.runs import finish, start
from tests.fastssl.test_moco import moco, views
from tests.fastssl.two_ranks_of_methods import five_steps


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    code, _, err = finish(start("tests.fastssl.two_ranks", [str(folder)], ranks=2))
    assert code == 0, err
    return [torch.load(folder / f"rank-{r}.pt", weights_only=True) for r in (0, 1)]


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["plain", "symmetric"])
def test_two_ranks_equal_one_on_the_joined_batch(ranks, kind):
    """Weights, key encoder and queue, with the key batch shuffled over the ranks; float64, batch norm in eval."""
    alone = five_steps(moco(symmetric=kind == "symmetric"), views)
    for name, expected in alone.items():
        torch.testing.assert_close(ranks[0][kind][name], expected, rtol=0, atol=1e-9, msg=name)
    for name, value in ranks[0][kind].items():
        assert torch.equal(value, ranks[1][kind][name]), name


@pytest.mark.dist
def test_collectives_agree(ranks):
    for rank in ranks:
        facts = rank["facts"]
        assert facts["gathered"].tolist() == [[0, 0], [1, 7]]
        assert facts["mean"].item() == 0.5
        assert facts["any"].tolist() == [True, False]
        assert facts["said"].item() == 5


def test_without_a_group_everything_is_the_identity():
    x = torch.randn(3, 2)
    assert dist.all_gather(x) is x
    assert dist.all_reduce_mean(x) is x
    assert (dist.any_rank(True), dist.any_rank(False), dist.rank(), dist.world()) == (True, False, 0, 1)


def test_the_shuffle_of_a_step_is_a_permutation_that_depends_on_seed_and_step_alone():
    first = dist.permutation(64, seed=1, step=2)
    assert sorted(first.tolist()) == list(range(64))
    assert torch.equal(first, dist.permutation(64, seed=1, step=2))
    assert not torch.equal(first, dist.permutation(64, seed=1, step=3))
    assert not torch.equal(first, dist.permutation(64, seed=2, step=2))
