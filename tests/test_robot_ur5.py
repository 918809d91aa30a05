"""The dual-arm UR5: kinematics, limits, faults at random times, recordings, and the real ur_rtde client on loopback."""

import dataclasses
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_MLP

import demos
import envs
import robot_ur5
import ur5_devices
import ur5_motion
import ur5_policy
import ur5_tasks
import ur5_times
import ur5_twin
from common import UserError
from policy import Policy
from robot_ur5 import Config, limits_of, patience_of, stop_together
from ur5_motion import ArmState, Chunk, Fault, Pilot, Trajectory
from ur5_policy import Snapshot
from ur5_times import Stopwatch

sys.path.append(str(ROOT / "benchmark"))
from robot import waving_policy

try:
    import rtde_control
except ImportError:
    rtde_control = None
real_client = pytest.mark.skipif(rtde_control is None, reason="needs ur_rtde: pip install -r requirements-robot.txt")

CONFIG = Config(sim=True)
LIMITS, BASES, PERIOD = limits_of(CONFIG), ur5_twin.BASES, ur5_twin.PERIOD
HOMES = np.stack([ur5_twin.home(0), ur5_twin.home(1)])


# --- kinematics -------------------------------------------------------------------------------------------------------


def test_forward_kinematics_are_mujocos():
    cell = ur5_twin.Cell("")
    rng = np.random.default_rng(0)
    for _ in range(20):
        q = rng.uniform(-3, 3, (2, 6))
        for arm, mine in zip(cell.arms, q, strict=True):
            arm.put(mine)
        cell.mujoco.mj_forward(cell.model, cell.data)
        for i, name in enumerate(ur5_motion.ARMS):
            at, R = cell.body(f"{name}_hand")
            pose = BASES[i] @ ur5_motion.tcp(ur5_motion.frames(q[i]))
            assert np.allclose(pose[:3, 3], at + ur5_motion.TOOL * R[:, 2], atol=1e-6)
            assert np.allclose(pose[:3, :3], R, atol=1e-6)


def test_published_reach_of_a_ur5e():
    # UR's drawing: stretched to the side at q = 0, the flange is 817.2 mm out, and 232.9 mm beside the base's axis.
    flange = ur5_motion.frames(np.zeros(6))[5][:3, 3]
    assert np.allclose(flange, (-0.8172, -0.2329, 0.0628), atol=1e-9)


def test_inverse_finds_the_joints_again():
    rng = np.random.default_rng(1)
    q = rng.uniform(-3, 3, (300, 6))
    q = q[(np.abs(np.sin(q[:, 4])) > 0.05) & (np.abs(np.sin(q[:, 2])) > 0.02)]
    for mine in q:
        pose = ur5_motion.tcp(ur5_motion.frames(mine))
        assert np.allclose(ur5_motion.inverse(pose, mine), mine, atol=1e-6)


def test_inverse_of_many_is_the_inverse_of_each():
    poses = np.repeat(ur5_motion.tcp(ur5_motion.frames(HOMES[0]))[None], 5, 0)
    poses[:, :3, 3] += np.random.default_rng(2).uniform(-0.1, 0.1, (5, 3))
    together = ur5_motion.inverse(poses, HOMES[0])
    assert np.allclose(together, [ur5_motion.inverse(pose, HOMES[0]) for pose in poses])
    both = ur5_motion.inverse(poses[:, None].repeat(2, 1), HOMES)  # each arm on its own side
    assert np.allclose(both[:, 0], together) and np.allclose(both[:, 1], ur5_motion.inverse(poses, HOMES[1]))
    assert np.allclose(ur5_motion.tcp(ur5_motion.frames(together)), poses, atol=1e-9)


def test_out_of_reach_is_an_error():
    pose = ur5_motion.tcp(ur5_motion.frames(HOMES[0]))
    pose[:3, 3] = 1.2, 0, 0.3
    with pytest.raises(ValueError, match="cannot reach"):
        ur5_motion.inverse(pose, HOMES[0])


def test_segment_distance_against_sampled_points():
    rng = np.random.default_rng(3)
    share = np.linspace(0, 1, 201)[:, None]
    for _ in range(50):
        p, q = rng.uniform(-1, 1, (2, 2, 3))
        a, b = p[0] + share * (p[1] - p[0]), q[0] + share * (q[1] - q[0])
        sampled = np.linalg.norm(a[:, None] - b[None], axis=-1).min()
        exact = ur5_motion.segment_distance(p, q)
        assert exact <= sampled + 1e-12 and sampled - exact < 0.02


# --- motion within limits -----------------------------------------------------------------------------------------------


