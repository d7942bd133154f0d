#!/usr/bin/env bash
# Distillation loss under autocast on a CPU. One expects log_softmax to answer in float32, as
# cross_entropy does and as autocast on CUDA is documented to do. On a CPU it keeps bfloat16 for
# logits in bfloat16. Where student and teacher are close, as near the end of distillation, the
# rounding is as large as their divergence: the loss is wrong, here even below zero, and its
# gradient points elsewhere. kl_div does answer in float32, so the type of the loss does not show
# it. Write log_softmax(logits.float(), -1).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys, torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

torch.manual_seed(0)
teacher = 3 * torch.randn(256, 1000)
student = (teacher + 0.01 * torch.randn(256, 1000)).bfloat16()


def distil(wide):
    logits = student.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        log_p = log_softmax(logits.float() if wide else logits, -1)
        loss = kl_div(log_p, log_softmax(teacher, -1), log_target=True, reduction="batchmean")
        labels = cross_entropy(logits, teacher.argmax(-1))
    loss.backward()
    return log_p.dtype, loss.dtype, labels.dtype, loss.item(), logits.grad.float().flatten()


plain, wide = distil(False), distil(True)
angle = torch.rad2deg(torch.arccos(torch.cosine_similarity(plain[4], wide[4], dim=0))).item()
print(f"torch {torch.__version__}")
print("expected: float32 of each; the same loss and gradient with .float() and without")
print(f"seen: log_softmax {plain[0]}, kl_div {plain[1]}, cross_entropy {plain[2]}; loss "
      f"{plain[3]:.2e} where .float() gives {wide[3]:.2e}; gradients {angle:.0f} degrees apart")
if plain[0] != torch.bfloat16 or wide[0] != torch.float32:
    sys.exit("changed: log_softmax under autocast on a CPU")
if plain[1] != torch.float32 or plain[2] != torch.float32:
    sys.exit("changed: kl_div or cross_entropy")
if plain[3] >= 0 or wide[3] <= 0 or angle < 5:
    sys.exit("changed: the loss, or its gradient")
PY
