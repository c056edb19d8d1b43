"""NaN and infinity in views, gradients and running statistics: the step is as if it had not been, on all ranks."""

import math
import re

import pytest
import torch

from fastssl import checkpoint, config, train
from fastssl.log import read_metrics
from fastssl.methods import METHODS
from fastssl.rejection import FlooredGradScaler, Kept, NotFinite, not_finite
from shard_tools.manifest import Manifest
from tests.fastssl import runs
from tests.fastssl.rejected import FORMS, MORE_FORMS, Lab, as_bytes, different, finite, pixel
from tests.fastssl.two_ranks_rejected import TWO_RANKS
from tests.faults.record import times

NAN, INF = math.nan, math.inf
HUGE = 1e25  # finite, but its square is not: a variance of it overflows, and nothing else


def last_role(lab):
    return next(role for role in reversed(lab.batches[0].views) if role != "weight")


@pytest.mark.parametrize("value", [NAN, INF, HUGE], ids=["nan", "inf", "huge"])
@pytest.mark.parametrize("form", [*FORMS, *MORE_FORMS])
@pytest.mark.fault(
    "NaN, infinity or 1e25 in one pixel of one view", "the step is rejected; all state is as it was, to the bit"
)
def test_a_spoilt_view_leaves_nothing_behind(form, value, record_property):
    """For SwAV once while its queue fills and once when it is full; steps after it are those of a run without it."""
    lab, without = Lab.build(form), Lab.build(form)
    spoil = pixel(value, last_role(lab) if value != INF else None)
    for k in (1, 5) if "swav" in form else (1,):
        lab.steps(range(k - 1, k))
        before = lab.state()
        assert finite(before)
        lab.steps([k], spoil)
        assert lab.training.rejection.rejected
        assert lab.training.rejection.own
        assert different(lab.state(), before) == []
        lab.steps(range(k + 1, k + 3))
        assert not lab.training.rejection.rejected
        assert different(lab.state(), before) != []
        without.steps([step for step in range(k - 1, k + 3) if step != k])
    assert different(lab.state(), without.state()) == []
    record_property("seen", f"{len(before)} tensors of {form} the same bits")


@pytest.mark.parametrize("form", ["moco", "swav_learning", "autoencoder"])
@pytest.mark.parametrize(
    "more",
    [["run.precision=bf16"], ["run.precision=fp16"], ["optim.fused=off"], ["optim.fused=off", "run.precision=fp16"]],
)
@pytest.mark.fault(
    "NaN in a view in half precision, or without the fused optimiser", "the step is rejected the same way"
)
def test_in_any_precision_and_by_any_kernel(form, more):
    lab = Lab.build(form, *more)
    if lab.training.scaler.is_enabled():
        lab.training.scaler._init_scale = 64.0  # so that the first steps do not overflow
    lab.steps([0, 1])
    assert not lab.training.rejection.rejected
    before = lab.state()
    lab.steps([2], pixel(NAN))
    assert lab.training.rejection.rejected
    assert different(lab.state(), before) == []
    lab.steps([3])
    assert not lab.training.rejection.rejected
    assert finite(lab.state())


@pytest.mark.parametrize("form", ["moco", "swav_learning"])
@pytest.mark.fault("the very first step is spoilt", "all state is as it was built")
def test_a_first_step_leaves_nothing_behind(form):
    lab = Lab.build(form)
    before = lab.state()
    lab.steps([0], pixel(NAN))
    assert different(lab.state(), before) == []


@pytest.mark.fault("a gradient that is not finite although the loss is", "the step is rejected")
def test_a_gradient_that_is_not_finite_though_the_loss_is():
    lab = Lab.build("moco")
    lab.steps([0])
    before = lab.state()
    *_, parameter = lab.training.method.backbone().parameters()
    hook = parameter.register_hook(lambda gradient: gradient * INF)
    output = lab.steps([1])
    hook.remove()
    assert output.loss.isfinite()
    assert lab.training.rejection.rejected
    assert not lab.training.rejection.own
    assert different(lab.state(), before) == []


def test_a_huge_pixel_of_a_key_spoils_no_loss_and_would_spoil_the_key_encoder_for_good():
    """What the running statistics are looked at for."""
    lab = Lab.build("moco")
    views = lab.batches[0].views
    pixel(HUGE, "key")(views)
    lab.training.method.before_step(0)
    output = lab.training.method(views, 0)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in lab.training.method.encoder_q.parameters())
    assert not finite(dict(lab.training.method.encoder_k.named_buffers()))


