"""Published layouts: every tensor of the backbone arrives under its name, and what does not fit is refused by name."""

import argparse

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from fastssl.nn.encoder import RESNETS, build_encoder
from fastssl.settings import EncoderConfig
from fastssl.weights.read import WeightsError, left_out, load_backbone, read
from tests.fastssl.weights import layouts


def saved(tmp_path, content, name="weights.pth.tar", **how):
    torch.save(content, tmp_path / name, **how)
    return tmp_path / name


def one_number(tensor):
    low, high = tensor.aminmax()
    assert low == high
    return low.item()


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_every_tensor_of_a_published_layout_arrives_and_nothing_else(layout, tmp_path):
    make, name, described = layouts.LAYOUTS[layout]
    path = saved(tmp_path, make())
    weights = read(path)
    expected = layouts.cifar_trunk() if name == "cifar" else layouts.trunk(name)
    assert {key: one_number(value) for key, value in weights.tensors.items()} == {
        key: one_number(value) for key, value in expected.items()
    }
    assert {key: value.shape for key, value in weights.tensors.items()} == {k: v.shape for k, v in expected.items()}
    assert weights.layout == described
    stem = "cifar" if name == "cifar" else "imagenet"
    assert weights.encoder == EncoderConfig("resnet18" if name == "cifar" else name, stem)


@pytest.mark.parametrize("how", [{}, {"_use_new_zipfile_serialization": False}])
def test_files_of_old_and_new_torch_give_the_network_that_was_saved(how, tmp_path):
    theirs = torchvision.models.resnet18(weights=None).eval()
    wrapped = {"epoch": 3, "state_dict": {f"module.encoder_q.{k}": v for k, v in theirs.state_dict().items()}}
    backbone, encoder, _ = load_backbone(saved(tmp_path, wrapped, **how))
    theirs.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(backbone(x), theirs(x))
    assert encoder == EncoderConfig("resnet18")
    assert not backbone.training


def test_what_is_left_out_is_named(tmp_path):
    weights = read(saved(tmp_path, layouts.moco()))
    assert left_out(weights) == "encoder_k (322), encoder_q.fc (4), queue (1), queue_ptr (1)"
    assert "module.encoder_q.fc.2.bias" in weights.left_out
    assert left_out(read(saved(tmp_path, layouts.swav_released()))) == "projection_head (9), prototypes (1)"


def test_a_prefix_is_stripped_from_the_front_only(tmp_path):
    inner = timm.create_model("resnet18", num_classes=0)
    encoder = EncoderConfig("timm/resnet18")
    state = inner.state_dict()
    path = saved(tmp_path, {f"module.module.{key}": value for key, value in state.items()})
    assert load_backbone(path, encoder)[0].state_dict().keys() == state.keys()
    # `encoder_q.` in the middle of a key is part of a name
    misleading = {f"module.{key}": value for key, value in state.items()} | {"module.x.encoder_q.y": torch.zeros(1)}
    weights = read(saved(tmp_path, misleading))
    assert len(weights.tensors) == len(state)
    assert weights.left_out == ("module.x.encoder_q.y",)


def test_halves_become_float32_and_counters_stay_integers(tmp_path):
    halves = {key: value.half() if value.is_floating_point() else value for key, value in layouts.trunk().items()}
    weights = read(saved(tmp_path, halves))
    assert {value.dtype for key, value in weights.tensors.items() if "num_batches" not in key} == {torch.float32}
    assert {value.dtype for key, value in weights.tensors.items() if "num_batches" in key} == {torch.int64}


def test_counters_may_be_missing(tmp_path):
    state = {key: value for key, value in layouts.trunk("resnet18").items() if "num_batches_tracked" not in key}
    state = {key: value.contiguous() for key, value in state.items()}
    backbone, _, _ = load_backbone(saved(tmp_path, state))
    assert one_number(backbone.layer4[1].bn2.running_var) == one_number(state["layer4.1.bn2.running_var"])


@pytest.mark.parametrize("name", [name for name in RESNETS if name not in ("resnet10", "resnet26")])
def test_the_architecture_is_seen_in_the_keys(name, tmp_path):
    assert read(saved(tmp_path, layouts.trunk(name))).encoder == EncoderConfig(name)


OTHERS = [
    EncoderConfig("resnet50", width=2.0), EncoderConfig("resnet50", width=4.0),
    EncoderConfig("resnet10", "cifar", 0.5), EncoderConfig("resnet18", channels=5),
]  # fmt: skip


@pytest.mark.parametrize("encoder", OTHERS)
def test_width_stem_and_channels_are_seen_in_the_shapes(encoder, tmp_path):
    with torch.device("meta"):
        shapes = build_encoder(encoder.name, encoder.stem, encoder.width, encoder.channels).state_dict()
    state = layouts.numbered({key: tuple(value.shape) for key, value in shapes.items()})
    assert read(saved(tmp_path, state)).encoder == encoder


