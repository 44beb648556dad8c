#!/usr/bin/env bash
# The whole runtime with its NEON kernels, cross-compiled and run by an emulator: needs aarch64-linux-gnu-g++ and qemu-aarch64
# (Debian: g++-aarch64-linux-gnu, qemu-user). Says so and exits 2 where they are missing.
set -eu
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
    command -v "$tool" >/dev/null || { echo "arm64.sh: $tool is missing" >&2; exit 2; }
done
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
cd "$here/.."
aarch64-linux-gnu-g++ -std=c++20 -O1 -w -fopenmp -static tests/ensemble.cpp runtime/*.cpp layers/*.cpp \
    kernels/dispatch.cpp kernels/neon.cpp -o "$room/ensemble" 2>/dev/null
qemu-aarch64 "$room/ensemble"
