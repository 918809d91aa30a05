"""Two UR5e arms as numbers: kinematics, trajectories of way-points, and the limits that every command has to keep.

Nothing here talks to a robot, looks at a clock or starts a thread: the same functions run in the twin, on real arms and in tests.

Symbols                          shape          unit
    q, qd      joints            (..., 6)       rad, rad/s     base, shoulder, elbow, wrist 1, 2, 3
    frames     joint frames      (..., 6, 4, 4) m              DH frames 1 .. 6 in the arm's base; the sixth is the flange
    tcp        tool centre       (..., 4, 4)    m              flange + TOOL along its z, between the finger tips
    base       arm in the cell   (4, 4)         m              base frame of one arm in the cell's frame (table top: z = 0)
    commands   both arms         (2, 6)         rad            left, right

The arm's constants are Universal Robots': DH parameters of its article "DH parameters for calculations of kinematics and
dynamics", joint ranges and speeds of the UR5e user manual. A real arm differs from its nominal kinematics by up to
millimetres; its controller holds a calibration, which this file does not read.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from rotations import from_six

ARMS = ("left", "right")
DH_A = np.array([0.0, -0.425, -0.3922, 0.0, 0.0, 0.0])  # metres
DH_D = np.array([0.1625, 0.0, 0.0, 0.1333, 0.0997, 0.0996])
DH_ALPHA = np.array([math.pi / 2, 0.0, 0.0, math.pi / 2, -math.pi / 2, 0.0])  # rad
JOINT_RANGE = 2 * math.pi  # every joint turns by so much either way, rad
JOINT_SPEED = math.pi  # of every joint at the most, rad/s
TOOL = 0.15  # flange to finger tips, metres
LEVER = 0.5  # metres: a hand that brakes with a m/s^2 is taken to brake its joints with a / LEVER rad/s^2
OPENING = 0.085  # of the gripper at the most, metres
HOME = np.array([0.0, -1.7, 1.95, -1.8208, -math.pi / 2, 0.0])  # elbow up, the hand straight down in front of the base

# Capsules that contain an arm and its hand, for the distance between the arms: (frame, point) to (frame, point), radius.
# Frame 0 is the base. The upper arm runs 0.138 m beside the shoulder's axis, the forearm 0.007 m (UR's measure of its model).
CAPSULES = (
    (2, (0.425, 0, 0.138), 2, (0, 0, 0.138), 0.065),
    (3, (0.3922, 0, 0.007), 3, (0, 0, 0.007), 0.055),
    (3, (0, 0, 0), 4, (0, 0, 0), 0.05),
    (4, (0, 0, 0), 5, (0, 0, 0), 0.05),
    (5, (0, 0, 0), 6, (0, 0, TOOL), 0.06),
)


# --- kinematics -------------------------------------------------------------------------------------------------------


def frames(q: np.ndarray) -> np.ndarray:
    """Frames 1 .. 6 of the DH chain, RotZ(q) TransZ(d) TransX(a) RotX(alpha) each. (..., 6) -> (..., 6, 4, 4)."""
    c, s, ca, sa = np.cos(q), np.sin(q), np.cos(DH_ALPHA), np.sin(DH_ALPHA)
    link = np.zeros((*q.shape, 4, 4))
    link[..., 0, 0], link[..., 0, 1], link[..., 0, 2], link[..., 0, 3] = c, -s * ca, s * sa, DH_A * c
    link[..., 1, 0], link[..., 1, 1], link[..., 1, 2], link[..., 1, 3] = s, c * ca, -c * sa, DH_A * s
    link[..., 2, 1], link[..., 2, 2], link[..., 2, 3], link[..., 3, 3] = sa, ca, DH_D, 1.0
    for i in range(1, 6):
        link[..., i, :, :] = link[..., i - 1, :, :] @ link[..., i, :, :]
    return link


def tcp(chain: np.ndarray) -> np.ndarray:
    """Tool centre from `frames`. (..., 6, 4, 4) -> (..., 4, 4)."""
    pose = chain[..., 5, :, :].copy()
    pose[..., :3, 3] += TOOL * pose[..., :3, 2]
    return pose


def inverse(pose: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Joints that bring the tool centre to `pose` in the base frame, in closed form. (..., 4, 4) -> (..., 6)

    A UR5e has up to eight solutions; this is the one with the shoulder, elbow and wrist on the side where they are at q (..., 6),
    and each joint on q's turn. Joints 2, 3, 4 turn about one direction, z1 = (sin q1, -cos q1, 0), which is what makes it easy.
    Raises: ValueError out of reach, and where the wrist is straight (joint 5 at 0), which leaves joints 4 and 6 undetermined.
    """
    R, flange = pose[..., :3, :3], pose[..., :3, 3] - TOOL * pose[..., :3, 2]
    wrist = flange - DH_D[5] * R[..., 2]  #                                    origin of frame 5; wrist . z1 = d4
    ratio = DH_D[3] / np.hypot(wrist[..., 0], wrist[..., 1])
    lean = np.arcsin(np.clip(ratio, -1, 1))
    here = np.arctan2(wrist[..., 1], wrist[..., 0])
    either = np.stack([here + lean, here + math.pi - lean])  #                 shoulder on one or the other side
    apart = np.abs(np.mod(either - q[..., 0] + math.pi, 2 * math.pi) - math.pi)
    q1 = np.where(apart[0] <= apart[1], either[0], either[1])
    c1, s1 = np.cos(q1), np.sin(q1)
    z1 = np.stack([s1, -c1, np.zeros_like(s1)], -1)
    seen = np.einsum("...ij,...i->...j", R, z1)  #                             z1 in frame 6: (s5 c6, -s5 s6, c5)
    side = np.where(np.sin(q[..., 4]) >= 0, 1.0, -1.0)
    s5 = side * np.hypot(seen[..., 0], seen[..., 1])
    q5, q6 = np.arctan2(s5, seen[..., 2]), np.arctan2(-side * seen[..., 1], side * seen[..., 0])
    z4 = np.einsum("...ij,...j->...i", R, np.stack([-np.sin(q6), -np.cos(q6), np.zeros_like(q6)], -1))
    total = np.arctan2(c1 * z4[..., 0] + s1 * z4[..., 1], -z4[..., 2])  #      q2 + q3 + q4
    ankle = wrist - DH_D[4] * z4 - DH_D[3] * z1  #                             origin of frame 3, moved into the arm's plane
    x, y = c1 * ankle[..., 0] + s1 * ankle[..., 1], ankle[..., 2] - DH_D[0]
    a2, a3 = DH_A[1], DH_A[2]
    c3 = (x * x + y * y - a2 * a2 - a3 * a3) / (2 * a2 * a3)
    q3 = np.arccos(np.clip(c3, -1, 1)) * np.where(np.sin(q[..., 2]) >= 0, 1.0, -1.0)
    q2 = np.arctan2(y, x) - np.arctan2(a3 * np.sin(q3), a2 + a3 * np.cos(q3))
    found = np.stack([q1, q2, q3, total - q2 - q3, q5, q6], -1)
    impossible = (np.abs(ratio) > 1) | (np.abs(c3) > 1) | (np.abs(s5) < 0.02)
    if impossible.any():
        x, y, z = pose[..., :3, 3][impossible][0]
        raise ValueError(f"the arm cannot reach ({x:.3f}, {y:.3f}, {z:.3f}) m from its base, or only with a straight wrist")
    return q + np.mod(found - q + math.pi, 2 * math.pi) - math.pi


