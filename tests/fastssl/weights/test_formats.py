"""Exports: each is read by the project that it is for, by its own names, and then gives our features."""

import io
import pickle

import numpy as np
import pytest
import timm
import torch
import torchvision
import yaml
from safetensors.torch import save_file
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from fastssl.evaluate.subject import center_view
from fastssl.nn.encoder import build_encoder
from fastssl.settings import ConvConfig, EncoderConfig
from fastssl.weights import graphs, hub
from fastssl.weights.detectron2 import detectron2_configs, detectron2_file
from fastssl.weights.read import load_backbone
from fastssl.weights.source import Source, load
from fastssl.weights.state_dicts import detr_file, safetensors_file, torchvision_file
from tests.oracle import detectron2 as oracle

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def source(encoder, size=64):
    """An encoder whose batch norms have statistics of their own."""
    torch.manual_seed(1)
    arguments = {**vars(encoder), "conv": vars(encoder.conv) if encoder.conv else None}
    backbone = build_encoder(**arguments)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return Source(backbone.eval(), encoder, center_view(size, size + 10, MEAN, STD), "a test")


@pytest.fixture(scope="module")
def resnet18():
    return source(EncoderConfig("resnet18"))


@pytest.fixture(scope="module")
def resnet50():
    return source(EncoderConfig("resnet50"))


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def assert_same_features(theirs, ours, images):
    expected = ours(images)
    assert expected.std() > 0.01  # or equal features would prove little
    found = torch.as_tensor(theirs(images))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def loaded(content):
    return torch.load(io.BytesIO(content), weights_only=True)


def written(folder, files):
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18"])
def test_torchvision_takes_its_state_dict_up_to_fc(name, images):
    ours = source(EncoderConfig(name))
    theirs = torchvision.models.resnet18(weights=None).eval()
    missing, unexpected = theirs.load_state_dict(loaded(torchvision_file(ours)), strict=False)
    assert (sorted(missing), unexpected) == (["fc.bias", "fc.weight"], [])
    theirs.fc = nn.Identity()
    assert_same_features(theirs, ours.backbone, images)


