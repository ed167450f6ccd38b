"""Starts jaxlm on GKE: a JobSet of one pod per host, by kubectl or by XPK.

    python -m launch.gke --topology=v5e:16x16 --slices=2 --image=IMAGE -- python -m jaxlm.train ...
    python -m launch.gke --gpu=nvidia-h100-80gb --nodes=4 --image=IMAGE -- python -m ...
    python -m launch.gke --via=xpk --cluster=CLUSTER --topology=v5e:16x16 --image=IMAGE -- ...

TPU pods find each other by what GKE sets in them; GPU pods are told where process 0 is. When any
pod fails, JobSet starts all again, up to --restarts times; but not where the user has something to
mend (exit code 1 or 2). A pod that has to go gets SIGTERM, and GRACE seconds to save in (a spot
node gives about 25).
"""

import subprocess
import sys

from launch import options, tpus, yaml

PORT = 8476  # of JAX's coordinator on pod 0; jaxlm uses the one after it too
WORKER = "worker"
CRASHED, LOST = 70, 75  # exit codes of jaxlm below 127, which XPK would not start again


def parser() -> options.Parser:
    p = options.Parser("launch.gke", __doc__ or "")
    number = options.at_least
    p.add_argument("--via", choices=("kubectl", "xpk"), default="kubectl", help="(kubectl)")
    p.add_argument("--image", help="container image that holds jaxlm")
    p.add_argument("--topology", type=tpus.argument, help="of a TPU slice, such as v5e:16x16")
    p.add_argument("--slices", type=number(1), default=1, help="TPU slices (1)")
    p.add_argument(
        "--gpu",
        type=options.matching(r"nvidia-[a-z0-9-]+", "nvidia-h100-80gb"),
        help="GKE's name of the GPU, such as nvidia-h100-80gb",
    )
    p.add_argument("--nodes", type=number(1), default=1, help="GPU nodes (1)")
    p.add_argument("--gpus_per_node", type=number(1), default=8, help="(8)")
    p.add_argument("--grace", type=number(1), default=300, help="seconds to save in (300)")
    p.add_argument("--restarts", type=number(0), default=100, help="at most (100)")
    p.add_argument("--spot", action="store_true", help="on spot nodes")
    volume = options.matching(r"[a-z0-9.-]+:/\S*", "CLAIM:/PATH")
    p.add_argument("--volume", type=volume, help="CLAIM:/PATH: a volume that all pods share")
    p.add_argument("--namespace", default="default", help="(default)")
    p.add_argument("--queue", help="local queue of Kueue")
    p.add_argument("--service_account", help="of the pods")
    p.add_argument("--cluster", help="for XPK")
    p.add_argument("--project", help="for XPK; default: gcloud's")
    p.add_argument("--zone", help="for XPK; default: gcloud's")
    p.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="(repeat)")
    return p


def check(p: options.Parser, o) -> None:
    if not o.image:
        p.error("--image is missing: the container image that holds jaxlm")
    if bool(o.topology) == bool(o.gpu):
        p.error("give one of --topology=v5e:16x16 (TPU) and --gpu=nvidia-h100-80gb")
    if o.via == "xpk" and not o.cluster:
        p.error("--via=xpk needs --cluster=NAME")
    if o.via == "xpk" and (o.volume or o.queue or o.service_account or o.namespace != "default"):
        p.error(
            "XPK sets queue, namespace and account itself, and attaches volumes as `xpk storage`"
        )


def check_workdir(p: options.Parser, o, command: list[str]) -> None:
    """All pods train into one folder, which has to outlive them: on a volume."""
    jobs, pods = _size(o)
    if o.via == "xpk":  # which attaches volumes itself
        options.require_shared_workdir(p, command, jobs * pods)
        return
    named = options.workdir(command)
    if named is None:
        return
    path = o.volume.partition(":")[2] if o.volume else ""
    if path and (named + "/").startswith(path.rstrip("/") + "/"):
        return
    words = (
        f"the work folder ({named or 'the recipe names one'}) lies in the pod, and goes with it: "
        f"add --volume=CLAIM:/PATH, and to the command --config.workdir={path or '/PATH'}/NAME"
    )
    if jobs * pods > 1:
        p.error(words)
    print(f"{p.prog}: {words}", file=sys.stderr)


def _size(o):
    """Jobs, and pods of each."""
    return (o.slices, o.topology.hosts) if o.topology else (1, o.nodes)


