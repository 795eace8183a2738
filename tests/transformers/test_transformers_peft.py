"""LoRA adapters by PEFT: what is saved is the adapter, and it resumes, ranks and loads as the whole model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hf_tiny import At, folders, make_model, make_trainer, quiet, records, same, weights_of

from checkpointer import CheckpointerWarning, EverySteps, KeepBest, KeepLast, Policy

peft = pytest.importorskip("peft", reason="needs peft")
pytestmark = quiet

POLICY = Policy(EverySteps(3), [KeepBest(1, "eval_loss", mode="min"), KeepLast(1)], last="link", rescue=False)


def adapted() -> Any:
    """Return the tiny model with an adapter, the same each time."""
    return peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))


@pytest.mark.parametrize("attached", [False, True])
def test_an_adapter_is_resumed_to_the_same_weights(tmp_path: Path, attached: bool) -> None:
    """And its checkpoint holds no weights of the model below."""
    unbroken = make_trainer(tmp_path / "unbroken", POLICY, model=adapted(), attached=attached)
    unbroken.train()
    with pytest.raises(ZeroDivisionError):
        make_trainer(
            tmp_path / "run", POLICY, model=adapted(), attached=attached, callbacks=[At(7, lambda: 1 // 0)]
        ).train()
    resumed = make_trainer(tmp_path / "run", POLICY, model=adapted(), attached=attached)
    resumed.args.load_best_model_at_end = True
    resumed.train(resume_from_checkpoint=True)
    assert same(weights_of(unbroken), weights_of(resumed))
    assert folders(tmp_path / "unbroken") == folders(tmp_path / "run")
    names = {path.name for path in (tmp_path / "run/checkpoint-10").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names


def test_a_half_written_adapter_is_moved_aside(tmp_path: Path) -> None:
    """One without a record, from a Trainer without us."""
    make_trainer(tmp_path, None, model=adapted(), save_strategy="steps", save_steps=5).train()
    (tmp_path / "checkpoint-10/adapter_model.safetensors").unlink()
    with pytest.warns(CheckpointerWarning, match="checkpoint-10 is not a whole checkpoint: it has no weights"):
        make_trainer(tmp_path, POLICY, model=adapted())
    assert ["checkpoint-5", "incomplete-checkpoint-10"] == folders(tmp_path)
    assert {} == records(tmp_path)
    assert 5 == json.loads((tmp_path / "checkpoint-5/trainer_state.json").read_text())["global_step"]
