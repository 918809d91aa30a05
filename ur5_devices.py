"""What robot_ur5.py is plugged into: a UR5 behind ur_rtde, a gripper, cameras. Drivers are imported when they are first used.

    UR5Arm     state, servo_joints, servo_pose, grip, set_watchdog, kick_watchdog, stop, close     as ur5_twin.TwinArm has
    Robotiq    a 2F-85 behind its URCap, which listens on the arm's own address
    Camera     a background reader that keeps the newest picture and when it was taken, over one of four sources:
               RealSense, Orbbec, Video (OpenCV / V4L2), Rendered (the twin's)

Facts of Universal Robots' manuals: servoj takes a gain of 100 to 2000 and a lookahead of 0.03 to 0.2 s; its period is the
controller's, 0.002 s (e-Series) or 0.008 s (CB3). ur_rtde uploads a script to the controller that reads commands from RTDE
registers; that script's watchdog counts the updates of its command register and ends the program, which brakes the arm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import socket
import threading
import time
from collections.abc import Callable
from types import ModuleType

import numpy as np

from rotations import vector
from ur5_motion import ArmState, Fault


@dataclasses.dataclass(frozen=True)
class ServoSettings:
    """How servoj follows. Raises ValueError outside of Universal Robots' ranges."""

    frequency: float = 500.0  # Hz: 500 on an e-Series, 125 on a CB3
    gain: float = 300.0  # 100 .. 2000, stiffness of the servo
    lookahead: float = 0.1  # s, 0.03 .. 0.2, smooths the targets

    def __post_init__(self):
        for name, low, high, unit in (("gain", 100, 2000, ""), ("lookahead", 0.03, 0.2, " s")):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}{unit}; servoj takes {low} to {high}{unit}")
        if self.frequency not in (125, 500):
            raise ValueError(f"frequency is {self.frequency} Hz; a controller runs at 500 (e-Series) or 125 (CB3)")


def ur_rtde() -> tuple[ModuleType, ModuleType, ModuleType]:
    """The modules rtde_control, rtde_receive, dashboard_client of ur_rtde."""
    try:
        import dashboard_client
        import rtde_control
        import rtde_receive
    except ImportError as error:
        raise ImportError(f"real arms need ur_rtde: pip install -r requirements-robot.txt ({error})") from error
    return rtde_control, rtde_receive, dashboard_client