def jobset(p: options.Parser, o, command: list[str]) -> dict:
    """The manifest, as kubectl takes it."""
    jobs, pods = _size(o)
    container = {"name": WORKER, "image": o.image, "command": command}
    pod = {"restartPolicy": "Never", "terminationGracePeriodSeconds": o.grace}
    env = [_annotation("JAXLM_RESTARTS", "jobset.sigs.k8s.io/restart-attempt")]
    env += [{"name": n, "value": v} for n, v in options.environment(p, o.env).items()]
    volumes, mounts = [], []
    if o.topology:
        chips = str(min(o.topology.chips, tpus.HOST_CHIPS))
        pod["nodeSelector"] = {
            "cloud.google.com/gke-tpu-accelerator": o.topology.kind.gke,
            "cloud.google.com/gke-tpu-topology": o.topology.topology,
        }
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
        container["ports"] = [{"containerPort": n} for n in (8471, 8080)]  # libtpu, Megascale
        container["resources"] = {"limits": {"google.com/tpu": chips}}
    else:
        pod["nodeSelector"] = {"cloud.google.com/gke-accelerator": o.gpu}
        container["ports"] = [{"containerPort": n} for n in (PORT, PORT + 1)]
        container["resources"] = {"limits": {"nvidia.com/gpu": str(o.gpus_per_node)}}
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})  # NCCL's
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
        if pods > 1:
            env += [*_coordinator(o.name, pods)]
    if o.volume:
        claim, _, path = o.volume.partition(":")
        volumes.append({"name": "shared", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": "shared", "mountPath": path})
    if o.spot:
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
    if o.service_account:
        pod["serviceAccountName"] = o.service_account
    container |= {"env": env} | ({"volumeMounts": mounts} if mounts else {})
    pod |= {"containers": [container]} | ({"volumes": volumes} if volumes else {})
    mend = {"containerName": WORKER, "operator": "In", "values": list(options.MEND)}
    job = {
        "parallelism": pods,
        "completions": pods,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one pod fails: the job fails, and JobSet starts all of them again
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": mend}]},
        "template": {"spec": pod},
    }
    metadata = {"name": o.name, "namespace": o.namespace}
    if o.topology:  # each slice is a node pool of its own, and no two jobs share one
        metadata["annotations"] = {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        }
    if o.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": o.queue}
    stop = {
        "name": "somethingToMend",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": o.restarts, "rules": [stop]},
            "network": {"enableDNSHostnames": True, "subdomain": o.name},
            "replicatedJobs": [{"name": WORKER, "replicas": jobs, "template": {"spec": job}}],
        },
    }


def _coordinator(name, pods):
    """What the pods of a GPU job must be told; JobSet gives pod 0 this host name."""
    yield {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-{WORKER}-0-0.{name}:{PORT}"}
    yield {"name": "JAX_NUM_PROCESSES", "value": str(pods)}
    yield _annotation("JAX_PROCESS_ID", "batch.kubernetes.io/job-completion-index")


def _annotation(name, key):
    """A variable that tells a pod what it is annotated with."""
    path = f"metadata.annotations['{key}']"
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def xpk(p: options.Parser, o, command: list[str]) -> list[str]:
    """XPK's command line."""
    if o.topology:
        size = [f"--tpu-type={o.topology.type}", f"--num-slices={o.slices}"]
    else:
        kind = o.gpu.removeprefix("nvidia-")
        size = [f"--device-type={kind}-{o.gpus_per_node}", f"--num-nodes={o.nodes}"]
    env = [f"--env={n}={v}" for n, v in options.environment(p, o.env).items()]
    return [
        *("xpk", "workload", "create", f"--workload={o.name}", f"--cluster={o.cluster}"),
        *([f"--project={o.project}"] if o.project else []),
        *([f"--zone={o.zone}"] if o.zone else []),
        *size,
        *(["--spot"] if o.spot else []),
        f"--docker-image={o.image}",
        f"--max-restarts={o.restarts}",
        f"--restart-on-exit-codes={CRASHED},{LOST}",
        f"--termination-grace-period-seconds={o.grace}",
        *env,
        f"--command={options.line(command)}",
    ]


def main(argv: list[str]) -> int:
    p = parser()
    o, command = p.split(argv)
    check(p, o)
    check_workdir(p, o, command)
    if o.via == "xpk":
        call, text = xpk(p, o, command), None
    else:
        call = ["kubectl", "create", "-f", "-"]
        text = yaml.dump(jobset(p, o, command))
    if o.dry_run:
        print(f"# would run: {options.line(call)}" + (" < this manifest" if text else ""))
        print(text or "", end="")
        return 0
    try:
        return subprocess.run(call, input=text, text=True).returncode
    except FileNotFoundError:
        p.error(f"there is no {call[0]} here: install it, or look with --dry_run")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
