#!/usr/bin/env bash
# diffusion-fast's three SDXL experiments on a CPU, bf16 with SDPA throughout: eager, compiled, compiled with fused QKV.
# Arguments go to every command: scripts/run_sd_cpu.sh --weights random --steps 2
set -u
status=0
bar() { diffusion-fast ladder --ladder cpu --device cpu --model sdxl --tag run_sd_cpu --resume --only "$@" || status=1; }

bar sdpa "$@"
bar compile "$@"
bar fused-qkv "$@"

diffusion-fast report || status=1
exit $status
