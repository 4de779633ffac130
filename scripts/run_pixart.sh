#!/usr/bin/env bash
# diffusion-fast's PixArt-α experiments on a GPU: one command a bar, all in one ladder, then the table and the plot.
# A rung that fails stops none after it. Arguments go to every command: scripts/run_pixart.sh --weights random
# Without --resume's memory of what is done already it would be: diffusion-fast ladder --model pixart-alpha
set -u
status=0
bar() { diffusion-fast ladder --model pixart-alpha --tag run_pixart --resume --only "$@" || status=1; }

bar baseline "$@"      # fp32 with TF32, vanilla attention
bar bf16 "$@"
bar sdpa "$@"
bar compile "$@"       # transformer and VAE, channels_last, max-autotune
bar fused-qkv "$@"
bar int8-dynamic "$@"  # layers by their rows and features: SDXL's list of shapes means nothing at a width of 1,152

diffusion-fast report || status=1
exit $status
