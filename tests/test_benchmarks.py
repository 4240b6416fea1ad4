"""The benchmarks: each workload runs for real, with tiny sizes, and the report is made of its figures."""

import itertools
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import contenders, figures, report, workloads
from benchmarks.figures import Results, Row
from benchmarks.measuring import Run, Seat, Workload
from tests.conftest import run, wait_until

ROOT = Path(__file__).parent.parent
BENCHMARKS = [sys.executable, "-m", "benchmarks"]
WRITTEN = ["adding.svg", "at-once.svg", "images.svg", "overview.svg", "results.json", "results.md"]
FASTER, SLOWER = Row("work", "s"), Row("rate", "MiB/s")

Benchmarks = Callable[..., Results]


@pytest.fixture
def benchmarks(tmp_path: Path) -> Benchmarks:
    """Call it with arguments to run the benchmarks with tiny sizes, once each; gives what they found."""

    def measure(*arguments: str) -> Results:
        where, output = tmp_path / "where", tmp_path / "output"
        run(*BENCHMARKS, "--tiny", "--rounds", "1", "--where", where, "--output", output, *arguments, cwd=ROOT)
        assert list(where.iterdir()) == []
        return figures.load(output / "results.json")

    return measure


def mounted_below(path: Path) -> list[str]:
    """The mountpoints there."""
    lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    return [line.split()[4] for line in lines if line.split()[4].startswith(f"{path}/")]


def test_each_workload_measures_bare_and_imgfs_and_is_reported(benchmarks: Benchmarks, tmp_path: Path) -> None:
    results = benchmarks("--contender", "bare", "--contender", "imgfs")
    assert list(results.rows) == [workload.name for workload in workloads.WORKLOADS if "100000" not in workload.name]
    for rows in results.rows.values():
        for row, measured in rows.items():
            assert measured["imgfs"][0] > 0, row
    page = (tmp_path / "output" / "results.md").read_text()
    for rows in results.rows.values():
        for row in rows:
            assert f"| {row.name}, {row.unit} | " in page
    assert "fio-" in page and "Linux" in page
    assert sorted(path.name for path in (tmp_path / "output").iterdir()) == WRITTEN


def made_up_results() -> Results:
    """Three rounds of all contenders, in rows of all kinds."""
    workloads = {"read": "Read", "write": "Write", "names-1000": "Names", "add": "Add", "writers": "Writers"}
    references = {name: "limit" if name == "add" else "bare" for name in workloads}
    facts = {"kernel": "Linux", "filesystem": "ext4 rw", "machine": "2 cores"}
    results = Results(facts, {each.name: each.summary for each in contenders.CONTENDERS}, workloads, references)
    by_images = {"ls -l": "ms", "start": "ms", "stat of a name": "µs", "resident memory": "MiB"}
    for number, each in itertools.product(range(3), contenders.CONTENDERS):
        value = 1 / 3 + number + len(each.name)
        for at in (16, 1024) if each.add else ():
            results.add("add", each.name, {Row(f"add {at:,} MiB", "s", "adding", at): value * at})
        if each.only_adds:
            continue
        results.add("read", each.name, {Row("sequential read", "MiB/s"): value})
        results.add("write", each.name, {Row("write with cp", "MiB/s"): value})
        for at, (curve, unit) in itertools.product((10, 1_000, 100_000), by_images.items()):
            results.add("names-1000", each.name, {Row(f"{curve}, {at:,} images", unit, curve, at): value * at})
        for at in (1, 2, 4, 8):
            results.add("writers", each.name, {Row(f"{at} writing at once", "MiB/s", "writers", at): value})
    return results


def test_report_is_made_again_of_its_figures_with_the_same_bytes_and_small_plots(tmp_path: Path) -> None:
    first, second = tmp_path / "output", tmp_path / "again"
    report.write(made_up_results(), first)
    run(*BENCHMARKS, "--report", first / "results.json", "--output", second, cwd=ROOT)
    assert sorted(path.name for path in first.iterdir()) == WRITTEN
    for name in WRITTEN:
        assert (second / name).read_bytes() == (first / name).read_bytes(), name
    for plot in first.glob("*.svg"):
        ElementTree.parse(plot)
        assert plot.stat().st_size < 100_000


def test_everybody_who_adds_with_digests_is_measured(benchmarks: Benchmarks) -> None:
    rows = benchmarks("--only", "add").rows["add"]
    assert set(rows[Row("add 1 MiB", "s", "adding", 1)]) == {"imgfs", "imgfs-fusepy", "limit", "glance_store"}


