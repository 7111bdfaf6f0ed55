#!/usr/bin/env bash
# Two cycles of Search-E1 with Qwen2.5-7B-Instruct on two nodes of eight GPUs;
# arguments are those of launch.sh, among them settings (key=value).
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" --nodes 2 configs/qwen2.5-7b.yaml "$@"
