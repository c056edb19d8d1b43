"""Each source finds the images, the labels and the class names that its layout means."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shard_tools.manifest import ShardError
from shard_tools.pack import PackOptions, pack
from shard_tools.sources import Source, cifar10, demo, files, imagefolder, imagenet, webdataset
from tests.shard_tools.builders import class_tree, jpeg, payloads, plant

WNIDS = ("n01440764", "n01443537", "n02105855")


def labels(source: Source) -> dict[str, int]:
    return {item.name: item.label for item in source.items}


def test_imagefolder_reads_class_folders_at_the_top_or_below_the_split(tmp_path: Path) -> None:
    flat = imagefolder.open_source(class_tree(tmp_path / "flat", 2), "train")
    assert flat.classes == ("ant", "bee", "cat")
    assert labels(flat)["bee/001.jpg"] == 1
    class_tree(tmp_path / "split/train", 2)
    class_tree(tmp_path / "split/test", 1, classes=("cat",))
    test = imagefolder.open_source(tmp_path / "split", "test")
    assert labels(test) == {"cat/000.jpg": 2}  # the train split's number
    with pytest.raises(ShardError, match="has no split 'val', only test, train"):
        imagefolder.open_source(tmp_path / "split", "val")
    class_tree(tmp_path / "split/test", 1, classes=("dog",))
    with pytest.raises(ShardError, match="class folders that the train split has not, such as 'dog'"):
        imagefolder.open_source(tmp_path / "split", "test")


def test_other_files_are_counted_and_hidden_ones_and_link_circles_passed_over(tmp_path: Path) -> None:
    src = plant(tmp_path, {"a/1.jpg": jpeg(1), "a/deep/2.PNG": b"x", "a/Thumbs.db": b"x", "a/.hidden.jpg": b"x"})
    (src / "a/deep/up").symlink_to("..")
    source = imagefolder.open_source(src, "train")
    assert sorted(labels(source)) == ["a/1.jpg", "a/deep/2.PNG"]
    assert source.notes["num_ignored"] == 1


def test_a_folder_without_class_folders_is_refused_with_the_source_that_fits(tmp_path: Path) -> None:
    plant(tmp_path, {"1.jpg": jpeg(1)})
    with pytest.raises(ShardError, match="use `shard_tools pack files`"):
        imagefolder.open_source(tmp_path, "train")


def test_files_takes_any_tree_without_labels(tmp_path: Path) -> None:
    plant(tmp_path, {"1.jpg": jpeg(1), "b/c/2.jpeg": jpeg(2), "train/3.webp": jpeg(3), "notes.txt": b"x"})
    source = files.open_source(tmp_path, "train")
    assert source.classes is None
    assert labels(source) == {"1.jpg": -1, "b/c/2.jpeg": -1, "train/3.webp": -1}


@pytest.fixture
def imagenet_tree(tmp_path: Path) -> Path:
    """train in class folders, not in the wnids' order, and a flat val of four."""
    for number, wnid in enumerate(reversed(WNIDS)):
        plant(tmp_path / "train", {f"{wnid}/{wnid}_{i}.JPEG": jpeg(10 * number + i) for i in range(2)})
    return plant(tmp_path, {f"val/ILSVRC2012_val_0000000{i}.JPEG": jpeg(50 + i) for i in range(1, 5)})


def ground_truth(folder: Path, text: str, name: str = "truth.txt") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_imagenet_sorts_classes_by_wnid_from_the_root_the_train_folder_or_itself(imagenet_tree: Path) -> None:
    for source in (
        imagenet.open_source(imagenet_tree, "train"),
        imagenet.open_source(imagenet_tree / "train", "train"),
    ):
        assert source.classes == WNIDS
        assert labels(source)["n02105855/n02105855_1.JPEG"] == 2
        assert len(source.items) == 6


@pytest.mark.parametrize(
    "text",
    [
        "n02105855\nn01440764\nn01443537\nn01440764\n",
        "2\n0\n1\n0\n",
        "ILSVRC2012_val_00000003.JPEG 1\nILSVRC2012_val_00000001.JPEG 2\n"
        "ILSVRC2012_val_00000002.JPEG 0\nILSVRC2012_val_00000004.JPEG 0\n",
        "ImageId,PredictionString\nILSVRC2012_val_00000004,n01440764 1 2 3 4 n01440764 5 6 7 8 \n"
        "ILSVRC2012_val_00000001,n02105855 85 1 499 272 \nILSVRC2012_val_00000003,n01443537 1 2 3 4 \r\n"
        "ILSVRC2012_val_00000002,n01440764 1 2 3 4\n",
    ],
    ids=["wnids", "numbers", "caffe", "kaggle"],
)
def test_a_flat_val_takes_its_labels_from_any_form_of_ground_truth(imagenet_tree: Path, text: str) -> None:
    source = imagenet.open_source(imagenet_tree, "val", ground_truth(imagenet_tree, text))
    assert source.classes == WNIDS
    assert [item.label for item in source.items] == [2, 0, 1, 0]


