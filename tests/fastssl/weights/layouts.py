"""State dicts in the layouts that projects publish, typed from their training code.

Each tensor is one number of its own, expanded to the published shape, so that a ResNet-50 takes little on disk.
"""

from __future__ import annotations

from itertools import count

import torch
import torchvision
from torch import Tensor


def trunk(name: str = "resnet50") -> dict[str, Tensor]:
    """torchvision's own names and shapes without fc, floats 1, 2, 3, ... in their order, counters int64."""
    with torch.device("meta"):
        shapes = getattr(torchvision.models, name)(weights=None).state_dict()
    return numbered({key: tuple(value.shape) for key, value in shapes.items() if not key.startswith("fc.")})


def numbered(shapes: dict[str, tuple[int, ...]], start: int = 1) -> dict[str, Tensor]:
    numbers = count(start)
    return {
        key: torch.tensor(next(numbers), dtype=torch.int64 if key.endswith("num_batches_tracked") else torch.float32)
        .expand(shape)
        for key, shape in shapes.items()
    }  # fmt: skip


def others(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the same names and shapes that must not be taken for these."""
    return numbered({key: tuple(value.shape) for key, value in tensors.items()}, 5000)


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


MLP = {"fc.0.weight": (2048, 2048), "fc.0.bias": (2048,), "fc.2.weight": (128, 2048), "fc.2.bias": (128,)}
LINEAR = {"fc.weight": (128, 2048), "fc.bias": (128,)}
SWAV_HEAD = {
    "projection_head.0.weight": (2048, 2048), "projection_head.0.bias": (2048,),
    "projection_head.1.weight": (2048,), "projection_head.1.bias": (2048,),
    "projection_head.1.running_mean": (2048,), "projection_head.1.running_var": (2048,),
    "projection_head.1.num_batches_tracked": (),
    "projection_head.3.weight": (128, 2048), "projection_head.3.bias": (128,),
}  # fmt: skip


def moco(head: dict[str, tuple[int, ...]] = MLP, queue: int = 65536) -> dict:
    """main_moco.py: what a training run saves."""
    state = {
        **under("module.encoder_q.", trunk() | numbered(head, 9000)),
        **under("module.encoder_k.", others(trunk()) | numbered(head, 9100)),
        "module.queue": torch.zeros(()).expand(128, queue),
        "module.queue_ptr": torch.zeros(1, dtype=torch.int64),
    }
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.03, "params": [0]}]}
    return {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": optimizer}


def moco_released() -> dict:
    """moco_v2_200ep_pretrain.pth.tar: only the query encoder is left."""
    return {"epoch": 200, "arch": "resnet50", "state_dict": under("module.encoder_q.", trunk() | numbered(MLP, 9000))}


def clsa() -> dict:
    return moco() | {"best_acc": torch.tensor([61.2])}


def swav_released() -> dict[str, Tensor]:
    """swav_800ep_pretrain.pth.tar: flat."""
    return under("module.", trunk() | numbered({**SWAV_HEAD, "prototypes.weight": (3000, 128)}, 9000))


def swav_checkpoint() -> dict:
    return {"epoch": 100, "state_dict": swav_released(), "optimizer": {"state": {}, "param_groups": []}, "amp": {}}


def deepcluster_released() -> dict[str, Tensor]:
    """Three sets of prototypes."""
    prototypes = {f"prototypes.prototypes{i}.weight": (3000, 128) for i in range(3)}
    return under("module.", trunk() | numbered({**SWAV_HEAD, **prototypes}, 9000))


def vissl() -> dict:
    model = {"trunk": under("_feature_blocks.", trunk()), "heads": {"0.clf.0.weight": torch.zeros(128, 2048)}}
    classy = {"base_model": {"model": model, "loss": {}}, "optimizer": {}, "phase_idx": 3}
    return {"phase_idx": 3, "iteration": 100, "classy_state_dict": classy}


def solo_learn() -> dict:
    state = {
        **under("backbone.", trunk("resnet18")),
        **under("momentum_backbone.", others(trunk("resnet18"))),
        **numbered({"classifier.weight": (10, 512), "projector.0.weight": (2048, 512)}, 9000),
        "queue": torch.zeros(2, 256, 4),
    }
    return {"epoch": 9, "global_step": 100, "pytorch-lightning_version": "1.6.4", "state_dict": state}


def lightly() -> dict:
    """Its examples: nn.Sequential(*list(resnet18().children())[:-1])."""
    numbers = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    state = {"backbone." + by_position(key, numbers): value for key, value in trunk("resnet18").items()}
    state |= numbered(
        {"projection_head.layers.0.weight": (512, 512), "backbone_momentum.0.weight": (64, 3, 7, 7)}, 9000
    )
    return {"epoch": 9, "state_dict": state}


def cifar_trunk() -> dict[str, Tensor]:
    return trunk("resnet18") | {"conv1.weight": torch.tensor(1.0).expand(64, 3, 3, 3)}


def moco_cifar() -> dict:
    """MoCo's CIFAR notebook and Un-Mix: children of a ResNet-18 without its max-pool, a Flatten before fc."""
    numbers = {"conv1": "0", "bn1": "1", "layer1": "3", "layer2": "4", "layer3": "5", "layer4": "6"}
    own = {by_position(key, numbers): value for key, value in cifar_trunk().items()}
    own |= numbered({"9.weight": (128, 512), "9.bias": (128,)}, 9000)
    state = {
        **under("encoder_q.net.", own),
        **under("encoder_k.net.", others(own)),
        "queue": torch.zeros(128, 4096),
        "queue_ptr": torch.zeros(1, dtype=torch.int64),
    }
    return {"epoch": 1000, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


def lightly_cifar() -> dict:
    """lightly's own ResNet for CIFAR: no ReLU or pooling among the children, `shortcut` for `downsample`."""
    numbers = {"conv1": "0", "bn1": "1", "layer1": "2", "layer2": "3", "layer3": "4", "layer4": "5"}
    own = {by_position(key, numbers).replace("downsample", "shortcut"): v for key, v in cifar_trunk().items()}
    return {"state_dict": under("backbone.", own) | numbered({"projection_head.layers.0.weight": (512, 512)}, 9000)}


def torchvision_released() -> dict[str, Tensor]:
    return trunk("resnet18") | numbered({"fc.weight": (1000, 512), "fc.bias": (1000,)}, 9000)


def by_position(key: str, numbers: dict[str, str]) -> str:
    head, _, rest = key.partition(".")
    return f"{numbers[head]}.{rest}"


LAYOUTS = {
    "MoCo v1 checkpoint": (lambda: moco(LINEAR), "resnet50", "MoCo, state_dict > module.encoder_q.*"),
    "MoCo v2 checkpoint": (moco, "resnet50", "MoCo, state_dict > module.encoder_q.*"),
    "MoCo v2 released": (moco_released, "resnet50", "MoCo, state_dict > module.encoder_q.*"),
    "CLSA checkpoint": (clsa, "resnet50", "MoCo, state_dict > module.encoder_q.*"),
    "MoCo and Un-Mix on CIFAR": (moco_cifar, "cifar", "MoCo, state_dict > encoder_q.net.*"),
    "SwAV released": (swav_released, "resnet50", "SwAV, module.*"),
    "SwAV checkpoint": (swav_checkpoint, "resnet50", "SwAV, state_dict > module.*"),
    "DeepCluster-v2 released": (deepcluster_released, "resnet50", "SwAV, module.*"),
    "VISSL": (
        vissl, "resnet50", "VISSL, classy_state_dict > base_model > model > trunk > _feature_blocks.*"
    ),
    "solo-learn": (solo_learn, "resnet18", "solo-learn or lightly, state_dict > backbone.*"),
    "lightly": (lightly, "resnet18", "solo-learn or lightly, state_dict > backbone.*"),
    "lightly on CIFAR": (lightly_cifar, "cifar", "solo-learn or lightly, state_dict > backbone.*"),
    "torchvision or timm": (torchvision_released, "resnet18", "torchvision or timm, *"),
    "under a name": (lambda: {"model": torchvision_released()}, "resnet18", "torchvision or timm, model > *"),
}  # fmt: skip
