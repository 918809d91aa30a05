"""dfp_finetune.py as a command, on Push-T with tiny networks: files, numbers, kill and resume, rivals, bad input."""

import dataclasses
import itertools
import json
import os
import shutil
import sys
import time
from pathlib import Path

import h5py
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_MLP
from test_cli import flags, metrics, run, same, start
from test_evaluate import CONTRACT

import dfp_finetune
import vector
from common import load_checkpoint, run_main
from dfp_finetune import main
from policy import Policy, PolicyConfig

SCRIPT = str(ROOT / "dfp_finetune.py")
SETTINGS = {
    "env": "pusht",
    "device": "cpu",
    "threads": 1,
    "offline_steps": 20,
    "online_steps": 40,
    "start_after": 10,
    "batch_size": 8,
    "hypotheses": 2,
    "proposals": 4,
    "positives": 2,
    "candidates": 3,
    "cond_width": 16,
    "width": 16,
    "depth": 1,
    "critic_trunk": 8,
    "critic_width": 16,
    "critic_depth": 1,
    "eval_every": 30,
    "save_every": 10,
    "eval_episodes": 2,
    "report_episodes": 2,
}


def improve(pusht_npz, **settings) -> list[str]:
    return [SCRIPT, *flags(**{**SETTINGS, "demos": str(pusht_npz), **settings})]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    for name, sizes in (("fits", (1, 5, 5)), ("longer", (2, 16, 8))):
        steps = dict(zip(("obs_steps", "horizon", "action_steps"), sizes, strict=True))
        config = PolicyConfig(env="pusht", obs_shapes={"state": (20,)}, action_dim=2, **steps, **TINY_MLP)
        Policy(config).save(folder / f"{name}.pt")
    Policy(dataclasses.replace(config, candidates=3)).save(folder / "dfp.pt")
    return folder


@pytest.fixture(scope="module")
def whole(work, pusht_npz) -> Path:
    done = run(*improve(pusht_npz, out="whole"), cwd=work)
    assert done.returncode == 0, done.stderr
    assert "3 succeed" in done.stdout  # every demonstration ends with success
    return work / "whole"


def test_a_run_writes_what_its_docstring_says(whole):
    files = {"offline.pt", "dfp.pt", "state.pt", "config.json", "metrics.csv", "curve.png", "rollout.gif", "result.json"}
    assert files <= set(os.listdir(whole))
    assert iio.imread(whole / "curve.png").std() > 10
    line = json.loads((whole / "result.json").read_text().splitlines()[-1])
    extra = {
        "wall_s",
        "method",
        "offline_steps",
        "offline_score",
        "offline_success",
        "offline_return",
        "offline_wall_s",
        "last_score",
        "last_success",
        "last_return",
        "alone_score",
        "alone_success",
        "alone_return",
    }
    assert set(line) == CONTRACT | extra
    assert (line["env"], line["nfe"], line["method"]) == ("pusht", 1, "dfp")


def test_evaluate_reads_the_policy_with_its_critic(whole, work):
    done = run(str(ROOT / "evaluate.py"), "--ckpt", str(whole / "dfp.pt"), "--episodes", "2", "--json", cwd=work)
    assert done.returncode == 0, done.stderr
    line, trained = json.loads(done.stdout), json.loads((whole / "result.json").read_text().splitlines()[-1])
    assert (line["score"], line["mean_return"]) == (trained["score"], trained["mean_return"])


@pytest.mark.parametrize("until", [15, 33])  # in the offline phase; online, in the middle of a chunk
def test_kill_and_resume_give_the_uninterrupted_run_bit_for_bit(until, whole, work, pusht_npz):
    out = work / f"killed-{until}"
    process = start(*improve(pusht_npz, out=str(out), save_every=1), cwd=work)
    while process.poll() is None and not ((out / "state.pt").exists() and load_checkpoint(out / "state.pt")["step"] >= until):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    done = run(*improve(pusht_npz, out=str(out), save_every=1), "--resume", cwd=work)
    assert done.returncode == 0, done.stderr
    check_same_run(out, whole)


def check_same_run(out: Path, whole: Path) -> None:
    ours, theirs = (load_checkpoint(folder / "state.pt") for folder in (out, whole))
    for name in (
        "policy",
        "acting",
        "old",
        "actor_optimizer",
        "critic_optimizer",
        "generator",
        "latents",
        "buffer",
        "recorder",
        "plans",
    ):
        same(ours[name], theirs[name], name)
    left, right = ([{k: v for k, v in row.items() if k != "seconds"} for row in metrics(f)] for f in (out, whole))
    assert left == right