def test_the_development_kits_own_numbers_are_translated_by_its_meta_mat_and_else_refused(imagenet_tree: Path) -> None:
    kit = ground_truth(imagenet_tree, "2\n3\n1\n3\n", "ILSVRC2012_validation_ground_truth.txt")
    with pytest.raises(ShardError, match=r"counts classes from 1.*meta\.mat"):
        imagenet.open_source(imagenet_tree, "val", kit)
    savemat = pytest.importorskip("scipy.io").savemat
    kit_order = ["n01443537", "n02105855", "n01440764", "n09999999"]  # the last is no leaf, as in the real kit
    record = np.zeros((4, 1), [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
    for number, wnid in enumerate(kit_order):
        record[number, 0] = (number + 1, wnid, f"thing {number}")
    for compressed in (True, False):
        savemat(imagenet_tree / "meta.mat", {"synsets": record}, do_compression=compressed)
        source = imagenet.open_source(imagenet_tree, "val", kit)
        assert [item.label for item in source.items] == [2, 0, 1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n02105855\nn01440764\n", "has 2 lines for 4 images"),
        ("0\n1\n2\nfish\n", "'fish' is neither a wnid"),
        ("0\n1\n2\n7\n", "7 of ILSVRC2012_val_00000004.JPEG is none of the 3 train classes"),
        ("n02105855\nn01440764\nn01443537\nn99999999\n", "'n99999999' of ILSVRC2012_val_00000004.JPEG is none"),
        ("ILSVRC2012_val_00000001.JPEG 0\n", "says nothing of 3 images"),
        ("a 0\nb\n", "mixes lines"),
    ],
)
def test_a_ground_truth_that_does_not_fit_is_refused(imagenet_tree: Path, text: str, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        imagenet.open_source(imagenet_tree, "val", ground_truth(imagenet_tree, text))


def test_a_flat_val_without_ground_truth_and_a_tree_without_wnids_say_what_is_missing(
    imagenet_tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(ShardError, match="give its ground truth with --val-labels"):
        imagenet.open_source(imagenet_tree, "val")
    with pytest.raises(ShardError, match="use the source imagefolder"):
        imagenet.open_source(class_tree(tmp_path_factory.mktemp("other")), "train")


def test_val_in_class_folders_uses_the_numbers_of_train(imagenet_tree: Path) -> None:
    plant(imagenet_tree, {"validation/n02105855/a.JPEG": jpeg(1)})
    assert labels(imagenet.open_source(imagenet_tree, "validation")) == {"n02105855/a.JPEG": 2}


CIFAR_CLASSES = [b"airplane", b"automobile", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse", b"ship", b"truck"]


def cifar_pickles(folder: Path, per_batch: int = 6) -> Path:
    """The python version's files with random images, in the protocol of the originals."""
    folder.mkdir(parents=True)
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": CIFAR_CLASSES}, protocol=2))
    rng = np.random.default_rng(0)
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        batch = {
            b"data": rng.integers(0, 256, (per_batch, 3072), np.uint8),
            b"labels": [(number + i) % 10 for i in range(per_batch)],
            b"filenames": [f"thing_s_{number}{i:04d}.png".encode() for i in range(per_batch)],
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


def test_cifar_pickles_become_lossless_png(tmp_path: Path) -> None:
    folder = cifar_pickles(tmp_path / "cifar-10-batches-py")
    for src in (tmp_path, folder):
        source = cifar10.open_source(src, "test")
        assert source.classes == tuple(str(name, "ascii") for name in CIFAR_CLASSES)
    batch = pickle.loads((folder / "test_batch").read_bytes())  # our own file
    for row, item in enumerate(source.items):
        image = Image.open(io.BytesIO(source.read(item)))
        assert image.format == "PNG"
        planes = batch[b"data"][row].reshape(3, 32, 32)
        np.testing.assert_array_equal(np.asarray(image), planes.transpose(1, 2, 0))
        assert item.label == batch[b"labels"][row]
    train = pack(cifar10.open_source(tmp_path, "train"), tmp_path / "dst", PackOptions(workers=2)).manifest
    assert train.num_samples == 30
    assert train.census["formats"] == {"png": 30}


def test_cifar_pickles_of_python_2_are_read(tmp_path: Path) -> None:
    """The originals were written by Python 2: byte strings are `str` there, and arrays name numpy.core."""
    data = bytes(range(256)) * 12
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        b"(K\x01(K\x01M\x00\x0ctcnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + len(data).to_bytes(4, "little") + data + b"tb"
    )
    text = b"\x80\x02}(U\x04data" + array + b"U\x06labels]K\x03aU\x09filenames]U\x05x.pngau."
    folder = cifar_pickles(tmp_path / "c")
    (folder / "test_batch").write_bytes(text)
    source = cifar10.open_source(folder, "test")
    (item,) = source.items
    assert (item.name, item.label) == ("test_batch/cat/x.png", 3)
    assert np.asarray(Image.open(io.BytesIO(source.read(item))))[0, :3].tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]


class _Canary:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


class _Evil(_Canary):
    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.path)!r}, 'w')",)


