"""Tuned loader settings: found by measuring, used on the machine and for the views measured, never elsewhere."""

import dataclasses
import json

import pytest
import torch

from fastssl import config, tuned
from fastssl.bench import main as bench
from fastssl.bench import tuning
from fastssl.bench.rates import Rate
from fastssl.bench.record import Figure, Record
from fastssl.bench.tuning import Candidate
from tests.fastssl.runs import settings

FAST = ["bench.seconds=1", "bench.rounds=1", "bench.warmup_steps=1", "bench.objective=loader", "mode=tune"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSSL_TUNED", str(tmp_path / "tuned"))
    return tmp_path / "tuned"


def open_settings(shards, run_dir, *more):
    return [a for a in settings(shards, run_dir, *more) if not a.startswith("loader.threads=1")]


def saved(shards, run_dir, **changes):
    """A tuned file for small runs on this machine."""
    cfg = config.load(open_settings(shards, run_dir))
    found = tuned.Tuned(
        method="moco", machine=tuned.this_machine(cfg), views=tuned.views_digest(cfg), backend="exact", threads=3,
        prefetch=5, objective="loader", images_per_s=1.0, date="2026-01-02",
    )  # fmt: skip
    return tuned.save(dataclasses.replace(found, **changes))


def test_what_tune_finds_a_run_takes(tiny_shards, tmp_path, folder, capsys):
    arguments = open_settings(tiny_shards, tmp_path / "run", "loader.backend=exact")
    assert bench.main([*arguments, *FAST, f"bench.json={tmp_path}/b.json"]) == 0
    (written,) = folder.iterdir()
    found = json.loads(written.read_text())
    figures = Record.load(tmp_path / "b.json").figures
    assert f"tune/exact/threads_{found['threads']}/prefetch_{found['prefetch']}/images_per_s" in figures
    loader = config.load(arguments).loader
    assert (loader.backend, loader.threads, loader.prefetch) == ("exact", found["threads"], found["prefetch"])
    assert "as tuned on" in capsys.readouterr().err


def test_what_is_written_wins_over_what_was_tuned(tiny_shards, tmp_path):
    saved(tiny_shards, tmp_path)
    loader = config.load(open_settings(tiny_shards, tmp_path)).loader
    assert (loader.backend, loader.threads, loader.prefetch) == ("exact", 3, 5)
    loader = config.load(open_settings(tiny_shards, tmp_path, "loader.threads=2")).loader
    assert (loader.backend, loader.threads, loader.prefetch) == ("exact", 2, 5)
    loader = config.load(open_settings(tiny_shards, tmp_path, "loader.backend=dali")).loader
    assert (loader.backend, loader.threads, loader.batches_ahead) == ("dali", 0, 2)


def test_another_machine_is_told_and_other_views_are_left_alone(tiny_shards, tmp_path, capsys):
    path = saved(tiny_shards, tmp_path, machine={"cpu": "Z80", "cores": 1, "device": "cpu"})
    assert config.load(open_settings(tiny_shards, tmp_path)).loader.threads == 0
    assert capsys.readouterr().err == (
        f"loader: {path} was tuned on another machine, so it is not used; run fastssl-bench mode=tune here\n"
    )
    saved(tiny_shards, tmp_path, machine={"cpu": "Z80"}, views="other")
    path.unlink()
    capsys.readouterr()
    assert config.load(open_settings(tiny_shards, tmp_path)).loader.threads == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["", "[]", '{"format": "other"}', '{"format": "fastssl-tuned", "method": "moco"}'])
def test_a_file_that_is_none_of_ours_is_passed_over(tiny_shards, tmp_path, text):
    saved(tiny_shards, tmp_path).write_text(text)
    assert config.load(open_settings(tiny_shards, tmp_path)).loader.threads == 0


def test_of_those_as_good_as_the_best_the_one_that_takes_least_is_picked():
    many, few, slow = Candidate("exact", 4, 4), Candidate("exact", 2, 2), Candidate("exact", 1, 2)

    def rates(*rounds):
        return Figure("images/s", rounds)

    assert tuning.pick({many: rates(100, 110, 105), few: rates(95, 102, 99), slow: rates(50, 52, 51)}) == few
    assert tuning.pick({many: rates(100, 110, 105), few: rates(95, 98, 97), slow: rates(50, 52, 51)}) == many


def test_halving_ends_with_the_candidate_that_is_fastest(tiny_shards, tmp_path):
    """A rig whose rate is best at two threads, without a clock."""
    cfg = config.load(open_settings(tiny_shards, tmp_path))
    measured_s = []

    class Rig:
        def measure(self, part, seconds, cfg):
            measured_s.append(seconds)
            rate = 100 * (cfg.loader.backend == "exact") + 10 * (cfg.loader.threads == 2) + cfg.loader.prefetch
            return Rate(float(rate), 1, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0)

    choice = tuning.tune(cfg, torch.device("cpu"), Rig(), "loader", seconds=30, rounds=3)
    assert choice.best == Candidate("exact", 2, 4)
    assert sum(measured_s) == pytest.approx(30)
    assert choice.tried >= len(choice.finalists) >= 4
