import pytest

from shareprefill.config import RuntimeConfig
from shareprefill.errors import ConfigError
from shareprefill.vllm import options
from shareprefill.vllm.options import ServingOptions, check_switch, switch_is_on


def test_an_engine_that_asks_for_nothing_has_no_options():
    assert ServingOptions.find(None, {}) is None
    assert ServingOptions.find({"other": {}}, {"SHAREPREFILL_ARTIFACT": ""}) is None


def test_variables_of_a_service_with_our_name_are_no_options() -> None:
    """Kubernetes sets them in every container beside a service called shareprefill."""
    names = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_80_TCP_ADDR")
    assert ServingOptions.find({}, {f"SHAREPREFILL_{name}": "1" for name in names}) is None


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
        ({"artefact": "a.st", "policy": "flex"}, "no option 'artefact' .did you mean 'artifact'"),
        ({"artifact": "a.st", "min-tokens": 0}, "no option 'min-tokens' .did you mean 'min_tok"),
        ({"artifact": "a.st", 3: 0}, "no option 3; it takes .*, policy"),
        ({"policy": "dense"}, "leaves nothing to shareprefill"),
        ({"artifact": "a.st", "nonfinite": "error"}, "would end all others"),
        ({"policy": "flex", "checkpoint": "unchecked"}, "is for an artifact"),
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


def test_steps_may_be_sparse_behind_dense_prefills():
    entry = {"policy": "dense", "decode": "sparse"}
    found = ServingOptions.find({"shareprefill": entry}, {})
    assert found is not None
    assert found.runtime.policy == "dense"


@pytest.mark.parametrize(
    ("additional", "environment", "message"),
    [
        ({"share_prefill": {"policy": "flex"}}, {}, "'share_prefill' is unknown .*'shareprefill'"),
        ({"SharePrefill": {}}, {}, "additional_config's key 'SharePrefill' is unknown"),
        ({}, {"SHAREPREFILL_ARTEFACT": "a.st"}, "_ARTEFACT is unknown .*mean 'SHAREPREFILL_ARTI"),
        ({}, {"SHAREPREFILL_MIN_TOKENS": "0"}, "_MIN_TOKENS is unknown.*other options go into"),
        ({}, {"SHARE_PREFILL_POLICY": "flex"}, "mean 'SHAREPREFILL_POLICY'"),
        (
            {"shareprefill": {"min_tokens": 0}},
            {"SHAREPREFILL_ARTIFACT": "a.st"},
            "names neither an artifact nor a policy: write {'artifact': 'a.st'}",
        ),
    ],
)
def test_names_that_are_nearly_ours_are_refused_not_passed_over(
    additional: dict[str, object], environment: dict[str, str], message: str
):
    with pytest.raises(ConfigError, match=message):
        ServingOptions.find(additional, environment)


def test_names_that_are_others_are_passed_over():
    others = {"chunked_prefill": True, "sparse_prefill": {}, "prefill": 1, "artifact": "a.st"}
    assert ServingOptions.find(others, {"PREFILL_POLICY": "x", "ARTIFACT": "y"}) is None
    assert ServingOptions.find({"shareprefill": {"policy": "flex"}} | others, {}) is not None


def test_the_switch_of_requests_is_on_or_off(monkeypatch: pytest.MonkeyPatch):
    found = []
    for value in ("", "on", "off"):
        monkeypatch.setenv("SHAREPREFILL_REQUEST_SWITCH", value)
        found.append(switch_is_on())
    assert found == [True, True, False]
    monkeypatch.setenv("SHAREPREFILL_REQUEST_SWITCH", "OFF")
    with pytest.raises(ConfigError, match="'OFF' is not allowed: it must be on or off"):
        switch_is_on()


def test_an_installed_policy_that_cannot_be_made_is_refused(monkeypatch: pytest.MonkeyPatch):
    installed = {"gone": "no_such_module:Gone"}
    monkeypatch.setattr(options, "installed_policies", lambda: installed)
    monkeypatch.setattr("shareprefill.policy_names.installed_policies", lambda: installed)
    with pytest.raises(ConfigError, match="no module 'no_such_module'"):
        check_switch("gone")


def test_an_engine_takes_a_policy_from_outside_and_a_request_an_installed_one(
    monkeypatch: pytest.MonkeyPatch,
):
    found = ServingOptions.find({}, {"SHAREPREFILL_POLICY": "strided:Strided:stride=2"})
    assert found == ServingOptions(
        artifact=None, runtime=RuntimeConfig(policy="strided:Strided:stride=2")
    )
    installed = {"strided": "shareprefill.runtime.policies.streaming:Streaming"}
    monkeypatch.setattr(options, "installed_policies", lambda: installed)
    monkeypatch.setattr("shareprefill.policy_names.installed_policies", lambda: installed)
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
