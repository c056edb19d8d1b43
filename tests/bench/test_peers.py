"""The programs that the loader is compared with: the same views, an honest clock, and errors that are errors.

Those that need nothing but torchvision run here; the others have an environment of their own, which the tests have not.
"""

import argparse
import ast
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.peers import fastssl_loader, fidelity, measure, torchvision_pillow, views
from fastssl import config
from pipelines import strong
from pipelines.augment import AugmentSpec
from pipelines.backends.exact import apply_strong
from pipelines.draw import draw_view
from pipelines.views import ViewSpec

PEERS = Path(views.__file__).parent
OURS = {"fastssl", "pipelines", "shard_tools"}


@pytest.fixture(scope="module")
def folder(photos, tmp_path_factory):
    """Four JPEG photographs in two classes."""
    root = tmp_path_factory.mktemp("folder")
    for i, photo in enumerate(photos):
        (root / f"class{i % 2}").mkdir(exist_ok=True)
        photo.save(root / f"class{i % 2}" / f"{i}.jpg", quality=90)
    return root


@pytest.mark.parametrize("name", views.VIEWS)
def test_the_peers_views_are_those_of_the_config(name):
    ours = [
        (s.size, s.count, s.scale, (a.brightness, a.contrast, a.saturation, a.hue), a.strong_draws)
        for s in config.load([f"method={name}", "data.root=none"]).view_specs()
        for a in [s.augment]
    ]
    theirs = [(v.size, v.count, v.scale, v.jitter, 5 * v.strong) for v in views.VIEWS[name]]
    if name == "moco_v2":
        ours = [(*ours[0][:1], len(ours), *ours[0][2:])]  # query and key are one recipe there
    assert theirs == ours


def test_the_peers_chances_are_those_of_the_config():
    for name in views.VIEWS:
        for spec in config.load([f"method={name}", "data.root=none"]).view_specs():
            a = spec.augment
            assert (a.jitter_p, a.grayscale_p, a.blur_p, a.blur_sigma, a.flip_p, a.grayscale_first, a.solarize_p) == (
                *(views.JITTER_P, views.GRAYSCALE_P, views.BLUR_P, views.BLUR_SIGMA, views.FLIP_P),
                *(False, 0.0),
            )
            assert (a.mean, a.std) == (views.MEAN, views.STD)


def test_peers_import_nothing_of_fastssl():
    paths = [path for path in PEERS.glob("*.py") if path.name != "fastssl_loader.py"]
    assert len(paths) > 10
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & OURS, path


@pytest.mark.parametrize("operation", strong.POOL)
def test_the_peers_strong_pool_is_that_of_the_exact_backend(operation, photos, monkeypatch):
    photo = photos[0].resize((64, 48))
    place = strong.POOL.index(operation)
    spec = ViewSpec("strong", 48, augment=AugmentSpec(strong_draws=1))
    draws = draw_view(spec, 0, seed=0, epoch=0, ids=[0], widths=[64], heights=[48])
    found = set()
    for level, sign in itertools.product(range(1, 10), (-1, 1)):
        draws.strong_operation[:], draws.strong_level[:], draws.strong_sign[:] = place, level, sign
        pixels = np.asarray(photo)[None].copy()
        apply_strong(pixels, draws, slice(0, 1))
        # A peer's pool has no names: the one that gives these pixels at every level and sign is the operation.
        found.add(
            tuple(
                i
                for i, theirs in enumerate(torchvision_pillow.POOL)
                if np.array_equal(np.asarray(theirs(photo, level, sign)), pixels[0])
            )
        )
    assert set.intersection(*map(set, found)), operation
    assert len(torchvision_pillow.POOL) == len(strong.POOL)


def test_strong_draws_five_operations_each_with_probability_one_half(monkeypatch):
    calls = []
    monkeypatch.setattr(torchvision_pillow, "POOL", [lambda image, level, sign: calls.append((level, sign)) or image])
    for _ in range(2000):
        torchvision_pillow.Strong()(None)
    assert len(calls) == pytest.approx(2.5 * 2000, abs=5 * math.sqrt(5 * 2000 / 4))
    assert set(calls) == set(itertools.product(range(1, 10), (-1, 1)))


