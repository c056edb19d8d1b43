"""The online probe: what it learns, that the method does not feel it, resumes, ranks, and which features it takes."""

import pytest
import torch
from numpy.testing import assert_allclose
from torch import nn

from fastssl import config, train
from fastssl.evaluate.online import OnlineProbe
from fastssl.log import read_metrics
from fastssl.schedule import Clock
from fastssl.settings import OnlineConfig
from fastssl.training import Training, to_device
from tests.fastssl.runs import assert_same_state, finish, settings, start, state
from tests.fastssl.test_presets import BATCH, METHODS, STEPS_PER_EPOCH, batches, tiny
from tests.oracle import online as oracle

LINEAR = OnlineConfig(probe="linear", lr=0.01)


class Features(nn.Module):
    """A method whose backbone hands on what it is given."""

    def __init__(self, width=6):
        super().__init__()
        self.encoder = nn.Identity()
        self.encoder.num_features = width

    def backbone(self):
        return self.encoder


def data(steps=5, batch=8, width=6, classes=3):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield (
            torch.randn(batch, width, generator=generator, dtype=torch.float64) * 3 + 1,
            torch.randint(classes, (batch,), generator=generator),
        )


def probed(rank=0, world=1):
    """The layer after five batches of which this rank has its part, and what it said of them."""
    method = Features()
    probe = OnlineProbe(method, 3, LINEAR, "cpu")
    told = []
    for features, labels in data():
        mine = features.float().chunk(world)[rank], labels.chunk(world)[rank]
        method.encoder(mine[0])
        told.append(torch.stack(list(probe.learn(mine[1]).values())))
    return {**probe.layer.state_dict(), "told": torch.stack(told)}


def test_the_probe_matches_the_oracle():
    ours = probed()
    weight, bias, told = oracle.train([(x.numpy(), y.numpy()) for x, y in data()], 3, LINEAR.lr)
    assert_allclose(ours["weight"], weight, atol=2e-5)  # float32 against float64
    assert_allclose(ours["bias"], bias, atol=2e-5)
    assert_allclose(ours["told"], told, atol=2e-5)


@pytest.mark.dist
def test_two_ranks_keep_one_layer_which_is_that_of_the_joined_batch(tmp_path):
    code, _, err = finish(start("tests.fastssl.evaluate.two_ranks_online", [str(tmp_path)], ranks=2))
    assert code == 0, err
    one, *two = probed(), *(torch.load(tmp_path / f"rank-{r}.pt", weights_only=True) for r in (0, 1))
    for name in ("weight", "bias"):
        assert torch.equal(two[0][name], two[1][name])
        torch.testing.assert_close(two[0][name], one[name], rtol=0, atol=1e-5)
    torch.testing.assert_close((two[0]["told"] + two[1]["told"]) / 2, one["told"], rtol=0, atol=1e-5)


def test_forwards_in_eval_mode_and_later_ones_of_a_step_are_not_taken():
    method = Features()
    probe = OnlineProbe(method, 3, LINEAR, "cpu")
    (right, labels), (wrong, _) = data(2)
    method.eval().encoder(wrong.float())
    method.train().encoder(torch.cat([right, wrong]).float())
    method.encoder(wrong.float())
    probe.learn(labels)
    other = Features()
    alone = OnlineProbe(other, 3, LINEAR, "cpu")
    other.encoder(right.float())
    alone.learn(labels)
    assert torch.equal(probe.layer.weight, alone.layer.weight)


@pytest.mark.parametrize("name", METHODS)
def test_the_first_rows_of_a_methods_first_forward_are_one_view_of_the_batch_in_order(name):
    """What the probe relies on, for every preset."""
    cfg = tiny(f"method={name}")
    training = Training.build(cfg, torch.device("cpu"), Clock(STEPS_PER_EPOCH, BATCH))
    seen = []
    training.method.backbone().register_forward_pre_hook(lambda module, images: seen.append(images[0].clone()))
    views = to_device(next(batches(cfg, 0)), cfg, training.device)
    training.step(views, 0, 0.01)
    everything = [view for parts in views.values() for view in parts]
    assert any(view.shape[1:] == seen[0].shape[1:] and torch.equal(seen[0][:BATCH], view) for view in everything)


