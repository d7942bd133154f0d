#!/usr/bin/env bash
# Noise on the embeddings (NEFTune) in plain Trainer: one sets neftune_noise_alpha and expects
# other losses. BERT has them. With BART, mBART and T5 not a bit changes, however much noise is
# asked for: Trainer hooks the module that get_input_embeddings() returns, `shared`, but encoder
# and decoder look tokens up in modules of their own that only share its weight. Register
# neftune_post_forward_hook on get_encoder().embed_tokens by hand.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys
import torch, transformers
from transformers import (
    BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM, MBartConfig,
    MBartForConditionalGeneration, T5Config, T5ForConditionalGeneration, Trainer,
    TrainingArguments,
)
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.trainer_callback import PrinterCallback

bart = dict(
    vocab_size=99, max_position_embeddings=32, d_model=16, encoder_layers=1, decoder_layers=1,
    encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    dropout=0.0,
)
models = {
    "bert": lambda: BertForMaskedLM(BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**bart)),
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**bart)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(
        vocab_size=99, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0)),
}
rows = [{"input_ids": list(range(5, 15)), "labels": list(range(5, 15))}] * 4


def loss(make, alpha, by_hand=False):
    torch.manual_seed(0)
    model = make()
    if by_hand:
        table, shared = model.get_encoder().embed_tokens, model.get_input_embeddings()
        if table is shared or table.weight is not shared.weight:
            sys.exit("changed: the encoder's table")
        table.neftune_noise_alpha, alpha = alpha, None
        table.register_forward_hook(neftune_post_forward_hook)
    arguments = TrainingArguments(
        "out", max_steps=1, per_device_train_batch_size=4, neftune_noise_alpha=alpha,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    return trainer.train().training_loss


print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: other losses with noise")
for name, make in models.items():
    losses = [loss(make, alpha) for alpha in (None, 5.0, 500.0)]
    print(f"seen: {name}: loss without noise, with alpha 5 and 500:",
          *(f"{loss_:.7f}" for loss_ in losses))
    if len(set(losses)) != (3 if name == "bert" else 1):
        sys.exit(f"changed: {name}")
    if name != "bert":
        helped = loss(make, 5.0, by_hand=True)
        print(f"seen: {name}: with alpha 5 by hand: {helped:.7f}")
        if helped == losses[0]:
            sys.exit("changed: what helps")
PY
