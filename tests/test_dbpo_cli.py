"""dbpo_finetune.py as a command, on Hopper with a tiny untrained policy: files, numbers, kill and resume, bad input, two ranks."""

import json
import math
import os
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from conftest import ROOT, TINY_MLP
from test_cli import assert_refused, flags, metrics, run, same, start, wait
from test_evaluate import CONTRACT

from common import load_checkpoint
from dbpo_finetune import PRESETS
from policy import Policy, PolicyConfig

SCRIPT, EVALUATE, TASK = str(ROOT / "dbpo_finetune.py"), str(ROOT / "evaluate.py"), "hopper-medium-v2"
ITERATION, ITERATIONS = 4 * 15 * 4, 4  # environment steps, and how many iterations
SETTINGS = {
    "env": TASK,
    "ckpt": "tiny.pt",
    "device": "cpu",
    "env_steps": ITERATIONS * ITERATION,
    "num_envs": 4,
    "decisions": 15,
    "minibatch": 16,
    "epochs": 2,
    "critic_only": 1,
    "eval_every": 2,
    "save_every": 1,
    "eval_episodes": 2,
    "report_episodes": 2,
}


def tiny_policy(env: str = TASK, obs_dim: int = 11) -> Policy:
    torch.manual_seed(0)
    sizes = {"obs_steps": 1, "horizon": 4, "action_steps": 4, **TINY_MLP}
    return Policy(PolicyConfig(env=env, obs_shapes={"state": (obs_dim,)}, action_dim=3, **sizes))


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """The folder that all commands run in, with a policy to begin with and bad ones."""
    folder = tmp_path_factory.mktemp("work")
    tiny_policy().save(folder / "tiny.pt")
    tiny_policy(env="walker2d-medium-v2").save(folder / "walker.pt")
    tiny_policy(obs_dim=9).save(folder / "narrow.pt")
    (folder / "corrupt.pt").write_bytes(b"PK\3\4" + bytes(5000))
    return folder


def finetune(**settings) -> list[str]:
    return [SCRIPT, *flags(**{**SETTINGS, **settings})]


@pytest.fixture(scope="module")
def whole(work) -> Path:
    """A fine-tuning from beginning to end."""
    done = run(*finetune(out="whole"), cwd=work)
    assert done.returncode == 0, done.stderr
    (work / "whole.stdout").write_text(done.stdout)
    return work / "whole"


# --- a fine-tuning and its evaluation ---------------------------------------------------------------------------------


def test_a_run_writes_what_its_docstring_says(whole, work):
    files = {"dbpo.pt", "state.pt", "config.json", "metrics.csv", "curve.png", "result.json"}
    assert files <= set(os.listdir(whole))
    assert [name for name in os.listdir(whole) if name.endswith(".tmp")] == []
    config = json.loads((whole / "config.json").read_text())
    assert {name: config[name] for name in SETTINGS} == SETTINGS and config["clip"] == 0.1
    assert iio.imread(whole / "curve.png").std() > 10
    text = (whole / "result.json").read_text().splitlines()[-1]
    line = json.loads(text)
    assert set(line) == CONTRACT | {"wall_s"}
    assert (line["env"], line["episodes"], line["seed_start"], line["nfe"]) == (TASK, 2, 100_000, 1)
    assert (work / "whole.stdout").read_text().splitlines()[-1] == text


def test_the_metrics_of_every_iteration(whole):
    rows = metrics(whole)
    assert [int(row["step"]) for row in rows] == [ITERATION * i for i in range(ITERATIONS + 1)]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values() if value)
    assert [bool(row["score"]) for row in rows] == [True, False, True, False, True]  # 0 is the pretrained policy
    before, *rows = rows
    always = ["value_loss", "reward_std", "episodes", "episode_score", "episode_length", "simulation_s", "network_s", "other_s"]
    assert all(float(row[name]) > 0 for row in rows for name in always)
    acted = ["kl", "clip_fraction", "anchor_distance", "sigma"]
    assert not any(row[name] for row in (before, rows[0]) for name in acted)  # the first iteration trains the critic alone
    assert all(row[name] for row in rows[1:] for name in acted)
    assert [int(row["actor_updates"]) > 0 for row in rows] == [False, True, True, True]
    assert all(0.03 <= float(row["sigma"]) <= 0.2 and 0 <= float(row["kl"]) <= 0.02 for row in rows[1:])
    for name, begin, end in (("actor_lr", 1e-4, 1e-5), ("anchor_weight", 1.0, 0.0)):
        assert [float(row[name]) for row in rows] == pytest.approx([begin + (end - begin) * i / 4 for i in range(4)])