class UR5Arm:
    """One real arm. Unarmed it is only looked at: no script is uploaded and nothing can move it."""

    def __init__(self, host: str, armed: bool, servo: ServoSettings, gripper: str = "none"):
        """host: address; gripper: "robotiq" or "none". Raises ValueError where it is absent, off, in local mode or stopped."""
        control, receive, dashboard = ur_rtde()
        self.host, self.servo, self.armed = host, servo, armed
        check_dashboard(host, dashboard, armed)
        with told(host):
            self.receive = receive.RTDEReceiveInterface(host, servo.frequency)
            joints = len(self.receive.getActualQ())
            if joints != 6:
                raise ValueError(f"{host} reports {joints} joints; a UR5 has 6")
            self.control = control.RTDEControlInterface(host, servo.frequency) if armed else None
        self.gripper = Robotiq(host, armed) if gripper == "robotiq" else None
        self.stamp, self.seen, self.commanded_grip = math.nan, time.monotonic(), 0.0

    def state(self) -> ArmState:
        """What arrived last; its time is when the controller's own clock was last seen to go on."""
        stamp = self.receive.getTimestamp()
        if stamp != self.stamp:
            self.stamp, self.seen = stamp, time.monotonic()
        fault = ""
        if not self.receive.isConnected():
            fault = "the connection is lost"
        elif self.receive.isEmergencyStopped():
            fault = "emergency stop"
        elif self.receive.isProtectiveStopped():
            fault = "protective stop"
        elif self.receive.getRobotMode() != 7:
            fault = f"robot mode {self.receive.getRobotMode()}, not running"
        elif self.control is not None and not self.control.isProgramRunning():
            fault = "the control program on the controller has ended"
        grip = self.gripper.position if self.gripper else self.commanded_grip
        return ArmState(self.seen, np.array(self.receive.getActualQ()), np.array(self.receive.getActualQd()), grip, fault)

    def servo_joints(self, q: np.ndarray) -> None:
        """The target of the next period, (6,) rad. Raises Fault where the controller does not take it."""
        period, lookahead, gain = 1 / self.servo.frequency, self.servo.lookahead, self.servo.gain
        if not self.control.servoJ(q.tolist(), 0.0, 0.0, period, lookahead, gain):
            raise Fault(f"the arm at {self.host} did not take a servoJ ({self.state().fault or 'it does not say why'})")

    def servo_pose(self, pose: np.ndarray) -> None:
        """The same for a pose (4, 4) of the tool centre in the arm's base; the controller solves for the joints.

        The tool centre must be set on the controller.
        """
        target = [*pose[:3, 3].tolist(), *vector(pose[:3, :3]).tolist()]
        period, lookahead, gain = 1 / self.servo.frequency, self.servo.lookahead, self.servo.gain
        if not self.control.servoL(target, 0.0, 0.0, period, lookahead, gain):
            raise Fault(f"the arm at {self.host} did not take a servoL ({self.state().fault or 'it does not say why'})")

    def grip(self, shut: float) -> None:
        """0 open .. 1 shut; returns at once."""
        self.commanded_grip = float(np.clip(shut, 0, 1))
        if self.gripper:
            self.gripper.target = self.commanded_grip

    def set_watchdog(self, hz: float) -> None:
        if not self.control.setWatchdog(hz):
            raise Fault(f"{self.host} did not set its watchdog")

    def kick_watchdog(self) -> None:
        """Needed only while nothing is commanded: every servoJ and servoL counts as well."""
        self.control.kickWatchdog()

    def stop(self, deceleration: float) -> None:
        """Brake the tool with so many m/s^2, then end the script on the controller, so that nothing can follow. May block."""
        if self.control is not None:
            self.control.servoStop(deceleration)
            self.control.stopScript()

    def close(self) -> None:
        """Not after a fault: ur_rtde waits for a controller that hangs, and holds Python's lock meanwhile."""
        if self.gripper:
            self.gripper.close()
        with contextlib.suppress(RuntimeError):  # connections that are gone already
            if self.control is not None:
                self.control.disconnect()
            self.receive.disconnect()


