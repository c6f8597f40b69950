"""Commands with trackers, offline, and what MLflow kept of them."""

from pathlib import Path

import pytest
import sqlalchemy
from conftest import GLUE, TINY_BERT
from mlflow import MlflowClient

import run_glue
from bitfit.training import loop

ALL = ["tensorboard", "wandb", "mlflow"]

FLAGS = ["-t", "rte", "-f", "bitfit", "-m", str(TINY_BERT), "--data-dir", str(GLUE), "--epochs",
         "3", "--train-size", "36", "--gpu-device", "cpu", "--lr-schedule", "linear"]  # fmt: skip

RATES = ["--learning-rate", "1e-3", "3e-3"]


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "WANDB_MODE": "offline",
            "MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false",
            "HOME": str(folder),
        }.items():  # fmt: skip
            patch.setenv(name, value)
        patch.chdir(folder)  # for MLflow's pictures
        sqlalchemy.event.listen(sqlalchemy.Engine, "connect", without_waiting)
        patch.setattr(loop, "READ_LOSS_SECONDS", 0)  # a look after each step
        yield
        sqlalchemy.event.remove(sqlalchemy.Engine, "connect", without_waiting)


def without_waiting(connection, record):
    """MLflow's new database is a hundred commits; a disk would be waited for after each."""
    connection.execute("PRAGMA synchronous = OFF")


def run(output, *more):
    return run_glue.main(["-o", str(output), *FLAGS, *more])


def mlflow_runs(output):
    """{name: (its run, {name: {step: [values]}}, {artifact: its content})}"""
    client = MlflowClient()
    (experiment,) = client.search_experiments(filter_string=f"name = '{output.name}'")
    found = {}
    for run in client.search_runs([experiment.experiment_id]):
        run_id = run.info.run_id
        points: dict[str, dict] = {}
        for name in run.data.metrics:
            for metric in client.get_metric_history(run_id, name):
                points.setdefault(name, {}).setdefault(metric.step, []).append(metric.value)
        kept = [a.path for a in client.list_artifacts(run_id)]
        files = {name: Path(client.download_artifacts(run_id, name)).read_bytes() for name in kept}
        assert run.info.run_name not in found
        found[run.info.run_name] = run, points, files
    return found


def fail(*given, **named):
    raise RuntimeError("the server\nis gone")


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if "--report-to" in r.getMessage()]


OVER = ["--report-to tensorboard failed and is off; training goes on: RuntimeError: the server"]

# The warning comes from MLflow's own call, with the newest SQLAlchemy.
TRACKED = [
    pytest.mark.usefixtures("offline"),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
    pytest.mark.pictures,  # trackers read them
]
