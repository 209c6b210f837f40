import pytest

from shareprefill.config import RuntimeConfig
from shareprefill.errors import ConfigError
from shareprefill.vllm import options
from shareprefill.vllm.options import ServingOptions, check_switch


def test_an_engine_that_asks_for_nothing_has_no_options():
    assert ServingOptions.find(None, {}) is None
    assert ServingOptions.find({"other": {}}, {"SHAREPREFILL_ARTIFACT": ""}) is None


def test_options_come_from_the_configuration_before_the_environment():
    environment = {"SHAREPREFILL_ARTIFACT": "a.st"}
    assert ServingOptions.find({}, environment) == ServingOptions(artifact="a.st")
    entry = {"artifact": "b.st", "gamma": 0.9, "min_tokens": 0}
    found = ServingOptions.find({"shareprefill": entry}, environment)
    runtime = RuntimeConfig(gamma=0.9, min_tokens=0)
    assert found == ServingOptions(artifact="b.st", runtime=runtime)


def test_decode_steps_are_dense_unless_an_engine_asks_for_sparse_ones():
    entry = {"artifact": "a.st"}
    found = ServingOptions.find({"shareprefill": entry}, {})
    assert found is not None
    assert found.runtime.decode == "dense"
    entry |= {"decode": "sparse", "decode_density": 0.15}
    found = ServingOptions.find({"shareprefill": entry}, {})
    assert found is not None
    assert (found.runtime.decode, found.runtime.decode_density) == ("sparse", 0.15)


def test_a_policy_of_the_environment_needs_no_artifact():
    found = ServingOptions.find({}, {"SHAREPREFILL_POLICY": "smoothed"})
    assert found == ServingOptions(artifact=None, runtime=RuntimeConfig(policy="smoothed"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("clusters.st", "must be an object"),
        ({}, "needs an artifact"),
        ({"policy": "auto"}, "needs an artifact"),
        ({"artefact": "a.st", "policy": "flex"}, "'artefact'"),
        ({"artifact": 3}, "must be a path"),
        ({"artifact": "a.st", "policy": "flax"}, "policy = 'flax'"),
        ({"artifact": "a.st", "lora": "yes"}, "lora = 'yes'"),
        ({"artifact": "a.st", "checkpoint": "no"}, "checkpoint = 'no'.*'unchecked'"),
        ({"artifact": "a.st", "gamma": 2}, "gamma = 2"),
        ({"artifact": "a.st", "decode": "fast"}, "decode = 'fast'"),
        ({"artifact": "a.st", "decode_density": 0.1}, "is for sparse decode steps"),
    ],
)
def test_wrong_options_are_refused(entry: object, message: str):
    with pytest.raises(ConfigError, match=message):
        ServingOptions.find({"shareprefill": entry}, {})


def test_an_engine_takes_a_policy_from_outside_and_a_request_an_installed_one(
    monkeypatch: pytest.MonkeyPatch,
):
    found = ServingOptions.find({}, {"SHAREPREFILL_POLICY": "strided:Strided:stride=2"})
    assert found == ServingOptions(
        artifact=None, runtime=RuntimeConfig(policy="strided:Strided:stride=2")
    )
    monkeypatch.setattr(options, "installed_policies", lambda: {"strided": "strided:Strided"})
    check_switch("strided")
    for value in ("strided:Strided", "strided:stride=2", "flex:tau=0.2", "os:system"):
        with pytest.raises(ConfigError, match="is not allowed"):
            check_switch(value)


def test_a_switch_is_off_or_a_policy_that_needs_no_calibration():
    for value in (None, "off", "smoothed", "flex"):
        check_switch(value)
    for value in ("auto", "on", "dense", 1, True, ["off"]):
        with pytest.raises(ConfigError, match="is not allowed"):
            check_switch(value)
