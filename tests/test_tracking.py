"""Trackers of a real command, offline: what they keep is read back."""

import json
import shutil
import struct
import time

import numpy as np
import pytest
from matplotlib.image import imread
from moments import at_step, raises
from pictures import real_pictures
from tracked import ALL, OVER, RATES, TRACKED, fail, mlflow_runs, run, warnings

from bitfit.tracking import services
from bitfit.tracking import tracker as tracking

RUNS = ["lr0.001_seed0", "lr0.003_seed0"]

STEPS = 15  # of 36 rows in batches of 8, three times

pytestmark = TRACKED


def left(folder):
    """What a command leaves beside tracking, without times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.parts[0] not in ALL and name.name != "tracking.json":
            found[str(name)] = path.read_bytes()
            if path.suffix == ".json":
                metadata = json.loads(found[str(name)])
                told = metadata.keys() - {"seconds", "report_to", "output_path", "best"}
                found[str(name)] = {fact: metadata[fact] for fact in told}
    return {name: own for name, own in found.items() if name != "results.csv"}  # it has seconds


@pytest.fixture(scope="module")
def sweep(offline, tmp_path_factory):
    """Two runs in one pass, told to all three."""
    output = tmp_path_factory.mktemp("told") / "sweep"
    with pytest.MonkeyPatch.context() as patch, real_pictures():
        failures = []
        patch.setattr(tracking.LOGGER, "warning", lambda *words: failures.append(words))
        assert run(output, *RATES, "--report-to", *ALL) == 0
    assert failures == []
    return output


def expected(output, run):
    """{name: {step: value}} of one run's scores and losses, from its metrics.json."""
    metadata = json.loads((output / run / "metrics.json").read_text())
    steps = [5, 10, 15]
    curves = {"train/mean_loss": metadata["train_loss"]}
    for split, of in metadata["evaluations"].items():
        curves |= {f"{split}/{metric}": values for metric, values in of.items()}
    rate = float(run.split("_")[0].removeprefix("lr"))
    rates = {step: rate * (STEPS - step + 1) / STEPS for step in range(1, STEPS + 1)}
    return {name: dict(zip(steps, curve, strict=True)) for name, curve in curves.items()}, rates


def assert_told(points, output, run):
    """{name: {step: value}} as read back is all of what the run measured."""
    curves, rates = expected(output, run)
    for name, curve in curves.items():
        assert points[name] == pytest.approx(curve), name
    for step, rate in points["train/learning_rate"].items():
        assert rate == pytest.approx(rates[step], rel=1e-5)
    assert points["epoch"] == pytest.approx({step: step / 5 for step in points["epoch"]})
    assert {5, 10, 15} <= set(points["epoch"]) and len(points["train/loss"]) > 3
    for name in ("train/loss", "train/examples_per_second", "peak_memory_gib"):
        assert all(0 < value < 1e6 for value in points[name].values()), name


def test_tracking_changes_nothing(sweep, tmp_path, capsys):
    assert run(tmp_path / "plain", *RATES) == 0
    assert left(tmp_path / "plain") == left(sweep)
    assert len(left(sweep)) > 12
    assert "best of 2 trials" in capsys.readouterr().out


def events(output, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(output / "tensorboard" / name), size_guidance={"scalars": 0})
    return found.Reload()


def scalars(found):
    return {
        name: {event.step: event.value for event in found.Scalars(name)}
        for name in found.Tags()["scalars"]
    }


def text(found, name):
    (event,) = found.Tensors(f"{name}/text_summary")
    return event.tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("name", RUNS)
def test_tensorboard_of_a_run(sweep, name, tmp_path):
    found = events(sweep, name)
    assert_told(scalars(found), sweep, name)
    assert set(found.Tags()["images"]) == {"bias_term_changes", "learning_curves_accuracy"}
    for picture in found.Tags()["images"]:
        (event,) = found.Images(picture)
        (tmp_path / "own.png").write_bytes(event.encoded_image_string)
        logged, ours = imread(tmp_path / "own.png"), imread(sweep / name / f"{picture}.png")
        assert np.array_equal(logged, ours[..., :3])
    assert f"learning rate {name[2:7]}, seed 0" in text(found, "results")
    assert '"task_name": "rte"' in text(found, "flags")


def test_tensorboard_of_the_sweep(sweep):
    found = events(sweep, "sweep")
    assert found.Tags()["images"] == ["learning_curves_accuracy"]
    assert "best of 2 trials" in text(found, "results")