@contextlib.contextmanager
def told(host: str):
    """ur_rtde's errors (RuntimeError, logic errors of many types) as ValueError with the address."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(f"the UR5 at {host} cannot be used: {' '.join(str(error).split())[:200]}") from error


def check_dashboard(host: str, dashboard: ModuleType, armed: bool) -> None:
    """Raises ValueError, before anything else is opened, unless the arm is there, powered, released and free to be driven."""
    try:
        socket.create_connection((host, 29999), timeout=2.0).close()
    except OSError as error:
        raise ValueError(
            f"there is no UR5 at {host} ({error}). Is it switched on, and is this computer in its network? Try: ping {host}"
        ) from error
    with told(host):
        client = dashboard.DashboardClient(host)
        client.connect()
        mode, safety = client.robotmode(), client.safetystatus()
        old = client.polyscopeVersion().startswith("3")  # a CB3 has no local mode
        remote = not armed or old or client.isInRemoteControl()
        client.disconnect()
    if "RUNNING" not in mode:
        raise ValueError(f"the arm at {host} is not powered and released ({mode}); switch it on at the teach pendant")
    if "NORMAL" not in safety:
        raise ValueError(f"the arm at {host} is stopped ({safety}); find out why, then clear it at the teach pendant")
    if not remote:
        raise ValueError(f"the arm at {host} is in local mode; choose Remote Control at the teach pendant")


class Robotiq:
    """A Robotiq 2F-85 behind its URCap, text on port 63352: a thread sends the newest target and reads the position."""

    def __init__(self, host: str, armed: bool):
        """armed: whether it may move. Raises ValueError where nobody answers, or the gripper is not activated."""
        try:
            self.socket = socket.create_connection((host, 63352), timeout=2.0)
            self.position = self.ask("GET POS") / 255
            active = self.ask("GET STA") == 3
        except OSError as error:
            raise ValueError(f"no Robotiq gripper at {host}:63352 ({error}); install its URCap or give --gripper none") from error
        if armed and not active:
            raise ValueError(f"the gripper at {host} is not activated; activate it at the teach pendant")
        self.target, self.armed, self.running = self.position, armed, True
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def ask(self, text: str) -> int:
        """A GET is answered by its name and a number, a SET by "ack"."""
        self.socket.sendall(text.encode() + b"\n")
        answer = self.socket.recv(256).decode().split()
        return int(answer[-1]) if text.startswith("GET") else 0

    def run(self) -> None:
        sent = -1
        while self.running:
            target = round(255 * self.target)
            with contextlib.suppress(OSError):  # an arm goes on without its gripper; the operator sees what it drops
                if self.armed and target != sent:
                    self.ask(f"SET POS {target}")
                    self.ask("SET GTO 1")
                    sent = target
                self.position = self.ask("GET POS") / 255
            time.sleep(0.03)

    def close(self) -> None:
        self.running = False
        self.thread.join(1.0)
        self.socket.close()


# --- cameras --------------------------------------------------------------------------------------------------------------


def shrink(frame: np.ndarray, side: int) -> np.ndarray:
    """The square in the middle of a picture (H, W, 3), averaged down to (side, side, 3) uint8. ValueError for a smaller one."""
    height, width = frame.shape[:2]
    crop = min(height, width)
    if crop < side:
        raise ValueError(f"the picture is {width} x {height}; the policy needs {side} x {side}")
    top, left = (height - crop) // 2, (width - crop) // 2
    square = frame[top : top + crop, left : left + crop]
    if crop == side:
        return np.ascontiguousarray(square)
    edges = np.linspace(0, crop, side + 1).astype(int)
    sums = np.add.reduceat(np.add.reduceat(square.astype(np.float32), edges[:-1], 0), edges[:-1], 1)
    return np.round(sums / np.outer(np.diff(edges), np.diff(edges))[..., None]).astype(np.uint8)


class RealSense:
    """An Intel RealSense by serial number, colour only."""

    def __init__(self, serial: str, size: tuple[int, int]):
        self.serial, self.size = serial, size

    def open(self) -> None:
        try:
            import pyrealsense2
        except ImportError as error:
            raise ImportError(f"RealSense cameras need pyrealsense2: pip install pyrealsense2 ({error})") from error
        self.pipeline, config = pyrealsense2.pipeline(), pyrealsense2.config()
        config.enable_device(self.serial)
        config.enable_stream(pyrealsense2.stream.color, *self.size, pyrealsense2.format.rgb8, 30)
        self.pipeline.start(config)

    def grab(self) -> np.ndarray:
        return np.asanyarray(self.pipeline.wait_for_frames(1000).get_color_frame().get_data())

    def close(self) -> None:
        self.pipeline.stop()


class Orbbec:
    """An Orbbec camera by serial number, colour only."""

    def __init__(self, serial: str, size: tuple[int, int]):
        self.serial, self.size = serial, size

    def open(self) -> None:
        try:
            import pyorbbecsdk as sdk
        except ImportError as error:
            raise ImportError(f"Orbbec cameras need pyorbbecsdk: see requirements-robot.txt ({error})") from error
        device = sdk.Context().query_devices().get_device_by_serial_number(self.serial)
        self.pipeline, config = sdk.Pipeline(device), sdk.Config()
        profiles = self.pipeline.get_stream_profile_list(sdk.OBSensorType.COLOR_SENSOR)
        config.enable_stream(profiles.get_video_stream_profile(*self.size, sdk.OBFormat.RGB, 30))
        self.pipeline.start(config)

    def grab(self) -> np.ndarray:
        frames = self.pipeline.wait_for_frames(1000)
        color = frames and frames.get_color_frame()
        if not color:
            raise OSError("no picture within a second")
        return np.frombuffer(color.get_data(), np.uint8).reshape(color.get_height(), color.get_width(), 3)

    def close(self) -> None:
        self.pipeline.stop()


class Video:
    """A camera of the operating system, /dev/video<number>, through OpenCV."""

    def __init__(self, number: str, size: tuple[int, int]):
        self.number, self.size = number, size

    def open(self) -> None:
        try:
            import cv2
        except ImportError as error:
            raise ImportError(f"V4L2 cameras need OpenCV: pip install opencv-python-headless ({error})") from error
        self.capture = cv2.VideoCapture(int(self.number))
        self.capture.set(cv2.CAP_PROP_FRAME_WIDTH, self.size[0])
        self.capture.set(cv2.CAP_PROP_FRAME_HEIGHT, self.size[1])
        self.capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the newest picture, not the oldest unread one

    def grab(self) -> np.ndarray:
        found, frame = self.capture.read()
        if not found:
            raise OSError("no picture")
        return frame[..., ::-1]  # OpenCV's order is blue, green, red

    def close(self) -> None:
        self.capture.release()


class Rendered:
    """A camera of the twin. make: () -> something with picture() and close(), built in the reader's thread, since a drawing
    context belongs to one thread."""

    def __init__(self, make: Callable[[], object]):
        self.make = make

    def open(self) -> None:
        self.eye = self.make()

    def grab(self) -> np.ndarray:
        return self.eye.picture()

    def close(self) -> None:
        self.eye.close()


SOURCES = {"realsense": RealSense, "orbbec": Orbbec, "v4l2": Video}


class Camera:
    """The newest picture of a source, read in a thread of its own, and the time at which its grabbing began (monotonic, s)."""

    def __init__(self, name: str, source, hz: float, side: int, size: tuple[int, int] | None = None):
        """hz: how often to grab at the most; side: pixels of the policy's picture; size: (width, height) that the source has to
        give, None: any. Waits for the first picture. Raises ValueError where none comes or it has another size.
        """
        self.name, self.source, self.hz, self.side, self.size = name, source, hz, side, size
        self.newest: tuple[np.ndarray, float] | None = None
        self.error: Exception | None = None
        self.seconds: list[float] = []  # that grabbing took, for the latency report
        self.running, self.first = True, threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True, name=f"camera {name}")
        self.thread.start()
        if not self.first.wait(20.0):
            self.error = self.error or OSError("no picture within 20 s")
        if self.error is not None:
            self.close()
            raise ValueError(f"camera {name}: {self.error}") from self.error

    def run(self) -> None:
        try:
            self.source.open()
            while self.running:
                began = time.monotonic()
                frame = self.source.grab()
                if self.size and frame.shape != (self.size[1], self.size[0], 3):
                    found = f"{frame.shape[1]} x {frame.shape[0]}"
                    raise ValueError(f"it gives {found} pixels, {self.size[0]} x {self.size[1]} are wanted (--camera-size)")
                self.newest = shrink(frame, self.side), began
                self.seconds.append(time.monotonic() - began)
                self.first.set()
                time.sleep(max(0.0, 1 / self.hz - (time.monotonic() - began)))
            self.source.close()
        except Exception as error:  # drivers fail in many ways; whoever asks for a picture is told, and the picture grows old
            self.error = error
            self.first.set()

    def read(self, now: float, stale: float) -> tuple[np.ndarray, float]:
        """The newest picture (side, side, 3) and its time. Raises Fault where it is older than `stale` seconds."""
        frame, taken = self.newest
        if now - taken > stale:
            why = f" ({self.error})" if self.error else ""
            raise Fault(f"camera {self.name}: the newest picture is {now - taken:.2f} s old{why}")
        return frame, taken

    def close(self) -> None:
        self.running = False
        self.thread.join(2.0)
