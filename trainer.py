"""The Trainer of transformers with our losses, and checkpoints of the projector alone."""

from collections import Counter, defaultdict
from pathlib import Path

import transformers
from accelerate.utils import GatheredParameters

from checkpoints import write_arguments


class ProjectorTrainer(transformers.Trainer):
    """The Trainer with the CTC loss, both losses in its log, and checkpoints of the projector."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.arguments = {}  # the flags, to save them beside the weights
        # this process's llm_loss and ctc_loss, each by step, since the last log
        self.losses: dict[str, Counter] = defaultdict(Counter)

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **options)
        step = self.state.global_step
        weight = self.args.ctc_weight
        ctc_only = weight > 0 and step < self.args.ctc_first * self.state.max_steps
        inputs = {**inputs, "ctc_weight": weight, "ctc_only": ctc_only}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        for name in ("llm_loss", "ctc_loss"):
            if name in outputs:
                self.losses[name][step] += outputs[name].detach()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            for name, by_step in self.losses.items():
                total = self.accelerator.reduce(sum(by_step.values()), "sum")
                logs[name] = total.item() / len(by_step)
            self.losses.clear()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or self.args.output_dir)
        # gathers ZeRO-3's shards, for which all processes are needed
        with GatheredParameters([*self.model.projector.parameters()]):
            if self.args.should_save:
                self.model.save_projector(folder / "model.safetensors")
                write_arguments(self.arguments, folder)
