"""A trainer's finished student: saved in plain Hugging Face format, and sent to the hub."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.trainer_utils import HubStrategy

from distilcache.data.storage.files import make_folder
from distilcache.stages.models.cards import PLACE, recorded_origin
from distilcache.stages.models.saving import save_tokenizer
from distilcache.stages.student_train.arguments import SCHEDULE
from distilcache.stages.student_train.config import TrainConfig
from distilcache.stages.student_train.evaluation import EvaluatingTrainer
from distilcache.stages.student_train.export import CardFacts, export_model

CARD_ARGUMENTS = ("num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps", "optim",
                  "bf16")  # fmt: skip
"""Further ``TrainingArguments`` that the model card names."""


class ExportingTrainer(EvaluatingTrainer):
    """Trainer's ways to save and to push a model; tokenizer and model card go with the weights."""

    output_dir: Path

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student alone, with tokenizer and model card, in plain Hugging Face format.

        Args:
            output_dir: Folder; None: the trainer's output folder.
        """
        out = Path(output_dir) if output_dir else self.output_dir
        make_folder(out)
        facts = CardFacts(
            name=out.name,
            role="student",
            cache_fingerprint=self.cache.cache.manifest.fingerprint,
            train=self.train_settings,
            settings=self._all_settings(),
            figures={"steps": self.weights_step, **self.last_losses},
            teachers=self.cache.cache.num_teachers,
            max_length=self.cache.encoding.max_length,
            origin=recorded_origin(self.cache.cache.manifest.provenance),
        )
        teacher = self.cache.cache.teacher_dir
        export_model(self.model, tokenizer_dir=teacher, out=out, facts=facts, trimmed=self.trimmed)
        if self.processing_class is not None:
            save_tokenizer(self.processing_class, out)
        print(f"student: {out}", file=sys.stderr)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As Trainer's; tokenizer and model card go with the weights."""
        if self.args.hub_strategy != HubStrategy.END:
            self.save_model(_internal_call=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        **_: Any,
    ) -> None:
        """Add to the card that ``save_model`` has written; Trainer's draft would replace it."""
        path = self.output_dir / "README.md"
        if not path.exists():
            self.save_model(_internal_call=True)
        card = ModelCard.load(path)
        given = [tags] if isinstance(tags, str) else list(tags or [])
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *given]))
        card.data.language = language or card.data.language
        card.data.license = license or card.data.license
        card.text = card.text.replace(PLACE, self.hub_model_id or PLACE)
        card.save(path)

    def _all_settings(self) -> dict[str, Any]:
        """For the card: the fields of ``[train]``, or ``args`` in place of some of them."""
        ours = {f.name: getattr(self.train_settings, f.name) for f in fields(TrainConfig)}
        if not self.names:
            return ours
        theirs = self.args.to_dict()
        kept = {name: value for name, value in ours.items() if name not in SCHEDULE}
        return {**kept, "args": {name: theirs[name] for name in CARD_ARGUMENTS}}
