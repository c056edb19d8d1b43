"""MoCo with a decoder: the loss against NumPy, whole steps against a second statement, and the published networks."""

import collections
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastssl import config
from fastssl.methods import RunFacts, build_method
from fastssl.methods.moco_decoder import reconstruction_error
from fastssl.nn.conv_autoencoder import ConvDecoder, ConvEncoder, Squash
from fastssl.nn.encoder import build_encoder
from tests.oracle import reconstruction

ENCODER_4 = [(128, 7, 1), (256, 3, 2), (512, 3, 1), (1024, 3, 2), (512, 3, 1), (256, 3, 1), (128, 3, 1)]
DECODER_4 = [(256, 3, 1), (512, 3, 1), (1024, 3, 1), (512, 3, 2), (256, 3, 1), (128, 3, 2)]
TINY_DECODER = {"channels": 2, "start": [3, 4], "layers": [[4, 3, 1], [3, 3, 2]], "last_kernel": 3}


class TinyEncoder(nn.Module):
    num_features = 5

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.project = nn.Conv2d(2, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, x):
        return self.project(F.relu(self.bn(self.conv(x))).mean((2, 3)))


def build(name="moco_decoder", weight=1, **settings):
    torch.manual_seed(3)
    base = {"name": name, "dim": 5, "head": "none", "decoder": TINY_DECODER}
    roles = {"query": 1, "weight": weight}
    if name == "moco_decoder":
        base |= {"queue_length": 11, "momentum": 0.9, "batch_norm": "plain", "reconstruction_weight": 50.0}
        roles["key"] = 1
    method = build_method({**base, **settings}, TinyEncoder(), RunFacts(roles))
    return method.double()


def views(step, batch=4, weight=True):
    generator = torch.Generator().manual_seed(step)
    made = {r: [torch.rand(batch, 2, 8, 8, generator=generator, dtype=torch.float64)] for r in ("query", "key")}
    return made | ({"weight": [(made["query"][0] > 0.4).double()]} if weight else {})


@pytest.mark.parametrize("per", ["elements", "weights"])
@pytest.mark.parametrize("empty_weight", [0.0, 0.25, 1.0])
def test_the_reconstruction_error_and_its_gradient_are_the_formulas(rng, per, empty_weight):
    drawn, target = rng.normal(size=(3, 2, 4, 4)), rng.normal(size=(3, 2, 4, 4))
    weight = (rng.random((3, 2, 4, 4)) > 0.5).astype(float)
    x = torch.from_numpy(drawn).requires_grad_()
    error = reconstruction_error(x, torch.from_numpy(target), torch.from_numpy(weight), empty_weight, per)
    error.backward()
    np.testing.assert_allclose(error.item(), reconstruction.error(drawn, target, weight, empty_weight, per), rtol=1e-12)
    np.testing.assert_allclose(
        x.grad.numpy(), reconstruction.error_gradient(drawn, target, weight, empty_weight, per), rtol=1e-12
    )


def test_without_weights_the_error_is_the_mean_square():
    x, t = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    torch.testing.assert_close(reconstruction_error(x, t, None, 0.0, "elements"), F.mse_loss(x, t))


def test_half_precision_drawings_are_compared_in_float32():
    drawn = torch.full((1, 1, 2, 2), 300.0, dtype=torch.float16)
    error = reconstruction_error(drawn, torch.zeros(1, 1, 2, 2), None, 0.0, "elements")
    assert (error.dtype, error.item()) == (torch.float32, 90000.0)  # beyond float16


def test_squash_has_its_published_value_and_survives_zero():
    squash = Squash()
    torch.testing.assert_close(squash(torch.tensor([[3.0, 4.0]])), torch.tensor([[0.576923, 0.769231]]))
    v = np.array([0.3, -1.2, 2.0])
    np.testing.assert_allclose(squash(torch.from_numpy(v)[None])[0], reconstruction.squash(v), rtol=1e-12)
    zero = torch.zeros(1, 3, requires_grad=True)
    squash(zero).sum().backward()
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize("weight", [0, 1])
def test_five_steps_equal_the_published_order_of_events(weight):
    """Query, decoder, EMA, key, contrast and masked error, enqueue, backward.

    SGD, because Adam would make steps of full length out of the rounding noise that is the gradient of a bias before a
    batch norm.
    """
    method = build(weight=weight, temperature=0.1, empty_weight=0.1)
    q, k, decoder = (copy.deepcopy(m) for m in (method.encoder_q, method.encoder_k, method.decoder))
    queue, place = collections.deque(method.queue.clone(), maxlen=11), 0
    theirs = torch.optim.SGD([*q.parameters(), *decoder.parameters()], lr=1e-3)
    ours = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=1e-3)
    for step in range(5):
        given = views(step, weight=bool(weight))
        method.before_step(step)
        output = method(given, step)
        ours.zero_grad()
        output.loss.backward()
        ours.step()
        method.after_step(output)

        image = given["query"][0]
        code = q(image)
        drawn = decoder(code)
        with torch.no_grad():
            for pk, pq in zip(k.parameters(), q.parameters()):
                pk.copy_(0.9 * pk + 0.1 * pq)
            key = k(given["key"][0])
            key = key / key.norm(dim=1, keepdim=True)
        unit = code / code.norm(dim=1, keepdim=True)
        logits = torch.cat([(unit * key).sum(1, keepdim=True), unit @ torch.stack(list(queue)).T], 1) / 0.1
        square = (drawn - image) ** 2
        if weight:
            square[given["weight"][0] == 0] *= 0.1
        loss = F.cross_entropy(logits, torch.zeros(4, dtype=torch.long)) + 50 * square.mean()
        for row in key:
            queue[place % 11] = row
            place += 1
        theirs.zero_grad()
        loss.backward()
        theirs.step()
    torch.testing.assert_close(output.loss, loss, rtol=0, atol=1e-9)
    for mine, expected in ((method.encoder_q, q), (method.encoder_k, k), (method.decoder, decoder)):
        for (name, a), b in zip(mine.state_dict().items(), expected.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=name)
    torch.testing.assert_close(method.queue, torch.stack(list(queue)), rtol=0, atol=1e-9)


