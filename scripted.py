"""Scripted experts for Lift, Can, Square and Transport: way-points of the hand, read from the simulator's full state.

The human demonstrations of RoboMimic cannot be had everywhere; these can. An expert is a generator that is asked for the next
move of each arm, (displacement in metres, rotation vector in rad, gripper -1 open .. 1 closed), and that may go several ways:
which one it takes is drawn per episode, so the demonstrations have modes. Where a number rests on these demonstrations, it says
"scripted".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from manipulation import record_successes
from robomimic_tasks import STEP, TURN, Robosuite, clip_norm
from rotations import matrix, vector

OPEN, CLOSED = -1.0, 1.0
SHAKE = 0.02  # metres
TRIES = 3  # to grasp a thing: until it has left the table
STILL = np.zeros(3)
Move = tuple[np.ndarray, np.ndarray, float]
DOWN = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, -1]])  # a hand that points down, its fingers closing along the world's y


def turned(yaw: float) -> np.ndarray:
    """A hand that points down, turned about the vertical by yaw, rad."""
    return matrix(np.array([0, 0, yaw])) @ DOWN


def yaw_of(R: np.ndarray) -> float:
    return float(np.arctan2(R[1, 0], R[0, 0]))


def above(height: float) -> np.ndarray:
    return np.array([0, 0, height])


def about(rng: np.random.Generator, spread: float) -> np.ndarray:
    """Some way to the side, metres."""
    return np.array([*rng.normal(0, spread, 2), 0.0])


def nearest(angle: float, to: float, period: float) -> float:
    """angle + k * period, the one nearest to `to`."""
    return angle + period * np.round((to - angle) / period)


class Script:
    """Way-points for one arm. go() and hold() are generators of moves."""

    def __init__(self, env: Robosuite, rng: np.random.Generator, arm: int = 0):
        self.env, self.rng, self.arm = env, rng, arm

    def go(
        self,
        to: Callable[[], np.ndarray] | np.ndarray,
        hand: np.ndarray,
        grip: float,
        within: float = 0.01,
        limit: int = 80,
        carried: str = "",
        speed: float = 0.05,
        turn_within: float = 0.1,
    ) -> Iterator[Move]:
        """Until the hand (or what it carries) is `within` metres and `turn_within` rad of the goal; at most `limit` steps.

        to: position (3,) or what gives it now; hand: orientation (3, 3) of the hand, or of the body that is carried.
        """
        sum_error, sum_turn = np.zeros(3), np.zeros(3)  # near its reach the arm stops short of where it is sent
        for _ in range(limit):
            at, R = self.env.body(carried) if carried else self.env.hand(self.arm)
            error = (to() if callable(to) else to) - at
            turn = vector(hand @ R.T)
            if np.linalg.norm(error) < within and np.linalg.norm(turn) < turn_within:
                return
            if np.linalg.norm(error) < 0.03:
                sum_error, sum_turn = clip_norm(sum_error + 0.3 * error, STEP), clip_norm(sum_turn + 0.3 * turn, TURN)
            move = clip_norm(2 * error + sum_error, speed)
            yield move, clip_norm(turn + sum_turn, TURN / 2), grip

    def hold(self, grip: float, steps: int) -> Iterator[Move]:
        for _ in range(steps):
            yield STILL, STILL, grip

    def grasp(
        self,
        at: Callable[[float], np.ndarray],
        hand: Callable[[], np.ndarray],
        down: Sequence[tuple[float, float]],
        up: float,
        rise: float,
        aside: Callable[[], np.ndarray] | None = None,
    ) -> Iterator[Move]:
        """Over a thing, down to it, close, lift it; the same again, up to TRIES times, where it stayed.

        at: metres above the thing -> position; hand: orientation of each try; down: (metres above, `within`) of each way-point;
        up: metres that it is lifted; rise: what of that it must have gone to count as held; aside: where to it is moved as it
        leaves the ground, a level displacement, metres.
        """
        for _ in range(TRIES):
            R = hand()
            for height, within in down:
                yield from self.go(partial(at, height), R, OPEN, within)
            yield from self.hold(CLOSED, 8)
            lain = at(0.0)[2]
            top = self.env.hand(self.arm)[0] + above(up)
            if aside:
                yield from self.go(partial(self.rising, top + aside()), R, CLOSED, 0.025)
            else:
                yield from self.go(top, R, CLOSED, 0.04)
            if at(0.0)[2] > lain + rise:
                return

    def rising(self, top: np.ndarray) -> np.ndarray:
        """Where to from here on the way up to top: aside first, and the further that still is, the slower up, 3 mm to 3 cm.

        A function of where the hand is: a policy cannot see which of several way-points is the next.
        """
        now, _ = self.env.hand(self.arm)
        beside = (top - now) * [1, 1, 0]
        ahead = 0.003 + 0.027 * max(0.0, 1 - np.linalg.norm(beside) / 0.03)
        return now + 2 * beside + above(min(top[2] - now[2], ahead))


def lift(env: Robosuite, rng: np.random.Generator) -> Iterator[Move]:
    """Two ways to grasp the cube: across either pair of its sides."""
    script = Script(env, rng)
    _, R = env.body("cube_main")
    hand = turned(nearest(yaw_of(R), 0, np.pi / 2) + rng.choice([0, 1]) * np.pi / 2)
    cube = lambda up=0.0: env.body("cube_main")[0] + above(up)  # noqa: E731
    yield from script.go(lambda: cube(rng.uniform(0.06, 0.1)), hand, OPEN, 0.02)
    yield from script.go(lambda: cube(), hand, OPEN, 0.008)
    yield from script.hold(CLOSED, 8)
    yield from script.go(cube(0.2), hand, CLOSED)


def can(env: Robosuite, rng: np.random.Generator) -> Iterator[Move]:
    """Two ways to grasp the can and two ways round to its bin."""
    script = Script(env, rng)
    hand = turned(rng.choice([0, np.pi / 2]) + rng.normal(0, 0.15))
    at = lambda up=0.0: env.body("Can_main")[0] + above(up)  # noqa: E731
    yield from script.grasp(at, lambda: hand, [(0.12, 0.02), (0.01, 0.01)], up=0.22, rise=0.1)
    # Nearer than the middle of the bin: there the arm is nearly stretched and stalls, and nothing shows when to let go.
    x, y, _ = env.sim_env.target_bin_placements[env.sim_env.object_id] - [0.03, 0.05, 0]
    start, _ = env.hand()
    side = rng.choice([-0.08, 0.08])
    yield from script.go(np.array([(start[0] + x) / 2 + side, (start[1] + y) / 2, start[2]]), hand, CLOSED, 0.08)
    yield from script.go(np.array([x, y, start[2]]), hand, CLOSED, 0.04, turn_within=0.3)
    yield from script.go(np.array([x, y, 0.93]), hand, CLOSED, 0.02, turn_within=0.3)
    yield from script.hold(OPEN, 4)
    yield from script.go(np.array([x, y, 1.1]), hand, OPEN)


def square(env: Robosuite, rng: np.random.Generator) -> Iterator[Move]:
    """The square nut fits its peg in four ways; it goes on in any that the wrist can turn to."""
    script = Script(env, rng)
    body = "SquareNut_main"
    handle = lambda up=0.0: env.sim_env.sim.data.get_site_xpos("SquareNut_handle_site") + above(up)  # noqa: E731
    for _ in range(TRIES):
        hand = turned(nearest(yaw_of(env.body(body)[1]), 0, np.pi))
        yield from script.go(lambda: handle(0.1), hand, OPEN, 0.02)
        yield from script.go(lambda: handle(0.0), hand, OPEN, 0.008)
        yield from script.hold(CLOSED, 8)
        now, R = env.hand()
        yield from script.go(np.array([now[0], now[1], 1.05]), R, CLOSED, 0.03)
        if env.body(body)[0][2] > 0.95:
            break
    peg = env.sim_env.sim.data.body_xpos[env.sim_env.peg1_body_id].copy()
    yaw, facing = yaw_of(env.body(body)[1]), yaw_of(R @ DOWN.T)
    quarters = [q for q in np.arange(-4, 5) * np.pi / 2 if abs(q - yaw) < 2.2 and abs(facing + q - yaw) < 2]  # the wrist's reach
    quarters = [q for q in quarters if np.cos(q) < 0.5] or quarters  # a handle that points away is nearly out of reach
    level = matrix(np.array([0, 0, rng.choice(quarters)]))
    over = lambda z: np.array([peg[0], peg[1], z])  # noqa: E731
    yield from script.go(over(1.02), level, CLOSED, 0.01, carried=body, limit=120)
    yield from script.go(over(0.99), level, CLOSED, 0.003, carried=body, turn_within=0.04)
    # Round the peg, where it falls by itself; pushed further down it can jam.
    yield from script.go(over(0.93), level, CLOSED, 0.01, carried=body, speed=0.03)
    yield from script.hold(OPEN, 4)
    now, R = env.hand()
    yield from script.go(now + above(0.12), R, OPEN)


def transport(env: Robosuite, rng: np.random.Generator) -> Iterator[list[Move]]:
    """The first arm opens the box and brings the hammer, the second empties the other box meanwhile and takes over in the air.

    Two ways to grasp the rubbish. They hand over at one place: a choice that both arms must make alike is too much for a policy
    that learns from 100 episodes, which reached for the one place when the hammer was at the other.
    """
    events: set[str] = set()
    bringing, taking = bring(Script(env, rng, 0), events), take(Script(env, rng, 1), events)
    while not {"brought", "taken"} <= events:
        yield [next(bringing), next(taking)]


def stroll(script: Script) -> Iterator[Move]:
    """Up to three places on the way: so each arm comes early and late beside the other one, and none is seen to stand and wait.

    Arms that began late and stood until then taught a policy to stand, for hundreds of steps.
    """
    start, hand = script.env.hand(script.arm)
    for _ in range(script.rng.integers(0, 4)):
        aside = script.rng.uniform([-0.12, -0.12, 0], [0.12, 0.12, 0.15])
        yield from script.go(start + aside, hand, OPEN, 0.03, limit=20, turn_within=0.5)


def wait(script: Script, event: str, events: set[str], grip: float, limit: int = 300) -> Iterator[Move]:
    """Hold the place where the arm is until the other one says so."""
    at, hand = script.env.hand(script.arm)
    for _ in range(limit):
        if event in events:
            return
        yield from script.go(at, hand, grip, within=0.0, limit=1)


def on_handle(env: Robosuite, along: float) -> np.ndarray:
    """On the hammer's axis, so many metres from the middle of the handle towards the head."""
    at, R = env.body("payload_root")
    return at + along * R[:, 2]


