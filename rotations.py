"""Rotations: matrices (..., 3, 3), rotation vectors in rad, quaternions, and 6-D for a network (Zhou et al. 2019)."""

from __future__ import annotations

import numpy as np


def matrix(vector: np.ndarray) -> np.ndarray:
    """Rotation vectors (..., 3), rad -> matrices (..., 3, 3), Rodrigues' formula."""
    angle = np.linalg.norm(vector, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(vector / np.maximum(angle[..., 0], 1e-12), -1, 0)
    o = np.zeros_like(x)
    K = np.stack([o, -z, y, z, o, -x, -y, x, o], -1).reshape(*x.shape, 3, 3)
    return np.eye(3) + np.sin(angle) * K + (1 - np.cos(angle)) * K @ K


def vector(R: np.ndarray) -> np.ndarray:
    """One matrix (3, 3) -> its rotation vector (3,), rad."""
    cos = np.clip((np.trace(R) - 1) / 2, -1, 1)
    axis = np.array([R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]])
    if cos > -0.9:
        return axis / 2 if cos > 1 - 1e-12 else axis * np.arccos(cos) / np.linalg.norm(axis)
    square = (R + R.T) / 2 - cos * np.eye(3)  # near half a turn that difference vanishes, and this, axis times axis, does not
    column = square[:, np.argmax(np.diag(square))]
    return (-1.0 if column @ axis < 0 else 1.0) * column / np.linalg.norm(column) * np.arccos(cos)


def from_quaternion(q: np.ndarray) -> np.ndarray:
    """Quaternions (..., 4), x y z w, however scaled (no rotation for 0) -> matrices (..., 3, 3)."""
    v, w = q[..., :3], q[..., 3]
    length = np.linalg.norm(v, axis=-1)
    angle = 2 * np.arctan2(length, w)
    return matrix(v * (angle / np.maximum(length, 1e-12))[..., None])


def six(R: np.ndarray) -> np.ndarray:
    """(..., 3, 3) -> its first two columns, (..., 6); Zhou et al. 2019."""
    return np.concatenate([R[..., 0], R[..., 1]], -1)


def from_six(x: np.ndarray) -> np.ndarray:
    """(..., 6), however scaled -> (..., 3, 3), by Gram-Schmidt."""
    a = x[..., :3] / np.maximum(np.linalg.norm(x[..., :3], axis=-1, keepdims=True), 1e-9)
    b = x[..., 3:] - a * (a * x[..., 3:]).sum(-1, keepdims=True)
    b = b / np.maximum(np.linalg.norm(b, axis=-1, keepdims=True), 1e-9)
    return np.stack([a, b, np.cross(a, b)], -1)
