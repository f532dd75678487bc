"""From runs to arrays: what waits for what, scripts that hold words unchanged, what SLURM says read back."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.cluster.matrix import PlannedRun
from src.cluster.records import CLUSTER_KEYS, cluster_settings
from src.cluster.scripts import array_script
from src.cluster.slurm import _tasks, gathered, spread
from src.cluster.spec import Resources
from src.cluster.submitting import arrays
from src.common.errors import InputError
from tests.conftest import ROOT


@given(st.sets(st.integers(0, 300), min_size=1))
def test_numbers_of_an_array_survive_their_short_form(numbers: set[int]) -> None:
    assert list(spread(gathered(numbers))) == sorted(numbers)


def test_slurms_rows_are_read() -> None:
    rows = [
        ["12_[0-2,5%3]", "PENDING", "Dependency"],
        ["12_3", "CANCELLED by 0", ""],
        ["7", "RUNNING", "None"],
        ["", ""],
    ]
    found = dict(_tasks(rows))
    assert set(found) == {"12_0", "12_1", "12_2", "12_5", "12_3", "7"}
    assert found["12_3"].state == "CANCELLED" and found["12_1"].is_waiting and found["7"].is_running


def run(name: str, *after: str) -> PlannedRun:
    return PlannedRun(
        id=name, name=name, step="s", factors={}, command=["x"], folder=name, after=list(after), resources={}
    )


def test_runs_wait_for_no_more_than_they_need() -> None:
    """One to one by aftercorr; several for one, or one for several, by afterok of just those tasks."""
    tasks = {"a": "9_0", "b": "9_4", "c": "10_0"}
    found = arrays([run("x", "a"), run("y", "b"), run("z", "c")], tasks, set(), 1000)
    assert [(each.dependency, {i: r.name for i, r in each.tasks.items()}) for each in found] == [
        ("aftercorr:9", {0: "x", 4: "y"}), ("aftercorr:10", {0: "z"}),
    ]  # fmt: skip
    found = arrays([run("x", "a"), run("y", "a"), run("z", "a", "c")], tasks, set(), 1000)
    assert [(each.dependency, [r.name for r in each.tasks.values()]) for each in found] == [
        ("afterok:9_0", ["x", "y"]), ("afterok:9_0:10_0", ["z"]),
    ]  # fmt: skip
    # What is done is not waited for, and an array is no larger than the cluster takes.
    found = arrays([run(str(i), "a") for i in range(5)], {}, {"a"}, 2)
    assert [(each.dependency, list(each.tasks)) for each in found] == [(None, [0, 1]), (None, [0, 1]), (None, [0])]


def test_scripts_hold_words_unchanged(tmp_path: Path) -> None:
    words = ["probe", "--x", "a b", 'it\'s "so"', "$HOME", "", "é\n2", "--output_dir", "o p"]
    planned = PlannedRun(id="1", name="n", step="s", factors={}, command=words, folder="o p", after=[], resources={})
    resources = Resources(gpus=2, memory_gb=1.5, constraint="h200&nvme", options=("--qos=a b",))
    text = array_script({3: planned}, resources, tmp_path, tmp_path / "lo%gs", {"account": "me", "partition": "p"})
    assert "#SBATCH --signal=B:USR1@120\n" in text
    short = array_script({3: planned}, Resources(time="2"), tmp_path, tmp_path, {})
    assert "#SBATCH --signal=B:USR1@30\n" in short
    assert "#SBATCH --gres=gpu:2\n#SBATCH --mem=1536M\n#SBATCH --account=me\n#SBATCH --partition=p\n" in text
    assert (
        "#SBATCH '--constraint=h200&nvme'\n#SBATCH '--qos=a b'\n" in text and f"{tmp_path}/lo%%gs/s-%A_%a.out" in text
    )
    with pytest.raises(InputError, match="line break"):
        array_script({0: planned}, Resources(options=("--x=a\nb",)), tmp_path, tmp_path, {})


def test_several_nodes_get_a_process_for_each_gpu_and_vllm_gets_ray(tmp_path: Path) -> None:
    scripts = []
    for words in (["finetune", "--num_processes", "8"], ["ask", "--backend", "vllm", "--tensor_parallel_size=8"]):
        planned = PlannedRun(id="1", name="n", step="s", factors={}, command=words, folder="o", after=[], resources={})
        scripts.append(array_script({0: planned}, Resources(nodes=2, gpus=4, cpus=9), tmp_path, tmp_path, {}))
        assert subprocess.run(["bash", "-n"], input=scripts[-1], text=True).returncode == 0
    ranks, ray = scripts
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=4\n#SBATCH --cpus-per-task=2\n" in ranks
    assert "srun --ntasks-per-node=4 --cpus-per-task=2 --kill-on-bad-exit=1 --nodes=2 --ntasks=8" in ranks
    assert "bash hpc/rank.sh)" in ranks and "ray" not in ranks
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n#SBATCH --cpus-per-task=9\n" in ray
    assert "--num-gpus=4 --head" in ray and '--nodes=1 --ntasks=1 --exclude="$head"' in ray and "rank.sh" not in ray


def test_times_are_slurms() -> None:
    known = {
        "90": 5400,
        "1:30:00": 5400,
        "100:00:01": 360_001,
        "2-12": 216_000,
        "1-01:30": 91_800,
        "1-00:00:05": 86_405,
    }
    assert {time: Resources(time=time).seconds for time in known} == known


def test_settings_of_the_cluster_are_checked_before_a_job_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "hpc" / "cluster.toml"
    path.parent.mkdir()
    shutil.copy(ROOT / "hpc" / "cluster.example.toml", path)
    assert cluster_settings(tmp_path)["account"] == "my-group"
    for line, words in (
        ('partitoin = "x"', "cluster.toml: unknown key 'partitoin'; the nearest is 'partition'"),
        ("account = 5", "cluster.toml: account is 5; expected a text"),
        ('runner = "python"', "cluster.toml: runner is 'python'; expected a list of texts"),
        ("runner = [1]", r"cluster.toml: runner is \[1\]; expected a list of texts"),
    ):
        path.write_text(line)
        with pytest.raises(InputError, match=words):
            cluster_settings(tmp_path)
    script = (ROOT / "hpc" / "cluster_settings.sh").read_text()
    (known,) = re.findall(r"known = \{(.*)\}", script)
    assert set(re.findall(r'"(\w+)"', known)) == set(CLUSTER_KEYS)
