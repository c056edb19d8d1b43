"""Training runs end to end: resume to the bit, signals, precisions, ranks, and what a wrong start says."""

import os
import signal

import pytest
import torch

from fastssl import checkpoint, config, train
from fastssl.log import read_metrics
from fastssl.schedule import Clock
from fastssl.stopping import StopRequest
from fastssl.training import Training
from shard_tools import exit_codes
from tests.fastssl.runs import assert_same_state, finish, settings, start, state


def run(*arguments):
    return train.run(config.load(settings(*arguments)))


@pytest.fixture(scope="module")
def reference(tiny_shards, tmp_path_factory):
    """A run of 12 steps without interruption."""
    folder = tmp_path_factory.mktemp("reference")
    assert run(tiny_shards, folder) == 0
    return folder


def test_a_run_leaves_metrics_config_events_and_checkpoints(reference):
    lines = read_metrics(reference)
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert lines[-1]["images"] == 96
    assert {"loss", "lr", "contrast_top1", "queue_filled", "images_per_s", "data_wait"} <= lines[0].keys()
    assert lines[-1]["queue_filled"] == 1.0
    assert (reference / "config.yaml").is_file()
    assert list(reference.glob("events.out.tfevents.*"))
    assert checkpoint.newest(reference).name == "step-00000012"


@pytest.mark.parametrize("cuts", [(1,), (5, 7), (6, 8, 11)])
def test_a_run_in_pieces_equals_one_run_bit_for_bit(tiny_shards, tmp_path, reference, cuts):
    """Stops inside an epoch, at its edge (7 steps), and between saves; the schedule is that of the whole run."""
    for cut in cuts:
        assert run(tiny_shards, tmp_path, f"run.stop_after={cut}steps") == 0
    assert run(tiny_shards, tmp_path, "loader.prefetch=3") == 0
    assert_same_state(tmp_path, reference)


