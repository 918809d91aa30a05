"""pointcloud.py: back-projection against projection, the crop's and the depth's errors, farthest points against plain loops."""

import numpy as np
import pytest

import pointcloud


def rotation(rng) -> np.ndarray:
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q))


def test_points_of_a_depth_image_are_where_they_were_seen():
    rng = np.random.default_rng(0)
    camera = pointcloud.intrinsics(60.0, 32, 24)
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation(rng), rng.normal(size=3)
    depth = rng.uniform(0.5, 2.0, (24, 32))
    points = pointcloud.depth_to_points(depth, camera, pose)
    assert points.shape == (24 * 32, 3)
    local = (points - pose[:3, 3]) @ pose[:3, :3]  # into the camera's frame again, and through the pinhole
    pixels = local @ camera.T
    np.testing.assert_allclose(local[:, 2], depth.ravel(), atol=1e-12)
    v, u = np.indices(depth.shape)
    np.testing.assert_allclose(pixels[:, :2] / pixels[:, 2:], np.stack([u.ravel(), v.ravel()], -1), atol=1e-9)


def test_field_of_view():
    """The edge of the image, half a pixel outside of the outermost centre, is half the field of view away from the axis."""
    camera = pointcloud.intrinsics(90.0, 100, 100)
    edge = np.linalg.inv(camera) @ [49.5, -0.5, 1]
    np.testing.assert_allclose(np.degrees(np.arctan2(-edge[1], edge[2])), 45.0)


def test_unknown_depth_gives_no_point_and_nan_is_refused():
    depth = np.ones((4, 4))
    depth[1, 2] = 0
    points = pointcloud.depth_to_points(depth, pointcloud.intrinsics(60, 4, 4), np.eye(4))
    assert len(pointcloud.crop(points, [-9] * 3, [9] * 3)) == 15
    depth[0, 0] = np.nan
    with pytest.raises(ValueError, match="1 NaN pixels"):
        pointcloud.depth_to_points(depth, pointcloud.intrinsics(60, 4, 4), np.eye(4))


def test_a_table_with_a_hole_goes_and_what_is_in_the_hole_stays():
    points = np.array([[0.0, 0.0, z] for z in (-0.02, 0.045, 0.05, 0.055, 0.07)])
    assert pointcloud.crop(points, [-1] * 3, [1] * 3, surface=0.05).tolist() == [0, 4]


def test_a_crop_of_points_at_infinity_is_silent(recwarn):
    points = np.array([[0.0, 0.0, -np.inf], [0.0, 0.0, np.inf], [0.0, 0.0, 0.5]])
    assert pointcloud.crop(points, [-1] * 3, [1] * 3).tolist() == [2] and not recwarn.list


def test_an_empty_crop_says_what_the_camera_saw():
    points = np.array([[0.0, 0.0, 2.0], [1.0, 0.5, 3.0]])
    assert pointcloud.crop(points, [-1, -1, 0], [2, 2, 2.5]).tolist() == [0]
    with pytest.raises(ValueError, match=r"empty after cropping.*0\. 0\. 2\..*1\. *0\.5 *3\."):
        pointcloud.crop(points, [-1, -1, 0], [1, 1, 1])
    with pytest.raises(ValueError, match="no point at all"):
        pointcloud.crop(np.full((3, 3), np.inf), [-1] * 3, [1] * 3)


def farthest_by_loops(points: np.ndarray, count: int) -> list[int]:
    center = points.mean(0)
    chosen = [max(range(len(points)), key=lambda i: np.linalg.norm(points[i] - center))]
    while len(chosen) < count:
        chosen.append(max(range(len(points)), key=lambda i: min(np.linalg.norm(points[i] - points[j]) for j in chosen)))
    return chosen


def test_farthest_points_equal_plain_loops_one_by_one_and_in_a_batch():
    clouds = np.random.default_rng(1).normal(size=(3, 60, 3))
    expected = [farthest_by_loops(cloud, 12) for cloud in clouds]
    assert pointcloud.farthest_points(clouds, 12).tolist() == expected
    assert pointcloud.farthest_points(clouds[1], 12).tolist() == expected[1]


def test_farthest_points_do_not_depend_on_the_order():
    rng = np.random.default_rng(2)
    cloud, order = rng.normal(size=(200, 3)), rng.permutation(200)
    np.testing.assert_array_equal(order[pointcloud.farthest_points(cloud[order], 30)], pointcloud.farthest_points(cloud, 30))


def test_a_small_cloud_gives_all_its_points():
    cloud = np.random.default_rng(3).normal(size=(5, 3))
    assert set(pointcloud.farthest_points(cloud, 8)) == set(range(5))
