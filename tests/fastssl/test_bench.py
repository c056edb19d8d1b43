"""The benchmark: what it measures, what it writes, which limit it names."""

import dataclasses
import json

import pytest
import torch

from fastssl import config
from fastssl.bench import main as bench
from fastssl.bench import packing, stages
from fastssl.bench.rates import Rate, bottleneck, figures
from fastssl.bench.record import Figure, Record
from pipelines.augment import AugmentSpec
from tests.fastssl.runs import settings

FAST = ["bench.seconds=0.3", "bench.rounds=2", "bench.warmup_steps=1"]


def rate(images_per_s, data_wait=0.0):
    return Rate(images_per_s, 1, 1.0, 1.0, 1.0, data_wait, 1.0, 1.0)


def run(shards, folder, *more):
    """The Record that the command leaves."""
    arguments = [a for a in settings(shards, folder / "run") if "stop_after" not in a]
    out = folder / "bench.json"
    assert bench.main([*arguments, *FAST, f"bench.json={out}", *more]) == 0
    return Record.load(out)


def test_train_mode_measures_loader_step_and_both(tiny_shards, tmp_path, capsys):
    found = run(tiny_shards, tmp_path, "mode=train").figures
    for part in ("loader", "step", "train"):
        of = {name.rpartition("/")[2]: figure for name, figure in found.items() if name.startswith(f"{part}/")}
        assert all(len(figure.rounds) == 2 for figure in of.values())
        for i in range(2):
            images_per_s, views_per_s = of["images_per_s"].rounds[i], of["views_per_s"].rounds[i]
            assert images_per_s > 0
            assert views_per_s == pytest.approx(2 * images_per_s)
            assert of["megapixels_per_s"].rounds[i] == pytest.approx(views_per_s * 32 * 32 / 1e6)
            assert 0 < of["step_s_median"].rounds[i] <= of["step_s_p95"].rounds[i]
    assert found["loader/data_wait"].median > 0.9
    assert found["step/data_wait"].median < 0.1
    pairs = zip(found["train/images_per_s"].rounds, found["step/images_per_s"].rounds)
    assert found["train/share_of_ceiling"].rounds == pytest.approx(tuple(t / s for t, s in pairs))
    assert "limit: the " in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_result_holds_its_conditions(tiny_shards, tmp_path):
    record = run(tiny_shards, tmp_path, "mode=step")
    assert record.settings["config"]["run"]["batch_size"] == 8
    assert record.settings["data"]["samples"] == 61
    assert {"cpu", "cores", "gpu"} <= record.machine.keys()
    assert {"torch", "numpy"} <= record.versions.keys()
    assert "mode=step" in record.command


def test_step_mode_needs_no_data(tmp_path):
    arguments = [a for a in settings("", tmp_path) if not a.startswith("data.root")]
    out = tmp_path / "step.json"
    assert bench.main([*arguments, *FAST, "mode=step", f"bench.json={out}"]) == 0
    assert {name.split("/")[0] for name in Record.load(out).figures} == {"step"}


def test_the_slower_half_is_named():
    def limit(loader, step, train, wait):
        return bottleneck(figures({"loader": [rate(loader)], "step": [rate(step)], "train": [rate(train, wait)]}))

    assert limit(100, 250, 80, 0.6) == (
        "limit: the loader, which alone does 100 images/s, the step 250; together 80, which is 32% of the step alone,"
        " with 60% of the time spent waiting for data"
    )
    assert limit(300, 250, 240, 0.0).startswith("limit: the step, which alone does 250 images/s, the loader 300")


# --- stages


def test_loader_mode_adds_up_the_stages_to_the_whole(tiny_shards, tmp_path, capsys):
    record = run(tiny_shards, tmp_path, "mode=loader", "loader.backend=exact", "++views.key.augment.solarize_p=0.2")
    ladder = stages.stages(record.figures)
    assert [stage.name for stage in ladder] == ["read", "decode", "crop", "colour", "blur", "write-out"]
    whole = record.figures["rungs/write-out/cpu_ms_per_image"].rounds
    assert [sum(stage.cpu_ms.rounds[i] for stage in ladder) for i in range(2)] == pytest.approx(list(whole))
    assert record.note.startswith("limit: ")
    assert "write-out" in capsys.readouterr().out


def test_each_setting_of_the_chain_belongs_to_one_stage():
    of_photographs = [*stages._ALWAYS, *(name for names in stages._PHOTOGRAPHS.values() for name in names)]
    of_stamps = [name for names in stages._STAMPS.values() for name in names]
    assert sorted([*of_photographs, *of_stamps]) == sorted(f.name for f in dataclasses.fields(AugmentSpec))


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("method=moco_v1", ["decode", "crop", "colour"]),
        ("method=swav", ["decode", "crop", "colour", "blur"]),
        ("method=clsa_multi", ["decode", "crop", "colour", "blur", "strong"]),
    ],
)
def test_a_ladder_has_only_the_stages_of_its_method(method, names):
    specs = config.load([method, "data.root=none"]).view_specs()
    rungs = stages.specs_by_stage(specs, bands=0)
    assert list(rungs) == names
    assert rungs[names[-1]] == specs
    assert all((s.size, s.count, s.scale) == (r.size, r.count, r.scale) for s, r in zip(specs, rungs["crop"]))