def records(path):
    """The records of a .wandb file: LevelDB's log format behind seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at < len(data):
        rest = 32768 - at % 32768
        if rest < 7:  # no header fits: the block is filled up
            at += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def wandb_runs(output):
    """[(run, {name: {step: value}}, exit status)], the oldest first."""
    runs = []
    for path in sorted(output.glob("wandb/offline-run-*/run-*.wandb")):
        points: dict[str, dict] = {}
        entries = list(records(path))
        for history in (e.history for e in entries if e.WhichOneof("record_type") == "history"):
            for item in history.item:
                name = item.key or "/".join(item.nested_key)
                points.setdefault(name, {})[history.step.num] = json.loads(item.value_json)
        (begun,) = (r.run for r in entries if r.WhichOneof("record_type") == "run")
        (ended,) = (r.exit.exit_code for r in entries if r.WhichOneof("record_type") == "exit")
        runs.append((begun, points, ended))
    return runs


def test_wandb(sweep):
    runs = {begun.display_name: (begun, *rest) for begun, *rest in wandb_runs(sweep)}
    assert set(runs) == {*RUNS, "sweep"}
    for name, (begun, points, ended) in runs.items():
        assert (begun.project, begun.run_group, ended) == ("bitfit", "sweep", 0)
        config = {item.key: json.loads(item.value_json) for item in begun.config.update}
        assert config["task_name"] == "rte"
        if name == "sweep":
            continue
        assert_told(points, sweep, name)
        assert config["learning_rate"] == float(name[2:7])
        (file,) = points["pictures/bias_term_changes/path"].values()
        (folder,) = (sweep / "wandb").glob(f"offline-run-*-{begun.run_id}/files")
        assert (folder / file).read_bytes() == (sweep / name / "bias_term_changes.png").read_bytes()
        (table,) = points["results/path"].values()
        assert f"learning rate {name[2:7]}, seed 0" in (folder / table).read_text()


def once(points):
    """{name: {step: value}}, where each step has one."""
    return {
        name: {step: value for step, (value,) in curve.items()} for name, curve in points.items()
    }


def test_mlflow(sweep):
    runs = mlflow_runs(sweep)
    assert set(runs) == {*RUNS, "sweep"}
    for name in RUNS:
        run, points, files = runs[name]
        assert_told(once(points), sweep, name)
        assert run.info.status == "FINISHED"
        assert run.data.params["learning_rate"] == name[2:7]
        for picture in ("bias_term_changes.png", "learning_curves_accuracy.png"):
            assert files[picture] == (sweep / name / picture).read_bytes()
        assert f"learning rate {name[2:7]}, seed 0" in files["results.txt"].decode()
    assert "best of 2 trials" in runs["sweep"][2]["results.txt"].decode()


def test_a_diverged_run_has_failed_and_the_others_have_not(tmp_path):
    output = tmp_path / "diverged"
    assert run(output, "-l", "1e-3", "1e36", "--report-to", *ALL) == 0
    failed = {"lr0.001_seed0": False, "lr1e+36_seed0": True, "sweep": False}
    status = {name: run.info.status for name, (run, *_) in mlflow_runs(output).items()}
    assert status == {name: "FAILED" if bad else "FINISHED" for name, bad in failed.items()}
    assert {begun.display_name: ended for begun, _, ended in wandb_runs(output)} == failed
    message = text(events(output, "lr1e+36_seed0"), "results")
    assert "was not finite at epoch 1, step" in message
    assert "not finite" not in text(events(output, "lr0.001_seed0"), "results")


def test_a_single_run_that_diverges_has_failed(tmp_path):
    output = tmp_path / "single"
    assert run(output, "-l", "1e36", "--report-to", *ALL) == 1
    ((run_, *_),) = mlflow_runs(output).values()
    ((_, _, ended),) = wandb_runs(output)
    assert (run_.info.status, ended) == ("FAILED", 1)


def test_a_resumed_run_goes_on_as_the_same_one(tmp_path, capsys):
    """A fault in step 13; it goes on from the checkpoint after step 10."""
    output = tmp_path / "resumed"
    with at_step(13, raises(OSError("no space"))):
        assert run(output, "--report-to", *ALL) == 1
    ids = (output / "tracking.json").read_bytes()
    assert mlflow_runs(output)["lr0.001_seed0"][0].info.status == "FAILED"
    time.sleep(1)  # TensorBoard reads files in the order of the second in their names.
    assert run(output, "--resume", "--report-to", *reversed(ALL)) == 0  # they may be others
    assert (output / "tracking.json").read_bytes() == ids
    shutil.copytree(output, output / "lr0.001_seed0", ignore=shutil.ignore_patterns("wandb"))

    found = events(output, "lr0.001_seed0")
    assert_told(scalars(found), output, "lr0.001_seed0")
    for name in found.Tags()["scalars"]:
        told = [event.step for event in found.Scalars(name)]
        assert told == sorted(set(told)), name

    ((run_, points, _),) = mlflow_runs(output).values()
    assert run_.info.status == "FINISHED"
    assert_told(once(points), output, "lr0.001_seed0")

    first, second = wandb_runs(output)
    assert (first[0].run_id, first[2], second[2]) == (second[0].run_id, 1, 0)
    assert min(second[1]["epoch"]) > 10

    assert run(output, "--resume", "--report-to", "wandb") == 0
    assert "there is nothing to resume" in capsys.readouterr().out
    assert len(wandb_runs(output)) == 2


def test_a_tracker_that_fails_is_a_warning(sweep, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(services.TensorBoard, "log", fail)
    assert run(tmp_path / "out", *RATES, "--report-to", "tensorboard") == 0
    assert left(tmp_path / "out") == left(sweep)
    assert warnings(caplog) == OVER