def test_everybody_who_serves_a_directory_is_measured(benchmarks: Benchmarks) -> None:
    rows = benchmarks("--only", "write").rows["write"]
    installed = {each.name for each in contenders.CONTENDERS if not each.only_adds and each.is_installed()}
    assert set(rows[Row("write with cp", "MiB/s")]) == installed
    assert {"bare", "imgfs", "imgfs-fusepy", "fusepy", "mfusepy"} <= installed


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_nothing(tmp_path: Path, sent: signal.Signals) -> None:
    where = tmp_path / "where"
    command = [*BENCHMARKS, "--only", "create", "--contender", "fusepy", "--rounds", "1000", "--where", where]
    with subprocess.Popen([*command, "--output", tmp_path / "output"], cwd=ROOT, stderr=subprocess.PIPE) as process:
        wait_until(lambda: mounted_below(where), "a mount")
        process.send_signal(sent)
        said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 1
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "benchmarks: interrupted; nothing is left mounted, and no report was written"
    assert (mounted_below(where), list(where.iterdir())) == ([], [])
    assert not (tmp_path / "output").exists()


class Nothing(Workload):
    """A workload that takes no time."""

    name = "nothing"
    summary = "Nothing"

    def measure(self, seat: Seat) -> dict[Row, float]:
        return {FASTER: 1.0}


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 1), (1000, 5)])
def test_rounds_after_the_first_are_given_while_there_is_time(tmp_path: Path, seconds: float, rounds: int) -> None:
    said: list[str] = []
    results = Run([contenders.CONTENDERS[0]], seconds, said.append).measure([Nothing()], None, tmp_path)
    assert results.rows["nothing"][FASTER]["bare"] == [1.0] * rounds
    assert sum(line.startswith("no time left") for line in said) == 5 - rounds


class Mounting(Nothing):
    """A workload that takes no time, on a mount."""

    rounds = 2

    def measure(self, seat: Seat) -> dict[Row, float]:
        with seat.empty():
            return {FASTER: 1.0}


def test_contender_that_fails_is_left_out_and_named_and_the_others_go_on(tmp_path: Path) -> None:
    said: list[str] = []
    broken = contenders.Contender("broken", "mounts nothing", 1, lambda _directories, _mountpoint: ["false"])
    measuring = Run([broken, contenders.CONTENDERS[0]], 1000, said.append)
    assert measuring.measure([Mounting()], None, tmp_path).rows["nothing"][FASTER] == {"bare": [1.0, 1.0]}
    assert measuring.failed == {("nothing", "broken")}
    assert said[0].startswith("broken is left out of nothing from here on: nothing is mounted by false")
    assert list(tmp_path.iterdir()) == []


def test_ratio_is_times_the_time_of_the_reference_round_by_round() -> None:
    results = Results(references={"w": "bare"})
    for bare, imgfs in ((2.0, 4.0), (1.0, 1.5), (1.0, 3.0)):
        results.add("w", "bare", {FASTER: bare, SLOWER: 1 / bare})
        results.add("w", "imgfs", {FASTER: imgfs, SLOWER: 1 / imgfs})
    assert results.ratio("w", FASTER, "imgfs") == pytest.approx((2.0, 1.5, 3.0))
    assert results.ratio("w", SLOWER, "imgfs") == pytest.approx((2.0, 1.5, 3.0))
    assert results.ratio("w", FASTER, "mergerfs") is None


def test_slope_is_the_exponent_of_growth() -> None:
    assert figures.slope([10, 1_000, 100_000], [7, 700, 70_000]) == pytest.approx(1.0)
    assert figures.slope([1, 10, 100], [3, 3, 3]) == pytest.approx(0.0)


def test_overview_replaces_what_is_between_the_markers_of_a_readme(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    results = Results(
        {"kernel": "Linux", "machine": "m", "filesystem": "xfs"}, {"imgfs": ""}, references={"write": "bare"}
    )
    for name, rate in (("bare", 200.0), ("imgfs", 100.0)):
        results.add("write", name, {Row("write with cp", "MiB/s"): rate})
    report.update_readme(results, readme, tmp_path / "docs")
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n![") and text.endswith(f"{report.END}\nafter\n")
    assert "(docs/overview.svg)" in text and "| write with cp | 2.00 |" in text and "old" not in text


def test_readme_without_markers_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("text\n")
    with pytest.raises(SystemExit, match="add them"):
        report.update_readme(Results(), tmp_path / "README.md", tmp_path)
