"""A SLURM cluster of two nodes on this machine, of its real daemons, in a folder of its own.

Needs root and the packages slurmctld, slurmd, slurm-client and munge. Each node claims 64 cores and
8 GPUs (empty files), so that what is made for large nodes can be tried.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
MISSING = [p for p in PROGRAMS if not shutil.which(p, path=f"{os.environ['PATH']}:/usr/sbin")]
REASON = "needs root and the packages slurmctld, slurmd, slurm-client and munge"
USABLE = not MISSING and os.geteuid() == 0

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 RealMemory=100 Gres=gpu:8
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 RealMemory=100 Gres=gpu:8
PartitionName=all Nodes=n1,n2 Default=YES State=UP
"""


@contextlib.contextmanager
def running(folder: Path):
    """Starts the daemons; yields the environment in which SLURM's commands find them."""
    folder.chmod(0o755)  # munged wants its socket to be reached by everybody
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    for i in range(8):
        (folder / f"gpu{i}").touch()
    (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpu[0-7]\n")
    host = socket.gethostname().split(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, host=host, ports=[_free_port() for _ in range(3)]))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    environment |= {"SLURM_CONF": str(conf), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    munge = [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    munge += [f"--key-file={folder}/munge.key", f"--socket={folder}/munge.sock", "--force"]
    start = lambda *call: subprocess.run(call, env=environment, check=True)
    try:
        start("munged", *munge)
        start("slurmctld", "-f", conf)
        for node in ("n1", "n2"):
            start("slurmd", "-f", conf, "-N", node)
        _wait_until_idle(environment)
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
        for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "munged"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((folder / f"{name}.pid").read_text()), 15)


def _wait_until_idle(environment):
    end = time.monotonic() + 30
    while time.monotonic() < end:
        call = ["sinfo", "-h", "-t", "idle", "-o", "%D"]
        done = subprocess.run(call, env=environment, capture_output=True, text=True)
        if done.stdout.strip() == "2":
            return
        time.sleep(0.2)
    raise TimeoutError(f"SLURM's nodes do not come up: {done.stdout} {done.stderr}")


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]
