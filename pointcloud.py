"""Depth image -> point cloud: back-projection, crop to the workspace, farthest point sampling.

    depth (H, W) metres -> points (H*W, 3) metres in the robot's frame -> those in a box -> `count` of them, spread evenly

Metres and radians throughout. Axes of a camera here: x right, y down, z forward (OpenCV's, RealSense's and Orbbec's). numpy only:
the simulators (manipulation.py) and the robot (robot_ur5.py) call the same functions.
"""

from __future__ import annotations

import numpy as np


def intrinsics(fovy: float, width: int, height: int) -> np.ndarray:
    """Pinhole matrix (3, 3) of a camera with vertical field of view fovy (degrees, as in MuJoCo) and square pixels."""
    focal = height / 2 / np.tan(np.deg2rad(fovy) / 2)  # pixels
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])


def depth_to_points(depth: np.ndarray, camera: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Every pixel's point in the robot's frame.

    Args: depth (H, W), metres along the optical axis; camera (3, 3): `intrinsics`; pose (4, 4): camera frame -> robot frame.
    Returns: (H*W, 3) float64, row by row; pixels without depth (0, or infinite) give points that are not finite.
    Raises: ValueError for NaN depth: a sensor marks what it cannot see with 0, NaN is a fault.
    """
    if np.isnan(depth).any():
        raise ValueError(f"the depth image has {int(np.isnan(depth).sum())} NaN pixels; unknown depth must be 0")
    v, u = np.indices(depth.shape)
    z = np.where(depth > 0, depth, np.inf).astype(np.float64)
    x, y = (u - camera[0, 2]) / camera[0, 0], (v - camera[1, 2]) / camera[1, 1]
    with np.errstate(invalid="ignore"):  # 0 * inf in the column of the optical axis
        points = np.stack([x * z, y * z, z], -1).reshape(-1, 3) @ pose[:3, :3].T + pose[:3, 3]
    return points


def crop(points: np.ndarray, low: np.ndarray, high: np.ndarray, surface: float = -np.inf) -> np.ndarray:
    """Indices (M,) of the points (N, 3 or more) inside the box [low, high], metres. Raises ValueError where none is.

    surface: height of a table; what lies within 8 mm of it is left out, where a lower wall of the box would cut off a hole in it.
    """
    on_surface = (points[:, 2] > surface - 8e-3) & (points[:, 2] < surface + 8e-3)
    inside = np.flatnonzero(((points[:, :3] >= low) & (points[:, :3] <= high)).all(-1) & ~on_surface)
    if len(inside) == 0:
        finite = points[np.isfinite(points[:, :3]).all(-1), :3]
        box = f"{np.asarray(low)} ... {np.asarray(high)} m"
        seen = f"points from {finite.min(0).round(3)} to {finite.max(0).round(3)}" if len(finite) else "no point at all"
        raise ValueError(f"the point cloud is empty after cropping to {box}: the camera saw {seen}")
    return inside


def farthest_points(points: np.ndarray, count: int) -> np.ndarray:
    """Farthest point sampling: each next point is the one that is farthest from all chosen so far.

    Args: points (..., N, 3), any number of clouds, finite. Returns: indices (..., count). Begins with the point farthest from the
    mean, so the result depends on the set alone, not on its order. A cloud of fewer than `count` points gives points twice,
    which the maximum over points (encoders.PointEncoder) does not notice.
    """
    clouds = points.reshape(-1, *points.shape[-2:])[..., :3]
    chosen = np.empty((len(clouds), count), np.int64)
    for cloud, indices in zip(clouds, chosen, strict=True):  # one by one: what is at work then stays in the cache
        cloud = np.ascontiguousarray(cloud - cloud.mean(0), np.float32)
        square, turned = np.square(cloud).sum(-1), np.ascontiguousarray(-2 * cloud.T)
        distance, to_newest = np.full_like(square, np.inf), np.empty_like(square)
        newest = square.argmax()
        for k in range(count):
            indices[k] = newest
            np.dot(cloud[newest], turned, out=to_newest)  # |x - a|^2 = |x|^2 - 2 x.a + |a|^2, without (N, 3) differences
            to_newest += square
            to_newest += square[newest]
            np.minimum(distance, to_newest, out=distance)
            newest = distance.argmax()
    return chosen.reshape(*points.shape[:-2], count)
