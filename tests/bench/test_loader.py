"""The runner of the loader's comparison: what a round leaves behind, with programs that only print."""

import dataclasses
import sys
from dataclasses import dataclass

import pytest

from bench import loader, loader_report
from bench.loader import Data, Program
from fastssl.bench.record import Figure, Record

RATES = {"torchvision_pillow": 100.0, "pure_decode": 1000.0, "fastssl_native": 650.0}


@dataclass(frozen=True)
class FakeProgram(Program):
    """Prints the lines of a peer, or runs a script instead."""

    rate: float = 1.0
    script: str = ""

    def command(self, data, *more):
        rate = {"images_per_s": self.rate, "cpu_ms_per_image": 2000 / self.rate, "images": 64, "seconds": 1.0}
        if "--describe" in more:
            lines = [{"differs": "in nothing", "output": "numbers"}]
        elif "--fidelity" in more:
            lines = [{"errors": {"crop_224": 0.25, "hue": 7.0}}]
        else:
            lines = [rate]
        now = "" if len(more) < 2 else "print(json.dumps({'first_batch_at': time.time()}))\n"
        own = f"import json, time\n{now}for line in {lines!r}: print(json.dumps(line))"
        return [sys.executable, "-c", self.script or own]


def fakes(**scripts):
    return {
        name: FakeProgram(
            f"the {name}", "none", ours=name.startswith("fastssl"), rate=rate, script=scripts.get(name, "")
        )
        for name, rate in RATES.items()
    }


@pytest.fixture
def images(photos, tmp_path):
    folder = tmp_path / "photos" / "train" / "things"
    folder.mkdir(parents=True)
    for i, photo in enumerate(photos):
        photo.save(folder / f"{i}.jpg")
    return tmp_path / "photos"


@pytest.fixture
def run(images, tmp_path, monkeypatch):
    """run(*arguments, **scripts) -> (exit code, Record or None)"""
    out = tmp_path / "results" / "loader.json"

    def run(*arguments, **scripts):
        monkeypatch.setattr(loader, "programs", lambda: fakes(**scripts))
        where = ["--out", out, "--image", tmp_path / "loader.png", "--work", tmp_path / "work"]
        code = loader.main([str(a) for a in ["--data", images, *where, *arguments]])
        return code, Record.load(out) if out.exists() else None

    return run


def test_a_round_has_rates_start_ratio_and_share_of_every_program(run):
    code, kept = run("--steps", "rounds", "--rounds", 2, "--views", "moco_v2")
    assert code == 0
    for name, rate in RATES.items():
        of = {key: kept.figures[f"moco_v2/{name}/{key}"] for key in ("images_per_s", "ratio", "share_of_decode")}
        assert of["images_per_s"] == Figure("images/s", (rate, rate))
        assert of["ratio"] == Figure("x", (rate / 100,) * 2)
        assert of["share_of_decode"] == Figure("x", (rate / 1000,) * 2)
        assert kept.figures[f"moco_v2/{name}/cpu_ms_per_image"].median == pytest.approx(2000 / rate)
        assert all(0 < start < 20 for start in kept.figures[f"moco_v2/{name}/start_s"].rounds)
    assert kept.settings["images"] == 4
    assert kept.settings["data"] == "photos"
    assert kept.versions["peer/kornia"]


def test_a_ratio_is_formed_within_its_round():
    slow = loader.round_figures("swav", {"torchvision_pillow": rate(50), "x": rate(200)})
    quick = loader.round_figures("swav", {"torchvision_pillow": rate(100), "x": rate(500)})
    both = loader.extended(loader.extended({}, slow), quick)
    assert both["swav/x/ratio"].rounds == (4.0, 5.0)
    assert "swav/x/share_of_decode" not in both  # the round had no ceiling


def test_append_adds_rounds_and_views_and_keeps_what_was_there(run):
    run("--steps", "rounds", "--rounds", 1, "--views", "moco_v2")
    run("--steps", "rounds", "--rounds", 2, "--views", "moco_v2", "--append")
    _, kept = run("--steps", "rounds", "--rounds", 1, "--views", "swav", "--append", "--peers", "fastssl_native")
    assert loader.num_rounds(kept.figures, "moco_v2") == 3
    assert loader.num_rounds(kept.figures, "swav") == 1
    assert "swav/torchvision_pillow/images_per_s" not in kept.figures
    _, anew = run("--steps", "rounds", "--rounds", 1, "--views", "moco_v2")
    assert loader.num_rounds(anew.figures, "moco_v2") == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"settings": {"batch": 32}}, "batch"),
        ({"versions": {"peer/kornia": "0.1"}}, "peer/kornia"),
        ({"machine": {"cpu": "another", "cores": 64}}, "cpu"),
        ({"commit": "0123456789"}, "0123456789"),
    ],
)
def test_a_record_of_other_conditions_is_not_continued(change, named, tmp_path):
    fresh = Record("what", "command", {}, {"batch": 64}, {"peer/kornia": "0.9"}, {"cpu": "this", "cores": 2}, "abc")
    dataclasses.replace(fresh, **change).save(tmp_path / "loader.json")
    with pytest.raises(ValueError, match=rf"{next(iter(change))}.*{named}.*without --append"):
        loader.continued(tmp_path / "loader.json", fresh)
    fresh.save(tmp_path / "same.json")
    assert loader.continued(tmp_path / "same.json", fresh) == fresh


