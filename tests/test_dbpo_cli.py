"""dbpo_finetune.py as a command, on Hopper from a tiny untrained policy: files, numbers, kill and resume, bad input, ranks."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from conftest import ROOT, TINY_MLP
from test_cli import assert_refused, flags, metrics, run, same, start, wait
from test_evaluate import CONTRACT

import envs
import pusht
from common import load_checkpoint, read_config, run_main
from dbpo_finetune import PRESETS, Config, check, defaults, main
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


def test_pictures_are_fine_tuned_as_states_are(tmp_path, monkeypatch):
    torch.manual_seed(0)
    sizes = {"obs_steps": 2, "horizon": 4, "action_steps": 2, "image_dim": 4, **TINY_MLP}
    Policy(PolicyConfig(env="pusht-image", obs_shapes=pusht.IMAGE_SHAPES, action_dim=2, **sizes)).save(tmp_path / "tiny.pt")
    monkeypatch.chdir(tmp_path)
    small = {"env": "pusht-image", "env_steps": 32, "num_envs": 2, "decisions": 4, "minibatch": 4, "eval_episodes": 1}
    monkeypatch.setattr(sys, "argv", finetune(**small, critic_only=0, report_episodes=1, eval_every=9, out="pictures"))
    main()
    rows = metrics(tmp_path / "pictures")
    before, after = (load_checkpoint(tmp_path / "pictures" / "state.pt")[name]["weights"] for name in ("pretrained", "policy"))
    seeing = [name for name in before if name.startswith("encoder.images")]
    assert float(rows[-1]["actor_updates"]) > 0 and any((before[name] != after[name]).any() for name in seeing)


# --- a fine-tuning and its evaluation ---------------------------------------------------------------------------------


def test_a_run_writes_what_its_docstring_says(whole, work):
    files = {"dbpo.pt", "state.pt", "config.json", "metrics.csv", "curve.png", "rollout.gif", "result.json"}
    assert files <= set(os.listdir(whole))
    assert [name for name in os.listdir(whole) if name.endswith(".tmp")] == []
    config = json.loads((whole / "config.json").read_text())
    assert {name: config[name] for name in SETTINGS} == SETTINGS and config["clip"] == Config().clip
    assert iio.imread(whole / "curve.png").std() > 10
    film = iio.imread(whole / "rollout.gif")
    assert len(film) > 2 and (film[0] != film[-1]).any()
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
    cfg, (before, *rows) = Config(), rows
    always = ["value_loss", "reward_std", "episodes", "episode_score", "episode_length", "simulation_s", "network_s", "other_s"]
    assert all(float(row[name]) > 0 for row in rows for name in always)
    acted = ["kl", "clip_fraction", "anchor_distance", "sigma"]
    assert not any(row[name] for row in (before, rows[0]) for name in acted)  # the first iteration trains the critic alone
    assert all(row[name] for row in rows[1:] for name in acted)
    assert [int(row["actor_updates"]) > 0 for row in rows] == [False, True, True, True]
    assert all(
        cfg.sigma_min <= float(row["sigma"]) <= cfg.sigma_max and 0 <= float(row["kl"]) <= cfg.target_kl for row in rows[1:]
    )
    for name, begin, end in (("actor_lr", cfg.actor_lr, cfg.actor_lr_end), ("anchor_weight", cfg.anchor, cfg.anchor_end)):
        assert [float(row[name]) for row in rows] == pytest.approx([begin + (end - begin) * i / 4 for i in range(4)])


def test_the_checkpoint_is_the_newest_of_the_best_and_an_ordinary_policy(whole, work):
    policy, state = Policy.load(whole / "dbpo.pt"), load_checkpoint(whole / "state.pt")
    assert policy.config == tiny_policy().config
    rows = [row for row in metrics(whole) if row["score"]]
    scores = [float(row["score"]) for row in rows]
    assert state["best"] == pytest.approx(max(scores), rel=1e-5)
    errors = [(float(row["score_high"]) - float(row["score"])) / 1.96 for row in rows]
    kept = [score for i, score in enumerate(scores) if score + errors[i] >= max(scores[: i + 1])][-1]
    done = run(EVALUATE, "--json", *flags(ckpt="whole/dbpo.pt", episodes=2, seed_start=50_000, device="cpu"), cwd=work)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert set(line) == CONTRACT and line["score"] == pytest.approx(kept, rel=1e-5)


# --- resume -----------------------------------------------------------------------------------------------------------

# dbpo_finetune.py as it is, but for a signal that it gets when row number `row` of metrics.csv is written, and without a film.
KILLED = f"""
import os, runpy, sys
os.environ["MUJOCO_GL"] = "disabled"
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


def killed(work: Path, number: int, row: int, *words: str) -> subprocess.CompletedProcess:
    return run("-c", KILLED, *words, row, int(number), cwd=work)


