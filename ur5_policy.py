"""The policy of robot_ur5.py in a process of its own: newest pictures and states -> one network call -> way-points with times.

Here is what the policy does and what the servo knows of it. Neither waits for the other: states go through shared memory, and
way-points through a pipe.

    Snapshot    newest states of the arms, in shared memory; Mirror shows them as the twin
    Brain       observation -> actions -> way-points (Chunk); Graph runs the network where it was exported
    think       the process itself
    Worker      the process, seen from the servo's

`cfg` is robot_ur5.Config throughout.
"""

from __future__ import annotations

import collections
import multiprocessing
import os
import select
import signal
import time
from pathlib import Path

import numpy as np
import torch

import ur5_devices as devices
from common import UserError, usable_device
from encoders import kind
from policy import Policy
from ur5_motion import ARMS, ArmState, Chunk, Fault, frames, inverse, mounted, pose_of, tcp
from ur5_tasks import EXPERTS, PIXELS, SCENES, STEP_S, EpisodeFile, Table, arm_observation
from ur5_twin import BASES, CAMERAS


def bases_of(cfg) -> np.ndarray:
    """(2, 4, 4)"""
    return BASES if cfg.sim else np.stack([mounted(*cfg.left_base), mounted(*cfg.right_base)])


def read_policy(cfg, device: torch.device | str = "cpu") -> Policy | None:
    """The checkpoint, fit for these arms and cameras; None for the expert. Raises UserError where it is not."""
    if not cfg.ckpt:
        return None
    policy = Policy.load(cfg.ckpt, device)
    c = policy.config
    arms = [name for name in ARMS if f"{name}_pos" in c.obs_shapes]
    if not c.env.startswith("ur5-") or c.action_dim != 10 * len(arms) or not arms:
        raise UserError(
            f"{cfg.ckpt} was trained for {c.env}; these arms need a policy of dbp_train.py --env ur5-lift, ur5-can, ..."
        )
    if cfg.robot and "object" in c.obs_shapes:
        raise UserError(f"{cfg.ckpt} was told where the object is, as only the twin can; train --env {c.env}-image for real arms")
    wanted = {key.removesuffix("_image"): shape for key, shape in c.obs_shapes.items() if kind(shape) == "image"}
    there = set(CAMERAS) if cfg.sim else {text.partition("=")[0] for text in cfg.cameras}
    if set(wanted) != (there if cfg.robot else there & set(wanted)):
        raise UserError(
            f"{cfg.ckpt} was trained with the cameras {sorted(wanted)}; given are {sorted(there)} (--cameras name=source:number)"
        )
    if any(shape[0] != shape[1] for shape in wanted.values()):
        raise UserError(f"{cfg.ckpt} was trained with pictures of {wanted}; only square ones can be had here")
    return policy


def real_time(priority: int) -> str:
    """Put this process before others, where the system allows it. Returns: how it runs, in words."""
    if priority and hasattr(os, "sched_setscheduler"):
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
        except OSError:
            return "ordinary priority (real-time priority is not allowed here; see README)"
        return f"real-time priority {priority}"
    return "ordinary priority"


# --- what both processes see: the arms, and the twin -----------------------------------------------------


class Snapshot:
    """Newest states of the arms (and the twin's coordinates) in shared memory. One writer, any readers, nobody waits.

    The writer counts up before and after it writes; a reader that saw an odd or changed count reads again.
    """

    HEAD = 28  # count, time, q (12), qd (12), grip (2)

    def __init__(self, memory):
        """memory: a multiprocessing RawArray of doubles, HEAD + the twin's coordinates."""
        self.values = np.frombuffer(memory, np.float64)

    def write(self, now: float, states: list[ArmState], qpos: np.ndarray) -> None:
        v = self.values
        v[0] += 1
        v[1], v[2:14], v[14:26] = now, np.concatenate([s.q for s in states]), np.concatenate([s.qd for s in states])
        v[26:28], v[28:] = [s.grip for s in states], qpos
        v[0] += 1

    def read(self) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        """time, q (2, 6), grip (2,), the twin's coordinates."""
        while True:
            before = self.values[0]
            copy = self.values.copy()
            if before % 2 == 0 and self.values[0] == before:
                return float(copy[1]), copy[2:14].reshape(2, 6), copy[26:28], copy[28:]
            time.sleep(0)

    def wait(self, most: float = 0.02) -> None:
        """Until the next write, at most so many seconds: a decision that begins with a new state is the fresher for it."""
        before, until = self.values[0], time.monotonic() + most
        while self.values[0] < before + 2 and time.monotonic() < until:
            time.sleep(5e-5)


