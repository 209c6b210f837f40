from __future__ import annotations

import json
from pathlib import Path

import pytest

from shareprefill.artifact import load_artifact
from shareprefill.config import ClusterConfig
from shareprefill.errors import ConfigError, DataError
from shareprefill.regeneration.jobs import Job, load_jobs, select_jobs

WHOLE = """
[defaults]
data = ["retr_kv", "text"]
samples = 6
thresholds.tau = 0.25
thresholds.gamma = 0.8
train.epochs = 7
tolerances.recall = 0.5

[[model]]
name = "small"
model = "org/small"
artifact = "artifacts/small.st"
lengths = [2048, 4096]
seed = 3
target_recall = 0.9
thresholds.gamma = 1
cluster = { metric = "code", pivot_rows = 0 }
eval = { tasks = ["retr_kv"], samples = 2 }
tolerances = { clusters = 0, density = 0.125 }

[[model]]
name = "sp-tiny"
artifact = "artifacts/tiny.st"
k = "auto"
"""


def write(folder: Path, text: str) -> Path:
    (folder / "models.toml").write_text(text)
    return folder / "models.toml"


def test_every_key_reaches_its_stage(tmp_path: Path) -> None:
    small, tiny = load_jobs(write(tmp_path, WHOLE))
    assert (small.name, small.artifact) == ("small", Path("artifacts/small.st"))
    assert small.lengths == (2048, 4096)
    calibrate = small.calibrate
    assert (calibrate.model, calibrate.length, calibrate.samples) == ("org/small", 4096, 6)
    assert (calibrate.data, calibrate.seed) == (("retr_kv", "text"), 3)
    assert (small.train.epochs, small.train.seed) == (7, 3)
    expected = {"target_recall": 0.9, "tau": 0.25, "gamma": 1, "metric": "code", "pivot_rows": 0}
    assert small.cluster == ClusterConfig.from_dict(expected)
    assert small.evaluation.to_dict() == {"tasks": ["retr_kv"], "samples": 2, "seed": None}
    limits = small.tolerances
    assert (limits.recall, limits.density, limits.clusters) == (0.5, 0.125, 0)
    assert limits.accuracy == type(limits)().accuracy
    assert tiny.calibrate.model == "sp-tiny"
    assert tiny.cluster == ClusterConfig(tau=0.25, gamma=0.8)
    assert tiny.tolerances.clusters is None
    assert tiny.calibrate.length == type(calibrate)(model="-").length