@pytest.mark.parametrize("attack", [_Canary, _Evil])
def test_a_pickle_that_runs_code_is_refused_before_it_does(tmp_path: Path, attack: type[_Canary]) -> None:
    folder = cifar_pickles(tmp_path / "c")
    for document in (
        {b"data": attack(tmp_path / "canary"), b"labels": [], b"filenames": []},
        attack(tmp_path / "canary"),
    ):
        (folder / "test_batch").write_bytes(pickle.dumps(document, protocol=2))
        with pytest.raises(ShardError, match="which image data does not need"):
            cifar10.open_source(folder, "test")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a CIFAR-10 pickle"),
        (b"\x80\x02}q\x00(U\x04data", "is not a CIFAR-10 pickle"),
        (pickle.dumps([1, 2], protocol=2), "has no data"),
        (
            pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [0, 1], b"filenames": []}, 2),
            "something else than bytes",
        ),
        (
            pickle.dumps({b"data": np.zeros((2, 10), np.uint8), b"labels": [0, 1], b"filenames": [b"a", b"b"]}, 2),
            "32x32",
        ),
        (
            pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [12], b"filenames": [b"a"]}, 2),
            "no classes",
        ),
    ],
)
def test_a_damaged_pickle_is_a_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    folder = cifar_pickles(tmp_path / "c")
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(ShardError, match=message):
        cifar10.open_source(folder, "test")


def test_cifar_as_folders_and_splits_it_does_not_have(tmp_path: Path) -> None:
    class_tree(tmp_path / "train", 2)
    class_tree(tmp_path / "test", 1)
    assert len(cifar10.open_source(tmp_path, "train").items) == 6
    assert cifar10.open_source(tmp_path, "test").kind == "cifar10"
    with pytest.raises(ShardError, match="no split 'val', only train and test"):
        cifar10.open_source(tmp_path, "val")


def test_demo_patches_of_train_and_test_share_no_pixel_and_are_photographs_with_attribution() -> None:
    train, test = (demo.open_source(split) for split in ("train", "test"))
    assert (len(train.items), len(test.items)) == (4000, 1000)
    reach: dict[str, int] = {}
    for item in train.items:
        name, (_, _, right, _), _, _ = item.at
        reach[name] = max(reach.get(name, 0), right)
    assert all(item.at[1][0] >= reach[item.at[0]] for item in test.items)
    image = Image.open(io.BytesIO(train.read(train.items[0])))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))
    text = train.side_files["ATTRIBUTION.txt"].decode()
    assert train.classes is not None
    assert all(f"\n{name}: " in text for name in train.classes)
    assert text.count("CC BY 2.0; ") == 2
    assert not {"motorcycle", "moon", "page"} & set(train.classes)


def test_demo_patches_are_the_same_for_a_seed_and_differ_between_seeds() -> None:
    assert demo.open_source("train", 0).items == demo.open_source("train", 0).items
    assert demo.open_source("train", 0).items != demo.open_source("train", 1).items


def test_demo_without_its_packages_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    demo._photo.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ShardError, match=r"pip install 'fastssl-train\[demo\]'"):
        demo.open_source("train")


def test_demo_does_not_import_the_packages_whose_photographs_it_reads() -> None:
    code = "import sys; from shard_tools.sources import demo; demo.open_source('train', num_patches=20); "
    code += "sys.exit(any(name in sys.modules for name in ('skimage', 'sklearn', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_webdataset_packs_our_own_shards_again_with_names_labels_and_classes(tmp_path: Path) -> None:
    first = pack(
        imagefolder.open_source(class_tree(tmp_path / "src"), "train"), tmp_path / "a", PackOptions(shard_size=5)
    )
    for src in (tmp_path / "a", tmp_path / "a/train", f"{tmp_path}/a/train/train-{{000000..000004}}.tar"):
        source = webdataset.open_source(str(src), "train")
        assert source.classes == ("ant", "bee", "cat")
        assert labels(source)["bee/003.jpg"] == 1
    again = pack(source, tmp_path / "b", PackOptions(seed=1)).manifest
    assert sorted(payloads(again)) == sorted(payloads(first.manifest))


@pytest.mark.parametrize(
    ("src", "message"),
    [
        ("pipe:cat x.tar", "not a local path"),
        ("https://example.org/x.tar", "not a local path"),
        ("a.tar::b.tar", "not a local path"),
        ("x-{000..999999999}.tar", "more than 1000000"),
        ("{0..999}{0..999}{0..999}.tar", "means 1000000000 shards"),
        ("x-{000..002}.tar", "3 of 3 shards are missing, such as x-000.tar"),
        (".", "holds no .tar files"),
    ],
)
def test_webdataset_takes_local_paths_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, src: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ShardError, match=message):
        webdataset.open_source(src, "train")