def frozen_(module):
    """As DETR does to its torchvision backbone."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child.num_features))
        else:
            frozen_(child)
    return module


def test_detrs_frozen_resnet_takes_its_state_dict_up_to_fc(resnet50, images):
    theirs = frozen_(torchvision.models.resnet50(weights=None))
    missing, unexpected = theirs.load_state_dict(loaded(detr_file(resnet50)), strict=False)
    assert (sorted(missing), unexpected) == (["fc.bias", "fc.weight"], [])
    theirs.fc = nn.Identity()
    assert_same_features(theirs, resnet50.backbone, images)


@pytest.mark.filterwarnings("ignore")  # transformers' own deprecations
def test_the_backbone_of_transformers_detr_takes_exactly_its_state_dict(resnet50, images):
    transformers = pytest.importorskip("transformers")
    config = transformers.DetrConfig(encoder_layers=1, decoder_layers=1, d_model=32, encoder_ffn_dim=32,
                                     decoder_ffn_dim=32, num_queries=3)  # fmt: skip
    theirs = transformers.DetrForObjectDetection(config).eval()
    backbone = theirs.model.backbone.model
    missing, unexpected = backbone.load_state_dict(loaded(detr_file(resnet50)), strict=False)
    assert (missing, unexpected) == ([], [])
    assert_same_features(lambda x: backbone(x)[-1].mean((2, 3)), resnet50.backbone, images)
    assert theirs(images).pred_boxes.shape == (3, 3, 4)


CONV = ConvConfig(side=16, layers=((8, 3, 1), (8, 3, 2)), features=12, activation="prelu", squash=True)


@pytest.mark.parametrize(
    "encoder",
    [EncoderConfig("resnet10", "small", 0.5), EncoderConfig("resnet10", width=0.25, channels=5),
     EncoderConfig("timm/resnet10t"), EncoderConfig("conv", channels=4, conv=CONV)],
)  # fmt: skip
def test_safetensors_bring_any_encoder_back_without_being_told_which(encoder, tmp_path):
    ours = source(encoder)
    (tmp_path / "weights.safetensors").write_bytes(safetensors_file(ours))
    backbone, found, weights = load_backbone(tmp_path / "weights.safetensors")
    assert (found, weights.layout, weights.left_out) == (encoder, "fastssl", ())
    side = 16 if encoder.conv else 64
    assert_same_features(backbone, ours.backbone, torch.randn(2, encoder.channels, side, side))


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet10t"])
def test_timm_reads_its_folder_with_the_input_that_belongs_to_it(name, images, tmp_path):
    ours = source(EncoderConfig(name))
    folder = written(tmp_path, hub.timm_folder(ours))
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    assert_same_features(theirs, ours.backbone, images)
    data = timm.data.resolve_model_data_config(theirs)
    assert [tuple(data[key]) for key in ("input_size", "mean", "std")] == [(3, 64, 64), MEAN, STD]
    assert (data["interpolation"], data["crop_pct"]) == ("bilinear", 64 / 74)
    transform = timm.data.create_transform(**data, is_training=False)
    assert (transform.transforms[0].size, tuple(transform.transforms[1].size)) == (74, (64, 64))


def test_timm_puts_a_new_classifier_or_another_number_of_channels_on_it(resnet18, images, tmp_path):
    folder = written(tmp_path, hub.timm_folder(resnet18))
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).num_classes == 0
    classifier = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7).eval()
    assert classifier(images).shape == (3, 7)
    assert torch.equal(classifier.layer4[1].conv2.weight, resnet18.backbone.layer4[1].conv2.weight)
    gray = timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=1, num_classes=0)
    torch.testing.assert_close(gray.conv1.weight, resnet18.backbone.conv1.weight.sum(1, keepdim=True))


def test_the_hub_folder_is_timms_and_a_card(resnet18, images, tmp_path):
    files = hub.huggingface_folder(resnet18)
    assert set(files) == {"model.safetensors", "config.json", "README.md"}
    theirs = timm.create_model(f"local-dir:{written(tmp_path, files)}", pretrained=True, num_classes=0).eval()
    assert_same_features(theirs, resnet18.backbone, images)
    _, head, text = files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "timm", "pipeline_tag": "image-feature-extraction",
        "tags": ["image-feature-extraction", "timm", "self-supervised"],
    }  # fmt: skip
    assert "exported by fastssl" in text
    assert "| mean | 0.4, 0.5, 0.6 |" in text


@pytest.mark.filterwarnings("ignore")  # transformers' own deprecations
def test_transformers_reads_the_hub_folder_as_a_model_of_timm(resnet18, images, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = written(tmp_path, hub.huggingface_folder(resnet18))
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    assert_same_features(lambda x: theirs(x).pooler_output.flatten(1), resnet18.backbone, images)


@pytest.mark.parametrize("depth", [18, 50])
def test_detectron2_finds_the_names_that_its_resnet_has_and_our_values(depth, images):
    ours = source(EncoderConfig(f"resnet{depth}"))
    content = pickle.loads(detectron2_file(ours))
    assert {key: content[key] for key in content if key != "model"} == {
        "__author__": "fastssl", "matching_heuristics": True,
    }  # fmt: skip
    expected = oracle.names(depth)
    assert set(content["model"]) == set(expected)
    assert {type(value) for value in content["model"].values()} == {np.ndarray}
    assert {value.dtype for value in content["model"].values()} == {np.dtype("float32")}
    back = {expected[name]: torch.from_numpy(value) for name, value in content["model"].items()}
    theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None).eval()
    missing, unexpected = theirs.load_state_dict(back, strict=False)
    assert unexpected == []
    assert {key for key in missing if not key.endswith("num_batches_tracked")} == {"fc.weight", "fc.bias"}
    theirs.fc = nn.Identity()
    assert_same_features(theirs, ours.backbone, images)


def test_a_resnet_50_is_265_tensors_to_detectron2_and_detr(resnet50):
    assert len(pickle.loads(detectron2_file(resnet50))["model"]) == 265
    assert len(loaded(detr_file(resnet50))) == 265
    assert len(loaded(torchvision_file(resnet50))) == 318


def test_the_configs_for_detectron2_hold_the_published_values(resnet50):
    configs = {name: yaml.safe_load(text) for name, text in detectron2_configs(resnet50, "moco.pkl").items()}
    voc, coco = configs["voc"], configs["coco"]
    for config in (voc, coco):
        model = config["MODEL"]
        assert model["WEIGHTS"] == "moco.pkl"
        assert model["RESNETS"] == {"DEPTH": 50, "NORM": "SyncBN", "STRIDE_IN_1X1": False}
        assert model["BACKBONE"] == {"FREEZE_AT": 0}
        assert model["RPN"] == {"PRE_NMS_TOPK_TEST": 6000, "POST_NMS_TOPK_TEST": 1000}
        assert model["ROI_HEADS"]["NAME"] == "Res5ROIHeadsExtraNorm"
        assert model["PIXEL_MEAN"] == [102.0, 127.5, 153.0]
        assert model["PIXEL_STD"] == [51.0, 63.75, 76.5]
        assert config["INPUT"]["FORMAT"] == "RGB"
        assert config["INPUT"]["MIN_SIZE_TEST"] == 800
        assert config["TEST"] == {"PRECISE_BN": {"ENABLED": True}}
        assert (config["SOLVER"]["IMS_PER_BATCH"], config["SOLVER"]["BASE_LR"]) == (16, 0.02)
    assert voc["DATASETS"] == {"TRAIN": ["voc_2007_trainval", "voc_2012_trainval"], "TEST": ["voc_2007_test"]}
    assert voc["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 20
    assert (voc["MODEL"]["MASK_ON"], coco["MODEL"]["MASK_ON"]) == (False, True)
    solver = voc["SOLVER"]
    assert (solver["STEPS"], solver["MAX_ITER"], solver["WARMUP_ITERS"]) == ([18000, 22000], 24000, 100)
    assert (coco["SOLVER"]["STEPS"], coco["SOLVER"]["MAX_ITER"]) == ([120000, 160000], 180000)
    assert voc["INPUT"]["MIN_SIZE_TRAIN"] == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    assert coco["INPUT"]["MIN_SIZE_TRAIN"] == [640, 672, 704, 736, 768, 800]


GRAPHS = [EncoderConfig("resnet10", "cifar", 0.25), EncoderConfig("conv", channels=4, conv=CONV)]


@pytest.mark.parametrize("encoder", GRAPHS)
@pytest.mark.parametrize("batch", [1, 5])
def test_an_exported_program_gives_our_features_for_any_number_of_images(encoder, batch):
    ours = source(encoder, 16)
    program = torch.export.load(io.BytesIO(graphs.torch_export_file(ours))).module()
    assert_same_features(program, ours.backbone, torch.randn(batch, encoder.channels, 16, 16))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of onnxscript
@pytest.mark.parametrize("encoder", GRAPHS)
def test_onnxruntime_gives_our_features_for_any_number_of_images(encoder):
    onnxruntime = pytest.importorskip("onnxruntime")
    ours = source(encoder, 16)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graphs.onnx_file(ours), options)
    for batch in (1, 5):
        images = torch.randn(batch, encoder.channels, 16, 16)
        assert_same_features(lambda x: session.run(["features"], {"images": x.numpy()})[0], ours.backbone, images)


ANY = r"; export it as safetensors, torch-export or onnx"
UNFIT = [
    (torchvision_file, EncoderConfig("conv", channels=4, conv=CONV), r"format torchvision holds .* is conv with 4 ch"),
    (torchvision_file, EncoderConfig("resnet10", "cifar"), "is resnet10 with a cifar stem"),
    (detr_file, EncoderConfig("resnet10"), "format detr holds resnet18, .* is resnet10"),
    (detr_file, EncoderConfig("resnet18", channels=5), "is resnet18 with 5 channels"),
    (detectron2_file, EncoderConfig("resnet18", "cifar"), "format detectron2 holds .* is resnet18 with a cifar stem"),
    (detectron2_file, EncoderConfig("resnet18", width=0.5), "with width 0.5"),
    (hub.timm_folder, EncoderConfig("resnet10"), "format timm holds .* is resnet10"),
    (hub.timm_folder, EncoderConfig("timm/resnet10t", channels=5), "is timm/resnet10t with 5 channels"),
]


@pytest.mark.parametrize(("export", "encoder", "sentence"), UNFIT)
def test_what_a_format_cannot_express_is_refused_in_a_sentence(export, encoder, sentence):
    with pytest.raises(ValueError, match=sentence + ".*" + ANY) as refused:
        export(source(encoder))
    assert "\n" not in str(refused.value)


def test_basic_blocks_have_no_c4_config(resnet18):
    with pytest.raises(ValueError, match="format detectron2 --with-config holds resnet50, resnet101, resnet152"):
        detectron2_configs(resnet18, "x.pkl")


def test_a_file_that_was_exported_from_a_foreign_one_is_the_foreign_one(tmp_path, images):
    theirs = torchvision.models.resnet18(weights=None).eval()
    save_file({f"backbone.{key}": value for key, value in theirs.state_dict().items()}, tmp_path / "in.safetensors")
    ours = load(tmp_path / "in.safetensors")
    assert ours.view.size == 224
    theirs.fc = nn.Identity()
    again = torchvision.models.resnet18(weights=None).eval()
    again.load_state_dict(loaded(torchvision_file(ours)), strict=False)
    again.fc = nn.Identity()
    assert_same_features(again, theirs, images)
