"""A trained policy on two UR5 arms with three cameras, real or simulated: over 100 decisions per second, and safe.

    python robot_ur5.py --sim                                               the scripted expert does Transport in the twin
    python robot_ur5.py --sim --ckpt runs/ur5-lift/dbp.pt --episodes 10     a trained policy in the twin
    python robot_ur5.py --sim --task lift --episodes 50 --record my.hdf5    demonstrations for dbp_train.py --demos my.hdf5
    python robot_ur5.py --robot 10.0.0.2 10.0.0.3 --ckpt dbp.pt             dry run: looks at everything, moves nothing
    python robot_ur5.py --robot 10.0.0.2 10.0.0.3 --ckpt dbp.pt --armed     the arms move

FOR THE OPERATOR. Stand where you reach an emergency stop. The arms move only with --armed. Ctrl-C stops both; so does any fault,
and the reason is the last line. Stops are never cleared from here: look for the cause, clear it at the teach pendant, start
again. If this program dies, the controllers' watchdogs stop the arms. README has the whole procedure, and what these limits
are not: a certified safety function. Set the safety limits of the controllers first.

Two processes and one clock (monotonic, shared by both):

    policy    newest pictures and states -> observation -> one network call -> way-points with times (Chunk), at its own rate
    servo     every control period: newest way-points -> limits -> one command for each arm (ur5_motion.Pilot) -> new states

A late or dead policy cannot stall the servo, which goes on along its way-points and stops when they are too old. A stage ends at

    captured     the oldest thing that the observation holds, a picture's grabbing or a state's arrival
    started      observation complete          encoded    through the encoders
    ready        way-points in joints          sent       the first command after they arrived
"""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

import ur5_devices as devices
from common import UserError, catch_signals, plain_errors, run_main
from ur5_motion import ARMS, LEVER, Fault, Limits, Patience, Pilot, frames, tcp
from ur5_policy import Snapshot, Worker, bases_of, read_policy, real_time
from ur5_tasks import STEP_S, Twin
from ur5_times import Stopwatch, plot, table_text


@dataclasses.dataclass(frozen=True)
class Config:
    sim: bool = False  # run the twin
    robot: tuple[str, str] | None = None  # run real arms: addresses of the left and the right one
    armed: bool = False  # real arms: let them move; without it nothing is sent to them
    ckpt: str = ""  # the policy, of dbp_train.py --env ur5-...; empty, with --sim: the scripted expert
    graph: str = ""  # the same policy as evaluate.py --export wrote it: onnxruntime needs a fraction of torch's time on a CPU
    task: Literal["lift", "can", "transport"] = "transport"  # what the scripted expert does
    view: Literal["state", "image"] = "state"  # what a recording of the expert holds; image: three cameras
    seconds: float = 60.0  # longest episode, s
    episodes: int = 1  # one behind the other; twin only
    seed: int = 100_000  # of the first start in the twin; the next episode has the next one
    record: str = ""  # write the episodes to this .hdf5 (twin: those that succeed), for dbp_train.py --demos
    out: str = "runs/robot"  # report.json, latency.png, twin.gif
    window: bool = True  # twin: a window, where there is a display

    policy_hz: float = 125.0  # decisions per second of a policy, at the most; the scripted expert takes 10
    replan: float = 0.0  # s that the arms follow one chunk before they turn to the newest; 0: its executed prefix, as trained
    device: str = "auto"  # of the network: auto (cuda where there is one), cpu, cuda
    warmup: int = 30  # policy calls before anything moves
    priority: int = 50  # of the servo process among real-time ones, 1 .. 99, where the system allows it; 0: ordinary

    frequency: float = 500.0  # control periods per second: 500 on an e-Series, 125 on a CB3
    servo: Literal["joints", "pose"] = "joints"  # real arms: servoJ, or servoL with the controller's own inverse kinematics
    gain: float = 300.0  # of servoJ and servoL, 100 .. 2000
    lookahead: float = 0.1  # s, of servoJ and servoL, 0.03 .. 0.2
    gripper: Literal["robotiq", "none"] = "robotiq"  # real arms: a 2F-85 behind its URCap
    cameras: tuple[str, ...] = ()  # real arms: name=source:number, as left_wrist=realsense:<serial> head=orbbec:<serial> x=v4l2:0
    camera_size: tuple[int, int] = (640, 480)  # width and height that the cameras are asked for; the middle is shrunk
    camera_hz: float = 30.0  # pictures per second and camera
    left_base: tuple[float, float, float, float] = (0.0, 0.35, 0.0, 3.14159265)  # base in the cell: x, y, z in m, yaw in rad
    right_base: tuple[float, float, float, float] = (0.0, -0.35, 0.0, 3.14159265)  # measure yours

    left_box: tuple[float, ...] = (0.15, -0.25, 0.012, 0.75, 0.75, 0.7)  # workspace of the left hand, x y z low, x y z high, m
    right_box: tuple[float, ...] = (0.15, -0.75, 0.012, 0.75, 0.25, 0.7)  # ... of the right one
    joint_range: tuple[float, ...] = (6.2, 6.2, 3.1, 6.2, 6.2, 6.2)  # joints stay within +- this, rad
    joint_speed: float = 2.0  # rad/s; a UR5e can 3.14
    joint_acceleration: float = 12.0  # rad/s^2, of commands
    tcp_speed: float = 0.8  # m/s, of each hand
    step: float = 0.3  # rad, from a measured to its commanded joint
    clearance: float = 0.03  # m, air between the arms
    start: float = 0.35  # rad, from where the arms are to the first target
    deceleration: float = 6.0  # m/s^2, of the hands when they stop
    watchdog_hz: float = 10.0  # the controllers stop the arms when commands come less often; so does this program
    stale_state: float = 0.1  # s, age at which an arm's state is too old
    stale_camera: float = 0.3  # s, age at which a picture is too old
    stale_policy: float = 0.3  # s, age at which what the policy last saw is too old