# -- in a run --


def run(shards, folder, *more):
    return train.run(config.load(settings(shards, folder, *more)))


@pytest.fixture(scope="module")
def with_probe(tiny_shards, tmp_path_factory):
    """12 steps with the probe, without interruption."""
    folder = tmp_path_factory.mktemp("with_probe")
    assert run(tiny_shards, folder, "online=linear") == 0
    return folder


def method_alone(tensors):
    return {name: value for name, value in tensors.items() if not name.startswith("training.pt.online")}


def test_the_method_does_not_feel_the_probe(tiny_shards, tmp_path, with_probe):
    assert run(tiny_shards, tmp_path) == 0
    plain, probed = state(tmp_path), state(with_probe)
    assert plain.keys() == method_alone(probed).keys() != probed.keys()
    assert not [name for name, value in plain.items() if not torch.equal(value, probed[name])]
    assert float(probed["training.pt.online.layer.weight"].abs().max()) > 0


def test_it_logs_accuracy_and_a_loss_that_begins_at_chance(with_probe):
    lines = read_metrics(with_probe)
    assert all(0.0 <= line["online/top1"] <= 1.0 for line in lines)
    assert lines[0]["online/loss"] == pytest.approx(1.386, abs=0.1)  # ln 4, the first three steps


def test_a_run_with_a_probe_in_pieces_equals_one_bit_for_bit(tiny_shards, tmp_path, with_probe):
    for cut in (["run.stop_after=5steps"], []):
        assert run(tiny_shards, tmp_path, "online=linear", *cut) == 0
    assert_same_state(tmp_path, with_probe)


def test_a_resume_may_switch_the_probe_on_and_off(tiny_shards, tmp_path, with_probe):
    for more in (["run.stop_after=3steps"], ["online=linear", "online.lr=0.01", "run.stop_after=6steps"], []):
        assert run(tiny_shards, tmp_path, *more) == 0
    plain, probed = state(tmp_path), method_alone(state(with_probe))
    assert plain.keys() == probed.keys()
    assert not [name for name, value in plain.items() if not torch.equal(value, probed[name])]
    assert ["online/top1" in line for line in read_metrics(tmp_path)] == [False, True, False, False]


@pytest.mark.dist
def test_a_run_on_two_ranks_trains_and_saves_the_probe_and_one_rank_goes_on_with_it(tiny_shards, tmp_path):
    arguments = settings(tiny_shards, tmp_path, "online=linear", "run.stop_after=6steps")
    code, _, err = finish(start("fastssl.train", arguments, 2))
    assert code == 0, err
    assert float(state(tmp_path)["training.pt.online.layer.weight"].abs().max()) > 0
    assert run(tiny_shards, tmp_path, "online=linear") == 0
    assert state(tmp_path)["training.pt.online.optimizer.state.0.step"].item() == 12
    assert all("online/top1" in line for line in read_metrics(tmp_path))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["online=linear"], "61 of the 61 images of {root}/train have no label, which the online probe needs"),
        (["online=linear", "online.lr=0"], "online.lr is 0.0, but must be above 0"),
        (["online.probe=knn"], "online.probe is 'knn', but must be one of off, linear"),
        (["online=lineer"], "did you mean 'linear'?"),
    ],
)
def test_a_wrong_start_is_one_sentence(tiny_shards_unlabelled, tmp_path, capsys, more, sentence):
    assert train.main(settings(tiny_shards_unlabelled, tmp_path / "run", *more)) == 2
    err = capsys.readouterr().err
    assert sentence.format(root=tiny_shards_unlabelled) in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
