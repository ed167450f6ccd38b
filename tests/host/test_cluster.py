"""Which processes belong together, from the environment alone."""

import os
import socket
import types

import numpy as np
import pytest

from jaxlm.host import cluster, rollcall

HINTS = (
    "JAX_",
    "SLURM_",
    "OMPI_",
    "JOB_COMPLETION",
    "KUBERNETES_",
    "CUDA_",
    "JAXLM_",
    "TPU_",
    "MEGASCALE_",
)
SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_NODELIST": "node[007-010]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x4)",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
THREE = {
    "JAX_COORDINATOR_ADDRESS": "a.b:8476",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in [n for n in os.environ if n.startswith(HINTS)]:
        monkeypatch.delenv(name)
    cluster._asked_of_jax.cache_clear()
    yield
    cluster._asked_of_jax.cache_clear()


@pytest.fixture
def place(monkeypatch):
    def of(*environments, **more):
        for name, value in {k: v for e in (*environments, more) for k, v in e.items()}.items():
            monkeypatch.setenv(name, value)
        cluster._asked_of_jax.cache_clear()
        return cluster.place()

    return of


def test_a_process_of_its_own(place):
    assert place() is None
    assert cluster.share(3) == [3]
    assert cluster.broadcast(3) == 3
    assert cluster.stop_at(7, "SIGTERM") == "SIGTERM"
    assert cluster.leave("error: ...", 1)
    assert (cluster.process(), cluster.count(), cluster.prefix()) == (0, 1, "")


def test_the_environment_says_it_all(place):
    assert place(THREE) == cluster.Place("a.b", 8476, 4, 3, [], "JAX_COORDINATOR_ADDRESS")


@pytest.mark.parametrize("environment", [THREE, SLURM, OPEN_MPI])
def test_devices_that_the_environment_names_are_left_to_jax(place, environment):
    """`None` is what `jax.distributed.initialize` asks the variable for; an empty list is not."""
    assert place(environment, JAX_LOCAL_DEVICE_IDS="2,3").devices is None
    assert place(environment, JAX_LOCAL_DEVICE_IDS="").devices == []


def test_an_indexed_job_says_which_pod_this_is(place):
    found = place(THREE, JAX_PROCESS_ID="", JOB_COMPLETION_INDEX="2")
    assert (found.process, found.processes) == (2, 4)


@pytest.mark.parametrize("changed", [{"JAX_NUM_PROCESSES": "1"}, {"JAXLM_PROCESSES": "1"}])
def test_one_process_is_alone(place, changed):
    assert place(THREE, changed) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID is not set"),
        ({"JAX_NUM_PROCESSES": ""}, "JAX_NUM_PROCESSES is not set"),
        ({"JAX_COORDINATOR_ADDRESS": ""}, "JAX_COORDINATOR_ADDRESS is not set"),
        ({"JAX_PROCESS_ID": "4"}, "process 4 of 4: the index counts from 0"),
        ({"JAX_PROCESS_ID": "first"}, "JAX_PROCESS_ID='first' must be a number"),
        ({"JAX_COORDINATOR_ADDRESS": "a.b"}, "is HOST:PORT, with a port, not 'a.b'"),
    ],
)
def test_half_of_it_is_an_error(place, changed, message):
    with pytest.raises(ValueError, match=message):
        place(THREE, changed)


def test_a_step_of_slurm(place):
    found = place(SLURM)
    assert (found.host, found.processes, found.process, found.found) == ("node007", 16, 6, "SLURM")
    assert found.devices == []  # no GPUs: whatever there is


@pytest.mark.parametrize(
    ("tasks", "visible", "mine"),
    [
        ("4(x4)", "0,1,2,3,4,5,6,7", [4, 5]),  # 4 tasks a node, 8 GPUs: the third has 2 of them
        ("4(x4)", "0,1,2,3", [2]),
        ("4(x4)", "5", []),  # the scheduler gave each task its own
        ("1(x16)", "0,1,2,3,4,5,6,7", []),  # one task a node: all of them
    ],
)
def test_gpus_of_a_node_are_split_among_its_tasks(place, tasks, visible, mine):
    found = place(SLURM, SLURM_STEP_TASKS_PER_NODE=tasks, CUDA_VISIBLE_DEVICES=visible)
    assert found.devices == mine


