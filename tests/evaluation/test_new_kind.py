"""An evaluation kind from outside the package: in training, on the command line, in reports and comparisons."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from fits import SMALL, SMOKE, fails
from helpers import tiny_embedder, write_benchmark, write_shards

import dualenc
from dualenc import BenchmarkSet, DataError
from dualenc.cli import main
from dualenc.evaluation import KINDS, EvaluationKind, compare, find_kind
from dualenc.evaluation.probe import FrozenProbes

MODULE = '''
from pathlib import Path

from markupsafe import Markup

from dualenc.evaluation import EvaluationKind, Scored, image_ids
from dualenc.metrics import BootstrapMetrics
from dualenc.metrics.bootstrap import mean
from dualenc.report import Description

Path(__file__).with_name("imported").touch()


class Farthest:
    def __init__(self, distance, picture):
        self.distance, self.picture = distance, picture

    def html(self):
        return Markup("<h3>Farthest image</h3><p>at a distance of {:.3f}, {} bytes</p>").format(
            self.distance.max(), len(self.picture(int(self.distance.argmax())))
        )


class Spread(EvaluationKind):
    """Distance of the images from their mean, in units of a scale."""

    name = "spread"
    title = "Spread of the images"
    sets = ("classification",)
    description = Description(
        "images", "distance from the mean image", ("mean_distance",), ("mean_distance",), ("mean_distance",)
    )

    def __init__(self, scale=100.0):
        self.scale = scale

    def score(self, data, embedded, embedder):
        distance = self.scale * (embedded.image - embedded.image.mean(0)).norm(dim=1)
        items = {"ids": image_ids(data, embedded.rows), "distance": distance}
        found = self.metrics_of_items(items)
        return Scored(found.values(), found.intervals(), {}, items)

    def metrics_of_items(self, items):
        return BootstrapMetrics({"mean_distance": mean(items["distance"])}, len(items["distance"]))

    def section(self, data, embedded, embedder, scores):
        section = super().section(data, embedded, embedder, scores)
        return type(section)(section.result, Farthest(scores.items["distance"], data.thumbnail), None, self.description)


small_spread = Spread(scale=1.0)


class Nameless(Spread):
    name = None


class Taken(Spread):
    name = "retrieval"


class Unfinished(EvaluationKind):
    name = "unfinished"


def no_kind():
    pass
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """Folder of a module that each test imports anew."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / f"kind_of_{request.node.name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(folder)
    return folder


def spread(embedder: dualenc.Embedder, folder: Path) -> float:
    """The metric of the kind, computed plainly."""
    data = BenchmarkSet.open(folder)
    image = embedder.embed_images([data.source.decode(i) for i in range(len(data))]).double()
    return 100 * (image - image.mean(0)).norm(dim=1).mean().item()


def test_a_new_kind_in_training_and_on_the_command_line(
    module: Path, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = "kind_of_test_a_new_kind_in_training_and_on_the_command_line.Spread"
    photos = write_benchmark(tmp_path / "photos", seed, counts=(9, 5))
    write_shards(tmp_path / "shards", [20, 15, 13], seed)
    settings = yaml.safe_load(SMOKE.read_text())
    settings["trainer"]["callbacks"] = [
        {"class_path": "dualenc.training.Evaluation", "init_args": {"data": [str(photos)], "kind": kind}}
    ]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    run = tmp_path / "run"
    main([
        "fit", "--config", str(tmp_path / "run.yaml"), *SMALL, "--data.train", str(tmp_path / "shards"),
        "--trainer.max_steps", "6", "--trainer.default_root_dir", str(run), "--seed_everything", str(seed),
    ])  # fmt: skip
    trained = dualenc.load(run / "last", "cpu")
    with open(run / "metrics.csv") as file:
        rows = [*csv.DictReader(file)]
    values = [float(row["value"]) for row in rows if row["metric"] == "photos/mean_distance"]
    assert len(values) == sum(row["metric"] == "val/mrr" for row in rows) >= 3  # once an epoch of one step or two
    assert values[-1] == pytest.approx(spread(trained, photos), rel=1e-5)
    assert values[-1] != pytest.approx(values[0], rel=1e-5)  # the control
    page = (run / "report.html").read_text()
    assert "Farthest image" in page
    assert "photos: mean_distance" in page  # a plot of its own, since the metric is not a share

    other = tiny_embedder(seed)
    other.save(tmp_path / "other")
    for model, out in ((run / "last", "a"), (tmp_path / "other", "b")):
        main(["evaluate", str(model), str(photos), "--kind", kind, "--out", str(tmp_path / out), "--workers", "0"])
        assert "mean_distance" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "a" / "evaluate.json").read_text())
    assert (result["dataset"], result["kind"], result["n"], result["complete"]) == ("photos", "spread", 14, True)
    assert result["metrics"]["mean_distance"] == pytest.approx(spread(trained, photos), rel=1e-5)
    page = (tmp_path / "a" / "report.html").read_text()
    for text in ("<title>Spread of the images", "14 images: distance from the mean image", "<h3>Farthest image</h3>"):
        assert text in page
    assert page.count("lower is better") == 1

    folders = [str(tmp_path / out) for out in "ab"]
    main(["compare", *folders, "--kinds", kind, "--out", str(tmp_path / "both")])
    (both,) = json.loads((tmp_path / "both" / "compare.json").read_text())
    a, b, difference, low, high = both["differences"]["mean_distance"]
    assert (a, b) == pytest.approx((spread(trained, photos), spread(other, photos)), rel=1e-5)
    assert difference == pytest.approx(b - a)
    assert low < difference < high
    better = "" if low < 0 < high else "A" if difference > 0 else "B"
    assert (f"{better} better" in capsys.readouterr().out) == bool(better)
    assert "lower is better" in (tmp_path / "both" / "report.html").read_text()
    line = fails(capsys, ["compare", *folders])
    assert "'spread'" in line
    assert "--kinds" in line