class Mirror:
    """The twin as the snapshot shows it, in another process or thread: for observations, the expert and pictures."""

    def __init__(self, task: str, snapshot: Snapshot, camera: str = "", pixels: int = PIXELS):
        self.table, self.snapshot, self.camera, self.pixels = Table(task), snapshot, camera, pixels

    def update(self) -> float:
        """Returns: the time of what it shows now."""
        at, _, _, qpos = self.snapshot.read()
        cell = self.table.cell
        cell.data.qpos[:] = qpos
        cell.mujoco.mj_forward(cell.model, cell.data)
        return at

    def picture(self) -> np.ndarray:
        self.update()
        return self.table.eye(self.camera, self.pixels).picture(self.table.cell.data)

    def close(self) -> None:
        self.table.close()


# --- the policy's process -------------------------------------------------------------------------------------------------


class Graph:
    """A policy as `evaluate.py --export` wrote it, run by onnxruntime: the same actions, in a fraction of the time on a CPU."""

    def __init__(self, path: str, policy: Policy):
        """policy: what it was exported from. Raises ImportError without onnxruntime, ValueError where it is another policy."""
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(f"--graph needs onnxruntime: pip install -r requirements-export.txt ({error})") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common type
            raise ValueError(f"--graph {path} cannot be read: {' '.join(str(error).split())[:200]}") from error
        self.policy, generator, obs = policy, torch.Generator().manual_seed(0), policy.blank_obs()
        same = [each.name for each in self.session.get_inputs()] == [*obs, "z"]
        for _ in range(5 if same else 0):
            z = policy.sample_latents(1, generator)
            apart = torch.from_numpy(self.run(obs, z)) - policy.act(obs, z).cpu()
            same &= bool((apart.abs() <= 1e-4 * policy.normalize_action.half_range.cpu()).all())
        if not same:
            raise ValueError(f"--graph {path} is not an export of --ckpt: evaluate.py --ckpt ... --export {path} makes it anew")

    def run(self, obs: dict[str, np.ndarray], z: torch.Tensor) -> np.ndarray:
        return self.session.run(None, {**obs, "z": z.cpu().numpy()})[0]

    def act(self, obs: dict[str, np.ndarray], generator: torch.Generator) -> np.ndarray:
        """As Policy.act: {key: (1, To, ...)} -> (1, Ta, Da)."""
        return self.run(obs, self.policy.sample_latents(1, generator))


