"""Checkpoints: whole or passed over, never a pickle that runs."""

import json
import os
import pickle
import random
import subprocess
import sys

import pytest
import torch

from fastssl import checkpoint, checkpoint_files
from fastssl.checkpoint import CheckpointError
from fastssl.nn.encoder import build_encoder

ENCODER = {"name": "resnet10", "stem": "cifar", "width": 0.25}


class Holder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = build_encoder(**ENCODER)


def save(run_dir, step, model=None, keep=2):
    meta = {"config": {"encoder": ENCODER}, "backbone_prefix": "backbone."}
    return checkpoint.save(run_dir, step, model or Holder(), {"optimizer": {"step": step}}, meta, keep)


def reseal(folder):
    """SHA256SUMS that agrees with whatever the files hold now, as one who means harm would write it."""
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    checkpoint_files.seal(folder)


def test_what_was_saved_comes_back(tmp_path):
    model, other = Holder(), Holder()
    torch.manual_seed(5)
    folder = save(tmp_path, 7, model)
    drawn = torch.rand(3)
    training = checkpoint.restore(folder, other, torch.device("cpu"))
    assert training == {"optimizer": {"step": 7}}
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    assert torch.equal(torch.rand(3), drawn)
    assert (tmp_path / "checkpoints" / "LAST").read_text().strip() == folder.name == "step-00000007"


def test_the_newest_are_kept_and_older_ones_go(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000002", "step-00000003"]


def test_every_flipped_bit_is_found_and_the_one_before_is_taken(tmp_path):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    rng = random.Random(0)
    for _ in range(60):
        victim = rng.choice(sorted(p for p in newer.iterdir()))
        whole = victim.read_bytes()
        place = rng.randrange(len(whole) * 8)
        broken = bytearray(whole)
        broken[place // 8] ^= 1 << place % 8
        victim.write_bytes(broken)
        assert checkpoint.check(newer) is not None, (victim.name, place)
        assert checkpoint.newest(tmp_path) == older
        victim.write_bytes(whole)
    assert checkpoint.newest(tmp_path) == newer


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("name", ["model.pt", "training.pt", "rank-0.pt", "meta.json", "SHA256SUMS"])
def test_every_cut_file_is_found(tmp_path, name, share):
    folder = save(tmp_path, 1)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * share)])
    assert checkpoint.check(folder) is not None


def test_a_missing_file_is_found(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "training.pt").unlink()
    with pytest.raises(CheckpointError, match=r"training\.pt is missing"):
        checkpoint.find(folder)


def test_a_save_that_is_killed_leaves_the_one_before(tmp_path):
    """SIGKILL at each sync point of a save: a start afterwards finds a whole checkpoint every time."""
    save(tmp_path, 1)
    script = """
import os, sys, signal
from fastssl import checkpoint, checkpoint_files
from tests.fastssl.test_checkpoint import save
real, left = os.fsync, [int(sys.argv[2])]
def fsync(handle):
    real(handle)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.os.fsync = fsync
from pathlib import Path
save(Path(sys.argv[1]), 2)
print("survived")
"""
    outcomes = []
    for point in (1, 3, 6, 7, 8, 20):
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path), str(point)], capture_output=True, text=True)
        newest = checkpoint.newest(tmp_path)
        assert newest is not None
        outcomes.append((done.returncode, newest.name))
    assert [name for _, name in outcomes[:3]] == ["step-00000001"] * 3
    assert outcomes[-1] == (0, "step-00000002")
    assert all(code == -9 for code, _ in outcomes[:4])


def test_a_checkpoint_that_carries_code_is_refused(tmp_path):
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    folder = save(tmp_path, 1)
    (folder / "model.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
    reseal(folder)
    with pytest.raises(CheckpointError, match=r"model\.pt holds other things than plain tensors"):
        checkpoint.load_backbone(folder)
    assert not canary.exists()


def test_a_backbone_is_found_from_run_and_from_checkpoint_folder(tmp_path):
    model = Holder()
    folder = save(tmp_path, 3, model)
    for path in (tmp_path, tmp_path / "checkpoints", folder):
        backbone, meta = checkpoint.load_backbone(path)
        assert torch.equal(backbone.conv1.weight, model.backbone.conv1.weight)
        assert (meta["step"], meta["num_features"], backbone.training) == (3, 128, False)


def test_no_checkpoint_is_answered_by_one_sentence(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"no checkpoint at .*; give a run directory"):
            checkpoint.load_backbone(path)


def test_another_format_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "meta.json").write_text(json.dumps({"format": 99}))
    reseal(folder)
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.load_meta(folder)