def test_two_kills_and_resumes_give_the_uninterrupted_run_bit_for_bit(whole, work):
    out = work / "killed"
    first = killed(work, signal.SIGTERM, 2, *finetune(out="killed")[1:])  # row 1 is the pretrained policy, 2 the first iteration
    assert first.returncode == 128 + signal.SIGTERM and "Traceback" not in first.stderr, first.stderr
    assert re.search(r"stopped after iteration 1;.*Go on with --resume", first.stdout)
    assert load_checkpoint(out / "state.pt")["iteration"] == 1
    resume = ["--resume", "--out", "killed"]  # the settings come from the state
    second = killed(work, signal.SIGKILL, 4, *resume)
    assert second.returncode == -signal.SIGKILL and "resumed at iteration 1, " in second.stdout, second.stderr
    assert load_checkpoint(out / "state.pt")["iteration"] == 2 and len(metrics(out)) == 4  # iteration 3 will come again
    third = killed(work, signal.SIGKILL, 0, *resume)
    assert third.returncode == 0 and "resumed at iteration 2, " in third.stdout, third.stderr

    states = [load_checkpoint(folder / "state.pt") for folder in (whole, out)]
    for state, folder in zip(states, ("whole", "killed"), strict=True):
        assert state.pop("seconds") > 0
        assert (state["config"].pop("out"), state["config"].pop("resume")) == (folder, folder == "killed")
    assert states[0]["iteration"] == ITERATIONS and states[0]["actor_optimizer"]["state"]
    assert any(len(chunks) for chunks in states[0]["ranks"][0]["episodes"]["chunks"])  # it ends in the middle of episodes
    same(*states)  # actor, critic, optimisers, random states, reward scale, episodes, best score, settings
    same(load_checkpoint(whole / "dbpo.pt"), load_checkpoint(out / "dbpo.pt"))
    clocks = {"seconds", "simulation_s", "network_s", "other_s"}
    rows = [[{k: v for k, v in row.items() if k not in clocks} for row in metrics(folder)] for folder in (whole, out)]
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


@pytest.mark.parametrize(("settings", "status", "words"), BAD_INPUT, ids=[str(settings) for settings, *_ in BAD_INPUT])
def test_bad_input_is_refused_in_one_line(settings, status, words, work, monkeypatch, capsys):
    """In this process: it is the same main(), without 13 imports of torch."""
    monkeypatch.chdir(work)
    monkeypatch.setattr("sys.argv", finetune(out="refused", **settings))
    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert_refused(subprocess.CompletedProcess([], caught.value.code, *capsys.readouterr()), status, words)
    assert not (work / "refused").exists()  # before anything was written


def test_the_command_itself_refuses(work):
    assert_refused(run(*finetune(out="refused", ckpt="nowhere.pt"), cwd=work), 1, "no checkpoint at nowhere.pt")


@pytest.mark.parametrize("settings", [{"clip": 0.2}, {"num_envs": 8}, {"ckpt": "walker.pt"}], ids=str)
def test_resume_refuses_other_settings(settings, whole, work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    monkeypatch.setattr("sys.argv", [SCRIPT, "--resume", "--out", "whole", *flags(**settings)])
    with pytest.raises(SystemExit) as caught:
        run_main(main)
    (name, value), done = *settings.items(), subprocess.CompletedProcess([], caught.value.code, *capsys.readouterr())
    assert_refused(
        done, 2, f"--{name.replace('_', '-')} is {value}, but the run in whole has {SETTINGS.get(name, Config().clip)}"
    )


def test_flags_go_before_the_preset_and_the_preset_before_the_defaults(monkeypatch):
    monkeypatch.setattr("sys.argv", [SCRIPT, *flags(env=TASK, preset="paper", epochs=3, clip=0.5)])
    cfg, state = read_config(Config, "", defaults, "runs/{env}/dbpo", set())
    assert state is None and cfg.out == f"runs/{TASK}/dbpo"
    expected = {**dataclasses.asdict(Config()), **PRESETS["paper"], **envs.get_task(TASK).finetune}
    assert dataclasses.asdict(cfg) == {**expected, "preset": "paper", "epochs": 3, "clip": 0.5, "out": cfg.out}
    check(cfg)


# --- two processes ----------------------------------------------------------------------------------------------------

# dbpo_finetune.py as it is, without a film; at its end each rank writes the weights that its optimisers hold.
TWO = f"""
import os, sys
os.environ["MUJOCO_GL"] = "disabled"
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
    assert any(torch.equal(p, state["actor"]["log_std.bias"]) for p in weights[0])
    moved = [name for name, p in tiny_policy().named_parameters() if not torch.equal(p, state["actor"][f"policy.{name}"])]
    assert len(moved) == len(list(tiny_policy().parameters()))


def test_two_processes_play_other_episodes_with_other_noise(two, work):
    ranks = load_checkpoint(work / "two" / "state.pt")["ranks"]
    assert [sorted({seed % 2 for seed in rank["episodes"]["seeds"]}) for rank in ranks] == [[0], [1]]
    assert [len(rank["episodes"]["seeds"]) for rank in ranks] == [2, 2]
    assert not torch.equal(ranks[0]["generator"], ranks[1]["generator"])
    assert ranks[0]["scale"]["moments"] == ranks[1]["scale"]["moments"]  # the spread is that of all environments
    assert ranks[0]["scale"]["moments"][0] > 0