class Brain:
    """Observation -> way-points. Lives in the policy's process."""

    def __init__(self, cfg, snapshot: Snapshot):
        """Opens cameras and loads the policy. Raises ValueError, OSError, ImportError, UserError."""
        self.cfg, self.snapshot, self.bases = cfg, snapshot, bases_of(cfg)
        self.into_base = np.linalg.inv(self.bases)
        self.policy = read_policy(cfg, usable_device(cfg.device))
        self.graph = Graph(cfg.graph, self.policy) if cfg.graph else None
        self.task = self.policy.config.env.split("-")[1] if self.policy else cfg.task
        self.arms = [i for i, name in enumerate(ARMS) if self.policy and f"{name}_pos" in self.policy.config.obs_shapes]
        self.arms = self.arms or list(SCENES[self.task].arms)
        self.mirror = Mirror(self.task, snapshot) if cfg.sim else None
        self.cameras = [self.camera(name) for name in self.camera_names()]
        self.generator = torch.Generator().manual_seed(cfg.seed)
        self.encoded = 0.0
        if self.policy:
            self.policy.encoder.register_forward_hook(self.note_encoded)
        self.begin()

    def camera_names(self) -> list[str]:
        if self.policy:
            return [key.removesuffix("_image") for key, shape in self.policy.config.obs_shapes.items() if kind(shape) == "image"]
        return list(CAMERAS) if self.cfg.view == "image" else []

    def camera(self, name: str) -> devices.Camera:
        cfg = self.cfg
        side = self.policy.config.obs_shapes[f"{name}_image"][0] if self.policy else PIXELS
        if cfg.sim:
            source = devices.Rendered(lambda: Mirror(self.task, self.snapshot, name, side))
            return devices.Camera(name, source, cfg.camera_hz, side)
        text = next(text for text in cfg.cameras if text.startswith(f"{name}="))
        word, _, number = text.partition("=")[2].partition(":")
        if word not in devices.SOURCES:
            raise ValueError(f"--cameras {text}: the source must be one of {', '.join(devices.SOURCES)}")
        return devices.Camera(name, devices.SOURCES[word](number, cfg.camera_size), cfg.camera_hz, side, cfg.camera_size)

    def note_encoded(self, *_) -> None:
        if self.policy.normalize_action.center.is_cuda:
            torch.cuda.synchronize()
        self.encoded = time.monotonic()

    def begin(self) -> None:
        """A new episode: no past, and the arms that do not act stay where they are."""
        self.past: collections.deque = collections.deque(maxlen=512)  # (time, observation) of the last decisions
        self.rows: list[dict] = []
        self.rest = self.snapshot.read()[1]

    def look(self) -> tuple[dict[str, np.ndarray], float, float]:
        """The newest observation, the time of the arms' states in it, and that of its oldest part."""
        if self.mirror:
            at = self.mirror.update()
            obs = self.mirror.table.sense()
            if self.cameras:
                del obs["object"]
        else:
            at, q, grip, _ = self.snapshot.read()
            hands = self.bases @ tcp(frames(q))
            obs = {}
            for i in self.arms:
                obs |= {key: x.astype(np.float32) for key, x in arm_observation(ARMS[i], hands[i], grip[i]).items()}
        now, oldest = time.monotonic(), at
        for camera in self.cameras:
            obs[f"{camera.name}_image"], taken = camera.read(now, self.cfg.stale_camera)
            oldest = min(oldest, taken)
        return obs, at, oldest

    def history(self, obs: dict, now: float) -> dict[str, np.ndarray]:
        """The last To observations, STEP_S apart as in the demonstrations, {key: (1, To, ...)}; the first one is repeated."""
        self.past.append((now, obs))
        steps = []
        for back in range(self.policy.config.obs_steps - 1, 0, -1):
            steps.append(min(self.past, key=lambda item: abs(item[0] - (now - back * STEP_S)))[1])
        return {key: np.stack([step[key] for step in (*steps, obs)])[None] for key in self.policy.config.obs_shapes}

    def decide(self) -> Chunk:
        """One decision. Raises Fault where what it would look at is too old, ValueError where the hand cannot reach."""
        obs, at, captured = self.look()
        started = time.monotonic()
        self.encoded = started
        if self.graph:
            actions = self.graph.act(self.history(obs, started), self.generator)[0].astype(np.float64)
        elif self.policy:
            actions = self.policy.act(self.history(obs, started), generator=self.generator)[0].cpu().numpy().astype(np.float64)
        else:
            actions = EXPERTS[self.task](self.mirror.table)[None]
        times = at + STEP_S * (1 + np.arange(len(actions)))  # an action says where the hand that it saw shall be then
        q_now = self.snapshot.read()[1]
        q = np.repeat(self.rest[None], len(actions), 0)
        grip = np.zeros((len(actions), 2))
        mine = actions.reshape(len(actions), len(self.arms), 10)  #                  position, 6-D rotation, grip
        poses = self.into_base[self.arms] @ pose_of(mine[..., :3], mine[..., 3:9])  # (Ta, arms, 4, 4)
        q[:, self.arms], grip[:, self.arms] = inverse(poses, q_now[self.arms]), mine[..., 9]
        if not self.rows or started - self.rows[-1]["times"] >= STEP_S - 0.01:
            when = {"times": np.float64(started), "captured": np.float64(captured)}
            self.rows.append({**obs, **when, "actions": actions[0].astype(np.float32)})
        return Chunk(captured, started, self.encoded, time.monotonic(), times, q, grip)

    def close(self) -> None:
        for camera in self.cameras:
            camera.close()