def check(cfg: Config) -> None:
    """Refuse settings that cannot work. Raises UserError, status 2."""
    if cfg.sim == (cfg.robot is not None):
        raise UserError("give either --sim or --robot LEFT RIGHT", 2)
    if cfg.armed and cfg.sim:
        raise UserError("--armed is for real arms; the twin needs no permission", 2)
    if cfg.graph and not cfg.ckpt:
        raise UserError("--graph needs --ckpt, the policy that it was exported from: it says what the graph sees and does", 2)
    if cfg.robot and not cfg.ckpt:
        raise UserError("real arms need --ckpt; the scripted expert knows where objects are, which only the twin can tell", 2)
    if cfg.robot and cfg.robot[0] == cfg.robot[1]:
        raise UserError(f"--robot {cfg.robot[0]} is named twice; give the addresses of two arms", 2)
    if cfg.robot and cfg.episodes != 1:
        raise UserError("--episodes is for the twin; real arms do one episode, and somebody sets the table again", 2)
    positive = (
        "seconds",
        "episodes",
        "camera_hz",
        "joint_speed",
        "joint_acceleration",
        "tcp_speed",
        "step",
        "clearance",
        "start",
    )
    if not 0 <= cfg.replan < float("inf"):
        raise UserError(f"--replan is {cfg.replan}; it must be a number of seconds from 0 on", 2)
    for name in (*positive, "deceleration", "watchdog_hz", "stale_state", "stale_camera", "stale_policy"):
        if not 0 < getattr(cfg, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; it must be above 0", 2)
    if not 1 <= cfg.policy_hz <= 1000 or cfg.warmup < 1 or not 0 <= cfg.priority <= 99:
        raise UserError("--policy-hz must be 1 to 1000, --warmup at least 1, --priority 0 to 99", 2)
    for name in ("left_box", "right_box", "joint_range"):
        if len(getattr(cfg, name)) != 6:
            raise UserError(f"--{name.replace('_', '-')} holds {len(getattr(cfg, name))} numbers; it must be 6", 2)
    for box in (cfg.left_box, cfg.right_box):
        if not (np.array(box[:3]) < box[3:]).all():
            raise UserError(f"the workspace {box} is empty: its first three numbers must lie below its last three", 2)
    if cfg.joint_speed > 3.1416:
        raise UserError(f"--joint-speed is {cfg.joint_speed} rad/s; a UR5e cannot do more than 3.14", 2)
    with plain_errors(2):
        devices.ServoSettings(cfg.frequency, cfg.gain, cfg.lookahead)


def limits_of(cfg: Config) -> Limits:
    return Limits(
        box_low=(cfg.left_box[:3], cfg.right_box[:3]),
        box_high=(cfg.left_box[3:], cfg.right_box[3:]),
        joint_low=tuple(-x for x in cfg.joint_range),
        joint_high=cfg.joint_range,
        joint_speed=cfg.joint_speed,
        joint_acceleration=cfg.joint_acceleration,
        joint_braking=0.7 * cfg.deceleration / LEVER,  # a servo lags, and so does the beginning of a stop
        tcp_speed=cfg.tcp_speed,
        step=cfg.step,
        clearance=cfg.clearance,
        start=cfg.start,
    )


def patience_of(cfg: Config) -> Patience:
    return Patience(tick=1 / cfg.watchdog_hz, state=cfg.stale_state, policy=cfg.stale_policy)


def stop_together(arms: list, deceleration: float, seconds: float = 1.0) -> list[str]:
    """Stop both arms at once: each from a thread of its own, since a controller that hangs blocks whoever talks to it.

    Returns: what went wrong, in words. An arm that did not answer is left to its watchdog, which nobody kicks any more.
    """
    problems: list[str] = []

    def stop(name: str, arm) -> None:
        try:
            arm.stop(deceleration)
        except Exception as error:  # a stop that fails must not keep the other arm from stopping
            problems.append(f"the {name} arm did not take the stop: {error}")

    threads = [threading.Thread(target=stop, args=pair, daemon=True) for pair in zip(ARMS, arms, strict=True)]
    for thread in threads:
        thread.start()
    for name, thread in zip(ARMS, threads, strict=True):
        thread.join(seconds)
        if thread.is_alive():
            problems.append(f"the {name} arm did not answer the stop; its watchdog has to stop it")
    return problems


def end_unless_called_again(seconds: float) -> None:
    """A dead man's switch: unless this is called again, or cancelled, within so many seconds, the process ends, and prints where
    it was. ur_rtde holds Python's lock while it waits for a controller that does not answer; the arms stand by then (watchdogs),
    and the operator shall hear of it.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)


LEAD = 0.0005  # s before a command is due that it is worked out at the latest; what takes longer makes it late
AWAKE = 0.00015  # s before a command is due that nobody sleeps any more: a sleep ends when the system pleases


def fly(
    cfg: Config,
    arms: list,
    worker: Worker,
    snapshot: Snapshot,
    watch: Stopwatch,
    twin: Twin | None,
    signals: list[int],
    replan: float,
) -> str:
    """One episode. Returns why it ended. Raises Fault. Whatever happens, the last thing that the arms are sent is a stop."""
    period, bases = watch.period, bases_of(cfg)
    pilot = Pilot(limits_of(cfg), bases, period, patience_of(cfg), replan, time.monotonic(), [arm.state() for arm in arms])
    moving = cfg.sim or cfg.armed
    switched = 0.0
    if cfg.robot:
        end_unless_called_again(10.0)
    try:
        if moving:
            for arm in arms:
                arm.set_watchdog(cfg.watchdog_hz)
        worker.start()
        began = due = pilot.last = pilot.captured = time.monotonic()
        while True:
            # The next command is worked out as soon as the policy answers to the last state, or shortly before it is due: so it
            # leaves on time, and a state becomes a command within a period where the policy is quick enough.
            due += period
            chunks = worker.chunks(due - LEAD)
            woke = time.monotonic()
            if cfg.robot and woke - switched > 0.5:
                switched = woke
                end_unless_called_again(3.0)
            if woke - began > cfg.seconds:
                return "time is up"
            goes = max(woke, due)  # when it will be sent, at the earliest
            states = [arm.state() for arm in arms]
            for chunk in chunks:
                pilot.take(goes, chunk)
                watch.took(chunk)
                if not moving:  # nothing will follow the way-points, so each is looked at now
                    for q in chunk.q:
                        pilot.limits.check(q, bases, "a way-point of the policy")
            command = pilot.tick(goes, states)
            if not moving:
                pilot.hold(goes)
            prepared = time.monotonic() - woke

            # The time until it is due may be most of a period: a last look at what happened meanwhile, then it leaves.
            time.sleep(max(0.0, due - AWAKE - time.monotonic()))
            if signals:
                return "stopped by the operator"
            states = [arm.state() for arm in arms]
            while (now := time.monotonic()) < due:
                pass
            pilot.look(now, states)
            watch.ticks.append(now)
            if now - due > period:  # late by whole periods: they are counted, and not made up for
                skipped = int((now - due) / period)
                watch.missed += skipped
                due += skipped * period
            for arm, row in zip(arms, command, strict=True) if moving else ():
                if not pilot.chunks:
                    arm.kick_watchdog()  # nothing to do yet
                    continue
                if cfg.servo == "pose":
                    arm.servo_pose(tcp(frames(row[:6])))
                else:
                    arm.servo_joints(row[:6])
                arm.grip(row[6])
            watch.sent(time.monotonic())
            ended = twin.advance(now) if twin else ""
            states = [arm.state() for arm in arms]
            snapshot.write(time.monotonic(), states, twin.cell.data.qpos if twin else np.zeros(0))  # the policy waits for it
            watch.work.append(prepared + time.monotonic() - now)
            if ended:
                return ended
    finally:
        watch.dropped += pilot.dropped
        if cfg.robot:
            end_unless_called_again(60.0)  # enough for the stop, the report and closing
        impatience = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the stop
        for problem in stop_together(arms, cfg.deceleration) if moving else []:
            print(problem, file=sys.stderr)
        signal.signal(signal.SIGINT, impatience)


def warm(
    worker: Worker, arms: list, snapshot: Snapshot, coordinates: np.ndarray, signals: list[int], seconds: float = 180.0
) -> None:
    """Until the policy is ready, with states that stay fresh. Raises UserError where it fails or takes longer."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not worker.connection.poll(0.01):
        if signals:
            raise KeyboardInterrupt
        snapshot.write(time.monotonic(), [arm.state() for arm in arms], coordinates)
    worker.wait("ready", 0.0)


def main() -> None:
    # ---- config -----------------------------------------------------------------------------------------------------
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    check(cfg)
    policy = read_policy(cfg)
    task = policy.config.env.split("-")[1] if policy else cfg.task
    out = Path(cfg.out)

    # ---- arms, twin, policy -----------------------------------------------------------------------------------------
    twin = None
    with plain_errors():
        if cfg.sim:
            twin = Twin(task, cfg.window)
            twin.reset(cfg.seed)
            arms = twin.cell.arms
        else:
            servo = devices.ServoSettings(cfg.frequency, cfg.gain, cfg.lookahead)
            arms = [devices.UR5Arm(host, cfg.armed, servo, cfg.gripper) for host in cfg.robot]
    signals = catch_signals()
    coordinates = twin.cell.data.qpos if twin else np.zeros(0)
    memory = multiprocessing.get_context("spawn").RawArray("d", Snapshot.HEAD + len(coordinates))
    snapshot, watch = Snapshot(memory), Stopwatch(1 / cfg.frequency)
    states = [arm.state() for arm in arms]
    try:
        limits_of(cfg).check(np.stack([state.q for state in states]), bases_of(cfg), "where the arms are now")
    except Fault as fault:
        raise UserError(f"{fault}. Move the arms, or widen the limits") from fault
    snapshot.write(time.monotonic(), states, coordinates)
    worker = Worker(cfg, memory)
    body = "the twin" if cfg.sim else "real arms" if cfg.armed else "real arms, DRY RUN: nothing is sent to them"
    print(f"{task} on {body}: {cfg.ckpt or 'the scripted expert'}; waiting for the policy to warm up", flush=True)
    # A hundred ever so slightly different plans per second, each followed for its first hundredth, would never get to what comes
    # later in them: a plan that begins with waiting would wait for ever. So the arms follow one for as long as in training.
    replan = cfg.replan or (policy.config.action_steps * STEP_S if policy else 0.0)
    endings, fault = [], None
    try:
        warm(worker, arms, snapshot, coordinates, signals)
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection takes longer than a period
        print(f"servo at {cfg.frequency:g} Hz, {real_time(cfg.priority)}; Ctrl-C stops both arms", flush=True)

        # ---- loop ---------------------------------------------------------------------------------------------------
        for episode in range(cfg.episodes):
            if twin:
                twin.reset(cfg.seed + episode)
                snapshot.write(time.monotonic(), [arm.state() for arm in arms], coordinates)
            endings.append(fly(cfg, arms, worker, snapshot, watch, twin, signals, replan))
            worker.send("end", keep=not twin or endings[-1] == "success")
            print(f"episode {episode + 1}: {endings[-1]}", flush=True)
            if signals:
                break
    except Fault as error:
        fault = error
    finally:
        gc.enable()
        if cfg.priority and hasattr(os, "sched_setscheduler"):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # what follows may wait
        if twin:
            speed = twin.settle()
            print(f"the twin's arms stand still (fastest joint {speed:.3f} rad/s)")
        seconds = worker.close()

    # ---- report -----------------------------------------------------------------------------------------------------
    report = {"task": task, "endings": endings, "fault": str(fault or ""), **watch.report(seconds)}
    print(table_text(report))
    with plain_errors():
        plot(watch, out / "latency.png")
        (out / "report.json").write_text(json.dumps(report) + "\n")
        if twin and twin.film:
            twin.write_film(out / "twin.gif")
    if twin:
        twin.close()
    print(f"{endings.count('success')} of {len(endings)} episodes succeeded; see {out}" if twin else f"see {out}")
    if cfg.robot and fault:
        print(f"error: stopped: {fault}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(3)  # the ordinary way out closes connections, which waits for a controller that may hang
    for arm in arms if cfg.robot else ():
        arm.close()
    faulthandler.cancel_dump_traceback_later()
    if fault:
        raise UserError(f"stopped: {fault}", 3)
    if signals:
        sys.exit(128 + signals[0])


if __name__ == "__main__":
    run_main(main)
