"""encoders.py: what an encoder must not depend on, its gradient against a plain one, crops, one encoding per observation."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from encoders import Encoder, ImageEncoder, PointEncoder, SpatialSoftmax, kind, resnet18
from policy import Policy, PolicyConfig

IMAGE = {"network": "cnn", "pooling": "spatial_softmax", "crop": 0.8, "shared": False, "dim": 8}
CLOUD = {"widths": (16, 32), "dim": 8}


def pictures(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_kinds():
    assert kind((96, 96, 3)) == "image"
    assert kind((512, 3)) == kind((512, 6)) == "cloud"
    assert kind((20,)) == kind((9, 2)) == "state"


# --- images -------------------------------------------------------------------------------------------------------------


def test_the_crop_is_the_middle_when_acting_and_one_random_place_per_history_in_training():
    encoder = ImageEncoder({"front": (20, 30, 3)}, **IMAGE)
    images = pictures(6, 1, 20, 30, 3).expand(6, 2, 20, 30, 3)  # a still picture, To = 2
    middle = encoder.eval().cropped(images)
    assert torch.equal(middle, images[:, :, 2:18, 3:27])
    torch.manual_seed(0)
    crops = encoder.train().cropped(images)
    assert crops.shape == middle.shape
    assert torch.equal(crops[:, 0], crops[:, 1])
    places = [
        next((t, x) for t in range(5) for x in range(7) if torch.equal(crops[i, 0], images[i, 0, t : t + 16, x : x + 24]))
        for i in range(6)
    ]
    assert len(set(places)) > 1


def test_images_are_scaled_to_plus_minus_one():
    encoder, seen = ImageEncoder({"front": (16, 16, 3)}, **{**IMAGE, "crop": 1.0}), []
    encoder.networks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    encoder({"front": torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1, 1).expand(2, 1, 16, 16, 3)})
    assert seen[0].shape == (2, 3, 16, 16)
    assert seen[0].flatten(1).unique(dim=1).flatten().tolist() == [-1.0, 1.0]


def test_cameras_share_weights_or_do_not():
    shapes = {"left": (16, 16, 3), "right": (16, 16, 3)}
    own, shared = (ImageEncoder(shapes, **{**IMAGE, "shared": flag}) for flag in (False, True))
    count = [sum(p.numel() for p in encoder.parameters()) for encoder in (own, shared)]
    assert count[0] == 2 * count[1]
    obs = {"left": pictures(3, 2, 16, 16, 3), "right": pictures(3, 2, 16, 16, 3).flip(0)}
    assert own(obs).shape == (3, 2, 16)
    features = shared.eval()(obs)
    assert torch.equal(features[..., :8], features.flip(0)[..., 8:])
    with pytest.raises(ValueError, match="different sizes"):
        ImageEncoder({"left": (16, 16, 3), "right": (16, 18, 3)}, **{**IMAGE, "shared": True})


@pytest.mark.parametrize("wrong", [{"network": "vgg"}, {"pooling": "max"}, {"crop": 0.0}, {"crop": 1.2}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="image"):
        ImageEncoder({"front": (16, 16, 3)}, **{**IMAGE, **wrong})


def test_spatial_softmax_finds_where_a_map_is_active():
    pool = SpatialSoftmax(1, 1)
    nn.init.constant_(pool.maps.weight, 50.0)
    nn.init.zeros_(pool.maps.bias)
    x = torch.zeros(1, 1, 5, 9)
    x[0, 0, 1, 6] = 1
    np.testing.assert_allclose(pool(x).detach().numpy(), [[0.5, -0.5]], atol=1e-4)  # x, y of column 6 of 9, row 1 of 5


def test_resnet18_is_resnet18_without_batch_statistics():
    network, channels = resnet18()
    assert channels == 512
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    assert sum(isinstance(m, nn.Conv2d) for m in network.modules()) == 20  # 17 of the body, 3 of the shortcuts
    assert sum(p.numel() for p in network.parameters()) == 11_176_512  # torchvision's count without its last layer
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 512, 2, 2)


# --- clouds -------------------------------------------------------------------------------------------------------------


def test_a_cloud_has_no_order_and_repeated_points_say_nothing():
    encoder = PointEncoder(3, (16, 32), 8).eval()
    cloud = torch.randn(2, 1, 40, 3)
    with torch.no_grad():
        features = encoder(cloud)
        torch.testing.assert_close(encoder(cloud[:, :, torch.randperm(40)]), features)
        torch.testing.assert_close(encoder(torch.cat([cloud, cloud[:, :, :7]], 2)), features)


def test_the_gradient_through_the_holders_of_maxima_is_the_gradient_through_all_points():
    torch.manual_seed(0)
    encoder, cloud = PointEncoder(6, (16, 32), 8).double(), torch.randn(5, 2, 60, 6, dtype=torch.double)
    gradients = []
    for forward in (encoder, lambda x: encoder.project(encoder.points(x).amax(-2))):
        encoder.zero_grad()
        features = forward(cloud)
        features.square().sum().backward()
        gradients.append([features.detach()] + [p.grad.clone() for p in encoder.parameters()])
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_points_without_a_maximum_are_left_out_of_the_graph():
    encoder, sizes = PointEncoder(3, (8, 8), 4), []
    encoder.points[0].register_forward_hook(lambda module, args, out: sizes.append((args[0].shape[-2], out.requires_grad)))
    encoder(torch.randn(4, 1, 500, 3))
    assert sizes[0] == (500, False)
    assert sizes[1][1]
    assert sizes[1][0] <= 8  # as many points as features, at most


# --- in the policy ------------------------------------------------------------------------------------------------------


SHAPES = {"robot": (4,), "front": (16, 16, 3), "points": (50, 3)}


def policy() -> Policy:
    torch.manual_seed(0)
    config = PolicyConfig("task", SHAPES, action_dim=2, horizon=8, action_steps=4, cond_width=16, width=16)
    return Policy(config)


def observation(batch: int) -> dict[str, torch.Tensor]:
    return {
        "robot": torch.randn(batch, 2, 4),
        "front": pictures(batch, 2, 16, 16, 3),
        "points": torch.rand(batch, 2, 50, 3),
    }


def test_an_observation_is_encoded_once_for_all_hypotheses():
    network, calls = policy(), []
    network.encoder.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    chunks = network(observation(3), torch.randn(3, 4, 8, 2))
    assert chunks.shape == (3, 4, 8, 2)
    assert calls == [3]


def test_normalisers_take_the_points_of_all_clouds_and_leave_pictures_alone():
    network = policy()
    points = np.random.default_rng(0).uniform([0, -1, 5], [2, 1, 6], (30, 50, 3)).astype(np.float32)
    network.fit_normalizers({"robot": np.random.randn(30, 4).astype(np.float32), "points": points}, np.random.randn(30, 2))
    assert set(network.normalize_obs) == {"robot", "points"}
    np.testing.assert_allclose(network.normalize_obs["points"].center, (points.min((0, 1)) + points.max((0, 1))) / 2, rtol=1e-6)


def test_act_refuses_pictures_that_are_not_uint8_and_another_size():
    network, obs = policy().eval(), observation(2)
    assert network.act(obs).shape == (2, 4, 2)
    with pytest.raises(ValueError, match=r"front.*float32.*uint8"):
        network.act({**obs, "front": obs["front"].float()})
    with pytest.raises(ValueError, match=r"front.*\(16, 16, 3\)"):
        network.act({**obs, "front": obs["front"][:, :, :8]})
    with pytest.raises(ValueError, match="never seen wrist"):
        network.act({**obs, "wrist": obs["front"]})
    with pytest.raises(ValueError, match="lacks 'points'"):
        network.act({key: value for key, value in obs.items() if key != "points"})


def test_saved_and_loaded_it_acts_the_same(tmp_path):
    network, obs = policy().eval(), observation(2)
    network.save(tmp_path / "p.pt")
    z = torch.randn(2, 8, 2)
    assert torch.equal(Policy.load(tmp_path / "p.pt").act(obs, z), network.act(obs, z))


def test_clouds_are_measured_from_the_hand():
    config = PolicyConfig("task", SHAPES, 2, 2, 8, 4, cond_width=16, width=16, cloud_origin="robot")
    network, obs = Policy(config), observation(2)
    centered = network.center(obs)
    torch.testing.assert_close(centered["points"][1, 0, 7], obs["points"][1, 0, 7] - obs["robot"][1, 0, :3])
    assert torch.equal(centered["robot"], obs["robot"])
    for wrong in ("front", "points", "absent"):
        with pytest.raises(ValueError, match=f"cloud_origin is '{wrong}'"):
            Policy(dataclasses.replace(config, cloud_origin=wrong))


@pytest.mark.parametrize("wrong", [{"point_widths": (0, 4)}, {"point_widths": ()}, {"image_crop": 0.01}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("_", ".")):
        Policy(dataclasses.replace(policy().config, **wrong))


def test_all_parts_are_concatenated():
    encoder = Encoder(SHAPES, IMAGE, CLOUD)
    assert encoder.feature_dim == 4 + 8 + 8
    assert encoder(observation(3)).shape == (3, 2, 20)
