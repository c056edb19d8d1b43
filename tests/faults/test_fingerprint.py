"""What differs at a resume from what the run began with: refused with its name, or taken on purpose."""

import dataclasses
import shutil

import pytest
import torch

from fastssl import checkpoint, train
from pipelines import loader
from shard_tools.manifest import Manifest
from tests.fastssl.runs import settings, state
from tests.shards import write_split

OTHER_DATA = "was trained on other data"
THIRD_VIEW = "{size: 32, role: key, count: 1, crop: random_resized, scale: [0.2, 1], ratio: [1, 1], resize: 0}"


@pytest.fixture(scope="module")
def begun(tiny_files, tmp_path_factory):
    """(shards, folder of a run that is at step 4 of 6)."""
    root = tmp_path_factory.mktemp("begun")
    write_split(root / "shards", tiny_files, [i % 4 for i in range(len(tiny_files))])
    code = train.main(settings(root / "shards", root / "run", "run.duration=6steps", "run.stop_after=4steps"))
    assert code == 0
    return root / "shards", root / "run"


@pytest.fixture
def copies(begun, tmp_path):
    """The same, to be spoilt."""
    for folder, name in zip(begun, ("shards", "run")):
        shutil.copytree(folder, tmp_path / name)
    return tmp_path / "shards", tmp_path / "run"


def resume(shards, run_dir, *more):
    return train.main(settings(shards, run_dir, "run.duration=6steps", *more))


SETTINGS = {
    "the batch size": (["run.batch_size=4"], "run.batch_size was 8 and is 4"),
    "the seed": (["run.seed=1"], "run.seed was 0 and is 1"),
    "the length of the run": (["run.duration=8steps"], "run.duration was '6steps' and is '8steps'"),
    "the precision": (["run.precision=bf16"], "run.precision was 'fp32' and is 'bf16'"),
    "the size of a view": (["views.key.size=24"], "views.key.size was 32 and is 24"),
    "the scale of a view": (["views.key.scale=[0.3,1]"], "views.key.scale was"),
    "the number of views": ([f"+views.third={THIRD_VIEW}"], "method moco reads"),
    "the augmentation": (["augment.blur_p=0.1"], "augment.blur_p was 0.5 and is 0.1"),
    "the normalisation": (["data.mean=[0,0,0]"], "data.mean was"),
    "the order": (["loader.order=window"], "loader.order was 'global' and is 'window'"),
    "the decoder's scaling": (["loader.decode=scaled"], "loader.decode was 'full' and is 'scaled'"),
    "the method": (["method=moco_v1"], "method.head was 'mlp' and is 'linear'"),
    "the queue": (["method.queue_length=24"], "method.queue_length was 20 and is 24"),
    "the encoder": (["encoder.width=0.5"], "encoder.width was 0.25 and is 0.5"),
    "the optimiser": (["optim.momentum=0.8"], "optim.momentum was 0.9 and is 0.8"),
}


@pytest.mark.fault(
    "a resume with another batch size, seed, view, order, method, encoder or optimiser",
    "refused, with each setting, what it was and what it is",
    exit_code=2,
)
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_resume_with_another_setting_is_refused(begun, capsys, kind):
    more, sentence = SETTINGS[kind]
    assert resume(*begun, *more) == 2
    assert sentence in _the_one_sentence(capsys)


def other_samples(shards, files, labels):
    write_split(shards, files[:-1], labels[:-1])


def another_order(shards, files, labels):
    write_split(shards, files[::-1], labels[::-1])


def another_label(shards, files, labels):
    write_split(shards, files, [*labels[:-1], 3 - labels[-1]])


def another_image(shards, files, labels):
    write_split(shards, [*files[:-1], files[0]], labels)


def other_shard_sizes(shards, files, labels):
    write_split(shards, files, labels, shard_size=30)


def other_class_names(shards, files, labels):
    manifest = write_split(shards, files, labels)
    named = dataclasses.replace(manifest, classes=("another class", *manifest.classes[1:]))
    (shards / "train" / "manifest.json").write_bytes(named.to_bytes())


DATA = [other_samples, another_order, another_label, another_image, other_shard_sizes, other_class_names]


