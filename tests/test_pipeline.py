"""What a base model is taken to predict, and in which noise schedule. Hermetic."""

import json
from pathlib import Path

from tests.conftest import build_base
from utils.pipeline import assemble, load_base, with_schedule

NAMED = {
    "_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True,
}  # fmt: skip


def test_a_schedule_is_changed_also_in_what_the_bases_own_file_does_not_name(tmp_path: Path) -> None:
    """As that of Stable Diffusion 1.5: of a configuration changed by hand diffusers takes no key that its file did not have."""
    base = build_base(tmp_path / "base")
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(NAMED))
    loaded = load_base(str(base))
    assert with_schedule(loaded).noise_scheduler.config.prediction_type == "epsilon"
    changed = with_schedule(loaded, "v_prediction", rescale_betas_zero_snr=True)
    for scheduler in (changed.noise_scheduler, assemble(changed, "ddim").scheduler):
        assert scheduler.config.prediction_type == "v_prediction"
        assert scheduler.config.timestep_spacing == "trailing"
        assert scheduler.config.beta_schedule == "scaled_linear"
        assert scheduler.alphas_cumprod[-1] == 0
