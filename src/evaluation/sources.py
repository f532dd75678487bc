"""What --tasks names: our files of rows, Python files with inspect-ai tasks, tasks of installed packages."""

import ast
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from src.common.errors import InputError
from src.common.judge_config import judge_config
from src.common.row_files import read_text, require_file
from src.common.rubrics import PLACEHOLDER
from src.common.sources import nearest
from src.evaluation.settings import EvaluateSettings
from src.evaluation.task_files import SUFFIXES, TaskFile, read_task_file
from src.evaluation.task_header import SCORER_NAMES, WITH_OPTIONS

if TYPE_CHECKING:
    from inspect_ai import Task

    from src.evaluation.judge import Judge

EXPECTED = "expected FILE.jsonl, FILE.jsonl@SCORER, my_task.py@NAME or PACKAGE/NAME such as inspect_evals/NAME"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One task."""

    word: str
    """As it was given."""
    name: str
    """Unique in a run."""
    file: TaskFile | None = None
    """The rows of a task from a file; None where inspect-ai finds the task."""
    code: Path | None = None
    """The Python file that defines it."""

    @property
    def weighs(self) -> bool:
        """Whether log-probabilities of given answers are asked."""
        return self.file is not None and self.file.header.scorer in WITH_OPTIONS

    @property
    def inputs(self) -> list[Path]:
        """The files whose content decides what is asked."""
        return [*(self.file.files if self.file else []), *([self.code] if self.code else [])]

    @property
    def judged(self) -> bool:
        """Whether a judge scores it."""
        return self.file is not None and self.file.rubric is not None

    def task(self, judge: "Judge | None") -> "Task | str":
        """What inspect-ai evaluates."""
        from src.evaluation.inspect_tasks import task_of

        return self.word if self.file is None else task_of(self.file, judge)


def read_sources(words: Sequence[str], rubric: Path | None = None) -> list[Source]:
    """
    The tasks that the words name, everything tried that can be without a model. rubric: of judged tasks that name none.
    Raises InputError for what is not there, for a bad file of rows, and for two tasks of one name.
    """
    sources = [_source(word, rubric) for word in words]
    for i, source in enumerate(sources):
        for other in sources[:i]:
            if other.name == source.name:
                raise InputError(f"--tasks {other.word} and {source.word}: both are called {source.name}; rename one")
    return sources


def check_judge(config: EvaluateSettings, sources: Sequence[Source]) -> None:
    """Raises InputError where a task wants a judge or a persona and there is none, and for a judge nobody can ask."""
    for source in sources:
        if not source.judged:
            continue
        if config.judge_model_id is None:
            raise InputError(f"--tasks {source.word}: a judge scores it; give --judge_model_id")
        wanted = set(PLACEHOLDER.findall(source.file.rubric.text)) - set(source.file.header.fill or {})
        if "persona" in wanted and config.personae_json is None:
            raise InputError(f"{source.file.rubric_path}: it wants {{persona}}; give --personae_json")
    if config.judge_model_id is not None:
        if all(source.file and not source.judged for source in sources):
            raise InputError(f"--judge_model_id {config.judge_model_id}: no task wants a judge; leave it out")
        judge_config(
            config.judge_model_id, config.judge_base_url, config.output_dir, temperature=config.judge_temperature
        )


def _source(word: str, rubric: Path | None) -> Source:
    path, at, name = word.rpartition("@") if "@" in Path(word).name else (word, "", "")
    suffix = Path(path).suffix.lower()
    if suffix in SUFFIXES:
        if at and name not in SCORER_NAMES:
            near = nearest(name, SCORER_NAMES)
            raise InputError(f"--tasks {word}: no scorer {name!r}; expected {', '.join(SCORER_NAMES)} (perhaps {near})")
        file = read_task_file(Path(path), name or None, rubric)
        return Source(word=word, name=file.name, file=file)
    if suffix == ".py":
        return _python_source(word, Path(path), name)
    package, slash, task = word.partition("/")
    if not slash or not task or not package.isidentifier():
        raise InputError(f"--tasks {word}: no task; {EXPECTED}")
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"--tasks {word}: the package {package} is not installed (`uv run --with {package.replace('_', '-')} …` "
            f"brings it along), and there is no such file; {EXPECTED}"
        )
    return Source(word=word, name=task.replace("/", "_"))


def _python_source(word: str, path: Path, name: str) -> Source:
    require_file(path)
    try:
        tree = ast.parse(read_text(path), str(path))
    except SyntaxError as error:
        raise InputError(f"{path}:{error.lineno}: {error.msg}; expected Python") from None
    known = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and _is_task(node)]
    if not known:
        raise InputError(f"{path}: no function in it is an inspect-ai task; expected one decorated with @task")
    if name not in known:
        given = f"no task {name!r} in it" if name else "it does not say which task"
        raise InputError(f"--tasks {word}: {given}; expected {path}@NAME with NAME one of {', '.join(known)}")
    return Source(word=f"{path}@{name}", name=name, code=path)


def _is_task(function: ast.FunctionDef) -> bool:
    called = [each.func if isinstance(each, ast.Call) else each for each in function.decorator_list]
    return any(ast.unparse(each).split(".")[-1] == "task" for each in called)
