"""TRL's SFTTrainer on tokenised rows, one optimizer step a round."""

import tempfile

from benchmarks import protocol
from benchmarks.peers import task as task_lib
from benchmarks.peers import torch_peer


class Sft:
  def __init__(self, task):
    self.task = task

  def train(self, stepped):
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    task = self.task

    class OneStepARound(TrainerCallback):
      def on_step_begin(self, args, state, control, **kwargs):
        stepped.begin()

      def on_step_end(self, args, state, control, **kwargs):
        torch_peer.synchronize()
        stepped.end()

    rows = task_lib.random_rows(task, task["batch"] * 64, task["length"])
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<pad>")),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>",
    )
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=1_000_000, report_to=[], save_strategy="no",
        logging_strategy="no", per_device_train_batch_size=task["batch"],
        gradient_accumulation_steps=1, gradient_checkpointing=False, max_length=task["length"],
        learning_rate=1e-5, adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0,
        bf16=torch_peer.dtype_of(task) == torch.bfloat16, disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False,
    )
    trainer = SFTTrainer(
        model=torch_peer.make_model(task, torch.float32),
        args=config,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer,
        callbacks=[OneStepARound()],
    )
    trainer.train()

  def setup(self):
    import trl  # noqa: F401  Missing packages must show here, not in the thread.

    self.stepped = protocol.Stepped(self.train)
    return {
        "compile_seconds": protocol.warm_up(self.stepped.round),
        "versions": task_lib.versions("trl", "transformers", "torch"),
    }

  def round(self):
    return {"main": self.stepped.round()}

  def finish(self):
    return {"peak_bytes": torch_peer.peak_bytes()}


if __name__ == "__main__":
  task_lib.serve(lambda task: task_lib.pick(task, {"sft": Sft}))
