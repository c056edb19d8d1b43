"""Two gloo ranks: which collectives a step of each method needs, how often, and how many bytes they bring a rank."""

import collections
import json

import pytest
import torch

from tests.fastssl.runs import finish, start
from tests.fastssl.test_host_waits import BATCH
from tests.fastssl.test_moco import moco
from tests.fastssl.two_ranks_collectives import FORMS, MORE_FORMS

pytestmark = pytest.mark.dist

PX_32 = BATCH // 2 * 3 * 32 * 32 * 4  # bytes of one rank's views in float32
PX_48 = BATCH // 2 * 5 * 48 * 48 * 4
KEYS = BATCH * 128 * 4  # of all ranks
IMAGES_AND_KEYS = {  # form -> bytes of each all-to-all of images and of each gather
    "moco": ([PX_32], [KEYS]),
    "moco_symmetric": ([PX_32] * 2, [KEYS] * 2),
    "moco_gather": ([], [2 * PX_32, KEYS]),
    "moco_plain": ([], [KEYS]),
    "moco_split": ([], [KEYS]),
    "clsa": ([PX_32], [KEYS]),
    "clsa_sym": ([PX_32] * 2, [KEYS] * 2),
    "unmix_moco": ([PX_32], [KEYS]),
    "moco_decoder": ([PX_48], [KEYS]),
    "autoencoder": ([], []),
}
SINKHORN_CALLS = {"swav": 2, "unmix_swav": 6, "unmix_swav_corrected": 3}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collectives")
    code, _, err = finish(start("tests.fastssl.two_ranks_collectives", [str(folder)], ranks=2))
    assert code == 0, err
    facts = [torch.load(folder / f"rank-{r}.pt", weights_only=True) for r in (0, 1)]
    steps = [json.loads((folder / f"steps-{r}.json").read_text()) for r in (0, 1)]
    return facts, steps


def by_name(seen):
    sizes = collections.defaultdict(list)
    for name, size in seen:
        sizes[name].append(size)
    return sizes


def test_every_form_is_expected():
    assert IMAGES_AND_KEYS.keys() | SINKHORN_CALLS.keys() == FORMS.keys() | MORE_FORMS.keys()


@pytest.mark.parametrize("form", IMAGES_AND_KEYS)
def test_a_step_sends_key_images_once_keys_once_and_gradients_once(ranks, form):
    images, gathers = IMAGES_AND_KEYS[form]
    for steps in ranks[1]:
        seen = by_name(steps[form]["seen"])
        assert seen.pop("alltoall_base_", []) == images
        assert seen.pop("_allgather_base_", []) == gathers
        assert sum(seen.pop("allreduce_")) == steps[form]["gradient_bytes"]
        assert not seen


@pytest.mark.parametrize("form", SINKHORN_CALLS)
def test_a_step_of_swav_sends_statistics_sinkhorns_sums_and_gradients(ranks, form):
    """A gather and a reduction for each batch norm of the trunk in either resolution and for the head's one; a largest
    score and three sums over prototypes for each call of Sinkhorn."""
    for steps in ranks[1]:
        seen, calls = by_name(steps[form]["seen"]), SINKHORN_CALLS[form]
        statistics = collections.Counter(steps[form]["batch_norms"])
        assert collections.Counter(size // 2 for size in seen.pop("_allgather_base_")) == statistics
        reductions = collections.Counter(seen.pop("allreduce_"))
        of_sinkhorn = collections.Counter({4: calls, 20 * 4: 3 * calls})
        assert reductions >= statistics + of_sinkhorn
        buckets = reductions - statistics - of_sinkhorn
        assert sum(buckets.elements()) == steps[form]["gradient_bytes"]
        assert buckets.total() <= 2
        assert not seen


def test_dealt_keys_are_the_gathered_ones(ranks):
    """In train mode, where companions decide the statistics; and they are what one process makes of those companions.

    Each rank's four images go to the ranks two and two. The queries' own companions are other ones.
    """
    facts, _ = ranks
    assert torch.equal(facts[0]["order"], facts[1]["order"])
    order, images = facts[0]["order"], torch.cat([f["view"] for f in facts])
    encoder = moco(batch_norm="plain").encoder_k.train()
    expected = torch.empty_like(facts[0]["deal"])
    for part in order.view(2, 4):
        assert sorted((part // 4).tolist()) == [0, 0, 1, 1]
        expected[part] = torch.nn.functional.normalize(encoder(images[part]), dim=1).detach()
    for f in facts:
        torch.testing.assert_close(f["deal"], expected, rtol=0, atol=1e-12)
        assert torch.equal(f["deal"], f["gather"])
        assert f["odd"].shape == (6, 5)


def test_all_ranks_hear_at_the_same_call_and_one_call_late(ranks):
    assert [f["answers"].tolist() for f in ranks[0]] == [[False, False, True, False]] * 2


def test_buffers_follow_rank_0_but_for_a_ranks_own(ranks):
    assert [f["followed"][:, 0].tolist() for f in ranks[0]] == [[5.0, 5.0], [5.0, 6.0]]