def bring(script: Script, events: set[str]) -> Iterator[Move]:
    env, rng = script.env, script.rng
    lid = lambda up: env.body("transport_start_bin_lid_root")[0] + above(up)  # noqa: E731
    hand = turned(np.pi / 2)
    yield from stroll(script)
    yield from script.grasp(lid, lambda: hand, [(0.13, 0.03), (0.005, 0.01)], up=0.12, rise=0.06)
    aside = np.array([-0.2, -0.45, 0]) + about(rng, 0.01)
    yield from script.go(aside + above(1.05), hand, CLOSED, 0.04)
    yield from script.go(aside + above(0.85), hand, CLOSED, 0.02, limit=30)
    yield from script.hold(OPEN, 4)
    yield from script.go(aside + above(1.1), hand, OPEN, 0.04)
    yield from stroll(script)
    grip = lambda up: on_handle(env, 0.075) + above(up)  # noqa: E731
    # Where its head lies at the box's wall, friction would turn the hammer in the hand: it comes to the box's middle first and
    # goes straight up there.
    middle = lambda: (env.body("transport_start_bin_root")[0] - on_handle(env, 0.016)) * [1, 1, 0]  # noqa: E731

    def across() -> np.ndarray:
        axis = env.body("payload_root")[1][:, 2]
        return turned(nearest(np.arctan2(axis[1], axis[0]), np.pi / 2, np.pi))

    _, R = env.body("payload_root")
    yield from script.grasp(grip, across, [(0.25, 0.03), (0.1, 0.01), (0.0, 0.005)], 0.22, 0.15, middle)
    if R[1, 2] > 0:  # the handle shall point to the other arm; the wrist can turn by half a turn in this sense only
        yield from script.go(np.array([0, -0.35, 1.1]), turned(np.pi), CLOSED, 0.04)
        yaw = 3 * np.pi / 2
    else:
        yaw = np.pi / 2
    yield from script.go(np.array([0, 0, 1.08]) + about(rng, 0.01), turned(yaw), CLOSED, 0.02)
    events.add("offered")
    yield from wait(script, "held", events, CLOSED)
    yield from script.hold(OPEN, 5)
    now, R = env.hand(0)
    yield from script.go(now + above(0.15), R, OPEN, 0.04)
    events.add("brought")
    while True:
        yield STILL, STILL, OPEN


