"""The twin: two UR5e arms with parallel grippers and three cameras at a table, in MuJoCo, with the methods of the real arms.

Link lengths come from the DH parameters in ur5_motion.py; masses, centres of mass and inertias are those that Universal Robots
publishes in its robot description (ur5e/physical_parameters.yaml, inertias of cylinders), torques those of its article on joint
torques. A joint is held by a position servo, as servoJ holds it; gravity is compensated, as the controller does. One simulation
step is one control period of an e-Series, 2 ms.

    cell frame      x to the front, y to the left, z up, metres; z = 0 is the table top. The bases stand at BASES.
    gripper         two fingers that close along the hand's y; 0 open (85 mm), 1 shut

The arms touch objects and the table with their grippers only: collisions of links are not simulated; the limits forbid them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from manipulation import aim, draw_without_display
from ur5_motion import ARMS, DH_A, DH_ALPHA, DH_D, HOME, LEVER, OPENING, TOOL, ArmState, frames, inverse, mounted, tcp

PERIOD = 0.002  # seconds, control period of an e-Series and simulation step
BASES = np.stack([mounted(0, 0.35, 0, math.pi), mounted(0, -0.35, 0, math.pi)])
DOWN = np.array([[0.0, -1, 0], [-1, 0, 0], [0, 0, -1]])  # a hand that points down, its fingers closing along the cell's x
REST = ((0.4, 0.25, 0.28), (0.4, -0.25, 0.28))  # where the hands begin
CAMERAS = ("left_wrist", "right_wrist", "head")
GRIP_SPEED = 2.0  # full strokes per second, 0.085 m in half a second (a 2F-85 takes 0.57 s at its fastest)

MASS = (3.761, 8.058, 2.846, 1.37, 1.3, 0.365)  # kg, from shoulder to wrist 3
COM = (
    (0, -0.00193, 0.13689),
    (-0.2125, 0, 0.11336),
    (-0.2422, 0, 0.0265),
    (0, -0.01634, 0.1315),
    (0, 0.01634, 0.0979),
    (0, 0, 0.098441),
)
INERTIA = (  # kg m^2 about the centre of mass, in the axes of the body that turns with the joint
    (0.0102675, 0.0102675, 0.00666),
    (0.0151074, 0.1338858, 0.1338858),
    (0.004095, 0.0312094, 0.0312094),
    (0.0025599, 0.0025599, 0.0021942),
    (0.0025599, 0.0025599, 0.0021942),
    (0.0000989, 0.0000989, 0.0001321),
)
TORQUE = (150, 150, 150, 28, 28, 28)  # N m
STIFFNESS = (6000, 6000, 5000, 1200, 1200, 800)  # N m / rad; with DAMPING a lag of 40 ms, as servoJ's with lookahead 0.03 to 0.1
DAMPING = (240, 240, 200, 45, 45, 30)  # N m s / rad

# What the eye sees of each link: tubes (from, to, radius, colour) in the axes of the body that turns with the joint.
GREY, BLUE, DARK = "0.78 0.79 0.8 1", "0.35 0.55 0.75 1", "0.15 0.15 0.17 1"
LOOKS = (
    (
        ((0, 0, 0.085), (0, 0, 0.1625), 0.06, GREY),
        ((0, -0.075, 0.1625), (0, 0.065, 0.1625), 0.058, GREY),
        ((0, 0.065, 0.1625), (0, 0.075, 0.1625), 0.055, BLUE),
    ),
    (
        ((0, 0, 0.075), (0, 0, 0.195), 0.058, GREY),
        ((0, 0, 0.195), (0, 0, 0.205), 0.055, BLUE),
        ((0, 0, 0.138), (-0.425, 0, 0.138), 0.046, GREY),
        ((-0.425, 0, 0.065), (-0.425, 0, 0.19), 0.05, GREY),
        ((-0.425, 0, 0.19), (-0.425, 0, 0.198), 0.047, BLUE),
    ),
    (
        ((0, 0, -0.055), (0, 0, 0.065), 0.05, GREY),
        ((0, 0, -0.063), (0, 0, -0.055), 0.047, BLUE),
        ((0, 0, 0.007), (-0.3922, 0, 0.007), 0.037, GREY),
        ((-0.3922, 0, -0.05), (-0.3922, 0, 0.07), 0.04, GREY),
    ),
    (
        ((0, 0, 0.06), (0, 0, 0.1333), 0.04, GREY),
        ((0, -0.055, 0.1333), (0, 0.045, 0.1333), 0.04, GREY),
        ((0, 0.045, 0.1333), (0, 0.053, 0.1333), 0.037, BLUE),
    ),
    (
        ((0, 0, 0.04), (0, 0, 0.0997), 0.04, GREY),
        ((0, -0.045, 0.0997), (0, 0.055, 0.0997), 0.04, GREY),
        ((0, -0.053, 0.0997), (0, -0.045, 0.0997), 0.037, BLUE),
    ),
    (((0, 0, 0.055), (0, 0, 0.0996), 0.037, "0.6 0.6 0.62 1"),),
)


# --- the model ------------------------------------------------------------------------------------------------------------


def numbers(values) -> str:
    return " ".join(f"{value:.7g}" for value in values)


def arm_xml(side: str, base: np.ndarray) -> str:
    """One arm: six nested bodies, each at its DH frame and turning about its own z, then the gripper and the wrist camera."""
    yaw = math.atan2(base[1, 0], base[0, 0])
    text = (
        f'<body name="{side}_base" pos="{numbers(base[:3, 3])}" euler="0 0 {yaw:.7g}">'
        f'<geom type="cylinder" size="0.074 0.0425" pos="0 0 0.0425" rgba="{DARK}" class="look"/>'
    )
    place, turn = (0.0, 0.0, 0.0), 0.0
    for i in range(6):
        tubes = "".join(
            f'<geom type="{"capsule" if radius in (0.046, 0.037) and i in (1, 2) else "cylinder"}" '
            f'fromto="{numbers(start)} {numbers(end)}" size="{radius}" rgba="{rgba}" class="look"/>'
            for start, end, radius, rgba in LOOKS[i]
        )
        text += (
            f'<body name="{side}_{i + 1}" pos="{numbers(place)}" euler="{turn:.9g} 0 0" gravcomp="1">'
            f'<joint name="{side}_q{i + 1}" axis="0 0 1" armature="0.1" range="-6.2832 6.2832"/>'
            f'<inertial pos="{numbers(COM[i])}" mass="{MASS[i]}" diaginertia="{numbers(INERTIA[i])}"/>{tubes}'
        )
        place, turn = (DH_A[i], 0.0, DH_D[i]), DH_ALPHA[i]
    finger = (
        '<body name="{side}_{name}" pos="0 0 0.1" euler="0 0 {turn}" gravcomp="1">'
        '<joint name="{side}_{name}" type="slide" axis="0 1 0" range="0 {half}" armature="0.2" damping="2"/>'
        '<geom type="box" size="0.012 0.007 0.032" pos="0 0.007 0.03" mass="0.05" rgba="' + DARK + '" class="pad"/>'
        '<geom type="box" size="0.012 0.01 0.01" pos="0 0.012 0.005" mass="0.02" rgba="0.45 0.45 0.47 1" class="look"/></body>'
    )
    lens = np.array([0.1, 0.0, 0.02])  # beside the gripper, looking past the finger tips
    backward = lens - [0.01, 0, TOOL + 0.02]
    backward /= np.linalg.norm(backward)
    up = np.cross(backward, [0, 1, 0])
    text += (
        f'<body name="{side}_hand" pos="0 0 {DH_D[5]}" gravcomp="1">'
        f'<geom type="cylinder" size="0.037 0.01" pos="0 0 0.01" rgba="{DARK}" mass="0.2" class="look"/>'
        f'<geom type="box" size="0.032 0.05 0.038" pos="0 0 0.058" rgba="{DARK}" mass="0.6" class="pad"/>'
        f'<geom type="box" size="0.012 0.025 0.01" pos="0.1 0 0.002" rgba="0.5 0.5 0.55 1" mass="0.05" class="look"/>'
        f'<camera name="{side}_wrist" pos="{numbers(lens)}" xyaxes="0 1 0 {numbers(up)}" fovy="70"/>'
        + finger.format(side=side, name="finger_a", turn=0, half=OPENING / 2)
        + finger.format(side=side, name="finger_b", turn=math.pi, half=OPENING / 2)
        + "</body>"
    )
    return text + "</body>" * 7


def cell_xml(objects: str) -> str:
    """The whole cell. objects: MJCF bodies of the scene."""
    servos = "".join(
        f'<position joint="{side}_q{i + 1}" kp="{STIFFNESS[i]}" kv="{DAMPING[i]}" forcerange="-{TORQUE[i]} {TORQUE[i]}"/>'
        for side in ARMS
        for i in range(6)
    ) + "".join(
        f'<position joint="{side}_{name}" kp="1500" kv="60" forcerange="-40 40"/>'
        for side in ARMS
        for name in ("finger_a", "finger_b")
    )
    return f"""
    <mujoco model="ur5 twin">
      <compiler angle="radian"/>
      <option timestep="{PERIOD}" integrator="implicitfast" cone="elliptic" impratio="10"/>
      <visual><headlight ambient="0.45 0.45 0.45" diffuse="0.45 0.45 0.45" specular="0.1 0.1 0.1"/></visual>
      <default>
        <default class="look"><geom contype="0" conaffinity="0" group="1"/></default>
        <default class="pad"><geom friction="1.5 0.05 0.001" solref="0.005 1" condim="4" group="1"/></default>
        <default class="thing"><geom friction="1 0.02 0.0005" solref="0.005 1" condim="4" group="1"/></default>
      </default>
      <asset>
        <texture name="sky" type="skybox" builtin="gradient" rgb1="0.75 0.8 0.85" rgb2="0.45 0.5 0.55" width="64" height="384"/>
        <texture name="wood" type="2d" builtin="flat" rgb1="0.72 0.62 0.5" rgb2="0.7 0.6 0.48" mark="random"
          markrgb="0.66 0.56 0.44" random="0.02" width="256" height="256"/>
        <material name="wood" texture="wood" texrepeat="2 2" specular="0.1"/>
      </asset>
      <worldbody>
        <light pos="0.6 0.4 2" dir="-0.1 -0.2 -1" diffuse="0.4 0.4 0.4" castshadow="false"/>
        <geom name="table" type="box" size="0.55 0.85 0.02" pos="0.4 0 -0.02" material="wood" friction="1 0.02 0.0005" group="1"/>
        <geom type="plane" size="3 3 0.1" pos="0 0 -0.75" rgba="0.5 0.52 0.54 1" class="look"/>
        <camera name="head" mode="fixed"/><camera name="film" mode="fixed"/>
        {arm_xml("left", BASES[0])}
        {arm_xml("right", BASES[1])}
        {objects}
      </worldbody>
      <contact>{"".join(f'<exclude body1="{side}_finger_a" body2="{side}_finger_b"/>' for side in ARMS)}</contact>
      <actuator>{servos}</actuator>
    </mujoco>"""


def home(arm: int) -> np.ndarray:
    """Joints (6,) with the hand of arm 0 or 1 at REST, pointing down."""
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = DOWN, REST[arm]
    return inverse(np.linalg.inv(BASES[arm]) @ pose, HOME)


class Cell:
    """The simulation: both arms and the objects of one scene."""

    def __init__(self, objects: str, clock: Callable[[], float] | None = None):
        """objects: MJCF; clock: what the arms stamp their states with, simulated time if None."""
        draw_without_display()
        import mujoco

        self.mujoco = mujoco
        self.model = mujoco.MjModel.from_xml_string(cell_xml(objects))
        aim(self.model.camera("head"), at=(0.4, 0.0, 0.05), place=(1.1, 0.0, 0.75), fovy=58.0)
        aim(self.model.camera("film"), at=(0.3, 0.0, 0.15), place=(1.55, 0.75, 0.95), fovy=48.0)
        self.data = mujoco.MjData(self.model)
        self.clock = clock or (lambda: self.data.time)
        self.homes = [home(0), home(1)]
        self.arms = [TwinArm(self, 0), TwinArm(self, 1)]
        self.reset()

    def reset(self) -> None:
        """Arms at home with open grippers, objects as in the model."""
        self.mujoco.mj_resetData(self.model, self.data)
        for arm, q in zip(self.arms, self.homes, strict=True):
            arm.put(q)
        self.mujoco.mj_forward(self.model, self.data)

    def step(self) -> None:
        """One control period."""
        for arm in self.arms:
            arm.drive()
        self.mujoco.mj_step(self.model, self.data)

    def body(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) and orientation (3, 3) of a body, in the cell."""
        body = self.data.body(name)
        return body.xpos.copy(), body.xmat.reshape(3, 3).copy()


