"""Flags of a run that takes seconds: a Llama of two thousand parameters a layer on the tiny corpus."""

from __future__ import annotations

MODEL = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --num-query-groups 2 "
    "--max-position-embeddings 128 --rotary-base 10000 --norm-epsilon 1e-5 --untie-embeddings-and-output-weights"
).split()
DATA = "--seq-length 96 --suffix-length 16 --min-prefix-length 8".split()
TRAINING = (
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 6 --lr 1e-3 --lr-decay-iters 6 --num-rollouts 3 "
    "--quality-weight 0 --classifier-weight 1 --reference-update-interval 2"
).split()