def take(script: Script, events: set[str]) -> Iterator[Move]:
    env, rng = script.env, script.rng
    trash = lambda up: env.body("trash_main")[0] + above(up)  # noqa: E731
    _, R = env.body("trash_main")
    hand = turned(nearest(yaw_of(R), -np.pi / 2, np.pi / 2) + rng.choice([0, 1]) * np.pi / 2)
    yield from stroll(script)
    yield from script.grasp(trash, lambda: hand, [(0.22, 0.03), (0.0, 0.01)], up=0.28, rise=0.12)
    bin_at = env.body("transport_trash_bin_root")[0] + about(rng, 0.02) + above(0.2)
    yield from script.go(bin_at, hand, CLOSED, 0.03)
    yield from script.hold(OPEN, 4)
    yield from stroll(script)
    hand = turned(-np.pi / 2)
    yield from script.go(np.array([0, 0.15, 1.25]) + about(rng, 0.02), hand, OPEN, 0.04)
    yield from wait(script, "offered", events, OPEN)
    end = lambda up: on_handle(env, -0.07) + above(up)  # noqa: E731
    for _ in range(TRIES):
        yield from script.go(lambda: end(0.1), hand, OPEN, 0.01)
        yield from script.go(lambda: end(0.0), hand, OPEN, 0.01, speed=0.03)
        yield from script.hold(CLOSED, 8)
        if np.abs(env.raw["robot1_gripper_qpos"]).min() > 0.008:  # metres: something is between the fingers
            break
        yield from script.hold(OPEN, 4)
    events.add("held")
    yield from wait(script, "brought", events, CLOSED)
    target = env.body("transport_target_bin_root")[0]
    now, _ = env.hand(1)
    yield from script.go(np.array([now[0], 0.3, 1.2]), hand, CLOSED, 0.05)
    # The middle of the hammer over the middle of the box, wherever the hand holds it.
    inside = target + about(rng, 0.01)

    def over(up: float) -> np.ndarray:
        at = env.hand(1)[0] + inside - on_handle(env, 0.016)
        return np.array([at[0], at[1], target[2] + up])

    yield from script.go(lambda: over(0.27), hand, CLOSED, 0.02)
    yield from script.go(lambda: over(0.12), hand, CLOSED, 0.02, limit=30)
    yield from script.hold(OPEN, 15)
    events.add("taken")
    while True:
        yield STILL, STILL, OPEN


