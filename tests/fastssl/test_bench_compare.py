"""Two results compared: the verdict follows the spread, and what cannot be compared is refused."""

import dataclasses

import pytest

from fastssl.bench import main as bench
from fastssl.bench.compare import FASTER, FEW, SAME, SLOWER, compare, differing, require_comparable, verdict
from fastssl.bench.record import Figure, Record
from tests.fastssl.runs import settings


def record(**figures):
    return Record("w", "c", figures, {"mode": "loader", "config": {"data": {"root": "a"}, "loader": {"threads": 1}}})


@pytest.mark.parametrize(
    ("unit", "old", "new", "expected"),
    [
        ("images/s", (100, 102, 98), (120, 118, 125), FASTER),
        ("images/s", (120, 118, 125), (100, 102, 98), SLOWER),
        ("ms/image", (100, 102, 98), (120, 118, 125), SLOWER),
        ("share waiting", (0.1, 0.1, 0.1), (0.3, 0.3, 0.3), SLOWER),
        ("images/s", (100, 121, 98), (120, 118, 125), SAME),  # a round of the old lies among the new
        ("images/s", (100, 100.5, 100.2), (102, 102.1, 102.5), SAME),  # apart, but by less than the tolerance
        ("share", (0.010, 0.011, 0.012), (0.014, 0.015, 0.016), SAME),  # shares: of the whole, not of each other
        ("images/s", (100, 101), (200, 201, 202), FEW),
    ],
)
def test_the_verdict_follows_the_spread(unit, old, new, expected):
    assert verdict(Figure(unit, old), Figure(unit, new), tolerance=0.03) == expected


def test_only_figures_of_both_are_compared_and_none_twice():
    old = record(
        **{"loader/images_per_s": Figure("images/s", (1, 2, 3)), "gone/images_per_s": Figure("images/s", (1,))}
    )
    new = record(
        **{
            "loader/images_per_s": Figure("images/s", (2, 4, 6)),
            "loader/views_per_s": Figure("views/s", (1,)),
            "loader/steps": Figure("steps", (1,)),
        }
    )
    (one,) = compare(old, new, 0.03)
    assert (one.name, one.ratio, one.spread) == ("loader/images_per_s", 2.0, 0.5)


def test_what_differs_is_listed_but_not_where_files_lie():
    old, new = record(), record()
    new.settings["config"]["data"]["root"] = "b"
    assert differing(old, new) == []
    new.settings["config"]["loader"]["threads"] = 2
    assert differing(old, dataclasses.replace(new, commit="x")) == [
        "loader.threads 1 -> 2",
        f"commit {old.commit} -> x",
    ]


def test_another_machine_or_mode_is_refused():
    old = record()
    require_comparable(old, "loader", old.machine)
    with pytest.raises(ValueError, match=r"cores is \d+ and here 999"):
        require_comparable(old, "loader", {**old.machine, "cores": 999})
    with pytest.raises(ValueError, match="holds mode=loader, but this is mode=train"):
        require_comparable(old, "train", old.machine)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A result of mode=step with three rounds."""
    folder = tmp_path_factory.mktemp("earlier")
    out = folder / "old.json"
    assert bench.main(command(folder, f"bench.json={out}")) == 0
    return out


def command(folder, *more):
    arguments = [a for a in settings("", folder) if not a.startswith("data.root")]
    return [*arguments, "mode=step", "bench.seconds=0.1", "bench.warmup_steps=1", *more]


@pytest.mark.parametrize(("factor", "code", "word"), [(1000.0, 3, "slower"), (0.001, 0, "faster")])
def test_the_exit_code_tells_ci_that_it_became_slower(earlier, tmp_path, capsys, factor, code, word):
    old = Record.load(earlier)
    rate = old.figures["step/images_per_s"]
    faster = {"step/images_per_s": Figure(rate.unit, tuple(factor * value for value in rate.rounds))}
    dataclasses.replace(old, figures=faster).save(tmp_path / "other.json")
    against = [f"bench.against={tmp_path}/other.json", f"bench.json={tmp_path}/new.json"]
    assert bench.main(command(tmp_path, *against)) == code
    assert word in capsys.readouterr().out


def test_another_machine_is_refused_before_anything_is_measured(earlier, tmp_path, capsys):
    old = Record.load(earlier)
    dataclasses.replace(old, machine={**old.machine, "cpu": "Z80"}).save(tmp_path / "other.json")
    against = [f"bench.against={tmp_path}/other.json", f"bench.json={tmp_path}/new.json"]
    assert bench.main(command(tmp_path, *against)) == 2
    assert "another machine, whose cpu is 'Z80'" in capsys.readouterr().err
    assert not (tmp_path / "new.json").exists()