def test_gpus_that_slurm_has_split_already_are_not_split_again(place):
    own = {"SLURM_STEP_TASKS_PER_NODE": "2(x8)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert place(SLURM, own, SLURM_GPUS_ON_NODE="8").devices == []
    assert place(SLURM, own, SLURM_LOCALID="1", SLURM_GPUS_ON_NODE="4").devices == [2, 3]


def test_a_shell_inside_an_allocation_is_no_step(place, monkeypatch):
    shell = {k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}
    assert place(shell) is None


def test_open_mpi(place):
    found = place(OPEN_MPI)
    assert (found.host, found.processes, found.process) == ("10.96.0.1", 2, 1)


@pytest.mark.parametrize("environment", [SLURM, OPEN_MPI])
def test_neighbouring_jobs_have_no_port_in_common(place, environment):
    """Each takes two: JAX's, and the next one for ours."""

    def ports(job):
        number = {"SLURM_JOB_ID": str(job)}
        if environment is OPEN_MPI:  # whose number is the job's times 4096
            number = {"OMPI_MCA_orte_hnp_uri": f"{job * 4096}.0;tcp://10.96.0.1:34911"}
        port = place(environment, number).port
        return {port, port + 1}

    taken = [ports(job) for job in range(4090, 4100)]
    assert len(set.union(*taken)) == 2 * len(taken)
    assert all(61440 <= port <= 65535 for pair in taken for port in pair)
    assert ports(4095) == {65534, 65535}
    assert ports(4095 + 2048) == ports(4095)


def test_a_port_that_a_person_chose_is_taken_as_it_is(place):
    assert place(SLURM, JAX_COORDINATOR_PORT="7001").port == 7001


@pytest.mark.parametrize("after", [0, 1])
def test_a_port_that_somebody_has_ends_process_0_at_once(after, monkeypatch):
    """With the code for "try again": another start of the job, or another job of that number."""
    monkeypatch.setenv("JAXLM_JOIN_SECONDS", "0.1")
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1] - after
        where = cluster.Place("localhost", port, 2, 0, [], "SLURM")
        with pytest.raises(rollcall.NotTogether, match=rf"port {port + after} of .* in use; .* w"):
            cluster.join(where, {}, lambda text: None)


def test_a_scheduler_that_hides_process_0_needs_its_address(place):
    hidden = {k: v for k, v in OPEN_MPI.items() if "orte" not in k}
    with pytest.raises(ValueError, match=r"Open MPI.*JAX_COORDINATOR_ADDRESS"):
        place(hidden)
    found = place(hidden, JAX_COORDINATOR_ADDRESS="10.0.0.1:9000")
    assert (found.host, found.port, found.process) == ("10.0.0.1", 9000, 1)


@pytest.fixture
def tpu(monkeypatch):
    """A host with TPUs, where no metadata server answers."""
    from jax._src.clusters import cloud_tpu_cluster
    from jax._src.clusters import cluster as jax_cluster

    def nobody(key):
        raise OSError("no metadata server")

    for module in (cloud_tpu_cluster, jax_cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", nobody)
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name == "libtpu")
    monkeypatch.setattr(cluster, "tpu_is_here", lambda: True)


TWO_SLICES = {
    "TPU_WORKER_HOSTNAMES": "a,b",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}


def test_hosts_of_two_tpu_slices(place, tpu):
    """As on GKE, where the environment says it, and JAX counts together."""
    found = place(TWO_SLICES, TPU_SKIP_MDS_QUERY="1")
    assert found == cluster.Place("localhost", 8482, 4, 3, None, "Cloud TPU")


def test_a_tpu_without_a_metadata_server_is_alone_unless_it_knows_of_others(place, tpu):
    assert place() is None
    with pytest.raises(ValueError, match="Cloud TPU, and the others could not be found: no meta"):
        place(TWO_SLICES)


def test_the_first_difference_names_host_and_both_values():
    found = [{"jax": "0.10.2", "--config.seed": "0"}] * 2 + [
        {"jax": "0.12.0", "--config.seed": "0"}
    ]
    hosts = {0: "a", 1: "b", 2: "c"}
    assert cluster._difference(found[:2], hosts) == ""
    assert cluster._difference(found, hosts) == (
        "the processes do not agree: jax is 0.10.2 on process 0 (a), 0.12.0 on 2 (c)"
    )


def test_the_metadata_server_is_asked_once(place, tpu, monkeypatch):
    asked = []
    monkeypatch.setattr(cluster, "_detected", lambda name: asked.append(name) or ("a:1", 2, 0, 0))
    assert place() == cluster.place()
    assert asked == ["Cloud TPU"]


def test_what_each_process_has_read_is_compared(monkeypatch):
    """Whole: an array's repr leaves its middle out."""

    def two(here, there):
        """This process, which has `here`, and another with `there`."""
        said = []
        first = types.SimpleNamespace(hosts={0: "a", 1: "b"}, broadcast=lambda words: words)
        for value in (there, here):
            first.gather = lambda facts: said.append(facts) or [facts, said[0]]
            monkeypatch.setattr(cluster, "_fellows", first)
            cluster.agree("the prompts", value)

    numbers = np.arange(5000)
    two([("the", numbers)], [["the", numbers.tolist()]])
    changed = numbers.copy()
    changed[2500] = 0
    with pytest.raises(ValueError, match=r"the prompts is \w+ on process 0 \(a\), \w+ on 1 \(b\)$"):
        two([("the", numbers)], [("the", changed)])
    cluster._fellows = None
    cluster.agree("alone", object())