def test_pillow_is_without_error_against_itself(folder):
    found = fidelity.errors(folder, torchvision_pillow.decode, torchvision_pillow.OPERATIONS)
    assert found == dict.fromkeys(fidelity.PARAMETERS, 0.0)


def test_an_error_of_one_grey_level_is_reported_as_one(folder):
    def flipped_bit(image, sigma):
        return fidelity.pillow(image, "blur", sigma) ^ 1

    assert fidelity.errors(folder, torchvision_pillow.decode, {"blur": flipped_bit}) == {"blur": 1.0}


def test_a_peer_is_asked_for_windows_inside_the_photograph(folder):
    asked = []

    def crop(image, parameter):
        asked.append((image.size, *parameter))
        return fidelity.pillow(image, "crop_96", parameter)

    assert fidelity.errors(folder, torchvision_pillow.decode, {"crop_96": crop}) == {"crop_96": 0.0}
    assert len(asked) == 4 * len(fidelity.PARAMETERS["crop_96"])
    for (width, height), (top, left, h, w), size in asked:
        assert 0 <= top < top + h <= height
        assert 0 <= left < left + w <= width
        assert size == 96


def test_a_folder_without_photographs_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no JPEG files"):
        fidelity.errors(tmp_path, torchvision_pillow.decode, {})


def test_the_exact_backend_has_no_error_in_any_operation(folder):
    found = fidelity.errors(folder, fastssl_loader.decode, fastssl_loader.operations("exact"))
    assert found == dict.fromkeys(fidelity.PARAMETERS, 0.0)


def test_the_clock_counts_whole_turns_of_the_workers_after_the_warm_up(capsys):
    taken = []

    def source():
        for i in itertools.count():
            taken.append(i)
            time.sleep(0.01)
            yield i

    options = argparse.Namespace(warmup=2, workers=3, seconds=0.05, batch=4, rounds=2)
    began = time.time()
    measure.measure(source(), options)
    first, *rounds = map(json.loads, capsys.readouterr().out.splitlines())
    assert began + 0.01 <= first["first_batch_at"] <= began + 5
    assert len(taken) * 4 == 2 * 3 * 4 + sum(r["images"] for r in rounds)
    for r in rounds:
        assert r["images"] % (3 * 4) == 0
        assert r["seconds"] >= 0.05
        assert r["images_per_s"] == pytest.approx(r["images"] / r["seconds"])
        assert r["images_per_s"] <= 400  # 4 images every 10 ms at best


def test_processor_time_includes_that_of_live_children():
    before = measure.cpu_s(os.getpid())
    burn = "import time\nwhile time.process_time() < 0.4: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        with_child = measure.cpu_s(os.getpid()) - before
        child.communicate(b"\n")
    assert 0.35 <= with_child <= 5.0
    assert measure.cpu_s(2**22 + 1) == 0.0  # above the largest process number


def test_a_view_of_the_peers_is_normalised_and_of_its_size():
    image = Image.new("RGB", (300, 200), (124, 116, 104))  # ImageNet's mean colour
    for view in torchvision_pillow.AllViews("swav")(image):
        assert view.shape[1:] in ((224, 224), (96, 96))
        assert view.isfinite().all()
    grey_at_mean = torchvision_pillow.T.Normalize(views.MEAN, views.STD)(torchvision_pillow.T.ToTensor()(image))
    assert grey_at_mean.abs().max() < 0.01


def test_the_own_loader_runs_as_a_program_of_the_peers_form(tiny_shards):
    command = [sys.executable, "-m", "bench.peers.fastssl_loader", "--backend", "exact", "--views", "moco_v2"]
    more = ["--shards", tiny_shards / "train", "--batch", "4", "--seconds", "0.2", "--warmup", "1"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, cwd=PEERS.parents[1], check=True)
    first, rate = map(json.loads, done.stdout.splitlines())
    assert first.keys() == {"first_batch_at"}
    assert rate["images"] >= 8
    assert 0 < rate["cpu_ms_per_image"] < 1000
