"""
The full figures of src.extract_directions: layer identity over architectures, a planted direction, a persona direction
from a persona run, and the same extractions on transformers and on vLLM. About 25 minutes on two cores:
uv run --extra cpu python scripts/acceptance/directions.py --output_dir data/experiments/acceptance_directions
"""

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MODEL_ID = "bundled:smollm2-135m"
COOKING = ROOT / "data/directions/cooking_other"
ARCHITECTURES = ("llama", "qwen3", "gemma3", "qwen3_moe", "mixtral", "gpt2")
POSITIONS = ("last_prompt", "token:-2", "mean_prompt")
TEXTS = ("Why is the sky blue?", "A short one", "Tell me a longer story about the sea, its ships and its weather.")


def command(name: str, *words: object) -> str:
    """Runs a command, prints it as it is to be given, returns what it printed."""
    words = [str(word) for word in words]
    print(f"\n$ uv run -m src.{name} {' '.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", f"src.{name}", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    print(done.stdout, flush=True)
    return done.stdout


def layer_identity(model_ids: list[str]) -> None:
    """
    Our rows against transformers' own hidden states, which are the blocks' outputs but for the last, the model's final
    norm of it. A model that is named is read raw, after a BOS.
    """
    import torch

    from src.directions.examples import Example
    from src.directions.rendering import PromptRenderer
    from src.directions.settings import DirectionSettings
    from src.models.architectures import decoder_layers, final_norm
    from src.models.language_model import LanguageModel
    from src.models.residuals import extract
    from src.models.token_sequences import TokenSequence
    from tests.tiny_models import tiny_model

    print("Largest distance from transformers' own, as a share of the norm\n")
    print("| model | layers | all but the last | last, after the final norm | last as it is |")
    print("|---|---|---|---|---|")
    for name in (*ARCHITECTURES, *model_ids):
        if name in ARCHITECTURES:
            model = tiny_model(name)
            ids = {n: tuple(range(7, 7 + n)) for n in (4, 9, 17)}
            sequences = [TokenSequence(id=str(n), token_ids=ids[n], prompt_length=n) for n in ids]
        else:
            settings = DirectionSettings(
                model_id=name, output_dir=Path("unused"), pairs_path=Path("unused"), raw_prompts=True, dtype="float32"
            )
            wrapped = LanguageModel.load(settings)
            model, renderer = wrapped.model, PromptRenderer(settings, wrapped.tokenizer, date.today())
            sequences = renderer.sequences(Example(id=text, side="target", text=text, keys=()) for text in TEXTS)
        n_layers, rows = len(decoder_layers(model)), {}
        keep = lambda ids, found, rows=rows: rows.update({ids[0]: found})  # noqa: E731
        extract(model, sequences, layers=range(n_layers), position="all", on_rows=keep)
        errors = []
        for sequence in sequences:
            with torch.no_grad():
                output = model(input_ids=torch.tensor([sequence.token_ids]), output_hidden_states=True)
                theirs = torch.stack(output.hidden_states[1:], dim=2)[0]
                ours = rows[sequence.id]
                normed = final_norm(model)(ours[:, -1])
            compared = (ours[:, :-1], theirs[:, :-1]), (normed, theirs[:, -1]), (ours[:, -1], theirs[:, -1])
            errors.append([float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max()) for a, b in compared])
        worst = [max(each) for each in zip(*errors, strict=True)]
        print(f"| {name} | {n_layers} | {worst[0]:.1e} | {worst[1]:.1e} | {worst[2]:.1e} |", flush=True)


