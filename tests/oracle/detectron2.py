"""The names of detectron2's ResNet, typed from what its modules are called, each with torchvision's name for it."""

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def names(depth: int) -> dict[str, str]:
    """A convolution owns its norm (`conv1.norm`); a block has a `shortcut` where its width changes."""
    found = conv("stem.conv1", "conv1", "bn1")
    convs = 2 if depth < 50 else 3
    for stage, blocks in enumerate(BLOCKS[depth]):
        for block in range(blocks):
            theirs, ours = f"res{stage + 2}.{block}", f"layer{stage + 1}.{block}"
            for i in range(1, convs + 1):
                found |= conv(f"{theirs}.conv{i}", f"{ours}.conv{i}", f"{ours}.bn{i}")
            if block == 0 and (stage > 0 or convs == 3):
                found |= conv(f"{theirs}.shortcut", f"{ours}.downsample.0", f"{ours}.downsample.1")
    return found


def conv(theirs: str, ours: str, our_norm: str) -> dict[str, str]:
    norm = {f"{theirs}.norm.{key}": f"{our_norm}.{key}" for key in ("weight", "bias", "running_mean", "running_var")}
    return {f"{theirs}.weight": f"{ours}.weight", **norm}
