"""A phase that was stopped goes on from its last saved step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.test_phases import DISTILLATION
from tspc.compression.compress import compress
from tspc.phases.distill import distill
from tspc.phases.finetune import Finetuning, finetune
from tspc.training import Progress


@pytest.mark.slow
@pytest.mark.parametrize(("method", "bits"), [("tk", 32), ("tk", 4), ("id", 32)])
def test_distillation_goes_on_inside_a_block(context, reference, tmp_path, monkeypatch, method, bits):
    class Killed(Exception): ...

    def kill(watch, step):
        if watch._where["block"] == "layer2.0" and step.number == 7:
            raise Killed

    settings = replace(DISTILLATION, images=100, steps=12, least_gain=0.3)  # three epochs; it is stopped in the second
    whole, killed, resumed = (compress(reference, method, 0.3, allocation="uniform", bits=bits) for _ in range(3))
    distill(whole, reference, settings, context, Progress())
    path = tmp_path / "p.progress.pt"
    with monkeypatch.context() as patched:
        patched.setattr("tspc.phases.context.Watch._on_step", kill)
        with pytest.raises(Killed):
            distill(killed, reference, settings, context, Progress(path, "s", interval=0))
    progress = Progress(path, "s")  # with few bits the first layer is a block, too
    assert progress.state_of(progress.part)["step"] == 7
    distill(resumed, reference, settings, context, Progress(path, "s"))
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())


def test_finetuning_of_factors_that_learn_in_another_form_goes_on(context, reference, tmp_path, monkeypatch):
    class Killed(Exception): ...

    def kill(watch, step):
        if step.number == 3:
            raise Killed

    settings = Finetuning(1, 50, 1e-3, steps=6, held_out=0)
    whole, killed, resumed = (compress(reference, "id", 0.3, allocation="uniform") for _ in range(3))
    names, path = list(whole.state_dict()), tmp_path / "p.progress.pt"
    finetune(whole, reference, settings, context, Progress(), "finetune")
    with monkeypatch.context() as patched:
        patched.setattr("tspc.phases.context.Watch._on_step", kill)
        with pytest.raises(Killed):
            finetune(killed, reference, settings, context, Progress(path, "s", interval=0), "finetune")
    finetune(resumed, reference, settings, context, Progress(path, "s"), "finetune")
    assert list(whole.state_dict()) == names
    assert list(killed.state_dict()) == names, "also after an error"
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())


def test_what_is_prepared_before_training_is_not_prepared_again(context, reference, tmp_path, monkeypatch):
    """A saved step replaces it; a line about a learning rate that was chosen long ago would be said twice."""

    class Killed(Exception): ...

    def kill(watch, step):
        if step.number == 3:
            raise Killed

    prepared = []
    for name in ("finetune.rebase_", "distill._start_norms_"):
        monkeypatch.setattr(f"tspc.phases.{name}", lambda *given, name=name: prepared.append(name))
    model = compress(reference, "tk", 0.3, allocation="uniform")
    steps = {
        "finetune": lambda progress: finetune(
            model,
            reference,
            Finetuning(1, 50, 1e-3, careful_below=0.0, optimizer="sgd", features=0.0, held_out=0, warmup=0.0),
            context,
            progress,
            "finetune",
        ),
        "distill": lambda progress: distill(
            model, reference, replace(DISTILLATION, blocks="layer3.0", steps=6), context, progress
        ),
    }
    for phase, run in steps.items():
        path = tmp_path / f"{phase}.pt"
        with monkeypatch.context() as patched:
            patched.setattr("tspc.phases.context.Watch._on_step", kill)
            with pytest.raises(Killed):
                run(Progress(path, "s", interval=0))
        assert len(prepared) == 1
        run(Progress(path, "s"))
        assert len(prepared) == 1
        prepared.clear()