def planted(folder: Path, layer: int = 14) -> None:
    """A known direction in one down_proj, made from every other prompt and looked for with the rest."""
    import numpy as np

    from src.common.directions_file import read_directions
    from src.directions.examples import read_contrast
    from src.directions.rendering import PromptRenderer
    from src.directions.settings import METHODS, DirectionSettings
    from src.models.language_model import LanguageModel
    from tests.planted_model import plant, save

    settings = DirectionSettings(
        model_id=MODEL_ID, output_dir=folder, dtype="float32", positive_path=str(COOKING / "target.jsonl"),
        negative_path=str(COOKING / "control.jsonl"),
    )  # fmt: skip
    model, contrast = LanguageModel.load(settings), read_contrast(settings)
    renderer = PromptRenderer(settings, model.tokenizer, date.today())
    truth = plant(
        model, renderer.sequences(contrast.target[::2]), renderer.sequences(contrast.control[::2]), layer, strength=4.0
    )
    folder.mkdir(parents=True, exist_ok=True)
    save(model, folder / "model")
    for name in ("target", "control"):
        rows = [json.dumps({"id": e.id, "prompt": e.text}) for e in getattr(contrast, name)[1::2]]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    lines = []
    for method in METHODS:
        for project_out in ("none", "control_mean") if method == "mean_difference" else ("none",):
            target = folder / f"{method}_{project_out}"
            k = 2 if method in ("mean_and_pca", "cones") else 1
            command(
                "extract_directions", "--positive_path", folder / "target.jsonl", "--negative_path",
                folder / "control.jsonl", "--model_id", folder / "model", "--token_position", "mean_prompt",
                "--method", method, "--n_directions", k, "--project_out", project_out, "--output_dir", target,
            )  # fmt: skip
            found = read_directions(target / "directions.safetensors")
            cosines = np.linalg.norm(found.directions @ truth.u.numpy().astype(np.float32), axis=1)
            shown = " | ".join(f"{cosines[i]:.3f}" for i in (layer - 1, layer, layer + 1, layer + 6, 29))
            lines.append(f"| {method} | {project_out} | {cosines.argmax()} | {shown} |")
    print(f"|cos| with the planted direction (of its projection on the span, for several), layer {layer}\n")
    print(f"| method | taken out | largest at | {layer - 1} | {layer} | {layer + 1} | {layer + 6} | 29 |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(lines), flush=True)


def persona(folder: Path) -> None:
    """run → extract → steer with the command that the extraction names."""
    prompts = "data/personas/prompts.json"
    (folder / "personae.json").write_text(json.dumps([
        {"persona": "assistant", "category": "plain", "article": "an"},
        {"persona": "Hamlet", "category": "fiction", "article": ""},
    ]))  # fmt: skip
    command(
        "run_personas", "--prompts_json", prompts, "--personae_json", folder / "personae.json", "--model_id", MODEL_ID,
        "--max_tokens", "48", "--token_arrays", "--num_tasks", "40", "--output_dir", folder / "hamlet_run",
    )  # fmt: skip
    printed = command(
        "extract_directions", "--positive_run", folder / "hamlet_run/results.jsonl", "--where", "persona=Hamlet",
        "--model_id", MODEL_ID, "--export", "gguf", "--output_dir", folder / "hamlet",
    )  # fmt: skip
    following = next(line for line in printed.split("\n") if line.startswith("next: "))
    if (ROOT / "src/steer.py").exists():
        command("steer", *following.split("src.steer ")[1].split(), "--max_tokens", "48")


def backends(folder: Path) -> None:
    """Every token position on both backends; mean_response with the run of `persona` where that is there."""
    runs = {position: ["--positive_path", COOKING / "target.jsonl", "--negative_path", COOKING / "control.jsonl",
                       "--token_position", position] for position in POSITIONS}  # fmt: skip
    if (folder / "hamlet_run/DONE").exists():
        runs["mean_response"] = ["--positive_run", folder / "hamlet_run/results.jsonl", "--where", "persona=Hamlet"]
    lines = []
    for position, words in runs.items():
        targets = {name: folder / "backends" / f"{position.replace(':', '_')}_{name}" for name in ("hf", "vllm")}
        for name, target in targets.items():
            command(
                "extract_directions", *words, "--model_id", MODEL_ID, "--dtype", "float32", "--device", "cpu",
                "--backend", name, "--output_dir", target,
            )  # fmt: skip
        lines.append(f"| {position} | {' | '.join(_compared(targets['hf'], targets['vllm']))} |")
    print("vLLM against transformers, float32, every layer\n")
    print("| position | rows | least cosine of rows | Δ, share of the norm | least cosine of directions | best layer |")
    print("|---|---|---|---|---|---|")
    print("\n".join(lines), flush=True)


def _compared(hf: Path, vllm: Path) -> list[str]:
    import numpy as np
    import torch

    from src.common.directions_file import read_directions
    from src.models.residual_store import read_rows, read_shards

    ids = [i for shard in read_shards(hf / "residuals") for i in shard.ids]
    a, b = (read_rows(run / "residuals", ids) for run in (hf, vllm))
    cosine = torch.cosine_similarity(a, b, dim=-1).min()
    difference = ((a - b).norm(dim=-1) / a.norm(dim=-1)).max()
    found = [read_directions(run / "directions.safetensors") for run in (hf, vllm)]
    cosines = np.abs((found[0].directions * found[1].directions).sum(axis=-1))[list(found[0].layers_present)]
    best = " and ".join(str(each.metadata.best_layer) for each in found)
    return [str(len(ids)), f"{cosine:.7f}", f"{difference:.1e}", f"{cosines.min():.6f}", best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--model_id", nargs="*", default=[MODEL_ID], help="models whose layers are compared too")
    parser.add_argument("--parts", nargs="*", default=["identity", "planted", "persona", "backends"])
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    if "identity" in arguments.parts:
        layer_identity(arguments.model_id)
    if "planted" in arguments.parts:
        planted(arguments.output_dir / "planted")
    if "persona" in arguments.parts:
        persona(arguments.output_dir)
    if "backends" in arguments.parts:
        backends(arguments.output_dir)


if __name__ == "__main__":
    main()
