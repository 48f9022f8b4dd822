"""The bottom of the house: files of a run, the log, devices, processes, optimizers, averages."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import runs
from conftest import small_model
from runs import EMA, InputError, build_optimizers, set_learning_rates

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


# --------------------------------------------------------------------------------------------------
# Files


def test_a_checkpoint_is_on_the_disk_before_it_takes_the_place_of_the_last_one(monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, call=call: done.append(name) or call(*a))
    runs.save_checkpoint("a/model.pt", {"format": "x", "n": 1})
    assert done == ["fsync", "replace"] and os.listdir("a") == ["model.pt"]
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(InputError, match="a/model.pt: cannot be written .*full.*saved before is"):
        runs.save_checkpoint("a/model.pt", {"format": "x", "n": 2})
    assert runs.load_checkpoint("a/model.pt", "x")["n"] == 1 and os.listdir("a") == ["model.pt"]


def test_a_log_keeps_one_row_of_each_step_and_starts_a_line_after_a_cut_off_one():
    log = Path("log.csv")
    for step, loss in ((1, 0.5), (2, 0.4)):
        runs.append_log(log, {"stage": "vae", "step": step, "loss": loss})
    log.write_text(log.read_text() + "vae,3,0.")
    for step, loss in ((2, 0.3), (3, 0.2)):
        runs.append_log(log, {"stage": "vae", "step": step, "loss": loss})
    rows = runs.read_log(log)
    assert [(row["step"], row["loss"]) for row in rows] == [("1", "0.5"), ("2", "0.3"),
                                                            ("3", "0.2")]
    assert runs.is_run(Path(".")) and [*rows[0]] == [*runs.COLUMNS]


def test_a_folder_with_another_programs_log_is_no_run_and_is_not_touched():
    Path("results").mkdir()
    Path("results/log.csv").write_text("date,weight\n1,2\n")
    with pytest.raises(InputError, match="--out results: its log.csv is of no run of train.py"):
        runs.claim_folder("results", "shapes")
    assert Path("results/log.csv").read_text() == "date,weight\n1,2\n"
    assert not runs.is_run(Path("results")) and not runs.is_run(Path("nowhere"))


def test_two_trainings_at_once_do_not_share_a_folder():
    first, log = runs.claim_folder(None, "shapes")
    second, other = runs.claim_folder(None, "shapes")
    assert (first, second) == (Path("runs/shapes"), Path("runs/shapes-2"))
    with pytest.raises(InputError, match="--out runs/shapes: another training writes there"):
        runs.claim_folder("runs/shapes", "shapes")
    log.close()
    other.close()


@pytest.mark.parametrize("error", [OSError(9, "Bad file descriptor"), OSError(5, "no"),
                                   NotImplementedError])
def test_only_a_lock_that_is_taken_means_that_another_training_is_there(monkeypatch, error):
    import fcntl
    if isinstance(error, type):
        error = OSError(95, "not supported")
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(error))
    folder, log = runs.claim_folder("here", "shapes")
    assert folder == Path("here") and not log.closed
    log.close()


@pytest.mark.parametrize("name, says", [("weights.safetensors", "weights without their sizes"),
                                        ("nowhere.pt", "no such file or folder here")])
def test_what_is_no_model_is_one_line_with_what_to_give(name, says):
    Path("weights.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match=says) as error:
        runs.load_checkpoint(name, "magicvideo")
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# Commands, devices and processes


def test_a_command_runs_in_a_notebook_and_without_a_console(monkeypatch):
    class OutStream:
        """A notebook's stream has no reconfigure."""

        def write(self, text):
            return len(text)

        def flush(self):
            pass

    ran = []
    for stream in (OutStream(), None):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        runs.run_command("test", lambda: ran.append(print("é")))
    assert len(ran) == 2
    done = subprocess.run(f"{sys.executable} {ROOT}/sample.py --help >&- 2>&-", shell=True)
    assert done.returncode == 0


