"""`pskd report` and `pskd compare`: pages of real runs, and figures against plain numpy."""

import json
import re
import shutil
import subprocess
import warnings

import numpy as np
import pytest
import yaml

from pskd.cli import main
from pskd.metrics import Records, measures
from pskd.report import figures, points
from pskd.report.origin import published
from pskd.report.page import INK, Code, Drawing, Gallery, Image, Section, Text, page
from pskd.report.run_files import read
from pskd.report.table import Table, render
from tests.launches import result
from tests.pages import SECTIONS, Page, parsed, words

FIGURES = {
    "class_errors",
    "confidences",
    "learning_curves",
    "reliability",
    "risk_coverage",
    "schedules",
    "throughput",
}


def test_the_report_of_a_run_is_one_page_and_its_figures(runs, tmp_path, capsys):
    run = runs / "pskd"
    assert main(["report", str(run), "--output", str(tmp_path / "new" / "report")]) == 0
    output = tmp_path / "new" / "report"
    assert capsys.readouterr().out == f"{output / 'index.html'}\n"
    found = parsed(output / "index.html")
    assert found.headings == SECTIONS
    assert found.tags.count("svg") == len(FIGURES)
    names = {f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png")}
    assert {path.name for path in output.iterdir()} == {"index.html", *names}
    for name in FIGURES:
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (output / f"{name}.svg").read_text()
    last = result(run)["last"]
    text = words(found.text)
    for part in (
        "on digits, method pskd, seed 0.",
        f"top-1 error % {last['top1_error']:.2f}",
        f"AURC x1000 {last['aurc']:.2f}",
        f"its mean is the AURC ({last['aurc']:.2f} x1000)",
        f"ECE {last['ece']:.2f} %",
        "Recipe digits-pskd, but for: key recipe run",
        "train.epochs 20 2",
        "360 samples in 10 bins",
        "cpu_capability",
        "alpha",
    ):
        assert part in text, part
    assert "Unfinished" not in text


def test_equal_figures_give_equal_files_which_name_no_date(runs):
    records = read(runs / "pskd").records
    drawn = [figures.reliability({"a": records, "b": records}, 10) for _ in range(2)]
    first, second = ((figures.svg(each), figures.png(each)) for each in drawn)
    assert first == second
    assert "<dc:date>" not in first[0]


def test_points_are_those_of_the_measures_and_of_plain_numpy(runs):
    files = read(runs / "pskd")
    records, last = files.records, files.lines[-1]
    with np.load(runs / "pskd" / "evaluation.npz") as arrays:
        confidence, right = arrays["confidence"], arrays["rank"] == 0
        label = arrays["label"]
    for bins in (10, 7):
        found = points.reliability(records, bins)
        for k in range(bins):
            inside = (confidence > k / bins) & (confidence <= (k + 1) / bins)
            assert found.count_K[k] == inside.sum()
            if inside.any():
                assert found.accuracy_K[k] == pytest.approx(right[inside].mean())
                assert found.confidence_K[k] == pytest.approx(confidence[inside].mean())
            else:
                assert np.isnan(found.accuracy_K[k])
        assert found.ece == pytest.approx(measures(records, 10, bins)["ece"])
    coverage, risk, optimum = points.risk_coverage(records)
    order = np.argsort(-confidence, kind="stable")
    assert len(set(confidence)) == len(confidence)
    assert risk == pytest.approx(np.cumsum(~right[order]) / np.arange(1, 361))
    assert coverage == pytest.approx(np.arange(1, 361) / 360)
    assert 1000 * risk.mean() == pytest.approx(last["aurc"])
    assert 1000 * (risk - optimum).mean() == pytest.approx(last["eaurc"])
    right_K, wrong_K = points.histograms(records, 10)
    assert (right_K + wrong_K).tolist() == points.reliability(records, 10).count_K.tolist()
    assert wrong_K.sum() == (~right).sum()
    count_C, wrong_C = points.class_errors(records, 10)
    assert count_C.tolist() == [(label == c).sum() for c in range(10)]
    assert wrong_C.tolist() == [(~right[label == c]).sum() for c in range(10)]


def test_curves_are_thinned_between_their_ends():
    thinned, same = points.thin(np.arange(50_000), np.arange(50_000) * 2)
    assert (len(thinned), thinned[0], thinned[-1]) == (1000, 0, 49_999)
    assert (same == 2 * thinned).all()
    assert points.thin(np.arange(3))[0].tolist() == [0, 1, 2]


def test_figures_draw_the_points(runs):
    files = read(runs / "pskd")
    drawn = figures.reliability({"run": files.records}, 10)
    upper, lower = drawn.axes
    found = points.reliability(files.records, 10)
    assert [bar.get_height() for bar in lower.patches] == found.count_K.tolist()
    assert [bar.get_height() for bar in upper.patches[:10]] == pytest.approx(
        np.nan_to_num(found.accuracy_K).tolist()
    )
    curves = figures.learning_curves({"run": files.lines})
    assert [ax.get_title() for ax in curves.axes] == [title for _, title in figures.CURVES]
    (line,) = curves.axes[1].lines
    assert line.get_xdata().tolist() == [1, 2]
    assert line.get_ydata().tolist() == [each["top1_error"] for each in files.lines]


def test_classes_of_one_name_have_a_bar_each_the_worst_first():
    ax = figures.class_errors(np.array([10.0, 30.0, 20.0]), ["crane", "crane", "bird"]).axes[0]
    assert [bar.get_width() for bar in ax.patches] == [30, 20, 10]
    assert len({bar.get_y() for bar in ax.patches}) == 3
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["crane", "bird", "crane"]


def test_epochs_without_a_measure_are_passed_over():
    """Not evaluated, and an infinite NLL; a measure that none has, has no panel."""
    names = dict.fromkeys(("top1_error", "nll", "ece", "aurc", "top5_error"))
    lines = [
        {"epoch": 0, "train_loss": 2.0, **names},
        {"epoch": 1, "train_loss": 1.0, **names, "nll": float("inf"), "ece": 3.0},
        {"epoch": 2, "train_loss": 0.5, **names, "nll": 1.5, "ece": 2.0},
    ]
    drawn = figures.learning_curves({"$_a$": lines, "_b": lines})
    assert [ax.get_title() for ax in drawn.axes] == ["training loss", "NLL", "ECE %"]
    assert drawn.axes[1].lines[0].get_xdata().tolist() == [3]
    text = figures.svg(drawn)
    assert "$_a$" in text
    assert " _b" in text


def many_classes(classes):
    n = 40 * classes
    rng = np.random.default_rng(0)
    label = np.arange(n) % classes
    rank = (rng.random(n) < 0.3).astype(np.int64)
    confidence = rng.uniform(0.1, 1, n)
    columns = (confidence, -np.log(confidence), rank, label, (label + rank) % classes)
    return columns


def test_of_many_classes_the_worst_are_named(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "pskd", run)
    confidence, nll, rank, label, prediction = many_classes(200)
    arrays = {"confidence": confidence, "nll": nll, "rank": rank}
    np.savez(run / "evaluation.npz", **arrays, label=label, prediction=prediction)
    names = [f"class <{c}>" for c in range(200)]
    about = {"class_names": names, "height": 8, "width": 8, "mean": [0] * 3, "std": [1] * 3}
    (run / "preprocessing.json").write_text(json.dumps(about))
    content = result(run)
    del content["evaluation_sha256"]  # as of an older version
    (run / "result.json").write_text(json.dumps(content))
    assert main(["report", str(run), "--bins", "15"]) == 0
    text = words(parsed(run / "report" / "index.html").text)
    error_C = [100 * rank[label == c].mean() for c in range(200)]
    order = sorted(range(200), key=lambda c: -error_C[c])
    worst = order[0]
    assert "The worst 20 of 200 classes" in text
    assert f"class <{worst}> {error_C[worst]:.2f} {rank[label == worst].sum()} 40" in text
    assert f"class <{(worst + 1) % 200}> ({rank[label == worst].sum()})" in text
    assert f"class <{order[20]}> {error_C[order[20]]:.2f}" not in text
    assert "8000 samples in 15 bins" in text


def test_waits_for_the_store_are_shown_where_they_are_worth_it(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "pskd", run, ignore=shutil.ignore_patterns("checkpoints", "store"))
    lines = read(run).lines
    for wait_s, shown in ((0.009, False), (0.5, True)):
        waited = [{**line, "train_s": 10.0, "store_wait_s": wait_s} for line in lines]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in waited))
        assert main(["report", str(run)]) == 0
        text = words(parsed(run / "report" / "index.html").text)
        assert ("waited longest for the store waited 1.0 s in all" in text) == shown
        assert ("for the store" in text) == shown


