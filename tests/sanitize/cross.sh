#!/bin/sh
# `make cross`: the CPU engine's portable kernels for aarch64, without a warning, and the sanitizer driver's odd sizes under qemu. Build files go
# to build/cross. Fails on the first warning or wrong result.
set -eu
cd "$(dirname "$0")/../.."
out=build/cross
cxx=${CXX:-aarch64-linux-gnu-g++}
run=${RUN:-qemu-aarch64-static -L /usr/aarch64-linux-gnu}
for tool in ${cxx%% *} ${run%% *}; do
  command -v "$tool" > /dev/null || { echo "cross: $tool not found; fix: apt install g++-aarch64-linux-gnu qemu-user-static, or set CXX and RUN" >&2; exit 2; }
done
rm -rf "$out"
mkdir -p "$out"
for source in csrc/cpu/*.cpp tests/sanitize/*_driver.cpp; do
  case $source in *isa_avx*.cpp | *isa_amx*.cpp) continue ;; esac
  echo "$cxx -std=c++17 -O2 -Wall -Wextra -Werror -Icsrc -c $source -o $out/$(basename "$source" .cpp).o"
done | xargs -P 2 -I {} sh -c '{}'
$cxx "$out"/*.o -o "$out/driver" -ldl
$run "$out/driver"
