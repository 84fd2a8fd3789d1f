"""A version with more settings than the one before goes on with its runs: a key that is not there has its default."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import TINY
from tspc.compression.settings import PlanSettings
from tspc.phases.phase import NetworkPhase
from tspc.store import records
from tspc.store.records import differences, usual

COMMAND = (*TINY, "phase=[decompose,distill]", "phase.distill.steps=2", "method=svd")
RUN = "outputs/synthetic/resnet8/svd-0.2/seed0"


@pytest.fixture
def earlier(cli, tmp_path, monkeypatch) -> Path:
    """A run of a version that does not know four of the settings."""
    identity, decisive, plain = PlanSettings.identity, NetworkPhase.decisive, records.plain

    def without(key, data):
        return {name: value for name, value in data.items() if name != key}

    with monkeypatch.context() as old:
        old.setattr(
            PlanSettings,
            "identity",
            property(lambda self: without("runtime", without("objective", identity.fget(self)))),
        )
        old.setattr(NetworkPhase, "decisive", lambda self, of: without("schedule", decisive(self, of)))
        old.setattr("tspc.run.reference.plain", lambda settings: without("flip", plain(settings)))
        assert cli(*COMMAND)[0] == 0
    path = tmp_path / RUN / "run.json"
    written = json.loads(path.read_text())
    assert "objective" not in written
    assert "flip" not in written["dataset"]
    return path


def test_a_run_without_new_keys_goes_on_and_so_does_its_reference(cli, earlier):
    written = earlier.read_bytes()
    for _ in range(2):
        code, out, err = cli(*COMMAND)
        assert (code, err) == (0, "")
        assert out.count("done before: ") == 2
        assert "reference  read from" in out
    assert earlier.read_bytes() == written, "the record stays as it is"
    code, out, err = cli(*COMMAND, "phase=[decompose,distill,finetune]", "phase.finetune.steps=2")
    assert (code, err) == (0, "")
    assert cli(*COMMAND)[0] == 0, "a phase that was made now fits to those that were made before"


def test_a_key_may_be_taken_out_of_a_record(cli, tmp_path):
    assert cli(*COMMAND)[0] == 0
    path = tmp_path / RUN / "run.json"
    identity = json.loads(path.read_text())
    del identity["rank_multiple"], identity["dataset"]["pad"]
    path.write_text(json.dumps(identity))
    code, out, err = cli(*COMMAND)
    assert (code, err) == (0, "")
    assert out.count("done before: ") == 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("objective=macs", "objective: parameters → macs"),
        ("runtime=onnx-int8", "runtime: eager → onnx-int8"),
        ("phase.distill.schedule=cosine", "phase.distill.schedule: constant → cosine"),
        ("+dataset.flip=true", "dataset.flip: False → True"),
    ],
)
def test_another_value_than_the_default_is_told(cli, earlier, change, told):
    code, _, err = cli(*COMMAND, change)
    assert code == 1
    assert told in " ".join(err.split())


def test_a_missing_key_stands_for_its_default():
    defaults = {"a": 1, "b": {"c": 2}}
    assert differences({"b": {}}, {"a": 1, "b": {"c": 2}}, defaults=defaults) == []
    assert differences({"b": {}}, {"a": 3, "b": {"c": 4}}, defaults=defaults) == ["b.c: 2 → 4", "a: 1 → 3"]
    assert differences({"a": 3}, {}, defaults=defaults) == ["a: 3 → 1"]


def test_defaults_are_plain_data():
    @dataclass
    class Settings:
        needed: int
        sizes: tuple[int, ...] = (1, 2)
        options: dict[str, int] = field(default_factory=dict)

    assert usual(Settings) == {"sizes": [1, 2], "options": {}}
