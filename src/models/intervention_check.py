"""Whether a command's interventions fit its model, from the model's files alone: a large one takes minutes to load."""

from src.common.capture_spec import CaptureSpec
from src.common.intervention_config import InterventionConfigBase, naming
from src.common.resolved_interventions import ResolvedSpec, resolve
from src.models.loading import load_config
from src.models.loading import resolve as find_files


def refuse_unfit(config: InterventionConfigBase, kept: CaptureSpec | None = None) -> ResolvedSpec | None:
    """
    What the command's interventions are on its model, None without any.

    Raises InputError, as `LanguageModel.resolve` does on the loaded model, for directions of another model and for
    layers that it lacks, those of `kept` too; and as `loading.resolve` for a model that cannot be found.
    """
    entries, projection = config.entries(), config.projection_entry()
    if not entries and projection is None and kept is None:
        return None
    files = find_files(config)
    shape = load_config(files.folder, config.trust_remote_code).get_text_config(decoder=True)

    def fit(some: list) -> ResolvedSpec:
        return resolve(
            some, n_layers=shape.num_hidden_layers, d_model=shape.hidden_size,
            model_fingerprint=files.facts["model_fingerprint"], adapter_fingerprint=files.facts["adapter_fingerprint"],
            allow_model_mismatch=config.allow_model_mismatch,
        )  # fmt: skip

    if kept is not None:
        kept.of(1, shape.num_hidden_layers, ("resid_post",))
    if config.steer is None:
        fit(entries)
    for text, each in zip(config.steer or [], entries, strict=False):
        with naming(f"--steer {text}"):
            fit([each])
    if projection is not None:
        with naming(f"--project_onto {config.project_onto}"):
            fit([projection])
    return fit(entries) if entries else None