def test_timm_models_are_read_when_they_are_named(tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=1)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"show no ResNet; name its encoder, such as timm/"):
        load_backbone(tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"does not fit encoder timm/vit_tiny_patch16_224: it lacks blocks\.1\."):
        load_backbone(tmp_path / "model.safetensors", EncoderConfig("timm/vit_tiny_patch16_224"))
    resnet = timm.create_model("resnet10t", num_classes=10).eval()
    save_file(resnet.state_dict(), tmp_path / "resnet.safetensors")
    backbone, _, weights = load_backbone(tmp_path / "resnet.safetensors", EncoderConfig("timm/resnet10t"))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(backbone(x), resnet.forward_head(resnet.forward_features(x), pre_logits=True))
    assert weights.left_out == ("fc.bias", "fc.weight")


def test_the_stride_of_a_3x3_stem_is_the_users_to_say(tmp_path):
    whole = {key: value.contiguous() for key, value in layouts.cifar_trunk().items()}
    path = saved(tmp_path, whole)
    assert load_backbone(path)[1].stem == "cifar"
    assert load_backbone(path, EncoderConfig("resnet18", "small"))[1].stem == "small"


def test_what_a_file_cannot_tell_is_said(tmp_path):
    solo = {f"backbone.{key}": value for key, value in layouts.cifar_trunk().items()}
    assert "solo-learn pads its 3x3 stem by 2 px" in read(saved(tmp_path, solo)).caution
    for other in (layouts.lightly_cifar(), layouts.moco_cifar(), layouts.solo_learn()):
        assert read(saved(tmp_path, other)).caution == ""


def wrong_shape():
    return layouts.trunk("resnet18") | {"layer3.0.conv2.weight": torch.zeros(256, 128, 3, 3)}


def without(state, prefix):
    return {key: value for key, value in state.items() if not key.startswith(prefix)}


def pickled():
    return {"args": argparse.Namespace(lr=1), "state_dict": layouts.trunk("resnet18")}


FAULTS = {
    "another shape": (
        wrong_shape, None, r"layer3\.0\.conv2\.weight is 256x128x3x3 in the file and 256x256x3x3 in the encoder; name",
    ),
    "missing tensors": (
        lambda: without(layouts.trunk("resnet18"), "layer2.0.bn1."), None,
        r"lacks layer2\.0\.bn1\.weight, layer2\.0\.bn1\.bias, layer2\.0\.bn1\.running_mean, .*_var; name the encoder",
    ),
    "tensors inside the trunk that do not belong": (
        lambda: layouts.trunk("resnet18") | {"layer1.0.se.weight": torch.zeros(2)}, None, r"it also has layer1\.0\.se",
    ),
    "another encoder": (
        layouts.moco, EncoderConfig("resnet18"), r"holds resnet50, but the encoder is resnet18; leave encoder out"
    ),
    "another stem": (
        layouts.solo_learn, EncoderConfig("resnet18", "cifar"), r"but the encoder is resnet18 with a cifar stem"
    ),
    "another width": (
        layouts.moco, EncoderConfig("resnet50", width=2.0), r"but the encoder is resnet50 with width 2"
    ),
    "no known depth": (lambda: without(layouts.trunk("resnet18"), "layer4"), None, "show no ResNet"),
    "a wide ResNet, whose width is inside the blocks": (
        lambda: layouts.trunk("wide_resnet50_2"), None, r"layer1\.0\.conv1\.weight is 128x64x1x1 in the file and 64x64x"
    ),
    "only a linear head": (
        lambda: {"state_dict": {"module.linear.weight": torch.zeros(9, 512)}}, EncoderConfig("resnet18"), "lacks conv1"
    ),
    "no tensors": (lambda: {"epoch": 3, "weights": [1]}, None, r"at its top are 'epoch', 'weights'; save the model's"),
    "a bare tensor": (lambda: torch.zeros(3), None, "holds a Tensor instead of tensors by name"),
    "a pickled object": (
        pickled, None, r"Python objects \(argparse\.Namespace\), which are not loaded.*python -c \"import torch; f = "
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_does_not_fit_is_refused_in_one_sentence(fault, tmp_path):
    content, encoder, sentence = FAULTS[fault]
    path = saved(tmp_path, content())
    with pytest.raises(WeightsError, match=sentence) as refused:
        load_backbone(path, encoder)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04cut off"])
def test_a_damaged_file_is_refused_in_one_sentence(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=r"is damaged or not a .*file.*; fetch it again"):
        read(tmp_path / name)


def test_a_pickle_is_not_opened(tmp_path):
    (tmp_path / "model.pkl").write_bytes(b"cos\nsystem\n")
    with pytest.raises(WeightsError, match="is a pickle, which can run code when read"):
        read(tmp_path / "model.pkl")


def test_no_file_is_said(tmp_path):
    with pytest.raises(WeightsError, match=r"there is no file .*nothing\.pth"):
        read(tmp_path / "nothing.pth")