def test_the_autoencoder_is_the_joint_method_without_the_contrast():
    joint, alone = build(contrast_weight=0.0, reconstruction_weight=1.0), build("autoencoder")
    alone.encoder.load_state_dict(joint.encoder_q.state_dict())
    alone.decoder.load_state_dict(joint.decoder.state_dict())
    given = views(0)
    a, b = joint(given, 0).loss, alone({r: v for r, v in given.items() if r != "key"}, 0).loss
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    a.backward()
    b.backward()
    for p, r in zip(joint.decoder.parameters(), alone.decoder.parameters()):
        torch.testing.assert_close(p.grad, r.grad, rtol=0, atol=1e-12)


def test_empty_pixels_do_not_pull_when_their_weight_is_zero():
    method = build()
    given = views(0)
    other = {**given, "query": [given["query"][0].clone()]}
    decoder_input = method.encoder_q(given["query"][0]).detach()
    drawn = method.decoder(decoder_input)
    empty = given["weight"][0] == 0
    other["query"][0][empty] += 100.0
    errors = [
        reconstruction_error(drawn, v["query"][0], given["weight"][0], 0.0, "elements").item() for v in (given, other)
    ]
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    ("layers", "activation", "parameters"),
    [
        ([(8, 3, 1), (16, 3, 2), (32, 3, 2), (64, 3, 1), (128, 3, 1)], "relu", 16_876_368),
        (ENCODER_4, "prelu", 29_203_463),
    ],
)
def test_published_encoders_have_their_number_of_parameters(layers, activation, parameters):
    with torch.device("meta"):
        encoder = ConvEncoder(5, 128, layers, 128, activation, squash=True)
    assert sum(p.numel() for p in encoder.parameters()) == parameters


def test_the_published_decoder_has_its_number_of_parameters():
    with torch.device("meta"):
        decoder = ConvDecoder(128, 5, (128, 32), DECODER_4, last_kernel=7)
        drawn = decoder(torch.empty(2, 128))
    assert sum(p.numel() for p in decoder.parameters()) == 29_334_028
    assert drawn.shape == (2, 5, 128, 128)


@pytest.mark.parametrize("enlarge", ["nearest", "transposed"])
def test_both_ways_of_enlarging_end_at_the_same_size(enlarge):
    decoder = ConvDecoder(4, 2, (3, 4), [(4, 3, 2), (3, 3, 2)], enlarge=enlarge, batch_norm=False, output="sigmoid")
    drawn = decoder(torch.randn(2, 4))
    assert drawn.shape == (2, 2, 16, 16)
    assert decoder.side == 16
    assert 0 <= drawn.min() <= drawn.max() <= 1


def test_encoders_take_any_number_of_bands():
    for name, stem in (("resnet10", "small"), ("resnet18", "imagenet")):
        encoder = build_encoder(name, stem, 0.25, channels=5).eval()
        assert encoder(torch.randn(2, 5, 32, 32)).shape == (2, encoder.num_features)
    conv = {"side": 16, "layers": ((4, 3, 2), (6, 3, 2)), "features": 7, "activation": "relu", "squash": True}
    assert build_encoder("conv", channels=5, conv=conv)(torch.randn(2, 5, 16, 16)).shape == (2, 7)


def test_a_decoder_that_ends_at_another_size_is_named():
    method = build(decoder={**TINY_DECODER, "layers": [[4, 3, 1]]})
    with pytest.raises(ValueError, match=r"method\.decoder draws \(2, 4, 4\), but the query view is \(2, 8, 8\)"):
        method(views(0), 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"empty_weight": 1.5}, "method.empty_weight is 1.5"),
        ({"contrast_weight": -1.0}, "method.contrast_weight is -1.0"),
        ({"reconstruction_weight": -1.0}, "method.reconstruction_weight is -1.0"),
        ({"dim": 6}, "method.dim is 6, but with method.head none it must be the encoder's 5 features"),
        ({"decoder": {**TINY_DECODER, "kernel": 3}}, "unknown setting 'method.decoder.kernel'"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        build(**settings)


def test_a_conv_encoder_without_layers_is_refused():
    with pytest.raises(config.ConfigError, match=r"encoder\.conv"):
        config.load(["encoder.name=conv", "encoder.conv=5", "data.root=x"])
    with pytest.raises(ValueError, match=r"encoder\.name is 'conv' and encoder\.conv None"):
        build_encoder("conv")