def test_limits_of_speed_hold_whatever_is_wanted():
    rng = np.random.default_rng(4)
    q, qd, hand = HOMES.copy(), np.zeros((2, 6)), None
    for k in range(1500):
        if k % 100 == 0:
            want = HOMES + rng.uniform(-1, 1, (2, 6))
        new, speed = ur5_motion.limited_step(q, qd, want, np.zeros((2, 6)), PERIOD, LIMITS)
        now = ur5_motion.tcp(ur5_motion.frames(new))[:, :3, 3]
        assert np.abs(speed).max() <= LIMITS.joint_speed + 1e-9
        assert np.abs(speed - qd).max() <= LIMITS.joint_acceleration * PERIOD + 1e-9
        if hand is not None:
            # What inertia of the joints adds while they brake is small.
            assert np.linalg.norm(now - hand, axis=-1).max() / PERIOD <= 1.25 * LIMITS.tcp_speed
        q, qd, hand = new, speed, now


def test_a_target_that_stands_still_is_reached_without_overshoot():
    rng = np.random.default_rng(5)
    want = HOMES + rng.uniform(-0.5, 0.5, (2, 6))
    q, qd = HOMES.copy(), np.zeros((2, 6))
    for _ in range(2500):
        q, qd = ur5_motion.limited_step(q, qd, want, np.zeros((2, 6)), PERIOD, LIMITS)
        assert ((q - want) * np.sign(want - HOMES)).max() < 1e-9
    assert np.abs(q - want).max() < 1e-6


def test_braked_is_where_braking_ends():
    q, qd, a = 0.3, 1.2, 8.0
    for _ in range(100_000):
        step = min(qd, a * 1e-5)
        q, qd = q + (qd - step / 2) * 1e-5, qd - step
        if qd == 0:
            break
    assert abs(q - ur5_motion.braked(np.array(0.3), np.array(1.2), a)) < 1e-5


def test_late_way_points_are_dropped_and_chunks_join_without_a_jump():
    trajectory = Trajectory(0.0, HOMES, np.zeros(2))
    times, goal = np.array([0.1, 0.2, 0.3]), HOMES + 0.1
    q = HOMES + np.array([0.1, 0.2, 0.3])[:, None, None]
    assert trajectory.join(0.0, times, q, np.zeros((3, 2))) == 0
    assert np.allclose(trajectory.at(0.15)[:, :6], HOMES + 0.15)
    before = trajectory.at(0.25)
    assert trajectory.join(0.25, times, np.repeat(goal[None], 3, 0), np.ones((3, 2))) == 2  # of which 0.1 and 0.2 are over
    assert np.allclose(trajectory.at(0.25), before)
    assert np.allclose(trajectory.at(0.3)[:, :6], goal) and np.allclose(trajectory.at(9.0)[:, :6], goal)
    assert trajectory.join(0.5, times, q, np.zeros((3, 2))) == 3  # all late: nothing changes
    assert np.allclose(trajectory.at(0.5)[:, :6], goal)


# --- faults, in simulated time ------------------------------------------------------------------------------------------


class Flight:
    """The twin flown by a policy that waves its hands, in simulated time, with a fault at a given moment."""

    DECISION = 0.02

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.cell, self.waves = CELL, self.rng.uniform(0.5, 1.5, (2, 6))
        self.cell.reset()
        self.arms = self.cell.arms
        self.pilot = Pilot(LIMITS, BASES, PERIOD, patience_of(CONFIG), 0.0, 0.0, self.states())

    def states(self) -> list[ArmState]:
        return [arm.state() for arm in self.arms]

    def chunk(self, now: float) -> Chunk:
        times = now + 0.05 * np.arange(1, 9)
        swing = 0.12 * np.sin(2 * np.pi * 0.8 * times)[:, None, None] * self.waves
        return Chunk(now, now, now, now, times, HOMES + swing, np.zeros((8, 2)))

    def run(self, spoil, at: float, seconds: float = 2.0) -> tuple[float, str]:
        """spoil(flight, chunk) -> chunk or None, called with every decision from `at` on. Returns: when it stopped, and why."""
        stall, spoiled = 0.0, False
        for k in range(round(seconds / PERIOD)):
            now = self.cell.data.time + stall
            try:
                if k % round(self.DECISION / PERIOD) == 0:
                    chunk = self.chunk(now)
                    if now >= at:
                        chunk, spoiled = spoil(self, chunk), True
                    if isinstance(chunk, float):
                        stall += chunk
                        now += chunk
                    elif chunk is not None:
                        self.pilot.take(now, chunk)
                states = [
                    dataclasses.replace(s, time=s.time + stall) if s is not arm.frozen else s
                    for s, arm in zip(self.states(), self.arms, strict=True)
                ]
                command = self.pilot.tick(now, states)
            except Fault as fault:
                assert spoiled, f"a stop without a fault: {fault}"
                stop_together(self.arms, CONFIG.deceleration)
                return now, str(fault)
            for arm, row in zip(self.arms, command, strict=True):
                if not getattr(self, "held", False):
                    arm.servo_joints(row[:6])
            self.cell.step()
        return np.inf, ""

    def come_to_rest(self) -> None:
        """After a stop: both arms brake together, inside their limits, and nothing is sent any more."""
        sent = [arm.sent for arm in self.arms]
        for _ in range(round(0.6 / PERIOD)):
            self.cell.step()
            q = self.cell.data.qpos[np.stack([arm.qpos for arm in self.arms])]
            LIMITS.check(q, BASES, "after the stop")
        assert [arm.sent for arm in self.arms] == sent
        assert all(arm.braking is not None for arm in self.arms)
        assert max(np.abs(self.cell.data.qvel[arm.dofs]).max() for arm in self.arms) < 0.02


