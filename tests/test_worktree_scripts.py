"""The worktree scripts on a repository of their own: what they make is ready to use, and they lose nothing."""

import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def run(script: str, folder: Path, *words: str, answer: str = "") -> subprocess.CompletedProcess[str]:
    command = [SCRIPTS / script, *words]
    return subprocess.run(command, cwd=folder, input=answer, capture_output=True, text=True, timeout=60)


def commit(folder: Path, name: str) -> None:
    (folder / name).write_text(name)
    git(folder, "add", name)
    git(folder, "commit", "-qm", f"add {name}")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Neither the caller's settings nor, in a hook, the caller's repository.
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    folder = tmp_path / "re po"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    git(folder, "config", "user.name", "A")
    git(folder, "config", "user.email", "a@example.org")
    (folder / ".gitignore").write_text(".venv/\n.env\ndata/experiments/\n")
    (folder / ".venv").mkdir()
    (folder / ".tiller_cache").mkdir()
    (folder / ".env").write_text("KEY=1\n")
    git(folder, "add", ".gitignore")
    commit(folder, "first.txt")
    return folder


def make(repository: Path, name: str) -> Path:
    done = run("claude-worktree.sh", repository, name)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def test_a_worktree_is_ready_to_use(repository: Path) -> None:
    folder = make(repository, "12")
    assert folder == repository.parent / "re po-worktrees" / "issue-12"
    assert git(folder, "branch", "--show-current") == "issue-12"
    assert (folder / ".venv").resolve() == repository / ".venv"
    assert (folder / ".tiller_cache").resolve() == repository / ".tiller_cache"
    assert (folder / ".env").read_text() == "KEY=1\n" and not (folder / ".env").is_symlink()
    assert git(folder, "status", "--porcelain") == ""
    (folder / ".env").write_text("KEY=2\n")
    assert make(folder, "12") == folder
    assert (folder / ".env").read_text() == "KEY=2\n"
    assert make(folder, "topic/new").name == "topic-new"


def test_a_branch_that_exists_is_taken_up(repository: Path, tmp_path: Path) -> None:
    git(repository, "branch", "old")
    assert git(make(repository, "old"), "branch", "--show-current") == "old"
    git(tmp_path, "clone", "-q", str(repository), "other")
    git(repository, "branch", "far")
    git(tmp_path / "other", "fetch", "-q")
    git(tmp_path / "other", "config", "user.name", "A")
    assert git(make(tmp_path / "other", "far"), "rev-parse", "--abbrev-ref", "@{upstream}") == "origin/far"


@pytest.mark.parametrize("words", [(), ("",), ("a b",), ("--force",), ("a", "b")])
def test_a_wrong_name_is_refused(repository: Path, words: tuple[str, ...]) -> None:
    done = run("claude-worktree.sh", repository, *words)
    assert done.returncode == 2 and done.stderr.startswith("claude-worktree.sh: ")


def test_a_folder_in_the_way_is_left_alone(repository: Path) -> None:
    folder = repository.parent / "re po-worktrees" / "x"
    folder.mkdir(parents=True)
    (folder / "mine").write_text("mine")
    done = run("claude-worktree.sh", repository, "x")
    assert done.returncode == 1 and "is no worktree" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["mine"]


@pytest.fixture
def worktrees(repository: Path) -> dict[str, Path]:
    """One for each reason to keep, and two that can go."""
    names = ("merged", "also", "open", "changed", "untracked", "fresh", "results", "locked")
    folders = {name: make(repository, name) for name in names}
    for name in set(folders) - {"fresh"}:
        commit(folders[name], f"{name}.txt")
        if name != "open":
            git(repository, "merge", "-q", "--no-edit", name)
    (folders["changed"] / "changed.txt").write_text("other")
    (folders["untracked"] / "note.txt").write_text("note")
    (folders["results"] / "data" / "experiments").mkdir(parents=True)
    (folders["results"] / "data" / "experiments" / "rows.jsonl").write_text("{}")
    git(repository, "worktree", "lock", str(folders["locked"]))
    return folders


def test_only_merged_worktrees_without_changes_go(repository: Path, worktrees: dict[str, Path]) -> None:
    done = run("clean-worktrees.sh", worktrees["open"], answer="y\n")
    assert done.returncode == 0, done.stderr
    reasons = {
        "open": "in use",
        "changed": "uncommitted changes",
        "untracked": "uncommitted changes",
        "fresh": "nothing committed yet",
        "results": "results in data/experiments",
        "locked": "locked",
    }
    for name, reason in reasons.items():
        assert f"keep    {worktrees[name]} ({name}): {reason}\n" in done.stdout
    assert {name for name, folder in worktrees.items() if not folder.exists()} == {"merged", "also"}
    assert git(repository, "branch", "--format=%(refname:short)").split() == sorted([*reasons, "main"])
    # Links were removed, not what they lead to.
    assert (repository / ".venv").is_dir() and (repository / ".tiller_cache").is_dir()
    again = run("clean-worktrees.sh", repository)
    assert "(open): not merged into main" in again.stdout
    assert again.stdout.endswith("nothing to remove\n")


@pytest.mark.parametrize("answer", ["n\n", "\n", "", "no, y\n"])
def test_without_a_yes_nothing_is_removed(repository: Path, worktrees: dict[str, Path], answer: str) -> None:
    done = run("clean-worktrees.sh", repository, answer=answer)
    assert done.returncode == 0 and done.stdout.endswith("nothing removed\n")
    assert all(folder.exists() for folder in worktrees.values())