class TwinArm:
    """One arm of the twin. Down to `stop` it has the methods of ur5_devices.UR5Arm; the others do what happens to real ones."""

    def __init__(self, cell: Cell, arm: int):
        self.cell, self.arm, side = cell, arm, ARMS[arm]
        model = cell.model
        self.qpos = np.array([model.joint(f"{side}_q{i}").qposadr[0] for i in range(1, 7)])
        self.dofs = np.array([model.joint(f"{side}_q{i}").dofadr[0] for i in range(1, 7)])
        self.fingers = np.array([model.joint(f"{side}_{name}").qposadr[0] for name in ("finger_a", "finger_b")])
        self.ctrl = slice(6 * arm, 6 * arm + 6)
        self.finger_ctrl = slice(12 + 2 * arm, 14 + 2 * arm)

    def put(self, q: np.ndarray) -> None:
        """Joints at q, at rest, gripper open, nothing wrong."""
        data = self.cell.data
        data.qpos[self.qpos], data.qpos[self.fingers] = q, OPENING / 2
        data.ctrl[self.ctrl], data.ctrl[self.finger_ctrl] = q, OPENING / 2
        self.target, self.braking = q.copy(), None
        self.grip_target, self.grip_now = 0.0, 0.0
        self.fault, self.frozen, self.watchdog, self.kicked = "", None, math.inf, data.time
        self.sent = 0  # commands that arrived, so that tests see what moved the arm

    # The control interface.

    def state(self) -> ArmState:
        if self.frozen is not None:
            return self.frozen
        data = self.cell.data
        opening = float(data.qpos[self.fingers].sum())
        grip = float(np.clip(1 - opening / OPENING, 0, 1))
        return ArmState(self.cell.clock(), data.qpos[self.qpos].copy(), data.qvel[self.dofs].copy(), grip, self.fault)

    def servo_joints(self, q: np.ndarray) -> None:
        """The target of the next period, (6,) rad."""
        self.kick_watchdog()
        if not self.fault:
            self.target, self.braking = np.array(q, np.float64), None
            self.sent += 1

    def servo_pose(self, pose: np.ndarray) -> None:
        """The same for a pose (4, 4) of the tool centre in the arm's base; ValueError out of reach."""
        self.servo_joints(inverse(pose, self.target))

    def grip(self, shut: float) -> None:
        """0 open .. 1 shut."""
        self.grip_target = float(np.clip(shut, 0, 1))

    def set_watchdog(self, hz: float) -> None:
        """From now on the arm stops by itself when 1 / hz seconds pass without a command or a kick."""
        self.watchdog, self.kicked = 1 / hz, self.cell.data.time

    def kick_watchdog(self) -> None:
        self.kicked = self.cell.data.time

    def stop(self, deceleration: float) -> None:
        """Slow the hand down with so many m/s^2 and hold; what was commanded before is forgotten."""
        if self.braking is None:
            self.braking = self.cell.data.qvel[self.dofs].copy(), deceleration / LEVER
        self.watchdog = math.inf

    # What happens to arms.

    def fail(self, fault: str) -> None:
        """A protective or emergency stop: the arm brakes hard and obeys nobody until somebody clears it by hand."""
        self.stop(10.0)
        self.fault = fault

    def freeze(self) -> None:
        """The connection hangs: states stay what they are."""
        self.frozen = self.state()

    def drive(self) -> None:
        """One control period of the controller: watchdog, braking, and the target for the servo."""
        data = self.cell.data
        if data.time - self.kicked > self.watchdog:
            self.fail("watchdog: no command in time")
        if self.braking is not None:
            speed, deceleration = self.braking
            slower = np.sign(speed) * np.maximum(np.abs(speed) - deceleration * PERIOD, 0)
            self.target, self.braking = self.target + slower * PERIOD, (slower, deceleration)
        data.ctrl[self.ctrl] = self.target
        step = GRIP_SPEED * PERIOD
        self.grip_now += float(np.clip(self.grip_target - self.grip_now, -step, step))
        data.ctrl[self.finger_ctrl] = (1 - self.grip_now) * OPENING / 2

    def hand(self) -> np.ndarray:
        """Measured pose (4, 4) of the tool centre, in the cell."""
        return BASES[self.arm] @ tcp(frames(self.cell.data.qpos[self.qpos]))