def mounted(x: float, y: float, z: float, yaw: float) -> np.ndarray:
    """An upright base at so many metres in the cell, turned about the vertical by yaw, rad. -> (4, 4)"""
    c, s = math.cos(yaw), math.sin(yaw)
    return np.array([[c, -s, 0, x], [s, c, 0, y], [0, 0, 1, z], [0, 0, 0, 1.0]])


def pose_of(position: np.ndarray, rotation6: np.ndarray) -> np.ndarray:
    """Of actions: position (..., 3) and 6-D rotation (..., 6) -> (..., 4, 4)."""
    pose = np.zeros((*np.shape(position)[:-1], 4, 4))
    pose[..., :3, :3], pose[..., :3, 3], pose[..., 3, 3] = from_six(np.asarray(rotation6, np.float64)), position, 1
    return pose


# --- distance between the arms ------------------------------------------------------------------------------------------


def segments(chain: np.ndarray, bases: np.ndarray) -> np.ndarray:
    """Axes of CAPSULES in the cell. chain (2, 6, 4, 4), bases (2, 4, 4) -> (2, capsules, 2 ends, 3), metres."""
    world = bases[:, None] @ np.concatenate([np.broadcast_to(np.eye(4), (2, 1, 4, 4)), chain], 1)  # (2, 7, 4, 4)
    which, local = _CAPSULE_FRAMES, _CAPSULE_POINTS
    ends = world[:, which, :3, :3] @ local[..., None]
    return (ends[..., 0] + world[:, which][..., :3, 3]).reshape(2, len(CAPSULES), 2, 3)