def test_a_mistake_ends_with_status_2_and_one_line_that_names_a_later_process(capsys, monkeypatch):
    def mistaken():
        raise InputError("--data x: no such folder")

    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for rank, line in (("0", "train.py: --data x"), ("3", "train.py, process 3: --data x")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended:
            runs.run_command("train.py", mistaken)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.startswith(line) and said.count("\n") == 1
    assert slept == [1]  # the first process speaks first, and ends the others


def test_a_command_that_is_terminated_says_so_as_after_ctrl_c(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        runs.run_command("sample.py", lambda: signal.raise_signal(signal.SIGTERM))
    assert ended.value.code == 130
    assert capsys.readouterr().err == "sample.py: stopped, nothing written\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_signals_are_left_alone_outside_the_main_thread():
    found = []

    def work():
        with runs.stop_signals() as stop:
            found.append(stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [[]]


@pytest.mark.parametrize("name", ["cpu:abc", "cuda:99", "tpu", "cpu:1"])
def test_a_device_that_is_not_there_is_one_line(name):
    with pytest.raises(InputError, match=f"--device {name}: not on this machine; use .*cpu"):
        runs.pick_device(name)
    assert runs.pick_device("cpu") == torch.device("cpu")


def test_without_bf16_no_autocast_is_asked_for_and_where_it_is_missing_bf16_is_refused(monkeypatch):
    def missing(*_, **__):
        raise RuntimeError("User specified an unsupported autocast device_type 'mps'")

    cpu, mps = torch.device("cpu"), torch.device("mps")
    with runs.autocast(cpu, "bf16"):
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
    runs.check_precision(cpu, "bf16")
    monkeypatch.setattr(torch, "autocast", missing)  # torch 2.4 on an Apple GPU
    with runs.autocast(mps, "fp32"):
        pass
    runs.check_precision(mps, "fp32")
    with pytest.raises(InputError, match="--precision bf16: .* on mps; use fp32"):
        runs.check_precision(mps, "bf16")
    monkeypatch.undo()
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # 2.5 warns, trains fp32
    with pytest.raises(InputError, match="--precision bf16"):
        runs.check_precision(cpu, "bf16")


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert runs.usable_cores() == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(64)})
    monkeypatch.setattr(Path, "read_text", lambda _: "200000 100000\n")  # a container's share
    assert runs.usable_cores() == 2
    monkeypatch.setattr(Path, "read_text", lambda _: "max 100000\n")
    assert runs.usable_cores() == 64


def test_processes_that_cannot_reach_each_other_are_not_started(monkeypatch):
    def refused(*_, **__):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(runs.socket, "create_connection", refused)
    with pytest.raises(InputError, match="--ranks 2: .*unreachable.*--ranks 1"):
        runs.start_processes(2, ["-c", "pass"])


def test_a_process_that_ends_before_it_joins_ends_the_others_at_once(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    threads = torch.get_num_threads()
    processes = runs.start_processes(2, ["-c", "import sys; sys.exit(3)"])
    try:
        with pytest.raises(InputError, match="ended before the training began, with status 3"):
            runs.join_processes(torch.device("cpu"), processes)
    finally:
        runs.leave_processes(processes)
        torch.set_num_threads(threads)
    assert "RANK" not in os.environ and "WORLD_SIZE" not in os.environ


# --------------------------------------------------------------------------------------------------
# Optimizers and the moving average


def test_hidden_matrices_are_muons_and_all_else_is_adamws():
    model = small_model()
    names = {p: name for name, p in model.named_parameters()}
    groups = [{"params": [*model.unet.parameters(), *model.text_encoder.parameters()]}]
    adamw, muon = build_optimizers([model.unet, model.text_encoder], groups, muon=True)
    assert (adamw.defaults["betas"], adamw.defaults["weight_decay"]) == ((0.9, 0.99), 0.0)
    of_adamw, of_muon = ([names[p] for p in optimizer.param_groups[0]["params"]]
                         for optimizer in (adamw, muon))
    assert sorted(of_adamw + of_muon) == sorted(names[p] for p in groups[0]["params"])
    for name in of_muon:
        others = ("norm", "token_embedding", "position_embedding", "adaptor", "conv_in", "conv_out")
        assert name.endswith("weight") and not any(part in name for part in others)
    assert {"unet.mid_block.resnets.0.conv1.weight", "unet.mid_block.attentions.0.proj_in.weight",
            "unet.mid_block.temporal_attentions.0.to_q.weight"} <= {*of_muon}
    (alone,) = build_optimizers([model.unet], groups, muon=False)
    assert [*map(len, (g["params"] for g in alone.param_groups))] == [len(groups[0]["params"])]


def test_learning_rates_rise_from_the_start_of_each_group_and_fall_to_zero():
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "start": start}
                                 for start in (0, 80)])
    rates = []
    for step in range(100):
        set_learning_rates([optimizer], (2.0,), step, 100, 10)
        rates.append([group["lr"] for group in optimizer.param_groups])
    first, second = zip(*rates)
    assert first[0] == pytest.approx(0.2) and 1.9 < max(first) < 2 and first[-1] < 0.001
    assert first.index(max(first)) == 9 and second.index(max(second)) == 88
    assert second[80] == pytest.approx(0.2) and second[-1] < 0.02


def test_the_moving_average_forgets_the_start_and_changes_places_with_the_weights():
    weight = nn.Parameter(torch.zeros(1))
    ema = EMA([weight], 0.999)
    weight.data.fill_(1)
    ema.update()
    assert ema.shadow[0].item() == pytest.approx(1 - 2 / 11)  # not 0.001
    with pytest.raises(KeyboardInterrupt), ema.applied():
        assert weight.item() == pytest.approx(9 / 11)
        raise KeyboardInterrupt
    assert weight.item() == 1 and ema.shadow[0].item() == pytest.approx(9 / 11)
    ema.shadow = [torch.zeros(1)]
    ema.count = 10**6
    ema.update()
    assert ema.shadow[0].item() == pytest.approx(0.001, rel=1e-3)