def test_files_of_data_sets_and_results_name_no_code(
    module: Path, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a set nor a result may have a module imported, whoever wrote it."""
    kind = "kind_of_test_files_of_data_sets_and_results_name_no_code.Spread"
    tiny_embedder(seed).save(tmp_path / "model")
    photos = write_benchmark(tmp_path / "photos", seed)
    command = ["evaluate", str(tmp_path / "model"), str(photos), "--out", str(tmp_path / "out"), "--workers", "0"]
    main(command)
    path = tmp_path / "out" / "evaluate.json"
    results = json.loads(path.read_text())
    path.write_text(json.dumps([{**one, "kind": kind} for one in results]))
    with pytest.raises(DataError, match=r"evaluation kind '.*Spread' is unknown"):
        compare(tmp_path / "out", tmp_path / "out")
    (photos / "dataset_type.txt").write_text(kind)
    assert "dataset_type.txt" in fails(capsys, command)
    assert not (module / "imported").exists()
    find_kind(kind)
    assert (module / "imported").exists()  # the control


def test_kinds_are_found_by_name_or_import_path(module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "kind_of_test_kinds_are_found_by_name_or_import_path"
    assert find_kind("retrieval") is KINDS["retrieval"]
    assert isinstance(find_kind("dualenc.evaluation.probe.FrozenProbes"), FrozenProbes)
    assert find_kind(f"{name}.Spread").name == "spread"
    assert vars(find_kind(f"{name}.small_spread")) == {"scale": 1.0}
    wrong = {
        "retrievel": "did you mean retrieval?",
        "document-retrieval": "leave it out, or use `dualenc retrieval`",
        f"{name}.Spred": "Spred",
        "kind_of_nothing.Spread": "kind_of_nothing",
        f"{name}.no_kind": "EvaluationKind",
        f"{name}.Nameless": "name",
        f"{name}.Taken": "'retrieval'",
        f"{name}.Unfinished": "metrics_of_items",
        "kind_that_fails.Spread": "ZeroDivisionError",
    }
    (module / "kind_that_fails.py").write_text("1 / 0")
    for kind, words in wrong.items():
        with pytest.raises(DataError) as error:
            find_kind(kind)
        assert kind in str(error.value)
        assert words in str(error.value)
        assert kind in fails(capsys, ["evaluate", "model", "data", "--kind", kind])


def test_the_table_holds_every_kind_of_the_package() -> None:
    """Each concrete subclass is listed once, under its own name, with everything that the callers show of it."""

    def subclasses(kind: type) -> set[type]:
        return {kind, *(other for own in kind.__subclasses__() for other in subclasses(own))}

    own = {
        kind
        for kind in subclasses(EvaluationKind)
        if kind.__module__.startswith("dualenc.") and not kind.__name__.startswith("_")
    }
    assert {type(kind) for kind in KINDS.values()} == own - {EvaluationKind}
    for name, kind in KINDS.items():
        assert kind.name == name
        assert kind.command in main_commands()
        assert all([kind.title, kind.description.measures, kind.description.headlines, kind.hub_task, kind.task_name])


def main_commands() -> list[str]:
    from dualenc.cli.parser import COMMANDS

    return list(COMMANDS)