def test_names_of_any_length_are_told_apart(runs, tmp_path, capsys):
    name = "a_very_long_name_of_a_run_" * 5
    long = [tmp_path / f"{name}{end}" for end in ("one", "two")]
    same = [tmp_path / place / "again" / name for place in ("here", "there")]
    for path in (*long, *same):
        shutil.copytree(runs / "pskd", path, ignore=shutil.ignore_patterns("checkpoints", "store"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["report", str(long[0])]) == 0
        html = tmp_path / "c.html"
        assert main(["compare", *map(str, long), "--html", str(html)]) == 0
    svg = re.findall(r"<svg.*?</svg>", html.read_text(), flags=re.DOTALL)
    assert all("_run_one" in drawing and "_run_two" in drawing for drawing in svg)
    assert not any(long[0].name in drawing for drawing in svg)
    assert main(["compare", *map(str, same), "--html", str(html)]) == 0
    svg = re.findall(r"<svg.*?</svg>", html.read_text(), flags=re.DOTALL)
    assert all("1: " in drawing and "2: " in drawing for drawing in svg)


def test_runs_side_by_side(runs, tmp_path, capsys):
    output = tmp_path / "compare.html"
    names = [str(runs / name) for name in ("baseline", "pskd")]
    assert main(["compare", *names, "--format", "text", "--html", str(output)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    table = [re.split(r" {2,}", line.strip()) for line in captured.out.splitlines()]
    assert table[0][:3] == ["run", "epochs", "top-1 error %"]
    for row, name in zip(table[1:], ("baseline", "pskd"), strict=True):
        assert row[:3] == [name, "2", f"{result(runs / name)['last']['top1_error']:.2f}"]
    found = parsed(output)
    titles = ["Measures", "Settings", "Learning curves", "Calibration", "Risk and coverage"]
    assert found.headings == titles
    text = words(found.text)
    assert "Measured on digits." in text
    assert "method.name baseline pskd" in text
    for name in ("baseline", "pskd"):
        assert f"ECE {result(runs / name)['last']['ece']:.2f} %" in text
    assert found.tags.count("svg") == 3


def test_runs_of_other_data_are_warned_of_on_the_page_and_beside_the_table(runs, tmp_path, capsys):
    other = tmp_path / "pskd"
    shutil.copytree(runs / "pskd", other, ignore=shutil.ignore_patterns("checkpoints", "store"))
    settings = yaml.safe_load((other / "config.yaml").read_text())
    settings["data"]["held_out"] = 100
    (other / "config.yaml").write_text(yaml.safe_dump(settings))
    output = tmp_path / "compare.html"
    assert main(["compare", str(runs / "pskd"), str(other), "--html", str(output)]) == 0
    captured = capsys.readouterr()
    warning = (
        "These runs are of different data, so their measures do not compare (digits, 10 classes: "
        f"{runs / 'pskd'}; digits, 100 held out, 10 classes: {other})."
    )
    assert captured.err == f"warning: {warning}\n"
    assert warning in words(parsed(output).text)
    assert f"| {other} " in captured.out


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        ({}, True),
        ({"data": {"root": "elsewhere"}, "train": {"seed": 3}, "engine": {"tf32": True}}, True),
        ({"data": {"name": "cifar10"}}, False),
        ({"model": {"name": "densenet121"}}, False),
        ({"train": {"epochs": 2}}, False),
        ({"method": {"name": "pskd", "alpha_T": 0.5}}, False),
        ({"method": {"name": "baseline"}}, False),
        ({"run": {"recipe": "digits-pskd"}}, False),
    ],
)
def test_published_figures_are_of_one_task_network_method_and_length(settings, known):
    recipe = {"recipe": "cifar100-preact_resnet18-pskd"}
    assert bool(published({"run": recipe, **settings})) == known


def test_published_figures_stand_beside_and_latex_is_escaped(tmp_path, capsys):
    paths = []
    for seed, top1 in enumerate((20.0, 22.0)):
        path = tmp_path / f"50%_{seed}"
        path.mkdir()
        name = "cifar100-preact_resnet18-pskd"
        (path / "config.yaml").write_text(yaml.safe_dump({"run": {"recipe": name}}))
        last = {"epoch": 1, "top1_error": top1, "top5_error": 5.0, "nll": 1, "ece": 2, "aurc": 3}
        (path / "result.json").write_text(json.dumps({"last": last, "best": last}))
        paths.append(str(path))
    assert main(["compare", *paths, "--format", "latex"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [r"\begin{tabular}{lrrrrrrr}", r"\toprule"]
    assert lines[2].startswith(r"run & epochs & top-1 error \% (published) & ")
    assert lines[4].startswith(r"50\%\_0 & 2 & 20.00 (20.82) & 5.00 (5.10) & ")
    assert lines[4].endswith(r" \\")
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    assert main(["compare", *paths, "--by-recipe", "--format", "latex"]) == 0
    row = capsys.readouterr().out.splitlines()[4]
    assert row.startswith(r"cifar100-preact\_resnet18-pskd & 2 & 21.00 $\pm$ 1.41 (20.82) & ")


def test_every_special_character_of_latex_and_markdown_is_escaped():
    table = Table(["h"], [["\\&%$#_{}~^<>|±"]])
    row = render(table, "latex").splitlines()[4]
    assert row == (
        r"\textbackslash{}\&\%\$\#\_\{\}\textasciitilde{}\textasciicircum{}"
        r"\textless{}\textgreater{}\textbar{}$\pm$ \\"
    )
    assert r"\|±" in render(table, "markdown")


def test_a_page_escapes_its_texts_and_keeps_drawings_apart():
    drawing = (
        '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><metadata>http://x'
        f'</metadata><g id="a" fill="{INK}"></g><use xlink:href="#a" clip-path="url(#a)"/></svg>'
    )
    sections = [
        Section("A & <b>", [Text("<script>"), Drawing(drawing, 'a "b"'), Drawing(drawing, "c")]),
        Section("Rest", [Code("x: <y>", "more"), Table(["n", "t"], [["1.5", "a<b"], ["-", "3"]])]),
        Section("Images", [Gallery([Image(b"\x89PNG..", "one", ["<1>", "2"])], width=40)]),
    ]
    text = page("T <x>", sections, [Text("beware", notice=True)])
    assert "http" not in text
    assert INK not in text
    assert text.count("currentColor") == 2
    found = Page(text)
    found.check_self_contained()
    assert found.headings == ["A & <b>", "Rest", "Images"]
    for part in ("T <x>", "<script>", "x: <y>", "a<b", "<1>"):
        assert part in found.text
    assert text.count('class="n"') == 3  # the first column, right-aligned
    assert 'class="notice"' in text
    assert "data:image/png;base64," in text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_a_browser_shows_the_pages_without_errors(runs, tmp_path):
    browser = shutil.which("chromium")
    assert main(["report", str(runs / "pskd"), "--output", str(tmp_path)]) == 0
    both = [str(runs / "baseline"), str(runs / "pskd")]
    assert main(["compare", *both, "--html", str(tmp_path / "compare.html")]) == 0
    for name, count in (("index.html", len(FIGURES)), ("compare.html", 3)):
        line = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        address = (tmp_path / name).as_uri()
        shown = subprocess.run(
            [*line, "--dump-dom", address], capture_output=True, text=True, check=True, timeout=120
        )
        assert "CONSOLE" not in shown.stderr, shown.stderr
        assert shown.stdout.count("<svg ") == count
        picture = tmp_path / f"{name}.png"
        size = "--window-size=1000,4000"
        subprocess.run(
            [*line, f"--screenshot={picture}", size, address],
            capture_output=True,
            check=True,
            timeout=120,
        )
        assert colours_of(picture) > 100


def colours_of(path):
    """Of a picture: a page without its figures has few."""
    from PIL import Image as Picture

    with Picture.open(path) as picture:
        return len(picture.convert("RGB").getcolors(1 << 22))


def test_records_are_read_as_they_were_written(runs):
    files = read(runs / "pskd")
    assert isinstance(files.records, Records)
    last = files.lines[-1]
    assert measures(files.records, 10) == {key: last[key] for key in measures(files.records, 10)}
