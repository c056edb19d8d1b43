"""The peer of recipe/cifar10_moco_v2_cpu: MoCo v2 as one writes it by hand, with Pillow views and a DataLoader.

    python bench/peers/plain_moco_cifar.py TRAIN_FOLDER TEST_FOLDER --minutes 8

Folders hold one sub-folder of images a class. Narrow ResNet-10 (32-64-128-256 channels, 3x3 stem), K 4096, m 0.99,
T 0.1, batch 256, SGD 0.06, bf16 and channels-last; the cosine runs over the time allowed, so that a slow machine is not
punished twice. Prints kNN top-1 (k 200, t 0.1, backbone features) before and after, and one JSON line.
It shares nothing with fastssl.
"""

import argparse
import copy
import json
import math
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models.resnet import BasicBlock

NORMALIZE = transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


class NarrowResNet10(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        blocks, channels = [], 32
        for wide, stride in ((32, 1), (64, 2), (128, 2), (256, 2)):
            shortcut = None
            if stride != 1:
                shortcut = nn.Sequential(nn.Conv2d(channels, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))
            blocks.append(BasicBlock(channels, wide, stride, shortcut))
            channels = wide
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        return self.blocks(self.stem(x)).mean((2, 3))


class TwoViews:
    def __init__(self, view):
        self.view = view

    def __call__(self, image):
        return self.view(image), self.view(image)


@torch.no_grad()
def knn_top1(backbone, train_folder, test_folder):
    def features(folder):
        data = ImageFolder(folder, transforms.Compose([transforms.ToTensor(), NORMALIZE]))
        rows, labels = [], []
        for x, y in DataLoader(data, 500, num_workers=2):
            with torch.autocast("cpu", torch.bfloat16):
                rows.append(F.normalize(backbone(x.contiguous(memory_format=torch.channels_last)).float()))
            labels.append(y)
        return torch.cat(rows), torch.cat(labels)

    backbone.eval()
    bank, bank_labels = features(train_folder)
    query, truth = features(test_folder)
    similarity, neighbour = (query @ bank.T).topk(200)
    votes = torch.zeros(len(query), 10).scatter_add_(1, bank_labels[neighbour], (similarity / 0.1).exp())
    backbone.train()
    return (votes.argmax(1) == truth).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_folder")
    parser.add_argument("test_folder")
    parser.add_argument("--minutes", type=float, default=8.0)
    args = parser.parse_args()
    torch.manual_seed(0)

    view = transforms.Compose(
        [
            transforms.RandomResizedCrop(32, (0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            transforms.RandomGrayscale(0.2),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            NORMALIZE,
        ]
    )
    loader = DataLoader(
        ImageFolder(args.train_folder, TwoViews(view)), 256, shuffle=True, drop_last=True, num_workers=2,
        persistent_workers=True,
    )  # fmt: skip
    backbone = NarrowResNet10()
    query = nn.Sequential(backbone, nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 128))
    query = query.to(memory_format=torch.channels_last)
    key = copy.deepcopy(query).requires_grad_(False)
    queue, place = F.normalize(torch.randn(4096, 128)), 0
    optimizer = torch.optim.SGD(query.parameters(), 0.06, momentum=0.9, weight_decay=5e-4)
    before = knn_top1(backbone, args.train_folder, args.test_folder)
    print(f"kNN top-1 before training {before:.4f}", flush=True)

    began, budget, steps = time.perf_counter(), args.minutes * 60, 0
    while time.perf_counter() - began < budget:
        for (x, y), _ in loader:
            progress = (time.perf_counter() - began) / budget
            if progress >= 1:
                break
            optimizer.param_groups[0]["lr"] = 0.06 * 0.5 * (1 + math.cos(math.pi * progress))
            x, y = (v.contiguous(memory_format=torch.channels_last) for v in (x, y))
            with torch.autocast("cpu", torch.bfloat16):
                q = F.normalize(query(x).float())
                with torch.no_grad():
                    for pk, pq in zip(key.parameters(), query.parameters()):
                        pk.mul_(0.99).add_(pq, alpha=0.01)
                    k = F.normalize(key(y).float())
            logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.clone().T], 1) / 0.1
            loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            queue[place : place + 256] = k
            place = (place + 256) % 4096
            steps += 1
            if steps % 50 == 0:
                print(f"step {steps}  loss {loss.item():.3f}  {time.perf_counter() - began:.0f} s", flush=True)
    trained_s = time.perf_counter() - began
    after = knn_top1(backbone, args.train_folder, args.test_folder)
    result = {"knn_before": before, "knn_after": after, "steps": steps, "seconds": trained_s}
    print(json.dumps({**result, "images_per_s": steps * 256 / trained_s}))


if __name__ == "__main__":
    main()
