"""Two controllers on loopback for tests: what the real ur_rtde client needs of them, with the twin behind, and ways to fail.

Each answers at an address of its own, 127.x.y.z, on the real ports:

    29999   dashboard: a line of text for a line of text
    30003   script upload: a program that defines rtde_control() starts running when its last line has come
    30004   RTDE, protocol 2: recipes of inputs and outputs, then a package of outputs every period, of inputs when they change
    63352   the gripper's URCap

The uploaded program is not interpreted. `Controller.obey` does what ur_rtde's control script does with its command register
(input_int_register_0), which the client writes and the script answers in output_int_register_0: 1 ready, 2 done. Facts of the
protocol are Universal Robots' RTDE guide and ur_rtde's documented register use.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import socket
import struct
import threading
import time

import numpy as np

import robot_ur5
import ur5_devices
import ur5_policy
import ur5_times
from ur5_motion import Chunk, Fault, frames, tcp
from ur5_twin import PERIOD, Cell, TwinArm, home

VERSION, SETUP_IN, SETUP_OUT, START, PAUSE, DATA, CONTROL_VERSION = b"VIOSPUv"
READY, DONE = 1, 2
SERVOJ, SERVOL, SERVO_STOP, SET_WATCHDOG, STOP_SCRIPT = 11, 24, 16, 35, 255
STOPPED, PLAYING = 1, 2  # runtime_state
RUNNING = 7  # robot_mode
VECTORS = [
    "target_q",
    "target_qd",
    "target_qdd",
    "target_current",
    "target_moment",
    "actual_q",
    "actual_qd",
    "actual_current",
    "joint_control_output",
    "actual_TCP_pose",
    "actual_TCP_speed",
    "actual_TCP_force",
    "target_TCP_pose",
    "target_TCP_speed",
    "joint_temperatures",
    "actual_joint_voltage",
    "ft_raw_wrench",
    "payload_inertia",
]
TYPES = {
    **dict.fromkeys(VECTORS, ("VECTOR6D", "6d")),
    **dict.fromkeys(("actual_tool_accelerometer", "payload_cog"), ("VECTOR3D", "3d")),
    **dict.fromkeys(("actual_digital_input_bits", "actual_digital_output_bits"), ("UINT64", "Q")),
    **dict.fromkeys(("runtime_state", "robot_status_bits", "safety_status_bits"), ("UINT32", "I")),
    **dict.fromkeys(("robot_mode", "safety_mode"), ("INT32", "i")),
    "joint_mode": ("VECTOR6INT32", "6i"),
}


def kind_of(name: str) -> tuple[str, str]:
    """RTDE's type of a variable and struct's."""
    if "_int_register_" in name:
        return "INT32", "i"
    return TYPES.get(name, ("DOUBLE", "d"))


class Controller:
    """One arm's controller. The tests set: mode, safety, remote before a connection; freeze, drop, fail, delay at any time."""

    def __init__(self, host: str, arm: TwinArm, major: int):
        """major: 3, a CB3 with 125 periods per second, or 5, an e-Series with 500."""
        self.host, self.arm, self.major = host, arm, major
        self.mode, self.safety, self.remote = "Robotmode: RUNNING", "Safetystatus: NORMAL", True
        self.frozen, self.delay = False, 0.0
        self.ints, self.doubles, self.outs = [0] * 48, [0.0] * 48, [0] * 48
        self.playing, self.executing, self.braking = False, False, False
        self.watchdog, self.heard = np.inf, time.monotonic()
        self.log: list[tuple[float, int]] = []  # (time, command) of what arrived, servo commands in a row once
        self.clients: list[Client] = []
        self.sockets: list[socket.socket] = []
        self.servers = [
            self.listen(port, serve)
            for port, serve in ((29999, self.dashboard), (30003, self.script), (30004, self.rtde), (63352, self.gripper))
        ]

    def listen(self, port: int, serve) -> socket.socket:
        server = socket.create_server((self.host, port))

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self.sockets.append(connection)
                    threading.Thread(target=self.guard, args=(serve, connection), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return server

    def guard(self, serve, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, struct.error):  # a client that went away
            serve(connection)
        connection.close()

    # The ports.

    def dashboard(self, connection: socket.socket) -> None:
        connection.sendall(b"Connected: Universal Robots Dashboard Server\n")
        answers = {
            "polyscopeversion": f"URSoftware {self.major}.15.0.100000 (Jan 01 2023)",
            "get serial number": "20205500001",
            "is in remote control": str(self.remote).lower(),
            "robotmode": self.mode,
            "safetystatus": self.safety,
            "stop": "Stopped",
        }
        for line in connection.makefile():
            connection.sendall(answers.get(line.strip().lower(), "could not understand").encode() + b"\n")

    def script(self, connection: socket.socket) -> None:
        text = ""
        while block := connection.recv(65536):
            text += block.decode()
            if re.match(r"\s*def rtde_control\(\):", text) and text.endswith("\nend\n"):
                text, self.playing, self.executing, self.outs[0] = "", True, False, READY
                self.ints[0] = 0

    def gripper(self, connection: socket.socket) -> None:
        for line in connection.makefile():
            words = line.split()
            if words[:2] == ["SET", "POS"]:
                self.arm.grip(int(words[2]) / 255)
            value = {"POS": round(255 * self.arm.state().grip), "STA": 3}.get(words[1], 0)
            connection.sendall(b"ack" if words[0] == "SET" else f"{words[1]} {value}\n".encode())

    def rtde(self, connection: socket.socket) -> None:
        client = Client(connection)
        while True:
            size, word = struct.unpack(">HB", receive(connection, 3))
            body = receive(connection, size - 3)
            while self.frozen:
                time.sleep(0.01)
            if word == VERSION:
                client.send(word, b"\x01")
            elif word == CONTROL_VERSION:
                client.send(word, struct.pack(">4I", self.major, 15, 0, 0))
            elif word == SETUP_OUT:
                client.every = 1 / struct.unpack(">d", body[:8])[0]
                client.outputs = body[8:].decode().strip(",").split(",")
                client.format = ">B" + "".join(kind_of(name)[1] for name in client.outputs)
                client.send(word, b"\x01" + ",".join(kind_of(name)[0] for name in client.outputs).encode())
            elif word == SETUP_IN:
                client.recipes.append(body.decode().strip(",").split(","))
                kinds = ",".join(kind_of(name)[0] for name in client.recipes[-1])
                client.send(word, struct.pack(">B", len(client.recipes)) + kinds.encode())
            elif word in (START, PAUSE):
                client.send(word, b"\x01")
                client.started = word == START
                if client.started and client not in self.clients:
                    self.clients.append(client)
            elif word == DATA:
                self.take(client.recipes[body[0] - 1], body[1:])

    def take(self, names: list[str], body: bytes) -> None:
        if self.delay:
            time.sleep(self.delay)
        values = struct.unpack(">" + "".join(kind_of(name)[1] for name in names), body)
        for name, value in zip(names, values, strict=True):
            if name.startswith("input_double_register_"):
                self.doubles[int(name.rsplit("_", 1)[1])] = value
        for name, value in zip(names, values, strict=True):
            if name.startswith("input_int_register_"):
                self.ints[int(name.rsplit("_", 1)[1])] = value
        if names[0] == "input_int_register_0":
            self.heard = time.monotonic()
            if not self.log or self.log[-1][1] != values[0]:
                self.log.append((self.heard, values[0]))

    # The controller's own life, called once per period.

    def obey(self) -> None:
        """What the control script does in one period, and the watchdog that RTDE keeps for it."""
        if not self.playing or self.frozen:
            return
        if time.monotonic() - self.heard > self.watchdog or self.arm.fault:
            self.end()
            return
        command = self.ints[0]
        if command == SERVOJ:
            self.arm.servo_joints(np.array(self.doubles[:6]))
        if command == SERVOL:
            self.arm.servo_pose(pose_of_vector(self.doubles[:6]))
        if command in (0, SERVOJ, SERVOL):
            self.executing, self.outs[0] = False, READY
            return
        if not self.executing:
            self.executing, self.outs[0] = True, 0
            if command == STOP_SCRIPT:
                self.end()
            elif command == SET_WATCHDOG:
                self.watchdog = 1 / self.doubles[0]
            elif command == SERVO_STOP:
                self.arm.stop(self.doubles[0])
        if command != SERVO_STOP or np.abs(self.arm.state().qd).max() < 0.01:  # stopl returns when the arm stands
            self.outs[0] = DONE

    def end(self) -> None:
        """The program ends, by its own word or by the watchdog: the controller brakes the arm."""
        self.arm.stop(4.0)
        self.playing, self.watchdog = False, np.inf

    def publish(self, now: float) -> None:
        if self.frozen:
            return
        state, fault = self.arm.state(), self.arm.fault
        protective, emergency = "protective" in fault, "emergency" in fault
        pose = tcp(frames(state.q))[:3, 3]
        values = {
            "timestamp": now,
            "actual_q": state.q,
            "actual_qd": state.qd,
            "target_q": self.arm.target,
            "actual_TCP_pose": [*pose, 0, 0, 0],
            "robot_mode": RUNNING,
            "safety_mode": 3 if protective else 7 if emergency else 1,
            "runtime_state": PLAYING if self.playing else STOPPED,
            "robot_status_bits": 1 | 2 * self.playing,
            "safety_status_bits": protective << 2 | emergency << 7 or 1,
            **{f"output_int_register_{i}": self.outs[i] for i in range(24)},
        }
        for client in list(self.clients):
            if client.started and now - client.last >= 0.9 * client.every:
                client.last = now
                try:
                    client.publish(values)
                except OSError:
                    self.clients.remove(client)

    def drop(self) -> None:
        """Every connection breaks, and nobody can connect again."""
        for server in self.servers:
            server.close()
        for connection in self.sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


class Client:
    """One RTDE connection."""

    def __init__(self, connection: socket.socket):
        self.connection, self.lock = connection, threading.Lock()
        self.recipes: list[list[str]] = []
        self.outputs: list[str] = []
        self.started, self.every, self.last, self.format = False, 0.008, 0.0, ""

    def send(self, word: int, body: bytes) -> None:
        with self.lock:
            self.connection.sendall(struct.pack(">HB", 3 + len(body), word) + body)

    def publish(self, values: dict) -> None:
        flat: list[float] = [1]
        for name in self.outputs:
            count = int(kind_of(name)[1][:-1] or 1)
            value = values.get(name, 0)
            flat += [*value, *[0] * (count - len(value))] if np.ndim(value) else [value] * count
        self.send(DATA, struct.pack(self.format, *flat))


def receive(connection: socket.socket, size: int) -> bytes:
    block = b""
    while len(block) < size:
        more = connection.recv(size - len(block))
        if not more:
            raise OSError("the client went away")
        block += more
    return block


def pose_of_vector(values: list[float]) -> np.ndarray:
    from rotations import matrix

    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = matrix(np.array(values[3:])), values[:3]
    return pose


class Workcell:
    """Both controllers over one twin, in real time, in a thread of their own."""

    def __init__(self, major: int, settings: dict):
        block = "127." + ".".join(map(str, np.random.default_rng().integers(1, 250, 2)))
        self.cell = Cell("")
        pairs = zip((f"{block}.1", f"{block}.2"), self.cell.arms, strict=True)
        self.controllers = [Controller(host, arm, major) for host, arm in pairs]
        for controller in self.controllers:
            vars(controller).update(settings)
        self.period, self.running = 0.002 if major > 3 else 0.008, True
        self.speeds: list[tuple[float, float, float]] = []  # (time, fastest joint of the left, of the right arm)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        began, steps = time.monotonic(), 0
        while self.running:
            now = time.monotonic()
            for controller in self.controllers:
                controller.obey()
            due = min(int((now - began) / PERIOD), steps + 100)
            for _ in range(due - steps):
                self.cell.step()
            steps = due
            self.speeds.append((now, *(float(np.abs(arm.cell.data.qvel[arm.dofs]).max()) for arm in self.cell.arms)))
            for controller in self.controllers:
                controller.publish(now)
            time.sleep(max(0.0, self.period - (time.monotonic() - now)))

    def close(self) -> None:
        self.running = False
        self.thread.join()
        for controller in self.controllers:
            controller.drop()


def serve(connection) -> None:
    """The process of the fakes: ur_rtde holds Python's lock while it connects, so nothing in its own process could answer it.

    It ends at once where the tests do, however they end: what waits for its output would wait for ever.
    """
    workcell = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            word, *what = connection.recv()
            if word == "new":
                if workcell:
                    workcell.close()
                workcell = Workcell(*what)
                connection.send([controller.host for controller in workcell.controllers])
                continue
            controllers = workcell.controllers
            if word == "set":
                for i in what[0]:
                    vars(controllers[i]).update(what[1])
            elif word == "fail":
                for i in what[0]:
                    controllers[i].arm.fail(what[1])
            elif word == "drop":
                for i in what[0]:
                    controllers[i].drop()
            answer = time.monotonic()
            if word == "speeds":
                answer = workcell.speeds
            elif word == "log":
                answer = [controller.log for controller in controllers]
            connection.send(answer)
    os._exit(0)


class Fakes:
    """The tests' side of that process."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other,), daemon=True)
        self.process.start()
        other.close()

    def ask(self, *words):
        self.connection.send(words)
        assert self.connection.poll(60), "the fakes do not answer"
        return self.connection.recv()

    def new(self, major: int = 3, **settings) -> list[str]:
        """Fresh controllers, arms at home. Returns: addresses of the left and the right one."""
        return self.ask("new", major, settings)

    def close(self) -> None:
        self.process.terminate()
        self.process.join()


# --- a flight of the fakes in a process of its own, which ur_rtde may end or block ---------------------------------------


class Waves:
    """In the policy's place: both arms wave, 50 decisions per second."""

    def __init__(self):
        self.last = 0.0

    def start(self) -> None:
        self.began = time.monotonic()
        self.homes = np.stack([home(0), home(1)])

    def chunks(self, until: float) -> list[Chunk]:
        time.sleep(0.001)
        now = time.monotonic()
        if now - self.last < 0.02:
            time.sleep(max(0.0, until - now))
            return []
        self.last = now
        times = now + 0.1 * np.arange(1, 5)
        swing = 0.15 * np.sin(2 * np.pi * 0.7 * (times - self.began))[:, None, None] * np.array([1, 0.3, 0.3, 1, 1, 1])
        return [Chunk(now, now, now, now, times, self.homes + swing, np.zeros((4, 2)))]


def flight(connection, hosts: list[str], config) -> None:
    """Ends as robot_ur5.py does after a fault, without closing: ur_rtde may wait, or abort, there."""
    arms = [ur5_devices.UR5Arm(host, config.armed, ur5_devices.ServoSettings(125), config.gripper) for host in hosts]
    connection.send("off")
    try:
        snapshot = ur5_policy.Snapshot(np.zeros(ur5_policy.Snapshot.HEAD))
        why = robot_ur5.fly(config, arms, Waves(), snapshot, ur5_times.Stopwatch(0.008), None, [], 0.1)
    except Fault as fault:
        why = str(fault)
    connection.send((why, time.monotonic()))
    os._exit(0)