@pytest.mark.fault("many spoilt steps in a row in fp16, then a good one", "the loss scale stays 1, weights are finite")
def test_a_scale_has_a_floor(record_property):
    lab = Lab.build("moco", "run.precision=fp16", "run.batch_size=4", "views.query.size=16")
    spoilt = times(40, 200)
    lab.steps([0] * spoilt, pixel(NAN))
    assert lab.training.scaler.get_scale() == 1.0
    before = lab.state()
    lab.steps([1])
    assert not lab.training.rejection.rejected
    assert different(lab.state(), before) != []
    assert finite(lab.state())
    record_property("seen", f"scale {lab.training.scaler.get_scale():g} after {spoilt}")


def test_a_scale_below_the_floor_is_raised_at_a_resume():
    scaler = FlooredGradScaler("cpu")
    scaler.load_state_dict({**scaler.state_dict(), "scale": 0.0})
    assert scaler.scale(torch.ones(())) == 1.0


def test_what_methods_say_that_their_before_step_moves_is_what_it_moves():
    """By the version that torch counts for each tensor; parameters without gradients are kept in any case."""
    seen = set()
    for form in [*FORMS, *MORE_FORMS]:
        method = Lab.build(form).training.method
        seen.add(type(method))
        versions = {name: p._version for name, p in method.named_parameters() if p.requires_grad}
        method.before_step(0)
        moved = {name for name, p in method.named_parameters() if name in versions and p._version != versions[name]}
        said = {id(p) for p in method.moved_before_step()}
        assert moved == {name for name, p in method.named_parameters() if id(p) in said}
    assert len(seen) == len(METHODS)


def test_kept_tensors_come_back_to_the_bit_whatever_their_kind(rng):
    big = torch.from_numpy(rng.standard_normal((3, 70_000))).float()
    conv = torch.from_numpy(rng.standard_normal((8, 4, 3, 3))).to(memory_format=torch.channels_last)
    tensors = [big, conv, torch.tensor(7), torch.full((5,), NAN), torch.tensor([-0.0])]
    before = [t.clone() for t in tensors]
    kept = Kept(tensors)
    kept.keep()
    for t in tensors:
        t.add_(1).mul_(3)
    after = [t.clone() for t in tensors]
    kept.put_back(torch.tensor(False))
    assert all(torch.equal(t.nan_to_num(), a.nan_to_num()) for t, a in zip(tensors, after))
    kept.put_back(torch.tensor(True))
    for t, b in zip(tensors, before):
        assert t.stride() == b.stride()
        assert as_bytes(t) == as_bytes(b)


# Runs


def spoil_steps(monkeypatch, bad):
    """Every step of `bad` gets a NaN; returns the ids of the batches by step."""
    ids, real = {}, train.to_device

    def spoilt(batch, cfg, device):
        views = real(batch, cfg, device)
        ids[batch.step] = batch.ids.tolist()
        if batch.step in bad:
            pixel(NAN)(views)
        return views

    monkeypatch.setattr(train, "to_device", spoilt)
    return ids