def test_stamps_have_stages_of_their_own():
    specs = config.load(["recipe=galaxies_cpu", "data.root=none"]).view_specs()
    rungs = stages.specs_by_stage(specs, bands=4)
    assert list(rungs) == ["decode", "crop", "stretch"]
    assert [spec.augment.stretch for spec in rungs["crop"]] == ["none"] * len(specs)
    assert [spec.augment.stretch for spec in rungs["stretch"]] == [spec.augment.stretch for spec in specs]


def rungs(**cpu_ms):
    return {
        f"rungs/{name.replace('_', '-')}/{clock}_ms_per_image": Figure("ms/image", tuple(rounds))
        for name, rounds in cpu_ms.items()
        for clock in ("cpu", "wall")
    }


def test_a_stage_within_the_spread_is_a_bound_and_never_below_nothing():
    read, decode, crop, blur = stages.stages(
        rungs(read=(0.1, 0.1, 0.1), decode=(2.1, 2.2, 2.1), crop=(3.1, 3.3, 3.2), blur=(3.0, 3.5, 3.1))
    )
    assert decode.resolved
    assert crop.resolved
    assert crop.cpu_ms.rounds == pytest.approx((1.0, 1.1, 1.1))
    assert not blur.resolved
    assert blur.text == "less than 0.20"
    assert read.cpu_ms.rounds == (0.1, 0.1, 0.1)


def test_the_costliest_stage_is_the_limit_unless_storage_is():
    busy = rungs(read=(0.1,), decode=(2.1,), crop=(3.1,), write_out=(3.2,))
    assert stages.limit(busy, threads=2) == (
        "limit: decode, 65% of the loader's 3.10 CPU-ms per image; 2 thread(s) that did nothing else would make"
        " 1000 images/s. The floats that the step takes cost 0.10 more"
    )
    waiting = busy | {f"rungs/{name}/wall_ms_per_image": Figure("ms/image", (9.0,)) for name in ("read", "write-out")}
    assert stages.limit(waiting, threads=2).startswith("limit: storage, reading alone takes 9.00 of 9.00 ms")


# --- pack


def test_pack_mode_measures_pack_beside_decode(tiny_shards, tmp_path):
    record = run(tiny_shards, tmp_path, "mode=pack", "bench.workers=1", "bench.rounds=1", "bench.images=20")
    found = {name: figure.median for name, figure in record.figures.items()}
    assert record.settings["images"] == 20
    ratio = found["pack/1_workers/images_per_s"] / found["decode/1_workers/images_per_s"]
    assert found["pack/1_workers/share_of_decode"] == pytest.approx(ratio)
    assert found["pack/1_workers/efficiency"] == 1.0
    assert record.note.startswith("limit: what comes beside the decode")  # of 20 small images, the start of Python


@pytest.mark.parametrize(("most", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_workers_are_doubled_up_to_the_most(most, counts):
    assert packing.worker_counts(most) == counts


def test_what_the_packer_refuses_is_said(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert bench.main(["mode=pack", f"bench.src={tmp_path}/empty", "run.device=cpu"]) == 2
    assert "empty has no class folders" in capsys.readouterr().err
    assert bench.main(["mode=pack", "data.root=", "run.device=cpu"]) == 2
    assert "mode=pack has nothing to pack" in capsys.readouterr().err


# --- settings


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["mode=lodaer"], "mode is 'lodaer', but must be one of loader, step, train, pack, tune (did you mean 'loader"),
        (["bench.seconds=0"], "bench.seconds is 0"),
        (["bench.rounds=0"], "bench.rounds is 0"),
        (["bench.second=3"], "unknown setting 'bench.second' (did you mean 'bench.seconds'?)"),
        (["bench.against=nowhere.json"], "nowhere.json cannot be read as a result of fastssl-bench"),
    ],
)
def test_a_wrong_setting_is_answered_by_one_sentence(tiny_shards, tmp_path, capsys, more, sentence):
    assert bench.main([*settings(tiny_shards, tmp_path), *more]) == 2
    assert sentence in capsys.readouterr().err


def test_a_file_of_another_kind_is_refused(tmp_path):
    other = tmp_path / "other.json"
    for text, sentence in [
        ("[]", "is no result"),
        ('{"format": "fastssl-bench", "version": 9}', "version 9"),
        ('{"format": "fastssl-bench", "version": 1}', "no whole result"),
    ]:
        other.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            Record.load(other)


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = Record("what", "command", {"a/b": Figure("ms", (3.0, 1.0, 2.0))}, {"batch": 8}, note="so it is")
    record.save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json") == record
    assert json.loads((tmp_path / "record.json").read_text())["figures"]["a/b"]["median"] == 2.0
    assert torch.__version__.startswith(record.versions["torch"].split("+")[0])