def test_a_program_that_fails_is_named_and_its_round_does_not_count(run, capsys):
    run("--steps", "rounds", "--rounds", 1, "--views", "moco_v2")
    broken = "import sys; sys.exit('no such library')"
    code, kept = run("--steps", "rounds", "--rounds", 1, "--views", "moco_v2", "--append", fastssl_native=broken)
    assert code == 2
    assert "fastssl_native failed (no such library)" in capsys.readouterr().err
    assert {len(figure.rounds) for figure in kept.figures.values()} == {1}


def test_a_program_that_hangs_is_named(run, capsys, monkeypatch):
    monkeypatch.setattr(loader, "ROUND_LIMIT_S", 0.5)
    code, _ = run("--steps", "rounds", "--views", "moco_v2", torchvision_pillow="import time; time.sleep(60)")
    assert code == 2
    assert "torchvision_pillow took more than" in capsys.readouterr().err


def test_each_round_begins_with_another_program_and_runs_all():
    able = fakes()
    orders = [list(loader.rotated(able, by)) for by in range(4)]
    assert [order[0] for order in orders] == [*RATES, next(iter(RATES))]
    assert all(sorted(order) == sorted(RATES) for order in orders)
    assert loader.rotated({}, 3) == {}


def test_fidelity_and_the_peers_own_words_are_kept_beside_speed(run):
    _, kept = run("--steps", "fidelity", "rounds", "--rounds", 1, "--views", "swav")
    assert kept.figures["fidelity/fastssl_native/hue"] == Figure("grey levels", (7.0,))
    assert kept.settings["peers"]["pure_decode"] == {"differs": "in nothing", "output": "numbers"}
    _, more = run("--steps", "rounds", "--rounds", 1, "--views", "swav", "--append")
    assert more.settings["peers"] == kept.settings["peers"]


def test_the_report_says_what_the_record_holds(run, tmp_path, capsys):
    run("--steps", "fidelity", "rounds", "report", "--rounds", 2, "--views", "moco_v2")
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith("| the fastssl_native"))
    assert "| 650 (650–650) | 3.08 | 2.00 | 6.50 (6.50–6.50) | 65% |" in row
    assert "| the fastssl_native | 0.25 |  |  |  |  | 7.00 |  |  |" in shown
    assert "SwAV" not in shown
    assert (tmp_path / "loader.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_of_another_machines_record_needs_no_measuring(run, tmp_path, capsys):
    _, kept = run("--steps", "rounds", "--rounds", 1, "--views", "swav")
    dataclasses.replace(kept, commit="0123456789", machine={**kept.machine, "cpu": "another"}).save(
        tmp_path / "results" / "loader.json"
    )
    code, after = run("--steps", "report")
    assert code == 0
    assert after.commit == "0123456789"
    assert "another, " in capsys.readouterr().out


def test_a_record_without_rounds_has_no_figure(tmp_path):
    settings = {"data": "d", "images": 1, "median_size_px": "1×1", "kilobytes_per_image": 1}
    empty = Record("what", "command", {}, settings)
    assert loader_report.tables(empty, fakes(), loader.VIEWS) == ""
    loader_report.draw(empty, fakes(), loader.VIEWS, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_folder_without_images_is_refused(tmp_path, capsys):
    assert loader.main(["--data", str(tmp_path), "--out", str(tmp_path / "x.json")]) == 2
    assert "holds no files in class folders" in capsys.readouterr().err


def test_other_images_are_packed_elsewhere(images, tmp_path):
    before = Data.at(images, tmp_path)
    assert Data.at(images, tmp_path) == before
    (images / "train" / "things" / "0.jpg").write_bytes(b"another")
    assert Data.at(images, tmp_path).packed != before.packed


def test_every_program_is_a_module_that_can_be_started():
    for name, program in loader.programs().items():
        path = loader.PEERS / f"{program.module}.py"
        assert path.is_file(), name
        assert 'if __name__ == "__main__"' in path.read_text()
        assert program.views[0] == "moco_v2"
    assert {loader.BASELINE, loader.CEILING} <= loader.programs().keys()


def test_the_results_file_is_named_after_date_and_processor():
    machine = {"cpu": "AMD EPYC 9R14 96-Core Processor", "cores": 2}
    fresh = Record("what", "command", {}, {}, machine=machine, date="2026-01-31")
    assert loader.default_path(fresh).name == "loader_2026-01-31_epyc_2_cores.json"


def test_the_versions_of_the_peers_are_those_that_are_installed_for_them():
    installed = loader.PEERS / ".venv" / "requirements.txt"
    if not installed.exists():
        pytest.skip("the peers' environment is not made here (python -m bench.loader --steps prepare)")
    assert installed.read_text() == (loader.PEERS / "requirements.txt").read_text()


def rate(images_per_s):
    return {"images_per_s": images_per_s, "cpu_ms_per_image": 1.0, "start_s": 1.0}
