"""The real commands in processes of their own, with tiny budgets: files, numbers, resume, interruption, bad input, two ranks.

Runs are shared between tests through module fixtures; everything happens in a temporary folder.
"""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_MLP, synthetic_pusht
from test_evaluate import CONTRACT

import common
import dbp_train
import envs
from common import load_checkpoint, save_checkpoint
from policy import Policy

pytest.importorskip("gym_pusht")

TIMEOUT_S = 120
STEPS, EVAL_EVERY, SAVE_EVERY = 300, 150, 100
SETTINGS = {
    **TINY_MLP,
    "device": "cpu",
    "precision": "float32",
    "steps": STEPS,
    "eval_every": EVAL_EVERY,
    "save_every": SAVE_EVERY,
    "batch_size": 8,
    "hypotheses": 2,
    "temperatures": (0.05, 0.2),
    "obs_steps": 2,
    "horizon": 8,
    "action_steps": 4,
    "eval_episodes": 2,
    "report_episodes": 2,
}


def flags(**settings) -> list[str]:
    """{"eval_every": 5, "betas": (0.9, 0.99)} -> ["--eval-every", "5", "--betas", "0.9", "0.99"]."""
    words = []
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else [value])]
    return [str(word) for word in words]


def start(*command: str, cwd: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, *map(str, command)]
    return subprocess.Popen(arguments, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait(process: subprocess.Popen) -> subprocess.CompletedProcess:
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    return wait(start(*command, cwd=cwd))


TRAIN, EVALUATE = str(ROOT / "dbp_train.py"), str(ROOT / "evaluate.py")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """The folder that all commands run in. It holds good demonstrations and bad inputs."""
    folder = tmp_path_factory.mktemp("work")
    arrays = synthetic_pusht()
    np.savez(folder / "good.npz", **arrays)
    arrays["action"][17, 1] = np.nan
    np.savez(folder / "nan.npz", **arrays)
    (folder / "corrupt.pt").write_bytes(b"PK\3\4" + bytes(5000))
    return folder


def train(work: Path, **settings) -> list[str]:
    return [TRAIN, *flags(**{**SETTINGS, "demos": work / "good.npz", **settings})]


@pytest.fixture(scope="module")
def whole(work) -> Path:
    """A training from beginning to end."""
    done = run(*train(work, out="whole"), cwd=work)
    assert done.returncode == 0, done.stderr
    (work / "whole.stdout").write_text(done.stdout)
    return work / "whole"


def same(a, b, where="") -> None:
    """Assert that two nested structures are equal, tensors bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def metrics(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- a training and its evaluation ------------------------------------------------------------------------------------


def test_a_training_writes_what_its_docstring_says(whole):
    files = {"dbp.pt", "state.pt", "config.json", "metrics.csv", "curve.png", "rollout.gif", "result.json"}
    assert files <= set(os.listdir(whole))
    assert [name for name in os.listdir(whole) if name.endswith(".tmp")] == []
    config = json.loads((whole / "config.json").read_text())
    assert (config["steps"], config["hypotheses"], config["temperatures"]) == (STEPS, 2, [0.05, 0.2])
    rows = metrics(whole)
    assert [int(row["step"]) for row in rows] == [100, 150, 200, 300]  # every 100 steps, and at evaluations
    assert [bool(row["score"]) for row in rows] == [False, True, False, True]
    always = ("distance", "scale", "force_rms_0.05", "force_rms_0.2", "grad_norm")
    assert all(float(row[name]) > 0 for row in rows for name in always)
    assert float(rows[-1]["distance"]) < float(rows[0]["distance"])  # it does learn
    assert iio.imread(whole / "curve.png").std() > 10
    film = iio.imread(whole / "rollout.gif")
    assert len(film) > 10 and (film[0] != film[-1]).any()
    assert load_checkpoint(whole / "state.pt")["step"] == STEPS


def test_the_last_line_is_the_json_contract(whole, work):
    text = (whole / "result.json").read_text().splitlines()[-1]
    line = json.loads(text)
    assert set(line) == CONTRACT | {"wall_s"}
    assert (line["env"], line["episodes"], line["seed_start"], line["nfe"]) == ("pusht", 2, 100_000, 1)
    assert line["parameters"] == sum(p.numel() for p in Policy.load(whole / "dbp.pt").parameters())
    assert 0 <= line["score"] <= 1 and line["wall_s"] > 0
    assert (work / "whole.stdout").read_text().splitlines()[-1] == text


def test_evaluate_prints_one_json_line_with_the_numbers_of_the_training(whole, work):
    done = run(EVALUATE, *flags(ckpt="whole/dbp.pt", episodes=2, gif="film.gif"), "--json", cwd=work)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)  # fails on anything besides one JSON value
    assert done.stdout.count("\n") == 1
    assert set(line) == CONTRACT
    expected = json.loads((whole / "result.json").read_text().splitlines()[-1])
    reproducible = CONTRACT - {"latency_ms_p50", "latency_ms_p99"}
    assert {name: line[name] for name in reproducible} == {name: expected[name] for name in reproducible}
    assert len(iio.imread(work / "film.gif")) > 10


def test_evaluate_for_people(whole, work):
    done = run(EVALUATE, *flags(ckpt="whole/state.pt", episodes=2, seed_start=5), cwd=work)  # a training state is a policy too
    assert done.returncode == 0, done.stderr
    assert re.search(r"score +[01]\.\d{3} +95 % interval", done.stdout)
    assert "1 NFE" in done.stdout and "from seed 5" in done.stdout


def test_export_writes_a_file_and_one_json_line(whole, work):
    pytest.importorskip("onnxscript", reason="the exporter: pip install -r requirements-export.txt")
    done = run(EVALUATE, *flags(ckpt="whole/dbp.pt", export="new/policy.onnx"), "--json", cwd=work)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert line["export"] == "new/policy.onnx" and line["bytes"] == (work / "new" / "policy.onnx").stat().st_size
    assert line["difference"] is None or line["difference"] < 1e-5  # none: onnxruntime is not installed


# --- resume -----------------------------------------------------------------------------------------------------------

# dbp_train.py as it is, but for the third save of state.pt (step 200): half of it is written, then comes kill -9.
DIE_IN_MID_SAVE = f"""
import io, os, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
save = torch.save
def die(content, file):
    if content.get("step") != 200:
        return save(content, file)
    whole = io.BytesIO()
    save(content, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = die
runpy.run_path({TRAIN!r}, run_name="__main__")
"""


def test_kill_and_resume_give_the_uninterrupted_run_bit_for_bit(whole, work):
    killed = run("-c", DIE_IN_MID_SAVE, *train(work, out="killed")[1:], cwd=work)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    out = work / "killed"
    assert (out / "state.pt.tmp").exists()
    assert load_checkpoint(out / "state.pt")["step"] == EVAL_EVERY  # the save before, whole
    assert [int(row["step"]) for row in metrics(out)] == [100, 150, 200]  # 200 is logged, and will be repeated
    resumed = run(TRAIN, "--resume", "--out", "killed", cwd=work)  # the settings come from the state
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step 150" in resumed.stdout

    states = [load_checkpoint(folder / "state.pt") for folder in (whole, out)]
    for state, folder in zip(states, ("whole", "killed"), strict=True):
        assert state.pop("seconds") > 0
        assert (state["config"].pop("out"), state["config"].pop("resume")) == (folder, folder == "killed")
    assert states[0]["step"] == STEPS and states[0]["optimizer"]["state"]
    same(*states)  # model, average, optimiser, random states, best score, settings
    same(load_checkpoint(whole / "dbp.pt"), load_checkpoint(out / "dbp.pt"))
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in metrics(folder)] for folder in (whole, out)]
    assert rows[0] == rows[1]
    results = [json.loads((folder / "result.json").read_text().splitlines()[-1]) for folder in (whole, out)]
    assert results[0]["score"] == results[1]["score"]
    assert [name for name in os.listdir(out) if name.endswith(".tmp")] == []


@pytest.fixture(scope="module")
def interrupted(whole, work) -> tuple[Path, subprocess.CompletedProcess]:
    """A long run, into the folder of an earlier one, that gets Ctrl-C after its first save."""
    out = work / "interrupted"
    out.mkdir()
    shutil.copy(whole / "dbp.pt", out / "dbp.pt")
    process = start(*train(work, out="interrupted", steps=10**6, eval_every=10**6, save_every=20), cwd=work)
    deadline = time.monotonic() + TIMEOUT_S
    while not (out / "state.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    return out, wait(process)


def test_ctrl_c_finishes_the_step_saves_and_leaves(interrupted):
    out, done = interrupted
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    step = int(re.search(r"stopped at step ([\d,]+);.*Go on with --resume", done.stdout)[1].replace(",", ""))
    assert load_checkpoint(out / "state.pt")["step"] == step >= 20
    assert not (out / "result.json").exists()


def test_an_earlier_run_is_kept(interrupted, whole, work):
    out, done = interrupted
    assert os.listdir(work / "interrupted.1") == ["dbp.pt"]
    assert (work / "interrupted.1" / "dbp.pt").read_bytes() == (whole / "dbp.pt").read_bytes()
    assert "interrupted.1" in done.stdout
    assert not (out / "dbp.pt").exists()  # the new run has not evaluated yet


@pytest.mark.parametrize("change", [{"lr": 0.5}, {"demos": "embedded"}], ids=str)
def test_resume_refuses_other_settings(change, interrupted, work):
    done = run(TRAIN, "--resume", "--out", "interrupted", *flags(**change), cwd=work)
    assert_refused(done, 2, f"--{next(iter(change))} is {next(iter(change.values()))}")


# --- bad input --------------------------------------------------------------------------------------------------------


def assert_refused(done: subprocess.CompletedProcess, status: int, words: str) -> None:
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == status, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and words in last, done.stderr
    assert done.stderr.count("error: ") == 1


BAD_INPUT = [  # script, settings, exit status, words of the message
    (TRAIN, {"hypotheses": 0}, 2, "--hypotheses is 0"),
    (TRAIN, {"temperatures": -0.1}, 2, "--temperatures is (-0.1,)"),
    (TRAIN, {"temperatures": "nan"}, 2, "--temperatures is (nan,)"),
    (TRAIN, {"betas": (1.5, 0.9)}, 2, "1.5"),
    (TRAIN, {"action_steps": 8}, 2, "action_steps is 8; with obs_steps = 2 and horizon = 8 it must be between 1 and 7"),
    (TRAIN, {"backbone": "unet", "horizon": 10}, 2, "horizon is 10"),
    (TRAIN, {"device": "warp"}, 2, "--device warp"),
    (TRAIN, {"env": "walkman"}, 2, "'walkman'"),
    (TRAIN, {"demos": "nowhere.npz"}, 1, "no demonstrations at nowhere.npz"),
    (TRAIN, {"demos": "nan.npz"}, 1, "action has NaN or infinity at step 17"),
    (TRAIN, {"ckpt": "nowhere.pt"}, 1, "no checkpoint at nowhere.pt"),
    (TRAIN, {"ckpt": "corrupt.pt"}, 1, "corrupt.pt (5004 bytes) cannot be read"),
    (EVALUATE, {"ckpt": "nowhere.pt"}, 1, "no checkpoint at nowhere.pt"),
    (EVALUATE, {"ckpt": "corrupt.pt"}, 1, "corrupt.pt (5004 bytes) cannot be read"),
    (EVALUATE, {"ckpt": "walkman.pt"}, 1, "'walkman'"),
    (EVALUATE, {"env": "walkman"}, 1, "not for walkman"),
    (EVALUATE, {"episodes": 0}, 2, "--episodes is 0"),
    (EVALUATE, {"device": "warp"}, 2, "warp"),
    (EVALUATE, {"device": "cuda:77"}, 2, "cuda:77"),  # there is none; the checkpoint is not to blame
]


@pytest.fixture(scope="module")
def refusals(whole, work) -> list[subprocess.CompletedProcess]:
    """All of BAD_INPUT, two at a time: nearly all of their time is the import of torch."""
    content = load_checkpoint(whole / "dbp.pt")
    content["policy"]["config"]["env"] = "walkman"
    save_checkpoint(content, work / "walkman.pt")

    def refuse(number: int) -> subprocess.CompletedProcess:
        script, settings, *_ = BAD_INPUT[number]
        if script == TRAIN:
            return run(*train(work, out=f"refused-{number}", **settings), cwd=work)
        return run(script, *flags(**{"ckpt": "whole/dbp.pt", "episodes": 1, **settings}), cwd=work)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(refuse, range(len(BAD_INPUT))))


@pytest.mark.parametrize("number", range(len(BAD_INPUT)), ids=[f"{Path(row[0]).stem} {row[1]}" for row in BAD_INPUT])
def test_bad_input_is_refused_in_one_line(number, refusals, work):
    *_, status, words = BAD_INPUT[number]
    assert_refused(refusals[number], status, words)
    assert not (work / f"refused-{number}").exists()  # before anything was written


def test_unknown_flags_stop_both_scripts(work):
    for script in (TRAIN, EVALUATE):
        done = run(script, "--no-such-flag", "1", cwd=work)
        assert done.returncode == 2
        assert "no-such-flag" in done.stderr and "Traceback" not in done.stderr


def test_resume_needs_the_state_of_a_training(whole, work):
    assert_refused(run(TRAIN, "--resume", "--out", "nothing", cwd=work), 1, "no checkpoint at nothing/state.pt")
    (work / "mixed").mkdir()
    shutil.copy(whole / "dbp.pt", work / "mixed" / "state.pt")
    assert_refused(run(TRAIN, "--resume", "--out", "mixed", cwd=work), 1, "mixed/state.pt")


# --- a training that goes wrong ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exploded(work) -> tuple[Path, subprocess.CompletedProcess]:
    """A learning rate of 1e30: one update, and nothing is finite any more."""
    return work / "exploded", run(*train(work, out="exploded", lr=1e30, warmup=0, save_every=1), cwd=work)


def test_a_training_that_explodes_stops_with_its_step(exploded):
    out, done = exploded
    assert "Traceback" not in done.stderr
    assert done.returncode == 1
    step = int(re.search(r"error: .*not finite at step (\d+)", done.stderr)[1])
    state = load_checkpoint(out / "state.pt")
    assert state["step"] == step  # every step was saved: the one before the bad update is the last
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_an_exploded_training_names_no_file_that_it_does_not_have(exploded, work):
    named = re.findall(r"\S+\.pt\b", exploded[1].stderr)
    assert "exploded/state.pt" in named
    assert [path for path in named if not (work / path).exists()] == []


# --- two processes ----------------------------------------------------------------------------------------------------


def test_two_processes_give_the_weights_of_one(work):
    settings = {"steps": 5, "eval_every": 5, "eval_episodes": 1, "report_episodes": 1, "warmup": 0}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = start(*torchrun, *train(work, out="two", **settings), cwd=work)
    one = run(*train(work, out="one", **settings), cwd=work)
    two = wait(two)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    assert "2 process(es)" in two.stdout
    states = [load_checkpoint(work / name / "state.pt") for name in ("one", "two")]
    for weights in (lambda state: state["model"], lambda state: state["policy"]["weights"]):
        a, b = (weights(state) for state in states)
        worst = max((a[name] - b[name]).abs().max().item() for name in a)
        assert worst < 1e-6, worst
    begin = torch.Generator().manual_seed(0).get_state()
    assert not torch.equal(states[0]["generator"], begin)
    same(states[0]["generator"], states[1]["generator"])


def test_the_papers_protocol_reports_the_mean_of_the_five_best_of_ten_evaluations(tmp_path):
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "hopper.hdf5", "w") as file:
        file["observations"], file["actions"] = rng.normal(size=(90, 11)), rng.uniform(-1, 1, (90, 3))
        file["rewards"], file["terminals"], file["timeouts"] = np.ones(90), np.arange(90) % 30 == 29, np.zeros(90, bool)
    settings = {"env": "hopper-medium-v2", "demos": "hopper.hdf5", "steps": 25, "batch_size": 8, "report_episodes": 2}
    done = run(TRAIN, *flags(**settings, protocol="papers", out="out", device="cpu"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    scores = sorted(float(row["score"]) for row in metrics(tmp_path / "out") if row["score"])
    assert len(scores) == 9  # every third step, and the last
    line = json.loads((tmp_path / "out" / "result.json").read_text())
    assert line["score_top5"] == pytest.approx(np.mean(scores[-5:]), rel=1e-3)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eval_episodes"] == 20


# --- recordings without an environment ----------------------------------------------------------------------------------


def test_a_task_without_an_environment_trains_and_keeps_the_newest_policy(tmp_path, monkeypatch, capsys):
    arm = envs.Task(
        name="my-arm",
        score="success",
        obs_shapes={"robot": (3,)},
        action_dim=2,
        make=None,
        demo_arrays=("robot", "action"),
        demo_convert=lambda arrays: ({"robot": arrays["robot"]}, arrays["action"]),
    )
    monkeypatch.setitem(envs.TASKS, "my-arm", arm)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    steps = {"robot": rng.normal(size=(60, 3)).astype(np.float32), "action": rng.normal(size=(60, 2)).astype(np.float32)}
    np.savez("mine.npz", **steps, episode_ends=np.array([30, 60]))
    small = {name: value for name, value in SETTINGS.items() if "episodes" not in name}
    command = flags(**small | {"steps": 20, "eval_every": 15}, env="my-arm", demos="mine.npz", out="arm")
    monkeypatch.setattr(sys, "argv", ["dbp_train.py", *command])
    dbp_train.main()
    assert "nothing was reported" in capsys.readouterr().out
    assert not (tmp_path / "arm" / "result.json").exists() and (tmp_path / "arm" / "curve.png").exists()
    newest = Policy.from_state(load_checkpoint("arm/state.pt")["policy"])
    same(newest.state_dict(), Policy.load("arm/dbp.pt").state_dict())
    monkeypatch.setattr(sys, "argv", ["dbp_train.py", *command, "--report-episodes", "2", "--out", "other"])
    with pytest.raises(common.UserError, match="my-arm has no environment"):
        dbp_train.main()