def test_the_checkpoint_is_the_best_evaluation_and_an_ordinary_policy(whole, work):
    policy, state = Policy.load(whole / "dbpo.pt"), load_checkpoint(whole / "state.pt")
    assert policy.config == tiny_policy().config
    scores = [float(row["score"]) for row in metrics(whole) if row["score"]]
    assert state["best"] == pytest.approx(max(scores), rel=1e-5)
    done = run(EVALUATE, "--json", *flags(ckpt="whole/dbpo.pt", episodes=2, seed_start=50_000, device="cpu"), cwd=work)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert set(line) == CONTRACT and line["score"] == pytest.approx(max(scores), rel=1e-5)


# --- resume -----------------------------------------------------------------------------------------------------------

# dbpo_finetune.py as it is, but for a signal that it gets when row number `row` of metrics.csv is written.
KILLED = f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import common
write = common.RunLog.write
number, row = int(sys.argv.pop()), int(sys.argv.pop())
def killed(self, *args):
    write(self, *args)
    if len(self.rows) == row:
        os.kill(os.getpid(), number)
common.RunLog.write = killed
runpy.run_path({SCRIPT!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("number", "row", "status", "saved"),
    [
        (signal.SIGTERM, 2, 128 + signal.SIGTERM, 1),  # row 1 is the pretrained policy: iteration 1 is finished and saved
        (signal.SIGKILL, 4, -signal.SIGKILL, 2),  # iteration 3 is in the table, and not saved: it comes again
    ],
    ids=["SIGTERM", "SIGKILL"],
)
def test_kill_and_resume_give_the_uninterrupted_run_bit_for_bit(number, row, status, saved, whole, work):
    name = number.name
    killed = run("-c", KILLED, *finetune(out=name)[1:], row, int(number), cwd=work)
    assert killed.returncode == status, killed.stderr
    assert "Traceback" not in killed.stderr
    assert number != signal.SIGTERM or "Go on with --resume" in killed.stdout
    assert load_checkpoint(work / name / "state.pt")["iteration"] == saved
    assert not (work / name / "result.json").exists()
    resumed = run(SCRIPT, "--resume", "--out", name, cwd=work)  # the settings come from the state
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed at iteration {saved}, " in resumed.stdout

    states = [load_checkpoint(folder / "state.pt") for folder in (whole, work / name)]
    for state, folder in zip(states, ("whole", name), strict=True):
        assert state.pop("seconds") > 0
        assert (state["config"].pop("out"), state["config"].pop("resume")) == (folder, folder == name)
    assert states[0]["iteration"] == ITERATIONS and states[0]["actor_optimizer"]["state"]
    assert any(len(chunks) for chunks in states[0]["ranks"][0]["episodes"]["chunks"])  # it ends in the middle of episodes
    same(*states)  # actor, critic, optimisers, random states, reward scale, episodes, best score, settings
    same(load_checkpoint(whole / "dbpo.pt"), load_checkpoint(work / name / "dbpo.pt"))
    clocks = {"seconds", "simulation_s", "network_s", "other_s"}
    rows = [[{k: v for k, v in row.items() if k not in clocks} for row in metrics(folder)] for folder in (whole, work / name)]
    assert rows[0] == rows[1]


# --- bad input --------------------------------------------------------------------------------------------------------

BAD_INPUT = [  # settings, exit status, words of the message
    ({"env": "walkman"}, 2, "'walkman'"),
    ({"ckpt": "nowhere.pt"}, 1, "no checkpoint at nowhere.pt"),
    ({"ckpt": "corrupt.pt"}, 1, "corrupt.pt (5004 bytes) cannot be read"),
    ({"ckpt": "walker.pt"}, 1, "trained for walker2d-medium-v2"),
    ({"ckpt": "narrow.pt"}, 1, "(9,)"),
    ({"device": "warp"}, 2, "--device warp"),
    ({"num_envs": -4}, 2, "--num-envs is -4; it must be at least 1"),
    ({"minibatch": -1}, 2, "--minibatch is -1"),
    ({"seed": -1}, 2, "--seed is -1"),
    ({"gamma": 1.01}, 2, "--gamma is 1.01; it must be between 0 and 1"),
    ({"actor_lr": "nan"}, 2, "--actor-lr is nan"),
    ({"anchor": "inf"}, 2, "--anchor is inf"),
    ({"sigma_start": 0.01}, 2, "--sigma-start is 0.01; it must lie in [0.03, 0.2]"),
]


@pytest.fixture(scope="module")
def refusals(work) -> list[subprocess.CompletedProcess]:
    """All of BAD_INPUT, two at a time: nearly all of their time is the import of torch."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda i: run(*finetune(out=f"refused-{i}", **BAD_INPUT[i][0]), cwd=work), range(len(BAD_INPUT))))


@pytest.mark.parametrize("number", range(len(BAD_INPUT)), ids=[str(settings) for settings, *_ in BAD_INPUT])
def test_bad_input_is_refused_in_one_line(number, refusals, work):
    _, status, words = BAD_INPUT[number]
    assert_refused(refusals[number], status, words)
    assert not (work / f"refused-{number}").exists()  # before anything was written


# --- two processes ----------------------------------------------------------------------------------------------------

# dbpo_finetune.py as it is; at its end each rank writes the weights that its optimisers hold.
TWO = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import torch.distributed as dist
import dbpo_finetune
Adam, made, destroy = torch.optim.Adam, [], dist.destroy_process_group
def adam(weights, **settings):
    made.append(Adam(weights, **settings))
    return made[-1]
def leave():
    weights = [p.detach() for optimizer in made for group in optimizer.param_groups for p in group["params"]]
    torch.save(weights, f"rank{{dist.get_rank()}}.pt")
    destroy()
torch.optim.Adam, dist.destroy_process_group = adam, leave
dbpo_finetune.main()
"""


@pytest.fixture(scope="module")
def two(work) -> subprocess.CompletedProcess:
    (work / "two.py").write_text(TWO)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "two.py"]
    return wait(start(*torchrun, *finetune(out="two", env_steps=2 * ITERATION)[1:], cwd=work))


