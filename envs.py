"""Tasks, one table row each: what the scripts need to know of them. Their environments are vectorised (vector.py)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

import blockpush
import cubes
import kitchen
import locomotion
import manipulation
import pusht
import robomimic_tasks
import scripted
import ur5_tasks
from vector import Arrays, GymVector, SimulationError


@dataclasses.dataclass(frozen=True)
class Task:
    """One row: what the scripts need to know of a task."""

    name: str
    score: str  # what `score` measures, for people
    obs_shapes: dict[str, tuple[int, ...]]  # shape of one step of each observation key
    action_dim: int
    make: Callable[[int, int], object] | None  # (num_envs, obs_steps) -> vectorised environment; None: nothing is evaluated
    demo_arrays: tuple[str, ...]  # arrays to read from a demonstration file, as far as it has them
    demo_convert: Callable[[Arrays], tuple[Arrays, np.ndarray]]  # those arrays -> (obs, actions), environment units
    demo_mirror: Callable[[Arrays], Arrays] | None = None  # those arrays -> the same episodes in the task's mirror, if it has one
    demo_recombine: Callable[[Arrays, np.ndarray, int], tuple[Arrays, np.ndarray]] | None = None  # ... and ends -> more episodes
    demo_record: Callable[[Path], None] | None = None  # makes the embedded demonstrations on first use, where they are recorded
    demo_origin: str = ""  # ... and who acts there
    demo_scripted: bool = False  # ... it is a scripted expert, and demo_record takes episodes=N
    demo_expert: Callable[[Path, Path], None] | None = None  # (file to make, policy) the same with an expert policy that is given
    # For dfp_finetune.py. Observations -> reward and end of each step, as the environment would have given them; None: the reward
    # is -1 per step until success. (Observations, episode ends) -> success of each step; None: at the end of every demonstration.
    # Where neither holds, `sparse` is False.
    demo_rewards: Callable[[Arrays], tuple[np.ndarray, np.ndarray]] | None = None
    demo_success: Callable[[Arrays, np.ndarray], np.ndarray] | None = None
    # Where success is a goal that is held for a while, observations -> at the goal: a step that leads there costs nothing. A
    # price until success would depend on how long the goal has been held so far, which no observation tells.
    reached: Callable[[Arrays], np.ndarray] | None = None
    sparse: bool = True
    shift: Callable[[dict, torch.Tensor], dict] | None = None  # the observation of a scene that stands elsewhere
    # (Observation, chunk, offset) -> the observation of a hand that stands beside its way, and the chunk that leads it back
    nudge: Callable[[dict, torch.Tensor, torch.Tensor], tuple[dict, torch.Tensor]] | None = None
    make_training: Callable[[int, int], object] | None = None  # the same for dbpo_finetune.py, where another is faster
    side_by_side: int = 100  # environments of an evaluation; one that draws takes 100 MB
    stages: int = 1  # subtasks of an episode; score is the share of them that is done
    train: dict[str, object] = dataclasses.field(default_factory=dict)  # defaults of dbp_train.py that this task changes
    finetune: dict[str, object] = dataclasses.field(default_factory=dict)  # and of dbpo_finetune.py
    improve: dict[str, object] = dataclasses.field(default_factory=dict)  # and of dfp_finetune.py

    def check(self, obs_steps: int) -> None:
        """Build one environment and look at it: ImportError or ValueError where a simulator is missing or cannot draw."""
        if self.make is None:
            raise ValueError(f"{self.name} has no environment (make is None in its row of envs.TASKS): nothing to act in")
        env = self.make(1, obs_steps)
        try:
            env.reset([0])
        except SimulationError as error:
            raise ValueError(f"{self.name} does not run here: {error}") from error
        finally:
            env.close()


def get_task(name: str) -> Task:
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 5, 0.4)
        families = sorted({task.split("-")[0] for task in TASKS})
        raise ValueError(
            f"unknown task {name!r}; near to it are {', '.join(near) or 'none'}, of {len(TASKS)}: {', '.join(families)}"
        )
    return TASKS[name]


# Training and fine-tuning of each body. A decision of Hopper lasts for 4 steps, as in the papers; a cheetah's stride is no longer
# than that and needs an eye on every step (benchmark/trials.md).
LOCOMOTION = {
    "hopper": ({"action_steps": 4, "cond_width": 256}, {}),
    "walker2d": (
        {"action_steps": 2, "cond_width": 128, "width": 64},
        {
            "env_steps": 3_000_000,
            "decisions": 50,
            "minibatch": 500,
            "clip": 0.2,
            "target_kl": 0.05,
            "sigma_start": 0.1,
            "anchor": 0.3,
        },
    ),
    "halfcheetah": (
        {"action_steps": 1, "cond_width": 256},
        {
            "env_steps": 1_000_000,
            "decisions": 50,
            "minibatch": 500,
            "actor_lr": 4e-5,
            "gamma": 0.98,
            "clip": 0.2,
            "target_kl": 0.05,
            "sigma_start": 0.1,
            "anchor": 0.1,
        },
    ),
    "ant": (
        {"action_steps": 1, "cond_width": 128, "width": 64},
        {
            "env_steps": 2_000_000,
            "decisions": 50,
            "minibatch": 500,
            "clip": 0.2,
            "target_kl": 0.05,
            "sigma_start": 0.1,
            "anchor": 0.1,
            "eval_every": 50,
        },
    ),
}


def locomotion_task(body: str, level: str) -> Task:
    obs_dim, action_dim = locomotion.OBS_DIMS[body]
    train, finetune = LOCOMOTION[body]
    return Task(
        name=f"{body}-{level}-v2",
        score="undiscounted return",
        obs_shapes={"state": (obs_dim,)},
        action_dim=action_dim,
        make=partial(locomotion.Locomotion, body=body),
        demo_arrays=("observations", "actions", "rewards"),
        demo_convert=partial(locomotion.locomotion_demos, obs_dim=obs_dim, action_dim=action_dim),
        demo_record=partial(locomotion.record_locomotion, body=body, levels=level.split("-")),
        demo_origin="recorded with our own behaviour policy, not D4RL's",
        sparse=False,
        # The spread in these data is the behaviour's noise, not a choice between ways to act: latents of std 0.2 act better
        # than 1, and the observation needs no noise, the data have enough.
        train={
            "obs_steps": 1,
            "horizon": 4,
            "obs_noise": 0.0,
            "latent_scale": 0.2,
            "steps": 3_000,
            "eval_every": 1_500,
            **train,
        },
        finetune=finetune,
    )


def adroit_task(task: str, view: str) -> Task:
    shapes, actions = manipulation.adroit_shapes(task, view), manipulation.ADROIT[task].actions
    return Task(
        name=f"adroit-{task}" + ("" if view == "state" else f"-{view}"),
        score="success",
        obs_shapes=shapes,
        action_dim=actions,
        make=partial(GymVector, partial(manipulation.Adroit, task, view)),
        side_by_side=100 if view == "state" else 20,
        # Minari's and the human demonstrations hold states, an expert's recorded episodes hold what the policy is to see
        demo_arrays=("observations", "actions", "rewards", *shapes, "action"),
        demo_convert=partial(manipulation.adroit_demos, shapes=shapes, action_dim=actions),
        demo_expert=partial(manipulation.record_adroit, task=task, view=view),
        demo_success=partial(manipulation.adroit_success, task=task) if task in manipulation.ADROIT_REACHED else None,
        reached=partial(manipulation.adroit_reached, task=task) if task in manipulation.ADROIT_REACHED else None,
        train={"obs_steps": 2, "horizon": 4, "action_steps": 3, "batch_size": 64, "steps": 3_000, "eval_every": 1_500}
        | {"latent_scale": 0.2, "eval_episodes": 20, "report_episodes": 20}
        | {"state_scale": "std", "obs_noise": 0.0, "backbone": "tanh"}
        | ({"point_widths": (32, 64, 128), "point_dim": 16} if view == "points" else {}),
    )


def metaworld_task(task: str, view: str) -> Task:
    shapes = manipulation.metaworld_shapes(view)
    return Task(
        name=f"metaworld-{task}" + ("" if view == "state" else f"-{view}"),
        score="success",
        obs_shapes=shapes,
        action_dim=4,
        make=partial(GymVector, partial(manipulation.MetaWorld, task, view)),
        side_by_side=100 if view == "state" else 20,
        demo_arrays=(*shapes, "action", "actions"),
        demo_convert=partial(manipulation.plain_demos, shapes=shapes, action_dim=4),
        demo_record=partial(manipulation.record_metaworld, task=task, view=view),
        demo_origin="Meta-World's scripted expert",
        demo_scripted=True,
        shift=manipulation.shift_scene if view == "points" else None,
        nudge=manipulation.beside_its_way if view == "points" else None,
        # The experts look at the newest state alone, and so do the policies: To = 1. Ten demonstrations cover few places: clouds
        # are measured from the hand, and the scene stands elsewhere in each minibatch. Slim latents: the experts have one way to
        # act, and of 100 starts one policy for basketball succeeded in 0.79 and 0.83 with latents of 0.8 and 0.2. A nudged hand
        # shows how to come back: reach, where the hand has to stop within 2 cm of what it sees, went from 0.67 to 1.00.
        train={
            "obs_steps": 1,
            "horizon": 4,
            "action_steps": 3,
            "batch_size": 128,
            "steps": 3_000,
            "obs_noise": 0.005,
            "eval_every": 1_500,
            "eval_episodes": 20,
            "report_episodes": 20,
        }
        | (
            {"point_widths": (32, 64, 128), "cloud_origin": "robot", "shift": 0.1, "nudge": 0.02, "latent_scale": 0.2}
            if view == "points"
            else {}
        ),
    )


def robomimic_task(task: str, absolute: bool, view: str) -> Task:
    make = partial(robomimic_tasks.Robosuite, task, absolute, view)
    return Task(
        name=task + ("-abs" if absolute else "") + ("-image" if view == "image" else ""),
        score="success",
        obs_shapes=robomimic_tasks.shapes(task, view),
        action_dim=(10 if absolute else 7) * robomimic_tasks.SCENES[task].arms,
        make=partial(GymVector, make, processes=True),
        side_by_side=10,  # each of them builds its scene in two seconds
        demo_arrays=(*robomimic_tasks.file_shapes(task, view), "actions", "env_args"),
        demo_convert=partial(robomimic_tasks.robomimic_demos, task=task, absolute=absolute, view=view),
        demo_recombine=robomimic_tasks.recombine if (task, view) == ("transport", "state") else None,
        demo_record=partial(scripted.record, task=task, absolute=absolute, view=view) if task in scripted.EXPERTS else None,
        demo_origin="our own scripted expert, not robomimic's humans",
        demo_scripted=task in scripted.EXPERTS,
        # From 8 steps out of 16 to 4 out of 8: square went from 0.87 to 0.93 of 30 selection starts.
        train={"horizon": 8, "action_steps": 4, "obs_noise": 0.005, "steps": 5_000, "eval_every": 2_500}
        | {"eval_episodes": 30, "report_episodes": 50}
        | ({"steps": 10_000, "eval_every": 5_000} if task == "tool-hang" else {})  # a long one
        # Two arms meet in the air. Of 30 starts 0.07 with 8 steps from one look to the next; 0.37, 0.53, 0.50 with 4, 2, 1; of 28
        # 0.82 with 1, twice the steps, and demonstrations whose arms are recombined, which pictures cannot be.
        | (
            {"horizon": 4, "action_steps": 1, "obs_noise": 0.02, "steps": 10_000, "eval_every": 10_000}
            if task == "transport"
            else {}
        )
        | ({"recombine": 2, "steps": 20_000} if (task, view) == ("transport", "state") else {})
        | ({"obs_steps": 1, "batch_size": 64} if view == "image" else {}),
        # Success alone is rewarded, so an iteration is a few dozen bits of news; and the ratio and the KL of a chunk are of 28
        # numbers and more together, so that limits which suit a body of three joints (0.2 and 0.05) stop nearly every update.
        finetune={"env_steps": 500_000, "num_envs": 10, "decisions": 100, "minibatch": 500, "epochs": 8, "critic_only": 3}
        | {"actor_lr": 2e-5, "actor_lr_end": 1e-5, "clip": 0.5, "target_kl": 1.0, "anchor": 0.1, "latent_scale": 0.5}
        | {"eval_every": 20, "eval_episodes": 30},
        improve={"temperatures": (0.005, 0.05), "positives": 2, "candidates": 4},  # as published
    )


def cube_task(size: str, task: int) -> Task:
    return Task(
        name=f"cube-{size}-task{task}",
        score="success",
        obs_shapes={"state": (cubes.features(size),)},
        action_dim=cubes.ACTIONS,
        make=partial(GymVector, partial(cubes.Cubes, size, task), processes=True),
        make_training=partial(GymVector, partial(cubes.Cubes, size, task)),  # one environment: no need to wait for messages
        side_by_side=5,  # half a gigabyte each: the imports, the model and what compiling it leaves
        demo_arrays=("state", "action", "observations", "actions"),
        demo_convert=partial(cubes.play_demos, size=size),
        demo_record=partial(cubes.record_play, size=size),
        demo_origin="play of OGBench's own oracle, recorded here",
        demo_scripted=True,
        demo_rewards=partial(cubes.rewards, size=size, task=task),
        # OGBench's policies look at the newest state alone
        train={"obs_steps": 1, "horizon": 5, "action_steps": 5, "temperatures": (0.05,), "steps": 10_000, "eval_every": 5_000}
        | {"obs_noise": 0.0, "latent_scale": 1.0, "report_episodes": 50},
    )


def ur5_task(task: str, view: str) -> Task:
    shapes = ur5_tasks.shapes(task, view)
    return Task(
        name=f"ur5-{task}" + ("-image" if view == "image" else ""),
        score="success",
        obs_shapes=shapes,
        action_dim=ur5_tasks.actions(task),
        make=partial(GymVector, partial(ur5_tasks.Table, task, view)),
        side_by_side=10,
        demo_arrays=(*shapes, "actions"),
        demo_convert=partial(manipulation.plain_demos, shapes=shapes, action_dim=ur5_tasks.actions(task)),
        demo_record=partial(ur5_tasks.record, task=task, view=view),
        demo_origin="our own scripted expert in the twin",
        demo_scripted=True,
        # The experts have no memory, and so To = 1. A step lasts for a tenth of a second: 0.4 s from one look to the next.
        train={
            "obs_steps": 1,
            "horizon": 8,
            "action_steps": 4,
            "obs_noise": 0.005,
            "latent_scale": 0.5,
            "batch_size": 128,
            "steps": 4_000,
            "eval_every": 2_000,
            "eval_episodes": 30,
            "report_episodes": 50,
        },
    )


TASKS = {
    "pusht": Task(
        name="pusht",
        score="largest coverage / 0.95",
        obs_shapes={"state": (20,)},
        action_dim=2,
        make=partial(GymVector, pusht.make_env),
        make_training=partial(GymVector, pusht.make_env, processes=True),
        demo_arrays=("state", "action"),
        demo_convert=pusht.state_demos,
        demo_mirror=pusht.mirror,
        # Success is rare and late: large batches, small noise that lasts for a chunk, slim latents (dbpo_finetune.py, Config).
        finetune={
            "env_steps": 12_000_000,
            "gamma": 0.97,
            "num_envs": 32,
            "decisions": 80,
            "minibatch": 640,
            "actor_lr": 1.5e-5,
            "actor_lr_end": 5e-6,
            "critic_only": 3,
            "gae_lambda": 0.9,
            "clip": 0.2,
            "target_kl": 0.05,
            "anchor": 0.05,
            "latent_scale": 0.4,
            "sigma_start": 0.04,
            "sigma_min": 0.02,
            "noise_color": 2.0,
            "eval_every": 20,
            "eval_episodes": 100,
        },
        improve={"temperatures": (0.2,)},  # as stage 1
    ),
}
TASKS["pusht-image"] = Task(
    name="pusht-image",
    score=TASKS["pusht"].score,
    obs_shapes=pusht.IMAGE_SHAPES,
    action_dim=2,
    make=partial(GymVector, partial(pusht.make_env, "image")),
    demo_arrays=("img", "state", "action"),
    demo_convert=pusht.image_demos,
    demo_mirror=pusht.mirror,
    demo_record=pusht.record_images,
    demo_origin="the embedded states, drawn",
    train={"batch_size": 64, "steps": 28_000, "eval_every": 7_000, "mirror": True},
)
TASKS["blockpush"] = Task(
    name="blockpush",
    score="share of the two targets filled",
    stages=2,
    obs_shapes={"state": (16,)},
    action_dim=2,
    make=partial(GymVector, blockpush.BlockPush),
    demo_arrays=("state", "action"),
    demo_convert=partial(manipulation.plain_demos, shapes={"state": (16,)}, action_dim=2),
    demo_record=blockpush.record_blockpush,
    demo_origin="a scripted oracle",
    demo_scripted=True,
    # Millimetres decide which way a block slips: hardly any noise on the observation. Chunks are short because a point that
    # pushes soon slips; 2, 4 and 6 steps between two looks scored alike, by 50 episodes.
    train={
        "horizon": 8,
        "action_steps": 2,
        "latent_scale": 0.5,
        "obs_noise": 0.002,
        "cond_width": 256,
        "steps": 8_000,
        "eval_every": 4_000,
        "report_episodes": 50,
    },
)
TASKS["kitchen"] = Task(
    name="kitchen",
    score="subtasks done / 4",
    stages=kitchen.SUBTASKS,
    obs_shapes={"state": (kitchen.FEATURES,)},
    action_dim=kitchen.ACTIONS,
    make=partial(GymVector, kitchen.Kitchen),
    side_by_side=10,  # a model of 100 MB each
    demo_arrays=("observations/observation", "actions", "rewards", "observations_seq", "actions_seq"),
    demo_convert=kitchen.kitchen_demos,
    sparse=False,  # not every demonstration ends with all four
    # To 2, Tp 16, Ta 8 are the defaults. SILENT: the rest is Push-T's, untried: the data could not be had here. The data hold the
    # noise of the sensors already.
    train={"steps": 30_000, "obs_noise": 0.01, "eval_every": 10_000, "eval_episodes": 20, "report_episodes": 50},
)
TASKS |= {
    task.name: task
    for body in locomotion.BODIES
    for level in ("medium", "medium-expert")
    for task in [locomotion_task(body, level)]
}
TASKS |= {
    task.name: task for name in manipulation.ADROIT for view in ("state", "image", "points") for task in [adroit_task(name, view)]
}
TASKS |= {task.name: task for size in cubes.SIZES for k in range(1, cubes.TASKS + 1) for task in [cube_task(size, k)]}
TASKS |= {
    task.name: task
    for name in robomimic_tasks.SCENES
    for absolute in (False, True)
    for view in ("state", "image")
    for task in [robomimic_task(name, absolute, view)]
}
TASKS |= {
    task.name: task
    for name in [name for group in manipulation.METAWORLD.values() for name in group]
    for view in ("state", "image", "points")
    for task in [metaworld_task(name, view)]
}
TASKS |= {task.name: task for name in ur5_tasks.SCENES for view in ("state", "image") for task in [ur5_task(name, view)]}
