"""Settings: presets hold the published values, and every wrong word is answered by one sentence."""

import pytest

from fastssl import config
from fastssl.config import ConfigError

ROOT = "data.root=somewhere"


def test_moco_v2_preset_holds_the_published_recipe():
    cfg = config.load([ROOT])
    assert cfg.method | {"split_groups": 8, "key_exchange": "deal"} == {
        "name": "moco", "dim": 128, "queue_length": 65536, "momentum": 0.999, "temperature": 0.2, "head": "mlp",
        "symmetric": False, "batch_norm": "shuffle", "split_groups": 8, "key_exchange": "deal",
    }  # fmt: skip
    assert (cfg.optim.lr, cfg.optim.momentum, cfg.optim.weight_decay, cfg.optim.schedule) == (0.03, 0.9, 1e-4, "cosine")
    query, key = cfg.view_specs()
    assert (query.role, query.size, query.scale) == ("query", 224, (0.2, 1.0))
    assert (query.augment.jitter_p, query.augment.hue, query.augment.blur_p) == (0.8, 0.1, 0.5)
    assert key.augment == query.augment


def test_moco_v1_preset_differs_where_the_paper_does():
    cfg = config.load(["method=moco_v1", ROOT])
    assert (cfg.method["temperature"], cfg.method["head"], cfg.optim.schedule) == (0.07, "linear", "step")
    augment = cfg.view_specs()[0].augment
    assert (augment.grayscale_first, augment.jitter_p, augment.hue, augment.blur_p) == (True, 1.0, 0.4, 0.0)


def test_the_command_line_wins_over_preset_and_recipe():
    cfg = config.load(["recipe=cifar10_moco_v2_cpu", "views.query.size=48", "encoder=resnet50", "optim.lr=1", ROOT])
    assert [s.size for s in cfg.view_specs()] == [48, 48]
    assert (cfg.encoder.name, cfg.optim.lr) == ("resnet50", 1.0)


@pytest.mark.parametrize("recipe", sorted(p.stem for p in (config.config_dir() / "recipe").glob("*.yaml")))
def test_every_recipe_composes(recipe):
    assert config.load([f"recipe={recipe}", ROOT]).view_specs()


def test_a_view_may_override_single_keys_of_the_chain():
    cfg = config.load([ROOT, "++views.key.augment.blur_p=0.0"])
    assert [s.augment.blur_p for s in cfg.view_specs()] == [0.5, 0.0]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([], "data.root is missing; give it as data.root=VALUE"),
        ([ROOT, "run.bath_size=3"], "unknown setting 'run.bath_size' (did you mean 'run.batch_size'?)"),
        ([ROOT, "run.batch_size=many"], "run.batch_size is 'many', but must be a whole number"),
        ([ROOT, "run.batch_size=2.5"], "run.batch_size is 2.5, but must be a whole number"),
        ([ROOT, "run.batch_size=0"], "run.batch_size is 0, but must be 1 or more"),
        ([ROOT, "run.channels_last=1"], "run.channels_last is 1, but must be true or false"),
        ([ROOT, "run.precision=fp8"], "run.precision is 'fp8', but must be one of fp32, bf16, fp16"),
        ([ROOT, "views.query.scale=[0.2]"], "views.query.scale is [0.2], but must have 2 entries"),
        ([ROOT, "method=moko"], "method=moko does not exist"),
        ([ROOT, "optim.lr"], "override 'optim.lr' is not of the form key=value"),
        ([ROOT, "++run.extra=1"], "unknown setting 'run.extra'"),
        ([ROOT, "run.dir=${oc.env:HOME}"], "which fastssl does not accept"),
        ([ROOT, "+run._target_=os.system"], "which fastssl does not accept"),
        ([ROOT, "knn.k=null"], "knn.k is None, but must be a whole number"),
    ],
)
def test_a_wrong_setting_is_answered_by_one_sentence(overrides, sentence):
    with pytest.raises(ConfigError) as error:
        config.load(overrides)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("views.query.size=0", "views.size is 0"),
        ("views.query.crop=diagonal", "views.crop is 'diagonal'"),
        ("augment.jitter_p=1.5", "augment.jitter_p is 1.5, but must be a probability"),
        ("augment.hue=0.7", "augment.hue is 0.7"),
        (
            "++augment.blurr_p=1",
            "unknown setting 'views.query.augment.blurr_p' (did you mean 'views.query.augment.blur_p'?)",
        ),
    ],
)
def test_a_wrong_view_is_answered_by_one_sentence(override, sentence):
    with pytest.raises(ValueError) as error:
        config.load([ROOT, override]).view_specs()
    assert sentence in str(error.value)


def test_a_saved_configuration_reads_back_as_it_was():
    from omegaconf import OmegaConf

    cfg = config.load([ROOT, "optim=sgd_step", "optim.milestones=[1ep,2ep]"])
    again = config.convert(config.Config, OmegaConf.to_container(OmegaConf.create(config.to_yaml(cfg))))
    assert again == cfg
