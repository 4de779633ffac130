#!/usr/bin/env bash
# diffusion-fast's SDXL experiments on a GPU: one command a published bar, all in one ladder, then the table and the plot.
# A rung that fails stops none after it. Arguments go to every command: scripts/run_sd.sh --weights random
# Without --resume's memory of what is done already it would be: diffusion-fast ladder --model sdxl
set -u
status=0
bar() { diffusion-fast ladder --model sdxl --tag run_sd --resume --only "$@" || status=1; }

bar baseline "$@"      # 7.36 s on an A100: fp32 with TF32, vanilla attention
bar bf16 "$@"          # 4.63
bar sdpa "$@"          # 3.31
bar compile "$@"       # 2.54: UNet and VAE, channels_last, max-autotune
bar fused-qkv "$@"     # 2.52
bar int8-dynamic "$@"  # 2.43

diffusion-fast report || status=1
exit $status