def single(expert: Callable) -> Callable:
    """An expert of one arm, whose moves are lists of one."""

    def moves(env: Robosuite, rng: np.random.Generator) -> Iterator[list[Move]]:
        for move in expert(env, rng):
            yield [move]

    return moves


EXPERTS = {"lift": single(lift), "can": single(can), "square": single(square), "transport": transport}


def episode(env: Robosuite, seed: int, shake: float | None = None) -> tuple[list[dict], bool]:
    """One episode of the expert: rows of observations and actions, and whether it succeeded.

    A hand is pushed off its way by up to `shake` metres per step (none: SHAKE), less where it moves slowly; the action that is
    kept is what the expert meant (DART, Laskey et al. 2017). So the demonstrations show how to come back, which a policy needs
    after slips of its own. Transport's hands are turned, too (std 2 rad per metre of that level); its hammer, once lifted, would
    turn in them: from then on all is a quarter.
    """
    env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    level = rng.uniform(0, SHAKE if shake is None else shake)
    rows, success, late, lifted = [], False, False, False
    for moves in EXPERTS[env.task](env, rng):
        if env.task == "transport" and not lifted and env.body("payload_root")[0][2] > 0.9:
            lifted, level = True, level / 4
        pushed = []
        for move, turn, grip in moves:
            push = level * (0.2 + 0.8 * min(1.0, np.linalg.norm(move) / STEP)) * rng.normal(size=3)
            twist = 2 * level * rng.normal(size=3) if env.task == "transport" else STILL
            pushed.append((move + push, turn + twist, grip))
        rows.append({**env.as_in_file, "actions": env.command(moves)})
        _, _, success, late, _ = env.step(env.command(pushed))
        if success or late:
            break
    return rows, success


def record(path: Path, task: str, absolute: bool, view: str, episodes: int = 100) -> None:
    """`episodes` successes to path; manipulation.record_successes says how.

    In a process of its own, which ends with all that it has drawn with: OpenGL does not survive the fork that makes the workers
    of the environments, and the first of them to draw would wait for ever.
    """
    with ProcessPoolExecutor(1) as pool:
        pool.submit(record_here, path, task, absolute, view, episodes).result()


def record_here(path: Path, task: str, absolute: bool, view: str, episodes: int) -> None:
    env = Robosuite(task, absolute, view)
    record_successes(path, partial(episode, env), episodes)
    env.close()
