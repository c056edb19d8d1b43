"""Checkpoints: whole or passed over, never a pickle that runs."""

import json
import os
import zipfile

import pytest
import torch

from fastssl import checkpoint, checkpoint_files
from fastssl.checkpoint import CheckpointError
from fastssl.nn.encoder import build_encoder

CPU = torch.device("cpu")
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
    checkpoint_files.seal(folder, {path.name for path in folder.iterdir()} - {"SHA256SUMS"})


def test_what_was_saved_comes_back(tmp_path):
    model, other = Holder(), Holder()
    torch.manual_seed(5)
    folder = save(tmp_path, 7, model)
    drawn = torch.rand(3)
    training = checkpoint.restore(folder, other, CPU)
    assert training == {"optimizer": {"step": 7}}
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    assert torch.equal(torch.rand(3), drawn)
    assert (tmp_path / "checkpoints" / "LAST").read_text().strip() == folder.name == "step-00000007"


def test_the_newest_are_kept_and_older_ones_go(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000002", "step-00000003"]


def test_a_missing_file_is_found(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "training.pt").unlink()
    with pytest.raises(CheckpointError, match=r"training\.pt is missing"):
        checkpoint.find(folder)


@pytest.mark.parametrize("legacy", [False, True], ids=["a zip of torch.save", "a bare pickle"])
def test_a_checkpoint_that_carries_code_is_refused(tmp_path, legacy):
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    folder = save(tmp_path, 1)
    torch.save(Payload(), folder / "model.pt", _use_new_zipfile_serialization=not legacy)
    reseal(folder)
    with pytest.raises(
        CheckpointError, match=r"model\.pt (holds other things than plain|is cut, or nothing that torch)"
    ):
        checkpoint.load_backbone(folder)
    with pytest.raises(CheckpointError):
        checkpoint.restore(folder, Holder(), CPU)
    assert not canary.exists()


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path):
    folder = save(tmp_path, 1)
    with zipfile.ZipFile(folder / "model.pt") as stored:
        members = {member.filename: stored.read(member) for member in stored.infolist()}
    with zipfile.ZipFile(folder / "model.pt", "w", zipfile.ZIP_DEFLATED) as swelling:
        for name, content in members.items():
            swelling.writestr(name, content)
    reseal(folder)
    with pytest.raises(CheckpointError, match=r"model\.pt is compressed, which fastssl never does"):
        checkpoint.load_backbone(folder)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("model.pt", {}, r"Missing key\(s\) in state_dict: .backbone\.conv1"),
        ("model.pt", {7: torch.zeros(1)}, ""),
        ("model.pt", {"backbone.conv1.weight": 7}, ""),
        ("model.pt", [1], "holds no tensors by name"),
        ("training.pt", torch.zeros(1), "holds no tensors by name"),
        ("rank-0.pt", {}, "rng"),
        ("rank-0.pt", {"rng": torch.zeros(3)}, ""),
    ],
)
def test_what_does_not_fit_is_answered_by_one_sentence(tmp_path, name, content, why):
    folder = save(tmp_path, 1)
    torch.save(content, folder / name)
    reseal(folder)
    with pytest.raises(CheckpointError, match=rf"{name}.*{why}.*; (take|give) [^\n]*$") as refused:
        checkpoint.restore(folder, Holder(), CPU)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 800


def test_another_architecture_under_the_same_settings_does_not_fit(tmp_path):
    folder = save(tmp_path, 1)
    other = Holder()
    other.backbone = build_encoder(**{**ENCODER, "width": 0.5})
    with pytest.raises(CheckpointError, match=r"model\.pt does not fit these settings.*size mismatch for backbone"):
        checkpoint.restore(folder, other, CPU)


def test_a_checkpoint_of_another_command_is_no_training_run(tmp_path):
    for config in (None, {}, {"encoder": 3}, {"encoder": ENCODER, "views": {"query": 3}}):
        folder = checkpoint.save(tmp_path, 1, Holder(), {}, {"config": config, "backbone_prefix": "backbone."}, 2)
        with pytest.raises(CheckpointError, match=r"is not of a run of fastssl-train; give a checkpoint of one"):
            checkpoint.load_backbone(folder)


def test_a_rank_that_is_new_draws_numbers_of_its_own_the_same_at_each_resume(tmp_path, monkeypatch):
    torch.manual_seed(7)
    folder, drawn = save(tmp_path, 1), {}
    for _ in range(2):
        for rank in range(3):
            monkeypatch.setattr(checkpoint.dist, "rank", lambda rank=rank: rank)
            torch.rand(rank + 5)  # whatever was drawn before
            checkpoint.restore(folder, Holder(), CPU)
            drawn.setdefault(rank, []).append(torch.rand(4))
    torch.manual_seed(7)
    Holder()
    first = torch.rand(4)
    assert all(torch.equal(*twice) for twice in drawn.values())
    assert torch.equal(drawn[0][0], first)
    assert len({tuple(twice[0].tolist()) for twice in drawn.values()}) == 3


def test_the_bytes_that_a_save_takes_are_counted_as_torch_counts_them(tmp_path):
    whole = torch.randn(3, 4)
    state = {"optimizer": {"a": whole, "b": [whole[0], whole.T], "c": torch.zeros(5, dtype=torch.int8)}}
    assert checkpoint._num_bytes(state) == 3 * 4 * 4 + 5


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
