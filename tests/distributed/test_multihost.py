"""Two processes of four devices as one job: stopped, killed and restarted with the same result, bit
for bit; and its checkpoints on other numbers of devices."""

import functools
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments.common.run_report import TIMING_FIELDS, read_records
from prelnroberta.params import flatten
from prelnroberta.pretrained.hf_checkpoint import load_pretrained
from tests.helpers.programs import ENVIRONMENT, ROOT, SCRATCH, command, tiny_flags

pytestmark = pytest.mark.slow

LAST = 12
FLAGS = tiny_flags(
    steps=LAST,
    gradient_accumulation_steps=1,
    save_every=3,
    eval_every=5,
    log_every=3,
    eval_rows=8,
    mesh_fsdp=2,
)


class Job:
    """Both processes, their output in files: a full pipe would stop them."""

    def __init__(self, run_dir, *flags):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.logs, self.processes = [], []
        for host in range(2):
            arguments = [
                *FLAGS,
                f"--run_dir={run_dir}",
                f"--coordinator_address=localhost:{port}",
                "--num_processes=2",
                f"--process_id={host}",
                "--heartbeat_timeout_seconds=20",
                *flags,
            ]
            log = SCRATCH / f"{run_dir.name}-{port}-{host}.log"
            self.logs.append(log)
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        command("pretrain", *arguments),
                        cwd=ROOT,
                        env=ENVIRONMENT
                        | {
                            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
                            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                        },
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def until_reported(self, run_dir, step):
        def reported():
            return max((r["step"] for r in read_records(run_dir / "metrics.jsonl")), default=0)

        while reported() < step and all(p.poll() is None for p in self.processes):
            time.sleep(0.01)

    def codes(self, timeout=300):
        """Exit codes, once both have ended by themselves."""
        try:
            return [process.wait(timeout) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def said(self):
        return "\n----\n".join(log.read_text()[-3000:] for log in self.logs)


@functools.cache
def undisturbed():
    run_dir = SCRATCH / "two-hosts"
    job = Job(run_dir)
    assert job.codes() == [0, 0], job.said()
    return run_dir


def records(run_dir):
    return [
        {name: value for name, value in record.items() if name not in TIMING_FIELDS}
        for record in read_records(run_dir / "metrics.jsonl")
    ]


def test_stopped_and_killed_job_resumes_to_the_same_result(tmp_path):
    run_dir = tmp_path / "run"
    job = Job(run_dir)
    job.until_reported(run_dir, 3)
    job.processes[1].send_signal(signal.SIGTERM)  # one of them, and not the first
    assert job.codes() == [143, 143], job.said()
    assert "SIGTERM: saved step" in job.said()
    steps = sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit())
    assert 3 <= steps[-1] < 9, steps

    job = Job(run_dir)
    job.until_reported(run_dir, 9)
    job.processes[1].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    codes = job.codes(timeout=60)  # heartbeat_timeout_seconds is 20
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, 2), job.said()
    assert time.monotonic() - begin < 60
    assert "another host of this job has stopped" in job.said(), job.said()

    job = Job(run_dir)
    assert job.codes() == [0, 0], job.said()
    assert "resuming" in job.said()
    weights = "model/model.safetensors"
    assert (run_dir / weights).read_bytes() == (undisturbed() / weights).read_bytes()
    assert [repr(r) for r in records(run_dir)] == [repr(r) for r in records(undisturbed())]


def test_checkpoint_of_two_hosts_restores_on_eight_four_and_one_devices(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.programs.restore_on_meshes",
            undisturbed(),
            str(LAST),
            tmp_path,
        ],
        cwd=ROOT,
        env=ENVIRONMENT
        | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = flatten(load_pretrained(undisturbed() / "model")[0])
    for name in ("pmap8", "mixed8", "fsdp4", "one"):
        found = np.load(tmp_path / f"{name}.npz")
        for path, value in expected.items():
            np.testing.assert_array_equal(found[path], value, err_msg=f"{name} {path}")


def test_manual_host_setup_requires_all_three_flags(tmp_path):
    done = subprocess.run(
        command("pretrain", *FLAGS, f"--run_dir={tmp_path / 'run'}", "--process_id=1"),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and "--coordinator_address, --num_processes and --process_id" in done.stderr
    )
    assert not (tmp_path / "run").exists()
