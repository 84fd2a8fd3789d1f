"""Every file in conf/ composes into a valid configuration; wrong values are found, all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from tspc.decompositions import names, resolve
from tspc.errors import ConfigError
from tspc.phases.table import PHASES
from tspc.run.config import TOP_LEVEL, Config, read_config
from tspc.training.tasks import KINDS

CONF = Path(__file__).parent.parent / "conf"


def composed(*overrides: str) -> dict:
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("config", list(overrides)), resolve=True)  # type: ignore[return-value]


def read(*overrides: str) -> Config:
    return read_config(composed(*overrides))


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("method", options("method"))
def test_methods(method):
    bits = ["bits=8"] if method == "dense" else []
    assert read(f"method={method}", *bits).planning.method.name == method
    assert read(f"method={method}", *bits).planning.method == resolve(method), (
        "the file states the defaults of the code"
    )


def test_every_method_has_a_file():
    assert set(options("method")) == set(names())
    assert set(options("phase")) == set(PHASES)


OF_OTHER_TASKS = {
    "text": ("task=text_classification",),
    "datasets": ("task=regression",),
    "factory": ("task=custom", "dataset.factory=a.b:data", "metric=a.b:judge", "model=resnet20"),
}


@pytest.mark.parametrize("dataset", options("dataset"))
def test_datasets(dataset):
    extra = ["model=resnet20", "phase=decompose"] if dataset == "none" else []
    config = read(f"dataset={dataset}", *extra, *OF_OTHER_TASKS.get(dataset, ()))
    assert config.dataset.name == (config.task.name if dataset in OF_OTHER_TASKS else dataset)


@pytest.mark.parametrize("model", options("model"))
def test_models(model):
    extra = ["model.factory=a.b:net"] if model == "custom" else []
    expected = {
        "default": "resnet8",
        "torchvision": "resnet50",
        "timm": "resnetv2_50",
        "transformers": "vit",
        "custom": "net",
    }.get(model, model)
    assert read(f"model={model}", *extra).network.name == expected


@pytest.mark.parametrize("task", options("task"))
def test_tasks(task):
    own = ["dataset.factory=a.b:data", "model=custom", "model.factory=a.b:net", "metric=a.b:judge"]
    extra = {"speech": own, "custom": own, "sentence_embeddings": ["pretrained=random"]}.get(task, [])
    config = read(f"task={task}", *extra)
    assert config.task.name == task
    assert config.dataset.kind in KINDS[task]
    usual = {"sentence_embeddings": "cosine", "language_modelling": "perplexity", "regression": "mse"}
    assert config.metric == ("a.b:judge" if extra == own else usual.get(task, "top1"))
    assert (config.task.identity == {}) == (task == "image_classification"), "runs of images stay the same runs"


def test_every_task_has_a_file():
    assert set(options("task")) == set(KINDS)


@pytest.mark.parametrize("phase", options("phase"))
def test_phases(phase):
    config = read(f"phase={phase}")
    assert list(config.phases) == [phase]


def test_networks_and_data_sets_imply_each_other():
    assert read("dataset=imagenet").network.name == "resnet50"
    assert read("dataset=imagenet").pretrained == "default"
    assert read("dataset=imagenet", "model.name=resnet18").network.name == "resnet18"
    assert read("model=torchvision").dataset.name == "imagenet"
    assert read("model=torchvision", "dataset=cifar10").dataset.name == "cifar10"
    assert read("dataset=cifar10", "model=resnet20_v2").network.name == "resnet20_v2"
    assert read("model=custom", "model.factory=a:b").dataset.name == "none"


def test_epochs_and_batch_size_reach_both_training_phases():
    config = read("epochs=17", "batch_size=9", "phase.distill.epochs=3")
    distill, finetune = config.phases["distill"], config.phases["finetune"]
    assert (distill.epochs, finetune.epochs) == (3, 17)
    assert (distill.batch_size, finetune.batch_size) == (9, 9)


def test_top_level_keys():
    assert set(composed()) == set(TOP_LEVEL)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rate=0"], "rate=0: expected a number above 0 and at most 1"),
        (["rate=nan"], "rate=nan: expected"),
        (["rate=half"], "rate=half: expected"),
        (["rate_decay=up"], "rate_decay=up: expected one of flat, linear_inc, linear_dec"),
        (["seed=-1"], "seed=-1: expected a whole number of at least 0"),
        (["seed=0.5"], "seed=0.5"),
        (["overwrite=perhaps"], "overwrite=perhaps: expected true or false"),
        (["phase.finetune.learning_rate=-1"], "phase.finetune.learning_rate=-1: expected a number above 0"),
        (["phase.finetune.optimizer=lion"], "phase.finetune.optimizer=lion: expected one of sgd, adam"),
        (["phase.distill.batch_norm=off"], "phase.distill.batch_norm="),
        (["phase.distill.epochs=many"], "phase.distill.epochs=many: expected a whole number"),
        (["+phase.finetune.learning_rat=1"], "did you mean phase.finetune.learning_rate?"),
        (["+dataset.colour=1"], "dataset.colour is not a setting"),
        (["+ratio=1"], "ratio is not a setting; did you mean rate"),
        (["dataset.std=[0.0]"], r"dataset.std=\[0.0\]"),
        (["dataset=none", "pretrained=null"], "has no recipe"),
        (["phase=pretrain", "pretrained=random"], "nothing to train"),
        (["model=custom"], "model=custom needs model.factory"),
        (["eval_samples=0"], "eval_samples=0"),
        (["dataset.channels=three"], "dataset.channels=three: expected a whole number"),
        (["dataset=imagenet", "pretrained=null", "dataset.image_size=abc"], "has no recipe"),
        (["+dataset.workers=-1"], "dataset.workers=-1: expected a whole number of at least 0"),
        (["phase.finetune=null"], "phase.finetune is empty"),
        (["+phase.pretrain.epochs=3"], "phase.pretrain.epochs is not a setting"),
        (["phase=compare", "+phase.compare.foo=1"], "phase.compare.foo is not a setting"),
        (["dataset=synthetic", "+dataset.options.trian=5"], "dataset.options.trian is not a setting; did you mean"),
        (["dataset=synthetic", "~dataset.options.train"], "dataset.options lacks train"),
        (["variant=a/b"], "variant=a/b: expected"),
        (["dataset=text"], "task=image_classification takes no dataset of the kind text: .* or another task"),
        (["task=regression", "dataset=cifar10"], "task=regression takes no dataset of the kind cifar10: choose one"),
        (["task=speech"], "task=speech has no usual metric: give metric=package.module:function"),
        (["task=speech", "metric=a:b"], "dataset.factory=null: dataset=factory needs package.module:function"),
        (["task=sentence_embeddings"], "has no targets with which a reference could be trained"),
        (["task=text_classification", "pretrained=x.pt"], "the network brings no tokenizer; name the folder of one"),
        (
            ["task=text_classification", "pretrained=default", "model.name=nosuch"],
            "model.name=nosuch: there is no such folder, from which pretrained=default could read weights",
        ),
        (
            ["task=regression", "model=resnet8"],
            "model.name=resnet8 takes images, and task=regression gives it texts: choose model=transformers",
        ),
        (["task=text_classification", "+dataset.image_size=3"], "dataset.image_size is not a setting"),
        (["task=text_classification", "dataset.length=1"], "dataset.length=1: expected a whole number of at least 2"),
        (["task=text_classification", "+dataset.path=x"], "dataset.path=x has an effect only with dataset=datasets"),
        (["task.answers=words"], "task.answers=words: expected one of classes, tokens"),
        (["task.loss=words"], "task.loss=words: expected package.module:function"),
    ],
)
def test_wrong_values(overrides, message):
    with pytest.raises(ConfigError, match=message):
        read(*overrides)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        read("rate=-1", "seed=-1", "phase.finetune.momentum=2")
    assert len(caught.value.problems) == 3