@pytest.mark.fault(
    "a resume on other samples, labels, classes, shards or an order of samples that is not the run's",
    "refused: the run was trained on other data",
    exit_code=2,
)
@pytest.mark.parametrize("change", DATA, ids=[change.__name__ for change in DATA])
def test_a_resume_on_other_data_is_refused(copies, tiny_files, capsys, change):
    shards, run_dir = copies
    shutil.rmtree(shards)
    change(shards, tiny_files, [i % 4 for i in range(len(tiny_files))])
    assert not Manifest.load(shards).check_quick()
    assert resume(shards, run_dir) == 2
    assert OTHER_DATA in _the_one_sentence(capsys)


@pytest.mark.fault(
    "a resume by a version that orders samples otherwise",
    "refused: other data, or another version",
    exit_code=2,
)
def test_a_resume_by_a_version_of_another_order_is_refused(begun, capsys, monkeypatch):
    monkeypatch.setattr(loader, "FORMAT_VERSION", loader.FORMAT_VERSION + 1)
    assert resume(*begun) == 2
    assert OTHER_DATA in _the_one_sentence(capsys)


def test_a_window_of_another_length_is_refused_where_it_is_used_only(tiny_shards, tmp_path, capsys):
    window = ["loader.order=window", "loader.window=2"]
    assert resume(tiny_shards, tmp_path, "run.stop_after=2steps", *window) == 0
    capsys.readouterr()
    assert resume(tiny_shards, tmp_path, "loader.order=window", "loader.window=3") == 2
    assert "loader.window was 2 and is 3" in _the_one_sentence(capsys)


@pytest.fixture(scope="module")
def whole(begun, tmp_path_factory):
    """All six steps without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    assert resume(begun[0], folder) == 0
    return state(folder)


@pytest.mark.parametrize(
    "more",
    [
        ["loader.threads=3", "loader.prefetch=5"], ["loader.window=3"], ["loader.max_bad=0.5", "loader.on_bad=fail"],
        ["run.save_every=1steps", "run.keep=4", "run.log_every=1"], ["run.timeout_s=60", "run.max_rejected=3"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_does_not_change_what_is_computed_may_differ_at_a_resume(copies, whole, more):
    assert resume(*copies, *more) == 0
    assert _equal(state(copies[1]), whole)


def test_the_shards_may_have_moved(copies, whole):
    shards, run_dir = copies
    shards.rename(shards.with_name("moved"))
    assert resume(shards.with_name("moved"), run_dir) == 0
    assert _equal(state(run_dir), whole)


def test_another_backend_is_taken_though_its_pixels_differ(copies, whole):
    """By what docs/pipelines.md states of its tolerance: where a run is continued, there may be no compiler."""
    assert resume(*copies, "loader.backend=exact") == 0
    assert state(copies[1]).keys() == whole.keys()


@pytest.mark.fault(
    "an image's bytes change between two lives, the manifest does not",
    "the sample is named and replaced as any bad one is; the rest of the batch is what it was",
    exit_code=0,
)
def test_changed_bytes_under_the_same_manifest_are_named(copies, capfd):
    shards, run_dir = copies
    manifest = Manifest.load(shards)
    for row in range(0, 61, 2):  # two steps are left, of 16 of the 61
        entry = manifest.index()[row]
        path = manifest.shard_path(int(entry["shard"]))
        content = bytearray(path.read_bytes())
        content[int(entry["offset"]) + int(entry["size"]) // 2] ^= 1
        path.write_bytes(content)
    assert resume(shards, run_dir, "loader.max_bad=1") == 0
    said = (run_dir / "bad-samples-rank-0.txt").read_text()
    assert "has other bytes than were packed" in said
    assert said.splitlines()[0] in capfd.readouterr().err


def test_a_checkpoint_of_a_later_format_is_refused(begun, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
        assert resume(begun[0], tmp_path, "run.stop_after=2steps") == 0
    capsys.readouterr()
    assert resume(begun[0], tmp_path) != 0
    assert "format" in capsys.readouterr().err


def _the_one_sentence(capsys):
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def _equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