CELL = ur5_twin.Cell("")


def towards(point: tuple[float, float, float], arm: int):
    """A policy that goes to a forbidden place, at a speed that is allowed."""

    def spoil(flight: Flight, chunk: Chunk) -> Chunk:
        if not hasattr(flight, "heading"):
            pose = np.eye(4)
            pose[:3, :3], pose[:3, 3] = ur5_twin.DOWN, point
            way = ur5_motion.inverse(np.linalg.inv(BASES[arm]) @ pose, HOMES[arm]) - flight.pilot.q[arm]
            flight.heading = 1.2 * way / np.abs(way).max()  # rad/s
        q = np.repeat(flight.pilot.q[None], 8, 0)
        q[:, arm] += flight.heading * 0.05 * np.arange(1, 9)[:, None]
        return dataclasses.replace(chunk, q=q)

    return spoil


def turn(flight: Flight, chunk: Chunk) -> Chunk:
    q = np.repeat(flight.pilot.q[None], 8, 0)
    q[:, 1, 5] += 0.08 * np.arange(1, 9)
    flight.pilot.limits = dataclasses.replace(LIMITS, joint_high=(6.2, 6.2, 3.1, 6.2, 6.2, float(HOMES[1, 5]) + 0.4))
    return dataclasses.replace(chunk, q=q)


def with_nan(flight: Flight, chunk: Chunk) -> Chunk:
    q = chunk.q.copy()
    q[flight.rng.integers(8), flight.rng.integers(2), flight.rng.integers(6)] = np.nan
    return dataclasses.replace(chunk, q=q)


def hold_back(flight: Flight, chunk: Chunk) -> Chunk:
    """Somebody holds the arms: commands arrive and nothing follows."""
    flight.held = True
    return dataclasses.replace(chunk, q=chunk.q + 0.6 * np.array([1, 0, 0, 0, 0, 0]))


def happens(what: str, *args):
    def spoil(flight: Flight, chunk: Chunk) -> Chunk:
        getattr(flight.arms[flight.rng.integers(2)], what)(*args)
        return chunk

    return spoil


# What goes wrong -> (how, what the reason says, how soon at the latest it has to be noticed, s; None: when it gets there)
FAULTS = {
    "workspace": (towards((0.4, -0.85, 0.3), 1), "outside its workspace", None),
    "table": (towards((0.42, -0.25, -0.05), 1), "outside its workspace", None),
    "other arm": (towards((0.4, 0.2, 0.28), 1), "between the arms", None),
    "joint": (turn, "joint 6 of the right arm", None),
    "nan": (with_nan, "NaN", 0.0),
    "shape": (lambda flight, chunk: dataclasses.replace(chunk, q=chunk.q[:, :, :5]), "joints", 0.0),
    "order": (lambda flight, chunk: dataclasses.replace(chunk, times=chunk.times[::-1]), "order", 0.0),
    "silent policy": (lambda flight, chunk: None, "the policy has seen nothing newer", CONFIG.stale_policy),
    "frozen arm": (happens("freeze"), "has not been heard of", CONFIG.stale_state),
    "protective stop": (happens("fail", "protective stop"), "protective stop", 0.0),
    "emergency stop": (happens("fail", "emergency stop"), "emergency stop", 0.0),
    "held back": (hold_back, "held back or does not follow", None),
    "stalled loop": (lambda flight, chunk: 0.25, "stood still", 0.0),
}


def inject(name: str, seed: int) -> None:
    spoil, reason, soon = FAULTS[name]
    flight = Flight(seed)
    at = float(flight.rng.uniform(0.05, 0.6))
    stopped, why = flight.run(spoil, at)
    assert any(word in why for word in reason.split("|")), why or "it went on"
    if soon is not None:
        late = stopped - at - (0.25 if name == "stalled loop" else 0)
        assert late <= soon + Flight.DECISION + 2 * PERIOD
    flight.come_to_rest()