def test_a_run_killed_mid_epoch_resumes_to_the_same_bits(tiny_shards, tmp_path, reference):
    script = """
import os, signal, sys
from fastssl import train
from fastssl.training import Training
real = Training.step
def step(self, views, number, lr):
    if number == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, views, number, lr)
Training.step = step
train.main(sys.argv[1:])
"""
    import subprocess
    import sys

    killed = subprocess.run([sys.executable, "-c", script, *settings(tiny_shards, tmp_path)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert checkpoint.newest(tmp_path).name == "step-00000008"
    assert run(tiny_shards, tmp_path) == 0
    assert_same_state(tmp_path, reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_rest_follows(tiny_shards, tmp_path, reference, monkeypatch, number):
    real = Training.step

    def step(self, views, at, lr):
        if at == 4:
            os.kill(os.getpid(), number)
        return real(self, views, at, lr)

    handlers = [signal.getsignal(n) for n in StopRequest.SIGNALS]
    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", step)
        assert run(tiny_shards, tmp_path) == exit_codes.STOPPED == 75
    assert checkpoint.newest(tmp_path).name == "step-00000005"
    assert [signal.getsignal(n) for n in StopRequest.SIGNALS] == handlers
    assert run(tiny_shards, tmp_path) == 0
    assert_same_state(tmp_path, reference)


def test_a_finished_run_does_nothing_more(tiny_shards, reference, capsys):
    before = (reference / "metrics.jsonl").read_text()
    assert run(tiny_shards, reference) == 0
    assert "already at step 12 of 12" in capsys.readouterr().err
    assert (reference / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_keeps_float32_state_and_resumes(tiny_shards, tmp_path, reference, precision):
    once, pieces = tmp_path / "once", tmp_path / "pieces"
    assert run(tiny_shards, once, f"run.precision={precision}") == 0
    assert run(tiny_shards, pieces, f"run.precision={precision}", "run.stop_after=5steps") == 0
    assert run(tiny_shards, pieces, f"run.precision={precision}") == 0
    assert_same_state(once, pieces)
    tensors = state(once)
    assert all(t.dtype != torch.float16 and t.dtype != torch.bfloat16 for t in tensors.values())
    assert all(torch.isfinite(t).all() for t in tensors.values())
    assert ("training.pt.scaler.scale" in tensors) == (precision == "fp16")
    full = read_metrics(reference)[0]["loss"]
    assert read_metrics(once)[0]["loss"] == pytest.approx(full, abs=0.1)
    assert read_metrics(once)[0]["loss"] != full


def test_an_overflowing_fp16_step_leaves_the_weights_and_lowers_the_scale(tiny_shards):
    cfg = config.load(settings(tiny_shards, "unused", "run.precision=fp16"))
    training = Training.build(cfg, torch.device("cpu"), Clock(7, 8))
    views = {r: [torch.randn(8, 3, 32, 32)] for r in ("query", "key")}
    training.scaler.scale(torch.zeros(()))  # creates the scale lazily
    training.scaler._scale.fill_(2.0**120)
    before = [p.clone() for p in training.method.encoder_q.parameters()]
    training.step(views, 0, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, training.method.encoder_q.parameters()))
    assert training.scaler.get_scale() == 2.0**119


@pytest.mark.dist
def test_two_ranks_under_torchrun_train_resume_and_change_world_size(tiny_shards, tmp_path):
    """Shuffling BN over gloo; a run of two ranks cut at step 6 goes on with one, and the other way round."""
    once, cut = tmp_path / "once", tmp_path / "cut"
    for folder, more, ranks in (
        (once, [], 2),
        (cut, ["run.stop_after=6steps"], 2),
        (cut, [], 2),
    ):
        code, _, err = finish(start("fastssl.train", settings(tiny_shards, folder, *more), ranks))
        assert code == 0, err
    assert "2 rank(s)" in err
    assert "batch 8 = 2 x 4" in err
    assert_same_state(once, cut)
    elastic = tmp_path / "elastic"
    assert run(tiny_shards, elastic, "run.stop_after=6steps") == 0
    code, _, err = finish(start("fastssl.train", settings(tiny_shards, elastic), 2))
    assert code == 0, err
    assert "resumed at step 6" in err
    assert checkpoint.newest(elastic).name == "step-00000012"


@pytest.mark.dist
def test_sigterm_to_one_rank_stops_both_with_a_checkpoint(tiny_shards, tmp_path):
    process = start(
        "fastssl.train", settings(tiny_shards, tmp_path, "run.duration=100000steps", "run.save_every=never"), 2
    )
    for line in process.stderr:
        if line.startswith("step "):
            break
    import subprocess

    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[1]), signal.SIGTERM)
    code, _, err = finish(process, 60)
    assert code != 0
    assert "saved; the same command goes on from there" in err
    assert checkpoint.newest(tmp_path) is not None


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["optim.lr=1.0"], "optim.lr was 0.03 and is 1.0"),
        (
            ["run.seed=5", "run.duration=20steps"],
            "run.duration was '12steps' and is '20steps'; run.seed was 0 and is 5",
        ),
        (["views.query.scale=[0.3,1.0]"], "views.key.scale[0]"),
        (["run.resume=never"], "has a checkpoint and run.resume is never"),
    ],
)
def test_a_resume_with_other_settings_is_refused(tiny_shards, reference, capsys, more, sentence):
    before = (reference / "metrics.jsonl").read_text()
    assert train.main(settings(tiny_shards, reference, *more)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert sentence.split("[")[0] in err
    assert (reference / "metrics.jsonl").read_text() == before


def test_a_resume_on_other_data_is_refused(tiny_shards_unlabelled, reference, capsys):
    assert train.main(settings(tiny_shards_unlabelled, reference)) == 2
    assert "was trained on other data" in capsys.readouterr().err


def test_a_resume_after_a_broken_newest_checkpoint_takes_the_one_before(tiny_shards, tmp_path, reference):
    assert run(tiny_shards, tmp_path, "run.stop_after=8steps") == 0
    model = checkpoint.newest(tmp_path) / "model.pt"
    model.write_bytes(model.read_bytes()[:-1000])
    assert run(tiny_shards, tmp_path) == 0
    assert_same_state(tmp_path, reference)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["run.batch_size=62"], "use at most 61"),
        (["data.root=/nowhere"], "/nowhere"),
        (["run.duration=soon"], "run.duration is 'soon'"),
        (["encoder.name=resnet49"], "did you mean 'resnet"),
        (["optim.fused=apex"], "NVIDIA Apex's optimisers cannot be imported"),
        (["run.device=cuda"], "torch finds no GPU"),
        (["knn.every=1ep"], "knn.every=never"),
        (["loader.backend=dally"], "loader.backend is 'dally'"),
        (["views.query.size=0"], "views.size is 0"),
    ],
)
def test_a_wrong_start_says_one_sentence_and_leaves_nothing(tiny_shards, tmp_path, capsys, more, sentence):
    if more == ["run.device=cuda"] and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    run_dir = tmp_path / "run"
    assert train.main(settings(tiny_shards, run_dir, *more)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert not run_dir.exists()


def test_help_version_and_the_whole_configuration_print(capsys):
    assert train.main(["--help"]) == 0
    assert "torchrun" in capsys.readouterr().out
    assert train.main(["data.root=x", "--print-config"]) == 0
    assert "queue_length: 65536" in capsys.readouterr().out
