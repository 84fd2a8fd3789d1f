"""People's networks are copied as they are: what a deep copy refuses is copied all the same, or named."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import tspc
from tests.nets import Net, images
from tspc.errors import TspcError
from tspc.layers.forms import tensorized_layers
from tspc.traversal.copying import copied


class Keeps(Net):
    """Keeps what it is given, or whatever a test puts there."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer = super().forward(x)
        self.last = {"answer": [answer]}
        return answer


def weight_norm(model: nn.Module) -> None:
    with pytest.warns(FutureWarning, match="deprecated"):
        nn.utils.weight_norm(model.wide)


WRAPPERS = {
    "weight norm": weight_norm,
    "weight norm as a parametrization": lambda model: parametrizations.weight_norm(model.wide),
    "spectral norm": lambda model: nn.utils.spectral_norm(model.wide),
    "spectral norm as a parametrization": lambda model: parametrizations.spectral_norm(model.wide),
    "pruning mask": lambda model: prune.l1_unstructured(model.wide, "weight", 0.5),
    "activations": lambda model: None,
    "lock": lambda model: setattr(model, "lock", {"inside": [threading.Lock(), threading.Event()]}),
    "generator": lambda model: setattr(model, "noise", torch.Generator().manual_seed(3)),
    "hook of an object": lambda model: model.stem.register_forward_hook(Recorder().see),
    "compiled": lambda model: model.compile(backend="eager"),
}


class Recorder:
    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.lock = threading.RLock()

    def see(self, module: nn.Module, args: object, output: torch.Tensor) -> None:
        with self.lock:
            self.seen.append(output)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_networks_that_a_deep_copy_refuses(wrap):
    torch.manual_seed(0)
    model = Keeps()
    wrap(model)
    wanted = model(images()) if wrap is None else model.eval()(images())
    twin = copied(model)
    torch.testing.assert_close(twin(images()), wanted)
    assert twin.stem.weight.data_ptr() != model.stem.weight.data_ptr()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = tspc.compress(model, "tk", 0.5, allocation="uniform")
    assert "point" in tensorized_layers(small)
    assert small(images()).shape == (2, 5)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    tspc.apply_(model, tspc.plan(model, "tk", 0.5, allocation="uniform"))
    torch.testing.assert_close(model(images()), small(images()))


def test_a_copied_generator_goes_on_from_the_same_state_and_a_lock_is_free():
    model = Net()
    model.noise, model.lock = torch.Generator().manual_seed(3), threading.Lock()
    with model.lock:
        twin = copied(model)
    assert torch.equal(torch.rand(3, generator=twin.noise), torch.rand(3, generator=model.noise))
    assert twin.lock.acquire(blocking=False)


def test_a_kept_view_of_a_parameter_stays_one():
    model = Net()
    model.seen = model.hidden.weight[:2]
    twin = copied(model)
    with torch.no_grad():
        twin.hidden.weight.fill_(3)
    assert (twin.seen == 3).all()
    assert not (model.seen == 3).any()


@pytest.mark.parametrize("place", ["stem", ""])
def test_what_cannot_be_copied_is_named(place, tmp_path):
    model = Net()
    with (tmp_path / "log").open("w") as file:
        model.get_submodule(place).log = [file]
        name = "stem.log" if place else "log"
        for run in (lambda: tspc.compress(model, "tk", 0.5), lambda: tspc.fold_batch_norms(model, images())):
            with pytest.raises(TspcError, match=rf"Net cannot be copied because of its attribute {name} \(list: "):
                run()