MODEL = '[[model]]\nname = "a"\nartifact = "a.st"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no model: add a"),
        ("model = 3", "names no model"),
        ("[[models]]", r"unknown key 'models'.*did you mean 'model'\?"),
        (MODEL + "sample = 3", r"model a has an unknown key 'sample'.*did you mean 'samples'\?"),
        (MODEL + "xyz = 3", "model a has an unknown key 'xyz'; it may have name, model, artifact,"),
        (MODEL + "thresholds.target = 1", "model a.thresholds has an unknown key 'target'"),
        (MODEL + "train.epoch = 1", r"a.train has an unknown key 'epoch'.*did you mean 'epochs'"),
        (MODEL + "cluster.taus = 1", r"a.cluster has an unknown key 'taus'.*did you mean 'tau'"),
        (MODEL + "eval.task = []", r"a.eval has an unknown key 'task'.*did you mean 'tasks'"),
        (MODEL + "tolerances.recal = 1", r"a.tolerances .*'recal'.*did you mean 'recall'"),
        ("[defaults]\nname = 'a'\n" + MODEL, "defaults has an unknown key 'name'"),
        (MODEL + "samples = 1", r"model a: samples = 1 is not allowed: it must be at least 3"),
        (MODEL + "samples = '9'", r"model a: samples = '9' is of the wrong type"),
        (MODEL + "samples = true", r"model a: samples = True is of the wrong type"),
        (MODEL + "data = 'text'", r"model a: data = 'text' is of the wrong type"),
        (MODEL + "data = [3]", r"model a: data = \[3\] is of the wrong type"),
        (MODEL + "lengths = 512", r"model a: lengths = 512 must be a list of token counts"),
        (MODEL + "lengths = []", "must be a list of token counts"),
        (MODEL + "lengths = [8]", "length = 8 is not allowed: it must be at least four blocks"),
        (MODEL + "target_recall = 2", "a.cluster: target_recall = 2 is not allowed"),
        (MODEL + "k = 'all'", "a.cluster: k = 'all' is of the wrong type"),
        (MODEL + "tolerances.recall = 2", "recall = 2 is not allowed: it must be a number between"),
        (MODEL + "tolerances.recall = 'x'", "recall = 'x' is of the wrong type"),
        (MODEL + "thresholds = 3", r"a.thresholds = 3 is not allowed: it must be a table"),
        (MODEL + "thresholds.tau=1\ncluster.tau=1", "model a: tau stands in cluster, too"),
        (MODEL + "cluster.k = 3\nk = 4", "model a: k stands in cluster, too: name it once"),
        ('[[model]]\nname = "a"', "model a: artifact is missing"),
        ('[[model]]\nname = "a/b"\nartifact = "x"', r"model 1: name = 'a/b' is not allowed"),
        ('[[model]]\nname = "\\u001b"\nartifact = "x"', r"name = '\\x1b' is not allowed"),
        ('[[model]]\nartifact = "x"', r"model 1: name = None is not allowed"),
        (MODEL + MODEL, "two models have the name a"),
        (MODEL + '[[model]]\nname = "b"\nartifact = "a.st"', "two models have the artifact a.st"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_jobs(write(tmp_path, text))
    assert str(caught.value).isprintable()
    assert "models.toml" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="models.toml does not exist"):
        load_jobs(tmp_path / "models.toml")
    with pytest.raises(DataError, match=r"cannot be read as TOML: Expected '\]\]'"):
        load_jobs(write(tmp_path, "[[model"))
    (tmp_path / "models.toml").write_bytes(b"\xff")
    with pytest.raises(DataError, match="cannot be read as TOML"):
        load_jobs(tmp_path / "models.toml")


def test_selection(tmp_path: Path) -> None:
    text = "".join(f'[[model]]\nname = "m{n}"\nartifact = "{n}.st"\n' for n in range(7))
    jobs = load_jobs(write(tmp_path, text))

    def names(*arguments: object) -> list[str]:
        return [job.name for job in select_jobs(jobs, *arguments)]  # type: ignore[arg-type]

    assert names() == [f"m{n}" for n in range(7)]
    assert names(["m5", "m2"]) == ["m2", "m5"]
    assert names([], "2/3") == ["m1", "m4"]
    assert names(["m1", "m2", "m3"], "3/3") == ["m3"]
    # A shard more than there are models has nothing to do, and says nothing.
    assert names([], "8/8") == []
    parts = [names([], f"{number}/3") for number in (1, 2, 3)]
    assert sorted(name for part in parts for name in part) == names()
    with pytest.raises(ConfigError, match=r"no model 'mm2'; there are m0, m1.*did you mean 'm2'\?"):
        names(["mm2"])
    for shard in ("0/3", "4/3", "3", "a/b", "1/0", "-1/3", "1/3 "):
        with pytest.raises(ConfigError, match="give i/n with i from 1 to n"):
            names([], shard)


COMMITTED = load_jobs(Path(__file__).parents[2] / "artifacts" / "models.toml")


@pytest.mark.parametrize("job", COMMITTED, ids=lambda job: job.name)
def test_committed_artifacts_are_of_these_settings(job: Job) -> None:
    """So that what CI makes anew is another version of the committed file, not another artifact."""
    found = load_artifact(Path(__file__).parents[2] / "artifacts" / job.artifact)
    stages = {"calibrate": job.calibrate, "train": job.train, "cluster": job.cluster}
    wanted = json.loads(json.dumps({name: stage.to_dict() for name, stage in stages.items()}))
    # No finer than the maps are.
    resolution = found.configuration["train"]["resolution"]
    assert resolution <= wanted["train"].pop("resolution")
    assert found.configuration == {**wanted, "train": {**wanted["train"], "resolution": resolution}}
    # No path of a machine stands in it.
    assert found.model == job.calibrate.model
    assert not Path(found.model).is_absolute()
