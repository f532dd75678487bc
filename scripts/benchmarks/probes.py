"""
Logistic probes of all layers, 5 folds × 5 penalties, against scikit-learn's on the same rows and folds, in one run:
uv run python scripts/benchmarks/probes.py

Rows: the bundled model's residuals (last prompt token, output of every decoder block) of 400 French and English
prompts, once with their labels and once with a fifth of them wrong, so that no AUC is 1; and synthetic rows with a
planted direction. Both sides run on one thread, one after the other. scikit-learn gets the rows already scaled, in
float32, which it computes in, and enough iterations to converge by its own default tolerance; with
--sklearn_tolerance 1e-7 --float64 its AUCs are nearer to the optimum's, and to ours, and it takes longer.
"""

# ruff: noqa: E402 - the libraries read the number of threads when they are imported
import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

from src.ops.probes import C_VALUES, cross_validate, stratified_folds

N_FOLDS = 5
MAX_ITERATIONS = 10_000


class Timed(NamedTuple):
    auc: Tensor
    """Mean over folds, float64 (n_layers, n_penalties)."""
    wall: float
    cpu: float
    note: str = ""


def timed(work: Callable[[], tuple[Tensor, str]]) -> Timed:
    wall, cpu = time.perf_counter(), time.process_time()
    area, note = work()
    return Timed(area, time.perf_counter() - wall, time.process_time() - cpu, note)


def ours(target: Tensor, control: Tensor) -> tuple[Tensor, str]:
    return cross_validate(target, control, n_folds=N_FOLDS, seed=0).auc, ""


def sklearns(rows: Tensor, labels: Tensor, folds: Tensor, tolerance: float) -> tuple[Tensor, str]:
    """The loop one would write. rows: scaled, (n, n_layers, d_model)."""
    area = torch.zeros(rows.shape[1], len(C_VALUES), dtype=torch.float64)
    labels, n_unconverged = labels.numpy(), 0
    for layer in range(rows.shape[1]):
        at_layer = rows[:, layer].contiguous().numpy()
        for fold in range(N_FOLDS):
            held = (folds == fold).numpy()
            for i, c in enumerate(C_VALUES):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", ConvergenceWarning)
                    probe = LogisticRegression(C=c, tol=tolerance, max_iter=MAX_ITERATIONS)
                    probe.fit(at_layer[~held], labels[~held])
                n_unconverged += any(issubclass(each.category, ConvergenceWarning) for each in caught)
                area[layer, i] += roc_auc_score(labels[held], probe.decision_function(at_layer[held])) / N_FOLDS
    return area, f"{n_unconverged} of scikit-learn's fits did not converge" if n_unconverged else ""


def compare(name: str, target: Tensor, control: Tensor, arguments: argparse.Namespace) -> None:
    """Prints the table's row."""
    rows, labels = torch.cat([target, control]), torch.cat([torch.ones(len(target)), torch.zeros(len(control))])
    folds = stratified_folds(len(target), len(control), N_FOLDS, seed=0)
    centred = rows - rows.mean(dim=0)
    scaled = centred / centred.double().square().sum(dim=-1).mean(dim=0).sqrt().float()[None, :, None]
    scaled = scaled.double() if arguments.float64 else scaled
    cross_validate(target[:20, :1], control[:20, :1])  # the first call pays for loading code
    our, their = (
        timed(lambda: ours(target, control)),
        timed(lambda: sklearns(scaled, labels, folds, arguments.sklearn_tolerance)),
    )
    apart = (our.auc - their.auc).abs().max()
    best = their.auc.max(dim=1).values
    ratios = f"{their.wall / our.wall:.1f}× | {their.cpu / our.cpu:.1f}×"
    print(
        f"| {name} | {tuple(rows.shape)} | {our.wall:.1f} | {our.cpu:.1f} | {their.wall:.1f} | {their.cpu:.1f} | "
        f"{ratios} | {apart:.4f} | {best.min():.3f} to {best.max():.3f} | {our.note}{their.note}",
        flush=True,
    )


def residuals(n_rows: int) -> tuple[Tensor, Tensor]:
    """Last-token outputs of the decoder blocks, float32 (n_rows / 2, n_layers, d_model) for French and for English."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from src.common.rows import read_prompts
    from src.models.architectures import decoder_layers
    from src.models.bundled import bundled_folder

    folder = bundled_folder("bundled:smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kept: list[Tensor] = []
    for layer in decoder_layers(model):
        layer.register_forward_hook(
            lambda module, inputs, output: kept.append((output if isinstance(output, Tensor) else output[0])[0, -1])
        )

    def row(system: str, prompt: str) -> Tensor:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        kept.clear()
        model.model(**tokenizer(text, return_tensors="pt", add_special_tokens=False))
        return torch.stack(kept)

    systems = ("You are a helpful assistant.", "You answer the questions of the readers of a newspaper.")
    classes = []
    with torch.inference_mode():
        for side in ("target", "control"):
            prompts = read_prompts(ROOT / "data" / "directions" / "french_english" / f"{side}.jsonl")
            cases = [(system, prompt.text) for system in systems for prompt in prompts[: n_rows // 4]]
            classes.append(torch.stack([row(*case) for case in cases]))
    return classes[0].clone(), classes[1].clone()


def mislabelled(target: Tensor, control: Tensor) -> tuple[Tensor, Tensor]:
    """A fifth of the rows in the other class, as many from each."""
    n = len(target) // 5
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(1))
    out, stay = order[:n], order[n:]
    return torch.cat([target[stay], control[out]]), torch.cat([control[stay], target[out]])


def planted(n: int, n_layers: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows whose variance falls as a power law over coordinates, as residuals' does, and one direction between them."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n, n_layers, width, generator=generator) * torch.arange(1, width + 1) ** -0.5
    direction = torch.randn(n_layers, width, generator=generator) * torch.arange(1, width + 1) ** -0.5
    shift = 0.5 * direction / direction.norm(dim=-1, keepdim=True)
    return rows[: n // 2] + shift / 2, rows[n // 2 :] - shift / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400, help="of the bundled model's, at most 416")
    parser.add_argument("--layers", type=int, default=30, help="of the synthetic rows")
    parser.add_argument("--width", type=int, default=4096, help="of the synthetic rows")
    parser.add_argument("--sklearn_tolerance", type=float, default=1e-4, help="scikit-learn's own default is 1e-4")
    parser.add_argument("--float64", action="store_true", help="give scikit-learn float64 rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    import sklearn

    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores of which one is used, load "
        f"{os.getloadavg()[0]:.1f}; torch {torch.__version__}, scikit-learn {sklearn.__version__}\n"
    )
    print(
        "| rows | (n, layers, width) | wall s | CPU s | scikit-learn wall s | CPU s | faster by wall | by CPU | "
        "largest difference of held-out AUC | best AUC by layer |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    target, control = residuals(arguments.rows)
    compare("French/English", target, control, arguments)
    compare("French/English, a fifth mislabelled", *mislabelled(target, control), arguments)
    compare("synthetic", *planted(arguments.rows, arguments.layers, arguments.width), arguments)


if __name__ == "__main__":
    main()
