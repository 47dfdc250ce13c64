"""A Slurm of one node, with nothing shared with one that the machine may have."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

SBIN = "/usr/sbin"
"""Where Debian has the daemons, whether or not it is on the path."""

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scancel", "squeue", "sinfo")

CONF = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=64000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no Slurm here, in a line; None where there can."""
    path = os.environ.get("PATH", "") + os.pathsep + SBIN
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    return f"no Slurm here, {', '.join(absent)} (Debian: slurm-wlm)" if absent else None


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class OneNode:
    """Controller and node daemon in the foreground, ended by :meth:`stop`.

    Args:
        folder: for everything that Slurm writes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True)
        ports = [free_port(), free_port()]
        conf = folder / "slurm.conf"
        values = {"host": socket.gethostname(), "user": user.stdout.strip(), "ports": ports}
        conf.write_text(CONF.format(folder=folder, **values))
        path = os.environ.get("PATH", "") + os.pathsep + SBIN
        self.environment = {**os.environ, "SLURM_CONF": str(conf), "PATH": path}
        self.processes = [self._start("slurmctld", "-D", "-i"), self._start("slurmd", "-D")]

    def _start(self, *words: str) -> subprocess.Popen:
        with (self.folder / f"{words[0]}.out").open("w") as file:
            return subprocess.Popen(words, env=self.environment, stdout=file, stderr=file)

    def ask(self, *words: str) -> str:
        """What one of Slurm's programs prints."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout.strip()

    def wait(self, seconds: float = 60) -> str | None:
        """Until the node is idle; why it is not, after so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.ask("sinfo", "-h", "-o", "%T") == "idle":
                return None
            if any(process.poll() is not None for process in self.processes):
                break
            time.sleep(0.5)
        said = [p.read_text().strip().splitlines()[-1:] for p in self.folder.glob("*.log")]
        return f"Slurm does not start here: {'; '.join(line for part in said for line in part)}"

    def stop(self) -> None:
        """End all jobs, then the daemons."""
        self.ask("scancel", "--state=PENDING", "--user", self.ask("id", "-un"))
        self.ask("scancel", "--user", self.ask("id", "-un"))
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
