"""The benchmark: what it measures, what it writes, which limit it names."""

import json

import pytest

from fastssl.bench import main as bench
from fastssl.bench.main import Rate, bottleneck
from tests.fastssl.runs import settings

FAST = ["bench.seconds=0.3", "bench.warmup_steps=1"]


def rate(images_per_s):
    return Rate(images_per_s, 1, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0)


def test_train_mode_measures_loader_step_and_both(tiny_shards, tmp_path, capsys):
    out = tmp_path / "bench.json"
    arguments = [a for a in settings(tiny_shards, tmp_path / "run") if "stop_after" not in a]
    assert bench.main([*arguments, *FAST, "mode=train", f"bench.json={out}"]) == 0
    result = json.loads(out.read_text())
    for name in ("loader", "step", "train"):
        measured = result[name]
        assert measured["images_per_s"] > 0
        assert measured["views_per_s"] == pytest.approx(2 * measured["images_per_s"])
        assert measured["megapixels_per_s"] == pytest.approx(measured["views_per_s"] * 32 * 32 / 1e6)
        assert 0 < measured["step_s_median"] <= measured["step_s_p95"]
    assert result["loader"]["data_wait"] > 0.9
    assert result["step"]["data_wait"] < 0.1
    assert result["config"]["run"]["batch_size"] == 8
    assert {"cpu", "cores", "torch"} <= result["machine"].keys()
    assert "bottleneck: the " in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_step_mode_needs_no_data(tmp_path):
    arguments = [a for a in settings("", tmp_path) if not a.startswith("data.root")]
    out = tmp_path / "step.json"
    assert bench.main([*arguments, *FAST, "mode=step", f"bench.json={out}"]) == 0
    assert json.loads(out.read_text()).keys() == {"step", "bottleneck", "config", "machine"}


def test_the_slower_half_is_named():
    assert bottleneck({"loader": rate(100), "step": rate(250)}).startswith("the loader: alone it does 100 images/s")
    assert bottleneck({"loader": rate(300), "step": rate(250)}).startswith("the step: alone it does 250 images/s")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["mode=lodaer"], "mode is 'lodaer', but must be one of loader, step, train (did you mean 'loader'?)"),
        (["bench.seconds=0"], "bench.seconds is 0"),
        (["bench.second=3"], "unknown setting 'bench.second' (did you mean 'bench.seconds'?)"),
    ],
)
def test_a_wrong_setting_is_answered_by_one_sentence(tiny_shards, tmp_path, capsys, more, sentence):
    assert bench.main([*settings(tiny_shards, tmp_path), *more]) == 2
    assert sentence in capsys.readouterr().err