_CAPSULE_FRAMES = np.array([frame for first, _, second, _, _ in CAPSULES for frame in (first, second)])
_CAPSULE_POINTS = np.array([point for _, first, _, second, _ in CAPSULES for point in (first, second)], float)
_CAPSULE_RADII = np.array([radius for *_, radius in CAPSULES])


def segment_distance(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Shortest distances between segments, p and q (..., 2 ends, 3), none of them a point. -> (...)"""
    u, v, w = p[..., 1, :] - p[..., 0, :], q[..., 1, :] - q[..., 0, :], p[..., 0, :] - q[..., 0, :]
    a, b, c, d, e = ((x * y).sum(-1) for x, y in ((u, u), (u, v), (v, v), (u, w), (v, w)))
    s = np.clip((b * e - c * d) / np.maximum(a * c - b * b, 1e-12), 0, 1)  # on p, as if q were endless
    t = np.clip((b * s + e) / c, 0, 1)  # nearest to that on q
    s = np.clip((b * t - d) / a, 0, 1)  # and back, where q has ended
    return np.linalg.norm(w + s[..., None] * u - t[..., None] * v, axis=-1)


def clearance(chain: np.ndarray, bases: np.ndarray) -> float:
    """Metres of air between the two arms. chain (2, 6, 4, 4), bases (2, 4, 4)."""
    left, right = segments(chain, bases)
    distance = segment_distance(left[:, None], right[None])
    return float((distance - _CAPSULE_RADII[:, None] - _CAPSULE_RADII).min())


# --- limits -------------------------------------------------------------------------------------------------------------


class Fault(Exception):
    """Why the arms have to stop. It is raised before the offending command is sent, and only a new start clears it."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What no command may leave; one set per cell. Boxes hold the tool centre, in the cell's frame."""

    box_low: tuple[tuple[float, float, float], ...]  # per arm, metres
    box_high: tuple[tuple[float, float, float], ...]  # per arm, metres
    joint_low: tuple[float, ...]  # of each joint, rad
    joint_high: tuple[float, ...]  # of each joint, rad
    joint_speed: float  # rad/s
    joint_acceleration: float  # rad/s^2
    joint_braking: float  # rad/s^2 that a stop is sure to reach
    tcp_speed: float  # m/s
    step: float  # from the measured to the commanded joint, rad
    clearance: float  # air between the arms, metres
    start: float  # from the measured to the first commanded joint, rad

    def check(self, q: np.ndarray, bases: np.ndarray, what: str) -> None:
        """Raises Fault where joints q (2, 6) of the two arms leave the limits; what: whose joints, for the message."""
        if not np.isfinite(q).all():
            raise Fault(f"{what}: joints hold NaN or infinity")
        low, high = np.array(self.joint_low), np.array(self.joint_high)
        outside = np.argwhere((q < low) | (q > high))
        if len(outside):
            arm, joint = outside[0]
            raise Fault(
                f"{what}: joint {joint + 1} of the {ARMS[arm]} arm at {q[arm, joint]:.3f} rad, allowed {low[joint]:.3f} to "
                f"{high[joint]:.3f}"
            )
        chain = frames(q)
        places = (bases @ tcp(chain))[:, :3, 3]
        for arm, place, box_low, box_high in zip(ARMS, places, self.box_low, self.box_high, strict=True):
            if (place < box_low).any() or (place > box_high).any():
                raise Fault(f"{what}: the {arm} hand at {np.round(place, 3)} m, outside its workspace {box_low} to {box_high}")
        air = clearance(chain, bases)
        if air < self.clearance:
            raise Fault(f"{what}: {air:.3f} m between the arms, at least {self.clearance} m are wanted")


def braked(q: np.ndarray, qd: np.ndarray, acceleration: float) -> np.ndarray:
    """Where joints at q that move with qd come to rest under that deceleration, rad."""
    return q + qd * np.abs(qd) / (2 * acceleration)


def limited_step(
    q: np.ndarray, qd: np.ndarray, want: np.ndarray, pace: np.ndarray, dt: float, limits: Limits
) -> tuple[np.ndarray, np.ndarray]:
    """The next command towards `want`, which itself moves with `pace`, one period dt (s) on, within the limits of speed.

    Args: q, qd, want, pace (2, 6). Returns: q, qd after dt. Relative to the target the speed never exceeds what can be braked
        over the gap that is left, so that a target which stands still is reached without overshoot.
    """
    a, gap = limits.joint_acceleration, want - q
    # Largest speed v with v dt + v^2 / 2a <= |gap|: one period at v, then braking, ends on the target.
    brake = a * (np.sqrt(dt * dt + 2 * np.abs(gap) / a) - dt)
    speed = pace + np.sign(gap) * np.minimum(np.abs(gap) / dt, brake)
    speed = np.clip(speed, -limits.joint_speed, limits.joint_speed)
    moved = tcp(frames(np.stack([q, q + speed * dt])))[..., :3, 3]
    hand = np.linalg.norm(moved[1] - moved[0], axis=-1, keepdims=True) / dt  # m/s that the hand would have         (2, 1)
    speed = speed * np.minimum(1.0, limits.tcp_speed / np.maximum(hand, 1e-9))
    qd = qd + np.clip(speed - qd, -a * dt, a * dt)
    return q + qd * dt, qd


# --- way-points in time ---------------------------------------------------------------------------------------------------


class Trajectory:
    """Way-points with times, joined chunk to chunk. Late ones are dropped and never replayed, and there is never a jump: each
    chunk begins where the way-points are when it arrives.
    """

    def __init__(self, now: float, q: np.ndarray, grip: np.ndarray):
        """Stand still at q (2, 6), grip (2,), from now on, in seconds of the caller's clock."""
        self.times, self.values = np.array([now]), np.concatenate([q, grip[:, None]], 1)[None]

    def join(self, now: float, times: np.ndarray, q: np.ndarray, grip: np.ndarray) -> int:
        """Replace what comes after now by times (K,), q (K, 2, 6), grip (K, 2). Returns: how many were late and dropped; when all
        were, nothing changes."""
        late = times <= now
        if late.all():
            return len(late)
        here = self.at(now)
        later = np.concatenate([q, grip[..., None]], -1)[~late]
        self.times, self.values = np.concatenate([[now], times[~late]]), np.concatenate([here[None], later])
        return int(late.sum())

    def at(self, t: float) -> np.ndarray:
        """Joints and grip at time t, (2, 7); before the first and after the last way-point, that way-point."""
        i = int(np.searchsorted(self.times, t, side="right"))
        if i == 0 or i == len(self.times):
            return self.values[min(i, len(self.times) - 1)]
        share = (t - self.times[i - 1]) / (self.times[i] - self.times[i - 1])
        return (1 - share) * self.values[i - 1] + share * self.values[i]


@dataclasses.dataclass(frozen=True)
class ArmState:
    """What an arm last reported."""

    time: float  # when it arrived, seconds of the caller's clock
    q: np.ndarray  # (6,) measured, rad
    qd: np.ndarray  # (6,) measured, rad/s
    grip: float  # 0 open .. 1 shut, measured where the gripper tells, else as commanded
    fault: str = ""  # why the arm itself has stopped; empty: it obeys


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What the policy's process sends: way-points in joints, and when each of its stages ended (monotonic, s)."""

    captured: float  # the oldest picture or state that it saw
    started: float  # observation in hand
    encoded: float  # through the encoders
    ready: float  # way-points in joints
    times: np.ndarray  # (K,) when the arms shall be there
    q: np.ndarray  # (K, 2, 6) rad
    grip: np.ndarray  # (K, 2) 0 open .. 1 shut


@dataclasses.dataclass(frozen=True)
class Patience:
    """How old things may become before the arms stop, seconds."""

    tick: float  # from one servo period to the next: our own watchdog
    state: float  # what an arm reported last
    policy: float  # what the policy saw when it last answered


class Pilot:
    """Each control period: what both arms do next, or the Fault for which they stop. It knows no clock and no arm."""

    def __init__(
        self,
        limits: Limits,
        bases: np.ndarray,
        period: float,
        patience: Patience,
        replan: float,
        now: float,
        states: list[ArmState],
    ):
        """Both arms begin at rest.

        Args: bases (2, 4, 4); period: of the controllers, s; replan: how long a chunk is followed before it is the newest one's
            turn, s, 0 for none of that; now: s; states: of both arms.
        Raises: Fault where the limits exclude where they are.
        """
        self.limits, self.bases, self.period, self.patience, self.replan = limits, bases, period, patience, replan
        self.last, self.chunks, self.dropped, self.captured, self.joined = now, 0, 0, now, now
        self.measure(now, states)
        limits.check(self.measured, bases, "where the arms are")
        self.hold(now)

    def measure(self, now: float, states: list[ArmState]) -> None:
        """Raises Fault for an arm that has stopped by itself, that has not been heard of for too long, or reports no joints."""
        for name, state in zip(ARMS, states, strict=True):
            if state.fault:
                raise Fault(f"the {name} arm: {state.fault}")
            if now - state.time > self.patience.state:
                raise Fault(f"the {name} arm has not been heard of for {now - state.time:.3f} s")
            if state.q.shape != (6,) or not np.isfinite(state.q).all():
                raise Fault(f"the {name} arm reports the joints {state.q}")
        self.measured, self.grip = np.stack([state.q for state in states]), np.array([state.grip for state in states])

    def hold(self, now: float) -> None:
        """Forget the trajectory: stand where the arms were measured."""
        self.q, self.qd = self.measured.copy(), np.zeros((2, 6))
        self.trajectory = Trajectory(now, self.measured, self.grip)

    def take(self, now: float, chunk: Chunk) -> None:
        """Go on with a new chunk, if it is its turn. Raises Fault for NaN, wrong shapes, and a first target far from the arms."""
        count = len(chunk.times)
        if count < 1 or chunk.q.shape != (count, 2, 6) or chunk.grip.shape != (count, 2):
            raise Fault(f"the policy gave joints {chunk.q.shape} and grips {chunk.grip.shape} for {count} times")
        if not (np.isfinite(chunk.q).all() and np.isfinite(chunk.grip).all() and np.isfinite(chunk.times).all()):
            raise Fault("the policy gave NaN or infinity")
        if (np.diff(chunk.times) <= 0).any():
            raise Fault("the policy's way-points are not in the order of time")
        far = np.abs(chunk.q[0] - self.measured)
        if self.chunks == 0 and far.max() > self.limits.start:
            arm, joint = np.unravel_index(far.argmax(), far.shape)
            raise Fault(
                f"the first target is {far.max():.2f} rad away, at joint {joint + 1} of the {ARMS[arm]} arm; at most "
                f"{self.limits.start} are allowed. Move the arms to where the demonstrations began"
            )
        self.captured = max(self.captured, chunk.captured)
        if self.chunks and now - self.joined < self.replan - self.period / 2:
            return
        late = self.trajectory.join(now, chunk.times, chunk.q, chunk.grip.clip(0, 1))
        self.dropped += late
        if late < count:
            self.chunks, self.joined = self.chunks + 1, now

    def look(self, now: float, states: list[ArmState]) -> None:
        """Before a command is worked out, and again as it leaves. Raises Fault where the loop stood still since, or an arm must
        not go on (measure)."""
        gap = now - self.last
        if gap > self.patience.tick:
            raise Fault(f"the servo loop stood still for {gap:.3f} s")
        self.measure(now, states)

    def tick(self, now: float, states: list[ArmState]) -> np.ndarray:
        """Joints and grip (2, 7) to command for the period that begins now, or soon. Raises Fault instead of a command that must
        not be sent."""
        self.look(now, states)
        self.last = now
        if now - self.captured > self.patience.policy:
            raise Fault(f"the policy has seen nothing newer than {now - self.captured:.2f} s")
        here, want = self.trajectory.at(now), self.trajectory.at(now + self.period)
        pace = (want[:, :6] - here[:, :6]) / self.period
        q, qd = limited_step(self.q, self.qd, want[:, :6], pace, self.period, self.limits)
        off = np.abs(q - self.measured)
        if off.max() > self.limits.step:
            arm, joint = np.unravel_index(off.argmax(), off.shape)
            raise Fault(
                f"joint {joint + 1} of the {ARMS[arm]} arm is {off.max():.3f} rad from its command, at most {self.limits.step} "
                "are allowed: it is held back or does not follow"
            )
        # Whoever may stop there may go on: each command leaves room to brake inside the limits.
        self.limits.check(braked(q, qd, self.limits.joint_braking), self.bases, "braking after the next command")
        self.q, self.qd = q, qd
        return np.concatenate([q, want[:, 6:]], 1)
