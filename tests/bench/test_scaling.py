"""The scaling model: its arithmetic on a small record, and docs/scaling.md as the repository's records have it."""

from __future__ import annotations

import pytest

from bench import scaling
from fastssl.bench.record import Figure, Record

RATES = {"moco_v2": (1000.0, 2000.0), "swav": (500.0, 800.0), "clsa_multi": (300.0, 310.0)}  # of four cores
MACHINE = {"cpu": "Z80", "cores": 4, "memory_gib": 0.1}


@pytest.fixture
def loader() -> Record:
    figures = {}
    for method, rates in RATES.items():
        for program, rate in zip(("fastssl_native", "fastssl_native_short"), rates):
            figures[f"{method}/{program}/images_per_s"] = Figure("images/s", (0.9 * rate, rate, 7 * rate))
    settings = {"data": "photographs", "median_size_px": "300×200", "workers": 4}
    return Record("loaders", "python -m bench.loader", figures, settings, {}, MACHINE, "abc", "2026-01-02")


@pytest.fixture
def sizes() -> Record:
    kilobytes = {"original": 100.0, "short": 25.0}
    figures = {f"{form}/kilobytes_per_image": Figure("kB", (size,)) for form, size in kilobytes.items()}
    figures["original/px_per_image"] = Figure("px", (60_000.0,))
    return Record("sizes", "python -m bench.scaling --sizes", figures, {}, {}, MACHINE, "abc", "2026-01-02")


def cells(table: str, *begin: str) -> list[str]:
    """The row that begins with these cells, without them."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    (found,) = [row[len(begin) :] for row in rows if row[: len(begin)] == list(begin)]
    return found


@pytest.mark.parametrize(
    ("method", "cost"),
    [
        ("moco_v2", 1 + 1 / 3),
        ("swav", 2 + 6 * (96 / 224) ** 2),
        ("clsa_multi", 1 / 3 + 2 * sum((side / 224) ** 2 for side in (224, 192, 160, 128, 96))),
    ],
)
def test_a_step_costs_its_pixels_and_a_third_of_them_without_a_gradient(method, cost):
    assert scaling.step_cost(scaling.specs_of(method)) == pytest.approx(cost)


def test_cores_and_bytes_of_a_gpu_follow_from_rates_per_core_and_bytes_per_image(loader, sizes):
    found = scaling.tables(loader, sizes)
    assert cells(found["measured"], "MoCo v2") == ["250", "500"]  # of one of four cores
    # 2470 images/s with labels / (4/3) = 1852.5; / 250 and / 500 a core; x 100 and x 25 kB, each to three digits
    assert cells(found["cores"], "MoCo v2", "A100, at most") == ["1,852", "7.41", "3.71", "185", "46.3"]
    # 200 epochs of 1,281,167 images in 53 h on 8 GPUs: 167.9
    assert cells(found["cores"], "MoCo v2", "V100, as published") == ["168", "0.671", "0.336", "16.8", "4.20"]


def test_a_node_feeds_what_its_cores_make_and_a_link_what_it_carries(loader, sizes):
    found = scaling.tables(loader, sizes)
    assert cells(found["node"], "MoCo v2", "short")[2] == "17.3"  # 64 cores x 500 / 1852.5
    assert cells(found["links"], "10 Gbit/s")[:3] == ["12,500", "50,000", "6.75"]  # 1.25 GB/s / 100 kB; / 1852.5


def test_the_gpu_form_is_held_against_the_least_of_its_limits(loader, sizes):
    step, views, what, _ = cells(scaling.tables(loader, sizes)["dali"], "SwAV")
    assert what == "JPEG engines"
    assert views == f"{7 * 3840 * 2160 / 5e-3 / 60_000:,.0f}"
    assert float(step.replace(",", "")) == pytest.approx(35 * 1281167 / (13.466 * 60) / 8 / 3.102, rel=1e-3)


def test_a_record_without_these_views_is_refused_by_name(loader, sizes, tmp_path, capsys):
    path = tmp_path / "r.json"
    del loader.figures["swav/fastssl_native_short/images_per_s"]
    loader.save(path)
    assert scaling.main([str(path)]) == 2
    assert "has no figure swav/fastssl_native_short/images_per_s" in capsys.readouterr().err


def test_the_document_shows_the_tables_of_the_newest_record(capsys):
    assert scaling.main(["--check"]) == 0, capsys.readouterr().err


def test_a_figure_changed_by_hand_is_stale_and_written_anew(loader, sizes, tmp_path, monkeypatch):
    document, record, sizes_path = tmp_path / "scaling.md", tmp_path / "r.json", tmp_path / "s.json"
    loader.save(record)
    sizes.save(sizes_path)
    monkeypatch.setattr(scaling, "DOCUMENT", document)
    monkeypatch.setattr(scaling, "SIZES", sizes_path)
    names = scaling.tables(loader, sizes)
    document.write_text("".join(f"<!-- scaling: {name} -->\n<!-- end scaling -->\n" for name in names))
    assert scaling.main([str(record), "--check"]) == 1
    assert scaling.main([str(record), "--write"]) == 0
    assert scaling.main([str(record), "--check"]) == 0
    document.write_text(document.read_text().replace("1,852", "1,853"))
    assert scaling.main([str(record), "--check"]) == 1


def test_a_table_without_its_block_is_said(loader, sizes):
    with pytest.raises(ValueError, match=r"has blocks for links, but the tables are measured, cores"):
        scaling.rewritten("<!-- scaling: links -->\n<!-- end scaling -->\n", scaling.tables(loader, sizes))


def test_bytes_of_an_image_are_those_of_the_shards(tiny_shards, tiny_files):
    record = scaling.measure_sizes({"original": tiny_shards, "short": tiny_shards})
    expected = sum(len(payload) for _, payload in tiny_files) / len(tiny_files) / 1000
    assert record.figures["original/kilobytes_per_image"].median == pytest.approx(expected)