@pytest.mark.parametrize("name", FAULTS)
def test_faults_end_in_a_stop_inside_the_limits(name):
    for seed in range(2):
        inject(name, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_faults_at_twenty_random_times(name):
    for seed in range(100, 120):
        inject(name, seed)


def test_a_flight_without_faults_does_not_stop():
    assert Flight(0).run(lambda flight, chunk: chunk, 0.5, 1.5) == (np.inf, "")


class Quick:
    """In the policy's place: answers at once that both arms stay, so that every command waits for most of its period."""

    def __init__(self):
        self.period = 0

    def start(self) -> None:
        pass

    def chunks(self, until: float) -> list[Chunk]:
        self.period += 1
        now = time.monotonic()
        return [Chunk(now, now, now, now, now + 0.1 * np.arange(1, 5), np.repeat(HOMES[None], 4, 0), np.zeros((4, 2)))]


@pytest.mark.parametrize(
    ("event", "why", "last", "missed"),
    [
        ("protective stop", "the left arm: protective stop", 9, 0),
        ("stall", "stood still", 9, 0),
        ("signal", "stopped by the operator", 9, 0),
        ("late", "time is up", None, 1),
    ],
)
def test_what_happens_while_a_command_waits_is_noticed_before_it_leaves(event, why, last, missed, monkeypatch):
    cell, worker, signals, sent, reads = ur5_twin.Cell("", time.monotonic), Quick(), [], [], []
    arm, watch = cell.arms[0], Stopwatch(0.008)
    state, servo = arm.state, arm.servo_joints

    def read():
        reads.append(worker.period)
        seen = state()
        if reads.count(10) == 1 and worker.period == 10:  # after the state that period 10's command is worked out from
            if event == "signal":
                signals.append(2)
            if event == "protective stop":
                arm.fail(event)
        if reads.count(10) == 2 and worker.period == 10:  # as it waits
            time.sleep({"stall": 0.25, "late": 1.6 * 0.008}.get(event, 0))
        return seen

    monkeypatch.setattr(arm, "state", read)
    monkeypatch.setattr(arm, "servo_joints", lambda q: (sent.append(worker.period), servo(q)))
    snapshot, config = Snapshot(np.zeros(Snapshot.HEAD)), Config(sim=True, frequency=125, seconds=0.4)
    try:
        end = robot_ur5.fly(config, cell.arms, worker, snapshot, watch, None, signals, 0.1)
    except Fault as fault:
        end = str(fault)
    assert why in end
    if last:
        assert max(sent) == last
    else:
        assert max(sent) > 20 and missed <= watch.missed <= missed + 2  # this machine may add its own


def test_the_first_target_must_be_near():
    flight = Flight(0)
    chunk = flight.chunk(0.0)
    with pytest.raises(Fault, match=r"the first target is 0\.50 rad away, at joint 2 of the left arm"):
        flight.pilot.take(0.0, dataclasses.replace(chunk, q=HOMES + np.array([[[0, 0.5, 0, 0, 0, 0], [0] * 6]]).repeat(8, 0)))


def test_a_start_outside_of_the_limits_is_refused():
    narrow = dataclasses.replace(LIMITS, box_low=((0.15, -0.25, 0.4), LIMITS.box_low[1]))
    with pytest.raises(Fault, match="the left hand at"):
        Pilot(narrow, BASES, PERIOD, patience_of(CONFIG), 0.0, 0.0, Flight(0).states())


def test_a_chunk_is_followed_for_as_long_as_replan_says():
    CELL.reset()
    pilot = Pilot(LIMITS, BASES, PERIOD, patience_of(CONFIG), 0.4, 0.0, [arm.state() for arm in CELL.arms])
    flight = Flight(0)
    for k in range(20):
        pilot.take(0.05 * k, flight.chunk(0.05 * k))
    assert pilot.chunks == 3 and pilot.captured == pytest.approx(0.95)  # at 0, 0.4, 0.8; all of them were looked at


def test_the_twins_watchdog_stops_an_arm_that_is_left_alone():
    flight = Flight(0)
    for arm in flight.arms:
        arm.set_watchdog(10)
    flight.run(lambda flight, chunk: chunk, 0.1, 0.5)
    for _ in range(round(0.1 / PERIOD) + 2):
        flight.cell.step()
    assert all("watchdog" in arm.fault for arm in flight.arms)
    flight.come_to_rest()


def test_an_arm_that_hangs_does_not_keep_the_other_from_stopping():
    class Hangs:
        def stop(self, deceleration: float) -> None:
            time.sleep(5)

    class Fails:
        def stop(self, deceleration: float) -> None:
            raise RuntimeError("no")

    CELL.reset()
    problems = stop_together([Hangs(), CELL.arms[1]], 6.0, 0.1)
    assert CELL.arms[1].braking is not None and "left arm did not answer" in problems[0]
    problems = stop_together([CELL.arms[0], Fails()], 6.0, 0.1)
    assert CELL.arms[0].braking is not None and problems == ["the right arm did not take the stop: no"]


# --- cameras --------------------------------------------------------------------------------------------------------------


class Scripted:
    """A source of pictures for tests: each is filled with its number, until it fails."""

    def __init__(self, shape=(48, 64, 3), last: int = 10**9):
        self.shape, self.last, self.count = shape, last, 0

    def open(self) -> None:
        self.count = 0

    def grab(self) -> np.ndarray:
        self.count += 1
        if self.count > self.last:
            raise OSError("unplugged")
        return np.full(self.shape, self.count % 256, np.uint8)

    def close(self) -> None:
        self.count = -1


def test_a_camera_keeps_the_newest_picture_and_its_time():
    camera = ur5_devices.Camera("head", Scripted(), 200.0, 24, (64, 48))
    first, taken = camera.read(time.monotonic(), 1.0)
    assert first.shape == (24, 24, 3)
    time.sleep(0.1)
    later, after = camera.read(time.monotonic(), 1.0)
    assert later[0, 0, 0] > first[0, 0, 0] and taken < after <= time.monotonic()
    camera.close()


def test_an_old_picture_is_a_fault_that_names_the_cause():
    camera = ur5_devices.Camera("head", Scripted(last=3), 200.0, 24)
    time.sleep(0.3)
    with pytest.raises(Fault, match=r"camera head: the newest picture is 0\.\d\d s old \(unplugged\)"):
        camera.read(time.monotonic(), 0.2)


def test_a_camera_of_another_size_or_without_pictures_is_refused():
    with pytest.raises(ValueError, match=r"camera head: it gives 64 x 48 pixels, 640 x 480 are wanted"):
        ur5_devices.Camera("head", Scripted(), 30.0, 24, (640, 480))
    with pytest.raises(ValueError, match="unplugged"):
        ur5_devices.Camera("head", Scripted(last=0), 30.0, 24)
    with pytest.raises(ValueError, match="pyrealsense2"):
        ur5_devices.Camera("head", ur5_devices.RealSense("1", (64, 48)), 30.0, 24)


def test_shrink_is_the_mean_of_the_middle():
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    small = ur5_devices.shrink(picture, 12)
    for i in range(12):
        for j in range(12):
            block = picture[4 * i : 4 * i + 4, 8 + 4 * j : 12 + 4 * j].reshape(-1, 3).astype(float)
            assert np.abs(small[i, j] - block.mean(0)).max() <= 0.501
    with pytest.raises(ValueError, match="needs 84 x 84"):
        ur5_devices.shrink(picture, 84)


def test_servo_settings_keep_to_the_manual():
    for bad in ({"gain": 99}, {"gain": 2001}, {"lookahead": 0.02}, {"lookahead": 0.3}, {"frequency": 250}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ur5_devices.ServoSettings(**bad)


def test_an_arm_with_other_joints_is_refused(monkeypatch):
    class Module:
        """ur_rtde's three modules in one, of an arm with seven joints."""

        def __init__(self, *_):
            self.connect = self.disconnect = lambda: None
            self.robotmode, self.safetystatus = (lambda: "Robotmode: RUNNING"), (lambda: "Safetystatus: NORMAL")
            self.polyscopeVersion, self.getActualQ = (lambda: "5.15.0"), (lambda: [0.0] * 7)

    Module.DashboardClient = Module.RTDEReceiveInterface = Module
    monkeypatch.setattr(ur5_devices, "ur_rtde", lambda: (Module, Module, Module))
    monkeypatch.setattr(ur5_devices.socket, "create_connection", lambda *_, **__: socket.socket())
    with pytest.raises(ValueError, match="reports 7 joints; a UR5 has 6"):
        ur5_devices.UR5Arm("here", False, ur5_devices.ServoSettings())


def test_without_the_library_the_pip_line_is_told(monkeypatch):
    for name in ("rtde_control", "rtde_receive", "dashboard_client"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install -r requirements-robot\.txt"):
        ur5_devices.ur_rtde()


# --- tasks and recordings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ur5_tasks.SCENES)
def test_experts_succeed_and_episodes_are_functions_of_their_seed(task):
    env = ur5_tasks.Table(task)
    outcomes = [ur5_tasks.episode(env, seed) for seed in (0, 1, 0)]
    assert all(success for _, success in outcomes)
    for key, value in outcomes[0][0][-1].items():
        assert np.array_equal(value, outcomes[2][0][-1][key])
    if task == "lift":
        assert env.cell.body("object")[0][2] > 0.12  # the cube is in the air, and the hand with it
        assert np.linalg.norm(env.cell.body("object")[0] - env.acting[0].hand()[:3, 3]) < 0.02


def test_recorded_episodes_survive_a_kill_and_train(tmp_path):
    env = ur5_tasks.Table("lift")
    file, kept = ur5_tasks.EpisodeFile(tmp_path / "out.hdf5"), []
    for seed in (0, 1):
        rows, _ = ur5_tasks.episode(env, seed)
        kept += rows
        file.add([{**row, "times": np.float64(k), "captured": np.float64(k)} for k, row in enumerate(rows)])
    (tmp_path / "out.episodes" / "2.tmp").write_bytes(b"half an epis")  # killed in the third
    task = envs.get_task("ur5-lift")
    data = demos.load(str(tmp_path / "out.hdf5"), "ur5-lift", task.demo_arrays, task.demo_convert)
    assert len(data.episode_ends) == 2 and np.array_equal(data.actions, np.stack([row["actions"] for row in kept]))
    assert np.array_equal(data.obs["object"], np.stack([row["object"] for row in kept]))
    again = ur5_tasks.EpisodeFile(tmp_path / "out.hdf5")
    assert again.count == 2
    with pytest.raises(ValueError, match=r"must end in \.hdf5"):
        ur5_tasks.EpisodeFile(tmp_path / "out.npz")
    (tmp_path / "mine.hdf5").write_bytes(b"")
    with pytest.raises(ValueError, match="no recording of this program"):
        ur5_tasks.EpisodeFile(tmp_path / "mine.hdf5")


# --- times ----------------------------------------------------------------------------------------------------------------


def test_the_snapshot_is_never_torn():
    values = np.zeros(Snapshot.HEAD + 3)
    snapshot, running = Snapshot(values), True

    def write() -> None:
        k = 0.0
        while running:
            k += 1
            state = ArmState(k, np.full(6, k), np.full(6, k), k)
            snapshot.write(k, [state, state], np.full(3, k))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(300):
            at, q, grip, qpos = snapshot.read()
            assert len({at, *q.ravel(), *grip, *qpos}) == 1
    finally:
        running = False
        thread.join()


def test_the_report_counts_what_happened():
    watch = Stopwatch(0.002)
    for k in range(1000):
        watch.ticks.append(0.002 * k)
        watch.work.append(0.001)
    watch.missed = 10
    for k in range(100):
        watch.took(Chunk(1.0, 1.001, 1.002, 1.004, np.zeros(1), HOMES[None], np.zeros((1, 2))))
        watch.sent(1.004 + 1e-4 * k)
    report = watch.report({"head": [0.01, 0.02]})
    stages = report["latency_ms"]
    assert stages["capture"] == [1.0] * 4 and stages["policy"] == [2.0] * 4 and stages["camera head"][3] == 20.0
    assert stages["end to end"] == pytest.approx([4 + 4.95, 4 + 9.405, 4 + 9.801, 4 + 9.9], abs=2e-3)
    assert report["servo_hz"] == 500 and report["missed_share"] == pytest.approx(10 / 1010, abs=1e-6)
    assert "10 of 1,010 periods missed" in ur5_times.table_text(report)


# --- bad input --------------------------------------------------------------------------------------------------------------


def tiny(path: Path, cameras: tuple[str, ...] = (), **changes) -> Path:
    return waving_policy(path, cameras, **TINY_MLP, **changes)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        ("", 2, "either --sim or --robot"),
        ("--sim --robot a b", 2, "either --sim or --robot"),
        ("--sim --armed", 2, "--armed is for real arms"),
        ("--robot a b", 2, "real arms need --ckpt"),
        ("--robot a a --ckpt x", 2, "named twice"),
        ("--sim --graph x.onnx", 2, "--graph needs --ckpt"),
        ("--sim --gain 5000", 2, "gain is 5000.0; servoj takes 100 to 2000"),
        ("--sim --lookahead 1", 2, "lookahead is 1.0 s"),
        ("--sim --frequency 100", 2, "frequency is 100.0 Hz"),
        ("--sim --joint-speed 4", 2, "cannot do more than 3.14"),
        ("--sim --step 0", 2, "--step is 0.0"),
        ("--sim --stale-camera nan", 2, "--stale-camera is nan"),
        ("--sim --left-box 0 0 0 1 1 0", 2, "is empty"),
        ("--sim --ckpt no/such.pt", 1, "no checkpoint at no/such.pt"),
        ("--sim --right-box 0.15 -0.75 0.5 0.75 0.25 0.7 --no-window", 1, "where the arms are now: the right hand"),
    ],
)
def test_bad_flags_are_refused_in_words(flags, status, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["robot_ur5.py", *flags.split()])
    with pytest.raises(UserError, match=message) as caught:
        robot_ur5.main()
    assert caught.value.status == status


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    cameras = tiny(tmp_path / "cameras.pt", ("head",))
    pusht = tiny(tmp_path / "pusht.pt", env="pusht", obs_shapes={"state": (20,)}, action_dim=2)
    blind = tiny(tmp_path / "object.pt", env="ur5-lift", obs_shapes={"right_pos": (3,), "object": (12,)}, action_dim=10)
    robot = {"robot": ("a", "b")}
    cases = [
        (Config(ckpt=str(cameras), **robot), r"trained with the cameras \['head'\]; given are \[\]"),
        (Config(ckpt=str(cameras), cameras=("head=v4l2:0", "left=v4l2:1"), **robot), r"given are \['head', 'left'\]"),
        (Config(ckpt=str(pusht), **robot), "was trained for pusht"),
        (Config(ckpt=str(blind), **robot), "train --env ur5-lift-image"),
    ]
    for config, message in cases:
        with pytest.raises(UserError, match=message):
            ur5_policy.read_policy(config)


def test_an_exported_graph_stands_in_for_its_policy_alone(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs requirements-export.txt")
    import evaluate

    policy, other = (Policy.load(tiny(tmp_path / "waving.pt")) for _ in range(2))
    with torch.no_grad():
        other.normalize_action.half_range *= 1.01
    path = str(tmp_path / "policy.onnx")
    evaluate.export_onnx(policy, path)
    graph = ur5_policy.Graph(path, policy)
    obs = {
        key: np.random.default_rng(0).normal(size=(1, 1, *shape)).astype(np.float32)
        for key, shape in policy.config.obs_shapes.items()
    }
    drawn = (torch.Generator().manual_seed(3) for _ in range(2))
    expected = policy.act(obs, generator=next(drawn)).numpy()
    assert np.allclose(graph.act(obs, next(drawn)), expected, atol=1e-5)
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    for wrong, mine, message in ((path, other, "is not an export"), (str(tmp_path / "broken.onnx"), policy, "cannot be read")):
        with pytest.raises(ValueError, match=message):
            ur5_policy.Graph(wrong, mine)


# --- the real client against two fake controllers on loopback -----------------------------------------------------------


@pytest.fixture(scope="module")
def fakes():
    from fake_ur import Fakes

    fakes = Fakes()
    yield fakes
    fakes.close()


LOOPBACK = Config(robot=("", ""), armed=True, frequency=125, gripper="none", stale_state=0.15, stale_policy=0.3, step=0.4)


DIED = "the process ended"


def fly_real(fakes, trouble, at: float, config: Config = LOOPBACK, seconds: float = 3.0) -> tuple[str, float, float]:
    """Fly the fakes with the real client in a process of its own, call trouble() `at` seconds after it has connected.

    Returns: why it ended (DIED where ur_rtde ended or blocked the process), when the trouble began, when the flight was over.
    """
    from fake_ur import flight

    context = multiprocessing.get_context("spawn")  # a fork may inherit locks that nobody opens
    mine, other = context.Pipe()
    arguments = other, fakes.new(), dataclasses.replace(config, seconds=seconds)
    process = context.Process(target=flight, args=arguments, daemon=True)
    process.start()
    other.close()
    assert mine.poll(60) and mine.recv() == "off"
    began = None
    if not mine.poll(at):
        began = trouble()
    try:
        why, over = mine.recv() if mine.poll(seconds + 15) else (DIED, time.monotonic())
    except (EOFError, ConnectionError):
        why, over = DIED, time.monotonic()
    process.join(5)
    process.kill()
    fakes.ask("set", [0, 1], {"frozen": False})
    return why, began or over, over


def rest_after(fakes, moment: float, seconds: float) -> None:
    """Both arms stand `seconds` after the moment, and had moved before."""
    after = np.zeros((0, 3))
    while len(after) < 10:
        assert time.monotonic() < moment + seconds + 20, "the fakes stand still themselves"
        time.sleep(0.05)
        speeds = np.array(fakes.ask("speeds"))
        before, after = speeds[speeds[:, 0] < moment], speeds[speeds[:, 0] > moment + seconds]
    assert (before[:, 1:].max(0) > 0.1).all(), "they never moved"
    assert after[:, 1:].max() < 0.05, f"still {after[:, 1:].max():.2f} rad/s"


BRAKING_S = 0.45  # from full speed to rest, the servo's lag included

# A stop ends the program on the controller, and that may be heard first, on another connection.
ENDED = "the control program on the controller has ended|did not take a servoJ"
TROUBLES = {
    "freeze": (("set", [0], {"frozen": True}), "left arm has not been heard of"),
    "drop": (("drop", [1]), f"the right arm|stood still|{DIED}"),  # ur_rtde, connecting again, holds Python's lock or aborts
    "protective stop": (("fail", [0], "protective stop"), f"the left arm: protective stop|{ENDED}"),
    "emergency stop": (("fail", [0, 1], "emergency stop"), f"emergency stop|{ENDED}"),
}


@real_client
@pytest.mark.parametrize("name", TROUBLES)
def test_what_happens_to_real_arms_stops_both(fakes, name):
    words, reason = TROUBLES[name]
    why, began, over = fly_real(fakes, lambda: fakes.ask(*words), 0.6)
    assert any(word in why for word in reason.split("|")), why
    if why != DIED:
        assert over - began < 0.1 + LOOPBACK.stale_state + 1.2  # a second for an arm that does not answer the stop
    if name != "freeze":  # a frozen controller neither obeys nor tells; its own watchdog is the fake's to freeze, too
        rest_after(fakes, began, 1 / LOOPBACK.watchdog_hz + LOOPBACK.stale_state + BRAKING_S)


@real_client
def test_a_slow_network_is_survived_or_stops(fakes):
    why, _, over = fly_real(fakes, lambda: fakes.ask("set", [0, 1], {"delay": 0.03}), 0.8, seconds=1.6)
    assert why == "time is up" or "arm" in why
    rest_after(fakes, over, 0.1 + BRAKING_S)


@real_client
def test_the_last_thing_sent_is_a_stop(fakes):
    why, _, over = fly_real(fakes, lambda: 0.0, 5.0, seconds=1.0)
    assert why == "time is up"
    rest_after(fakes, over, 0.1 + BRAKING_S)
    for log in fakes.ask("log"):
        words = [command for _, command in log if command]
        assert words[0] == 35 and 11 in words and words[-1] in (16, 255)  # watchdog, servoJ, and servoStop or the script's end


@real_client
def test_a_dry_run_sends_nothing(fakes):
    config = dataclasses.replace(LOOPBACK, armed=False)
    why, _, _ = fly_real(fakes, lambda: 0.0, 5.0, config, seconds=0.5)
    assert why == "time is up"
    assert fakes.ask("log") == [[], []]
    assert np.array(fakes.ask("speeds"))[:, 1:].max() < 0.05


@real_client
def test_arms_that_cannot_be_used_are_refused_in_words(fakes):
    servo = ur5_devices.ServoSettings(125)
    cases = [
        ({"major": 5, "remote": False}, "is in local mode"),
        ({"mode": "Robotmode: POWER_OFF"}, "not powered and released"),
        ({"safety": "Safetystatus: PROTECTIVE_STOP"}, "is stopped"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            ur5_devices.UR5Arm(fakes.new(**settings)[0], True, servo)
    with pytest.raises(ValueError, match=r"there is no UR5 at 127\.0\.0\.250"):
        ur5_devices.UR5Arm("127.0.0.250", True, servo)


# --- the whole program ------------------------------------------------------------------------------------------------------


def start_program(hosts: list[str], ckpt: Path, folder: Path) -> subprocess.Popen:
    command = [
        sys.executable,
        str(ROOT / "robot_ur5.py"),
        "--robot",
        *hosts,
        "--ckpt",
        str(ckpt),
        "--armed",
        "--frequency",
        "125",
    ]
    command += ["--gripper", "robotiq", "--device", "cpu", "--out", str(folder), "--seconds", "60", "--replan", "0.2"]
    command += [
        "--stale-policy",
        "1",
        "--stale-state",
        "0.3",
        "--watchdog-hz",
        "5",
    ]  # of a machine that does other things as well
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_motion(fakes, program: subprocess.Popen, seconds: float = 90.0) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and program.poll() is None:
        speeds = np.array(fakes.ask("speeds"))[-20:]
        if len(speeds) and speeds[:, 1:].max() > 0.1:
            return
        time.sleep(0.05)
    program.kill()
    pytest.fail(f"the arms never moved:\n{program.stdout.read()}")


def kill(fakes, folder: Path, number: int, after: float) -> subprocess.Popen:
    """Start the program, let the arms move, send it that signal, and see them stand within the watchdog's time."""
    program = start_program(fakes.new(), tiny(folder / "waving.pt"), folder)
    wait_for_motion(fakes, program)
    time.sleep(after)
    moment = fakes.ask("time")
    program.send_signal(number)
    rest_after(fakes, moment, 0.2 + BRAKING_S)
    return program


@real_client
def test_killed_in_mid_motion_the_watchdogs_stop_the_arms(fakes, tmp_path):
    program = kill(fakes, tmp_path, signal.SIGKILL, 0.3)
    assert program.wait(10) == -signal.SIGKILL


@real_client
@pytest.mark.slow
def test_killed_twenty_times(fakes, tmp_path):
    for after in np.random.default_rng(0).uniform(0, 1.5, 20):
        kill(fakes, tmp_path, signal.SIGKILL, float(after)).wait(10)


@real_client
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_operators_stop(fakes, tmp_path, number):
    program = kill(fakes, tmp_path, number, 0.3)
    text, _ = program.communicate(timeout=30)
    assert program.returncode == 128 + number, text
    assert "stopped by the operator" in text and "decisions per second" in text and (tmp_path / "report.json").exists()