def think(connection, memory, cfg) -> None:
    """The policy's process. It hears "start", "end" (with whether to keep it), "quit"; it says "ready", "chunk", "error"."""
    torch.set_num_threads(1)  # more of them would wait for each other longer than they work
    brain = None
    try:
        try:
            brain = Brain(cfg, Snapshot(memory))
            file = EpisodeFile(Path(cfg.record)) if cfg.record else None
            for _ in range(cfg.warmup):
                brain.decide()
            brain.begin()
            real_time(cfg.priority - 1 if cfg.priority > 1 else 0)  # behind the servo
            connection.send(("ready", None))
        except (ValueError, OSError, ImportError, UserError, Fault) as error:
            connection.send(("error", str(error)))
            return
        rate = cfg.policy_hz if brain.policy else 1 / STEP_S
        running, due = False, 0.0
        while True:
            wait = max(0.0, due - time.monotonic()) if running else None
            if connection.poll(wait):
                word, keep = connection.recv()
                if word == "quit":
                    connection.send(("seconds", {camera.name: camera.seconds for camera in brain.cameras}))
                    return
                running = word == "start"
                if running:
                    brain.begin()
                    connection.send(("started", None))  # chunks before this word belong to the past
                elif keep and file:
                    file.add(brain.rows)
                    connection.send(("kept", file.count))
                continue
            if running:
                due = max(due + 1 / rate, time.monotonic())
                brain.snapshot.wait()
                connection.send(("chunk", brain.decide()))
    except (EOFError, BrokenPipeError):
        return  # the servo process is gone, and with it everything to do
    except Exception as error:  # whatever the policy does wrong, the servo must hear of it and stop
        connection.send(("error", f"{type(error).__name__}: {error}"))
    finally:
        if brain:
            brain.close()


# --- seen from the servo's process ----------------------------------------------------------------------------------------


class Worker:
    """The policy's process, seen from the servo's."""

    def __init__(self, cfg, memory):
        context = multiprocessing.get_context("spawn")  # a fork would share CUDA and drawing contexts, which cannot be
        self.connection, other = context.Pipe()
        self.process = context.Process(target=think, args=(other, memory, cfg), daemon=True, name="policy")
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is the servo's to hear
        self.process.start()
        signal.signal(signal.SIGINT, before)
        other.close()

    def wait(self, word: str, seconds: float) -> object:
        """What comes with that word, others skipped. Raises UserError for an error, a death or silence."""
        until = time.monotonic() + seconds
        try:
            while self.connection.poll(max(0.0, until - time.monotonic())):
                got, what = self.connection.recv()
                if got == "error":
                    raise UserError(str(what))
                if got == word:
                    return what
        except (EOFError, ConnectionError) as error:
            raise UserError("the policy's process died; see its output above") from error
        raise UserError(f"the policy's process said nothing for {seconds:.0f} s")

    def send(self, word: str, keep: bool = False) -> None:
        try:
            self.connection.send((word, keep))
        except (BrokenPipeError, ConnectionError) as error:
            raise Fault("the policy's process died") from error

    def start(self) -> None:
        """A new episode; what belongs to the last one is thrown away. Raises Fault where the policy does not answer."""
        self.send("start")
        try:
            self.wait("started", 5.0)
        except UserError as error:
            raise Fault(f"the policy does not start: {error}") from error

    def chunks(self, until: float) -> list[Chunk]:
        """Those that came since the last call, and the next one if it comes by `until` (monotonic, s).

        Raises Fault where the policy failed or died.
        """
        found = self.arrived()  # answers to earlier states
        pause = max(0.0, until - time.monotonic())
        if os.name == "posix":
            select.select([self.connection], [], [], pause)  # the connection's own poll counts in whole milliseconds
        else:
            self.connection.poll(pause)
        return found + self.arrived()

    def arrived(self) -> list[Chunk]:
        """Those that lie in the pipe."""
        found = []
        try:
            while self.connection.poll():
                word, what = self.connection.recv()
                if word == "error":
                    raise Fault(f"the policy failed: {what}")
                if word == "chunk":
                    found.append(what)
        except (EOFError, ConnectionError) as error:
            raise Fault("the policy's process died") from error
        return found

    def close(self) -> dict[str, list[float]]:
        """Returns: seconds per picture, by camera."""
        try:
            self.send("quit")
            seconds = self.wait("seconds", 5.0)
        except (Fault, UserError):
            seconds = {}
        self.process.join(5.0)
        if self.process.is_alive():
            self.process.terminate()
        return seconds
