"""Runs on several nodes: which commands can be one, and the lines of a script that start their processes."""

from collections.abc import Sequence

from src.cluster.matrix import PlannedRun
from src.cluster.spec import Resources

PORT = 29400
"""Where the processes of a run meet, plus the job's number modulo 1000."""
RAY = '"${container[@]}" "${runner[@]}" -m ray.scripts.scripts'
SECONDS_FOR_RAY = 300


def refusal(run: PlannedRun) -> str | None:
    """Why a run cannot have the nodes that it asks for, if it cannot."""
    nodes, gpus = run.resources["nodes"], run.resources["gpus"]
    if nodes == 1:
        return None
    said = f"steps.{run.step}.resources.nodes = {nodes}: "
    if run.command[0] == "finetune":
        n, found = nodes * max(1, gpus), _value(run.command, "num_processes", "1")
        what = f"{nodes} nodes of {gpus} GPUs are {n} processes, a GPU each" if gpus else f"{n} processes, one a node"
        return None if found == str(n) else f"{said}{what}; give num_processes = {n}, it is {found}"
    if uses_vllm(run.command):
        return (
            f"{said}vLLM over several nodes is written but was never tried; take one node, or try it with --validate "
            f"false: the script then brings up Ray"
        )
    return (
        f"{said}src.{run.command[0]} is one process; take one node, or plan with --validate false what torchrun's "
        f"variables may start several times"
    )


def uses_vllm(command: Sequence[str]) -> bool:
    """Whether the engine of a command is vLLM, which has a launcher of its own."""
    return _value(command, "backend", "") == "vllm"


def _value(command: Sequence[str], name: str, default: str) -> str:
    for word, after in zip(command, [*command[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            return value if equals else after
    return default


def tasks_of(command: Sequence[str], resources: Resources) -> int:
    """Processes that SLURM starts on each node: one a GPU where there are several nodes, but for vLLM's."""
    return max(1, resources.gpus) if resources.nodes > 1 and not uses_vllm(command) else 1


def launcher(command: Sequence[str], resources: Resources) -> list[str]:
    """The lines that set `launcher`, what srun starts all processes by, or bring up Ray; none for one node."""
    if resources.nodes == 1:
        return []
    lines = [
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        # What SLURM calls a node need not be a name that leads to it.
        'MASTER_ADDR=$(scontrol --oneliner show node "$head" | grep -o "NodeAddr=[^ ]*" | cut -d = -f 2)',
        f"MASTER_PORT=$(({PORT} + SLURM_JOB_ID % 1000))",
        "export MASTER_ADDR MASTER_PORT",
    ]
    tasks = tasks_of(command, resources)
    # srun does not take the job's own --cpus-per-task over, since SLURM 22.05.
    srun = f"srun --ntasks-per-node={tasks} --cpus-per-task={max(1, resources.cpus // tasks)} --kill-on-bad-exit=1"
    if uses_vllm(command):
        return [*lines, *_ray(resources, srun)]
    # --mpi=none: accelerate would take MPI's variables for its own. --wait=0: the first has things to do behind the
    # others' end.
    words = f"{srun} --nodes={resources.nodes} --ntasks={resources.nodes * tasks} --mpi=none --wait=0"
    return [*lines, f"launcher=({words} bash hpc/rank.sh)"]


def _ray(resources: Resources, srun: str) -> list[str]:
    """vLLM's engine over nodes: the command runs on the first, and places its workers by Ray on all. Untried."""
    others = resources.nodes - 1
    start = f"{RAY} start --block --disable-usage-stats --num-gpus={resources.gpus}"
    return [
        "export RAY_ADDRESS=$MASTER_ADDR:$MASTER_PORT",
        # Else the engine takes 127.0.0.1.
        """export VLLM_HOST_IP=$(getent ahostsv4 "$MASTER_ADDR" | awk 'NR == 1 { print $1 }')""",
        f'{srun} --nodes=1 --ntasks=1 --nodelist="$head" {start} --head --include-dashboard=false '
        '--node-ip-address="$MASTER_ADDR" --port="$MASTER_PORT" &',
        f'{srun} --nodes={others} --ntasks={others} --exclude="$head" {start} --address="$RAY_ADDRESS" &',
        f"until {RAY} status >/dev/null 2>&1; do",
        f'  ((SECONDS < {SECONDS_FOR_RAY})) || {{ echo "no Ray at $RAY_ADDRESS" >&2; exit 1; }}',
        "  sleep 2",
        "done",
    ]