@pytest.mark.fault(
    "20 spoilt steps in a row", "the run saves and stops, with samples and remedy, and can be resumed", exit_code=8
)
def test_twenty_in_a_row_stop_the_run(tiny_shards, tmp_path, capsys, monkeypatch, record_property):
    settings = runs.settings(tiny_shards, tmp_path, "run.duration=26steps", "run.save_every=never", "online=linear")
    with monkeypatch.context() as patch:
        ids = spoil_steps(patch, range(3, 26))
        assert train.main(settings) == 8
    assert checkpoint.newest(tmp_path).name == "step-00000023"
    assert finite({name: t for name, t in runs.state(tmp_path).items() if t.is_floating_point()})
    err = capsys.readouterr().err
    (sentence,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "20 steps in a row were rejected because of a NaN or an infinity" in sentence
    assert "saved at step 23" in sentence
    assert "lower optim.lr" in sentence
    listed = (tmp_path / "not-finite-rank-0.txt").read_text().splitlines()
    manifest = Manifest.load(tiny_shards)
    spoilt = {manifest.member_name(i) for step in range(3, 23) for i in ids[step]}
    assert set(listed) == spoilt
    assert set(re.findall(r"train-\d+\.tar:\d+\.\w+", sentence)) == set(listed[:3])
    assert [line["rejected_steps"] for line in read_metrics(tmp_path)] == [0.0, *[3.0] * 6]
    assert "loss" in read_metrics(tmp_path)[0]
    assert "loss" not in read_metrics(tmp_path)[1]
    assert train.main(settings) == 0
    assert read_metrics(tmp_path)[-1]["rejected_steps"] == 0.0
    record_property("seen", f"{len(listed)} samples listed")


@pytest.mark.fault("19 spoilt steps in a row, and 5 more later", "the run goes on to its end", exit_code=0)
def test_nineteen_in_a_row_do_not_stop_a_run(tiny_shards, tmp_path, monkeypatch):
    spoil_steps(monkeypatch, [*range(3, 22), *range(23, 28)])
    settings = runs.settings(tiny_shards, tmp_path, "run.duration=30steps", "run.save_every=never", "run.log_every=30")
    assert train.main(settings) == 0
    (line,) = read_metrics(tmp_path)
    assert line["rejected_steps"] == 24.0
    assert math.isfinite(line["loss"])


@pytest.mark.fault("a learning rate of 1e30", "every step after the first is rejected, saved and stopped", exit_code=8)
def test_a_run_that_explodes_stops_with_finite_weights(tiny_shards, tmp_path, capsys):
    assert train.main(runs.settings(tiny_shards, tmp_path, "optim.lr=1e30", "run.max_rejected=4")) == 8
    assert "4 steps in a row were rejected" in capsys.readouterr().err
    assert finite({name: t for name, t in runs.state(tmp_path).items() if t.is_floating_point()})


@pytest.mark.parametrize("where", ["model", "optimizer", "rank"])
@pytest.mark.fault("a NaN in a tensor that is to be saved", "the save is refused and names it; the folder is as it was")
def test_a_tensor_that_is_not_finite_is_not_saved(tmp_path, where):
    model = torch.nn.Linear(2, 2)
    momentum, queue = torch.zeros(3), torch.zeros(4)

    def save(step):
        training = {"optimizer": {"state": {0: {"momentum_buffer": momentum}}}}
        return checkpoint.save(tmp_path, step, model, training, {}, 2, {"queue": queue})

    save(1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    tensor = {"model": model.bias, "optimizer": momentum, "rank": queue}[where]
    tensor.data[1] = NAN
    named = {"model": r"model\.bias", "optimizer": r"training\.optimizer\.state\.0\.momentum_buffer", "rank": "queue"}
    with pytest.raises(NotFinite, match=named[where] + " holds a NaN") as refused:
        save(2)
    assert refused.value.exit_code == 8
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_numbers_beside_tensors_are_looked_at_too():
    assert not_finite({"a": [1.0, torch.ones(2)], "b": {"scale": INF}}) == "b.scale"
    assert not_finite({"a": 1, "b": torch.tensor([1, 2]), "c": "text"}) is None
    assert not_finite({}) is None


def test_a_setting_below_one_is_refused(tiny_shards, tmp_path):
    with pytest.raises(config.ConfigError, match=r"run\.max_rejected is 0"):
        config.load(runs.settings(tiny_shards, tmp_path, "run.max_rejected=0"))


# Ranks


@pytest.fixture(scope="module")
def ranks(tiny_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    code, _, err = runs.finish(runs.start("tests.fastssl.two_ranks_rejected", [str(folder), str(tiny_shards)], ranks=2))
    assert code == 0, err
    return [torch.load(folder / f"rank-{r}.pt", weights_only=True) for r in (0, 1)], folder, err


# Keys, or the statistics of synchronised batch norms, bring the number to the other rank; else its gradient alone does.
TRAVELLING = ("moco_symmetric", "clsa_multi", "swav", "swav_learning", "unmix_swav")


@pytest.mark.dist
@pytest.mark.parametrize("name", TWO_RANKS)
@pytest.mark.fault("NaN in a view, a gradient or a statistic of one of two ranks", "both reject the step, to the bit")
def test_one_ranks_fault_is_everyones(ranks, name):
    for rank, facts in enumerate(ranks[0]):
        assert facts[name]["rejected"] == [False, True, False]
        assert facts[name]["own"] == [False, name != "moco gradient" and (rank == 1 or name in TRAVELLING), False]
        assert facts[name]["different"] == []
        assert facts[name]["finite"]
    assert ranks[0][0][name]["shared"] == ranks[0][1][name]["shared"]


@pytest.mark.dist
@pytest.mark.fault("every batch of one of two ranks is spoilt", "both save, stop and name its samples", exit_code=8)
def test_ranks_stop_together_and_name_the_samples_of_the_one(ranks):
    facts, folder, err = ranks
    assert [f["exit_code"] for f in facts] == [8, 8]
    assert [p.name for p in (folder / "run").glob("not-finite-*")] == ["not-finite-rank-1.txt"]
    listed = (folder / "run" / "not-finite-rank-1.txt").read_text().splitlines()
    (sentence,) = [line for line in err.splitlines() if "steps in a row were rejected" in line]
    assert set(re.findall(r"train-\d+\.tar:\d+\.\w+", sentence)) == set(listed[:3])
    assert set(listed) == set(facts[1]["names"])
    assert not set(listed) & set(facts[0]["names"])
    assert finite({name: t for name, t in runs.state(folder / "run").items() if t.is_floating_point()})