def test_two_processes_keep_the_same_weights(two, work):
    assert two.returncode == 0, two.stderr
    assert "2 process(es)" in two.stdout and two.stdout.count("best policy") == 1
    assert (work / "two" / "result.json").exists()
    weights = [torch.load(work / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    same(*weights)
    state = load_checkpoint(work / "two" / "state.pt")
    same(weights[0][: len(state["actor"])][-1], state["actor"]["log_std.bias"])
    moved = [name for name, p in tiny_policy().named_parameters() if not torch.equal(p, state["actor"][f"policy.{name}"])]
    assert len(moved) == len(list(tiny_policy().parameters()))


def test_two_processes_play_other_episodes_with_other_noise(two, work):
    ranks = load_checkpoint(work / "two" / "state.pt")["ranks"]
    assert [sorted({seed % 2 for seed in rank["episodes"]["seeds"]}) for rank in ranks] == [[0], [1]]
    assert [len(rank["episodes"]["seeds"]) for rank in ranks] == [2, 2]
    assert not torch.equal(ranks[0]["generator"], ranks[1]["generator"])
    assert ranks[0]["scale"]["moments"] == ranks[1]["scale"]["moments"]  # the spread is that of all environments
    assert ranks[0]["scale"]["moments"][0] > 0


# --- presets ----------------------------------------------------------------------------------------------------------
