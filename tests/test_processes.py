"""Two processes with half a batch each do what one does with the whole: training, distillation, evaluation, a run."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import TINY
from tests.forking import Forks

WORKER = """
import sys
import torch
from pathlib import Path
from tests.small import CPU, SPEC, cross_entropy, network, recipe
from tspc.system import processes
from tspc.compression.compress import compress
from tspc.data import load_data
from tspc.terminal.display import Display
from tspc.phases.context import Context
from tspc.phases.distill import Distillation, distill
from tspc.phases.finetune import Finetuning, finetune, train_classifier
from tspc.training import Hardware, Progress, evaluate, judged, metric_of

torch.set_num_threads(1)
processes.join(cpu=True)
context = Context(load_data(SPEC), Hardware(CPU), 0, Display(is_silent=True))
model = network()
train_classifier(model, recipe(epochs=2, held_out=20), context, Progress(), "pretrain")
# Each phase from a start of its own: training amplifies the rounding of what came before.
reference = network()
small, tuned = (compress(reference, "tk", 0.3, allocation="uniform") for _ in range(2))
sgd = {"optimizer": "sgd", "held_out": 0}
distill(small, reference, Distillation(2, 50, 1e-2, images=200, schedule="cosine", **sgd), context, Progress())
finetune(tuned, reference, Finetuning(2, 50, 1e-2, warmup=0.0, **sgd), context, Progress(), "finetune")
rounded = compress(reference, "tk", 0.3, allocation="uniform", bits=4)
distill(rounded, reference, Distillation(1, 50, 1e-2, images=100, steps=2, **sgd), context, Progress())
own = torch.stack([value.double().abs().sum() for value in rounded.state_dict().values()])
assert torch.equal(processes.summed(own.clone()), own * processes.count()), "each process has rounded by itself"
nested = processes.by_first(lambda: (processes.by_first(lambda: 3), processes.count()))
assert nested == (3, 1), "while the others wait, the first process exchanges nothing with them"
found = evaluate(small, context.data, CPU, batch_size=7)
own = lambda model, batches: torch.cat([model(x).amax(1) for x, _ in batches])
metrics = [metric_of(chosen) for chosen in ("cosine", "perplexity", own, lambda *given: float(own(*given).sum()))]
scores = [judged(metric, reference, context.data, CPU, small, batch_size=7) for metric in metrics]
assert [len(score.each) for score in scores[:-1]] == [130] * 3
if processes.is_first():
    networks = {"trained": model, "distilled": small, "tuned": tuned}
    state = {f"{n}.{k}": v for n, net in networks.items() for k, v in net.state_dict().items()}
    numbers = {"accuracy": [found.top1, found.images], "scores": [[score.value, score.count] for score in scores]}
    torch.save({"state": state} | numbers, sys.argv[1])
processes.wait()
"""


def launch(count: int, *arguments: str, folder: Path, forks: Forks | None = None) -> None:
    """The command in `count` processes, as torchrun would start them; with `forks` they begin as forks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = []
    for rank in range(count):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        if forks is not None:
            running.append(forks.start(*arguments, folder=folder, **place, **there))
            continue
        environment = os.environ | place | there | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen([sys.executable, *arguments], cwd=folder, env=environment, text=True, **pipes))
    ended = [(process.communicate(timeout=300), process.returncode) for process in running]
    for (_, err), code in ended:
        assert code == 0, err[-2000:]
    assert all(not out for (out, _), _ in ended[1:]), "only the first process speaks"


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, forks):
    for count in (1, 2):
        launch(count, "-c", WORKER, str(tmp_path / f"{count}.pt"), folder=tmp_path, forks=forks)
    one, two = (torch.load(tmp_path / f"{count}.pt", weights_only=True) for count in (1, 2))
    for name, value in one["state"].items():
        torch.testing.assert_close(two["state"][name], value, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert two["accuracy"] == one["accuracy"]
    torch.testing.assert_close(torch.tensor(two["scores"]), torch.tensor(one["scores"]), rtol=5e-2, atol=5e-3)
    assert one["accuracy"][1] == 130, "an uneven split counts every image once"


def assert_equal(one: Path, two: Path) -> None:
    """The weights in two files, up to rounding."""
    weights, others = load_file(one), load_file(two)
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=5e-3, atol=5e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_run_in_two_processes(tmp_path, forks):
    # Not Adam: its steps are as long for a gradient that is but rounding.
    sgd = [
        f"phase.{phase}.{change}"
        for phase in ("distill", "finetune")
        for change in ("optimizer=sgd", "learning_rate=0.01")
    ]
    options = [
        *TINY,
        *sgd,
        "method=svd",
        "rate=0.3",
        "phase.finetune.steps=3",
        "phase.distill.steps=2",
        "batch_size=50",
    ]
    alone, both = (tmp_path / name for name in ("alone", "both"))
    launch(1, "-m", "tspc", *options, f"output_dir={alone}", folder=tmp_path, forks=forks)
    # The phases from the same reference: they amplify the rounding of what came before.
    trained = next(alone.rglob("reference/model.safetensors")).parent
    shutil.copytree(trained, both / trained.relative_to(alone))
    launch(2, "-m", "tspc", *options, f"output_dir={both}", folder=tmp_path)
    runs = [next(folder.rglob("result.json")) for folder in (alone, both)]
    one, two = (json.loads(path.read_text()) for path in runs)
    assert two["parameters"] == one["parameters"]
    assert_equal(*(path.with_name("model.safetensors") for path in runs))
    left = [path.name for path in tmp_path.rglob("*") if "progress" in path.name or "partial" in path.name]
    assert left == []


@pytest.mark.slow
def test_a_sweep_in_two_processes_and_a_batch_that_they_cannot_share(tmp_path, forks):
    options = [*TINY, "phase=pretrain", "batch_size=50", f"output_dir={tmp_path / 'o'}"]
    launch(2, "-m", "tspc", "-m", *options, "model=resnet8,resnet8_v2", folder=tmp_path, forks=forks)
    assert len(list(tmp_path.rglob("model.safetensors"))) == 2
    with pytest.raises(
        AssertionError, match=r"tspc: phase\.distill\.batch_size=100: 3 processes share a batch; give a multiple of 3"
    ):
        launch(3, "-m", "tspc", *TINY, f"output_dir={tmp_path / 'p'}", folder=tmp_path, forks=forks)
    assert not (tmp_path / "p").exists()