def test_one_offline_phase_may_be_continued_in_several_ways(whole, work, pusht_npz, monkeypatch, capsys):
    done = run(*improve(pusht_npz, out="branch", online_steps=0), cwd=work)
    assert done.returncode == 0, done.stderr
    shutil.copytree(work / "branch", work / "other")
    done = run(*improve(pusht_npz, out="branch"), "--resume", cwd=work)
    assert done.returncode == 0, done.stderr
    check_same_run(work / "branch", whole)
    monkeypatch.chdir(work)
    for change, words in (
        ({"out": "branch", "positives": 1}, "--positives is 1, but the run in branch has 2 and has used it"),
        ({"out": "other", "method": "gradient"}, "--method is gradient"),
    ):
        monkeypatch.setattr(sys, "argv", [*improve(pusht_npz, **change), "--resume"])
        with pytest.raises(SystemExit) as left:
            run_main(main)
        assert left.value.code == 2 and words in capsys.readouterr().err
    done = run(*improve(pusht_npz, out="other", positives=1, explore=0.3, online_steps=15), "--resume", cwd=work)
    assert done.returncode == 0, done.stderr
    config = json.loads((work / "other" / "config.json").read_text())
    assert config["positives"] == 1 and config["explore"] == 0.3


@pytest.mark.parametrize("method", ["best-of-n", "random-k", "gradient"])
def test_the_rivals_run_on_the_same_path(method, work, pusht_npz, monkeypatch):
    budget = {"offline_steps": 5, "online_steps": 15, "start_after": 5}
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", improve(pusht_npz, out=method, method=method, ckpt="fits.pt", **budget))
    main()
    assert json.loads((work / method / "result.json").read_text().splitlines()[-1])["method"] == method


def test_the_smooth_trunk_and_states_by_their_std(work, pusht_npz, monkeypatch):
    budget = {"offline_steps": 5, "online_steps": 15, "start_after": 5, "backbone": "tanh", "state_scale": "std"}
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", improve(pusht_npz, out="smooth", **budget))
    main()
    config = Policy.load(work / "smooth" / "dfp.pt").config
    assert (config.backbone, config.state_scale) == ("tanh", "std")


def test_what_fails_in_the_middle_leaves_what_was_saved(work, pusht_npz, monkeypatch, capsys):
    def died(*_):
        raise vector.SimulationError("a worker process died")

    update = dfp_finetune.Learner.update

    def broken(learner, *rest):
        row = update(learner, *rest)
        if next(updates) == 19:  # after the losses of the step that is saved
            learner.actor_weights[0].data[0] = torch.nan
        return row

    monkeypatch.chdir(work)
    for where, name, words in (
        ((vector.Episodes, "step", died), "died", ("step 20: a worker process died.", "died/state.pt was saved before")),
        ((dfp_finetune.Learner, "update", broken), "broken", ("the weights are not finite.", "broken/state.pt was saved before")),
    ):
        updates = itertools.count()
        monkeypatch.setattr(sys, "argv", improve(pusht_npz, out=name))
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
            patch.setattr(*where)
            run_main(main)
        message = capsys.readouterr().err
        assert left.value.code == 1 and all(part in message for part in words)
        weights = load_checkpoint(work / name / "state.pt")["policy"]["weights"].values()
        assert all(torch.isfinite(weight).all() for weight in weights)


REFUSED = [
    ({"positives": 5}, 2, "K of N = 4"),
    ({"candidates": 1}, 2, "at least 2"),
    ({"temperatures": 0.0}, 2, "each must be above 0"),
    ({"env": "pusht-image"}, 2, "takes tasks with states alone"),
    ({"env": "kitchen"}, 2, "its reward is not success"),
    ({"ckpt": "longer.pt"}, 1, "obs_steps 2 (here 1), horizon 16 (here 5)"),
    ({"ckpt": "none.pt"}, 1, "no checkpoint"),
    ({"ckpt": "dfp.pt"}, 1, "it takes one of stage 1"),
    ({"horizon": 90}, 1, "no episode is as long as a chunk of 90 steps"),
    ({"env": "hopper-medium-v2", "demos": "rewards.hdf5"}, 2, "its reward is not success"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_bad_input_is_refused_in_one_line(case, work, pusht_npz, monkeypatch, capsys):
    change, status, words = REFUSED[case]
    monkeypatch.chdir(work)
    if change.get("demos") == "rewards.hdf5":
        with h5py.File("rewards.hdf5", "w") as file:
            for name, array in (("observations", np.zeros((9, 11))), ("actions", np.zeros((9, 3))), ("rewards", np.zeros(9))):
                file[name] = array
            file["terminals"], file["timeouts"] = np.arange(9) == 8, np.zeros(9, bool)
    monkeypatch.setattr(sys, "argv", improve(pusht_npz, **change, out="refused"))
    with pytest.raises(SystemExit) as left:
        run_main(main)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert left.value.code == status and message.startswith("error: ") and words in message
