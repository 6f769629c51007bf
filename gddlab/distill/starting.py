"""What a run says of itself when it begins or continues: what it is made of, and what is not as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gddlab.distill.checkpoints import Loaded
from gddlab.distill.health import Alarm
from gddlab.distill.recording import Recorder
from gddlab.files import hash_tensors, read_json, write_json
from gddlab.pretrained.backbones import backbone_sha256
from gddlab.provenance import commit, hardware, versions

if TYPE_CHECKING:
    from gddlab.distill.trainer import Trainer

__all__ = ["begin", "provenance"]


def begin(trainer: Trainer, loaded: Loaded | None) -> Recorder:
    """Opens what rank 0 writes; a new run says what it is made of, a continued one what is not as it was."""
    c, run, size = trainer.config, trainer.config.run_dir, trainer.world.size
    recorder = Recorder(run, nimg=trainer.nimg, total_nimg=trainer.total * c.batch, world_size=size)
    if not (run / "provenance.json").exists():
        card = getattr(trainer.teacher, "card", None)
        write_json(run / "teacher.json", card.to_dict() if card is not None else {"teacher": c.teacher})
        write_json(run / "provenance.json", provenance(trainer))
    known = read_json(run / "provenance.json")
    start = {"nimg": trainer.nimg, "world_size": size, "commit": commit(), "hardware": hardware()}
    write_json(run / "provenance.json", known | {"starts": [*known.get("starts", []), start]})
    if loaded is None:
        return recorder
    kimg = trainer.nimg / 1000
    for damage in loaded.damaged:
        text = f"checkpoint {damage}; the one of {kimg:g} kimg is used instead"
        recorder.alarm([Alarm("checkpoint", kimg, text, 1.0, 0.0)])
    recorder.say(f"{kimg:9.2f} kimg  continued from its checkpoint")
    before = loaded.meta["world_size"]
    if before != size:
        recorder.say(f"on {size} processes, before {before}: {_not_identical(trainer)}")
    return recorder


def provenance(trainer: Trainer) -> dict[str, Any]:
    """What ran: versions, commit, hashes of teacher, mask, data and backbones, processes, hardware."""
    return {
        "versions": versions(),
        "commit": commit(),
        "teacher_sha256": hash_tensors(trainer.teacher.state_dict()),
        "mask": None if trainer.config.mask is None else trainer.config.mask.hash,
        "dataset_sha256": trainer.data.manifest.sha256,
        "backbones": {name: backbone_sha256(name, found) or "random" for name, found in _backbones(trainer)},
        "world_size": trainer.world.size,
        "hardware": hardware(),
    }


def _backbones(trainer: Trainer) -> list[tuple[str, str]]:
    """Frozen backbones and where their weights are looked for."""
    c = trainer.config
    if not trainer.step.adversarial or c.discriminator != "projected":
        return []
    return [(name, c.backbone_weights.get(name, "auto")) for name in c.backbones]


def _not_identical(trainer: Trainer) -> str:
    """What a change of the number of processes changes."""
    what = (
        "the same images and noise, but sums are rounded in another order, so that numbers are not identical to the bit"
    )
    if trainer.step.adversarial and trainer.step.d.coupled and not trainer.config.sync_batchnorm:
        what += "; and each process's BatchNorm sees another part of the batch (sync_batchnorm=True avoids that)"
    return what
